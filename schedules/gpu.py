"""Spaces for NVIDIA GPUs: which one a kernel has, and those of the kernels without matrix products.

Every kernel is a few launches: pooling, the sums of W's taps, one product for grad_x (which expands as it stores), one
for grad_W in parts, and sums. Only the products and the pooling of x have much to choose.
"""

from __future__ import annotations

from typing import Any

from tvm import s_tir

from gf_tvm.core.workload import Workload
from gf_tvm.errors import BuildError
from gf_tvm.kernels.gpu import unfused
from gf_tvm.machine.profiles import DeviceProfile

from .gpu_maps import (
    bind_threads,
    channel_sum,
    compute_at,
    map_blocks,
    map_of_sums,
    mean_vector,
    new_schedule,
    pool,
    store_patch,
    vector_width,
)
from .gpu_products import products
from .space import Config, Space


def get_space(workload: Workload, profile: DeviceProfile) -> Space:
    """The space of ``workload`` on a GPU."""
    geometry, kernel = workload.geometry, workload.kernel
    if kernel.startswith("backward"):
        return _depthwise(workload) if geometry.depthwise else products(workload, profile, unfused.backward)
    if kernel in ("input_grad", "weight_grad"):
        return products(workload, profile, unfused.input_grad if kernel == "input_grad" else unfused.weight_grad)
    if kernel == "filter_input":
        return _filter_input(workload)
    if kernel == "filter_grad":
        return _map_space(workload, unfused.filter_grad)
    if kernel == "expand":
        return _map_space(workload, unfused.expand)
    raise BuildError(f"GPUs have no space for the kernel {kernel!r}")


def _map_space(workload: Workload, define: Any) -> Space:
    """Pooling of grad_y, or expansion: one thread a patch."""
    geometry = workload.geometry

    def build(config: Config) -> s_tir.Schedule:
        sch = new_schedule(define(workload))
        if workload.kernel == "filter_grad":
            g = sch.get_sblock("g")
            map_of_sums(sch, g, 4, config["threads"])
            pool(sch, sch.get_sblock("pixels"), g, mean_vector(geometry))
            channel_sum(sch, "bias", "grad_b", 1)
        else:
            grad_x = sch.get_sblock("grad_x")
            map_blocks(sch, grad_x, 4, config["threads"])
            store_patch(sch, grad_x, geometry)
        return sch

    return Space({"threads": (64, 128, 256)}, {"threads": 256}, build)


def _depthwise(workload: Workload) -> Space:
    """A depthwise convolution's backward pass: maps and sums."""
    geometry = workload.geometry

    def build(config: Config) -> s_tir.Schedule:
        sch = new_schedule(unfused.depthwise_backward(workload))
        g = sch.get_sblock("g")
        map_of_sums(sch, g, 4, config["threads"])
        pool(sch, sch.get_sblock("pixels"), g, mean_vector(geometry))
        if workload.kernel != "backward_weight":
            if not geometry.dilated:
                map_of_sums(sch, sch.get_sblock("taps"), 1)
            grad_x, grid = sch.get_sblock("grad_x"), sch.get_sblock("grid")
            thread = map_blocks(sch, grad_x, 4, config["threads"])
            compute_at(sch, grid, thread, "local")
            store_patch(sch, grad_x, geometry)
        if workload.kernel != "backward_input":
            channel_sum(sch, "weight", "grad_w", 4)
        channel_sum(sch, "bias", "grad_b", 1)
        return sch

    return Space({"threads": (64, 128, 256)}, {"threads": 256}, build)


def _filter_input(workload: Workload) -> Space:
    """Pooling of x. Channels last: a tile of patches and channels is turned in shared memory."""
    geometry = workload.geometry
    vector = vector_width(geometry.cols.in_exact, geometry.cols.window)
    patches = geometry.n * geometry.grid[0] * geometry.grid[1]
    sizes = tuple(size for size in (8, 16, 32, 64) if size < 2 * max(geometry.ci, 8))
    lengths = tuple(size for size in (16, 32, 64) if size < 2 * max(patches, 16))

    def build(config: Config) -> s_tir.Schedule:
        sch = new_schedule(unfused.filter_input(workload))
        out, pixels = sch.get_sblock("filtered_x"), sch.get_sblock("pixels")
        if geometry.depthwise:
            map_of_sums(sch, out, 4, config["threads"])
            pool(sch, pixels, out, vector)
            return sch
        tile = sch.get_sblock("tile")
        turned = sch.cache_write(tile, 0, "local")
        m, c = sch.get_loops(out)
        mo, mi = sch.split(m, [None, config["m"]])
        co, ci = sch.split(c, [None, config["c"]])
        sch.reorder(mo, co, mi, ci)
        sch.bind(mo, "blockIdx.x")
        sch.bind(co, "blockIdx.y")
        compute_at(sch, turned, co, "shared")
        sch.storage_align(turned, 0, 0, 32, 1)  # neither rows nor columns of the tile meet in one bank
        bind_threads(sch, sch.fuse(mi, ci), config["threads"])
        thread = bind_threads(sch, sch.fuse(*sch.get_loops(turned)[-2:]), config["threads"])
        sch.compute_at(tile, thread, preserve_unit_loops=True)
        pool(sch, pixels, tile, vector)
        return sch

    if geometry.depthwise:
        return Space({"threads": (64, 128, 256)}, {"threads": 256}, build)
    knobs = {"m": lengths, "c": sizes, "threads": (64, 128, 256)}
    return Space(knobs, {"m": min(32, lengths[-1]), "c": min(32, sizes[-1]), "threads": 256}, build)

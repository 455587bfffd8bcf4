"""Spaces of GPU kernels with matrix products: the backward pass of dense and grouped convolutions, and its parts.

Tiles in shared memory, sums in registers; the expansion of grad_x, and where a block can take all channels the pooling
of grad_y as well, happen in the product's kernel.
"""

from __future__ import annotations

import itertools
from typing import Any

from tvm import s_tir, tirx

from gf_tvm.core.geometry import Geometry, ceil_div, pad
from gf_tvm.core.workload import Workload
from gf_tvm.kernels.gpu import fused as gpu_fused
from gf_tvm.kernels.gpu.unfused import Tiles
from gf_tvm.machine.profiles import DeviceProfile

from .gpu_maps import (
    THREADS,
    bind_threads,
    channel_sum,
    compute_at,
    map_blocks,
    map_of_sums,
    mean_vector,
    new_schedule,
    pool,
    store_patch,
)
from .space import Config, Space


def _powers(least: int, most: int) -> tuple[int, ...]:
    return tuple(1 << k for k in range(12) if least <= 1 << k <= most)


def _covering(size: int, least: int, most: int) -> tuple[int, ...]:
    """Tiles worth a try for an axis: powers of two, none twice as large as needed."""
    return tuple(t for t in _powers(least, most) if t < 2 * size or t == least)


def products(workload: Workload, profile: DeviceProfile, define: Any) -> Space:
    """Kernels with matrix products.

    Knobs, for the product of grad_x: tile of patches ``m`` and of channels ``ci``, step ``k`` of its sum, patches
    ``tm`` and channels ``tc`` of one thread, of which ``vm`` patches side by side; ``fuse``: pool grad_y in the same
    kernel (:mod:`gf_tvm.kernels.gpu.fused`), where one tile spans the channels. For grad_W: tiles ``wo`` and ``wi``,
    step ``wk``, ``to`` and ``ti`` of one thread, ``splits`` of its sum over patches.
    """
    geometry = workload.geometry
    assert profile.gpu is not None
    gpu_limits = profile.gpu
    needs_x, needs_w = workload.gives_x, workload.gives_w
    patches = geometry.n * geometry.grid[0] * geometry.grid[1]
    cig, cog = geometry.ci_group, geometry.co_group
    knobs: dict[str, tuple[int, ...]] = {}
    if needs_x:
        knobs |= {
            "m": _covering(patches, 16, 128),
            "ci": _covering(cig, 8, 128),
            "k": (8, 16) if cog > 4 else (4, 8),
            "tm": (1, 2, 4, 8),
            "tc": (1, 2, 4, 8),
            "vm": (1, 2, 4),
        }
        if gpu_fused.possible(workload) and cig <= 128 and cog <= 256:
            knobs["fuse"] = (0, 1)
    if needs_w:
        knobs |= {
            "wo": _covering(cog, 8, 128),
            "wi": _covering(cig, 8, 128),
            "wk": (8, 16),
            "to": (1, 2, 4, 8),
            "ti": (1, 2, 4, 8),
            "splits": tuple(s for s in (1, 2, 4, 8, 16, 32, 64) if s == 1 or s * 32 <= patches),
        }

    def fits(rows: int, columns: int, row: int, column: int, step: int) -> bool:
        """One product: threads whole warps where possible, sums and operands in registers, tiles in shared memory."""
        if rows % row or columns % column:
            return False
        threads = (rows // row) * (columns // column)
        least = min(64, rows * columns // 4)
        return (
            least <= threads <= gpu_limits.threads
            and (row * column + 2 * (row + column) + 32) * threads <= gpu_limits.registers
            and 4 * step * (rows + columns + 8) <= gpu_limits.shared_bytes
        )

    def rule(config: Config) -> bool:
        # Of one product alone where only its knobs are given.
        if "m" in config:
            if config["vm"] > config["tm"]:
                return False
            if not fits(config["ci"], config["m"], config["tc"], config["tm"], config["k"]):
                return False
            if config.get("fuse") and (config["ci"] < cig or _fused_bytes(geometry, config) > gpu_limits.shared_bytes):
                return False
        return "wo" not in config or fits(config["wo"], config["wi"], config["to"], config["ti"], config["wk"])

    def build(config: Config) -> s_tir.Schedule:
        if config.get("fuse"):
            return _build_fused(workload, config)
        return _build_products(workload, define, config)

    return Space(knobs, _default(knobs, rule, geometry, profile), build, rule)


def _fused_bytes(geometry: Geometry, config: Config) -> int:
    return gpu_fused.shared_bytes(geometry, config["m"], config["k"], config["ci"])


#: Shared memory of a fused block by default: two of them fit a multiprocessor of any generation.
_FUSED_BYTES = 24 * 1024
# And threads: while it pools, a block is as fast as many loads are under way.
_FUSED_THREADS = 128


def _default(knobs: dict[str, tuple[int, ...]], rule: Any, geometry: Geometry, profile: DeviceProfile) -> Config:
    """The valid point of least estimated cost, product by product; see :func:`_cost`."""
    patches = geometry.n * geometry.grid[0] * geometry.grid[1]
    config = {name: values[0] for name, values in knobs.items()}
    names = (
        ("ci", "m", "tc", "tm", "k", "vm"),
        ("wo", "wi", "to", "ti", "wk", "splits"),
    )
    sizes = ((geometry.ci_group, patches), (geometry.co_group, geometry.ci_group))
    lengths = (geometry.co_group * (geometry.kernel[0] * geometry.kernel[1] if geometry.dilated else 1), patches)
    # One product at a time: the rule checks both, so the other one stays at a point that is valid on its own.
    for own, size, length in zip(names, sizes, lengths, strict=True):
        if own[0] not in knobs:
            continue
        parts = [dict(zip(own, values, strict=True)) for values in itertools.product(*(knobs[name] for name in own))]
        parts = [part for part in parts if rule(part)]
        if own[0] == "ci" and "fuse" in knobs:
            fused = [
                part for part in parts if rule({**part, "fuse": 1}) and _fused_bytes(geometry, part) <= _FUSED_BYTES
            ]
            busy = [part for part in fused if (part["ci"] // part["tc"]) * (part["m"] // part["tm"]) >= _FUSED_THREADS]
            config["fuse"] = int(bool(fused))
            parts = busy or fused or parts
        costs = [_cost(part, own, (*size, length), geometry.groups, profile) for part in parts]
        config |= parts[costs.index(min(costs))]
    return config


def _cost(
    part: Config, names: tuple[str, ...], sizes: tuple[int, int, int], groups: int, profile: DeviceProfile
) -> float:
    """Rough cost of one product, in instructions of a multiprocessor.

    A step of a thread multiplies tc x tm values, for which it reads tc + tm words of shared memory, four at a time
    where they lie side by side; padded tiles do work for nothing, and a grid that does not fill the multiprocessors
    leaves some idle. A tile of operands is read from memory once per block.
    """
    x, y, tx, ty, step, last = (part[name] for name in names)
    rows, columns, length = sizes
    assert profile.gpu is not None
    splits = last if names[-1] == "splits" else 1
    side = min(ty, 4) if names[-1] == "splits" else last
    blocks = ceil_div(rows, x) * ceil_div(columns, y) * groups * splits
    threads = (x // tx) * (y // ty)
    # A multiprocessor hides latency with a few hundred threads, of several blocks if they are small.
    resident = max(1, min(4, 512 // threads))
    at_once = (profile.gpu.multiprocessors or 64) * resident
    rounds = ceil_div(blocks, at_once)
    reads = ceil_div(tx, min(tx, 4)) + ty / side
    per_step = tx * ty + 2 * reads + 8 * (x + y) / threads + 8 / step
    # Fewer than 128 threads leave some of the multiprocessor's cores without work.
    idle = max(1.0, 128 / (threads * min(resident, ceil_div(blocks, profile.gpu.multiprocessors or 64))))
    steps = pad(ceil_div(length, splits), step)
    partial = 4.0 * rows * columns * groups * splits / (profile.gpu.multiprocessors or 64) if splits > 1 else 0.0
    return rounds * resident * threads * steps * per_step * idle + partial


def _build_fused(workload: Workload, config: Config) -> s_tir.Schedule:
    geometry, tiles = workload.geometry, _tiles(config)
    sch = new_schedule(gpu_fused.backward(workload, tiles))
    map_of_sums(sch, sch.get_sblock("taps"), 4)
    out, g_shared = sch.get_sblock("grad_x"), sch.get_sblock("g_shared")
    block, c, m, *_ = sch.get_loops(out)
    sch.bind(block, "blockIdx.x")
    threads = (tiles.ci // config["tc"], tiles.m // config["tm"])
    # As in _load_tile: rows begin at 16 bytes, and neither rows nor columns meet in few banks.
    sch.set_scope(g_shared, 0, "shared")
    sch.storage_align(g_shared, 0, -2, 32, 4)
    thread = _share(sch, sch.fuse(*sch.get_loops(g_shared)[1:]), threads)
    compute_at(sch, sch.get_sblock("pooled"), thread, "local")
    pool(sch, sch.get_sblock("pixels"), sch.get_sblock("pooled"), mean_vector(geometry))
    thread = _share(sch, sch.get_loops(sch.get_sblock("bias_tile"))[1], threads)
    compute_at(sch, sch.get_sblock("bias_share"), thread, "local")
    if workload.kernel == "backward":
        _share(sch, sch.fuse(*sch.get_loops(sch.get_sblock("g"))[1:]), threads, vector=4)
    _product(
        *(sch, sch.get_sblock("grid"), out, (c, m)),
        tiles=(tiles.ci, tiles.m),
        thread=(config["tc"], config["tm"]),
        inner=(min(config["tc"], 4), config["vm"]),
        step=config["k"],
        operands=(("taps_tile", 4, False),),
    )
    store_patch(sch, out, geometry)
    if workload.kernel == "backward":
        _weight_product(sch, geometry, config)
    channel_sum(sch, "bias", "grad_b", 1)
    return sch


def _tiles(config: Config) -> Tiles:
    fields = ("m", "ci", "k", "wo", "wi", "wk", "splits")
    return Tiles(**{name: config[name] for name in fields if name in config})


def _share(sch: s_tir.Schedule, loop: Any, threads: tuple[int, int], vector: int = 1) -> Any:
    """Share a loop of a block among its threads, which are in two dimensions; returns the inner one."""
    _, ty, tx, inner = sch.split(loop, [None, *threads, vector])
    sch.bind(ty, "threadIdx.y")
    sch.bind(tx, "threadIdx.x")
    if vector > 1:
        sch.vectorize(inner)
    return tx


def _weight_product(sch: s_tir.Schedule, geometry: Geometry, config: Config) -> None:
    """The product of grad_W and the sum of its parts."""
    out = sch.get_sblock("weight_parts")
    s, p, o, c = sch.get_loops(out)
    whole = geometry.ci_group % config["wi"] == 0 and geometry.ci_group % 4 == 0
    _product(
        *(sch, sch.get_sblock("weight_part"), out, (sch.fuse(s, p), o, c)),
        tiles=(config["wo"], config["wi"]),
        thread=(config["to"], config["ti"]),
        inner=(min(config["to"], 4), min(config["ti"], 4)),
        step=config["wk"],
        operands=(("o_tile", 1, True), ("c_tile", 4 if whole else 1, False)),
    )
    _sum_parts(sch)


def _build_products(workload: Workload, define: Any, config: Config) -> s_tir.Schedule:
    geometry = workload.geometry
    sch = new_schedule(define(workload, _tiles(config)))
    pools = workload.pools_grad
    if pools:
        g = sch.get_sblock("g")
        map_of_sums(sch, g, 3)
        pool(sch, sch.get_sblock("pixels"), g, mean_vector(geometry))
    if "m" in config:
        taps = sch.get_sblock("taps")
        _ = map_blocks(sch, taps, 4) if geometry.dilated else map_of_sums(sch, taps, 4)
        out = sch.get_sblock("grad_x" if pools else "grad_x_grid")
        _product(
            *(sch, sch.get_sblock("grid"), out, sch.get_loops(out)[:3]),
            tiles=(config["ci"], config["m"]),
            thread=(config["tc"], config["tm"]),
            inner=(min(config["tc"], 4), config["vm"]),
            step=config["k"],
            # Shifted patches may lie in another row, and an argument's rows at any address.
            operands=(("taps_tile", 4, False), ("g_tile", 1 if geometry.dilated or not pools else 4, False)),
        )
        if pools:
            store_patch(sch, out, geometry)
    if "wo" in config:
        _weight_product(sch, geometry, config)
    if pools:
        channel_sum(sch, "bias", "grad_b", 1)
    return sch


def _product(
    sch: s_tir.Schedule,
    product: Any,
    out: Any,
    loops: Any,
    tiles: tuple[int, int],
    thread: tuple[int, int],
    inner: tuple[int, int],
    step: int,
    operands: tuple[tuple[str, int, bool], ...],
) -> None:
    """Schedule ``product[.., x, y] = sum over k``, the stage that stores it and those that bring its operands.

    Args:
        product, out: the product and what stores it.
        loops: of the latter: batch, x, y; or x and y, in a loop over blocks, of which one tile spans both.
        tiles, thread, inner: of x and y: for a block, for a thread, and of these side by side.
        step: of k; the operands' tiles of one step are in shared memory at a time.
        operands: of x and of y, if it is to be brought: the stage, the width of its loads, and whether k runs along
            memory.
    """
    *batch, x, y = loops
    xb, xv, xt, xi = sch.split(x, [None, thread[0] // inner[0], tiles[0] // thread[0], inner[0]])
    yb, yv, yt, yi = sch.split(y, [None, thread[1] // inner[1], tiles[1] // thread[1], inner[1]])
    # A thread finds the place of a patch once, and stores all of its channels there.
    sch.reorder(*batch, xb, yb, xv, yv, xt, yt, yi, xi)
    for loop, name in (
        *((loop, "blockIdx.z") for loop in batch),
        *((xb, "blockIdx.y"), (yb, "blockIdx.x")),
        *((xv, "vthread.y"), (yv, "vthread.x"), (xt, "threadIdx.y"), (yt, "threadIdx.x")),
    ):
        # What is left of an axis that one tile spans is no loop over blocks.
        if not name.startswith("blockIdx") or batch:
            sch.bind(loop, name)
    for loop in (xi, yi):
        sch.unroll(loop)
    compute_at(sch, product, yt, "local")
    reductions = [axis for axis in sch.get(product).iter_vars if axis.iter_type == _REDUCE]
    *_, px, py = sch.get_loops(product)[: -len(reductions)]
    *taps, k = sch.get_loops(product)[-len(reductions) :]
    ko, ki = sch.split(k, [None, step])
    sch.reorder(*taps, ko, ki, px, py)
    for loop in (ki, px, py):
        sch.unroll(loop)
    threads = (tiles[0] // thread[0], tiles[1] // thread[1])
    for (name, vector, along_k), tile in zip(operands, tiles, strict=False):
        _load_tile(sch, sch.get_sblock(name), ko, (step, tile), threads, vector, along_k)
    sch.decompose_reduction(product, [*taps, ko][0])


_REDUCE = tirx.IterVar.CommReduce


def _load_tile(
    sch: s_tir.Schedule,
    block: Any,
    at: Any,
    shape: tuple[int, int],
    threads: tuple[int, int],
    vector: int,
    along_k: bool,
) -> None:
    """Let all threads of a block bring a tile (k, x) to shared memory."""
    compute_at(sch, block, at, "shared")
    k, x = sch.get_loops(block)[-2:]
    if along_k:
        # Threads that are neighbours read along k and write down a column: rows are shifted by four banks each, so
        # that eight of them and four columns fill the 32 banks, and rows still begin at 16 bytes.
        sch.storage_align(block, 0, -2, 32, 4)
        sch.reorder(x, k)
        loop = sch.fuse(x, k)
    else:
        loop = sch.fuse(k, x)
    total = shape[0] * shape[1]
    while vector > 1 and (shape[1] % vector or total % (vector * threads[0] * threads[1])):
        vector //= 2
    _share(sch, loop, threads, vector)


def _sum_parts(sch: s_tir.Schedule) -> None:
    """grad_W from the sums of its parts: one output channel and some input channels a block."""
    total, out = sch.get_sblock("weight_sum"), sch.get_sblock("grad_w")
    o, c, a, b = sch.get_loops(out)
    outer, inner = sch.split(c, [None, min(int(sch.get(c).extent), THREADS // 4)])
    sch.reorder(o, outer, inner, a, b)
    sch.bind(o, "blockIdx.y")
    sch.bind(outer, "blockIdx.x")
    stored = sch.cache_write(total, 0, "local")
    compute_at(sch, stored, outer, "shared")
    bind_threads(sch, sch.fuse(inner, a, b), THREADS)
    sch.compute_at(total, bind_threads(sch, sch.get_loops(stored)[-1], THREADS), preserve_unit_loops=True)

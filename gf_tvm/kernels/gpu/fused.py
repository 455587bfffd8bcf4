"""The backward pass of a GPU with pooling and expansion in one kernel, for convolutions of few channels.

A block of threads has a tile of patches and all channels of a group: it pools grad_y into shared memory, multiplies
from there, and stores grad_x's patches; the tile's share of grad_b is summed on the way. So grad_y is read once and
grad_x written once, and g~ goes to memory only if grad_W needs it. The unfused form (:mod:`.unfused`) moves (3 / patch
area) of grad_y more, but takes any number of channels.
"""

from __future__ import annotations

from typing import Any

from tvm import te

from ...core.geometry import Geometry, pad
from ...core.workload import Workload
from .. import stages as st
from ..rewrite import share_outer_loop, store_into
from . import unfused
from .unfused import Shapes, Tiles

#: The stages of a tile, in order; they share the loop over tiles.
TILE_STAGES = ("pixels", "pooled", "g_shared", "bias_share", "bias_tile", "g", "grid", "grad_x")


def possible(workload: Workload) -> bool:
    """Whether there is a fused form at all: of a kernel that computes grad_x, not of the dilated case."""
    geometry = workload.geometry
    return workload.kernel in ("backward", "backward_input") and not (geometry.depthwise or geometry.dilated)


def shared_bytes(geometry: Geometry, m: int, k: int, ci: int) -> int:
    """Shared memory of a block: its tile of g~, rows four floats longer, and a step of W~."""
    return 4 * (pad(geometry.co_group, k) * (m + 4) + k * ci)


def backward(workload: Workload, tiles: Tiles) -> Any:
    """PrimFunc of ``backward`` or ``backward_input``; ``tiles.ci`` covers the input channels of a group.

    Stages: ``taps``, ``taps_tile``, :data:`TILE_STAGES` (``g`` only with grad_W), those of grad_W as in
    :func:`gf_tvm.kernels.gpu.unfused.backward`, and ``bias_sum``, ``grad_b``.
    """
    geometry, dtype = workload.geometry, workload.dtype
    args, shapes = st.placeholders(geometry, dtype), Shapes(geometry, tiles)
    groups, cog = geometry.groups, geometry.co_group
    count = shapes.m // tiles.m * groups

    def place(q: Any, m: Any) -> tuple[Any, Any]:
        """Group, and patch of the batch, of patch ``m`` of tile ``q``."""
        return q % groups, q // groups * tiles.m + m

    def pixel(q: Any, o: Any, m: Any, a: Any, b: Any) -> Any:
        p, patch = place(q, m)
        n, i, j = unfused.patch_of(geometry, patch)
        there = unfused.some([unfused.less(patch, shapes.patches, shapes.m), unfused.less(o, cog, shapes.k)])
        return st.guard(there, st.output_pixel(geometry, args["grad_y"], n, p * cog + o, i, j, a, b))

    pixels = te.compute((count, shapes.k, tiles.m, *geometry.patch), pixel, name="pixels")
    a, b = te.reduce_axis((0, geometry.rows.patch), "a"), te.reduce_axis((0, geometry.cols.patch), "b")

    def mean(q: Any, o: Any, m: Any) -> Any:
        _, i, j = unfused.patch_of(geometry, place(q, m)[1])
        return te.sum(pixels[q, o, m, a, b] * unfused.scale(geometry, i, j), axis=[a, b])

    pooled = te.compute((count, shapes.k, tiles.m), mean, name="pooled")
    g_shared = te.compute(pooled.shape, lambda q, o, m: pooled[q, o, m], name="g_shared")
    taps = unfused.taps(geometry, args["weight"], shapes)
    taps_tile = te.compute(taps.shape, lambda p, t, o, c: taps[p, t, o, c], name="taps_tile")
    o = te.reduce_axis((0, shapes.k), "ro")
    product = te.compute(
        (count, shapes.ci, tiles.m),
        lambda q, c, m: te.sum(taps_tile[q % groups, 0, o, c] * g_shared[q, o, m], axis=o),
        name="grid",
    )
    grad_x = te.compute(
        (count, shapes.ci, tiles.m, geometry.rows.window, geometry.cols.window),
        lambda q, c, m, _a, _b: st.store(product[q, c, m], dtype),
        name="grad_x",
    )
    inputs, outputs = [args["grad_y"]], [grad_x]
    if workload.kernel == "backward":
        g = te.compute(g_shared.shape, lambda q, o, m: g_shared[q, o, m], name="g")

        def mean_at(p: Any, o: Any, m: Any) -> Any:
            # Padded to tiles of output channels of grad_W, which g~ here is not.
            there = unfused.some([unfused.less(o, shapes.k, shapes.co)])
            return st.guard(there, g[m // tiles.m * groups + p, o, m % tiles.m])

        inputs.append(args["saved"])
        outputs.append(unfused.weight_grad_of(geometry, mean_at, args["saved"], tiles, shapes, dtype))
    inputs.append(args["weight"])
    outputs.append(_bias_grad(geometry, g_shared, place, tiles, shapes, dtype))
    func = te.create_prim_func([*inputs, *outputs])

    index, inside = unfused.map_index(geometry, shapes)

    def at(q: Any, c: Any, m: Any, a: Any, b: Any) -> Any:
        p, patch = place(q, m)
        return index(p, c, patch, a, b)

    def exists(q: Any, c: Any, m: Any, a: Any, b: Any) -> Any:
        p, patch = place(q, m)
        return inside(p, c, patch, a, b)

    func = store_into(func, "grad_x", geometry.x_shape, at, None if inside is None else exists)
    stages = [stage for stage in TILE_STAGES if stage != "g" or workload.kernel == "backward"]
    return share_outer_loop(func, stages, before=["taps", "taps_tile"])


def _bias_grad(geometry: Geometry, g: Any, place: Any, tiles: Tiles, shapes: Shapes, dtype: str) -> Any:
    """grad_b: each tile's share of it, and their sum."""
    groups, cog = geometry.groups, geometry.co_group
    m = te.reduce_axis((0, tiles.m), "m")

    def share(q: Any, o: Any) -> Any:
        _, i, j = unfused.patch_of(geometry, place(q, m)[1])
        return te.sum(g[q, o, m] * st.patch_count(geometry, i, j), axis=m)

    summed = te.compute(g.shape[:2], share, name="bias_share")
    part = te.compute(summed.shape, lambda q, o: summed[q, o], name="bias_tile")

    def term(o: Any, tile: Any) -> Any:
        return part[tile * groups + o // cog, o % cog]

    total = unfused.channel_sum("bias", geometry.co, shapes.m // tiles.m, term)
    return te.compute((geometry.co,), lambda o: st.store(total[o], dtype), name="grad_b")

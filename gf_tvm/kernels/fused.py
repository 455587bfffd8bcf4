"""The backward pass as one function: pooling, both products and the expansion in one pass over blocks of patches.

A *block* is ``rows`` consecutive patch rows, counted through the batch (patch row q = n * ph + i), so that small maps
of several images and a strip of a large map are the same thing. Per block: g~, its packed panels, grad_x~ a tile of
channels at a time, and that tile's expansion, all while the data is in cache. The weight gradient follows block by
block from the g~ that the first part left behind.

Layouts inside (float32): g~ (block, co, rows, pw); panels are as wide as one micro-kernel tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

from ..geometry import Geometry, ceil_div
from ..workload import Workload
from . import stages as st
from .rewrite import read_to_the_end, share_outer_loop, store_into


@dataclass(frozen=True)
class Tiles:
    """Sizes that shape the definition itself: panels are laid out for them.

    Attributes:
        rows: patch rows in a block; divides n * ph.
        m: patches in a micro-kernel tile of the input gradient (its vector axis).
        ci: input channels in that tile; divides ci / groups.
        co: output channels in a tile of the weight gradient; divides co / groups.
        cv: input channels in that tile (its vector axis).
        whole: compute the last tile of patches in full where ``m`` does not divide them. Without it TVM puts a
            condition on every lane of every tile there, which is not vectorised any more.
    """

    rows: int
    m: int
    ci: int
    co: int
    cv: int
    whole: bool = False


def backward(workload: Workload, tiles: Tiles) -> Any:
    """PrimFunc of ``backward``, ``backward_input`` or ``backward_weight`` for dense and grouped convolutions.

    Blocks, in order: ``taps`` (packed W~), ``g``, ``bias_part``, ``panel``, ``grad_x_grid``, ``grad_x`` (those three
    with grad_x only), ``panel_x``, ``weight_part``, ``weight_sum``, ``grad_w`` (with grad_W only),
    ``bias_columns``, ``bias_sum``, ``grad_b``. The stages on blocks share their outermost loop.
    """
    geometry, dtype, kernel = workload.geometry, workload.dtype, workload.kernel
    args = st.placeholders(geometry, dtype)
    ph, pw = geometry.grid
    blocks = geometry.n * ph // tiles.rows
    rows = tiles.rows

    def mean(b: Any, o: Any, q: Any, j: Any) -> Any:
        row = b * rows + q
        return st.mean_of_patch(geometry, args["grad_y"], row // ph, o, row % ph, j)

    g = te.compute((blocks, geometry.co, rows, pw), mean, name="g")
    inputs, outputs, shared = [args["grad_y"]], [], ["g", "bias_part"]
    if kernel != "backward_input":
        inputs.append(args["saved"])
    if kernel != "backward_weight":
        inputs.append(args["weight"])
        outputs.append(_input_grad(geometry, dtype, g, args["weight"], tiles, blocks))
        shared += ["panel", "grad_x_grid", "grad_x"]
    if kernel != "backward_input":
        outputs.append(_weight_grad(geometry, dtype, g, args["saved"], tiles, blocks))
    outputs.append(_bias_grad(geometry, dtype, g, rows, blocks))
    func = te.create_prim_func([*inputs, *outputs])
    if kernel != "backward_weight":
        if tiles.whole and not geometry.dilated and rows * geometry.grid[1] % tiles.m:
            # The panel's last tile ends in zeros.
            func = read_to_the_end(func, "grad_x", "grad_x_grid")
        func = store_into(func, "grad_x", geometry.x_shape, *_map_index(geometry, rows))
    return share_outer_loop(func, shared, before=["taps"])


def _map_index(geometry: Geometry, rows: int) -> tuple[Any, Any]:
    """Where pixel (a, b) of input patch (q, j) of a block lies in the map, and whether it lies there at all."""
    vertical, horizontal = geometry.rows, geometry.cols

    def index(b: Any, q: Any, c: Any, a: Any, j: Any, bb: Any) -> Any:
        row = b * rows + q
        h = (row % vertical.patches) * vertical.window - vertical.in_offset + a
        return row // vertical.patches, c, h, j * horizontal.window - horizontal.in_offset + bb

    def inside(*axes: Any) -> Any:
        _, _, h, w = index(*axes)
        return tirx.all(h >= 0, h < geometry.h, w >= 0, w < geometry.w)

    return index, None if vertical.in_exact and horizontal.in_exact else inside


def _input_grad(geometry: Geometry, dtype: str, g: Any, weight: Any, tiles: Tiles, blocks: int) -> Any:
    (_, pw), groups, cig, cog = geometry.grid, geometry.groups, geometry.ci_group, geometry.co_group
    m_tile, c_tile, rows = tiles.m, tiles.ci, tiles.rows
    patches, tiled = rows * pw, ceil_div(rows * pw, m_tile) * m_tile
    c_tiles = cig // c_tile

    if geometry.dilated:
        product = _dilated_product(geometry, g, weight, c_tile, blocks)
    else:
        taps = te.compute(
            (groups, c_tiles, cog, c_tile),
            lambda p, t, o, c: st.sum_of_taps(geometry, weight, p * cog + o, t * c_tile + c),
            name="taps",
        )

        def packed(b: Any, mo: Any, o: Any, mi: Any) -> Any:
            m = mo * m_tile + mi
            return st.guard([] if patches == tiled else [m < patches], g[b, o, m // pw, m % pw])

        panel = te.compute((blocks, tiled // m_tile, geometry.co, m_tile), packed, name="panel")
        o = te.reduce_axis((0, cog), "ro")
        product = te.compute(
            (blocks, groups, c_tiles, c_tile, tiled),
            lambda b, p, t, c, m: te.sum(taps[p, t, o, c] * panel[b, m // m_tile, p * cog + o, m % m_tile], axis=o),
            name="grad_x_grid",
        )
    return te.compute(
        (blocks, rows, geometry.ci, geometry.rows.window, pw, geometry.cols.window),
        lambda b, q, c, _a, j, _b: st.store(product[b, c // cig, (c % cig) // c_tile, c % c_tile, q * pw + j], dtype),
        name="grad_x",
    )


def _dilated_product(geometry: Geometry, g: Any, weight: Any, c_tile: int, blocks: int) -> Any:
    """grad_x~ as a convolution on the grid; a block is one image. ``panel`` is g~ with its zero surroundings."""
    (ph, pw), groups, cig, cog = geometry.grid, geometry.groups, geometry.ci_group, geometry.co_group
    kh, kw = geometry.kernel
    (dh, dw), (top, left) = geometry.grid_dilation, geometry.grid_padding
    wide = pw + dw * (kw - 1)
    panel = te.compute(
        (blocks, geometry.co, ph + dh * (kh - 1), wide),
        lambda b, o, y, x: st.guard([y >= top, y < top + ph, x >= left, x < left + pw], g[b, o, y - top, x - left]),
        name="panel",
    )
    taps = te.compute(
        (groups, cig // c_tile, kh, kw, cog, c_tile),
        lambda p, t, ka, kb, o, c: st.rotated_tap(geometry, weight, p * cog + o, t * c_tile + c, ka, kb),
        name="taps",
    )
    ka, kb, o = te.reduce_axis((0, kh), "ka"), te.reduce_axis((0, kw), "kb"), te.reduce_axis((0, cog), "ro")
    return te.compute(
        (blocks, groups, cig // c_tile, c_tile, ph * pw),
        lambda b, p, t, c, m: te.sum(
            taps[p, t, ka, kb, o, c] * panel[b, p * cog + o, m // pw + ka * dh, m % pw + kb * dw], axis=[ka, kb, o]
        ),
        name="grad_x_grid",
    )


def _weight_grad(geometry: Geometry, dtype: str, g: Any, saved: Any, tiles: Tiles, blocks: int) -> Any:
    (ph, pw), groups, cig, cog = geometry.grid, geometry.groups, geometry.ci_group, geometry.co_group
    o_tile, v_tile, rows = tiles.co, tiles.cv, tiles.rows
    o_tiles, v_tiles = cog // o_tile, ceil_div(cig, v_tile)

    def packed(b: Any, p: Any, t: Any, m: Any, v: Any) -> Any:
        row, c = b * rows + m // pw, t * v_tile + v
        value = saved[row // ph, row % ph, m % pw, p * cig + c]
        return st.guard([] if cig % v_tile == 0 else [c < cig], value)

    panel = te.compute((blocks, groups, v_tiles, rows * pw, v_tile), packed, name="panel_x")
    m = te.reduce_axis((0, rows * pw), "rm")
    part = te.compute(
        (blocks, groups, o_tiles, v_tiles, o_tile, v_tile),
        lambda b, p, t, tv, o, v: te.sum(
            g[b, p * cog + t * o_tile + o, m // pw, m % pw] * panel[b, p, tv, m, v], axis=m
        ),
        name="weight_part",
    )
    b = te.reduce_axis((0, blocks), "rb")
    total = te.compute(
        (groups, o_tiles, v_tiles, o_tile, v_tile),
        lambda p, t, tv, o, v: te.sum(part[b, p, t, tv, o, v], axis=b),
        name="weight_sum",
    )
    return te.compute(
        geometry.weight_shape,
        lambda o, c, _a, _b: st.store(total[o // cog, (o % cog) // o_tile, c // v_tile, o % o_tile, c % v_tile], dtype),
        name="grad_w",
    )


def _bias_grad(geometry: Geometry, dtype: str, g: Any, rows: int, blocks: int) -> Any:
    """grad_b from g~. Column by column first: those sums are independent, so they fill vector registers."""
    ph, pw = geometry.grid
    q, b, j = te.reduce_axis((0, rows), "rq"), te.reduce_axis((0, blocks), "rb"), te.reduce_axis((0, pw), "rj")
    part = te.compute(
        (blocks, geometry.co, pw),
        lambda b, o, j: te.sum(g[b, o, q, j] * st.patch_count(geometry, (b * rows + q) % ph, j), axis=q),
        name="bias_part",
    )
    columns = te.compute((geometry.co, pw), lambda o, j: te.sum(part[b, o, j], axis=b), name="bias_columns")
    total = te.compute((geometry.co,), lambda o: te.sum(columns[o, j], axis=j), name="bias_sum")
    return te.compute((geometry.co,), lambda o: st.store(total[o], dtype), name="grad_b")


def depthwise_backward(workload: Workload) -> Any:
    """PrimFunc of the backward kernels for depthwise convolutions: everything is done plane by plane.

    Blocks on planes q = n * c + channel, one outer loop: ``g``, ``bias_part``, (``grad_x_grid``, ``grad_x``),
    ``weight_part``; then ``weight_sum``, ``grad_w``, ``bias_sum``, ``grad_b``; ``taps`` first.
    """
    geometry, dtype, kernel = workload.geometry, workload.dtype, workload.kernel
    args = st.placeholders(geometry, dtype)
    (ph, pw), channels = geometry.grid, geometry.ci
    planes = geometry.n * channels
    g = te.compute(
        (planes, ph, pw),
        lambda q, i, j: st.mean_of_patch(geometry, args["grad_y"], q // channels, q % channels, i, j),
        name="g",
    )
    inputs, outputs, shared = [args["grad_y"]], [], ["g", "bias_part"]
    if kernel != "backward_input":
        inputs.append(args["saved"])
    if kernel != "backward_weight":
        inputs.append(args["weight"])
        product = _depthwise_product(geometry, g, args["weight"])
        outputs.append(
            te.compute(
                (planes, ph, geometry.rows.window, pw, geometry.cols.window),
                lambda q, i, _a, j, _b: st.store(product[q, i, j], dtype),
                name="grad_x",
            )
        )
        shared += ["grad_x_grid", "grad_x"]
    # Sums over a plane go column by column first: those are independent, so they fill vector registers.
    if kernel != "backward_input":
        i = te.reduce_axis((0, ph), "ri")
        part = te.compute(
            (planes, pw),
            lambda q, j: te.sum(g[q, i, j] * args["saved"][q // channels, q % channels, i, j], axis=i),
            name="weight_part",
        )
        total = _over_batch(geometry, part, "weight_sum")
        outputs.append(
            te.compute(geometry.weight_shape, lambda o, _c, _a, _b: st.store(total[o], dtype), name="grad_w")
        )
        shared.append("weight_part")
    i = te.reduce_axis((0, ph), "ri")
    part = te.compute(
        (planes, pw), lambda q, j: te.sum(g[q, i, j] * st.patch_count(geometry, i, j), axis=i), name="bias_part"
    )
    bias = _over_batch(geometry, part, "bias_sum")
    outputs.append(te.compute((channels,), lambda o: st.store(bias[o], dtype), name="grad_b"))
    func = te.create_prim_func([*inputs, *outputs])
    if kernel != "backward_weight":
        index, inside = _map_index(geometry, ph)

        def plane_index(q: Any, i: Any, a: Any, j: Any, b: Any) -> Any:
            return index(q // channels, i, q % channels, a, j, b)

        def plane_inside(q: Any, i: Any, a: Any, j: Any, b: Any) -> Any:
            return inside(q // channels, i, q % channels, a, j, b)

        func = store_into(func, "grad_x", geometry.x_shape, plane_index, plane_inside if inside else None)
    return share_outer_loop(func, shared, before=["taps"])


def _over_batch(geometry: Geometry, part: Any, name: str) -> Any:
    n, j = te.reduce_axis((0, geometry.n), "rn"), te.reduce_axis((0, geometry.grid[1]), "rj")
    return te.compute((geometry.ci,), lambda o: te.sum(part[n * geometry.ci + o, j], axis=[n, j]), name=name)


def _depthwise_product(geometry: Geometry, g: Any, weight: Any) -> Any:
    channels, shape = geometry.ci, (geometry.n * geometry.ci, *geometry.grid)
    if geometry.dilated:
        ka, kb = te.reduce_axis((0, geometry.kernel[0]), "ka"), te.reduce_axis((0, geometry.kernel[1]), "kb")

        def convolve(q: Any, i: Any, j: Any) -> Any:
            y, x, exists = st.grid_neighbour(geometry, i, j, ka, kb)
            tap = st.rotated_tap(geometry, weight, q % channels, 0, ka, kb)
            return te.sum(st.guard(exists, g[q, y, x]) * tap, axis=[ka, kb])

        return te.compute(shape, convolve, name="grad_x_grid")
    taps = te.compute((channels,), lambda c: st.sum_of_taps(geometry, weight, c, 0), name="taps")
    return te.compute(shape, lambda q, i, j: taps[q % channels] * g[q, i, j], name="grad_x_grid")


def filter_input(workload: Workload) -> Any:
    """PrimFunc of the forward pass' pooling for dense and grouped convolutions: pool row by row, then transpose.

    Blocks on patch rows, one outer loop: ``pooled`` (row, c, j), contiguous along the row as x is, and
    ``filtered_x``, the same with the channels last, as it is kept.
    """
    geometry = workload.geometry
    x = st.placeholders(geometry, workload.dtype)["x"]
    ph, pw = geometry.grid
    patch_rows = geometry.n * ph
    pooled = te.compute(
        (patch_rows, geometry.ci, pw),
        lambda q, c, j: st.sum_of_patch(geometry, x, q // ph, c, q % ph, j),
        name="pooled",
    )
    out = te.compute((patch_rows, pw, geometry.ci), lambda q, j, c: pooled[q, c, j], name="filtered_x")
    func = te.create_prim_func([x, out])
    func = store_into(func, "filtered_x", geometry.saved_shape, lambda q, j, c: (q // ph, q % ph, j, c))
    return share_outer_loop(func, ["pooled", "filtered_x"])

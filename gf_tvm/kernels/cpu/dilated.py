"""The backward pass of dilated convolutions, in TE: grad_x~ is itself a small convolution on the patch grid.

Everything of an image is done while its g~ is in the caches; the weight gradient follows image by image from the g~
that the first part left behind. Others: :mod:`gf_tvm.kernels.cpu.sweep`, :mod:`gf_tvm.kernels.cpu.depthwise`.

Layouts inside (float32): g~ (image, co, ph, pw); panels are as wide as one micro-kernel tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

from ...core.geometry import Geometry, ceil_div
from ...core.workload import Workload
from .. import stages as st
from ..rewrite import share_outer_loop, store_into


@dataclass(frozen=True)
class Tiles:
    """Sizes that shape the definition itself: panels are laid out for them.

    Attributes:
        ci: input channels in a tile of the input gradient; divides ci / groups.
        co: output channels in a tile of the weight gradient; divides co / groups.
        cv: input channels in that tile (its vector axis).
    """

    ci: int
    co: int
    cv: int


def backward(workload: Workload, tiles: Tiles) -> Any:
    """PrimFunc of ``backward`` or ``backward_input`` for dilated convolutions, dense and grouped.

    Blocks, in order: ``taps`` (packed W), ``g``, ``bias_part``, ``panel`` (g~ with zeros around it), ``grad_x_grid``,
    ``grad_x``, ``panel_x``, ``weight_part``, ``weight_sum``, ``grad_w`` (those four with grad_W only),
    ``bias_columns``, ``bias_sum``, ``grad_b``. The stages on images share their outermost loop.
    """
    geometry, dtype, kernel = workload.geometry, workload.dtype, workload.kernel
    args = st.placeholders(geometry, dtype)
    ph, pw = geometry.grid
    blocks, rows = geometry.n, ph

    def mean(b: Any, o: Any, q: Any, j: Any) -> Any:
        row = b * rows + q
        return st.mean_of_patch(geometry, args["grad_y"], row // ph, o, row % ph, j)

    g = te.compute((blocks, geometry.co, rows, pw), mean, name="g")
    inputs, outputs, shared = [args["grad_y"]], [], ["g", "bias_part"]
    if kernel != "backward_input":
        inputs.append(args["saved"])
    inputs.append(args["weight"])
    outputs.append(_input_grad(geometry, dtype, g, args["weight"], tiles, blocks))
    shared += ["panel", "grad_x_grid", "grad_x"]
    if kernel != "backward_input":
        outputs.append(_weight_grad(geometry, dtype, g, args["saved"], tiles, blocks))
    outputs.append(_bias_grad(geometry, dtype, g, rows, blocks))
    func = te.create_prim_func([*inputs, *outputs])
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
    (rows, pw), cig, c_tile = geometry.grid, geometry.ci_group, tiles.ci
    product = _product(geometry, g, weight, c_tile, blocks)
    return te.compute(
        (blocks, rows, geometry.ci, geometry.rows.window, pw, geometry.cols.window),
        lambda b, q, c, _a, j, _b: st.store(product[b, c // cig, (c % cig) // c_tile, c % c_tile, q * pw + j], dtype),
        name="grad_x",
    )


def _product(geometry: Geometry, g: Any, weight: Any, c_tile: int, blocks: int) -> Any:
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
    o_tile, v_tile, rows = tiles.co, tiles.cv, ph
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
    """PrimFunc of ``backward`` or ``backward_input`` for dilated depthwise convolutions: plane by plane.

    Blocks on planes q = n * c + channel, one outer loop: ``g``, ``bias_part``, ``grad_x_grid``, ``grad_x``,
    ``weight_part``; then ``weight_sum``, ``grad_w``, ``bias_sum``, ``grad_b``.
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
    index, inside = _map_index(geometry, ph)

    def plane_index(q: Any, i: Any, a: Any, j: Any, b: Any) -> Any:
        return index(q // channels, i, q % channels, a, j, b)

    def plane_inside(q: Any, i: Any, a: Any, j: Any, b: Any) -> Any:
        return inside(q // channels, i, q % channels, a, j, b)

    func = store_into(func, "grad_x", geometry.x_shape, plane_index, plane_inside if inside else None)
    return share_outer_loop(func, shared)


def _over_batch(geometry: Geometry, part: Any, name: str) -> Any:
    n, j = te.reduce_axis((0, geometry.n), "rn"), te.reduce_axis((0, geometry.grid[1]), "rj")
    return te.compute((geometry.ci,), lambda o: te.sum(part[n * geometry.ci + o, j], axis=[n, j]), name=name)


def _depthwise_product(geometry: Geometry, g: Any, weight: Any) -> Any:
    channels, shape = geometry.ci, (geometry.n * geometry.ci, *geometry.grid)
    ka, kb = te.reduce_axis((0, geometry.kernel[0]), "ka"), te.reduce_axis((0, geometry.kernel[1]), "kb")

    def convolve(q: Any, i: Any, j: Any) -> Any:
        y, x, exists = st.grid_neighbour(geometry, i, j, ka, kb)
        tap = st.rotated_tap(geometry, weight, q % channels, 0, ka, kb)
        return te.sum(st.guard(exists, g[q, y, x]) * tap, axis=[ka, kb])

    return te.compute(shape, convolve, name="grad_x_grid")

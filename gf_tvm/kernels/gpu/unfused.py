"""The kernels as GPUs want them: matrix products on padded operands, and pooling and expansion around them.

All patches of a batch are one axis, m = (n * ph + i) * pw + j, padded to whole tiles, and so are channels: inside a
product no index needs a check, and what is padded is zero or never stored. Both products of the backward pass have the
form ``out[x, y] = sum over k of a[k, x] * b[k, y]``. Operand tiles are stages of their own (``*_tile``), which
schedules compute into shared memory, where what is not in memory in that form (patches shifted by a dilated tap, x~ in
its other layout) is put together on the way.

Layouts inside (float32), sizes padded: g~ (groups, co/groups, m), W~ (groups, taps, co/groups, ci/groups).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

from ...core.geometry import Geometry, ceil_div, pad
from ...core.workload import Workload
from .. import stages as st
from ..rewrite import store_into

#: Threads that sum one part of a channel, and how many values each of them takes.
SUM_THREADS, SUM_LENGTH = 256, 32
#: The last part of such a sum is made by so many threads, and then by one.
SUM_LAST = 16


@dataclass(frozen=True)
class Tiles:
    """Sizes that shape the definition itself: operands are padded to them.

    Attributes:
        m: patches in a tile of the input gradient.
        ci: input channels in it.
        k: step of its sum over output channels.
        wo, wi: output and input channels in a tile of the weight gradient.
        wk: step of its sum over patches.
        splits: parts of that sum, which are computed side by side.
    """

    m: int = 64
    ci: int = 64
    k: int = 8
    wo: int = 64
    wi: int = 64
    wk: int = 8
    splits: int = 1


class Shapes:
    """Sizes of one workload, padded to its tiles.

    Attributes:
        patches: of the batch, not padded.
        split: patches in one part of the weight gradient's sum.
        m: patches.
        co, k: output channels of a group in g~, and in the sum of the input gradient.
        ci, wi: input channels of a group, in the input and in the weight gradient.
    """

    def __init__(self, geometry: Geometry, tiles: Tiles) -> None:
        self.patches = geometry.n * geometry.grid[0] * geometry.grid[1]
        # A part of the weight gradient's sum is whole steps, and the input gradient's tiles are whole as well.
        self.split = pad(ceil_div(self.patches, tiles.splits), tiles.wk)
        self.m = pad(max(self.patches, self.split * tiles.splits), tiles.m)
        self.co = pad(pad(geometry.co_group, tiles.k), tiles.wo)
        self.k = pad(geometry.co_group, tiles.k)
        self.ci = pad(geometry.ci_group, tiles.ci)
        self.wi = pad(geometry.ci_group, tiles.wi)


def patch_of(geometry: Geometry, m: Any) -> tuple[Any, Any, Any]:
    """(image, row, column) of patch ``m`` of the batch."""
    ph, pw = geometry.grid
    return m // (ph * pw), m // pw % ph, m % pw


def _all_of(conditions: Any, axes: int) -> Any:
    """The conjunction of what ``conditions`` gives for so many axes, as a function; None where that is nothing."""
    if conditions(*(tirx.Var("v", "int32") for _ in range(axes))):
        return lambda *values: tirx.all(*conditions(*values))
    return None


def some(conditions: list[Any]) -> list[Any]:
    """Without the conditions that are known to hold."""
    return [c for c in conditions if c is not True]


def less(value: Any, size: int, padded: int) -> Any:
    """The condition that ``value``, of an axis padded from ``size`` to ``padded``, is no padding."""
    return True if size == padded else value < size


def backward(workload: Workload, tiles: Tiles) -> Any:
    """PrimFunc of ``backward``, ``backward_input`` or ``backward_weight`` for dense and grouped convolutions.

    Stages: ``g``; for grad_x ``taps``, ``g_tile``, ``taps_tile``, ``grid``, ``grad_x``; for grad_W ``o_tile``,
    ``c_tile``, ``weight_part``, ``weight_sum``, ``grad_w``; for grad_b those of :func:`_bias_grad`.
    """
    geometry, dtype, kernel = workload.geometry, workload.dtype, workload.kernel
    args, shapes = st.placeholders(geometry, dtype), Shapes(geometry, tiles)
    cog, groups = geometry.co_group, geometry.groups
    grad_y = args["grad_y"]

    def pixel(p: Any, o: Any, m: Any, a: Any, b: Any) -> Any:
        n, i, j = patch_of(geometry, m)
        there = some([less(m, shapes.patches, shapes.m), less(o, cog, shapes.co)])
        return st.guard(there, st.output_pixel(geometry, grad_y, n, p * cog + o, i, j, a, b))

    pixels = te.compute((groups, shapes.co, shapes.m, *geometry.patch), pixel, name="pixels")
    g = _mean(geometry, pixels)

    def mean(p: Any, o: Any, m: Any) -> Any:
        return g[p, o, m]

    inputs, outputs = [grad_y], []
    if kernel != "backward_input":
        inputs.append(args["saved"])
    if kernel != "backward_weight":
        inputs.append(args["weight"])
        product = _input_product(geometry, args["weight"], mean, shapes)
        outputs.append(_expand_product(geometry, product, shapes, dtype))
    if kernel != "backward_input":
        outputs.append(weight_grad_of(geometry, mean, args["saved"], tiles, shapes, dtype))
    outputs.append(_bias_grad(geometry, mean, dtype))
    func = te.create_prim_func([*inputs, *outputs])
    if kernel != "backward_weight":
        func = store_into(func, "grad_x", geometry.x_shape, *map_index(geometry, shapes))
    return func


def input_grad(workload: Workload, tiles: Tiles) -> Any:
    """PrimFunc of ``input_grad``; stages as in :func:`backward`, the last one is ``grad_x_grid``."""
    geometry = workload.geometry
    args, shapes = st.placeholders(geometry, workload.dtype), Shapes(geometry, tiles)
    product = _input_product(geometry, args["weight"], _mean_at(geometry, args["g"], shapes), shapes)
    out = te.compute(product.shape, lambda p, c, m: product[p, c, m], name="grad_x_grid")
    func = te.create_prim_func([args["g"], args["weight"], out])

    def index(p: Any, c: Any, m: Any) -> Any:
        n, i, j = patch_of(geometry, m)
        return n, p * geometry.ci_group + c, i, j

    there = _there(geometry, shapes)
    inside = _all_of(lambda p, c, m: there(c, m), 3)
    return store_into(func, "grad_x_grid", (geometry.n, geometry.ci, *geometry.grid), index, inside)


def weight_grad(workload: Workload, tiles: Tiles) -> Any:
    """PrimFunc of ``weight_grad``; stages as in :func:`backward`."""
    geometry, dtype = workload.geometry, workload.dtype
    args, shapes = st.placeholders(geometry, dtype), Shapes(geometry, tiles)
    out = weight_grad_of(geometry, _mean_at(geometry, args["g"], shapes), args["saved"], tiles, shapes, dtype)
    return te.create_prim_func([args["g"], args["saved"], out])


def _mean_at(geometry: Geometry, g: Any, shapes: Shapes) -> Any:
    """g~ (n, co, ph, pw), an argument, seen as the padded operand."""

    def mean(p: Any, o: Any, m: Any) -> Any:
        n, i, j = patch_of(geometry, m)
        there = some([less(m, shapes.patches, shapes.m), less(o, geometry.co_group, shapes.co)])
        return st.guard(there, g[n, p * geometry.co_group + o, i, j])

    return mean


def _mean(geometry: Geometry, pixels: Any) -> Any:
    """g~ with the axes of ``pixels`` but the last two; the last but these is m, or the last two are i and j."""
    a, b = te.reduce_axis((0, geometry.rows.patch), "a"), te.reduce_axis((0, geometry.cols.patch), "b")

    def mean(*axes: Any) -> Any:
        _, i, j = (None, *axes[-2:]) if len(axes) == 4 else patch_of(geometry, axes[-1])
        index = (*axes, a, b)
        return te.sum(pixels[index] * scale(geometry, i, j), axis=[a, b])

    return te.compute(pixels.shape[:-2], mean, name="g")


def _output_pixels(geometry: Geometry, grad_y: Any) -> Any:
    """The pixels of each output patch, (n, co, ph, pw, rows, columns), zero outside the map."""
    return te.compute(
        (geometry.n, geometry.co, *geometry.grid, *geometry.patch),
        lambda n, o, i, j, a, b: st.output_pixel(geometry, grad_y, n, o, i, j, a, b),
        name="pixels",
    )


def scale(geometry: Geometry, i: Any, j: Any) -> Any:
    """1 / pixels of an output patch."""
    if geometry.rows.out_exact and geometry.cols.out_exact:
        return tirx.const(1.0 / (geometry.rows.patch * geometry.cols.patch), st.ACC)
    return tirx.const(1.0, st.ACC) / st.patch_count(geometry, i, j)


def _there(geometry: Geometry, shapes: Shapes) -> Callable[[Any, Any], list[Any]]:
    """Of (c, m): the conditions for them not to be padding."""
    return lambda c, m: some([less(m, shapes.patches, shapes.m), less(c, geometry.ci_group, shapes.ci)])


def _inside(geometry: Geometry, h: Any, w: Any) -> list[Any]:
    """The conditions that pixel (h, w) of a patch is in the map, as far as they are not known to hold."""
    found: list[Any] = []
    for axis, position in ((geometry.rows, h), (geometry.cols, w)):
        if not axis.in_exact:
            found += [position >= 0, position < axis.size]
    return found


def map_index(geometry: Geometry, shapes: Shapes) -> tuple[Any, Any]:
    """Where pixel (a, b) of input patch m lies in the map, and whether it lies there at all."""
    rows, cols = geometry.rows, geometry.cols
    there = _there(geometry, shapes)

    def index(p: Any, c: Any, m: Any, a: Any, b: Any) -> Any:
        n, i, j = patch_of(geometry, m)
        return (
            *(n, p * geometry.ci_group + c),
            *(i * rows.window - rows.in_offset + a, j * cols.window - cols.in_offset + b),
        )

    def conditions(p: Any, c: Any, m: Any, a: Any, b: Any) -> list[Any]:
        return there(c, m) + _inside(geometry, *index(p, c, m, a, b)[2:])

    return index, _all_of(conditions, 5)


def taps(geometry: Geometry, weight: Any, shapes: Shapes) -> Any:
    """W~ (groups, taps, co padded, ci padded); one tap, the sum of all, but in the dilated case."""
    groups, cig, cog = geometry.groups, geometry.ci_group, geometry.co_group
    kh, kw = geometry.kernel

    def tap(p: Any, t: Any, o: Any, c: Any) -> Any:
        there = some([less(o, cog, shapes.k), less(c, cig, shapes.ci)])
        if geometry.dilated:
            return st.guard(there, st.rotated_tap(geometry, weight, p * cog + o, c, t // kw, t % kw))
        ka, kb = te.reduce_axis((0, kh), "ka"), te.reduce_axis((0, kw), "kb")
        return te.sum(st.guard(there, st.load(weight[p * cog + o, c, ka, kb])), axis=[ka, kb])

    return te.compute((groups, kh * kw if geometry.dilated else 1, shapes.k, shapes.ci), tap, name="taps")


def _input_product(geometry: Geometry, weight: Any, mean: Any, shapes: Shapes) -> Any:
    """grad_x~ (groups, ci padded, m padded): over output channels and, in the dilated case, taps."""
    groups, (_, pw), (kh, kw) = geometry.groups, geometry.grid, geometry.kernel
    taps_count = kh * kw if geometry.dilated else 1

    def shifted(p: Any, t: Any, o: Any, m: Any) -> Any:
        if not geometry.dilated:
            return mean(p, o, m)
        _, i, j = patch_of(geometry, m)
        y, x, exists = st.grid_neighbour(geometry, i, j, t // kw, t % kw)
        # The neighbour is in the same image.
        return st.guard(exists, mean(p, o, m + (y - i) * pw + (x - j)))

    summed = taps(geometry, weight, shapes)
    taps_tile = te.compute(summed.shape, lambda p, t, o, c: summed[p, t, o, c], name="taps_tile")
    g_tile = te.compute((groups, taps_count, shapes.k, shapes.m), shifted, name="g_tile")
    t, o = te.reduce_axis((0, taps_count), "rt"), te.reduce_axis((0, shapes.k), "ro")
    return te.compute(
        (groups, shapes.ci, shapes.m),
        lambda p, c, m: te.sum(taps_tile[p, t, o, c] * g_tile[p, t, o, m], axis=[t, o]),
        name="grid",
    )


def _expand_product(geometry: Geometry, product: Any, shapes: Shapes, dtype: str) -> Any:
    """grad_x patch by patch: (groups, ci, m, rows and columns of a patch); :func:`map_index` puts it into place."""
    return te.compute(
        (*product.shape, geometry.rows.window, geometry.cols.window),
        lambda p, c, m, _a, _b: st.store(product[p, c, m], dtype),
        name="grad_x",
    )


def weight_grad_of(geometry: Geometry, mean: Any, saved: Any, tiles: Tiles, shapes: Shapes, dtype: str) -> Any:
    """grad_W from g~, which ``mean(p, o, m)`` gives, and x~."""
    groups, cig, cog = geometry.groups, geometry.ci_group, geometry.co_group
    length = shapes.split

    def channels(s: Any, p: Any, m: Any, c: Any) -> Any:
        whole = s * length + m
        n, i, j = patch_of(geometry, whole)
        there = some([less(whole, shapes.patches, tiles.splits * length), less(c, cig, shapes.wi)])
        return st.guard(there, st.saved_at(geometry, saved, n, p * cig + c, i, j))

    def means(s: Any, p: Any, m: Any, o: Any) -> Any:
        return mean(p, o, s * length + m)

    o_tile = te.compute((tiles.splits, groups, length, shapes.co), means, name="o_tile")
    c_tile = te.compute((tiles.splits, groups, length, shapes.wi), channels, name="c_tile")
    m = te.reduce_axis((0, length), "rm")
    wo = pad(cog, tiles.wo)
    part = te.compute(
        (tiles.splits, groups, wo, shapes.wi),
        lambda s, p, o, c: te.sum(o_tile[s, p, m, o] * c_tile[s, p, m, c], axis=m),
        name="weight_part",
    )
    stored = te.compute(part.shape, lambda s, p, o, c: part[s, p, o, c], name="weight_parts")
    s = te.reduce_axis((0, tiles.splits), "rs")
    total = te.compute((groups, cog, cig), lambda p, o, c: te.sum(stored[s, p, o, c], axis=s), name="weight_sum")
    # One after another they would be written (kh * kw) floats apart.
    return te.compute(
        geometry.weight_shape,
        lambda o, c, _a, _b: st.store(total[o // cog, o % cog, c], dtype),
        name="grad_w",
    )


def channel_sum(name: str, channels: int, patches: int, term: Any) -> Any:
    """Sums over all patches of the batch, one a channel, ``term(o, m)`` summed.

    In up to four steps: a thread sums SUM_LENGTH values, SUM_LAST threads sum those of a block, one sums theirs; a sum
    of more than one block ends with a further step over blocks.
    """
    blocks = ceil_div(patches, SUM_THREADS * SUM_LENGTH)
    length = ceil_div(patches, blocks * SUM_THREADS)
    r = te.reduce_axis((0, length), "r")

    def one(o: Any, b: Any, t: Any) -> Any:
        # Neighbours in a warp read neighbours in memory.
        m = (b * length + r) * SUM_THREADS + t
        return te.sum(st.guard(some([less(m, patches, blocks * length * SUM_THREADS)]), term(o, m)), axis=r)

    first = te.compute((channels, blocks, SUM_THREADS), one, name=f"{name}_threads")
    r2 = te.reduce_axis((0, SUM_THREADS // SUM_LAST), "r2")
    second = te.compute(
        (channels, blocks, SUM_LAST),
        lambda o, b, t: te.sum(first[o, b, r2 * SUM_LAST + t], axis=r2),
        name=f"{name}_last",
    )
    r3 = te.reduce_axis((0, SUM_LAST), "r3")
    third = te.compute((channels, blocks), lambda o, b: te.sum(second[o, b, r3], axis=r3), name=f"{name}_block")
    r4 = te.reduce_axis((0, blocks), "r4")
    return te.compute((channels,), lambda o: te.sum(third[o, r4], axis=r4), name=f"{name}_sum")


def _bias_grad(geometry: Geometry, mean: Any, dtype: str) -> Any:
    """grad_b from g~, exact: every output pixel lies in one patch, so means times counts add up to the sum."""

    def term(o: Any, m: Any) -> Any:
        _, i, j = patch_of(geometry, m)
        return mean(o // geometry.co_group, o % geometry.co_group, m) * st.patch_count(geometry, i, j)

    total = channel_sum("bias", geometry.co, geometry.n * geometry.grid[0] * geometry.grid[1], term)
    return te.compute((geometry.co,), lambda o: st.store(total[o], dtype), name="grad_b")


def filter_grad(workload: Workload) -> Any:
    """PrimFunc of ``filter_grad``: ``g`` and grad_b."""
    geometry = workload.geometry
    grad_y = st.placeholders(geometry, workload.dtype)["grad_y"]
    g = _mean(geometry, _output_pixels(geometry, grad_y))

    def mean(p: Any, o: Any, m: Any) -> Any:
        n, i, j = patch_of(geometry, m)
        return g[n, p * geometry.co_group + o, i, j]

    return te.create_prim_func([grad_y, g, _bias_grad(geometry, mean, workload.dtype)])


def filter_input(workload: Workload) -> Any:
    """PrimFunc of ``filter_input``: ``pixels``, ``filtered_x``, and between them ``tile`` where x~ is channels last.

    ``tile`` is for a transposition in shared memory: threads that are neighbours read neighbouring patches, but write
    neighbouring channels.
    """
    geometry = workload.geometry
    x = st.placeholders(geometry, workload.dtype)["x"]
    a, b = te.reduce_axis((0, geometry.rows.window), "a"), te.reduce_axis((0, geometry.cols.window), "b")
    window = (geometry.rows.window, geometry.cols.window)
    if geometry.depthwise:
        pixels = te.compute(
            (*geometry.saved_shape, *window),
            lambda n, c, i, j, a, b: st.input_pixel(geometry, x, n, c, i, j, a, b),
            name="pixels",
        )
        out = te.compute(
            geometry.saved_shape,
            lambda n, c, i, j: te.sum(pixels[n, c, i, j, a, b], axis=[a, b]),
            name="filtered_x",
        )
        return te.create_prim_func([x, out])
    ph, pw = geometry.grid
    patches = geometry.n * ph * pw

    def pixel(c: Any, m: Any, a: Any, b: Any) -> Any:
        n, i, j = patch_of(geometry, m)
        return st.input_pixel(geometry, x, n, c, i, j, a, b)

    pixels = te.compute((geometry.ci, patches, *window), pixel, name="pixels")
    tile = te.compute((geometry.ci, patches), lambda c, m: te.sum(pixels[c, m, a, b], axis=[a, b]), name="tile")
    out = te.compute((patches, geometry.ci), lambda m, c: tile[c, m], name="filtered_x")
    func = te.create_prim_func([x, out])
    return store_into(func, "filtered_x", geometry.saved_shape, lambda m, c: (*patch_of(geometry, m), c))


def depthwise_backward(workload: Workload) -> Any:
    """PrimFunc of the backward kernels of a depthwise convolution: everything is a map or a sum over a channel.

    Stages: ``g``; for grad_x ``taps``, ``grad_x``; for grad_W those of a channel's sum (``weight_*``), ``grad_w``; for
    grad_b those of :func:`_bias_grad`.
    """
    geometry, dtype, kernel = workload.geometry, workload.dtype, workload.kernel
    args = st.placeholders(geometry, dtype)
    grad_y, weight, saved = args["grad_y"], args["weight"], args["saved"]
    g = _mean(geometry, _output_pixels(geometry, grad_y))
    inputs, outputs = [grad_y], []
    if kernel != "backward_input":
        inputs.append(saved)
    if kernel != "backward_weight":
        inputs.append(weight)
        outputs.append(_depthwise_input_grad(geometry, g, weight, dtype))
    patches = geometry.n * geometry.grid[0] * geometry.grid[1]
    if kernel != "backward_input":

        def term(c: Any, m: Any) -> Any:
            n, i, j = patch_of(geometry, m)
            return g[n, c, i, j] * saved[n, c, i, j]

        total = channel_sum("weight", geometry.co, patches, term)
        outputs.append(
            te.compute(geometry.weight_shape, lambda o, _c, _a, _b: st.store(total[o], dtype), name="grad_w")
        )

    def mean(p: Any, o: Any, m: Any) -> Any:
        n, i, j = patch_of(geometry, m)
        return g[n, p + o, i, j]

    outputs.append(_bias_grad(geometry, mean, dtype))
    func = te.create_prim_func([*inputs, *outputs])
    if kernel != "backward_weight":
        index, inside = _patch_index(geometry)
        func = store_into(func, "grad_x", geometry.x_shape, index, inside)
    return func


def _depthwise_input_grad(geometry: Geometry, g: Any, weight: Any, dtype: str) -> Any:
    kh, kw = geometry.kernel
    if geometry.dilated:
        ka, kb = te.reduce_axis((0, kh), "ka"), te.reduce_axis((0, kw), "kb")

        def convolve(n: Any, c: Any, i: Any, j: Any) -> Any:
            y, x, exists = st.grid_neighbour(geometry, i, j, ka, kb)
            tap = st.rotated_tap(geometry, weight, c, 0, ka, kb)
            return te.sum(st.guard(exists, g[n, c, y, x]) * tap, axis=[ka, kb])

        grid = te.compute((geometry.n, geometry.ci, *geometry.grid), convolve, name="grid")
    else:
        taps = te.compute((geometry.co,), lambda o: st.sum_of_taps(geometry, weight, o, 0), name="taps")
        grid = te.compute(
            (geometry.n, geometry.ci, *geometry.grid), lambda n, c, i, j: taps[c] * g[n, c, i, j], name="grid"
        )
    return te.compute(
        (*grid.shape, geometry.rows.window, geometry.cols.window),
        lambda n, c, i, j, _a, _b: st.store(grid[n, c, i, j], dtype),
        name="grad_x",
    )


def _patch_index(geometry: Geometry) -> tuple[Any, Any]:
    """Where pixel (a, b) of input patch (i, j) lies in the map, and whether it lies there at all."""
    rows, cols = geometry.rows, geometry.cols

    def index(n: Any, c: Any, i: Any, j: Any, a: Any, b: Any) -> Any:
        return n, c, i * rows.window - rows.in_offset + a, j * cols.window - cols.in_offset + b

    def conditions(*axes: Any) -> list[Any]:
        return _inside(geometry, *index(*axes)[2:])

    return index, _all_of(conditions, 6)


def expand(workload: Workload) -> Any:
    """PrimFunc of ``expand``: stage ``grad_x``."""
    geometry = workload.geometry
    grid = st.placeholders(geometry, workload.dtype)["grad_x_grid"]
    out = te.compute(
        (*grid.shape, geometry.rows.window, geometry.cols.window),
        lambda n, c, i, j, _a, _b: st.store(grid[n, c, i, j], workload.dtype),
        name="grad_x",
    )
    func = te.create_prim_func([grid, out])
    return store_into(func, "grad_x", geometry.x_shape, *_patch_index(geometry))

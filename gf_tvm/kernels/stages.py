"""TE stages: the formulas of gradient filtering, one function a quantity, in the words of docs/mathematics.md.

A stage takes and gives TE tensors. Sums are float32 whatever the storage dtype; :func:`load` and :func:`store`
convert. Index arithmetic comes from :class:`~gf_tvm.core.geometry.Geometry`.
"""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from ..core.geometry import Axis, Geometry

ACC = "float32"


def load(value: Any) -> Any:
    """A stored element as float32."""
    return value if value.dtype == ACC else value.astype(ACC)


def store(value: Any, dtype: str) -> Any:
    """A float32 value in the storage dtype."""
    return value if dtype == ACC else value.astype(dtype)


def zero() -> Any:
    """float32 zero."""
    return tirx.const(0.0, ACC)


def guard(conditions: list[Any], value: Any) -> Any:
    """``value`` where all conditions hold, else zero; no branch where there is nothing to check."""
    if not conditions:
        return value
    return tirx.if_then_else(tirx.all(*conditions), value, zero())


def placeholders(geometry: Geometry, dtype: str) -> dict[str, Any]:
    """The arguments that kernels read."""
    grid = (geometry.n, geometry.co, *geometry.grid)
    return {
        "x": te.placeholder(geometry.x_shape, dtype, name="x"),
        "grad_y": te.placeholder(geometry.y_shape, dtype, name="grad_y"),
        "weight": te.placeholder(geometry.weight_shape, dtype, name="weight"),
        "saved": te.placeholder(geometry.saved_shape, ACC, name="saved"),
        "g": te.placeholder(grid, ACC, name="g"),
        "grad_x_grid": te.placeholder((geometry.n, geometry.ci, *geometry.grid), ACC, name="grad_x_grid"),
    }


def _inside(axis: Axis, position: Any, patches_exact: bool, size: int) -> list[Any]:
    return [] if patches_exact else [position >= 0, position < size]


def patch_count(geometry: Geometry, i: Any, j: Any) -> Any:
    """Number of valid output pixels of patch (i, j), float32."""

    def along(axis: Axis, k: Any) -> Any:
        if axis.out_exact:
            return tirx.const(axis.patch, "int32")
        start = k * axis.patch - axis.out_offset
        return tirx.min(start + axis.patch, axis.out) - tirx.max(start, 0)

    return (along(geometry.rows, i) * along(geometry.cols, j)).astype(ACC)


def output_pixel(geometry: Geometry, grad_y: Any, n: Any, o: Any, i: Any, j: Any, a: Any, b: Any) -> Any:
    """Pixel (a, b) of output patch (i, j) as float32, zero outside the map."""
    rows, cols = geometry.rows, geometry.cols
    h, w = i * rows.patch - rows.out_offset + a, j * cols.patch - cols.out_offset + b
    conditions = _inside(rows, h, rows.out_exact, rows.out) + _inside(cols, w, cols.out_exact, cols.out)
    return guard(conditions, load(grad_y[n, o, h, w]))


def input_pixel(geometry: Geometry, x: Any, n: Any, c: Any, i: Any, j: Any, a: Any, b: Any) -> Any:
    """Pixel (a, b) of input patch (i, j) as float32, zero outside the map."""
    rows, cols = geometry.rows, geometry.cols
    h, w = i * rows.window - rows.in_offset + a, j * cols.window - cols.in_offset + b
    conditions: list[Any] = []
    for axis, position in ((rows, h), (cols, w)):
        # The grid may reach beyond the map, or (negative offset) lie wholly inside it.
        if axis.in_offset > 0:
            conditions.append(position >= 0)
        if axis.patches * axis.window - axis.in_offset > axis.size:
            conditions.append(position < axis.size)
    return guard(conditions, load(x[n, c, h, w]))


def mean_of_patch(geometry: Geometry, grad_y: Any, n: Any, o: Any, i: Any, j: Any) -> Any:
    """g~[n, o, i, j]: the mean of grad_y over the valid pixels of its patch."""
    rows, cols = geometry.rows, geometry.cols
    a, b = te.reduce_axis((0, rows.patch), "a"), te.reduce_axis((0, cols.patch), "b")
    if rows.out_exact and cols.out_exact:
        scale = tirx.const(1.0 / (rows.patch * cols.patch), ACC)
    else:
        scale = tirx.const(1.0, ACC) / patch_count(geometry, i, j)
    return te.sum(output_pixel(geometry, grad_y, n, o, i, j, a, b) * scale, axis=[a, b])


def sum_of_patch(geometry: Geometry, x: Any, n: Any, c: Any, i: Any, j: Any) -> Any:
    """x~[n, c, i, j]: the sum of x over the valid pixels of its patch."""
    a, b = te.reduce_axis((0, geometry.rows.window), "a"), te.reduce_axis((0, geometry.cols.window), "b")
    return te.sum(input_pixel(geometry, x, n, c, i, j, a, b), axis=[a, b])


def sum_of_taps(geometry: Geometry, weight: Any, o: Any, c: Any) -> Any:
    """W~[o, c]: the sum of W over its window."""
    ka, kb = te.reduce_axis((0, geometry.kernel[0]), "ka"), te.reduce_axis((0, geometry.kernel[1]), "kb")
    return te.sum(load(weight[o, c, ka, kb]), axis=[ka, kb])


def saved_at(geometry: Geometry, saved: Any, n: Any, c: Any, i: Any, j: Any) -> Any:
    """x~[n, c, i, j] in the order in which it is kept."""
    return saved[n, c, i, j] if geometry.depthwise else saved[n, i, j, c]


def rotated_tap(geometry: Geometry, weight: Any, o: Any, c: Any, ka: Any, kb: Any) -> Any:
    """Tap (ka, kb) of the kernel turned by 180 degrees."""
    kh, kw = geometry.kernel
    return load(weight[o, c, kh - 1 - ka, kw - 1 - kb])


def grid_neighbour(geometry: Geometry, i: Any, j: Any, ka: Any, kb: Any) -> tuple[Any, Any, list[Any]]:
    """Dilated case: the patch that tap (ka, kb) reads for patch (i, j), and the conditions for it to exist."""
    (ph, pw), (dh, dw), (top, left) = geometry.grid, geometry.grid_dilation, geometry.grid_padding
    y, x = i + ka * dh - top, j + kb * dw - left
    return y, x, [y >= 0, y < ph, x >= 0, x < pw]


def input_patch(geometry: Geometry, h: Any, w: Any) -> tuple[Any, Any, list[Any]]:
    """The input patch of pixel (h, w), and the conditions for it to exist."""
    rows, cols = geometry.rows, geometry.cols
    # Shifted by whole windows so that the division never sees a negative number.
    conditions: list[Any] = []
    found = []
    for axis, position in ((rows, h), (cols, w)):
        shifted = position + axis.in_offset
        if not axis.covers_input:
            conditions += [shifted >= 0, shifted < axis.patches * axis.window]
        found.append(tirx.floordiv(shifted, axis.window))
    return found[0], found[1], conditions

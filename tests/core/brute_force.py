"""Gradient filtering, transcribed word for word from its definition: slow numpy float64 loops.

Written from the table of the definition alone (docs/mathematics.md has it) and shares nothing with gf_tvm, so that
both have to be wrong in the same way to agree. Only the batch is computed at once; every row, column, channel and tap
is looped over.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Conv:
    """What the definition calls k, s, p, d, g and r; pairs are (h, w)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    patch: tuple[int, int]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Hy, Wy of a Hx x Wx input: the number of places where the dilated kernel fits."""
        sizes = []
        for axis, size in enumerate((height, width)):
            reach = self.dilation[axis] * (self.kernel[axis] - 1)
            places = range(-self.padding[axis], size + self.padding[axis] - reach, self.stride[axis])
            sizes.append(len(places))
        return sizes[0], sizes[1]


def output_patches(size: int, r: int) -> list[list[int]]:
    """For each patch the rows of y in it."""
    p = ceil(size / r)
    oy = ceil((p * r - size) / 2)
    return [[row for row in range(size) if i * r - oy <= row < (i + 1) * r - oy] for i in range(p)]


def input_patches(out_size: int, in_size: int, r: int, s: int) -> list[list[int]]:
    """For each patch the rows of x in it; ox is negative where the grid is smaller than the map."""
    p = ceil(out_size / r)
    ox = ceil((p * r * s - in_size) / 2)
    return [[row for row in range(in_size) if i * r * s - ox <= row < (i + 1) * r * s - ox] for i in range(p)]


def filtered_grad_y(grad_y: Array, conv: Conv) -> Array:
    """g~ (n, co, P, Q): the mean of grad_y over the valid pixels of each patch."""
    n, co, hy, wy = grad_y.shape
    rows, cols = output_patches(hy, conv.patch[0]), output_patches(wy, conv.patch[1])
    g = np.full((n, co, len(rows), len(cols)), np.nan)
    for i, rows_in in enumerate(rows):
        for j, cols_in in enumerate(cols):
            pixels = [grad_y[:, :, row, col] for row in rows_in for col in cols_in]
            g[:, :, i, j] = sum(pixels) / len(pixels)
    return g


def filtered_x(x: Array, conv: Conv) -> Array:
    """x~ (n, ci, P, Q): the sum of x over the valid pixels of each patch."""
    n, ci, hx, wx = x.shape
    hy, wy = conv.output_size(hx, wx)
    rows = input_patches(hy, hx, conv.patch[0], conv.stride[0])
    cols = input_patches(wy, wx, conv.patch[1], conv.stride[1])
    sums = np.zeros((n, ci, len(rows), len(cols)))
    for i, rows_in in enumerate(rows):
        for j, cols_in in enumerate(cols):
            for row in rows_in:
                for col in cols_in:
                    sums[:, :, i, j] += x[:, :, row, col]
    return sums


def is_dilated_case(conv: Conv) -> bool:
    """d >= r and d > 1 on both axes."""
    return all(conv.dilation[axis] >= conv.patch[axis] and conv.dilation[axis] > 1 for axis in (0, 1))


def group_pairs(co: int, ci: int, groups: int) -> list[tuple[int, int, int]]:
    """All (o, c, channel of W) where output channel o and input channel c are in one group."""
    return [
        (o, c, c % (ci // groups)) for o in range(co) for c in range(ci) if o // (co // groups) == c // (ci // groups)
    ]


def input_grad(g: Array, weight: Array, ci: int, conv: Conv) -> Array:
    """grad_x~ (n, ci, P, Q)."""
    n, co, p, q = g.shape
    kh, kw = conv.kernel
    out = np.zeros((n, ci, p, q))
    for o, c, cw in group_pairs(co, ci, conv.groups):
        if not is_dilated_case(conv):
            out[:, c] += weight[o, cw].sum() * g[:, o]
            continue
        rotated = weight[o, cw, ::-1, ::-1]
        d = [conv.dilation[axis] // conv.patch[axis] for axis in (0, 1)]
        # "same" size: d * (k - 1) zero patches are added, half of them (rounded down) before the grid.
        before = [d[0] * (kh - 1) // 2, d[1] * (kw - 1) // 2]
        for i in range(p):
            for j in range(q):
                for a in range(kh):
                    for b in range(kw):
                        row, col = i - before[0] + a * d[0], j - before[1] + b * d[1]
                        if 0 <= row < p and 0 <= col < q:
                            out[:, c, i, j] += rotated[a, b] * g[:, o, row, col]
    return out


def backward(x: Array, weight: Array, grad_y: Array, conv: Conv) -> tuple[Array, Array, Array]:
    """grad_x (n, ci, h, w), grad_W (co, ci/groups, kh, kw) and grad_b (co) of one convolution, all float64."""
    ci, hx, wx = x.shape[1:]
    _, co, hy, wy = grad_y.shape
    g, sums = filtered_grad_y(grad_y, conv), filtered_x(x, conv)

    grid = input_grad(g, weight, ci, conv)
    grad_x = np.zeros(x.shape)
    for i, rows_in in enumerate(input_patches(hy, hx, conv.patch[0], conv.stride[0])):
        for j, cols_in in enumerate(input_patches(wy, wx, conv.patch[1], conv.stride[1])):
            for row in rows_in:
                for col in cols_in:
                    grad_x[:, :, row, col] = grid[:, :, i, j]

    grad_w = np.full(weight.shape, np.nan)
    for o, c, cw in group_pairs(co, ci, conv.groups):
        grad_w[o, cw, :, :] = (g[:, o] * sums[:, c]).sum()

    grad_b = np.array([grad_y[:, o].sum() for o in range(co)])
    return grad_x, grad_w, grad_b

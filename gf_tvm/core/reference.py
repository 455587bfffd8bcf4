"""Gradient filtering in plain PyTorch: the definition that every kernel is checked against, and the fallback.

Every function takes tensors in PyTorch's order (n, c, h, w) and a :class:`~gf_tvm.core.geometry.Geometry`, works in any
floating dtype on any device, and sums float16 and bfloat16 in float32. Results on the patch grid have the dtype of
the sums, gradients the dtype of what they are the gradient of.

Source: CVPR 2023 paper, section 3; notation of docs/mathematics.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import Axis, Geometry


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of ``dtype`` are made: float32 for the 16-bit types, else itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _patch_sums(t: Tensor, offset: tuple[int, int], window: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Sum of ``t`` (n, c, h, w) over each patch, the map's surroundings counting as zero -> (n, c, ph, pw)."""
    h, w = t.shape[-2:]
    after = (grid[0] * window[0] - offset[0] - h, grid[1] * window[1] - offset[1] - w)
    t = t.to(sum_dtype(t.dtype))
    if any(offset) or any(after):
        # A negative pad cuts rows off: those that belong to no patch.
        t = F.pad(t, (offset[1], after[1], offset[0], after[0]))
    return F.avg_pool2d(t, window, stride=window, divisor_override=1)


def filter_input(x: Tensor, geometry: Geometry) -> Tensor:
    """x (n, ci, h, w) -> x~ (n, ci, ph, pw): the sum of x over each patch of the input grid."""
    rows, cols = geometry.rows, geometry.cols
    return _patch_sums(x, (rows.in_offset, cols.in_offset), (rows.window, cols.window), geometry.grid)


def filter_grad(grad_y: Tensor, geometry: Geometry) -> Tensor:
    """grad_y (n, co, hy, wy) -> g~ (n, co, ph, pw): the mean of grad_y over the valid pixels of each patch."""
    rows, cols = geometry.rows, geometry.cols
    sums = _patch_sums(grad_y, (rows.out_offset, cols.out_offset), geometry.patch, geometry.grid)
    if rows.out_exact and cols.out_exact:
        return sums.mul_(1.0 / (geometry.patch[0] * geometry.patch[1]))
    return sums.div_(_counts(rows, sums)[:, None] * _counts(cols, sums))


def _counts(axis: Axis, like: Tensor) -> Tensor:
    """Outputs in each patch of an axis, with ``like``'s dtype; made where it lies, so that no GPU is waited for."""
    start = torch.arange(axis.patches, dtype=like.dtype, device=like.device) * axis.patch - axis.out_offset
    return (start + axis.patch).clamp(max=axis.out) - start.clamp(min=0)


def input_grad(g: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """g~ (n, co, ph, pw) and W (co, ci/groups, kh, kw) -> grad_x~ (n, ci, ph, pw), in g~'s dtype."""
    weight = weight.to(g.dtype)
    n, (ph, pw), groups = g.shape[0], geometry.grid, geometry.groups
    if geometry.dilated:
        kh, kw = geometry.kernel
        rotated = weight.view(groups, geometry.co_group, geometry.ci_group, kh, kw).transpose(1, 2).flip(3, 4)
        rotated = rotated.reshape(geometry.ci, geometry.co_group, kh, kw)
        before, total = (
            geometry.grid_padding,
            [d * (k - 1) for d, k in zip(geometry.grid_dilation, (kh, kw), strict=True)],
        )
        g = F.pad(g, (before[1], total[1] - before[1], before[0], total[0] - before[0]))
        return F.conv2d(g, rotated, dilation=geometry.grid_dilation, groups=groups)
    taps = weight.sum(dim=(2, 3))
    if geometry.depthwise:
        return g * taps.view(1, -1, 1, 1)
    taps = taps.view(groups, geometry.co_group, geometry.ci_group).transpose(1, 2)
    g = g.reshape(n, groups, geometry.co_group, ph * pw)
    return torch.matmul(taps, g).view(n, geometry.ci, ph, pw)


def weight_grad(g: Tensor, filtered_x: Tensor, geometry: Geometry) -> Tensor:
    """g~ (n, co, ph, pw) and x~ (n, ci, ph, pw) -> grad_W (co, ci/groups, kh, kw), one value for all taps."""
    if geometry.depthwise:
        sums = (g * filtered_x).sum(dim=(0, 2, 3))
    else:
        groups = geometry.groups
        left = g.transpose(0, 1).reshape(groups, geometry.co_group, -1)
        right = filtered_x.permute(1, 0, 2, 3).reshape(groups, geometry.ci_group, -1)
        sums = torch.matmul(left, right.transpose(1, 2))
    return sums.reshape(geometry.co, geometry.ci_group, 1, 1).expand(geometry.weight_shape).contiguous()


def expand(grad_x_grid: Tensor, geometry: Geometry) -> Tensor:
    """grad_x~ (n, ci, ph, pw) -> grad_x (n, ci, h, w): each patch's value at all of its pixels, zero elsewhere."""
    rows, cols = geometry.rows, geometry.cols
    (ph, pw), (wh, ww) = geometry.grid, (rows.window, cols.window)
    n, c = grad_x_grid.shape[:2]
    full = grad_x_grid[:, :, :, None, :, None].expand(n, c, ph, wh, pw, ww).reshape(n, c, ph * wh, pw * ww)
    if rows.in_exact and cols.in_exact:
        return full
    top, left = rows.in_offset, cols.in_offset
    return F.pad(full, (-left, geometry.w - (pw * ww - left), -top, geometry.h - (ph * wh - top)))


def backward(
    grad_y: Tensor,
    filtered_x: Tensor | None,
    weight: Tensor,
    geometry: Geometry,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The filtered backward pass of one convolution.

    Args:
        grad_y: (n, co, hy, wy).
        filtered_x: x~ (n, ci, ph, pw); may be None where grad_W is not needed.
        weight: (co, ci/groups, kh, kw).
        needs: which of grad_x, grad_W, grad_b to compute; the others are None.

    Returns:
        grad_x (n, ci, h, w), grad_W (co, ci/groups, kh, kw), grad_b (co), in the dtype of grad_y, W and grad_y.
    """
    grad_x = grad_w = grad_b = None
    if needs[0] or needs[1]:
        g = filter_grad(grad_y, geometry)
        if needs[0]:
            grad_x = expand(input_grad(g, weight, geometry).to(grad_y.dtype), geometry)
        if needs[1]:
            assert filtered_x is not None
            grad_w = weight_grad(g, filtered_x.to(g.dtype), geometry).to(weight.dtype)
    if needs[2]:
        grad_b = grad_y.sum(dim=(0, 2, 3), dtype=sum_dtype(grad_y.dtype)).to(grad_y.dtype)
    return grad_x, grad_w, grad_b

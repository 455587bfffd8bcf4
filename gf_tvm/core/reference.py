"""Gradient filtering in plain PyTorch: the definition that every kernel is checked against, and the fallback.

Every function takes tensors in PyTorch's order (n, c, h, w) and a :class:`~gf_tvm.core.geometry.Geometry`, works in any
floating dtype on any device, and sums float16 and bfloat16 in float32. Results on the patch grid have the dtype of
the sums, gradients the dtype of what they are the gradient of.

Source: CVPR 2023 paper, section 3; notation of docs/mathematics.md.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import Axis, Geometry


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of ``dtype`` are made: float32 for the 16-bit types, else itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _patch_sums(t: Tensor, offset: tuple[int, int], window: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Sum of ``t`` (n, c, h, w) over each patch, the map's surroundings counting as zero -> (n, c, ph, pw), a copy."""
    n, c, h, w = t.shape
    t = t.to(sum_dtype(t.dtype))
    if grid == (1, 1):
        rows, cols = (
            slice(max(-before, 0), max(size - before, 0)) for before, size in zip(offset, window, strict=True)
        )
        return t[:, :, rows, cols].sum(dim=(2, 3), keepdim=True)
    after = (grid[0] * window[0] - offset[0] - h, grid[1] * window[1] - offset[1] - w)
    if any(offset) or any(after):
        # A negative pad cuts rows off: those that belong to no patch.
        t = F.pad(t, (offset[1], after[1], offset[0], after[0]))
    if t.device.type != "cpu":
        return F.avg_pool2d(t, window, stride=window, divisor_override=1)
    if window == (1, 1):
        return t.clone()
    t = _short_sum(t.view(n, c, grid[0], window[0], grid[1] * window[1]), 3)
    return _short_sum(t.view(n, c, *grid, window[1]), 4)


def _short_sum(t: Tensor, dim: int) -> Tensor:
    """Sum over a dimension, slice by slice if it is short: ``sum`` and ``avg_pool2d`` take up to 8 times as long."""
    if t.shape[dim] > 8:
        return t.sum(dim)
    total, *rest = t.unbind(dim)
    for piece in rest:
        total = total + piece
    return total


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
    if _is_plain(sums):
        return sums.div_(_kept_counts(rows, cols, sums.dtype))
    return sums.div_(_counts(rows, cols, sums.dtype, sums.device))


def _counts(rows: Axis, cols: Axis, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Outputs in each patch (ph, pw); made where they are needed, so that no GPU is waited for."""
    counts = []
    for axis in (rows, cols):
        start = torch.arange(axis.patches, dtype=dtype, device=device) * axis.patch - axis.out_offset
        counts.append((start + axis.patch).clamp(max=axis.out) - start.clamp(min=0))
    return counts[0][:, None] * counts[1]


# Small maps take less time than making these anew.


def _is_plain(t: Tensor) -> bool:
    """Whether ``t`` is on the CPU and may meet tensors that were kept: nothing traces or transforms what is done."""
    return (
        type(t) is Tensor
        and t.device.type == "cpu"
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
    )


@lru_cache(maxsize=256)
def _kept_counts(rows: Axis, cols: Axis, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # whose tensors autograd could not use later
        return _counts(rows, cols, dtype, torch.device("cpu"))


@lru_cache(maxsize=256)
def _kept_patches(rows: Axis, cols: Axis) -> Tensor:
    """The number of the patch of each pixel that lies in one, row by row."""
    with torch.inference_mode(False):
        row, col = (
            (torch.arange(*_covered(axis)) + axis.in_offset).div(axis.window, rounding_mode="floor")
            for axis in (rows, cols)
        )
        return (row[:, None] * cols.patches + col).flatten()


def _covered(axis: Axis) -> tuple[int, int]:
    """The pixels of the input that lie in patches: the first one, and the one after the last."""
    return max(0, -axis.in_offset), min(axis.size, axis.patches * axis.window - axis.in_offset)


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
    taps = _window_sums(weight)
    if geometry.depthwise:
        return g * taps.view(1, -1, 1, 1)
    if groups == 1 and ph * pw < 64:  # one product, which reads W~ once
        g = g.transpose(0, 1).reshape(geometry.co, n * ph * pw)
        return torch.mm(taps.t(), g).view(geometry.ci, n, ph, pw).transpose(0, 1)
    taps = taps.view(groups, geometry.co_group, geometry.ci_group).transpose(1, 2)
    g = g.reshape(n, groups, geometry.co_group, ph * pw)
    return torch.matmul(taps, g).view(n, geometry.ci, ph, pw)


def _window_sums(weight: Tensor) -> Tensor:
    """W~ (co, ci/groups), the sum of W over its window."""
    co, ci_group, *kernel = weight.shape
    if kernel == [1, 1]:
        return weight.view(co, ci_group)
    if weight.device.type != "cpu":
        return weight.sum(dim=(2, 3))
    # On CPUs a third of the time of sum.
    weight = weight.reshape(co * ci_group, kernel[0] * kernel[1])
    return torch.mv(weight, weight.new_ones(weight.shape[1])).view(co, ci_group)


def weight_grad(g: Tensor, filtered_x: Tensor, geometry: Geometry) -> Tensor:
    """g~ (n, co, ph, pw) and x~ (n, ci, ph, pw) -> grad_W (co, ci/groups, kh, kw), one value for all taps."""
    groups, patches = geometry.groups, g.shape[0] * g.shape[2] * g.shape[3]
    if geometry.depthwise:
        sums = (g * filtered_x).sum(dim=(0, 2, 3))
    elif groups == 1:
        left = g.transpose(0, 1).reshape(geometry.co, patches)
        sums = torch.mm(left, filtered_x.permute(0, 2, 3, 1).reshape(patches, geometry.ci))
    else:
        left = g.transpose(0, 1).reshape(groups, geometry.co_group, patches)
        right = filtered_x.permute(1, 0, 2, 3).reshape(groups, geometry.ci_group, patches)
        sums = torch.matmul(left, right.transpose(1, 2))
    return sums.reshape(geometry.co, geometry.ci_group, 1, 1).expand(geometry.weight_shape).contiguous()


def expand(grad_x_grid: Tensor, geometry: Geometry) -> Tensor:
    """grad_x~ (n, ci, ph, pw) -> grad_x (n, ci, h, w): each patch's value at all of its pixels, zero elsewhere."""
    rows, cols = geometry.rows, geometry.cols
    (ph, pw), (wh, ww) = geometry.grid, (rows.window, cols.window)
    n, c = grad_x_grid.shape[:2]
    if geometry.grid == (1, 1) and geometry.covers_input:
        return grad_x_grid.expand(n, c, geometry.h, geometry.w).contiguous()
    if geometry.h * geometry.w <= 1024 and _is_plain(grad_x_grid):
        (top, bottom), (left, right) = _covered(rows), _covered(cols)
        covered = grad_x_grid.reshape(n * c, ph * pw).index_select(1, _kept_patches(rows, cols))
        full = covered.view(n, c, bottom - top, right - left)
        return full if geometry.covers_input else F.pad(full, (left, geometry.w - right, top, geometry.h - bottom))
    # Columns first: then whole rows are copied, which takes half of the time.
    full = grad_x_grid[..., None].expand(n, c, ph, pw, ww).reshape(n, c, ph, pw * ww)
    if not cols.in_exact:
        full = F.pad(full, (-cols.in_offset, geometry.w - (pw * ww - cols.in_offset)))
    full = full[:, :, :, None].expand(n, c, ph, wh, geometry.w).reshape(n, c, ph * wh, geometry.w)
    if not rows.in_exact:
        full = F.pad(full, (0, 0, -rows.in_offset, geometry.h - (ph * wh - rows.in_offset)))
    return full.contiguous()


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

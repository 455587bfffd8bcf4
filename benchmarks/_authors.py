"""The published formulation of gradient filtering in plain PyTorch operators, as a column of its own.

:mod:`gf_tvm.core.reference`, the column "plain", computes the same with the same kinds of operators: average pooling of
grad_y, x~ as sums, one product for each of the two gradients, expansion. Three things differ, and are as published
here (Yang, Li, Marculescu, "Efficient On-device Training via Gradient Filtering", CVPR 2023, and its public code): W~
is summed in the forward pass and kept, so it costs the backward pass nothing; maps are padded inside the pooling; and
grad_x of a map that patches do not fill is a view of a larger tensor, which is not copied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gf_tvm.comparison.convolutions import Contender, Data
from gf_tvm.core import reference
from gf_tvm.shapes import Case


def published(case: Case, data: Data) -> Contender | None:
    """The published operator; None where it is not defined: groups, oblong patches, dilation, uncovered input."""
    geometry = case.geometry
    rows, cols = geometry.rows, geometry.cols
    if (
        (geometry.groups != 1 and not geometry.depthwise)
        or geometry.patch[0] != geometry.patch[1]
        or geometry.dilated
        or min(rows.in_offset, cols.in_offset) < 0
        or not geometry.covers_input
        or case.dtype != "float32"
    ):
        return None
    sums_x = reference.filter_input(data.x, geometry)
    sums_w = data.weight.sum((2, 3))
    n, (ph, pw) = geometry.n, geometry.grid

    def backward() -> tuple[Tensor, Tensor]:
        g = F.avg_pool2d(
            data.grad_y,
            geometry.patch,
            geometry.patch,
            (rows.out_offset, cols.out_offset),
            count_include_pad=False,
        )
        if geometry.depthwise:
            small = g * sums_w.view(1, -1, 1, 1)
            products = (sums_x * g).sum((0, 2, 3))
        else:
            small = torch.matmul(sums_w.t(), g.flatten(2))
            products = g.transpose(0, 1).flatten(1) @ sums_x.permute(0, 2, 3, 1).flatten(0, 2)
        grad_w = products.view(geometry.co, geometry.ci_group, 1, 1).expand(geometry.weight_shape).clone()
        wide = small.view(n, geometry.ci, ph, 1, pw, 1).expand(-1, -1, -1, rows.window, -1, cols.window)
        full = wide.reshape(n, geometry.ci, ph * rows.window, pw * cols.window)
        top, left = rows.in_offset, cols.in_offset
        return full[:, :, top : top + geometry.h, left : left + geometry.w], grad_w

    def results() -> dict[str, Tensor]:
        grad_x, grad_w = backward()
        return {"grad_x": grad_x, "grad_W": grad_w}

    return Contender(backward, results)

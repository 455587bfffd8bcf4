"""What ``torch.utils.flop_counter`` counts of a filtered convolution.

As it counts everything: a multiplication and an addition for each term of a product, nothing for sums, means and
copies. :mod:`gf_tvm.evaluation.flops` counts these, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from ..core.geometry import Geometry
from . import operators


def product_flops(geometry: Geometry, needs_x: bool, needs_weight: bool) -> int:
    """Operations of a filtered backward pass' products: g~ with W~ (in the dilated case with all of W), g~ with x~."""
    product = 2 * geometry.n * prod(geometry.grid) * geometry.co * geometry.ci_group
    taps = prod(geometry.kernel) if geometry.dilated else 1
    return product * (needs_x * taps + needs_weight)


@register_flop_formula(torch.ops.gf_tvm.conv2d)
def _forward(x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[Any], **__: Any) -> int:
    """The exact convolution's; the sums x~ are no products."""
    return int(conv_flop_count(list(x), list(weight), list(out_shape[0])))


@register_flop_formula(torch.ops.gf_tvm.conv2d_backward)
def _backward(
    grad_y: Sequence[int],
    saved: Sequence[int],
    weight: Sequence[int],
    x_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    patch: Sequence[int],
    library: str,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
    **_: Any,
) -> int:
    pairs = (tuple(pair) for pair in (stride, padding, dilation))
    geometry = operators.make_geometry(tuple(x_shape), tuple(weight), *pairs, groups, tuple(patch))
    return product_flops(geometry, needs_x, needs_weight)

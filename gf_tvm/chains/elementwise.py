"""Element-wise operations: what they compute, and their derivatives, which the forward pass averages over patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


@dataclass(frozen=True)
class Rule:
    """One kind of element-wise operation.

    Attributes:
        apply: (z, in place, *settings) -> y. Only asked to work in place where nobody reads z any more.
        derivative: (gradient of ones, z, y, *settings) -> f'(z), by PyTorch's own backward operator, so that values on
            the edges of a piece (ReLU at zero) count as they do there.
        from_result: the derivative reads y, not z, so it can be taken after working in place.
    """

    apply: Callable[..., Tensor]
    derivative: Callable[..., Tensor]
    from_result: bool = False


RULES: dict[str, Rule] = {
    "relu": Rule(lambda z, i: F.relu(z, inplace=i), lambda g, z, y: _aten.threshold_backward(g, y, 0), True),
    "hardtanh": Rule(
        lambda z, i, low, high: F.hardtanh(z, low, high, inplace=i),
        lambda g, z, y, low, high: _aten.hardtanh_backward(g, z, low, high),
    ),
    "relu6": Rule(lambda z, i: F.relu6(z, inplace=i), lambda g, z, y: _aten.hardtanh_backward(g, z, 0.0, 6.0)),
    "leaky_relu": Rule(
        lambda z, i, slope: F.leaky_relu(z, slope, inplace=i),
        lambda g, z, y, slope: _aten.leaky_relu_backward(g, z, slope, False),
    ),
    "elu": Rule(
        lambda z, i, alpha: F.elu(z, alpha, inplace=i),
        lambda g, z, y, alpha: _aten.elu_backward(g, alpha, 1.0, 1.0, False, z),
    ),
    "hardswish": Rule(lambda z, i: F.hardswish(z, inplace=i), lambda g, z, y: _aten.hardswish_backward(g, z)),
    "hardsigmoid": Rule(lambda z, i: F.hardsigmoid(z, inplace=i), lambda g, z, y: _aten.hardsigmoid_backward(g, z)),
    "silu": Rule(lambda z, i: F.silu(z, inplace=i), lambda g, z, y: _aten.silu_backward(g, z)),
    "mish": Rule(lambda z, i: F.mish(z, inplace=i), lambda g, z, y: _aten.mish_backward(g, z)),
    "gelu": Rule(
        lambda z, i, how: F.gelu(z, approximate=how),
        lambda g, z, y, how: _aten.gelu_backward(g, z, approximate=how),
    ),
    "softplus": Rule(
        lambda z, i, beta, threshold: F.softplus(z, beta, threshold),
        lambda g, z, y, beta, threshold: _aten.softplus_backward(g, z, beta, threshold),
    ),
    "sigmoid": Rule(
        lambda z, i: z.sigmoid_() if i else torch.sigmoid(z), lambda g, z, y: _aten.sigmoid_backward(g, y), True
    ),
    "tanh": Rule(lambda z, i: z.tanh_() if i else torch.tanh(z), lambda g, z, y: _aten.tanh_backward(g, y), True),
}


def run(
    kind: str, settings: tuple[Any, ...], z: Tensor, inplace: bool, derivative: bool
) -> tuple[Tensor, Tensor | None]:
    """y = f(z), and f'(z) of y's shape where it is wanted. ``inplace``: z may be overwritten.

    ``kind`` is a key of ``RULES`` or "dropout", whose derivative is the noise that it multiplies with.
    """
    if kind == "dropout":
        (p,) = settings
        factor = noise(torch.empty_like(z), p)
        return (z.mul_(factor) if inplace else z * factor), factor if derivative else None
    rule = RULES[kind]
    if not derivative:
        return rule.apply(z, inplace, *settings), None
    if rule.from_result:
        y = rule.apply(z, inplace, *settings)
        return y, rule.derivative(_ones(y), y, y, *settings)
    slope = rule.derivative(_ones(z), z, z, *settings)
    return rule.apply(z, inplace, *settings), slope


def noise(t: Tensor, p: float) -> Tensor:
    """Fill ``t`` with what dropout multiplies by, drawn as torch does on the CPU: a seed gives the same noise."""
    t.bernoulli_(1 - p)
    return t.div_(1 - p) if p < 1 else t


def _ones(like: Tensor) -> Tensor:
    """A gradient of ones that takes the memory of one."""
    return torch.ones((), dtype=like.dtype, device=like.device).expand_as(like)

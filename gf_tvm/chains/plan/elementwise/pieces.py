"""Functions of pieces: lines, powers and what else needs no exp."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .record import Algebra, Arguments, Code, Function, Settings, called, computed

_aten = torch.ops.aten


def _always(*_: Any) -> bool:
    return True


def _hardtanh_value(v: Algebra, z: Any, low: float, high: float) -> Any:
    return v.select(v.less(z, v.number(low)), v.number(low), v.select(v.greater(z, v.number(high)), v.number(high), z))


def _between(v: Algebra, z: Any, low: float, high: float, inside: float = 1.0) -> Any:
    upper = v.select(v.less(z, v.number(high)), v.number(inside), v.number(0))
    return v.select(v.greater(z, v.number(low)), upper, v.number(0))


def _sixth(v: Algebra, z: Any) -> Any:
    """z + 3, clamped to 0 and 6, over 6."""
    shifted = v.kept(z + v.number(3))
    upper = v.select(v.greater(shifted, v.number(6)), v.number(6), shifted)
    return v.kept(v.select(v.less(shifted, v.number(0)), v.number(0), upper)) * v.number(1 / 6)


def _hardswish_slope(v: Algebra, z: Any) -> Any:
    middle = z * v.number(1 / 3) + v.number(0.5)
    upper = v.select(v.greater_equal(z, v.number(3)), v.number(1), middle)
    return v.select(v.less_equal(z, v.number(-3)), v.number(0), upper)


def _relu6(a: Arguments) -> Settings | None:
    """What PyTorch takes relu6 apart into."""
    return () if (a["min_val"], a["max_val"]) == (0, 6) else None


def _limits(a: Arguments) -> Settings | None:
    low, high = a["min_val"], a["max_val"]
    return (low, high) if low <= high else None


def _without_noise(a: Arguments) -> Settings | None:
    lower, upper = a["lower"], a["upper"]
    return None if a["training"] or lower > upper else ((lower + upper) / 2,)


def _clamp_value(v: Algebra, z: Any, low: float | None, high: float | None) -> Any:
    y = z if low is None else v.kept(v.select(v.less(z, v.number(low)), v.number(low), z))
    return y if high is None else v.select(v.greater(y, v.number(high)), v.number(high), y)


def _clamp_slope(v: Algebra, z: Any, low: float | None, high: float | None) -> Any:
    inside = v.number(1)
    if high is not None:
        inside = v.select(v.less_equal(z, v.number(high)), inside, v.number(0))
    return inside if low is None else v.select(v.greater_equal(z, v.number(low)), inside, v.number(0))


def _clamp_derivative(g: Tensor, z: Tensor, low: float | None, high: float | None) -> Tensor:
    inside = torch.ones_like(z, dtype=torch.bool)
    if low is not None:
        inside = inside & (z >= low)
    if high is not None:
        inside = inside & (z <= high)
    return torch.where(inside, g, 0)


def _bounds(a: Arguments) -> Settings | None:
    return None if a["min"] is a["max"] is None else (a["min"], a["max"])


def _size(v: Algebra, z: Any) -> Any:
    return v.select(v.less(z, v.number(0)), v.number(0) - z, z)


def _outside(v: Algebra, z: Any, limit: float, outside: Any, inside: Any) -> Any:
    """By whether z is beyond -limit and limit."""
    upper = v.select(v.less_equal(z, v.number(limit)), inside, outside)
    return v.select(v.greater_equal(z, v.number(-limit)), upper, outside)


def _shrink_slope(v: Algebra, z: Any, limit: float) -> Any:
    return _outside(v, z, limit, v.number(1), v.number(0))


def _softshrink_value(v: Algebra, z: Any, limit: float) -> Any:
    lower = v.select(v.greater_equal(z, v.number(-limit)), v.number(0), z + v.number(limit))
    return v.select(v.less_equal(z, v.number(limit)), lower, z - v.number(limit))


def _sign(v: Algebra, z: Any) -> Any:
    lower = v.select(v.less(z, v.number(0)), v.number(-1), v.number(0))
    return v.select(v.greater(z, v.number(0)), v.number(1), lower)


def _softsign_value(v: Algebra, z: Any) -> Any:
    return z / (_size(v, z) + v.number(1))


def _softsign_slope(v: Algebra, z: Any) -> Any:
    size = v.kept(_size(v, z))
    divisor = v.kept(size + v.number(1))
    return (v.number(1) - size / divisor) / divisor


def _softsign_derivative(g: Tensor, z: Tensor) -> Tensor:
    divisor = z.abs() + 1
    return g / divisor - g * (z / divisor / divisor) * z.sgn()


def _power_derivative(g: Tensor, z: Tensor, exponent: float) -> Tensor:
    return torch.zeros_like(z) if exponent == 0 else g * (exponent * z.pow(exponent - 1))


def _power(a: Arguments) -> Settings | None:
    return (a["exponent"],)


def _two(a: Arguments) -> Settings | None:
    return () if a["exponent"] == 2 else None


FUNCTIONS = (
    Function(
        "relu",
        operators=called("relu"),
        apply=lambda z, i: F.relu(z, inplace=i),
        derivative=lambda g, z: _aten.threshold_backward(g, z, 0),
        same_from_result=_always,
        code=Code(
            lambda v, z: v.select(v.less_equal(z, v.number(0)), v.number(0), z),
            lambda v, z: v.select(v.less_equal(z, v.number(0)), v.number(0), v.number(1)),
        ),
    ),
    Function(
        "relu6",
        operators=called("relu6") | computed("hardtanh", _relu6),
        apply=lambda z, i: F.relu6(z, inplace=i),
        derivative=lambda g, z: _aten.hardtanh_backward(g, z, 0.0, 6.0),
        same_from_result=_always,
        code=Code(lambda v, z: _hardtanh_value(v, z, 0.0, 6.0), lambda v, z: _between(v, z, 0.0, 6.0)),
    ),
    Function(
        "hardtanh",
        operators=computed("hardtanh", _limits),
        apply=lambda z, i, low, high: F.hardtanh(z, low, high, inplace=i),
        derivative=_aten.hardtanh_backward,
        same_from_result=_always,
        code=Code(_hardtanh_value, _between),
    ),
    Function(
        "leaky_relu",
        operators=called("leaky_relu", "negative_slope") | computed("rrelu", _without_noise),
        apply=lambda z, i, slope: F.leaky_relu(z, slope, inplace=i),
        derivative=lambda g, z, slope: _aten.leaky_relu_backward(g, z, slope, False),
        same_from_result=lambda slope: bool(slope >= 0),
        code=Code(
            lambda v, z, slope: v.select(v.greater(z, v.number(0)), z, z * v.number(slope)),
            lambda v, z, slope: v.select(v.greater(z, v.number(0)), v.number(1), v.number(slope)),
        ),
    ),
    Function(
        "hardswish",
        operators=called("hardswish"),
        apply=lambda z, i: F.hardswish(z, inplace=i),
        derivative=_aten.hardswish_backward,
        code=Code(lambda v, z: z * _sixth(v, z), _hardswish_slope),
    ),
    Function(
        "hardsigmoid",
        operators=called("hardsigmoid"),
        apply=lambda z, i: F.hardsigmoid(z, inplace=i),
        derivative=_aten.hardsigmoid_backward,
        code=Code(_sixth, lambda v, z: _between(v, z, -3.0, 3.0, 1 / 6)),
    ),
    Function(
        "threshold",
        operators=called("threshold", "threshold", "value"),
        apply=lambda z, i, threshold, value: F.threshold(z, threshold, value, inplace=i),
        derivative=lambda g, z, threshold, value: _aten.threshold_backward(g, z, threshold),
        same_from_result=lambda threshold, value: bool(value <= threshold),
        code=Code(
            lambda v, z, threshold, value: v.select(v.less_equal(z, v.number(threshold)), v.number(value), z),
            lambda v, z, threshold, value: v.select(v.less_equal(z, v.number(threshold)), v.number(0), v.number(1)),
        ),
    ),
    # Unlike relu and hardtanh, the edges are inside.
    Function(
        "clamp",
        operators={
            **computed("clamp", _bounds),
            **computed("clip", _bounds),
            **computed("clamp_min", lambda a: (a["min"], None)),
            **computed("clamp_max", lambda a: (None, a["max"])),
        },
        apply=lambda z, i, low, high: z.clamp_(low, high) if i else z.clamp(low, high),
        derivative=_clamp_derivative,
        code=Code(_clamp_value, _clamp_slope),
    ),
    Function(
        "hardshrink",
        operators=called("hardshrink", "lambd"),
        apply=lambda z, i, limit: F.hardshrink(z, limit),
        derivative=_aten.hardshrink_backward,
        same_from_result=_always,
        code=Code(lambda v, z, limit: _outside(v, z, limit, z, v.number(0)), _shrink_slope),
    ),
    Function(
        "softshrink",
        operators=called("softshrink", "lambd"),
        apply=lambda z, i, limit: F.softshrink(z, limit),
        derivative=_aten.softshrink_backward,
        code=Code(_softshrink_value, _shrink_slope),
    ),
    Function(
        "softsign",
        operators={},
        apply=lambda z, i: F.softsign(z),
        derivative=_softsign_derivative,
        code=Code(_softsign_value, _softsign_slope),
        composed=F.softsign,
    ),
    Function(
        "abs",
        operators=called("abs") | called("absolute"),
        apply=lambda z, i: z.abs_() if i else z.abs(),
        derivative=lambda g, z: g * z.sgn(),
        code=Code(_size, _sign),
    ),
    Function(
        "square",
        operators=called("square") | computed("pow", _two, "Tensor_Scalar", "Scalar"),
        apply=lambda z, i: z.square_() if i else z.square(),
        derivative=lambda g, z: g * (2 * z),
        code=Code(lambda v, z: z * z, lambda v, z: z + z),
        bounded=False,
    ),
    Function(
        "pow",
        operators=computed("pow", _power, "Tensor_Scalar", "Scalar"),
        apply=lambda z, i, exponent: z.pow_(exponent) if i else z.pow(exponent),
        derivative=_power_derivative,
        bounded=False,
    ),
    Function(
        "sqrt",
        operators=called("sqrt"),
        apply=lambda z, i: z.sqrt_() if i else z.sqrt(),
        derivative=lambda g, y: g / (2 * y),
        of_result=True,
        code=Code(lambda v, z: v.sqrt(z), lambda v, y: v.number(1) / (y + y)),
        bounded=False,
    ),
)

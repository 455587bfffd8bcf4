"""Element-wise functions and their derivatives on vectors, as PyTorch computes them: of NaN, and on edges of pieces.

Both are written out of the same expressions, of which LLVM keeps one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tvm import tirx

from ..kernels.cpu import simd, smooth


def function(kind: str, settings: Sequence[Any], z: Any) -> Any:
    """f(z); ``kind`` is one of :data:`.segment.COVERED`, ``settings`` as in :data:`.elementwise.RULES`."""
    number = simd.numbers(z)
    if kind == "relu":
        return tirx.Select(tirx.LE(z, number(0)), number(0), z)
    if kind in ("relu6", "hardtanh"):
        low, high = _limits(kind, settings)
        return tirx.Select(tirx.LT(z, number(low)), number(low), tirx.Select(tirx.GT(z, number(high)), number(high), z))
    if kind == "leaky_relu":
        return tirx.Select(tirx.GT(z, number(0)), z, z * number(settings[0]))
    if kind == "elu":
        (alpha,) = settings
        return tirx.Select(tirx.GT(z, number(0)), z, (smooth.exp(z) - number(1)) * number(alpha))
    if kind == "sigmoid":
        return _sigmoid(z)
    if kind == "tanh":
        return smooth.tanh(z)
    if kind == "silu":
        return z * _sigmoid(z)
    if kind == "mish":
        return z * _mish_gate(z)[0]
    if kind == "gelu":
        return z * _gelu_gate(settings, z)[0]
    shifted = smooth.kept(z + number(3))
    upper = tirx.Select(tirx.GT(shifted, number(6)), number(6), shifted)
    clamped = smooth.kept(tirx.Select(tirx.LT(shifted, number(0)), number(0), upper))
    sixth = clamped * number(1 / 6)
    return {"hardsigmoid": sixth, "hardswish": z * sixth}[kind]


def slope(kind: str, settings: Sequence[Any], z: Any) -> Any:
    """f'(z)."""
    number = simd.numbers(z)

    def between(low: float, high: float, inside: float) -> Any:
        upper = tirx.Select(tirx.LT(z, number(high)), number(inside), number(0))
        return tirx.Select(tirx.GT(z, number(low)), upper, number(0))

    if kind == "relu":
        return tirx.Select(tirx.LE(z, number(0)), number(0), number(1))
    if kind in ("relu6", "hardtanh"):
        return between(*_limits(kind, settings), 1.0)
    if kind == "leaky_relu":
        return tirx.Select(tirx.GT(z, number(0)), number(1), number(settings[0]))
    if kind == "elu":
        (alpha,) = settings
        return tirx.Select(tirx.GT(z, number(0)), number(1), smooth.exp(z) * number(alpha))
    if kind in ("sigmoid", "tanh"):
        return slope_of_result(kind, settings, smooth.kept(function(kind, settings, z)))
    if kind == "silu":
        gate = _sigmoid(z)
        return gate + z * (gate * (number(1) - gate))
    if kind in ("mish", "gelu"):
        gate, its_slope = _mish_gate(z) if kind == "mish" else _gelu_gate(settings, z)
        return gate + z * its_slope
    if kind == "hardsigmoid":
        return between(-3.0, 3.0, 1 / 6)
    assert kind == "hardswish"
    middle = z * number(1 / 3) + number(0.5)
    upper = tirx.Select(tirx.GE(z, number(3)), number(1), middle)
    return tirx.Select(tirx.LE(z, number(-3)), number(0), upper)


def slope_of_result(kind: str, settings: Sequence[Any], y: Any) -> Any:
    """f'(z) from y = f(z), for functions of :func:`.segmenter.is_result_enough`."""
    number = simd.numbers(y)
    if kind == "sigmoid":
        return y * (number(1) - y)
    if kind == "tanh":
        return number(1) - y * y
    return slope(kind, settings, y)


def _limits(kind: str, settings: Sequence[Any]) -> tuple[float, float]:
    low, high = {"relu6": (0.0, 6.0), "hardtanh": settings}[kind]
    return float(low), float(high)


def _sigmoid(z: Any) -> Any:
    number = simd.numbers(z)
    return smooth.kept(number(1) / (number(1) + smooth.exp(number(0) - z)))


def _mish_gate(z: Any) -> tuple[Any, Any]:
    """tanh(log(1 + e^z)), and its derivative."""
    number = simd.numbers(z)
    # At 20 it is 1 in float32, and the squares of larger ones overflow.
    power = smooth.kept(smooth.exp(tirx.Select(tirx.GT(z, number(20)), number(20), z)))
    product = smooth.kept(power * (power + number(2)))
    gate = smooth.kept(product / (product + number(2)))
    return gate, (number(1) - gate * gate) * (power / (number(1) + power))


def _gelu_gate(settings: Sequence[Any], z: Any) -> tuple[Any, Any]:
    """What GELU multiplies z with, and its derivative."""
    number = simd.numbers(z)
    square = smooth.kept(z * z)
    if settings == ("none",):
        gate = smooth.kept(number(0.5) + number(0.5) * smooth.erf(z * number(math.sqrt(0.5))))
        return gate, number(1 / math.sqrt(2 * math.pi)) * smooth.exp(square * number(-0.5))
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    inner = smooth.tanh(z * (number(scale) + square * number(scale * cubic)))
    outer = (number(1) - inner * inner) * (number(scale) + square * number(3 * scale * cubic))
    return smooth.kept(number(0.5) + number(0.5) * inner), number(0.5) * outer

"""Functions made of exp, log, tanh and erf."""

from __future__ import annotations

import math
from ctypes import c_float
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .record import Algebra, Arguments, Code, Function, Settings, called, computed

_aten = torch.ops.aten

#: Those of Klambauer et al., "Self-Normalizing Neural Networks".
_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946


def _times(v: Algebra, x: Any, factor: float) -> Any:
    return x if factor == 1 else x * v.number(factor)


def _elu_value(v: Algebra, z: Any, alpha: float, scale: float = 1.0, input_scale: float = 1.0) -> Any:
    lower = (v.exp(_times(v, z, input_scale)) - v.number(1)) * v.number(alpha * scale)
    return v.select(v.greater(z, v.number(0)), _times(v, z, scale), lower)


def _elu_slope(v: Algebra, z: Any, alpha: float, scale: float = 1.0, input_scale: float = 1.0) -> Any:
    lower = v.exp(_times(v, z, input_scale)) * v.number(alpha * scale * input_scale)
    return v.select(v.greater(z, v.number(0)), v.number(scale), lower)


def _elu(a: Arguments) -> Settings | None:
    return (a["alpha"],) if a["scale"] == a["input_scale"] == 1 else None


def _selu(a: Arguments) -> Settings | None:
    """What PyTorch takes selu apart into."""
    return () if (a["alpha"], a["scale"], a["input_scale"]) == (_SELU_ALPHA, _SELU_SCALE, 1) else None


def _celu(a: Arguments) -> Settings | None:
    """Nothing bounds the slope for alpha < 0, and below the least float32 there is no 1 / alpha."""
    return (a["alpha"],) if a["alpha"] >= 2.0**-126 else None


def _celu_derivative(g: Tensor, z: Tensor, alpha: float) -> Tensor:
    # PyTorch's derivative, unlike the function, rounds alpha to float32 whatever the tensor is.
    return _aten.elu_backward(g, alpha, 1.0, 1.0 / c_float(alpha).value, False, z)  # type: ignore[no-any-return]


def _sigmoid(v: Algebra, z: Any) -> Any:
    return v.kept(v.number(1) / (v.number(1) + v.exp(v.number(0) - z)))


def _silu_slope(v: Algebra, z: Any) -> Any:
    gate = _sigmoid(v, z)
    return gate + z * (gate * (v.number(1) - gate))


def _mish_gate(v: Algebra, z: Any) -> tuple[Any, Any]:
    """tanh(log(1 + e^z)), and its derivative."""
    # At 20 it is 1 in float32, and the squares of larger ones overflow.
    power = v.kept(v.exp(v.select(v.greater(z, v.number(20)), v.number(20), z)))
    product = v.kept(power * (power + v.number(2)))
    gate = v.kept(product / (product + v.number(2)))
    return gate, (v.number(1) - gate * gate) * (power / (v.number(1) + power))


def _mish_slope(v: Algebra, z: Any) -> Any:
    gate, its_slope = _mish_gate(v, z)
    return gate + z * its_slope


def _gelu_gate(v: Algebra, z: Any, how: str) -> tuple[Any, Any]:
    """What GELU multiplies z with, and its derivative."""
    square = v.kept(z * z)
    if how == "none":
        gate = v.kept(v.number(0.5) + v.number(0.5) * v.erf(z * v.number(math.sqrt(0.5))))
        return gate, v.number(1 / math.sqrt(2 * math.pi)) * v.exp(square * v.number(-0.5))
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    inner = v.tanh(z * (v.number(scale) + square * v.number(scale * cubic)))
    outer = (v.number(1) - inner * inner) * (v.number(scale) + square * v.number(3 * scale * cubic))
    return v.kept(v.number(0.5) + v.number(0.5) * inner), v.number(0.5) * outer


def _gelu_slope(v: Algebra, z: Any, how: str) -> Any:
    gate, its_slope = _gelu_gate(v, z, how)
    return gate + z * its_slope


def _exp(v: Algebra, z: Any) -> Any:
    # Of half as much, so that the result goes to infinity and zero where float32 does.
    root = v.kept(v.exp(z * v.number(0.5)))
    return root * root


def _squared_tanh(v: Algebra, z: Any) -> Any:
    t = v.kept(v.tanh(z))
    return t * t


def _log_sigmoid_derivative(g: Tensor, z: Tensor) -> Tensor:
    _, buffer = _aten.log_sigmoid_forward(z)
    return _aten.log_sigmoid_backward(g, z, buffer)  # type: ignore[no-any-return]


FUNCTIONS = (
    Function(
        "elu",
        operators=computed("elu", _elu),
        apply=lambda z, i, alpha: F.elu(z, alpha, inplace=i),
        derivative=lambda g, z, alpha: _aten.elu_backward(g, alpha, 1.0, 1.0, False, z),
        code=Code(_elu_value, _elu_slope),
    ),
    Function(
        "selu",
        operators=called("selu") | computed("elu", _selu),
        apply=lambda z, i: F.selu(z, inplace=i),
        derivative=lambda g, z: _aten.elu_backward(g, _SELU_ALPHA, _SELU_SCALE, 1.0, False, z),
        code=Code(
            lambda v, z: _elu_value(v, z, _SELU_ALPHA, _SELU_SCALE),
            lambda v, z: _elu_slope(v, z, _SELU_ALPHA, _SELU_SCALE),
        ),
    ),
    Function(
        "celu",
        operators=computed("celu", _celu),
        apply=lambda z, i, alpha: F.celu(z, alpha, inplace=i),
        derivative=_celu_derivative,
        code=Code(
            lambda v, z, alpha: _elu_value(v, z, alpha, 1.0, 1 / alpha),
            lambda v, z, alpha: _elu_slope(v, z, alpha, 1.0, 1 / alpha),
        ),
    ),
    Function(
        "sigmoid",
        operators=called("sigmoid"),
        apply=lambda z, i: z.sigmoid_() if i else torch.sigmoid(z),
        derivative=_aten.sigmoid_backward,
        of_result=True,
        code=Code(_sigmoid, lambda v, y: y * (v.number(1) - y)),
    ),
    Function(
        "tanh",
        operators=called("tanh"),
        apply=lambda z, i: z.tanh_() if i else torch.tanh(z),
        derivative=_aten.tanh_backward,
        of_result=True,
        code=Code(lambda v, z: v.tanh(z), lambda v, y: v.number(1) - y * y),
    ),
    Function(
        "silu",
        operators=called("silu"),
        apply=lambda z, i: F.silu(z, inplace=i),
        derivative=_aten.silu_backward,
        code=Code(lambda v, z: z * _sigmoid(v, z), _silu_slope),
    ),
    Function(
        "mish",
        operators=called("mish"),
        apply=lambda z, i: F.mish(z, inplace=i),
        derivative=_aten.mish_backward,
        code=Code(lambda v, z: z * _mish_gate(v, z)[0], _mish_slope),
    ),
    Function(
        "gelu",
        operators=called("gelu", "approximate"),
        apply=lambda z, i, how: F.gelu(z, approximate=how),
        derivative=lambda g, z, how: _aten.gelu_backward(g, z, approximate=how),
        code=Code(lambda v, z, how: z * _gelu_gate(v, z, how)[0], _gelu_slope),
    ),
    Function(
        "softplus",
        operators=called("softplus", "beta", "threshold"),
        apply=lambda z, i, beta, threshold: F.softplus(z, beta, threshold),
        derivative=_aten.softplus_backward,
    ),
    Function(
        "log_sigmoid",
        operators=called("log_sigmoid"),
        apply=lambda z, i: F.logsigmoid(z),
        derivative=_log_sigmoid_derivative,
    ),
    Function(
        "tanhshrink",
        operators={},
        apply=lambda z, i: F.tanhshrink(z),
        derivative=lambda g, z: g - _aten.tanh_backward(g, z.tanh()),
        code=Code(lambda v, z: z - v.tanh(z), _squared_tanh),
        composed=F.tanhshrink,
    ),
    Function(
        "exp",
        operators=called("exp"),
        apply=lambda z, i: z.exp_() if i else z.exp(),
        derivative=lambda g, y: g * y,
        of_result=True,
        code=Code(_exp, lambda v, y: y),
        bounded=False,
    ),
    Function(
        "log",
        operators=called("log"),
        apply=lambda z, i: z.log_() if i else z.log(),
        derivative=lambda g, z: g / z,
        bounded=False,
    ),
)

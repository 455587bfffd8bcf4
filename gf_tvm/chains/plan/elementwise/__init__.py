"""Element-wise functions: what they compute, and their derivatives, which the forward pass averages over patches.

All that chains know of a function is its :class:`Function` in ``FUNCTIONS``. How it is compiled is written there over
an :class:`Algebra`, without TVM: chains also run on boards that have no compiler.

* ``record``: what is to be known
* ``pieces``, ``smooth``: the functions
* ``composed``: those that PyTorch has no operator of
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from . import composed, pieces, smooth
from .record import Algebra, Arguments, Code, Function, Settings, called, computed

__all__ = [
    "FUNCTIONS", "Algebra", "Arguments", "Code", "Function", "Settings", "called", "computed", "is_bounded",
    "is_compiled", "is_result_enough", "noise", "recognised", "recognised_at", "run",
]  # fmt: skip

#: By name.
FUNCTIONS: dict[str, Function] = {function.name: function for function in (*pieces.FUNCTIONS, *smooth.FUNCTIONS)}


def recognised(operator: Any, arguments: Arguments) -> tuple[str, Settings] | None:
    """(name, settings) of the function that a call of an ATen operator on a map is, or None.

    Args:
        operator: an overload, ``torch.ops.aten.relu.default``.
        arguments: all of the call's by their names in ``operator._schema``, defaults filled in. The map is "self". A
            function has constant settings: where another argument is no number, word or None, it is none.
    """
    for name, function in FUNCTIONS.items():
        settings = function.recognised(operator, arguments)
        if settings is not None:
            return name, settings
    return None


def recognised_at(node: fx.Node) -> tuple[str, fx.Node] | None:
    """(name, z) of a function without settings that PyTorch makes of several operators, or None.

    ``node``: the step of a graph of ATen operators whose result is f(z). The steps between z and it are part of the
    function; where nothing else reads them, they need not run.
    """
    for name, function in FUNCTIONS.items():
        z = None if function.composed is None else composed.argument_of(node, function.composed)
        if z is not None:
            return name, z
    return None


def is_compiled(kind: str) -> bool:
    """Whether segments compute it; the others, and dropout, end a segment."""
    return kind in FUNCTIONS and FUNCTIONS[kind].code is not None


def is_result_enough(kind: str, settings: Settings) -> bool:
    """Whether f'(z) follows from f(z)."""
    return kind in FUNCTIONS and FUNCTIONS[kind].is_result_enough(settings)


def is_bounded(kind: str) -> bool:
    """Whether something bounds the derivative, as it does that of dropout, the noise."""
    return kind == "dropout" or FUNCTIONS[kind].bounded


def run(
    kind: str, settings: tuple[Any, ...], z: Tensor, inplace: bool, derivative: bool
) -> tuple[Tensor, Tensor | None]:
    """y = f(z), and f'(z) of y's shape where it is wanted. ``inplace``: z may be overwritten.

    ``kind`` is a key of ``FUNCTIONS`` or "dropout", whose derivative is the noise that it multiplies with.
    """
    if kind == "dropout":
        (p,) = settings
        factor = noise(torch.empty_like(z), p)
        return (z.mul_(factor) if inplace else z * factor), factor if derivative else None
    function = FUNCTIONS[kind]
    if not derivative:
        return function.apply(z, inplace, *settings), None
    if function.of_result:
        y = function.apply(z, inplace, *settings)
        return y, function.derivative(_ones(y), y, *settings)
    slope = function.derivative(_ones(z), z, *settings)
    return function.apply(z, inplace, *settings), slope


def noise(t: Tensor, p: float) -> Tensor:
    """Fill ``t`` with what dropout multiplies by, drawn as torch does on the CPU: a seed gives the same noise."""
    t.bernoulli_(1 - p)
    return t.div_(1 - p) if p < 1 else t


def _ones(like: Tensor) -> Tensor:
    """A gradient of ones that takes the memory of one."""
    return torch.ones((), dtype=like.dtype, device=like.device).expand_as(like)

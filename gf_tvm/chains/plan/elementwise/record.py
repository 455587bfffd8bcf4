"""What is to be known of an element-wise function: the one place where chains look."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

#: A call's arguments by their names in the operator's schema, defaults filled in.
Arguments = Mapping[str, Any]
#: A function's settings, which are plain numbers and words: keys of programs are made of them.
Settings = tuple[Any, ...]


class Algebra(Protocol):
    """Vectors that an expression can be written over; they also know +, -, * and /, with each other.

    :class:`..emit_functions.Vectors` is that of float32 lanes in TVM's IR. Comparisons with NaN are false.
    """

    def number(self, value: float) -> Any:
        """A number in every lane."""

    def select(self, condition: Any, yes: Any, no: Any) -> Any:
        """``yes`` where a comparison holds, else ``no``, lane by lane. Both may be computed everywhere."""

    def less(self, a: Any, b: Any) -> Any:
        """a < b"""

    def less_equal(self, a: Any, b: Any) -> Any:
        """a <= b"""

    def greater(self, a: Any, b: Any) -> Any:
        """a > b"""

    def greater_equal(self, a: Any, b: Any) -> Any:
        """a >= b"""

    def exp(self, x: Any) -> Any:
        """e^x; beyond -87 and 88 it need not grow or shrink any more."""

    def tanh(self, x: Any) -> Any:
        """The hyperbolic tangent."""

    def erf(self, x: Any) -> Any:
        """The error function."""

    def sqrt(self, x: Any) -> Any:
        """The square root, NaN of negative numbers."""

    def kept(self, value: Any) -> Any:
        """``value`` itself, computed once however often the result is used."""


@dataclass(frozen=True)
class Code:
    """How forward segments compute a function: expressions over an :class:`Algebra`.

    Attributes:
        value: (algebra, z, *settings) -> f(z).
        slope: (algebra, z, *settings) -> f'(z); where the record is ``of_result``, of y = f(z) instead of z.
    """

    value: Callable[..., Any]
    slope: Callable[..., Any]


def _never(*_: Any) -> bool:
    return False


@dataclass(frozen=True)
class Function:
    """One element-wise function. On NaN, infinities and edges of pieces all of it does as PyTorch does.

    Attributes:
        name: the kind of a :class:`..graph.Map` and of a segment's node. Keys of programs contain it.
        operators: the ATen operators that it is, each with a function from a call's arguments to the settings, or to
            None where the call is something else. The map is the argument "self". Operators may stand in several
            records; the first one that gives settings counts.
        apply: (z, in place, *settings) -> y. Only asked to work in place where nobody reads z any more.
        derivative: (gradient, z, *settings) -> gradient times f'(z), by PyTorch's own backward operator, or where it
            has none by the formula of its autograd. Where ``of_result``, it takes y, not z.
        of_result: ``derivative`` and ``code.slope`` take y = f(z).
        same_from_result: (*settings) -> whether ``derivative`` and ``code.slope``, given f(z) in the place of z, give
            f'(z) all the same. For float32 and wider; settings need not be exact in less.
        code: how it is compiled; None: segments end there.
        bounded: whether f' is bounded, so that its means may be kept in 16 bits.
        composed: for functions that PyTorch makes of several operators: z -> f(z), which is traced for them.
    """

    name: str
    operators: Mapping[Any, Callable[[Arguments], Settings | None]]
    apply: Callable[..., Tensor]
    derivative: Callable[..., Tensor]
    of_result: bool = False
    same_from_result: Callable[..., bool] = _never
    code: Code | None = None
    bounded: bool = True
    composed: Callable[[Tensor], Tensor] | None = None

    def is_result_enough(self, settings: Settings) -> bool:
        """Whether f'(z) follows from f(z)."""
        return self.of_result or self.same_from_result(*settings)

    def value(self, algebra: Algebra, z: Any, settings: Settings) -> Any:
        """The expression for f(z). It must have ``code``."""
        assert self.code is not None
        return self.code.value(algebra, z, *settings)

    def slope(self, algebra: Algebra, z: Any, settings: Settings) -> Any:
        """The expression for f'(z). It must have ``code``."""
        assert self.code is not None
        given = algebra.kept(self.code.value(algebra, z, *settings)) if self.of_result else z
        return self.code.slope(algebra, given, *settings)

    def slope_of_result(self, algebra: Algebra, y: Any, settings: Settings) -> Any:
        """The expression for f'(z), from y = f(z), where :meth:`is_result_enough`. It must have ``code``."""
        assert self.code is not None
        return self.code.slope(algebra, y, *settings)

    def recognised(self, operator: Any, arguments: Arguments) -> Settings | None:
        """The settings with which it is this call, or None; ``arguments``: as :func:`..elementwise.recognised` says."""
        if operator not in self.operators or not all(_plain(a) for name, a in arguments.items() if name != "self"):
            return None
        settings = self.operators[operator](arguments)
        return None if settings is None or not all(_settled(s) for s in settings) else settings


def _plain(argument: Any) -> bool:
    return argument is None or isinstance(argument, bool | int | float | str)


def _settled(setting: Any) -> bool:
    """What NaN as a setting does is nobody's wish, and True is 1 only by chance."""
    return not isinstance(setting, bool) and not (isinstance(setting, float) and math.isnan(setting))


def called(name: str, *arguments: str, overload: str = "default") -> dict[Any, Callable[[Arguments], Settings | None]]:
    """Entries of ``operators``: ``torch.ops.aten.<name>``, and its form in place if there is one.

    ``arguments``: the settings by their names in the schema.
    """
    return computed(name, lambda given: tuple(given[argument] for argument in arguments), overload)


def computed(
    name: str, settings: Callable[[Arguments], Settings | None], overload: str = "default", in_place: str = ""
) -> dict[Any, Callable[[Arguments], Settings | None]]:
    """As :func:`called`, with settings that are computed. ``in_place``: that form's overload, where it differs."""
    found = {getattr(getattr(torch.ops.aten, name), overload): settings}
    if hasattr(torch.ops.aten, f"{name}_"):
        found[getattr(getattr(torch.ops.aten, f"{name}_"), in_place or overload)] = settings
    return found

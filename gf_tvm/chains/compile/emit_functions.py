"""Element-wise functions and their derivatives on vectors, as PyTorch computes them: of NaN, and on edges of pieces.

What is computed stands in :mod:`.elementwise`. Both are written out of the same expressions, of which LLVM keeps one.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from ...kernels.cpu import simd, smooth
from ..plan.elementwise import FUNCTIONS, Settings


class Vectors:
    """The :class:`.elementwise.Algebra` of float32 vectors in TVM's IR; ``like``: one of them."""

    def __init__(self, like: Any) -> None:
        self.number = simd.numbers(like)

    select = staticmethod(tirx.Select)
    exp = staticmethod(smooth.exp)
    tanh = staticmethod(smooth.tanh)
    erf = staticmethod(smooth.erf)
    kept = staticmethod(smooth.kept)
    sqrt = staticmethod(tirx.sqrt)

    def less(self, a: Any, b: Any) -> Any:
        """a < b"""
        return tirx.LT(a, b)

    def less_equal(self, a: Any, b: Any) -> Any:
        """a <= b"""
        return tirx.LE(a, b)

    def greater(self, a: Any, b: Any) -> Any:
        """a > b"""
        return tirx.GT(a, b)

    def greater_equal(self, a: Any, b: Any) -> Any:
        """a >= b"""
        return tirx.GE(a, b)


def function(kind: str, settings: Settings, z: Any) -> Any:
    """f(z); ``kind`` is one that ``plan.elementwise.is_compiled``."""
    return FUNCTIONS[kind].value(Vectors(z), z, settings)


def slope(kind: str, settings: Settings, z: Any) -> Any:
    """f'(z)."""
    return FUNCTIONS[kind].slope(Vectors(z), z, settings)


def slope_of_result(kind: str, settings: Settings, y: Any) -> Any:
    """f'(z) from y = f(z), for functions of ``plan.elementwise.is_result_enough``."""
    return FUNCTIONS[kind].slope_of_result(Vectors(y), y, settings)

"""Fetching what the next block reads while a block's products are computed.

A core that pools, multiplies and writes one after the other uses either its arithmetic or its memory. Lines of the next
block, asked for one at a time and evenly over all steps of the products, arrive meanwhile: on the machine of
docs/performance.md that hides most of what reading grad_y costs. Asking for many at once does not: a core has a dozen
places for lines that are under way, and loads of the products wait for the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from ..geometry import ceil_div
from . import simd


@dataclass(frozen=True)
class Region:
    """Memory that the next block reads: ``pieces`` of ``size`` neighbouring elements, ``stride`` elements apart.

    ``element_bytes`` is the size of one element.
    """

    buffer: Any
    pieces: int
    size: int
    stride: int
    element_bytes: int

    @property
    def in_line(self) -> int:
        """Elements in a cache line."""
        return simd.LINE // self.element_bytes

    @property
    def piece_lines(self) -> int:
        """Cache lines of one piece, counted from its first element."""
        return ceil_div(self.size, self.in_line)

    @property
    def lines(self) -> int:
        """Cache lines of all pieces."""
        return self.pieces * self.piece_lines


class Ahead:
    """One line every :attr:`pace` steps of the products of a block.

    Args:
        steps: of all products of a block.
        regions: what the next one reads, in this order.
    """

    def __init__(self, steps: int, regions: list[Region]) -> None:
        self._regions = regions
        self._lines = sum(region.lines for region in regions)
        self.pace = max(1, steps // self._lines)
        self._burst = ceil_div(self._lines * self.pace, steps)
        self._next = T.alloc_buffer((1,), "int32", scope="local")
        self._starts: list[Any] = []

    def begin(self, starts: list[Any], is_last: Any) -> None:
        """A block's products begin.

        Args:
            starts: where in their buffers the next block's regions begin.
            is_last: whether no block follows.
        """
        self._starts = [T.bind(start) for start in starts]
        none, all_ = tirx.IntImm("int32", 0), tirx.IntImm("int32", self._lines)
        T.buffer_store(self._next, tirx.Select(is_last, all_, none), [0])

    def fetch(self) -> None:
        """Ask for the next line or lines, if any are left; to be called every :attr:`pace` steps."""
        for _ in range(self._burst):
            line = T.bind(tirx.BufferLoad(self._next, [0]))
            with T.If(line < self._lines), T.Then():
                T.buffer_store(self._next, line + 1, [0])
                self._fetch(line, 0)

    def _fetch(self, line: Any, k: int) -> None:
        """``line``: counted from the beginning of region ``k``."""
        region = self._regions[k]
        if k + 1 == len(self._regions):
            self._ask(region, self._starts[k], line)
            return
        with T.If(line < region.lines):
            with T.Then():
                self._ask(region, self._starts[k], line)
            with T.Else():
                self._fetch(line - region.lines, k + 1)

    @staticmethod
    def _ask(region: Region, start: Any, line: Any) -> None:
        offset = line * region.in_line
        if region.pieces > 1:
            piece, rest = line // region.piece_lines, line % region.piece_lines
            offset = piece * region.stride + rest * region.in_line
        simd.prefetch(region.buffer, start + offset)

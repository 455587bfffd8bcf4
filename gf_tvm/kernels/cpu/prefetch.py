"""Fetching what a block reads while the products of the block before it are computed.

A core that pools, multiplies and writes one after the other uses either its arithmetic or its memory. Lines of the next
block's grad_y, asked for one at a time and evenly over the steps of the products, arrive meanwhile; between two groups
of tiles the channels that have arrived are pooled, so that only their means have to be kept, not the map. Asking for
many lines at once does not help: a core has a dozen places for lines that are under way, and loads of the products wait
for the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from ...core.geometry import ceil_div
from . import simd


@dataclass(frozen=True)
class PrefetchRange:
    """Memory to be fetched: ``channels``, each in ``pieces`` of ``size`` neighbouring elements.

    ``channel_stride`` and ``piece_stride`` are the distances of their beginnings, ``element_bytes`` is the size of one
    element.
    """

    buffer: Any
    channels: int
    pieces: int
    size: int
    channel_stride: int
    piece_stride: int
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
    def channel_lines(self) -> int:
        """Cache lines of one channel."""
        return self.pieces * self.piece_lines

    @property
    def lines(self) -> int:
        """Cache lines of all channels."""
        return self.channels * self.channel_lines

    def offset(self, line: Any) -> Any:
        """Where a line begins, in elements."""
        piece, rest = line // self.piece_lines, line % self.piece_lines
        offset = rest * self.in_line
        if self.channels > 1:
            offset += piece // self.pieces * self.channel_stride
        if self.pieces > 1:
            offset += piece % self.pieces * self.piece_stride
        return offset


class Ahead:
    """One line every :attr:`pace` steps of the products of a block.

    Args:
        steps: of all products of a block.
        cycles: of a step, roughly.
        spacing: cycles between two lines, at least; what does not get its turn is not fetched.
        now: what this block still needs, if anything: it comes first.
        then: what the next one reads.
    """

    def __init__(self, steps: int, cycles: float, spacing: int, now: PrefetchRange | None, then: PrefetchRange) -> None:
        self._now, self._then = now, then
        self._first = now.lines if now is not None else 0
        self.pace = max(1, steps // (self._first + then.lines), round(spacing / cycles))
        #: Channels of the next block that arrive during the products.
        self.most_channels = min(then.channels, (steps // self.pace - self._first) // then.channel_lines - 1)
        self._next = T.alloc_buffer((1,), "int32", scope="local")

    def begin(self, now: Any, then: Any, is_last: Any) -> None:
        """A block's products begin.

        Args:
            now, then: where in their buffers the ranges begin.
            is_last: whether no block follows.
        """
        self._starts = T.bind(now), T.bind(then)
        self._end = T.bind(tirx.Select(is_last, _int(self._first), _int(self._first + self._then.lines)))
        T.buffer_store(self._next, _int(0), [0])

    def fetch(self) -> None:
        """Ask for the next line, if any is left; to be called every :attr:`pace` steps."""
        line = T.bind(tirx.BufferLoad(self._next, [0]))
        with T.If(line < self._end), T.Then():
            T.buffer_store(self._next, line + 1, [0])
            if self._now is None:
                self._ask(self._then, self._starts[1], line)
                return
            with T.If(line < self._first):
                with T.Then():
                    self._ask(self._now, self._starts[0], line)
                with T.Else():
                    self._ask(self._then, self._starts[1], line - self._first)

    def arrived(self) -> Any:
        """Channels of the next block whose lines were asked for long enough ago; may be negative."""
        line = tirx.BufferLoad(self._next, [0])
        # One channel's time to arrive.
        return tirx.floordiv(line - self._first, self._then.channel_lines) - 1

    @staticmethod
    def _ask(memory: PrefetchRange, start: Any, line: Any) -> None:
        simd.prefetch(memory.buffer, start + memory.offset(line))


def _int(value: int) -> Any:
    return tirx.IntImm("int32", value)

"""Outer products that are added up in registers: the inner loops of the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tvm.script.ir_builder import tirx as T

from ..stages import ACC
from . import emit, simd
from .prefetch import Ahead
from .strips import power_of_two

#: Multiply-adds in one turn of the loop, at least, before it is unrolled.
_PRODUCTS_A_TURN = 16


class Accumulators:
    """A tile of sums that stays in registers: ``rows`` scalars times ``vectors`` registers, added up.

    Args:
        rows, vectors, lanes: of the tile.
        start: (row, register) -> what the sums begin with; None: zero.
    """

    def __init__(self, rows: int, vectors: int, lanes: int, start: Callable[[int, int], Any] | None = None) -> None:
        self.rows, self.vectors, self.lanes = rows, vectors, lanes
        self._sums = T.alloc_buffer((rows * vectors * lanes,), ACC, scope="local")
        for row in range(rows):
            for v in range(vectors):
                simd.store(self._sums, self._at(row, v), start(row, v) if start else simd.splat(0.0, lanes))

    def _at(self, row: int, v: int) -> int:
        return (row * self.vectors + v) * self.lanes

    def add(
        self,
        steps: int,
        scalars: Callable[[Any, int], Any],
        registers: Callable[[Any, int], Any],
        ahead: Ahead | None = None,
    ) -> None:
        """Add scalars(step, row) * registers(step, v) to every sum, for every step, and fetch ``ahead`` meanwhile."""

        def step(k: Any) -> None:
            loaded = [T.bind(registers(k, v)) for v in range(self.vectors)]
            for row in range(self.rows):
                scalar = simd.splat(scalars(k, row), self.lanes)
                for v in range(self.vectors):
                    old = simd.load(self._sums, self._at(row, v), self.lanes)
                    simd.store(self._sums, self._at(row, v), old + scalar * loaded[v])

        # Tiles of few sums get several steps in one turn of the loop, so that its own instructions do not count.
        times = power_of_two(max(1, _PRODUCTS_A_TURN // (self.rows * self.vectors)))
        whole, rest = divmod(steps, ahead.pace) if ahead is not None else (0, steps)
        if whole and ahead is not None:
            pace = ahead.pace
            with emit.loop(whole) as turn:
                ahead.fetch()
                emit.unrolled(pace, times, lambda k: step(turn * pace + k))
        if rest:
            emit.unrolled(rest, times, lambda k: step(steps - rest + k))

    def sums(self) -> Iterator[tuple[int, int, Any]]:
        """(row, register, sums), in order."""
        for row in range(self.rows):
            for v in range(self.vectors):
                yield row, v, simd.load(self._sums, self._at(row, v), self.lanes)

"""Both products of the backward pass by themselves, from g~ and to grad_x~: for chains, which stay on the patch grid.

The same sweep as :mod:`.sweep`, or the same sharing of channels as in :mod:`.dense`; but a block of g~ is copied into
the panels in place of being pooled, and grad_x~ is written as it is in place of being spread over pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...core.geometry import Geometry
from ...core.workload import Workload
from . import emit
from .dense import ByChannels
from .sweep import Sweep, Tiles


def products(workload: Workload, tiles: Tiles, lanes: int) -> Any:
    """IRModule of ``input_grad`` or ``weight_grad``; not for depthwise ones, nor for the former of dilated ones."""
    with emit.function() as module:
        emit_products(workload, tiles, lanes)
    return module()


def emit_products(workload: Workload, tiles: Tiles, lanes: int, tensors: dict[str, Any] | None = None) -> None:
    """The same inside of a function that does more; ``tensors``: see :meth:`Sweep.emit`."""
    (_GridByChannels if tiles.by_channels else _GridSweep)(workload, tiles, lanes).emit(tensors)


def emit_both(geometry: Geometry, tiles: Tiles, lanes: int, tensors: dict[str, Any]) -> None:
    """Both products of one g~, which is packed once; ``tensors`` are those of ``input_grad`` and ``weight_grad``."""
    emit_products(Workload("backward", geometry), tiles, lanes, tensors)


class _GridSweep(Sweep):
    def __init__(self, workload: Workload, tiles: Tiles, lanes: int) -> None:
        super().__init__(workload, tiles, lanes)
        self.needs_b = False  # grad_b is the sum of grad_y, which is not here

    def _fill_line(self, block: Any, o: Any, near: int) -> None:
        def copy(plane: Any, start: Any, at: Any, size: int) -> None:
            emit.copy(self.line, at, self.tensors["g"], (plane + o) * self.plane + start, size, self.lanes)

        self._each_image(block, self.geometry.co, copy)

    def _means(self, sums: Any, at: Any) -> Any:
        return sums

    def _spread(self, block: Any, first: Any, channels: int) -> None:
        with emit.loop(channels) as c:

            def copy(plane: Any, start: Any, at: Any, size: int) -> None:
                to = (plane + first + c) * self.plane + start
                emit.copy(self.tensors["grad_x_grid"], to, self.tile, c * self.padded + at, size, self.lanes)

            self._each_image(block, self.geometry.ci, copy)

    @property
    def plane(self) -> int:
        """Patches of an image."""
        return self.geometry.grid[0] * self.geometry.grid[1]

    def _each_image(self, block: Any, channels: int, visit: Callable[[Any, Any, Any, int], None]) -> None:
        """``visit(first plane, first patch in it, first patch in the block, patches)`` for every image of a block."""
        (ph, pw), rows = self.geometry.grid, self.tiles.rows
        if rows % ph == 0:
            with emit.loop(rows // ph) as image:
                visit((block * (rows // ph) + image) * channels, 0, image * self.plane, self.plane)
        else:
            parts = ph // rows
            visit(block // parts * channels, block % parts * (rows * pw), 0, rows * pw)


class _GridByChannels(_GridSweep, ByChannels):
    pass

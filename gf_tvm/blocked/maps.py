"""How a map lies in memory inside of a compiled forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..core.geometry import ceil_div


@dataclass(frozen=True)
class MapLayout:
    """One image of a map, (channels, height, width), in blocks of channels with a border around it.

    In order: blocks of channels, rows, columns, the channels of a block. The border's pixels hold ``fill``, so that
    windows may reach beyond the map; channels that only fill up the last block hold anything finite.

    Attributes:
        block: channels that lie side by side; 1: planes, as in PyTorch.
        top, left, bottom, right: width of the border in pixels.
    """

    channels: int
    height: int
    width: int
    block: int
    top: int = 0
    left: int = 0
    bottom: int = 0
    right: int = 0
    fill: float = 0.0

    @cached_property
    def blocks(self) -> int:
        """Blocks of channels."""
        return ceil_div(self.channels, self.block)

    @cached_property
    def row(self) -> int:
        """Elements from one row to the next."""
        return (self.left + self.width + self.right) * self.block

    @cached_property
    def plane(self) -> int:
        """Elements from one block of channels to the next."""
        return (self.top + self.height + self.bottom) * self.row

    @cached_property
    def image(self) -> int:
        """Elements of an image."""
        return self.blocks * self.plane

    @cached_property
    def origin(self) -> int:
        """Where the map's first pixel is."""
        return self.top * self.row + self.left * self.block

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return (self.channels, self.height, self.width)

    @property
    def has_border(self) -> bool:
        """Whether there is a border at all."""
        return any((self.top, self.left, self.bottom, self.right))

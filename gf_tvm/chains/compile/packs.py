"""What a chain keeps for its compiled backward pass: all that is small in a few buffers, not a tensor for each.

Autograd saves and gives back, and a compiled function takes, one tensor after the other, at several microseconds each
when the caches are full of other things; a whole backward pass may take 500. So the forward pass writes what it keeps
into *packs*: one for the means of derivatives, which may be stored in 16 bits, one for the rest (x~, scales, gates).
Weights stay what they are.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Elements that offsets in packs, in the workspace and in the tables are multiples of: a cache line.
LINE = 16
#: Numbers of the packs: x~ and others, means of derivatives.
OTHERS, MEANS = 0, 1


@dataclass(frozen=True)
class Layout:
    """Where in the packs slots are.

    Attributes:
        places: by slot: (pack, first element, shape).
        sizes: elements of each pack.
    """

    places: Mapping[int, tuple[int, int, tuple[int, ...]]]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, slots: Mapping[int, tuple[int, tuple[int, ...]]]) -> Layout:
        """One after the other; ``slots``: (pack, shape)."""
        sizes = [0, 0]
        places = {}
        for slot, (pack, shape) in slots.items():
            places[slot] = pack, sizes[pack], shape
            count = math.prod(shape)
            sizes[pack] += count + -count % LINE
        # Never empty: a function takes every pack.
        return cls(places, tuple(size + LINE for size in sizes))

    def renumbered(self, numbers: Sequence[int]) -> Layout:
        """The same with ``numbers[k]`` in place of slot k."""
        return Layout({numbers[k]: place for k, place in self.places.items()}, self.sizes)

    def views(self, packs: Sequence[Tensor]) -> dict[int, Tensor]:
        """The slots in these packs."""
        return {
            slot: packs[pack][start : start + math.prod(shape)].view(shape)
            for slot, (pack, start, shape) in self.places.items()
        }

    def empty(self) -> list[Tensor]:
        """New packs, of float32, on the CPU."""
        return [torch.empty(size) for size in self.sizes]


#: Where nothing is packed.
UNPACKED = Layout({}, ())


@dataclass(frozen=True)
class Packed:
    """What the forward pass of a chain kept.

    Attributes:
        alone: the slots that are in no pack.
    """

    layout: Layout
    packs: Sequence[Tensor]
    alone: Mapping[int, Tensor]

    @classmethod
    def of(
        cls, kept: Mapping[int, Tensor], layout: Layout, packs: Sequence[Tensor], room: Mapping[int, Tensor]
    ) -> Packed:
        """``kept``: all slots. What does not lie in ``packs``, of which ``room`` are the views, is copied there."""
        for slot, view in room.items():
            if kept[slot].data_ptr() != view.data_ptr():
                view.copy_(kept[slot])
        return cls(layout, packs, {slot: t for slot, t in sorted(kept.items()) if slot not in layout.places})

    def with_means(self, slots: Collection[int], dtype: torch.dtype) -> Packed:
        """With the means of derivatives, which are these ``slots``, in another dtype."""
        packs = [pack.to(dtype) if k == MEANS else pack for k, pack in enumerate(self.packs)]
        return Packed(self.layout, packs, {k: t.to(dtype) if k in slots else t for k, t in self.alone.items()})

    def slots(self) -> list[Tensor]:
        """All of them, by number."""
        found = {**self.alone, **self.layout.views(self.packs)}
        return [found[slot] for slot in range(len(found))]

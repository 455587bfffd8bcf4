"""What the forward pass of a chain consists of: operations, and calls of segments that stand for several."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..plan.graph import Op
from ..plan.lowering import Factor
from .segment import Segment

#: A product of derivatives, and of how many channels.
Key = tuple[Factor, int]


@dataclass(frozen=True)
class Product:
    """A product of derivatives, made by the forward pass as soon as its last factor is there.

    Attributes:
        factor, width: which product, and of how many channels.
        means: the slots that its means over the patches go to.
    """

    factor: Factor
    width: int
    means: tuple[int, ...]


@dataclass(frozen=True)
class Forward:
    """One operation in the forward pass, and what becomes of memory around it.

    Attributes:
        keep: slots that are filled from the operation itself (x~, weight, scale, gate).
        stash: whether its derivative (normalised map, input) is a factor of some product, or products are taken
            through it.
        inplace: whether nobody reads its first input any more, so that it may be overwritten.
        products: what can be made now.
        forget: values, and forget_products: products, that are of no use after this operation.
    """

    index: int
    op: Op
    result: int
    keep: dict[str, int]
    stash: bool
    inplace: bool
    products: tuple[Product, ...]
    forget: tuple[int, ...]
    forget_products: tuple[tuple[Factor, int], ...]


@dataclass(frozen=True)
class Call:
    """A segment in a plan: where its arguments come from, and where its outputs go.

    Attributes:
        values, products: what is read, values before products.
        tensors: numbers of the plan's tensors.
        written: values. handed: products.
        slots: (slot, number of the average, its first channel and how many, or None for all).
        slopes: slots.
        forget, forget_products: see :class:`Forward`.
    """

    segment: Segment
    values: tuple[int, ...]
    products: tuple[Key, ...]
    tensors: tuple[int, ...]
    written: tuple[int, ...]
    handed: tuple[Key, ...]
    slots: tuple[tuple[int, int, tuple[int, int] | None], ...]
    slopes: tuple[int, ...]
    forget: tuple[int, ...] = ()
    forget_products: tuple[Key, ...] = ()

    @cached_property
    def slot_of_output(self) -> tuple[int | None, ...]:
        """By output of the segment (:attr:`Segment.outputs`), the slot that it is; None for maps and parts."""
        channels = self.segment.shape[1]
        whole = {k: slot for slot, k, some in reversed(self.slots) if some in (None, (0, channels))}
        maps = len(self.segment.outputs) - len(self.segment.averages) - len(self.segment.slopes)
        averages = (whole.get(k) for k in range(len(self.segment.averages)))
        return (*(None for _ in range(maps)), *averages, *self.slopes)

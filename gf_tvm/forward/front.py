"""A compiled forward pass: steps, where their maps lie, and how many images go through them at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from .maps import MapLayout
from .steps import Step

#: Elements that maps in the arena begin at multiples of: a cache line.
_LINE = 16


@dataclass(frozen=True)
class Call:
    """A step, and what it works on.

    Attributes:
        inputs: values. result: the value that it computes.
        weights: where its packed parameters begin.
    """

    step: Step
    inputs: tuple[int, ...]
    result: int
    weights: int = 0


@dataclass(frozen=True)
class Nest:
    """Calls that ``images`` go through together, before the next ``images`` do."""

    images: int
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Front:
    """A forward pass without gradients, as it is compiled.

    Attributes:
        batch: images.
        entries, exits: values that are tensors of PyTorch, read and written.
        nests: in order.
    """

    batch: int
    entries: tuple[int, ...]
    exits: tuple[int, ...]
    nests: tuple[Nest, ...]

    @cached_property
    def key(self) -> str:
        """Equal for programs that do the same."""
        text = repr((self.batch, self.entries, self.exits, self.nests))
        return f"forward_n{self.batch}_{len(self.calls)}steps_{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @cached_property
    def calls(self) -> tuple[Call, ...]:
        """All, in order."""
        return tuple(call for nest in self.nests for call in nest.calls)

    @cached_property
    def layouts(self) -> dict[int, MapLayout]:
        """By value."""
        found: dict[int, MapLayout] = {}
        for call in self.calls:
            found.update(zip(call.inputs, call.step.srcs, strict=True))
            found[call.result] = call.step.dst
        return found

    @cached_property
    def weights(self) -> int:
        """Elements of all packed parameters."""
        return sum(lines(call.step.weights) for call in self.calls)

    @cached_property
    def flops(self) -> int:
        """Multiplications and additions of a whole batch."""
        return sum(call.step.flops * (self.batch // call.step.images) for call in self.calls)

    @cached_property
    def spans(self) -> dict[int, tuple[int, bool]]:
        """By value in the arena: its elements, and whether it holds the whole batch, since several nests use it."""
        uses: dict[int, set[int]] = {}
        for k, nest in enumerate(self.nests):
            for call in nest.calls:
                for value in (*call.inputs, call.result):
                    uses.setdefault(value, set()).add(k)
        outside = {*self.entries, *self.exits}
        found = {}
        for value, nests in uses.items():
            if value not in outside:
                whole = len(nests) > 1
                images = self.batch if whole else self.nests[min(nests)].images
                found[value] = (images * self.layouts[value].image, whole)
        return found

    @cached_property
    def places(self) -> tuple[dict[int, int], int]:
        """Where in the arena each value begins, and the arena's size, in elements.

        A value's place is free again after the last call that reads it, if it is not needed for the next images of
        its nest; the first place that is large enough is taken.
        """
        last: dict[int, int] = {}
        at = 0
        for nest in self.nests:
            end = at + len(nest.calls) - 1
            for k, call in enumerate(nest.calls, at):
                for value in call.inputs:
                    # What came from before the nest is read again for its next images.
                    whole = value in self.spans and self.spans[value][1]
                    last[value] = end if whole else k
            at = end + 1
        found: dict[int, int] = {}
        taken: list[tuple[int, int, int]] = []  # start, end, last call
        size, k = 0, 0
        for nest in self.nests:
            # What the nest leaves for later ones lies there from its first images on.
            begin = k
            for call in nest.calls:
                value = call.result
                if value in self.spans:
                    elements, whole = self.spans[value]
                    wanted, start = lines(elements), 0
                    since = begin if whole else k
                    for s, e, end in sorted(taken):
                        if end >= since and s < start + wanted and start < e:
                            start = max(start, e)
                    found[value] = start
                    taken.append((start, start + wanted, max(last.get(value, k), k)))
                    size = max(size, start + wanted)
                k += 1
        return found, size


def lines(elements: int) -> int:
    """So many elements, or a few more, up to the end of a cache line."""
    return elements + -elements % _LINE


def nests(calls: Sequence[tuple[Call, int]]) -> list[tuple[int, list[Call]]]:
    """Calls that follow each other with equal numbers of images at a time, together."""
    found: list[tuple[int, list[Call]]] = []
    for call, images in calls:
        if not found or found[-1][0] != images:
            found.append((images, []))
        found[-1][1].append(call)
    return found

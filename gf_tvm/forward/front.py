"""A compiled forward pass: steps, where their maps lie, and how many images go through them at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..blocked.maps import MapLayout
from ..blocked.steps import Step

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
    """Calls that ``images`` go through together, before the next ``images`` do.

    ``by_images``: every thread takes images of its own through all calls, so that threads need not wait for each
    other; else they share each step.
    """

    images: int
    by_images: bool
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Front:
    """A forward pass without gradients, as it is compiled.

    Attributes:
        batch: images.
        entries, exits: values that are tensors of PyTorch, read and written.
        nests: in order.
        parts: threads that get images of their own, at most.
    """

    batch: int
    entries: tuple[int, ...]
    exits: tuple[int, ...]
    nests: tuple[Nest, ...]
    parts: int

    @cached_property
    def key(self) -> str:
        """Equal for programs that do the same."""
        text = repr((self.batch, self.entries, self.exits, self.nests, self.parts))
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
    def whole(self) -> frozenset[int]:
        """Values of which the arena holds the whole batch, since several nests use them."""
        uses: dict[int, set[int]] = {}
        for k, nest in enumerate(self.nests):
            for call in nest.calls:
                for value in (*call.inputs, call.result):
                    uses.setdefault(value, set()).add(k)
        outside = {*self.entries, *self.exits}
        return frozenset(value for value, nests in uses.items() if len(nests) > 1 and value not in outside)

    @cached_property
    def memory(self) -> Memory:
        """Where in the arena the values are.

        A place is free again after the last call that reads it, if it is not needed for the next images of the nest;
        the first place that is large enough is taken.
        """
        last: dict[int, int] = {}
        ends = []
        at = 0
        for nest in self.nests:
            ends.append(at + len(nest.calls) - 1)
            for k, call in enumerate(nest.calls, at):
                for value in call.inputs:
                    # What came from before the nest is read again for its next images.
                    last[value] = ends[-1] if value in self.whole else k
            at += len(nest.calls)
        shared, own = _Places(), _Places()
        inside = {*self.entries, *self.exits}
        k = 0
        for nest, end in zip(self.nests, ends, strict=True):
            begin = k
            for call in nest.calls:
                value, until = call.result, max(last.get(call.result, k), k)
                size = call.step.dst.image
                if value in self.whole:
                    # What the nest leaves for later ones lies there from its first images to its last.
                    shared.put(value, size * self.batch, begin, max(until, end))
                elif value not in inside:
                    (own if nest.by_images else shared).put(value, size * nest.images, k, until)
                k += 1
        return Memory(shared.found, shared.size, own.found, own.size, self.parts if own.found else 0)


@dataclass(frozen=True)
class Memory:
    """How the arena is laid out, in elements.

    Attributes:
        shared: by value, where it begins; shared_size: what they take.
        own: by value, where it begins among those of one thread; own_size: what these take.
        parts: threads that have some of their own.
    """

    shared: dict[int, int]
    shared_size: int
    own: dict[int, int]
    own_size: int
    parts: int

    @property
    def size(self) -> int:
        """Of the arena."""
        return max(1, self.shared_size + self.parts * self.own_size)


class _Places:
    """Gives values places that are free for some time, counted in calls."""

    def __init__(self) -> None:
        self.found: dict[int, int] = {}
        self.size = 0
        self._taken: list[tuple[int, int, int, int]] = []  # start, end, first and last call

    def put(self, value: int, elements: int, since: int, until: int) -> None:
        wanted, start = lines(elements), 0
        for s, e, first, last in sorted(self._taken):
            if first <= until and since <= last and s < start + wanted and start < e:
                start = e
        self.found[value] = start
        self._taken.append((start, start + wanted, since, until))
        self.size = max(self.size, start + wanted)


def lines(elements: int) -> int:
    """So many elements, or a few more, up to the end of a cache line."""
    return elements + -elements % _LINE


def nests(calls: Sequence[tuple[Call, bool]]) -> tuple[Nest, ...]:
    """Calls that follow each other with equal numbers of images at a time, together; with each, whether threads take
    images of their own through it."""
    found: list[tuple[int, bool, list[Call]]] = []
    for call, by_images in calls:
        images = call.step.images
        if not found or found[-1][:2] != (images, by_images):
            found.append((images, by_images, []))
        found[-1][2].append(call)
    return tuple(Nest(images, by_images, tuple(inner)) for images, by_images, inner in found)

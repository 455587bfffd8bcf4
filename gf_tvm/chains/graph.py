"""The part of a network that may stay on the patch grid, as a list of operations on numbered values.

A :class:`Region` has values 0 .. E-1, its entries, and value E + i, the result of operation i. It holds no tensors
and no modules: where its parameters come from is the business of :mod:`.program`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import GeometryError
from ..geometry import Geometry, Pair

#: (n, c, h, w) of a value.
Shape = tuple[int, int, int, int]


class Misfit(Exception):
    """Why an operation, on values of these shapes, cannot stay on the patch grid."""


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        name: of the module, or of the step in the traced graph, for people.
        inputs: values.
        tensors: numbers among the region's parameters and buffers, in an order that each kind of operation defines.
    """

    name: str
    inputs: tuple[int, ...]
    tensors: tuple[int | None, ...] = ()

    def shape(self, *inputs: Shape) -> Shape:
        """The result's shape. Raises Misfit."""
        return inputs[0]


@dataclass(frozen=True)
class Conv(Op):
    """A convolution; ``tensors``: weight, bias. ``filtered``: else an exact one, which has to be 1x1 on a 1x1 map."""

    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    co: int = 1
    patch: Pair = (1, 1)
    library: str = ""
    filtered: bool = True

    def geometry(self, x: Shape) -> Geometry:
        """Of this convolution on a map of this shape. Raises GeometryError."""
        n, ci, h, w = x
        return Geometry(
            n, ci, self.co, h, w, self.kernel, self.patch, self.stride, self.padding, self.dilation, self.groups
        )

    def shape(self, *inputs: Shape) -> Shape:
        if not self.filtered and inputs[0][2:] != (1, 1):
            raise Misfit("is not filtered")
        try:
            return self.geometry(inputs[0]).y_shape
        except GeometryError as error:
            raise Misfit(str(error)) from None


@dataclass(frozen=True)
class Norm(Op):
    """A batch norm with frozen statistics; ``tensors``: mean, variance, scale, shift (the last two may be None)."""

    eps: float = 0.0


@dataclass(frozen=True)
class Map(Op):
    """An element-wise function: a key of :data:`.elementwise.RULES` or "dropout", and its settings."""

    kind: str = ""
    settings: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Scale(Op):
    """x * factor."""

    factor: float = 1.0


@dataclass(frozen=True)
class Gate(Op):
    """x times one value per channel, and perhaps per image: squeeze-excitation, or a trained scale.

    The scale is the second input, of shape (n or 1, c, 1, 1), or, if there is one input only, ``tensors[0]``.
    """

    def shape(self, *inputs: Shape) -> Shape:
        if len(inputs) == 2:
            x, s = inputs
            if s[2:] != (1, 1) or s[1] != x[1] or s[0] not in (1, x[0]):
                raise Misfit("multiplies two maps")
        return inputs[0]


@dataclass(frozen=True)
class Add(Op):
    """a + alpha * b, of equal shapes."""

    alpha: float = 1.0

    def shape(self, *inputs: Shape) -> Shape:
        if inputs[0] != inputs[1]:
            raise Misfit("adds maps of different shapes")
        return inputs[0]


@dataclass(frozen=True)
class Cat(Op):
    """Maps one after the other along the channels."""

    def shape(self, *inputs: Shape) -> Shape:
        n, _, h, w = inputs[0]
        if any((i[0], *i[2:]) != (n, h, w) for i in inputs):
            raise Misfit("joins maps of different sizes")
        return (n, sum(i[1] for i in inputs), h, w)


@dataclass(frozen=True)
class Slice(Op):
    """Some channels of x: ``how`` is ("slice", start, stop), ("chunk", pieces, i) or ("split", sizes, i)."""

    how: tuple[Any, ...] = ()

    def channels(self, count: int) -> tuple[int, int]:
        """First channel and number of channels, of ``count``. Raises Misfit."""
        kind, what, index = self.how
        if kind == "slice":
            start, stop, _ = slice(what, index).indices(count)
            return start, max(stop - start, 0)
        if kind == "chunk":
            size = -(-count // what)
            sizes = [min(size, count - i) for i in range(0, count, size)]
        elif isinstance(what, int):
            sizes = [min(what, count - i) for i in range(0, count, what)]
        else:
            sizes = list(what)
        if not -len(sizes) <= index < len(sizes) or sum(sizes) != count:
            raise Misfit("splits channels in a way that does not fit")
        index %= len(sizes)
        return sum(sizes[:index]), sizes[index]

    def shape(self, *inputs: Shape) -> Shape:
        n, c, h, w = inputs[0]
        _, width = self.channels(c)
        if width < 1:
            raise Misfit("takes no channel")
        return (n, width, h, w)


@dataclass(frozen=True)
class Pool(Op):
    """The mean over the whole map. ``flat``: the result is (n, c), not (n, c, 1, 1); only a region's exit can be."""

    flat: bool = False

    def shape(self, *inputs: Shape) -> Shape:
        return (*inputs[0][:2], 1, 1)


@dataclass(frozen=True)
class Region:
    """Operations that may stay on the patch grid, in the order of execution.

    Attributes:
        entries: number of values that come from outside.
        ops: the operations.
        exits: values that are used outside, and by what (for people).
        seen: further values of which something outside reads shape or type.
        entry_names: for people.
    """

    entries: int
    ops: tuple[Op, ...]
    exits: dict[int, str] = field(hash=False)
    seen: frozenset[int] = frozenset()
    entry_names: tuple[str, ...] = ()

    def result(self, op: int) -> int:
        """The value that an operation computes."""
        return self.entries + op

    def filtered(self) -> list[tuple[Conv, int]]:
        """The filtered convolutions and the values that they compute."""
        found = ((op, self.result(i)) for i, op in enumerate(self.ops))
        return [(op, value) for op, value in found if isinstance(op, Conv) and op.filtered]

    def shapes(self, entries: Sequence[Shape]) -> tuple[list[Shape | None], dict[int, str]]:
        """The shape of every value, None where it is unknown, and why by operation."""
        shapes: list[Shape | None] = list(entries)
        misfits: dict[int, str] = {}
        for i, op in enumerate(self.ops):
            inputs = [shapes[v] for v in op.inputs]
            try:
                shapes.append(None if None in inputs else op.shape(*inputs))  # type: ignore[arg-type]
            except Misfit as misfit:
                misfits[i] = f"{op.name} {misfit}"
                shapes.append(None)
        return shapes, misfits

"""The part of a network that may stay on the patch grid, as a list of operations on numbered values.

A :class:`Region` has values 0 .. E-1, its entries, and value E + i, the result of operation i. It holds no tensors:
where they come from is the business of :mod:`.capture`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...core.geometry import Geometry, Pair
from ...errors import GeometryError
from .sampling import Sampling, nearest, padded, pooled, pooled_size

#: (n, c, h, w) of a value.
Shape = tuple[int, int, int, int]


class Misfit(Exception):
    """Why an operation, on values of these shapes, cannot stay on the patch grid.

    ``shape``: the result's, where it is known all the same.
    """

    def __init__(self, reason: str, shape: Shape | None = None) -> None:
        super().__init__(reason)
        self.shape = shape


def _broadcast(a: Shape, b: Shape) -> Shape | None:
    if any(p != q and 1 not in (p, q) for p, q in zip(a, b, strict=True)):
        return None
    n, c, h, w = (q if p == 1 else p for p, q in zip(a, b, strict=True))
    return n, c, h, w


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        name: of the module, or of the step in the traced graph, for people.
        inputs: values.
        tensors: numbers among the region's parameters and buffers, in an order that each kind of operation defines.
        flat: the result is (n, c), of one pixel; the shape is given as (n, c, 1, 1) here, and in a chain it is that.
    """

    name: str
    inputs: tuple[int, ...]
    tensors: tuple[int | None, ...] = ()
    flat: bool = False

    def shape(self, *inputs: Shape) -> Shape:
        """The result's shape. Raises Misfit."""
        return inputs[0]


@dataclass(frozen=True)
class Conv(Op):
    """A convolution; ``tensors``: weight, bias.

    ``filtered``: else an exact one, which stays on the grid if it is 1x1 on a 1x1 map; a linear layer (``flat``) is
    one, too.
    """

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
        try:
            shape: Shape = self.geometry(inputs[0]).y_shape
        except GeometryError as error:
            raise Misfit(str(error)) from None
        plain = (self.kernel, self.stride, self.padding) == ((1, 1), (1, 1), (0, 0)) and inputs[0][2:] == (1, 1)
        if not self.filtered and not plain:
            raise Misfit("is not filtered", shape)
        return shape


@dataclass(frozen=True)
class Norm(Op):
    """A batch norm with frozen statistics; ``tensors``: mean, variance, scale, shift (the last two may be None)."""

    eps: float = 0.0


@dataclass(frozen=True)
class Map(Op):
    """An element-wise function: a key of :data:`.elementwise.FUNCTIONS` or "dropout", and its settings."""

    kind: str = ""
    settings: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Scale(Op):
    """x * factor."""

    factor: float = 1.0


@dataclass(frozen=True)
class Gate(Op):
    """x times one value per channel, per image or both: squeeze-excitation, a trained scale, stochastic depth.

    The scale is the second input, of shape (n or 1, c or 1, 1, 1), or, if there is one input only, ``tensors[0]``. A
    gradient is only given to one with a value per channel.
    """

    def shape(self, *inputs: Shape) -> Shape:
        if len(inputs) == 2:
            x, s = inputs
            if s[2:] != (1, 1) or s[1] not in (1, x[1]) or s[0] not in (1, x[0]):
                raise Misfit("multiplies two maps", _broadcast(x, s))
        return inputs[0]


@dataclass(frozen=True)
class Add(Op):
    """a + alpha * b, of equal shapes."""

    alpha: float = 1.0

    def shape(self, *inputs: Shape) -> Shape:
        if inputs[0] != inputs[1]:
            raise Misfit("adds maps of different shapes", _broadcast(*inputs))
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
    """Channels ``start`` and following of x, ``width`` of them."""

    start: int = 0
    width: int = 1

    def shape(self, *inputs: Shape) -> Shape:
        n, c, h, w = inputs[0]
        if not (0 <= self.start < self.start + self.width <= c):
            raise Misfit("takes channels that the map does not have")
        return (n, self.width, h, w)


@dataclass(frozen=True)
class Pool(Op):
    """The mean over the whole map."""

    def shape(self, *inputs: Shape) -> Shape:
        return (*inputs[0][:2], 1, 1)


@dataclass(frozen=True)
class Drop(Op):
    """Dropout of whole channels of an image: times one random value per image and channel, 0 or 1 / (1 - p)."""

    p: float = 0.5


@dataclass(frozen=True)
class View(Op):
    """One pixel of (n, c, 1, 1) as (n, c), if ``flat``, or back."""

    def shape(self, *inputs: Shape) -> Shape:
        if inputs[0][2:] != (1, 1):
            raise Misfit("changes the shape of a map")
        return inputs[0]


@dataclass(frozen=True)
class Resize(Op):
    """Another height and width: exact on the patch grid from a single pixel, of nearest neighbours, or where nothing
    changes.

    Attributes:
        mode, corners: as ``torch.nn.functional.interpolate`` takes them.
        size: the result's (height, width).
        scale: what PyTorch is told in its place, (vertical, horizontal), and may round the ratio of sizes by; or None.
    """

    mode: str = "nearest"
    corners: bool | None = None
    size: Pair = (1, 1)
    scale: tuple[float, float] | None = None

    def shape(self, *inputs: Shape) -> Shape:
        x = inputs[0]
        result: Shape = (*x[:2], *self.size)
        same = result == x and self.scale is None
        if x[2:] != (1, 1) and not same and self.along(x) is None:
            raise Misfit("cannot stay on the patch grid", result)
        return result

    def along(self, x: Shape) -> tuple[Sampling, Sampling] | None:
        """Where every pixel is a pixel of ``x``, what that is vertically and horizontally. Else None."""
        if self.mode not in ("nearest", "nearest-exact") or min(self.size) < 1:
            return None
        exact = self.mode == "nearest-exact"
        axes = zip(x[2:], self.size, self.scale or (None, None), strict=True)
        rows, cols = (nearest(*axis, exact) for axis in axes)
        return None if rows is None or cols is None else (rows, cols)


@dataclass(frozen=True)
class Pad(Op):
    """A constant around a map, and channels of it before and after its own; negative numbers cut off.

    Attributes:
        rows, cols, channels: how many (before, after).
        value: the constant.
    """

    rows: Pair = (0, 0)
    cols: Pair = (0, 0)
    channels: Pair = (0, 0)
    value: float = 0.0

    def shape(self, *inputs: Shape) -> Shape:
        n, *sizes = inputs[0]
        pads = (self.channels, self.rows, self.cols)
        c, h, w = (size + before + after for size, (before, after) in zip(sizes, pads, strict=True))
        # What begins or ends beyond the map holds nothing of it.
        if min(c, h, w) < 1 or any(s + min(p) < 1 for s, p in zip(sizes, pads, strict=True)):
            raise Misfit("leaves nothing of a map")
        return (n, c, h, w)

    def along(self, x: Shape) -> tuple[Sampling, Sampling]:
        """What it does vertically and horizontally."""
        return padded(x[2], *self.rows), padded(x[3], *self.cols)


@dataclass(frozen=True)
class WindowPool(Op):
    """Pooling by windows: ``kind`` "mean" or "max", the other settings as of PyTorch's.

    Attributes:
        include_pad: whether padding counts as pixels of a mean, as PyTorch's ``count_include_pad``.
        divisor: what sums are divided by instead of the number of pixels, as PyTorch's ``divisor_override``.
    """

    kind: str = "mean"
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    ceil: bool = False
    include_pad: bool = True
    divisor: int | None = None

    @property
    def ratio(self) -> float:
        """The result's pixels, in those of :meth:`along`."""
        return 1.0 if self.divisor is None else math.prod(self.kernel) / self.divisor

    def shape(self, *inputs: Shape) -> Shape:
        n, c, *sizes = inputs[0]
        axes = zip(sizes, self.kernel, self.stride, self.padding, strict=True)
        h, w = (pooled_size(*axis, self.ceil) for axis in axes)
        if min(h, w) < 1 or any(2 * p > k for p, k in zip(self.padding, self.kernel, strict=True)):
            raise Misfit("has windows that do not fit the map")
        return (n, c, h, w)

    def along(self, x: Shape) -> tuple[Sampling, Sampling]:
        """What it does vertically and horizontally; of a maximum, means over the same windows."""
        include_pad, fixed = self.include_pad and self.kind == "mean", self.divisor is not None
        rows, cols = (
            pooled(*axis, self.ceil, include_pad, fixed)
            for axis in zip(x[2:], self.kernel, self.stride, self.padding, strict=True)
        )
        return rows, cols


@dataclass(frozen=True)
class Outside(Op):
    """What never stays on the patch grid, and runs as it is in the network.

    Attributes:
        reason: completes "<name> ...".
        result: its result's shape, where that is a map.
        stops: whether no gradient comes back through it.
    """

    reason: str = ""
    result: Shape | None = None
    stops: bool = False

    def shape(self, *inputs: Shape) -> Shape:
        raise Misfit(self.reason, self.result)


@dataclass(frozen=True)
class Region:
    """Operations in the order of execution, of which some may stay on the patch grid.

    Attributes:
        entries: number of values that come from outside.
        ops: the operations.
        exits: values that are used outside, and by what (for people).
        entry_names: for people.
    """

    entries: int
    ops: tuple[Op, ...]
    exits: dict[int, str] = field(hash=False)
    entry_names: tuple[str, ...] = ()

    def result(self, op: int) -> int:
        """The value that an operation computes."""
        return self.entries + op

    def filtered(self) -> list[tuple[Conv, int]]:
        """The filtered convolutions and the values that they compute."""
        found = ((op, self.result(i)) for i, op in enumerate(self.ops))
        return [(op, value) for op, value in found if isinstance(op, Conv) and op.filtered]

    def shapes(self, entries: Sequence[Shape | None]) -> tuple[list[Shape | None], dict[int, str]]:
        """The shape of every value, None where it is unknown, and by operation why it cannot stay on the grid."""
        shapes: list[Shape | None] = list(entries)
        misfits: dict[int, str] = {}
        for i, op in enumerate(self.ops):
            inputs = [shapes[v] for v in op.inputs]
            try:
                if None in inputs and not isinstance(op, Outside):
                    raise Misfit("reads something that is no map")
                shapes.append(op.shape(*inputs))  # type: ignore[arg-type]
            except Misfit as misfit:
                misfits[i] = f"{op.name} {misfit}"
                shapes.append(misfit.shape)
        return shapes, misfits

    def with_library(self, digest: str) -> Region:
        """The same with another library for the kernels of all convolutions."""
        return replace(self, ops=tuple(replace(op, library=digest) if isinstance(op, Conv) else op for op in self.ops))


@dataclass(frozen=True)
class Part:
    """Operations of a region that run together and need no gradients.

    Attributes:
        ops: numbers of operations, in order.
        shapes: of all values of the region.
        entries, exits: values that it reads, and those that are read elsewhere.
        tensors: numbers of the region's tensors that it reads.
    """

    region: Region
    ops: tuple[int, ...]
    shapes: tuple[Shape | None, ...]
    entries: tuple[int, ...]
    exits: tuple[int, ...]
    tensors: tuple[int, ...] = ()

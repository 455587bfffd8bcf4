"""From operations of a region to the steps of a compiled forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..blocked.maps import MapLayout
from ..blocked.packing import Norm as FoldedNorm
from ..blocked.packing import Parameters
from ..blocked.steps import After, Convolution, Each, Enter, Leave, Mean, Step, Window, Winograd
from ..blocked.tiling import divisors, suits_winograd, tile_of
from ..chains.plan import elementwise
from ..chains.plan.graph import Add, Conv, Gate, Map, Norm, Pad, Part, Pool, Region, Scale, Shape, View, WindowPool
from ..core.geometry import Pair
from ..machine.profiles import DeviceProfile
from .front import Call, Front, lines, nests

#: Channels up to which an entry that only convolutions read is one block, without others that fill it up.
_COLOURS = 4
#: Cores that a batch should have work for: boards have four.
_CORES = 4
#: Threads that get images of their own, at most.
_MOST_PARTS = 16
#: Packed weights that are read again for each image, as a part of a core's share of the second-level cache.
_HEAVY = 1.2


def can_compile(region: Region, i: int, shapes: Sequence[Shape | None]) -> bool:
    """Whether there are steps for an operation. A padding is left to the convolutions that read it."""
    op = region.ops[i]
    given, result = [shapes[v] for v in op.inputs], shapes[region.result(i)]
    if result is None or None in given:
        return False
    if isinstance(op, WindowPool):
        return _fits(op, given[0]) and not _other_border(region, i)  # type: ignore[arg-type]
    if isinstance(op, Add):
        return given[0] == given[1]
    if isinstance(op, Gate):
        return len(given) == 2 and given[1][2:] == (1, 1) and given[1][:2] == given[0][:2]  # type: ignore[index]
    if isinstance(op, Map):
        return elementwise.is_compiled(op.kind)
    if isinstance(op, Pad):
        readers = [other for other in region.ops if region.result(i) in other.inputs]
        pads = op.value == 0 and op.channels == (0, 0) and min(*op.rows, *op.cols) >= 0
        return pads and bool(readers) and all(isinstance(other, Conv) for other in readers)
    return isinstance(op, Conv | Norm | Scale | Pool | View)


def _fits(op: WindowPool, x: Shape) -> bool:
    """Whether all windows are equal: what padding adds to a mean counts, and nothing reaches beyond it."""
    _, _, *sizes = op.shape(x)
    if op.kind == "max":
        return True
    axes = zip(x[2:], sizes, op.kernel, op.stride, op.padding, strict=True)
    over = [(o - 1) * s + k - 2 * p - i for i, o, k, s, p in axes]
    return op.divisor is None and max(over) <= 0 and (op.include_pad or op.padding == (0, 0))


def _other_border(region: Region, i: int) -> bool:
    """Whether others want another border around the map of which a maximum is taken than that wants."""
    op = region.ops[i]
    if not isinstance(op, WindowPool) or op.kind != "max":
        return False
    source = _origin(region, op.inputs[0])
    others = (other for other in region.ops if source in (_origin(region, v) for v in other.inputs))
    return any(
        isinstance(other, Conv | Pad) or (isinstance(other, WindowPool) and other.kind == "mean") for other in others
    )


def _origin(region: Region, value: int) -> int:
    """The value that a view of which is ``value``, or a view of that."""
    while value >= region.entries and isinstance(op := region.ops[value - region.entries], View):
        value = op.inputs[0]
    return value


@dataclass
class _Draft:
    """A step that is not laid out yet.

    Attributes:
        inputs: values; result: the value that it computes, after everything in ``after``.
        before: padding above and to the left of each; after it is what fits.
    """

    kind: type[Step]
    inputs: tuple[int, ...]
    result: int
    after: After = ()
    before: Pair = (0, 0)
    settings: dict[str, object] = field(default_factory=dict)
    parameters: Parameters | None = None
    fill: float = 0.0


@dataclass(frozen=True)
class Lowered:
    """A front, and where its parameters come from: by call, or None."""

    front: Front
    parameters: tuple[Parameters | None, ...]


def lower(part: Part, profile: DeviceProfile, memory_budget: int | None = None) -> Lowered:
    """The steps for a CPU.

    Args:
        memory_budget: bytes that the maps between its steps may take; None: as is fastest. Where nothing fits it, what
            takes the least.
    """
    drafts = _drafts(part)
    return _Layouts(part, drafts, profile).front(memory_budget)


def _drafts(part: Part) -> list[_Draft]:
    region = part.region
    readers: dict[int, int] = {}
    for i in part.ops:
        for v in region.ops[i].inputs:
            readers[v] = readers.get(v, 0) + 1
    drafts: dict[int, _Draft] = {}  # by the value that they compute
    order: list[_Draft] = []
    same: dict[int, int] = {}
    pads: dict[int, tuple[int, Pair]] = {}

    def source(v: int) -> int:
        while v in same:
            v = same[v]
        return v

    def alone(v: int) -> _Draft | None:
        """The draft of a value that nobody else reads."""
        return drafts.get(v) if readers.get(v, 0) == 1 and v not in part.exits else None

    def new(draft: _Draft) -> None:
        drafts[draft.result] = draft
        order.append(draft)

    def goes_on(draft: _Draft, value: int) -> None:
        del drafts[draft.result]
        draft.result = value
        drafts[value] = draft

    def fused(v: int, value: int, what: After) -> bool:
        """Whether ``what`` was added to the step that computes ``v``."""
        draft = alone(v)
        if draft is None:
            return False
        draft.after += what
        goes_on(draft, value)
        return True

    for i in part.ops:
        op, value = region.ops[i], region.result(i)
        given = [source(v) for v in op.inputs]
        if isinstance(op, View):
            same[value] = given[0]
            readers[given[0]] = readers.get(given[0], 0) - 1 + readers.get(value, 0) + (value in part.exits)
        elif isinstance(op, Pad):
            v, (top, left) = pads.get(given[0], (given[0], (0, 0)))
            pads[value] = (v, (top + op.rows[0], left + op.cols[0]))
            readers[v] = readers.get(v, 0) - 1 + readers.get(value, 0)
        elif isinstance(op, Conv):
            new(_convolution(op, value, *pads.get(given[0], (given[0], (0, 0)))))
        elif isinstance(op, Norm):
            _norm(op, value, given[0], alone(given[0]), goes_on, new)
        elif isinstance(op, Add):
            _add(op, value, given, drafts, order, alone, goes_on, new)
        elif isinstance(op, Gate):
            new(_Draft(Each, (given[0], given[1]), value, (("gate", ()),)))
        elif isinstance(op, Map | Scale):
            what = ("scale", (op.factor,)) if isinstance(op, Scale) else (op.kind, op.settings)
            if not fused(given[0], value, (what,)):
                new(_Draft(Each, (given[0],), value, (what,)))
        elif isinstance(op, Pool):
            new(_Draft(Mean, (given[0],), value))
        else:
            assert isinstance(op, WindowPool)
            settings: dict[str, object] = {"kind": op.kind, "kernel": op.kernel, "stride": op.stride}
            fill = -math.inf if op.kind == "max" else 0.0
            new(_Draft(Window, (given[0],), value, before=op.padding, settings=settings, fill=fill))
    for draft in order:
        draft.inputs = tuple(source(v) for v in draft.inputs)
    return order


def _convolution(op: Conv, value: int, source: int, padded: Pair) -> _Draft:
    weight, bias = op.tensors
    before = (op.padding[0] + padded[0], op.padding[1] + padded[1])
    settings = {"kernel": op.kernel, "stride": op.stride, "dilation": op.dilation, "groups": op.groups}
    return _Draft(Convolution, (source,), value, before=before, settings=settings, parameters=Parameters(weight, bias))


def _norm(
    op: Norm,
    value: int,
    source: int,
    before: _Draft | None,
    goes_on: Callable[[_Draft, int], None],
    new: Callable[[_Draft], None],
) -> None:
    mean, variance, scale, shift = op.tensors
    assert mean is not None
    assert variance is not None
    norm = FoldedNorm(mean, variance, scale, shift, op.eps)
    if before is not None and before.parameters is not None and not before.after:
        before.parameters = replace(before.parameters, norms=(*before.parameters.norms, norm))
        goes_on(before, value)
        return
    parameters = Parameters(None, None, (norm,))
    # A convolution of every channel by itself; how many these are, the layout says.
    settings = {"kernel": (1, 1), "stride": (1, 1), "dilation": (1, 1), "groups": 0}
    new(_Draft(Convolution, (source,), value, settings=settings, parameters=parameters))


def _add(
    op: Add,
    value: int,
    given: list[int],
    drafts: Mapping[int, _Draft],
    order: list[_Draft],
    alone: Callable[[int], _Draft | None],
    goes_on: Callable[[_Draft, int], None],
    new: Callable[[_Draft], None],
) -> None:
    """Into the step of its operand that is computed last, where that has no second map yet."""
    places = {draft.result: k for k, draft in enumerate(order)}
    last = max(given, key=lambda v: places.get(v, -1))
    draft = alone(last)
    first = given[0] if last == given[1] else given[1]
    if draft is not None and given[0] != given[1] and len(draft.inputs) == 1 and draft.kind is not Mean:
        # The second operand is multiplied with alpha: added as it is where that is the step's own.
        factor = op.alpha if last == given[0] else 1.0
        if last == given[1] and op.alpha != 1:
            draft.after += (("scale", (op.alpha,)),)
        draft.after += (("add", (factor,)),)
        draft.inputs = (*draft.inputs, first)
        goes_on(draft, value)
        return
    new(_Draft(Each, (given[0], given[1]), value, (("add", (op.alpha,)),)))


class _Layouts:
    """Gives maps their layouts and steps their numbers of images."""

    def __init__(self, part: Part, drafts: list[_Draft], profile: DeviceProfile) -> None:
        self.part, self.drafts, self.profile = part, drafts, profile
        self.shapes = part.shapes
        shape = self._shape(part.entries[0])
        self.batch = shape[0]
        self.lanes = profile.lanes
        for draft in drafts:
            if draft.kind is Convolution and self._suits_winograd(draft):
                draft.kind = Winograd
                draft.settings["outputs"] = 4

    def _suits_winograd(self, draft: _Draft) -> bool:
        (_, ci, h, w), (_, co, height, width) = self._shape(draft.inputs[0]), self._shape(draft.result)
        src, dst = MapLayout(ci, h, w, self.lanes), MapLayout(co, height, width, self.lanes)
        return suits_winograd(Convolution(1, dst, (src,), **draft.settings))  # type: ignore[arg-type]

    def _shape(self, value: int) -> Shape:
        shape = self.shapes[value]
        assert shape is not None
        return shape

    def front(self, memory_budget: int | None) -> Lowered:
        """The steps, in as few pieces of the batch as the budget allows."""
        values = len(self.shapes)
        inner: dict[int, MapLayout] = {}
        for value in {v for d in self.drafts for v in (*d.inputs, d.result)}:
            inner[value] = self._layout(value)
        steps: list[tuple[Step, tuple[int, ...], int, Parameters | None]] = []
        numbers = {}
        for value in self.part.entries:
            plain = self._plain(value)
            if value in inner and inner[value] != plain:
                numbers[value] = values
                steps.append((Enter(0, inner[value], (plain,)), (value,), values, None))
                values += 1
        for draft in self.drafts:
            inputs = tuple(numbers.get(v, v) for v in draft.inputs)
            srcs = tuple(inner[v] for v in draft.inputs)
            settings = dict(draft.settings)
            if settings.get("groups") == 0:  # a batch norm by itself
                settings["groups"] = inner[draft.result].channels
            if draft.kind in (Convolution, Winograd, Window):
                settings["before"] = draft.before
            step = draft.kind(0, inner[draft.result], srcs, draft.after, **settings)  # type: ignore[arg-type]
            steps.append((step, inputs, draft.result, draft.parameters))
        results = {draft.result for draft in self.drafts}
        exits = []
        for value in self.part.exits:
            inside = _origin(self.part.region, value)
            plain = self._plain(inside)
            assert inside in results
            steps.append((Leave(0, plain, (inner[inside],)), (inside,), values, None))
            exits.append(values)
            values += 1
        most = [parts for parts in (_MOST_PARTS, 8, 4, 2, 1) if parts <= max(self.batch, 1)] or [1]
        found = self._nested(steps, tuple(exits), self.batch, most[0])
        if memory_budget is None:
            return found
        # Threads with images of their own are given up last, for they are what makes it fast. Then nothing between two
        # nests holds the whole batch any more.
        for parts in (*most, 0):
            for images in reversed(divisors(self.batch)):
                other = self._nested(steps, tuple(exits), images, parts)
                if 4 * other.front.memory.size <= memory_budget:
                    return other
                found = min(found, other, key=lambda lowered: lowered.front.memory.size)
        return found

    def _plain(self, value: int) -> MapLayout:
        _, c, h, w = self._shape(value)
        return MapLayout(c, h, w, 1)

    def _layout(self, value: int) -> MapLayout:
        _, c, h, w = self._shape(value)
        top = left = bottom = right = 0
        fill, dense = 0.0, True
        for draft in self.drafts:
            for place, v in enumerate(draft.inputs):
                if v != value:
                    continue
                dense = dense and place == 0 and draft.kind in (Convolution, Winograd) and draft.settings["groups"] == 1
                if place or draft.kind not in (Convolution, Winograd, Window):
                    continue
                above, beside, below, after = self._border(draft, h, w)
                top, left, bottom, right = max(top, above), max(left, beside), max(bottom, below), max(right, after)
                fill = draft.fill if any((above, beside, below, after)) else fill
        colours = value in self.part.entries and dense and c <= _COLOURS
        return MapLayout(c, h, w, c if colours else self.lanes, top, left, bottom, right, fill)

    def _border(self, draft: _Draft, height: int, width: int) -> tuple[int, int, int, int]:
        """Pixels that a step reads (above, to the left, below, to the right)."""
        _, _, *sizes = self._shape(draft.result)
        kernel: Pair = draft.settings.get("kernel", (1, 1))  # type: ignore[assignment]
        stride: Pair = draft.settings.get("stride", (1, 1))  # type: ignore[assignment]
        dilation: Pair = draft.settings.get("dilation", (1, 1))  # type: ignore[assignment]
        if draft.kind is Winograd:
            m: int = draft.settings["outputs"]  # type: ignore[assignment]
            sizes = [size + -size % m for size in sizes]
        below, after = (
            max(0, (out - 1) * s + (k - 1) * d + 1 - before - size)
            for out, s, k, d, before, size in zip(
                sizes, stride, kernel, dilation, draft.before, (height, width), strict=True
            )
        )
        return *draft.before, below, after

    def _nested(
        self,
        steps: list[tuple[Step, tuple[int, ...], int, Parameters | None]],
        exits: tuple[int, ...],
        images: int,
        parts: int,
    ) -> Lowered:
        """Steps in nests.

        Args:
            images: that go together through steps which threads share.
            parts: threads that get images of their own; 0: they share all steps.
        """
        found: list[tuple[Call, bool]] = []
        at = 0
        for (step, inputs, result, _), by_images in zip(
            steps, self._by_images([s for s, *_ in steps], parts), strict=True
        ):
            step = replace(step, images=1 if by_images else images, shared=not by_images)
            if isinstance(step, Convolution):
                step = replace(step, tile=tile_of(step, self.profile))
            found.append((Call(step, inputs, result, at), by_images))
            at += lines(step.weights)
        front = Front(self.batch, self.part.entries, exits, nests(found), min(parts, self.batch))
        return Lowered(front, tuple(parameters for *_, parameters in steps))

    def _by_images(self, steps: Sequence[Step], parts: int) -> list[bool]:
        """By step, whether threads take images of their own through it: up to where weights are many.

        Threads that share a step wait for each other after it. But weights that do not stay in a core's cache are
        better read once for the whole batch, and few images are no work for several cores.
        """
        heavy = [k for k, step in enumerate(steps) if 4 * step.weights > _HEAVY * self.profile.l2_share]
        end = min(heavy, default=len(steps))
        enough = parts > 0 and (self.batch % _CORES == 0 or self.batch >= 4 * _CORES)
        return [enough and k < end for k in range(len(steps))]

"""Segments: the element-wise operations between two convolutions of a chain, as one compiled function.

A segment reads its maps once, plane by plane, and gives everything that is wanted of it: the maps that something else
reads, in place where nobody needs what was there, and small maps, namely the means of products of derivatives over
patches, and x~ of the convolutions that read its results. No derivative is ever a map, but where a product goes on
into another segment (residual joins); then that product is handed over as one.

No TVM here: :mod:`.emit_forward` makes the code when a bundle is built.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..core.geometry import Geometry
from .graph import Add, Conv, Map, Norm, Op, Scale, Shape, Slice
from .grids import Grid
from .lowering import Factor, Mean

if TYPE_CHECKING:
    from ..core.workload import Workload
    from ..machine.profiles import DeviceProfile
    from . import plan
    from .plan import Forward, Plan

#: Element-wise functions that segments compute; the others (softplus, dropout) end a segment.
COVERED = frozenset(
    {"relu", "relu6", "hardtanh", "leaky_relu", "hardswish", "hardsigmoid"}
    | {"elu", "sigmoid", "tanh", "silu", "mish", "gelu"}
)

#: A product of derivatives, and of how many channels.
Key = tuple[Factor, int]


@dataclass(frozen=True)
class Node:
    """One operation of a segment.

    Attributes:
        kind: "norm", "add", "scale" or one of ``COVERED``.
        inputs: numbers of values: a segment's maps come first, then its nodes' results.
        settings: (eps, has a scale, has a shift), (alpha,), (factor,), or the function's own.
    """

    kind: str
    inputs: tuple[int, ...]
    settings: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Part:
    """One factor of a product.

    ``what``: "derivative" of node ``of`` (of a batch norm the normalised map); "result", a function's derivative, which
    follows from its result, the value ``of``; "map", the value ``of`` itself.
    """

    what: str
    of: int
    kind: str = ""
    settings: tuple[Any, ...] = ()


#: What is averaged, or handed over: a product of these.
Product = tuple[Part, ...]


@dataclass(frozen=True)
class Average:
    """A small map: the means, or sums, of a product over the patches of a grid.

    ``layout``: "means", (n, c, ph, pw); "sums", likewise; "sums, channels last", (n, ph, pw, c).
    """

    product: Product
    grid: Grid
    layout: str = "means"


@dataclass(frozen=True)
class Segment:
    """A function on maps (n, c, h, w) of float32, and everything that its code depends on.

    Its arguments are, in this order: ``maps`` maps; mean, variance and, where there are, scale and shift of each batch
    norm, (c,); then its outputs: ``written`` and ``handed`` maps, ``averages``, and of each of ``slopes``, which are
    batch norms, the factor that it multiplies with, (c,).

    Attributes:
        shape: of all its maps.
        maps: how many it reads.
        nodes: its operations.
        written: (value, map): results that are written over a map that was read, or (None) into one of their own,
            which is an output.
    """

    shape: Shape
    maps: int
    nodes: tuple[Node, ...]
    written: tuple[tuple[int, int | None], ...]
    handed: tuple[Product, ...]
    averages: tuple[Average, ...]
    slopes: tuple[int, ...]

    @cached_property
    def key(self) -> str:
        """Readable and stable: equal exactly for equal functions."""
        n, c, h, w = self.shape
        kinds = "_".join(node.kind for node in self.nodes[:4])
        digest = hashlib.sha256(repr(self).encode()).hexdigest()[:24]
        return f"chain_forward_n{n}_c{c}_{h}x{w}_{kinds}_{digest}"

    def parameters(self) -> Iterator[tuple[int, str]]:
        """(node, "mean", "variance", "scale" or "shift") of the arguments behind the maps."""
        for k, node in enumerate(self.nodes):
            if node.kind == "norm":
                _, has_scale, has_shift = node.settings
                yield from ((k, name) for name in ("mean", "variance"))
                yield from ((k, name) for name, has in (("scale", has_scale), ("shift", has_shift)) if has)

    @cached_property
    def outputs(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the arguments that it writes, those in place not among them."""
        n, c, _, _ = self.shape
        shapes: list[tuple[int, ...]] = [self.shape for _, over in self.written if over is None]
        shapes += [self.shape for _ in self.handed]
        for average in self.averages:
            ph, pw = average.grid.shape
            shapes.append((n, ph, pw, c) if average.layout == "sums, channels last" else (n, c, ph, pw))
        return (*shapes, *((c,) for _ in self.slopes))

    def module(self, profile: DeviceProfile, config_of: Callable[[Workload], dict[str, Any]]) -> Any:
        """The IRModule of its function ``main``; see :class:`gf_tvm.building.Program`."""
        from .emit_forward import forward_segment

        return forward_segment(self, profile)


@dataclass(frozen=True)
class Call:
    """A segment in a plan: where its arguments come from, and where its outputs go.

    Attributes:
        values, products: what is read, values before products.
        tensors: numbers of the plan's tensors.
        written: values. handed: products.
        slots: (slot, number of the average, its first channel and how many, or None for all).
        slopes: slots.
        forget, forget_products: see :class:`.plan.Forward`.
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


def programs_of(plan: Plan) -> list[Segment]:
    """The functions that the forward pass of a chain takes from a library."""
    return list(dict.fromkeys(unit.segment for unit in plan.units if isinstance(unit, Call)))


def units(plan: Plan) -> tuple[Call | Forward, ...]:
    """The forward pass with segments: calls, and between them the operations that are in none."""
    return _Split(plan).units()


def is_result_enough(op: Op) -> bool:
    """Whether f'(z) follows from f(z)."""
    if not isinstance(op, Map):
        return False
    if op.kind == "leaky_relu":
        return bool(op.settings[0] >= 0)
    return op.kind in ("relu", "relu6", "hardtanh", "sigmoid", "tanh")


class _Split:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.steps = {step.index: step for step in plan.forward}
        self.owner = {step.result: step.index for step in plan.forward}
        self.shapes: dict[int, Shape] = dict(plan.shapes)
        self.readers: dict[int, list[int]] = {}
        for step in plan.forward:
            self.shapes[step.result] = step.op.shape(*(self.shapes[v] for v in step.op.inputs))
            for v in step.op.inputs:
                self.readers.setdefault(v, []).append(step.index)
        self.refused: set[int] = set()
        #: By operation, the first operation of its segment.
        self.group: dict[int, int] = {}

    def units(self) -> tuple[Call | Forward, ...]:
        while True:
            self._find_groups()
            refused = set(self._unfit())
            if not refused:
                break
            self.refused |= refused
        order = self._order()
        needed = self._needed_products(order)
        found = [self._call(unit, needed) if isinstance(unit, tuple) else self.steps[unit] for unit in order]
        return self._with_lifetimes(found)

    # Which operations are done together

    def _covered(self, step: Forward) -> bool:
        op = step.op
        if step.index in self.refused or self.shapes[step.result][2:] == (1, 1):
            return False
        return isinstance(op, Norm | Add | Scale) or (isinstance(op, Map) and op.kind in COVERED)

    def _find_groups(self) -> None:
        """What is connected, and lies behind and before the same of the other operations.

        Levels count the other operations on the way to a value, so that none of them lies between two operations of
        one level. What is only read further down is done there: a shortcut's batch norm with the addition.
        """
        level: dict[int, int] = {}
        for step in self.plan.forward:
            before = max((level[self.owner[v]] for v in step.op.inputs if v in self.owner), default=0)
            level[step.index] = before + (not self._covered(step))
        for step in reversed(self.plan.forward):
            readers = self.readers.get(step.result, [])
            if not self._covered(step) or step.result in self.plan.exits or not readers:
                continue
            if all(self._covered(self.steps[i]) for i in readers):
                level[step.index] = min(level[i] for i in readers)
        parent = {step.index: step.index for step in self.plan.forward if self._covered(step)}

        def root(i: int) -> int:
            while parent[i] != i:
                i = parent[i]
            return i

        for i in parent:
            for v in self.steps[i].op.inputs:
                j = self.owner.get(v)
                if j in parent and level[j] == level[i]:
                    a, b = sorted((root(i), root(j)))
                    parent[b] = a
        self.group = {i: root(i) for i in parent}
        for first in set(self.group.values()):
            members = self._members(first)
            if len(members) == 1 and not self._averages(first):
                del self.group[first]

    def _members(self, first: int) -> list[int]:
        return [i for i, g in self.group.items() if g == first]

    def _averages(self, i: int) -> bool:
        step = self.steps[i]
        return any(product.means for product in step.products) or any(self._filters(step.result))

    def _filters(self, value: int) -> Iterator[tuple[int, Geometry]]:
        """(slot, geometry) of the x~ that are taken of a value."""
        for i in self.readers.get(value, []):
            step = self.steps[i]
            if isinstance(step.op, Conv) and "x~" in step.keep:
                yield step.keep["x~"], step.op.geometry(self.shapes[value])

    def _unfit(self) -> Iterator[int]:
        """Operations with products that a segment cannot make: of some channels of what comes from outside."""
        for i, first in self.group.items():
            channels = self.shapes[self.steps[i].result][1]
            for product in self.steps[i].products:
                outside, inside = self._divided(product.factor, first)
                offsets = {offset for _, offset in inside}
                suffix = product.factor == outside + inside
                if not suffix or len(offsets) > 1 or (outside and (offsets != {0} or product.width != channels)):
                    yield i

    def _divided(self, factor: Factor, first: int) -> tuple[Factor, Factor]:
        """What of a product is made outside of a segment, and inside."""
        inside = tuple(part for part in factor if self.group.get(part[0]) == first)
        return tuple(part for part in factor if part not in inside), inside

    # When

    def _order(self) -> list[tuple[int, ...] | int]:
        """Segments (their operations) and other operations, each after what it reads."""
        done: set[int] = set()
        order: list[tuple[int, ...] | int] = []

        def ensure(i: int) -> None:
            first = self.group.get(i, i)
            if first in done:
                return
            done.add(first)
            members = self._members(first) if i in self.group else [i]
            for member in members:
                for v in self.steps[member].op.inputs:
                    source = self.owner.get(v)
                    if source is not None and source not in members:
                        ensure(source)
            order.append(tuple(members) if i in self.group else i)

        for i in self.steps:
            if i not in self.group or i == self._members(self.group[i])[-1]:
                ensure(i)
        return order

    def _needed_products(self, order: Sequence[tuple[int, ...] | int]) -> set[Key]:
        """Products that are handed from one unit to another."""
        needed: set[Key] = set()
        for unit in reversed(order):
            for i in reversed(unit if isinstance(unit, tuple) else (unit,)):
                step = self.steps[i]
                for product in step.products:
                    key = (product.factor, product.width)
                    if isinstance(unit, int):
                        before = product.factor[:-1]
                    elif product.means or key in needed:
                        before, _ = self._divided(product.factor, unit[0])
                        if len(before) == 1 and self._from_result(before[0], unit) is not None:
                            continue
                    else:
                        continue
                    if before:
                        needed.add((before, product.width))
        return needed

    def _from_result(self, part: tuple[int, int], members: Sequence[int]) -> int | None:
        """The value, read by a segment anyway, from which a function's derivative follows."""
        step = self.steps[part[0]]
        if part[1] or not is_result_enough(step.op):
            return None
        return step.result if any(step.result in self.steps[i].op.inputs for i in members) else None

    # What

    def _call(self, members: tuple[int, ...], needed: set[Key]) -> Call:
        steps = [self.steps[i] for i in members]
        first = self.group[members[0]]
        made = {step.result for step in steps}
        values = list(dict.fromkeys(v for step in steps for v in step.op.inputs if v not in made))
        wanted = [p for step in steps for p in step.products if p.means or (p.factor, p.width) in needed]
        products = list(
            dict.fromkeys(
                (outside, p.width)
                for p in wanted
                if (outside := self._divided(p.factor, first)[0])
                and not (len(outside) == 1 and self._from_result(outside[0], members) is not None)
            )
        )
        maps = len(values) + len(products)
        number = {v: k for k, v in enumerate(values)} | {step.result: maps + k for k, step in enumerate(steps)}
        node_of = {i: k for k, i in enumerate(members)}

        def parts(product: plan.Product) -> Product:
            outside, inside = self._divided(product.factor, first)
            found = [Part("derivative", node_of[i]) for i, _ in inside]
            if (outside, product.width) in products:
                found.insert(0, Part("map", len(values) + products.index((outside, product.width))))
            elif outside:
                op = self.steps[outside[0][0]].op
                assert isinstance(op, Map)
                value = self._from_result(outside[0], members)
                assert value is not None
                found.insert(0, Part("result", number[value], op.kind, op.settings))
            return tuple(found)

        listed: list[Average] = []
        slots: list[tuple[int, Average, tuple[int, int] | None]] = []
        for p in wanted:
            for slot in p.means:
                mean = self.plan.slots[slot]
                assert isinstance(mean, Mean)
                average = Average(parts(p), mean.grid)
                listed += [] if average in listed else [average]
                slots.append((slot, average, (p.factor[-1][1], p.width)))
        for step in steps:
            for slot, geometry in self._filters(step.result):
                layout = "sums" if geometry.depthwise else "sums, channels last"
                average = Average((Part("map", number[step.result]),), Grid.of_input(geometry), layout)
                listed += [] if average in listed else [average]
                slots.append((slot, average, None))
        slopes = [k for k, step in enumerate(steps) if "scale" in step.keep]
        handed = [p for p in wanted if (p.factor, p.width) in needed]
        written = [v for v in made if v in self.plan.exits or not set(self.readers.get(v, [])) <= set(members)]
        written.sort()
        places = self._places(values, written, members)
        return Call(
            segment=Segment(
                shape=self.shapes[steps[0].result],
                maps=maps,
                nodes=tuple(_node(step.op, [number[v] for v in step.op.inputs]) for step in steps),
                written=tuple((number[v], place) for v, place in zip(written, places, strict=True)),
                handed=tuple(parts(p) for p in handed),
                averages=tuple(listed),
                slopes=tuple(slopes),
            ),
            values=tuple(values),
            products=tuple(products),
            tensors=tuple(t for step in steps for t in step.op.tensors if t is not None),
            written=tuple(written),
            handed=tuple((p.factor, p.width) for p in handed),
            slots=tuple((slot, listed.index(average), channels) for slot, average, channels in slots),
            slopes=tuple(steps[k].keep["scale"] for k in slopes),
        )

    def _places(self, values: Sequence[int], written: Sequence[int], members: Sequence[int]) -> list[int | None]:
        """By result that is written, the map that it may be written over."""
        free = []
        for k, v in enumerate(values):
            source = self.owner.get(v)
            # An entry belongs to others, and a slice is a view of another value.
            if source is None or v in self.plan.exits or isinstance(self.steps[source].op, Slice):
                continue
            if set(self.readers[v]) <= set(members):
                free.append(k)
        return [free.pop(0) if free else None for _ in written]

    def _with_lifetimes(self, found: Sequence[Call | Forward]) -> tuple[Call | Forward, ...]:
        last_value: dict[int, int] = {}
        last_product: dict[Key, int] = {}
        for k, unit in enumerate(found):
            if isinstance(unit, Call):
                values = [*unit.values, *unit.written]
                keys = [*unit.products, *unit.handed]
            else:
                values = [*unit.op.inputs, unit.result]
                keys = [(p.factor[:end], p.width) for p in unit.products for end in {len(p.factor), len(p.factor) - 1}]
            last_value |= dict.fromkeys(values, k)
            last_product |= dict.fromkeys([key for key in keys if key[0]], k)
        for v in self.plan.exits:
            last_value.pop(v, None)
        return tuple(
            replace(
                unit,
                forget=tuple(sorted(v for v, last in last_value.items() if last == k)),
                forget_products=tuple(sorted(key for key, last in last_product.items() if last == k)),
            )
            for k, unit in enumerate(found)
        )


def _node(op: Op, inputs: Sequence[int]) -> Node:
    if isinstance(op, Norm):
        _, _, scale, shift = op.tensors
        return Node("norm", tuple(inputs), (op.eps, scale is not None, shift is not None))
    if isinstance(op, Map):
        return Node(op.kind, tuple(inputs), op.settings)
    if isinstance(op, Scale):
        return Node("scale", tuple(inputs), (op.factor,))
    assert isinstance(op, Add)
    return Node("add", tuple(inputs), (op.alpha,))

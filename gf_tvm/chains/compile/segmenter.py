"""Finds the segments of a chain's forward pass: which operations are done together, when, and what each is to give."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from ...core.geometry import Geometry
from ..plan import elementwise
from ..plan.graph import Add, Conv, Map, Norm, Op, Scale, Shape, Slice
from ..plan.grids import Grid
from ..plan.lowering import Factor, Kept, Mean
from . import segment
from .forward import Call, Forward, Key, Product
from .segment import Average, Node, Part, Segment


def units(
    forward: Sequence[Forward], shapes: Mapping[int, Shape], exits: Collection[int], slots: Sequence[Mean | Kept]
) -> tuple[Call | Forward, ...]:
    """The forward pass with segments: calls, and between them the operations that are in none.

    Args:
        forward, shapes, exits, slots: as in ``run.plan.Plan``.
    """
    return _Split(forward, shapes, exits, slots).units()


class _Split:
    def __init__(
        self,
        forward: Sequence[Forward],
        shapes: Mapping[int, Shape],
        exits: Collection[int],
        slots: Sequence[Mean | Kept],
    ) -> None:
        self.forward, self.exits, self.slots = forward, exits, slots
        self.steps = {step.index: step for step in forward}
        self.owner = {step.result: step.index for step in forward}
        self.shapes: dict[int, Shape] = dict(shapes)
        self.readers: dict[int, list[int]] = {}
        for step in forward:
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
        return isinstance(op, Norm | Add | Scale) or (isinstance(op, Map) and elementwise.is_compiled(op.kind))

    def _find_groups(self) -> None:
        """What is connected, and lies behind and before the same of the other operations.

        Levels count the other operations on the way to a value, so that none of them lies between two operations of
        one level. What is only read further down is done there: a shortcut's batch norm with the addition.
        """
        level: dict[int, int] = {}
        for step in self.forward:
            before = max((level[self.owner[v]] for v in step.op.inputs if v in self.owner), default=0)
            level[step.index] = before + (not self._covered(step))
        for step in reversed(self.forward):
            readers = self.readers.get(step.result, [])
            if not self._covered(step) or step.result in self.exits or not readers:
                continue
            if all(self._covered(self.steps[i]) for i in readers):
                level[step.index] = min(level[i] for i in readers)
        parent = {step.index: step.index for step in self.forward if self._covered(step)}

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
        op = step.op
        if part[1] or not isinstance(op, Map) or not elementwise.is_result_enough(op.kind, op.settings):
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

        def parts(product: Product) -> segment.Product:
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
                mean = self.slots[slot]
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
        written = [v for v in made if v in self.exits or not set(self.readers.get(v, [])) <= set(members)]
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
            if source is None or v in self.exits or isinstance(self.steps[source].op, Slice):
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
        for v in self.exits:
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

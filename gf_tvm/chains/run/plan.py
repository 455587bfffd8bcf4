"""Everything that one chain does in one training step, settled before it runs: a function of shapes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ...blocked.convolution import ConvolutionProgram
from ...ops.dispatch import AWAITED
from ..compile import packs, segmenter
from ..compile.compiled import Bound, backward_of
from ..compile.forward import Call, Forward, Product
from ..compile.segment import Segment
from ..plan import elementwise
from ..plan.graph import Add, Conv, Drop, Gate, Map, Norm, Op, Region, Shape, Slice, View
from ..plan.lowering import Factor, Kept, Mean, Resampling, Situation, lower
from ..plan.steps import Step


@dataclass(frozen=True)
class Plan:
    """One chain.

    Attributes:
        convolutions: names, in the order of execution.
        entries: the values that it reads; exits: the values that it gives, maps of full size or of one pixel.
        shapes: of entries and exits, by value.
        flat: exits that are (n, c), not (n, c, 1, 1).
        tensors: numbers of the parameters and buffers that it reads, among the region's.
        needs: entries whose gradients are needed. trained: of ``tensors`` those whose gradients are needed.
        forward: its operations.
        convolution_programs: the compiled functions that its convolutions can call in the forward pass.
        slots: what the forward pass keeps: means of products, and per operation x~, weight, scale or gate.
        slot_shapes: their shapes.
        steps, registers: the backward pass, and the size (channels, ph, pw) of each intermediate gradient.
        kept_values: numbers that are kept for the backward pass, parameters not counted.
        derivatives: slots that hold means of derivatives of element-wise functions.
        means: dtype in which these are kept; None: as they were summed.
    """

    convolutions: tuple[str, ...]
    entries: tuple[int, ...]
    exits: tuple[int, ...]
    shapes: dict[int, Shape]
    flat: frozenset[int]
    tensors: tuple[int, ...]
    needs: frozenset[int]
    trained: tuple[int, ...]
    forward: tuple[Forward, ...]
    convolution_programs: tuple[ConvolutionProgram, ...]
    slots: tuple[Mean | Kept, ...]
    slot_shapes: tuple[tuple[int, ...], ...]
    steps: tuple[Step, ...]
    registers: tuple[tuple[int, int, int], ...]
    kept_values: int
    derivatives: frozenset[int]
    means: torch.dtype | None

    @cached_property
    def packs(self) -> tuple[int | None, ...]:
        """By slot, the pack that it lies in where the backward pass is compiled; None for weights."""
        weights = {k for k, what in enumerate(self.slots) if isinstance(what, Kept) and what.what == "weight"}
        of_derivatives = [packs.MEANS if k in self.derivatives else packs.OTHERS for k in range(len(self.slots))]
        return tuple(None if k in weights else pack for k, pack in enumerate(of_derivatives))

    @cached_property
    def units(self) -> tuple[Call | Forward, ...]:
        """``forward`` with compiled segments, where all maps are float32, contiguous and on a CPU."""
        return segmenter.units(self.forward, self.shapes, self.exits, self.slots)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The functions that ``units`` call: what the forward pass takes from a library."""
        return tuple(dict.fromkeys(unit.segment for unit in self.units if isinstance(unit, Call)))

    @cached_property
    def library(self) -> str:
        """Digest of the library of its filtered convolutions, where all have the same; else none."""
        found = {step.op.library for step in self.forward if isinstance(step.op, Conv) and step.op.filtered}
        return found.pop() if len(found) == 1 and found != {AWAITED} else ""

    @cached_property
    def backward(self) -> Bound | None:
        """The backward pass as one compiled function, see :func:`.compiled.backward_of`."""
        return backward_of(self.steps, self.registers, self.shapes, self.slot_shapes, self.packs)


def make_plan(region: Region, situation: Situation, ops: Sequence[int], means: torch.dtype | None = None) -> Plan:
    """The plan of the chain of operations ``ops``, in the order of execution; see :func:`.partition.partition`.

    ``means``: dtype in which the means of derivatives are kept. None: as they are summed. What has other factors
    (normalised maps, a gate's input) or derivatives such as that of exp is kept as it is summed in any case, since
    nothing bounds it.
    """
    lowered = lower(region, situation, ops)
    assert not lowered.problems, lowered.problems
    members = set(ops)
    made = {region.result(i) for i in ops}
    entries = tuple(dict.fromkeys(v for i in ops for v in region.ops[i].inputs if v not in made))
    used_outside = {v for j, op in enumerate(region.ops) if j not in members for v in op.inputs}
    used_outside |= region.exits.keys()
    exits = tuple(region.result(i) for i in ops if region.result(i) in used_outside)
    tensors = tuple(dict.fromkeys(t for i in ops for t in region.ops[i].tensors if t is not None))
    convs = [op for i in ops if isinstance(op := region.ops[i], Conv)]
    return Plan(
        convolutions=tuple(op.name for op in convs if op.filtered),
        entries=entries,
        exits=exits,
        shapes={v: situation.shape(v) for v in (*entries, *exits)},
        flat=frozenset(region.result(i) for i in ops if region.ops[i].flat),
        tensors=tensors,
        needs=frozenset(v for v in entries if situation.needs[v]),
        trained=tuple(t for t in tensors if t in situation.trained),
        forward=_schedule(region, ops, lowered.slots, exits),
        convolution_programs=_convolution_programs(convs, situation),
        slots=tuple(lowered.slots),
        slot_shapes=tuple(_slot_shape(what, region, situation) for what in lowered.slots),
        steps=tuple(lowered.steps),
        registers=tuple(lowered.registers),
        kept_values=sum(_numbers(what, region, situation) for what in lowered.slots),
        derivatives=frozenset(_derivatives(region, lowered.slots)),
        means=means,
    )


def _convolution_programs(convs: Sequence[Conv], situation: Situation) -> tuple[ConvolutionProgram, ...]:
    geometries = [
        (op.geometry(situation.shape(op.inputs[0])), op.tensors[1] is not None) for op in convs if op.filtered
    ]
    return tuple(dict.fromkeys(ConvolutionProgram(g, bias) for g, bias in geometries if ConvolutionProgram.exists(g)))


def _derivatives(region: Region, slots: Sequence[Mean | Kept]) -> list[int]:
    """Slots that hold means of derivatives of element-wise functions, where something bounds these."""

    def bounded(op: Op) -> bool:
        return isinstance(op, Resampling) or (isinstance(op, Map) and elementwise.is_bounded(op.kind))

    return [
        slot
        for slot, what in enumerate(slots)
        if isinstance(what, Mean) and all(bounded(region.ops[i]) for i, _ in what.factor)
    ]


def _numbers(what: Mean | Kept, region: Region, situation: Situation) -> int:
    """How many numbers a slot holds that would not be there without the chain."""
    if isinstance(what, Mean):
        index, _ = what.factor[0]
        return math.prod((situation.shape(region.result(index))[0], what.width, *what.grid.shape))
    op = region.ops[what.op]
    if what.what == "x~" and isinstance(op, Conv):
        return math.prod(op.geometry(situation.shape(op.inputs[0])).saved_shape)
    shape = situation.shape(region.result(what.op))
    return {"scale": shape[1], "gate": shape[0] * shape[1]}.get(what.what, 0)


def _slot_shape(what: Mean | Kept, region: Region, situation: Situation) -> tuple[int, ...]:
    if isinstance(what, Mean):
        index, _ = what.factor[0]
        return (situation.shape(region.result(index))[0], what.width, *what.grid.shape)
    op = region.ops[what.op]
    if isinstance(op, Conv):
        geometry = op.geometry(situation.shape(op.inputs[0]))
        return geometry.saved_shape if what.what == "x~" else geometry.weight_shape
    if isinstance(op, Gate) and len(op.inputs) == 2:
        return (situation.shape(op.inputs[1])[0], situation.shape(op.inputs[0])[1], 1, 1)
    n, c, _, _ = situation.shape(region.result(what.op))
    return (n if isinstance(op, Drop) else 1, c, 1, 1)


def _schedule(
    region: Region, ops: Sequence[int], slots: Sequence[Mean | Kept], exits: Sequence[int]
) -> tuple[Forward, ...]:
    """When each product is made, and how long values, derivatives and products are held."""
    means: dict[tuple[Factor, int], list[int]] = {}
    kept: dict[int, dict[str, int]] = {i: {} for i in ops}
    for slot, what in enumerate(slots):
        if isinstance(what, Kept):
            kept[what.op][what.what] = slot
        else:
            means.setdefault((what.factor, what.width), []).append(slot)
    # A product is made of the one without its last factor, so that what several have in common is made once.
    wanted = {(factor[:k], width) for factor, width in means for k in range(1, len(factor) + 1)}
    made_at: dict[int, list[tuple[Factor, int]]] = {i: [] for i in ops}
    for key in sorted(wanted):
        made_at[key[0][-1][0]].append(key)
    last_use = {key: key[0][-1][0] for key in wanted}
    for factor, width in wanted:
        if len(factor) > 1:
            last_use[factor[:-1], width] = max(last_use[factor[:-1], width], factor[-1][0])
    readers: dict[int, list[int]] = {}
    for i in ops:
        for v in region.ops[i].inputs:
            readers.setdefault(v, []).append(i)
    made = {region.result(i): region.ops[i] for i in ops}
    result = []
    for i in ops:
        op = region.ops[i]
        first = op.inputs[0]
        source = made.get(first)
        inplace = (
            isinstance(op, Map | Add)
            and source is not None
            and not isinstance(source, Slice | View)  # a view of its input
            and readers[first] == [i]
            and first not in exits
        )
        forget = {v for v in op.inputs if readers[v][-1] == i and v not in exits}
        if region.result(i) not in readers and region.result(i) not in exits:
            forget.add(region.result(i))
        result.append(
            Forward(
                index=i,
                op=op,
                result=region.result(i),
                keep=kept[i],
                stash=bool(made_at[i]),
                inplace=inplace,
                products=tuple(Product(*key, tuple(means.get(key, ()))) for key in made_at[i]),
                forget=tuple(sorted(forget)),
                forget_products=tuple(sorted(key for key, last in last_use.items() if last == i)),
            )
        )
        assert not made_at[i] or isinstance(op, (Map, Gate, Norm, *Resampling))
    return tuple(result)

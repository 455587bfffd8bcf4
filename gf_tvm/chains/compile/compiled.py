"""The whole backward pass of a chain as one compiled function: what it takes, and how it is called.

The function is found in a library by its key; :mod:`.emit_backward` makes it, where there is a compiler. All
intermediate gradients lie in one workspace, planned here. Everything is float32, as sums are everywhere.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..plan.graph import Shape
from ..plan.grids import covers, pixels, uniform
from ..plan.steps import ConvInput, ConvWeight, Expand, Filter, Gather, MapSum, PatchSum, Step, Take, reads, writes
from . import kernels
from .packs import LINE, Layout, Packed
from .traversal import indices, scratch_of, simple, space


@dataclass(frozen=True)
class Argument:
    """A tensor that the function takes.

    Attributes:
        kind: "grad" of an exit; "pack" of what the forward pass kept, or a "slot" that is in none; written: "tensor" (a
            parameter's gradient), "entry" (an entry's); "workspace"; "floats" and "integers", see :class:`Tables`.
        number: of the value, pack, slot or tensor.
    """

    kind: str
    number: int
    shape: tuple[int, ...]


@dataclass
class Tables:
    """Constants of the backward pass, in two flat tensors, and where in them they are."""

    floats: list[float] = field(default_factory=list)
    integers: list[int] = field(default_factory=list)
    _at: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def place(self, values: Sequence[float] | Sequence[int]) -> int:
        """Where these values are, among the floats or among the integers; equal ones once."""
        whole = all(isinstance(value, int) for value in values)
        key = (whole, *values)
        if key not in self._at:
            table: list[Any] = self.integers if whole else self.floats
            self._at[key] = len(table)
            table.extend(values)
            table.extend([0] * (-len(table) % LINE))
        return self._at[key]


@dataclass(frozen=True)
class Backward:
    """One chain's backward pass, as far as it is compiled: a function of shapes and steps alone.

    Attributes:
        batch: images.
        steps, registers: as in ``run.plan.Plan``, but values, slots and tensors are numbered in the order in which
            they are met, and libraries' digests are left out.
        values: shapes of exits whose gradients are read and of entries whose gradients are written.
        slots: shapes of those that are read.
        packs: by slot, the pack that it lies in, or None: see :mod:`.packs`.
    """

    batch: int
    steps: tuple[Step, ...]
    registers: tuple[tuple[int, int, int], ...]
    values: tuple[Shape, ...]
    slots: tuple[tuple[int, ...], ...]
    packs: tuple[int | None, ...]

    @cached_property
    def key(self) -> str:
        """Equal for chains that do the same."""
        text = repr((self.batch, self.steps, self.registers, self.values, self.slots, self.packs))
        convs = sum(isinstance(step, ConvWeight) for step in self.steps)
        return f"chain_backward_n{self.batch}_{convs}convs_{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @cached_property
    def tables(self) -> Tables:
        """The constants; placing them again finds them where they are."""
        tables = Tables()
        for step in self.steps:
            if isinstance(step, PatchSum | MapSum) and not uniform(step.grid):
                tables.place(pixels(step.grid))
            if isinstance(step, Gather) and not simple(step, self.registers):
                for part in step.parts:
                    for values in indices(part):
                        tables.place(values)
        return tables

    @cached_property
    def constants(self) -> dict[str, Tensor]:
        """The tables as the function takes them, made once."""
        floats, integers = self.tables.floats or [0], self.tables.integers or [0]
        return {
            "floats": torch.tensor(floats, dtype=torch.float32),
            "integers": torch.tensor(integers, dtype=torch.int32),
        }

    @cached_property
    def stages(self) -> tuple[tuple[Step, ...], ...]:
        """The steps in order: those that are done together, and the others one by one.

        Together are steps that go through the same elements, in one loop over channels, and both products of one
        convolution.
        """
        found: list[list[Step]] = []
        last = None
        for step in self.steps:
            own = space(step, self.registers)
            before = found[-1][-1] if found else None
            if not _same_product(before, step) and (own is None or own != last):
                found.append([])
            found[-1].append(step)
            last = own
        return tuple(map(tuple, found))

    @cached_property
    def places(self) -> tuple[dict[int, int], int]:
        """Where in the workspace each register lies, and the workspace's size, in elements.

        A register's place is free again after the last stage that reads it, and the first place that is large enough
        is taken. Registers that one stage alone knows have none, nor those that are a gradient that came in.
        """
        last = {r: k for k, stage in enumerate(self.stages) for step in stage for r in reads(step)}
        found: dict[int, int] = {}
        taken: list[tuple[int, int, int]] = []  # start, end, last stage
        size = 0
        for k, stage in enumerate(self.stages):
            taken = [other for other in taken if other[2] >= k]
            for step in stage:
                for register in () if isinstance(step, Take) else writes(step):
                    if last.get(register, k) == k and len(stage) > 1 and space(step, self.registers) is not None:
                        continue
                    count = self.batch * math.prod(self.registers[register])
                    wanted, at = count + -count % LINE, 0
                    for start, end, _ in sorted(taken):
                        if at + wanted <= start:
                            break
                        at = max(at, end)
                    found[register] = at
                    taken.append((at, at + wanted, last.get(register, k)))
                    size = max(size, at + wanted)
        return found, size + LINE

    @property
    def scratch(self) -> int:
        """Where the part of the workspace begins that one stage uses for itself."""
        _, size = self.places
        return size

    @cached_property
    def workspace(self) -> int:
        """Elements of the workspace."""
        dilated = [step.geometry for step in self.steps if isinstance(step, ConvInput) and step.geometry.dilated]
        return self.scratch + max((sum(scratch_of(geometry)) for geometry in dilated), default=0)

    @cached_property
    def layout(self) -> Layout:
        """Where in the packs the slots are, by their numbers here."""
        return Layout.of({k: (pack, self.slots[k]) for k, pack in enumerate(self.packs) if pack is not None})

    @cached_property
    def arguments(self) -> tuple[Argument, ...]:
        """In the order in which the function takes them."""
        grads = dict.fromkeys(step.value for step in self.steps if isinstance(step, Filter | Take))
        entries = dict.fromkeys(step.value for step in self.steps if isinstance(step, Expand))
        tensors: dict[int, tuple[int, ...]] = {}
        for step in self.steps:
            if isinstance(step, ConvWeight):
                tensors[step.tensor] = step.geometry.weight_shape
            elif isinstance(step, PatchSum):
                tensors[step.tensor] = (step.channels,)
        alone = (k for k, pack in enumerate(self.packs) if pack is None)
        return (
            *(Argument("grad", value, self.values[value]) for value in grads),
            *(Argument("pack", pack, (size,)) for pack, size in enumerate(self.layout.sizes)),
            *(Argument("slot", slot, self.slots[slot]) for slot in alone),
            *(Argument("tensor", tensor, shape) for tensor, shape in tensors.items()),
            *(Argument("entry", value, self.values[value]) for value in entries),
            Argument("workspace", 0, (self.workspace,)),
            Argument("floats", 0, (max(1, len(self.tables.floats)),)),
            Argument("integers", 0, (max(1, len(self.tables.integers)),)),
        )

    @cached_property
    def zeroed(self) -> frozenset[tuple[str, int]]:
        """Arguments (kind, number) that must be zero before: nobody writes all of them first."""
        seen: set[tuple[str, int]] = set()
        found = set()
        for step in self.steps:
            if isinstance(step, PatchSum):
                key, whole = ("tensor", step.tensor), step.width == step.channels
            elif isinstance(step, Expand):
                key = ("entry", step.value)
                whole = step.width == self.values[step.value][1] and covers(step.grid)
            else:
                continue
            if key not in seen and not whole:
                found.add(key)
            seen.add(key)
        return frozenset(found)


@dataclass(frozen=True)
class Bound:
    """A :class:`Backward` in one chain: which of the chain's values, slots and tensors its numbers stand for."""

    program: Backward
    values: tuple[int, ...]
    slots: tuple[int, ...]
    tensors: tuple[int, ...]

    @cached_property
    def layout(self) -> Layout:
        """Where in the packs the chain's slots are."""
        return self.program.layout.renumbered(self.slots)

    def inputs(self, kept: Packed, grads: Mapping[int, Tensor | None]) -> list[Tensor] | None:
        """The tensors that the function reads, as it takes them; None if one is not of the kind that it is for.

        This and :meth:`run` are called in every step, with caches full of other things: few operations a tensor.
        """
        found: list[Tensor] = []
        for kind, number, shape in self._reads:
            if kind == "pack":
                pack = kept.packs[number]
                found.append(pack if pack.dtype is torch.float32 else pack.to(torch.float32))
                continue
            tensor = grads[number] if kind == "grad" else kept.alone[number]
            if tensor is None or not tensor.is_cpu or tensor.dtype not in kernels.STORAGE:
                return None
            if tensor.dtype is not torch.float32 or tensor.shape != shape:
                tensor = tensor.reshape(shape).to(torch.float32)
            found.append(kernels.ready(tensor))
        return found

    def run(
        self, function: Callable[..., None], inputs: Sequence[Tensor]
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Call the compiled function with :meth:`inputs`.

        Returns:
            The gradients of entries and of tensors, by the chain's numbers.
        """
        of_entries: dict[int, Tensor] = {}
        of_tensors: dict[int, Tensor] = {}
        written: list[Tensor] = []
        for kind, number, shape, zero in self._writes:
            result = _result(shape, zero)
            written.append(result)
            if kind == "tensor":
                of_tensors[number] = result
            elif kind == "entry":
                of_entries[number] = result
        constants = self.program.constants
        function(*inputs, *written, constants["floats"], constants["integers"])
        return of_entries, of_tensors

    @cached_property
    def _reads(self) -> tuple[tuple[str, int, tuple[int, ...]], ...]:
        """Of each tensor that is read: what it is, the chain's number of it, and its shape."""
        numbers = {"grad": self.values, "slot": self.slots, "pack": range(len(self.program.layout.sizes))}
        return tuple((a.kind, numbers[a.kind][a.number], a.shape) for a in self.program.arguments if a.kind in numbers)

    @cached_property
    def _writes(self) -> tuple[tuple[str, int, tuple[int, ...], bool], ...]:
        """Of each tensor that is written: kind, the chain's number, shape, and whether it must be zero before."""
        numbers = {"tensor": self.tensors, "entry": self.values, "workspace": (0,)}
        return tuple(
            (a.kind, numbers[a.kind][a.number], a.shape, (a.kind, a.number) in self.program.zeroed)
            for a in self.program.arguments
            if a.kind in numbers
        )


def backward_of(
    steps: Sequence[Step],
    registers: Sequence[tuple[int, int, int]],
    shapes: Mapping[int, Shape],
    slots: Sequence[tuple[int, ...]],
    packs: Sequence[int | None],
) -> Bound | None:
    """The backward pass of these steps as a compiled function; None where several convolutions share a weight.

    Args:
        steps, registers, shapes: as in ``run.plan.Plan``. slots: shapes, by number. packs: those that they lie in.
    """
    weights = [step.tensor for step in steps if isinstance(step, ConvWeight)]
    sums = {step.tensor for step in steps if isinstance(step, PatchSum)}
    if len(set(weights)) < len(weights) or sums & set(weights):
        return None
    numbers = Numbers("value", "slot", "tensor")
    plain = tuple(map(numbers.of, steps))
    values, kept, tensors = (tuple(numbers.known[kind]) for kind in ("value", "slot", "tensor"))
    if not values:
        return None
    program = Backward(
        batch=shapes[values[0]][0],
        steps=plain,
        registers=tuple(registers),
        values=tuple(shapes[value] for value in values),
        slots=tuple(slots[slot] for slot in kept),
        packs=tuple(packs[slot] for slot in kept),
    )
    return Bound(program, values, kept, tensors)


#: What fields of steps are numbers of.
_FIELDS = {
    "value": "value",
    "weight": "slot",
    "filtered": "slot",
    "mean": "slot",
    "slot": "slot",
    "tensor": "tensor",
    "dst": "register",
    "src": "register",
    "a": "register",
    "b": "register",
}


class Numbers:
    """Counts anew, in the order of the steps, so that what does the same looks the same.

    Attributes:
        known: by kind ("value", "slot", "tensor", "register"): new numbers by old ones; kinds that lack stay.
    """

    def __init__(self, *kinds: str) -> None:
        self.known: dict[str, dict[int, int]] = {kind: {} for kind in kinds}

    def of(self, step: Any) -> Any:
        """A step, or a part of one, with new numbers."""
        new: dict[str, Any] = {}
        for name, kind in _FIELDS.items():
            number = getattr(step, name, None)
            if number is not None and kind in self.known:
                known = self.known[kind]
                new[name] = known.setdefault(number, len(known))
        if isinstance(step, Gather):
            new["parts"] = tuple(map(self.of, step.parts))
        if isinstance(step, ConvInput | ConvWeight):
            new["library"] = ""
        return replace(step, **new)


def _same_product(a: Step | None, b: Step) -> bool:
    """Whether two steps are the products of one convolution, weights first, which one sweep can make."""
    return (
        isinstance(a, ConvWeight)
        and isinstance(b, ConvInput)
        and (a.src, a.geometry) == (b.src, b.geometry)
        and not (b.geometry.dilated or b.geometry.depthwise)
    )


def _result(shape: tuple[int, ...], zero: bool) -> Tensor:
    return torch.zeros(shape) if zero else torch.empty(shape)

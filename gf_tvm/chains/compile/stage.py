"""One stage of a compiled backward pass: steps that share a loop or two, and what their code works on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..plan.steps import ConvInput, Filter, Step
from .compiled import Tables
from .traversal import scratch_of

#: A tensor that a stage works on, (kind, number): a "register", or of the kinds of :class:`.compiled.Argument`.
Operand = tuple[str, int]


@dataclass(frozen=True)
class Stage:
    """Steps with numbers of their own: all that the code of a stage depends on.

    Attributes:
        steps: numbered anew, see :class:`.compiled.Numbers`.
        adds: by step, whether it adds to a gradient of a parameter or entry that holds something already.
        registers, values, slots: shapes. tensors: of parameters' gradients.
        stored: registers that are in memory, not known to this stage alone.
        floats, integers: lengths of the program's tables, if they are used.
    """

    batch: int
    steps: tuple[Step, ...]
    adds: tuple[bool, ...]
    registers: tuple[tuple[int, int, int], ...]
    values: tuple[tuple[int, ...], ...]
    slots: tuple[tuple[int, ...], ...]
    tensors: tuple[tuple[int, ...], ...]
    stored: frozenset[int]
    floats: int
    integers: int

    @property
    def sizes(self) -> dict[Operand, int]:
        """Elements of the tensors that the stage's function takes, in its order."""
        found = {("register", k): self.batch * math.prod(self.registers[k]) for k in sorted(self.stored)}
        incoming = [step.value for step in self.steps if isinstance(step, Filter)]
        found |= {("grad" if k in incoming else "entry", k): math.prod(shape) for k, shape in enumerate(self.values)}
        found |= {("slot", k): math.prod(shape) for k, shape in enumerate(self.slots)}
        found |= {("tensor", k): math.prod(shape) for k, shape in enumerate(self.tensors)}
        scratch = [
            sum(scratch_of(step.geometry))
            for step in self.steps
            if isinstance(step, ConvInput) and step.geometry.dilated
        ]
        found |= {("workspace", k): size for k, size in enumerate(scratch)}
        tables = {("floats", 0): self.floats, ("integers", 0): self.integers}
        return found | {key: size for key, size in tables.items() if size}


@dataclass
class StageCode:
    """A stage whose function is being emitted.

    Attributes:
        tables: where the program's constants are.
        lanes: elements of a vector register.
        register: buffers, by register.
        given: the function's other buffers.
    """

    stage: Stage
    tables: Tables
    lanes: int
    register: dict[int, Any] = field(default_factory=dict)
    given: dict[Operand, Any] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """Images."""
        return self.stage.batch

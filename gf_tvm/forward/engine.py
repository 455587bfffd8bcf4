"""Compiled forward passes inside of a captured model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..bundle.library import get_library
from ..chains.plan.graph import Conv, Part, Region, Shape
from ..machine.profiles import DeviceProfile, get_profile
from .lower import Lowered, can_compile, lower
from .packing import pack
from .programs import FrontProgram


@dataclass(frozen=True)
class Engine:
    """Makes steps of the parts of a graph that need no gradients, see :class:`..chains.capture.assemble.Forward`.

    Attributes:
        memory_budget: bytes that maps between the operations of a part may take, about; None: as is fastest.
    """

    memory_budget: int | None = None

    def takes(self, region: Region, op: int, shapes: Sequence[Shape | None]) -> bool:
        """Whether an operation can be in such a part."""
        return can_compile(region, op, shapes)

    def is_worth(self, part: Part) -> bool:
        """Whether a part has a convolution of a map."""
        for i in part.ops:
            op = part.region.ops[i]
            shape = part.shapes[op.inputs[0]] if op.inputs else None
            if isinstance(op, Conv) and shape is not None and shape[2:] != (1, 1):
                return bool(part.exits)
        return False

    def step(self, part: Part, body: fx.GraphModule) -> FrontStep:
        """What runs in a part's place."""
        return FrontStep(part, body, self.memory_budget)


class FrontStep(nn.Module):
    """One part of a graph: called with its entries, then its tensors; gives its exits.

    Attributes:
        part: what it computes.
        body: the same by PyTorch's operators: what runs until there is a compiled function, or where that does not take
            what it is given.
    """

    def __init__(self, part: Part, body: fx.GraphModule, memory_budget: int | None = None) -> None:
        super().__init__()
        self.part, self.body, self.memory_budget = part, body, memory_budget
        self._compiled: _Compiled | None = None

    def program(self, profile: DeviceProfile) -> FrontProgram:
        """What a library needs for it."""
        return FrontProgram(self._lowered(profile).front)

    def _lowered(self, profile: DeviceProfile) -> Lowered:
        return lower(self.part, profile, self.memory_budget)

    def use(self, digest: str) -> None:
        """Take the compiled function from the loaded library of this digest, from the next step on."""
        library = get_library(digest)
        lowered = self._lowered(get_profile(library.device))
        function = library.program(lowered.front.key)
        self._compiled = None if function is None else _Compiled(self.part, lowered, function)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        compiled = self._compiled
        entries, tensors = given[: len(self.part.entries)], given[len(self.part.entries) :]
        if compiled is None or not all(map(_fits, given)):
            results: tuple[Tensor, ...] = self.body(*given)
            return results
        with torch.no_grad():
            return compiled(entries, tensors)


def _fits(tensor: Tensor) -> bool:
    return tensor.dtype is torch.float32 and tensor.is_cpu and type(tensor) in (Tensor, nn.Parameter)


class _Compiled:
    """A compiled function with its packed parameters and its memory."""

    def __init__(self, part: Part, lowered: Lowered, function: Callable[..., None]) -> None:
        self.part, self.lowered, self.function = part, lowered, function
        self.front = lowered.front
        self._weights = torch.zeros(max(1, self.front.weights))
        self._packed: Any = None
        self._arenas: list[Tensor] = []
        self._shapes = [self._shape(value) for value in part.exits]

    def _shape(self, value: int) -> tuple[int, ...]:
        shape, region = self.part.shapes[value], self.part.region
        assert shape is not None
        flat = value >= region.entries and region.ops[value - region.entries].flat
        return shape[:2] if flat else shape

    def __call__(self, entries: Sequence[Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        self._pack(tensors)
        arena = self._arenas.pop() if self._arenas else torch.empty(max(1, self.front.places[1]))
        results = [torch.empty(shape) for shape in self._shapes]
        self.function(*map(_flat, entries), self._weights, arena, *(r.view(-1) for r in results))
        self._arenas.append(arena)
        return tuple(results)

    def _pack(self, tensors: Sequence[Tensor]) -> None:
        """Pack the parameters if they are others than those that are packed."""
        state = [(t.data_ptr(), t._version) for t in tensors]
        if state == self._packed:
            return
        given = dict(zip(self.part.tensors, tensors, strict=True))
        for call, parameters in zip(self.front.calls, self.lowered.parameters, strict=True):
            if parameters is not None:
                pack(call.step, parameters, given, self._weights[call.weights : call.weights + call.step.weights])  # type: ignore[arg-type]
        self._packed = state


def _flat(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous().view(-1)
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()

"""Compiled forward passes inside of a captured model."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ..blocked.packing import pack
from ..blocked.steps import Convolution
from ..bundle.library import Library, get_library
from ..chains.capture.assemble import ForwardStep
from ..chains.plan.graph import Conv, Part, Region, Shape
from ..core.workload import ALIGNMENT
from ..errors import ModelError
from ..machine.profiles import DeviceProfile, get_profile
from .arena import ARENAS
from .lower import Lowered, can_compile, lower
from .programs import FrontProgram

logger = logging.getLogger("gf_tvm")


@dataclass(frozen=True)
class Engine:
    """Makes steps of the parts of a graph that need no gradients, see :class:`..chains.capture.assemble.Forward`.

    Attributes:
        library: digest of the loaded library that has compiled functions for them; "": they are built when wanted.
        memory_budget: bytes that the maps between the operations of a part may take; None: as is fastest.
    """

    library: str = ""
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
        step = FrontStep(part, body, self.memory_budget)
        if self.library:
            step.use(self.library)
        return step


class FrontStep(ForwardStep):
    """One part of a graph: called with its entries, then its tensors; gives its exits.

    Attributes:
        part: what it computes.
        body: the same by PyTorch's operators: what runs until there is a compiled function, or where that does not take
            what it is given.
        library: digest of the library whose function it calls; "" while it calls none.
    """

    def __init__(self, part: Part, body: fx.GraphModule, memory_budget: int | None = None) -> None:
        super().__init__()
        self.part, self.body, self.library, self.memory_budget = part, body, "", memory_budget
        self.compiled: Compiled | None = None

    def program(self, profile: DeviceProfile) -> FrontProgram:
        """What a library needs for it."""
        return FrontProgram(lower(self.part, profile, self.memory_budget).front)

    def use(self, digest: str) -> None:
        """Take the compiled function from the loaded library of this digest, from the next step on."""
        library = get_library(digest)
        compiled = _compiled(self.part, library, self.memory_budget)
        if compiled is None:
            logger.info("%s has no compiled forward pass of %s: PyTorch runs it", library, self.names)
        self.library, self.compiled = ("" if compiled is None else digest), compiled

    @property
    def names(self) -> str:
        """The convolutions, for people."""
        names = [op.name for op in (self.part.region.ops[i] for i in self.part.ops) if isinstance(op, Conv)]
        return names[0] if len(names) == 1 else f"{len(names)} convolutions from {names[0]} to {names[-1]}"

    def __str__(self) -> str:
        if self.compiled is None:
            return f"{self.names} in PyTorch, without a compiled function so far"
        front = self.compiled.front
        return (
            f"{self.names} compiled; {4e-6 * front.memory.size:.1f} MB between them at most, "
            f"{4e-6 * front.weights:.1f} MB of packed weights"
        )

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        compiled = self.compiled
        if compiled is None or not all(map(_fits, given)):
            results: tuple[Tensor, ...] = self.body(*given)
            return results
        count = len(self.part.entries)
        with torch.no_grad():
            return compiled(given[:count], given[count:])


def check_budget(memory_budget: object) -> None:
    """Raises ModelError unless it is None or a number of bytes."""
    valid = isinstance(memory_budget, int) and not isinstance(memory_budget, bool) and memory_budget > 0
    if memory_budget is not None and not valid:
        raise ModelError(f"memory_budget must be None or a positive number of bytes, got {memory_budget!r}")


def _fits(tensor: Tensor) -> bool:
    return tensor.dtype is torch.float32 and tensor.is_cpu and type(tensor) in (Tensor, nn.Parameter)


def _compiled(part: Part, library: Library, memory_budget: int | None) -> Compiled | None:
    if library.fingerprints is None:  # for a GPU, or of an older version
        return None
    lowered = lower(part, get_profile(library.device), memory_budget)
    function = library.program(lowered.front.key)
    return None if function is None else Compiled(part, lowered, function, library.fingerprints)


class Compiled:
    """A compiled function, and its packed parameters.

    Args:
        fingerprints: see :func:`..bundle.runtime.fingerprints_of`.
    """

    def __init__(
        self,
        part: Part,
        lowered: Lowered,
        function: Callable[..., None],
        fingerprints: Callable[[Sequence[int], Sequence[int]], bytes],
    ) -> None:
        self.part, self.lowered, self.front = part, lowered, lowered.front
        self._function, self._fingerprints = function, fingerprints
        self._weights = torch.zeros(max(1, self.front.weights))
        self._packed: bytes | None = None
        self._shapes = [self._shape(value) for value in part.exits]
        # Threads that run the same model, perhaps with other parameters (functional_call), take turns.
        self._lock = threading.Lock()

    def _shape(self, value: int) -> tuple[int, ...]:
        shape, region = self.part.shapes[value], self.part.region
        assert shape is not None
        flat = value >= region.entries and region.ops[value - region.entries].flat
        return shape[:2] if flat else shape

    def __call__(self, entries: Sequence[Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The part's exits."""
        results = [torch.empty(shape) for shape in self._shapes]
        given = [_as_memory(entry) for entry in entries]
        with self._lock, ARENAS.borrowed(self.front.memory.size) as arena:
            self._pack([tensor.contiguous() for tensor in tensors])
            self._function(*given, self._weights, arena, *(result.view(-1) for result in results))
        return tuple(results)

    def _pack(self, tensors: Sequence[Tensor]) -> None:
        """Pack the parameters where they hold something else than what is packed."""
        state = self._fingerprints([t.data_ptr() for t in tensors], [4 * t.numel() for t in tensors])
        if state == self._packed:
            return
        self._packed = None  # should packing be interrupted
        given = dict(zip(self.part.tensors, tensors, strict=True))
        for call, parameters in zip(self.front.calls, self.lowered.parameters, strict=True):
            if parameters is not None:
                assert isinstance(call.step, Convolution)
                pack(call.step, parameters, given, self._weights[call.weights : call.weights + call.step.weights])
        self._packed = state


def _as_memory(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous().view(-1)
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()

"""What is tuned: everything that the search and the measurement need to know about one workload."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import GfTvmError
from .log import Identity, Record, config_id, identity_of

if TYPE_CHECKING:
    import random

    import torch

    from ..core.workload import Workload

#: A point of a space: the value, an integer or a string, of each knob.
Config = dict[str, Any]


class TuningError(GfTvmError):
    """Tuning cannot start or go on: a bad option, a broken tool chain, a machine without room."""


def import_tool(name: str) -> Any:
    """Import a module that only tuning needs. Raises TuningError if it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise TuningError(f"tuning needs more packages: pip install 'gf-tvm[tune]' ({error})") from None


class SearchSpace(Protocol):
    """A space of schedules, as :func:`gf_tvm.schedules.get_space` gives it."""

    @property
    def knobs(self) -> Mapping[str, tuple[Any, ...]]:
        """The values that each knob can take."""

    @property
    def default(self) -> Config:
        """The configuration that runs without tuning."""

    def valid(self, config: Config) -> bool:
        """Whether the knobs' values go together."""

    def schedule(self, config: Config) -> Any:
        """The finished schedule (tvm.s_tir.Schedule) of a configuration."""

    def sample(self, rng: random.Random) -> Config:
        """A random valid configuration."""

    def features(self, config: Config) -> Sequence[float]:
        """What the cost model sees of a valid configuration; equally many numbers for each."""


@dataclass(frozen=True)
class Candidate:
    """One schedule to measure: a configuration of a space of ours, or a MetaSchedule trace as plain JSON values."""

    space: str
    id: str
    config: Config | None = None
    trace: Any = None

    @classmethod
    def of_config(cls, config: Config) -> Candidate:
        """The candidate of a configuration."""
        return cls("ours", config_id(config), config=dict(config))

    @classmethod
    def of_record(cls, record: Record) -> Candidate:
        """The candidate that a record is about."""
        return cls(record.space, record.id, record.config, record.trace)


class Task(ABC):
    """One workload on one device. Pickled into worker processes, so it holds names and builds the rest on demand."""

    @property
    @abstractmethod
    def identity(self) -> Identity:
        """What the task's log belongs to."""

    @property
    @abstractmethod
    def space(self) -> SearchSpace:
        """The space to search."""

    @property
    def gpu(self) -> bool:
        """Whether an NVIDIA GPU runs it: :meth:`export` writes a :class:`gf_cuda.Program`; :meth:`load` is unused."""
        return False

    @property
    def suffix(self) -> str:
        """Of the files that :meth:`export` writes."""
        return ".zip" if self.gpu else ".so"

    @abstractmethod
    def module(self) -> Any:
        """The unscheduled IRModule with one PrimFunc "main"."""

    @abstractmethod
    def export(self, schedule: Any, path: Path) -> None:
        """Compile a schedule into a shared library. Raises whatever the compiler raises."""

    @abstractmethod
    def load(self, path: Path) -> Callable[..., None]:
        """Load an exported library; the result takes inputs, then outputs, as contiguous CPU tensors."""

    @abstractmethod
    def inputs(self, seed: int) -> list[torch.Tensor]:
        """Random inputs; equal for equal seeds."""

    @abstractmethod
    def output_specs(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each output."""

    @abstractmethod
    def expected(self, inputs: list[torch.Tensor]) -> Any:
        """What the reference says in float64, in any form that :meth:`excess` takes."""

    @abstractmethod
    def excess(self, outputs: list[torch.Tensor], expected: Any) -> float:
        """The largest error in units of what is allowed: up to 1 is right, NaN counts as infinite."""

    def poison(self, outputs: list[torch.Tensor]) -> None:
        """Fill the outputs with what must not remain in a right result: NaN."""
        for output in outputs:
            output.fill_(float("nan"))

    def target(self) -> Any:
        """The tvm.target.Target of the device."""
        import tvm

        text = self.identity.target
        return tvm.target.Target(json.loads(text) if text.startswith("{") else text)

    def schedule(self, candidate: Candidate) -> Any:
        """The finished schedule (tvm.s_tir.Schedule) of a candidate."""
        if candidate.config is not None:
            return self.space.schedule(dict(candidate.config))
        from tvm.s_tir import Schedule, Trace

        schedule = Schedule(self.module())
        Trace.apply_json_to_schedule(candidate.trace, schedule)
        return schedule


class WorkloadTask(Task):
    """A :class:`~gf_tvm.core.workload.Workload` with the spaces, kernels and references of this package.

    Args:
        workload: what to tune.
        device: name of a device profile.
    """

    def __init__(self, workload: Workload, device: str) -> None:
        self.workload = workload
        self.device = device

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.workload, self.device)

    @cached_property
    def profile(self) -> Any:
        """The device profile."""
        from ..machine.profiles import get_profile

        return get_profile(self.device)

    @property
    def gpu(self) -> bool:
        """Whether the device is an NVIDIA GPU."""
        return self.profile.gpu is not None

    @cached_property
    def identity(self) -> Identity:
        """What the task's log belongs to."""
        return identity_of(self.workload, self.profile)

    @cached_property
    def space(self) -> SearchSpace:
        """The space to search."""
        from ..schedules import get_space

        return get_space(self.workload, self.profile)

    def module(self) -> Any:
        """The unscheduled IRModule."""
        from ..kernels import definition

        return definition(self.workload)

    def export(self, schedule: Any, path: Path) -> None:
        """Compile a schedule for the device: a shared library, or a file of :meth:`gf_cuda.Program.save`."""
        if self.gpu:
            from ..codegen.cuda import compile_program

            made = compile_program(schedule, self.profile)
            made.program.save(str(path), made.source, made.image, made.kind)
            return
        from ..codegen.compile import compile_module, export

        export([compile_module(schedule, self.profile)], path, self.profile)

    def load(self, path: Path) -> Callable[..., None]:
        """Load an exported library; without the compiler, which a board does not have."""
        return _load_main(path)

    def inputs(self, seed: int) -> list[torch.Tensor]:
        """Random inputs."""
        from ..core.verify import random_inputs

        return random_inputs(self.workload, seed)

    def output_specs(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each output."""
        from ..core.verify import argument_specs

        return [(argument.shape, argument.dtype) for argument in argument_specs(self.workload) if argument.output]

    def expected(self, inputs: list[torch.Tensor]) -> Any:
        """See :func:`gf_tvm.core.verify.expected`."""
        from ..core.verify import expected

        return expected(self.workload, inputs)

    def excess(self, outputs: list[torch.Tensor], expected: Any) -> float:
        """See :func:`gf_tvm.core.verify.excess`."""
        from ..core.verify import excess

        return excess(outputs, expected)

    def poison(self, outputs: list[torch.Tensor]) -> None:
        """NaN, but zeros where the caller has to write them: in the rows of grad_x that no patch covers."""
        from ..core.verify import poison

        poison(self.workload, outputs)


#: (dtype, shape) of each argument of a function, in call order.
Arguments = tuple[tuple[str, tuple[int, ...]], ...]


class ArgumentsTask(Task):
    """A compiled function of which only the arguments are known, as MetaSchedule's runners get it.

    It can be loaded and timed. It cannot be checked: any argument may be an output, and there is no reference. All of
    them are random at first (integers are 0, in case they are indices); writing beyond them is still found.

    Args:
        arguments: of numbers, which PyTorch has under the same names.
    """

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.arguments,)

    @cached_property
    def identity(self) -> Identity:
        """For messages; it has no log."""
        key = ", ".join(f"{dtype}[{'x'.join(map(str, shape))}]" for dtype, shape in self.arguments)
        return Identity("", "", key, {}, "")

    @property
    def space(self) -> SearchSpace:
        """Unknown."""
        raise NotImplementedError

    def module(self) -> Any:
        """Unknown."""
        raise NotImplementedError

    def export(self, schedule: Any, path: Path) -> None:
        """Made elsewhere."""
        raise NotImplementedError

    def load(self, path: Path) -> Callable[..., None]:
        """Load a library."""
        return _load_main(path)

    def inputs(self, seed: int) -> list[torch.Tensor]:
        """None: see the class."""
        return []

    def output_specs(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each argument."""
        import torch

        return [(shape, getattr(torch, dtype)) for dtype, shape in self.arguments]

    def expected(self, inputs: list[torch.Tensor]) -> None:
        """Unknown."""

    def excess(self, outputs: list[torch.Tensor], expected: Any) -> float:
        """Any result is taken for right."""
        return 0.0

    def poison(self, outputs: list[torch.Tensor]) -> None:
        """Fill the arguments."""
        import torch

        generator = torch.Generator().manual_seed(0)
        for output in outputs:
            if output.is_floating_point():
                output.normal_(generator=generator)
            else:
                output.zero_()


def _load_main(path: Path) -> Callable[..., None]:
    from ..bundle.runtime import load_library, start_runtime

    start_runtime()
    kernel: Callable[..., None] = load_library(path)["main"]
    return kernel

"""What a worker process does with candidates for an NVIDIA GPU: the requests of :class:`~.worker.Worker`.

Inputs, reference and comparison are those of CPUs; only what the kernel sees lies on the device, by way of the
driver's API alone. PyTorch needs no CUDA for that, and on a Jetson Nano's measuring server it has none.

The context is made in this process and in no other: CUDA does not survive a fork.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from gf_cuda import CompileError, DriverError, NoCompilerError, ProgramError, compile_source, get_driver
from gf_cuda.program import Executable, load_file

from ...machine.cpu import torch_threads, usable_cores
from .worker import GUARD, Worker, guard_value

if TYPE_CHECKING:
    import torch

    from gf_cuda import Device, Program
    from gf_cuda.handles import Event, Memory

    from ..task import Task

# Bytes before and after the scratch memory that a kernel must not write to; a multiple of its alignment.
_SCRATCH_GUARD = 4096
# Every byte of it set is NaN in float32 and float16.
_POISON = 0xFF
# Bytes to write between calls, besides twice the L2 cache: enough for the host to queue the next call meanwhile.
_LEAST_SWEEP = 8 << 20
# Launches that are queued together. The driver's queue holds about a thousand; a full one stops the host.
_QUEUED = 512
# Seconds that the GPU is kept busy at most while the host queues calls.
_LONGEST_LEAD = 0.05
# What the driver says of code is said by this call; CUDA_ERROR_OUT_OF_MEMORY is not about the code.
_LOAD, _NO_MEMORY = "cuModuleLoadDataEx", 2


class GpuWorker(Worker):
    """See the module. Candidates are files of :meth:`gf_cuda.Program.save`; a task's arguments are the program's."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._specs: list[tuple[tuple[int, ...], str]] = []
        self._memory: list[Memory] = []  # of the inputs, then of the outputs with their guard zones
        self._pointers: list[int] = []
        self._executables: dict[str, Executable] = {}
        self._scratch: Memory | None = None
        self._ran = ""
        self._leads = 1

    @cached_property
    def _device(self) -> Device:
        return get_driver().device()

    def prepare(self, seed: int) -> None:
        """Make the inputs and the reference's outputs for ``seed``, and upload the inputs."""
        if self._seed == seed:
            return
        self._seed = None
        while self._memory:
            self._memory.pop().free()
        # Nothing that is timed runs on the CPU, so the float64 reference may have all of it.
        with torch_threads(usable_cores()):
            super().prepare(seed)
        inputs, self._inputs, self._seed = self._inputs, [], None
        self._specs = [_spec(tensor) for tensor in (*inputs, *self._outputs)]
        self._pointers = []
        for tensor in (*inputs, *self._buffers):
            memory = self._device.alloc(tensor.numel() * tensor.element_size())
            self._memory.append(memory)
            self._device.upload(memory.pointer, tensor.numpy())
            self._pointers.append(memory.pointer)
        # A multiple of 16 bytes away from the buffer's begin, which is aligned.
        for index, buffer in enumerate(self._buffers, start=len(inputs)):
            self._pointers[index] += GUARD * buffer.element_size()
        self._seed = seed

    def load(self, name: str, path: Path) -> None:
        """Load a candidate; it is known as ``name`` from now on, and its file may be removed."""
        program, source, image, _ = load_file(str(path))
        given = [(argument.shape, argument.dtype) for argument in program.arguments]
        if given != self._specs:
            # With other sizes it would read and write beyond them, which costs the context.
            wanted = f"{self.task.identity.key} has {_words(self._specs)}"
            raise ProgramError(f"{path.name} is for {_words(given)}; {wanted}")
        self.unload(name)
        self._executables[name] = self._executable(program, source, image)
        needed = program.scratch_bytes + 2 * _SCRATCH_GUARD
        if self._scratch is None or self._scratch.nbytes < needed:
            if self._scratch is not None:
                self._scratch.free()
                self._scratch = None
            self._scratch = self._device.alloc(needed)

    def _executable(self, program: Program, source: str, image: bytes) -> Executable:
        try:
            return Executable(self._device, program, image)
        except (ProgramError, CompileError, DriverError) as error:
            # A driver that is older than the compiler (CUDA 10.2 on a Jetson Nano) need not know its code; such a
            # machine has a compiler of its own. Anything else is the candidate's fault.
            cause = error if isinstance(error, DriverError) else error.__cause__
            if not isinstance(cause, DriverError) or cause.call != _LOAD or cause.sticky or cause.code == _NO_MEMORY:
                raise
            try:
                image, _, _ = compile_source(source, self._device.arch)
            except NoCompilerError as missing:
                raise ProgramError(f"{error}; the source cannot be compiled here either: {missing}") from None
            return Executable(self._device, program, image)

    def unload(self, name: str) -> None:
        """Forget a candidate."""
        executable = self._executables.pop(name, None)
        if executable is not None:
            executable.unload()

    def run(self, name: str) -> None:
        """Run a candidate once on poisoned outputs and scratch memory."""
        assert self._scratch is not None
        self.task.poison(self._outputs)
        for buffer, memory in zip(self._buffers, self._memory[-len(self._buffers) :], strict=True):
            buffer[:GUARD] = buffer[-GUARD:] = guard_value(buffer.dtype)
            self._device.upload(memory.pointer, buffer.numpy())
        self._device.fill(self._scratch.pointer, _POISON, self._scratch.nbytes)
        self._ran = name
        self._launch(name)
        self._device.synchronize()

    def _launch(self, name: str) -> None:
        assert self._scratch is not None
        self._executables[name](self._pointers, self._scratch.pointer + _SCRATCH_GUARD, 0)

    def check(self) -> tuple[float, str]:
        """See :meth:`Worker.check`; compares what lies on the device."""
        import torch

        count = len(self._memory) - len(self._buffers)
        inputs = [torch.empty(shape, dtype=getattr(torch, dtype)) for shape, dtype in self._specs[:count]]
        for tensor, memory in zip((*inputs, *self._buffers), self._memory, strict=True):
            self._device.download_into(memory.pointer, tensor.numpy())
        if self._scratch_overrun():
            return math.inf, "wrote outside its scratch memory"
        self._inputs = inputs
        try:
            with torch_threads(usable_cores()):
                return super().check()
        finally:
            self._inputs = []  # on a Jetson Nano they take the same memory as those on the device

    def _scratch_overrun(self) -> bool:
        assert self._scratch is not None
        size = self._executables[self._ran].program.scratch_bytes
        begin = self._scratch.pointer
        guards = (begin, begin + _SCRATCH_GUARD + size)
        return any(set(self._device.download(guard, _SCRATCH_GUARD)) != {_POISON} for guard in guards)

    # -------------------------------------------------------------------------------------------------------- timing

    def _timer(self, name: str, cold: bool) -> Callable[[int], float]:
        """See :meth:`Worker._timer`: seconds that the GPU takes, between events in its queue."""
        together = max(1, _QUEUED // len(self._executables[name].program.launches))

        def warm(calls: int) -> float:
            return sum(self._seconds(name, min(together, calls - done)) for done in range(0, calls, together))

        def flushed(calls: int) -> float:
            return sum(self._seconds(name, 1) for _ in range(calls))

        return flushed if cold else warm

    def _seconds(self, name: str, calls: int) -> float:
        """Time calls that the host has queued before the GPU comes to them, since Python is slower than most kernels.

        Meanwhile the GPU writes to more memory than its L2 cache holds.
        """
        for last in (False, False, True):
            lead, queueing, seconds = self._try(name, calls)
            # A GPU that takes twice as long for a call as the host never waits for the next one.
            if last or lead >= queueing or seconds > 2 * queueing:
                break
            once = max(lead / self._leads, 1e-6)
            self._leads = max(1, min(math.ceil(1.5 * queueing / once), math.ceil(_LONGEST_LEAD / once)))
        return max(seconds, 1e-9)

    def _try(self, name: str, calls: int) -> tuple[float, float, float]:
        """Seconds: of the GPU before the calls, of the host to queue them, and of the GPU for them."""
        device, (first, begin, end) = self._device, self._events
        first.record()
        for _ in range(self._leads):
            device.fill(self._sweep_memory.pointer, 0, self._sweep_memory.nbytes)
        begin.record()
        start = time.perf_counter()
        for _ in range(calls):
            self._launch(name)
        queueing = time.perf_counter() - start
        end.record()
        end.synchronize()
        return begin.elapsed_ms(first) / 1e3, queueing, end.elapsed_ms(begin) / 1e3

    @cached_property
    def _events(self) -> tuple[Event, Event, Event]:
        return self._device.event(), self._device.event(), self._device.event()

    @cached_property
    def _sweep_memory(self) -> Memory:
        return self._device.alloc(max(2 * self._device.l2_bytes, _LEAST_SWEEP))


def _spec(tensor: torch.Tensor) -> tuple[tuple[int, ...], str]:
    return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")


def _words(specs: list[tuple[tuple[int, ...], str]]) -> str:
    return ", ".join(f"{dtype}[{'x'.join(map(str, shape))}]" for shape, dtype in specs)

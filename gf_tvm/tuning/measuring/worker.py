"""What a worker process does: it builds or runs candidates; one that crashes or hangs takes nothing else along."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...bundle.runtime import start_runtime, without_torch
from ..task import Candidate, Task

if TYPE_CHECKING:
    import torch

# Elements of NaN (or of the largest integer) before and after each output: a kernel that writes there is wrong. A
# multiple of 64 bytes for every dtype, since kernels may assume that alignment.
GUARD = 1024
# Calls before it is decided how often to call.
_TRIES = 10
# Bytes of cache to flush: at least, and where the system does not say how large it is.
_LEAST_CACHE = 4 << 20
_UNKNOWN_CACHE = 32 << 20


class Worker:
    """The requests about one task; their keyword arguments and results are pickled."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._kernels: dict[str, Callable[..., None]] = {}
        self._seed: int | None = None
        self._inputs: list[torch.Tensor] = []
        self._sums: list[int] = []
        self._expected: Any = None
        self._buffers: list[torch.Tensor] = []
        self._outputs: list[torch.Tensor] = []
        self._sweep: torch.Tensor | None = None

    # ------------------------------------------------------------------------------------------------------ building

    def build(self, candidate: Candidate, path: Path) -> None:
        """Compile one candidate."""
        self.task.export(self.task.schedule(candidate), path)

    # ------------------------------------------------------------------------------------------------------- running

    def prepare(self, seed: int) -> None:
        """Make the inputs and the reference's outputs for ``seed``, and room for the kernel's outputs."""
        import torch

        if self._seed == seed:
            return
        # The old ones go first: there need not be room for both.
        self._inputs, self._expected, self._buffers, self._outputs = [], None, [], []
        self._inputs = self.task.inputs(seed)
        self._expected = self.task.expected(self._inputs)
        self._sums = [_checksum(tensor) for tensor in self._inputs]
        for shape, dtype in self.task.output_specs():
            size = torch.Size(shape).numel()
            buffer = torch.full((size + 2 * GUARD,), guard_value(dtype), dtype=dtype)
            self._buffers.append(buffer)
            self._outputs.append(buffer[GUARD : GUARD + size].view(shape))
        self._seed = seed

    def load(self, name: str, path: Path) -> None:
        """Load a library; it is known as ``name`` from now on, and its file may be removed."""
        self._kernels[name] = self.task.load(path)

    def unload(self, name: str) -> None:
        """Forget a library."""
        self._kernels.pop(name, None)

    def run(self, name: str) -> None:
        """Run a library once on poisoned outputs."""
        self.task.poison(self._outputs)
        self._kernels[name](*self._inputs, *self._outputs)

    def check(self) -> tuple[float, str]:
        """Compare what :meth:`run` has left with the reference.

        Returns:
            :meth:`Task.excess <gf_tvm.tuning.task.Task.excess>`, and a line of text if the kernel did what it must not.
        """
        import torch

        if any(_checksum(tensor) != known for tensor, known in zip(self._inputs, self._sums, strict=True)):
            return float("inf"), "wrote to its inputs"
        for buffer in self._buffers:
            guard = torch.cat((buffer[:GUARD], buffer[-GUARD:]))
            if not (torch.isnan(guard) if guard.is_floating_point() else guard == guard_value(guard.dtype)).all():
                return float("inf"), "wrote outside its outputs"
        excess = self.task.excess(self._outputs, self._expected)
        return excess, "" if excess <= 1 else f"its error is {excess:.3g} times what is allowed"

    def time(
        self,
        name: str,
        repeats: int,
        min_seconds: float,
        max_seconds: float,
        cutoff: float = float("inf"),
        cold: bool = False,
        least_calls: int = 1,
    ) -> list[float]:
        """Seconds per call, one figure per repetition. The kernel must have run before.

        Args:
            name: a loaded library.
            repeats: repetitions; fewer, but at least one, if they would take more than ``max_seconds``.
            min_seconds: a repetition calls the kernel so often that it lasts about this long.
            max_seconds: see ``repeats``.
            cutoff: a kernel slower than this is timed once only.
            cold: flush the caches before each call, outside of what is timed.
            least_calls: in a repetition, if ``max_seconds`` allows for them.
        """
        clock = time.perf_counter
        seconds = self._timer(name, cold)
        gc.disable()
        try:
            start = clock()
            once = math.inf
            # The first calls of a short kernel find its code and data in no cache and say little.
            for _ in range(_TRIES):
                once = min(once, seconds(1))
                if clock() - start > min_seconds:
                    break
            if once > cutoff or once > max_seconds:
                return [once]
            calls = max(1, round(min_seconds / once), min(least_calls, int(max_seconds / once)))
            runs: list[float] = []
            while len(runs) < repeats and (not runs or clock() - start + calls * min(runs) < max_seconds):
                runs.append(seconds(calls) / calls)
            return runs
        finally:
            gc.enable()

    def _timer(self, name: str, cold: bool) -> Callable[[int], float]:
        """What calls a kernel so many times and gives the seconds of all calls together."""
        kernel, arguments = self._kernels[name], (*self._inputs, *self._outputs)
        clock = time.perf_counter

        def warm(calls: int) -> float:
            before = clock()
            for _ in range(calls):
                kernel(*arguments)
            return max(clock() - before, 1e-9)

        def flushed(calls: int) -> float:
            total = 0.0
            for _ in range(calls):
                self._flush()
                before = clock()
                kernel(*arguments)
                total += max(clock() - before, 1e-9)
            return total

        return flushed if cold else warm

    def _flush(self) -> None:
        """Leave nothing of the arguments in the caches, by writing to more memory than they hold."""
        import torch

        from ...machine.cpu import last_level_cache_bytes

        if self._sweep is None:
            cache = last_level_cache_bytes() or _UNKNOWN_CACHE
            self._sweep = torch.zeros(2 * max(cache, _LEAST_CACHE) // 4, dtype=torch.float32)
        self._sweep.add_(1)


def guard_value(dtype: torch.dtype) -> float:
    """What stands in the memory around an output."""
    import torch

    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


def _checksum(tensor: torch.Tensor) -> int:
    """Changes with (nearly) every change of a bit in the tensor's memory."""
    import torch

    flat = tensor.view(-1)
    # Words of the size of the sum: others are converted one by one, which takes ten times as long.
    whole = flat.numel() * flat.element_size() // 8 * 8 // flat.element_size()
    rest = flat[whole:].view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    return int(flat[:whole].view(torch.int64).sum()) + int(rest.sum())


class Greeter:
    """The service of a worker that has no task yet."""

    def hello(self, role: str) -> dict[str, Any]:
        """Import what takes long, and say with what this process works."""
        if role == "building":
            with without_torch():
                import tvm  # noqa: F401
        else:
            import torch

            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
            start_runtime()
        import tvm_ffi

        return {"pid": os.getpid(), "threads": int(tvm_ffi.get_global_func("runtime.NumThreads")())}

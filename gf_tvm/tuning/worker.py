"""The process that builds or runs candidates, so that one that crashes or hangs takes nothing else with it.

A worker gets requests from its parent over a socket, one at a time, and answers each with ``(kind, value)``:
``done`` and the result; ``failed`` and a line of text, if the candidate is to blame; ``broken`` and a line of text,
if the machine is (a full disk, no memory). It ends when the socket does, and the kernel ends it with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import math
import os
import resource
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .metaschedule import metaschedule, tune_context
from .task import Candidate, Task

if TYPE_CHECKING:
    import numpy as np
    import torch

_PR_SET_PDEATHSIG = 1
_BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
# Elements of NaN before and after each output: a kernel that writes there is wrong. A multiple of 64 bytes for every
# dtype, since kernels may assume that alignment.
_GUARD = 1024
# Calls before it is decided how often to call.
_TRIES = 10


def hello() -> dict[str, Any]:
    """Import what takes long, and say with what this process works."""
    import torch
    import tvm

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return {"pid": os.getpid(), "threads": int(tvm.get_global_func("runtime.NumThreads")())}


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

    # ------------------------------------------------------------------------------------------------------ building

    def features(self, candidates: Sequence[Candidate]) -> list[np.ndarray | None]:
        """MetaSchedule's per-store features of each candidate, float32 (stores, 164); None for what has none."""
        ms = metaschedule()
        context = tune_context(self.task.module(), self.task.target(), num_threads=1)
        extractor = ms.feature_extractor.PerStoreFeature()
        found: list[np.ndarray | None] = []
        for candidate in candidates:
            try:
                measured = ms.MeasureCandidate(self.task.schedule(candidate), [])
                (tensor,) = extractor.extract_from(context, [measured])
                rows = tensor.numpy().astype("float32")
                found.append(rows if rows.size else None)
            except Exception:  # the schedule's fault, which building it will report
                found.append(None)
        return found

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
            buffer = torch.full((size + 2 * _GUARD,), float("nan"), dtype=dtype)
            self._buffers.append(buffer)
            self._outputs.append(buffer[_GUARD : _GUARD + size].view(shape))
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
            if not (torch.isnan(buffer[:_GUARD]).all() and torch.isnan(buffer[-_GUARD:]).all()):
                return float("inf"), "wrote outside its outputs"
        excess = self.task.excess(self._outputs, self._expected)
        return excess, "" if excess <= 1 else f"its error is {excess:.3g} times what is allowed"

    def time(
        self, name: str, repeats: int, min_seconds: float, max_seconds: float, cutoff: float = float("inf")
    ) -> list[float]:
        """Seconds per call, one figure per repetition. The kernel must have run before.

        Args:
            name: a loaded library.
            repeats: repetitions; fewer, but at least one, if they would take more than ``max_seconds``.
            min_seconds: a repetition calls the kernel so often that it lasts about this long.
            max_seconds: see ``repeats``.
            cutoff: a kernel slower than this is timed once only.
        """
        kernel, arguments = self._kernels[name], (*self._inputs, *self._outputs)
        clock = time.perf_counter
        gc.disable()
        try:
            start = clock()
            once, before = math.inf, start
            # The first calls of a short kernel find its code and data in no cache and say little.
            for _ in range(_TRIES):
                kernel(*arguments)
                now = clock()
                once, before = min(once, max(now - before, 1e-9)), now
                if now - start > min_seconds:
                    break
            if once > cutoff or once > max_seconds:
                return [once]
            calls = range(max(1, round(min_seconds / once)))
            runs: list[float] = []
            while len(runs) < repeats and (not runs or clock() - start + len(calls) * min(runs) < max_seconds):
                before = clock()
                for _ in calls:
                    kernel(*arguments)
                runs.append(max(clock() - before, 1e-9) / len(calls))
            return runs
        finally:
            gc.enable()


def median(runs: Sequence[float]) -> float:
    """The score of a trial."""
    return statistics.median(runs)


def _checksum(tensor: torch.Tensor) -> int:
    """Changes with (nearly) every change of a bit in the tensor's memory."""
    import torch

    words = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    return int(words.sum())


def main(handle: int, parent: int) -> None:
    """Serve requests on the socket ``handle`` until it closes. ``parent`` is the process that must stay alive."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went between starting this process and the line above
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A candidate that asks for more memory than there is must not get others killed in its place.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")
    connection = Connection(handle)
    worker: Worker | None = None
    while True:
        try:
            task, name, arguments = connection.recv()
        except (EOFError, OSError):
            return
        if task is not None:
            worker = Worker(task)
        connection.send(_answer(hello if worker is None else getattr(worker, name), arguments))


def _answer(request: Callable[..., Any], arguments: dict[str, Any]) -> tuple[str, Any]:
    try:
        return "done", request(**arguments)
    except MemoryError:
        return "broken", "not enough memory"
    except Exception as error:
        text = describe(error)
        if isinstance(error, OSError) and error.errno in _BROKEN:
            return "broken", text
        # The linker is a process of its own and reports in words; PyTorch's allocator raises RuntimeError.
        if "No space left on device" in str(error) or "can't allocate memory" in str(error):
            return "broken", text
        return "failed", text


def describe(error: BaseException) -> str:
    """An exception in one line: the first of its lines that says something."""
    lines = [line.strip() for line in str(error).splitlines()]
    text = next((line for line in lines if line and not line.startswith(("Traceback", "File "))), "")
    return f"{type(error).__name__}: {text}"[:500] if text else type(error).__name__

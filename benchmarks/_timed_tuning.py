"""Our tuning loop with a clock in every step, and what times the steps of a build in the builder's process."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from _usage import cpu_seconds

from gf_tvm.codegen import compile as compiler
from gf_tvm.core.workload import Workload
from gf_tvm.tuning import loop, search
from gf_tvm.tuning.log import read_log
from gf_tvm.tuning.loop import tune_tasks
from gf_tvm.tuning.measuring.measurer import Builders, Measurer
from gf_tvm.tuning.measuring.options import MeasureOptions
from gf_tvm.tuning.measuring.process import CandidateFailed, Process
from gf_tvm.tuning.measuring.service import worker_for
from gf_tvm.tuning.measuring.worker import Worker
from gf_tvm.tuning.options import SearchOptions
from gf_tvm.tuning.task import Candidate, Task, WorkloadTask


class Clock:
    """Seconds by the name of what they were spent on."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time added up."""

        def timed(*arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[name] += time.perf_counter() - begin

        return timed


class TimedWorker(Worker):
    """Answers "build" with the seconds of its steps."""

    def build(self, candidate: Candidate, path: Path) -> Counter[str]:  # type: ignore[override]
        """Compile one candidate."""
        clock, task = Clock(), self.task
        module = clock.around("make the IR", task.schedule)(candidate)
        kept = compiler.compile_module, compiler.tir_to_runtime, compiler.subprocess.run
        compiler.compile_module = clock.around("lower", kept[0])
        compiler.tir_to_runtime = clock.around("LLVM: optimize", kept[1])
        compiler.subprocess.run = clock.around("link (g++)", kept[2])
        try:
            clock.around("LLVM: object file", task.export)(module, path)
        finally:
            compiler.compile_module, compiler.tir_to_runtime, compiler.subprocess.run = kept
        seconds = clock.seconds
        seconds["LLVM: object file"] -= seconds["lower"] + seconds["link (g++)"]
        seconds["lower"] -= seconds["LLVM: optimize"]
        return seconds


def timed_service(task: Task | None) -> Any:
    """See :func:`gf_tvm.tuning.measuring.service.worker_for`."""
    return worker_for(None) if task is None else TimedWorker(task)


class TimedBuilders(Builders):
    """Builders that add up what their processes tell."""

    def __init__(self, count: int, folder: Path, seconds: Counter[str]) -> None:
        super().__init__(count, folder)
        self._seconds = seconds

    def _new(self) -> Process:
        return Process("building", 1, self._folder, timed_service)

    def collect(self) -> list[tuple[Hashable, Any, CandidateFailed | None]]:
        """See :meth:`Builders.collect`."""
        found = super().collect()
        for _, seconds, failure in found:
            if failure is None:
                self._seconds.update(seconds)
        return found


class TimedMeasurer(Measurer):
    """Measures on this machine; ``built`` has seconds of all builders together."""

    def __init__(self, options: MeasureOptions, built: Counter[str]) -> None:
        super().__init__(options)
        self._built = built

    def __enter__(self) -> TimedMeasurer:
        super().__enter__()
        self._builders = TimedBuilders(self.options.builders, self._scratch.folder, self._built)
        return self


#: Steps on the measuring process's side, by the request that makes them.
REQUESTS = {
    "prepare": "make the inputs and their float64 reference",
    "load": "load",
    "run": "run once on poisoned outputs",
    "check": "compare with float64",
    "time": "warm up and time",
    "unload": "unload",
}


def run_ours(workload: Workload, trials: int, threads: int, logs: Path, seed: int) -> dict[str, Any]:
    """Tune once; seconds of each step, trials a minute, and what was found.

    ``split`` adds up to ``seconds`` but for what is left over: builders' seconds are divided by their number.
    """
    task, built, clock = WorkloadTask(workload, "host"), Counter[str](), Clock()
    marks: dict[str, float] = {}
    options = MeasureOptions(threads=threads, builders=threads)
    kept = Process.call, Process.start, search.ConfigSearch.propose, loop.TaskRun.confirm

    def call(self: Process, task: Task | None, request: Callable[..., Any], timeout: float, /, **arguments: Any) -> Any:
        self.start()
        name = REQUESTS[request.__name__] if "confirm" not in marks else "final comparison"
        return clock.around(name, kept[0])(self, task, request, timeout, **arguments)

    def confirm(self: Any) -> None:
        marks["confirm"] = time.monotonic()
        kept[3](self)

    Process.call = call  # type: ignore[method-assign]
    Process.start = clock.around("start the processes", kept[1])  # type: ignore[method-assign]
    search.ConfigSearch.propose = clock.around("propose (cost model)", kept[2])  # type: ignore[method-assign]
    loop.TaskRun.confirm = confirm  # type: ignore[method-assign]
    begin, busy = time.monotonic(), cpu_seconds()
    try:
        summary = tune_tasks(
            [task],
            SearchOptions(trials=trials, seed=seed),
            logs=logs,
            options=options,
            measurer=TimedMeasurer(options, built),
        )
    finally:
        Process.call, Process.start, search.ConfigSearch.propose, loop.TaskRun.confirm = kept  # type: ignore[method-assign]
    (done,) = summary.tasks
    seconds = marks["confirm"] - begin
    builds = {name: value / options.builders for name, value in built.items()}
    split = {**builds, **{name: value for name, value in clock.seconds.items() if name != "final comparison"}}
    records = [record for record in read_log(Path(done.log)).records if record.kind == "trial"]
    return {
        "trials": done.measured,
        "failed": done.failed,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds() - busy,
        "final_comparison_seconds": summary.seconds - seconds,
        "trials_per_minute": 60 * done.measured / seconds,
        "best_ms": None if done.seconds is None else done.seconds * 1e3,
        "default_ms": None if done.default_seconds is None else done.default_seconds * 1e3,
        "split": split,
        "configs": [record.config for record in records],
        "ms": [None if record.seconds is None else record.seconds * 1e3 for record in records],
    }

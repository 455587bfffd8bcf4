"""Runs built candidates in a process of their own and says what became of each: on this machine, or on a board."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from ..task import Task, TuningError
from .options import MeasureOptions
from .process import CandidateFailed, Ended, Process
from .result import Result
from .service import worker_for
from .worker import Worker

PREPARE_SECONDS = 900.0  # inputs and the float64 reference of the largest workload, on a slow board
COMPARE_SECONDS = 300.0  # comparing its outputs


class MeasuringProcess:
    """A process that runs candidates, started when it is needed, and again after one that took it down.

    Args:
        options: how to measure.
        folder: for its output.
        fork: see :class:`~gf_tvm.tuning.measuring.process.Process`.
    """

    def __init__(self, options: MeasureOptions, folder: Path, fork: bool = False) -> None:
        self.options = options
        self._folder = folder
        self._fork = fork
        self._process: Process | None = None

    def start(self) -> None:
        """Start the process, without waiting until it can work."""
        if self._process is None:
            self._process = self._new_process()

    def _new_process(self) -> Process:
        return Process("measuring", self.options.threads, self._folder, worker_for, fork=self._fork)

    def prepare(self, task: Task, seed: int) -> Process:
        """The process that measures, with the inputs and the reference of ``seed`` at hand.

        Raises:
            TuningError: it does not start, or cannot compute the reference.
        """
        if self._process is None or not self._process.alive:
            self.end()
            self._process = self._new_process()
        try:
            self._process.call(task, Worker.prepare, PREPARE_SECONDS, seed=seed)
        except (CandidateFailed, Ended) as error:
            raise TuningError(f"{task.identity.key}: cannot compute the reference: {error}") from None
        return self._process

    def end(self) -> None:
        """End the process; harmless when repeated."""
        if self._process is not None:
            self._process.end()
            self._process = None

    def run(self, task: Task, library: Path, best: float | None = None) -> Result:
        """Check a built candidate against the reference, then time it.

        Args:
            task: what it was built for.
            library: a library that a builder made.
            best: seconds of the fastest so far.
        """
        options = self.options
        for last in (False, True):
            process = self.prepare(task, seed=0)
            try:
                process.call(task, Worker.load, options.run_timeout, name="candidate", path=library)
                excess, complaint = self._check(process, task, "candidate")
                if complaint:
                    return Result("wrong", excess=excess, message=complaint)
                runs = process.call(
                    *(task, Worker.time, options.run_timeout + 2 * options.max_seconds),
                    name="candidate",
                    repeats=options.repeats,
                    min_seconds=options.min_seconds,
                    max_seconds=options.max_seconds,
                    cutoff=best * options.cutoff if best else float("inf"),
                    cold=options.cold,
                    least_calls=options.least_calls,
                )
                process.call(task, Worker.unload, options.run_timeout, name="candidate")
                return Result("ok", tuple(runs), excess)
            except CandidateFailed as failure:
                return _failed_run(failure)
            except Ended as ended:
                if last or not ended.killed:
                    return Result("crash", message=f"while running: {ended}")
        raise AssertionError("not reached")

    def _check(self, process: Process, task: Task, name: str) -> tuple[float | None, str]:
        process.call(task, Worker.run, self.options.run_timeout, name=name)
        excess, complaint = process.call(task, Worker.check, COMPARE_SECONDS)
        if complaint:
            # What else it has written to, nobody knows.
            self.end()
        return (excess if math.isfinite(excess) else None), complaint

    def compare(
        self, task: Task, libraries: Mapping[str, Path], seed: int, progress: Callable[[int, int], None] | None = None
    ) -> dict[str, Result]:
        """Check candidates on other inputs than before and measure them in turns, so that all see the same machine.

        Args:
            task: what they were built for.
            libraries: by a name of the caller's.
            seed: of the inputs; not 0, which :meth:`run` uses.
            progress: called with (rounds made, rounds).

        Returns:
            A result for each name; one that fails does not keep the others from being measured.
        """
        options = self.options
        failed: dict[str, Result] = {}
        while True:
            runs: dict[str, list[float]] = {name: [] for name in libraries if name not in failed}
            if not runs:
                return failed
            excesses: dict[str, float | None] = {}
            name = ""
            try:
                process = self.prepare(task, seed)
                for name in runs:
                    process.call(task, Worker.load, options.run_timeout, name=name, path=libraries[name])
                    excesses[name], complaint = self._check(process, task, name)
                    if complaint:
                        failed[name] = Result("wrong", excess=excesses[name], message=complaint)
                        break
                else:
                    for done in range(options.rounds):
                        for name in runs:
                            runs[name] += process.call(
                                *(task, Worker.time, options.run_timeout + 2 * options.max_seconds),
                                name=name,
                                repeats=1,
                                min_seconds=options.min_seconds,
                                max_seconds=options.max_seconds,
                                cold=options.cold,
                            )
                        if progress is not None:
                            progress(done + 1, options.rounds)
                    for name in runs:
                        process.call(task, Worker.unload, options.run_timeout, name=name)
                    good = {name: Result("ok", tuple(runs[name]), excesses[name]) for name in runs}
                    return {**failed, **good}
            except CandidateFailed as failure:
                failed[name] = _failed_run(failure)
                self.end()
            except Ended as ended:
                failed[name] = Result("crash", message=f"while running: {ended}")


def _failed_run(failure: CandidateFailed) -> Result:
    return Result("run" if failure.status == "failed" else failure.status, message=f"while running: {failure}")

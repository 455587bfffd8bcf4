"""Runs built candidates in a process of their own and says what became of each: on this machine, or on a board."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..task import Task, TuningError
from .process import CandidateFailed, Ended, Process
from .worker import median

PREPARE_SECONDS = 900.0  # inputs and the float64 reference of the largest workload, on a slow board
COMPARE_SECONDS = 300.0  # comparing its outputs


@dataclass(frozen=True)
class Options:
    """How to measure.

    Args:
        threads: threads of the kernels.
        builders: processes that build.
        repeats: repetitions of a measurement; the score is their median.
        min_seconds: least duration of one repetition.
        max_seconds: most time for all repetitions of a candidate.
        build_timeout, run_timeout: seconds until a build, or one call of a kernel, counts as hung.
        cutoff: a candidate that is so many times slower than the best is timed only once.
        final: how many of the fastest candidates the final comparison takes.
        rounds: repetitions of the final comparison; in each round every candidate runs once.
        cold: drive the arguments out of the caches before each call: what a kernel meets whose inputs were made long
            ago. By default they are warm.
        least_calls: in one repetition of a trial, if ``max_seconds`` allows for them.
    """

    threads: int = 1
    builders: int = 1
    repeats: int = 5
    min_seconds: float = 0.01
    max_seconds: float = 1.0
    build_timeout: float = 120.0
    run_timeout: float = 30.0
    cutoff: float = 3.0
    final: int = 4
    rounds: int = 9
    cold: bool = False
    least_calls: int = 1

    def to_dict(self) -> dict[str, Any]:
        """What a log's header tells about the measurement."""
        names = ("repeats", "min_seconds", "max_seconds", "final", "rounds")
        return {**{name: getattr(self, name) for name in names}, "cache": "cold" if self.cold else "warm"}


@dataclass(frozen=True)
class Result:
    """What became of a candidate; the fields are those of :class:`~gf_tvm.tuning.log.Record`."""

    status: str
    runs: tuple[float, ...] = ()
    excess: float | None = None
    message: str = ""
    board: dict[str, Any] | None = None

    @property
    def seconds(self) -> float | None:
        """The median of the repetitions."""
        return median(self.runs) if self.runs else None


class Runner:
    """A process that runs candidates, started when it is needed, and again after one that took it down.

    Args:
        options: how to measure.
        folder: for its output.
        fork: see :class:`~gf_tvm.tuning.measuring.process.Process`.
    """

    def __init__(self, options: Options, folder: Path, fork: bool = False) -> None:
        self.options = options
        self._folder = folder
        self._fork = fork
        self._process: Process | None = None

    def start(self) -> None:
        """Start the process, without waiting until it can work."""
        if self._process is None:
            self._process = self._new_process()

    def _new_process(self) -> Process:
        return Process("measuring", self.options.threads, self._folder, fork=self._fork)

    def prepare(self, task: Task, seed: int) -> Process:
        """The process that measures, with the inputs and the reference of ``seed`` at hand.

        Raises:
            TuningError: it does not start, or cannot compute the reference.
        """
        if self._process is None or not self._process.alive:
            self.end()
            self._process = self._new_process()
        try:
            self._process.call(task, "prepare", PREPARE_SECONDS, seed=seed)
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
            runner = self.prepare(task, seed=0)
            try:
                runner.call(task, "load", options.run_timeout, name="candidate", path=library)
                excess, complaint = self._check(runner, task, "candidate")
                if complaint:
                    return Result("wrong", excess=excess, message=complaint)
                runs = runner.call(
                    *(task, "time", options.run_timeout + 2 * options.max_seconds),
                    name="candidate",
                    repeats=options.repeats,
                    min_seconds=options.min_seconds,
                    max_seconds=options.max_seconds,
                    cutoff=best * options.cutoff if best else float("inf"),
                    cold=options.cold,
                    least_calls=options.least_calls,
                )
                runner.call(task, "unload", options.run_timeout, name="candidate")
                return Result("ok", tuple(runs), excess)
            except CandidateFailed as failure:
                return _failed_run(failure)
            except Ended as ended:
                if last or not ended.killed:
                    return Result("crash", message=f"while running: {ended}")
        raise AssertionError("not reached")

    def _check(self, runner: Process, task: Task, name: str) -> tuple[float | None, str]:
        runner.call(task, "run", self.options.run_timeout, name=name)
        excess, complaint = runner.call(task, "check", COMPARE_SECONDS)
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
                runner = self.prepare(task, seed)
                for name in runs:
                    runner.call(task, "load", options.run_timeout, name=name, path=libraries[name])
                    excesses[name], complaint = self._check(runner, task, name)
                    if complaint:
                        failed[name] = Result("wrong", excess=excesses[name], message=complaint)
                        break
                else:
                    for done in range(options.rounds):
                        for name in runs:
                            runs[name] += runner.call(
                                *(task, "time", options.run_timeout + 2 * options.max_seconds),
                                name=name,
                                repeats=1,
                                min_seconds=options.min_seconds,
                                max_seconds=options.max_seconds,
                                cold=options.cold,
                            )
                        if progress is not None:
                            progress(done + 1, options.rounds)
                    for name in runs:
                        runner.call(task, "unload", options.run_timeout, name=name)
                    good = {name: Result("ok", tuple(runs[name]), excesses[name]) for name in runs}
                    return {**failed, **good}
            except CandidateFailed as failure:
                failed[name] = _failed_run(failure)
                self.end()
            except Ended as ended:
                failed[name] = Result("crash", message=f"while running: {ended}")


def _failed_run(failure: CandidateFailed) -> Result:
    return Result("run" if failure.status == "failed" else failure.status, message=f"while running: {failure}")

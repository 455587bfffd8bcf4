"""Measures on a farm: all free boards of a tracker at once, while this machine builds the next candidates.

One loop watches the builders and the boards' sessions (:mod:`~gf_tvm.tuning.measuring.board`). Every step on a board
has a deadline. What goes wrong there is one of two things:

* the candidate's doing: the board says so (crash, timeout, wrong, ...), which is the candidate's result;
* the board's, the network's or the tracker's (:data:`~gf_tvm.tuning.measuring.health.TROUBLES`): the candidate is
  measured again, if possible on another board, and neither the log nor the cost model hears of it.

A board that fails again and again, or whose speed drifts, is put aside for a while; one that is hot or throttled
cools down first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ...farm.protocol import show
from ..task import Candidate, Task, TuningError, WorkloadTask
from .board import BoardSession
from .board_link import HELD, State
from .farm_run import FarmRun
from .jobs import LOSSES, Job
from .measurer import CandidateSource, Measurer, Notify, failed_build
from .messages import task_values
from .options import FarmOptions, MeasureOptions
from .process import TICK, CandidateFailed
from .reference import ReferenceKernel
from .result import Result
from .tracker_watch import TrackerWatch
from .worker import Worker

# Between two lines about how far it is.
_TELL_SECONDS = 0.5
_AT_WORK = frozenset({State.PREPARING, State.UPLOADING, State.RUNNING})
# Seconds that a comparison of large kernels may take on a slow board.
_LONGEST_JOB = 7200.0
# Sessions that ask the tracker for a board at the same time.
_MOST_ASKING = 4
# Boards whose names such a line has.
_MOST_NAMED = 3

#: Gives libraries that were built elsewhere; see :meth:`FarmMeasurer.measure_built`.
BuiltSource = Callable[[], Sequence[tuple[Task, Candidate, Path]]]


class FarmMeasurer(Measurer):
    """Builds on this machine and measures on a farm.

    Args:
        options: how to measure; ``builders`` are this machine's.
        farm: where the boards are.
        description: of the kind of board, for the logs' headers.
        reference: see :func:`~gf_tvm.tuning.measuring.reference.reference_task`; None does without.
        arch: of the boards' GPUs, if they are to measure with them ("sm_53").

    Raises:
        FarmError: on entering: no tracker, or no board with the key, or none with such a GPU.
        TuningError: while measuring: no board for too long, or no room for the candidates' libraries.
    """

    def __init__(
        self,
        options: MeasureOptions,
        farm: FarmOptions,
        description: str,
        reference: WorkloadTask | None = None,
        arch: str = "",
    ) -> None:
        super().__init__(options)
        self._farm = farm
        self._description = description
        self._sessions: list[BoardSession] = []
        kernel = None if reference is None else ReferenceKernel(reference)
        self._run = FarmRun(options, farm, arch, kernel, boards=self._sessions)
        self._jobs = self._run.jobs
        self._tracker = TrackerWatch(self._run)
        # What the builders were asked for, by a number: ("build", n), ("reference", n), or ("asked", n) by _map.
        self._requests = 0
        self._building: dict[int, tuple[Task, Candidate, Path]] = {}
        self._answers: dict[tuple[str, int], tuple[Any, CandidateFailed | None]] = {}
        self._last_work = 0.0
        self._wakes: list[Connection] = []
        self._told = ("", "")
        self._results: tuple[int, bool] = (0, False)
        self._tell_at = 0.0

    # --------------------------------------------------------------------------------------------------- the outer face

    def __enter__(self) -> FarmMeasurer:
        self._tracker.start(self._run.arch)
        self._run.emulated = self._tracker.emulated
        super().__enter__()
        self._last_work = time.monotonic()
        return self

    def close(self) -> None:
        """End all sessions and workers; harmless when repeated."""
        for session in self._sessions:
            session.hang_up()
        super().close()

    @property
    def made(self) -> dict[str, Any]:
        """See :meth:`Measurer.made`. The CPU or GPU is the kind of board: each trial names its board."""
        made = {
            "gpu" if self._run.arch else "cpu": self._description,
            "threads": self.options.threads,
            "measurement": self.options.to_dict(),
            "farm": self._farm.key,
        }
        return {**made, "emulated": True} if self._run.emulated else made

    @property
    def parallel(self) -> int:
        """Candidates that can be in work at once."""
        return self.options.builders + max(len(self._sessions), len(self._tracker.listed))

    @property
    def boards(self) -> tuple[int, int]:
        """How many boards are at work, and how many there are."""
        return self._working, max(len(self._tracker.listed), self._run.connected)

    @property
    def trials_by_board(self) -> dict[str, int]:
        """How many candidates each board has measured, by its name."""
        return {name: health.trials for name, health in self._run.health.boards.items()}

    @property
    def report(self) -> dict[str, Any]:
        """By board: trials, and how often each of :data:`~gf_tvm.tuning.measuring.health.TROUBLES`
        happened; "" is where no board is known."""
        return {
            "key": self._farm.key,
            "tracker": show(self._farm.tracker),
            "emulated": self._run.emulated,
            "boards": self._run.health.report(),
        }

    def _map(
        self, task: Task, request: Callable[..., Any], jobs: Sequence[dict[str, Any]]
    ) -> Generator[tuple[int, Any, CandidateFailed | None], None, None]:
        """See :meth:`Measurer._map`; boards go on meanwhile."""
        asked: dict[tuple[str, int], int] = {}
        for index, job in enumerate(jobs):
            key = self._new_key("asked")
            asked[key] = index
            self._builders.submit(key, task, request, self.options.build_timeout, True, **job)
        while asked:
            self._step()
            for key in [key for key in asked if key in self._answers]:
                value, failure = self._answers.pop(key)
                yield asked.pop(key), value, failure

    def measure(
        self,
        task: Task,
        source: CandidateSource,
        best: Callable[[], float | None],
        over: Callable[[], bool],
        say: Notify,
    ) -> Generator[tuple[Candidate, Result | None], None, None]:
        """See :meth:`Measurer.measure`; candidates are yielded as they are done, in any order."""
        task_values(task)
        self._begin(best)
        try:
            while not over():
                room = self._room()
                if room > 0:
                    for candidate in source(room):
                        self._build(task, candidate)
                if not (self._building or self._jobs.waiting or self._jobs.done or self._working):
                    return
                self._step()
                yield from self._news(say, progress=True)
        finally:
            self._abandon()

    def measure_built(
        self, source: BuiltSource, wake: Connection, over: Callable[[], bool], say: Notify
    ) -> Generator[tuple[Candidate, Result | None], None, None]:
        """Measure libraries that were built elsewhere, and which stay.

        Args:
            source: gives those that have come in.
            wake: is ready to be read when there are more, or when it is over.
            over: whether to stop.
            say: see :data:`~gf_tvm.tuning.measuring.measurer.Notify`.

        Yields:
            See :meth:`measure`.
        """
        self._begin(lambda: None)
        self._wakes = [wake]
        try:
            while not over():
                for task, candidate, path in source():
                    self._jobs.waiting.append(Job(task, {"candidate": path}, candidate, keep=True))
                self._step()
                yield from self._news(say)
        finally:
            self._wakes = []
            self._abandon()

    def run(self, task: Task, library: Path, best: float | None = None) -> Result:
        """Measure one library on some board. Raises TuningError if it was given up."""
        candidate = Candidate.of_config({"library": str(library)})
        self._jobs.waiting.append(Job(task, {"candidate": library}, candidate, keep=True))
        self._begin(lambda: best)
        while not self._jobs.done:
            self._step()
        _, result = self._jobs.done.popleft()
        if result is None:
            raise TuningError(f"{library.name}: {LOSSES} boards were lost with it")
        return result

    def compare(
        self,
        task: Task,
        libraries: Mapping[str, Path],
        seed: int,
        over: Callable[[], bool] = lambda: False,
        say: Notify = lambda kind, line: None,
    ) -> dict[str, Result] | None:
        """See :meth:`Measurer.compare`; all of it on one board. Raises TuningError if several are lost over it."""
        if not libraries:
            return {}
        job = Job(task, dict(libraries), None, seed)
        self._jobs.compared = None
        self._last_work = time.monotonic()
        self._jobs.waiting.append(job)
        try:
            while self._jobs.compared is None:
                if len(job.lost_on) >= LOSSES:
                    raise TuningError(f"{task.identity.key}: the final comparison failed on {', '.join(job.lost_on)}")
                if over():
                    say("note", f"no time is left for the final comparison; it waits for {self._waits}")
                    return None
                self._step()
                self._tell_notes(say)
                self._tell_progress(say, "compare", f"comparing, waits for {self._waits}")
            return self._jobs.compared
        finally:
            self._tell_notes(say)
            self._abandon()

    def _begin(self, best: Callable[[], float | None]) -> None:
        self._run.best = best
        self._last_work = time.monotonic()

    def _news(self, say: Notify, progress: bool = False) -> Generator[tuple[Candidate, Result | None], None, None]:
        """Tell what has happened, and yield what is done."""
        self._tell_notes(say)
        if progress:
            line = f"{len(self._building)} in building, {len(self._jobs.waiting)} waiting for a board"
            self._tell_progress(say, "build", line if self._run.connected else f"{line}, waits for {self._waits}")
        while self._jobs.done:
            yield self._jobs.done.popleft()

    def _tell_notes(self, say: Notify) -> None:
        while self._run.notes:
            say("note", self._run.notes.popleft())

    def _tell_progress(self, say: Notify, kind: str, line: str) -> None:
        """Tell how far it is, unless that is known or was told just now: whoever listens may write all of it down."""
        now = time.monotonic()
        if kind != self._told[0] or (line != self._told[1] and now >= self._tell_at):
            self._told, self._tell_at = (kind, line), now + _TELL_SECONDS
            say(kind, line)

    @property
    def _waits(self) -> str:
        """For whom the run waits, for people."""
        at_work = [session for session in self._sessions if session.job is not None]
        waited = [session.status for session in at_work or self._sessions if session.state is not State.FREE]
        more = f" and {len(waited) - _MOST_NAMED} more" if len(waited) > _MOST_NAMED else ""
        return ", ".join(waited[:_MOST_NAMED]) + more if waited else "a board"

    def _abandon(self) -> None:
        """Forget what is not done: a session that works on it is closed."""
        self._builders.drop()
        for _, _, path in self._building.values():
            self.discard(path)
        self._building.clear()
        self._jobs.clear()
        for session in self._sessions:
            session.abandon()

    # -------------------------------------------------------------------------------------------------------- building

    def _new_key(self, kind: str) -> tuple[str, int]:
        self._requests += 1
        return kind, self._requests

    def _build(self, task: Task, candidate: Candidate) -> None:
        key = self._new_key("build")
        path = self._scratch.new_path(task.suffix)
        self._building[key[1]] = task, candidate, path
        self._builders.submit(*(key, task, Worker.build, self.options.build_timeout), candidate=candidate, path=path)

    def _build_reference(self) -> None:
        """Build the reference kernel, if boards are to run it and nobody has asked for it yet."""
        reference = self._run.watched
        if reference is None or reference.path is not None:
            return
        reference.path = self._scratch.new_path(reference.task.suffix)
        self._builders.submit(
            *(self._new_key("reference"), reference.task, Worker.build, self.options.build_timeout),
            candidate=Candidate.of_config(reference.task.space.default),
            path=reference.path,
        )

    def _take_built(self, key: Any, value: Any, failure: CandidateFailed | None) -> None:
        kind, number = key
        reference = self._run.reference
        if kind == "build" and number in self._building:
            task, candidate, path = self._building.pop(number)
            if failure is None:
                self._jobs.waiting.append(Job(task, {"candidate": path}, candidate))
            else:
                self._jobs.done.append((candidate, failed_build(failure)))
        elif kind == "reference" and reference is not None:
            if failure is None:
                reference.library = reference.path
                return
            self._run.notes.append(f"the reference kernel does not build, boards are not watched for drift: {failure}")
            self._run.reference = None
        else:
            self._answers[key] = (value, failure)

    # -------------------------------------------------------------------------------------------------------- the loop

    @property
    def _working(self) -> int:
        """Boards with a job."""
        return sum(session.job is not None for session in self._sessions)

    def _room(self) -> int:
        """How many more candidates to take, so that neither builders nor boards wait: few, to learn from the last."""
        boards = max(1, self._run.connected)
        depth = self.options.builders + 2 * boards
        room = depth - len(self._building) - len(self._jobs.waiting) - self._working
        # In portions: each proposal costs a ranking of many candidates.
        return room if room >= max(1, depth // 3) else 0

    def _step(self) -> None:
        """Wait until something happens, for a second at most, and deal with it."""
        now = time.monotonic()
        self._tracker.look(now)
        self._build_reference()
        self._keep_sessions(now)
        waited = [(session, process) for session in self._sessions if (process := session.waited_for) is not None]
        if not any(session.state is State.FREE and session.has_work for session in self._sessions):
            connections = [process.connection for _, process in waited]
            left = [process.seconds_left for _, process in waited]
            # One whose time has come and which is not open waits for something else.
            times = [session.retry_at for session in self._sessions if session.state is State.CLOSED]
            retries = [at - now for at in times if at > now]
            wait(
                [*connections, *self._builders.connections(), *self._wakes],
                max(0.0, min(TICK, self._builders.seconds_left, *left, *retries)),
            )
        for key, value, failure in self._builders.collect():
            self._take_built(key, value, failure)
        for session, process in waited:
            if process.overdue:
                session.take_answer()
        for session in self._sessions:
            session.watch(self._tracker.last_sign(session.name))
            if session.state is State.FREE:
                session.give_work()
        self._check_patience()

    def _keep_sessions(self, now: float) -> None:
        """One session for each board that is there; those that have none ask the tracker for one."""
        wanted = max(1, len(self._tracker.listed))
        if self._farm.boards is not None:  # which those that are refused do not fill
            wanted = min(wanted, self._farm.boards + sum(bool(session.refused) for session in self._sessions))
        idle = sum(session.state in (State.STARTING, State.CONNECTING) for session in self._sessions)
        held = sum(session.state in HELD for session in self._sessions)
        # Few ask at a time: the list may name boards that nobody ever gets, and each process takes memory.
        most = min(wanted, held + _MOST_ASKING)
        while len(self._sessions) < most:
            self._sessions.append(BoardSession(len(self._sessions), self._run))
        for session in self._sessions:
            if session.state is State.CLOSED and now >= session.retry_at and idle + held < most:
                idle += 1
                session.open(self._scratch.folder)

    def _check_patience(self) -> None:
        """Raise TuningError if no board was at work for too long, or none ever will be."""
        held = [session for session in self._sessions if session.state in HELD]
        asking = any(session.state in (State.STARTING, State.CONNECTING) for session in self._sessions)
        if held and not asking and len(held) >= len(self._tracker.listed) and all(one.refused for one in held):
            reasons = "; ".join(f"{session.label}: {session.refused}" for session in held[:_MOST_NAMED])
            raise TuningError(f"no board with the key {self._farm.key!r} can be used: {reasons}")
        # Only results count: a board that is put aside, comes back and fails again is of no more use than none.
        results = sum(health.trials for health in self._run.health.boards.values()), self._jobs.compared is not None
        if results != self._results or not (self._jobs.waiting or self._working):
            self._results, self._last_work = results, time.monotonic()
            return
        passed = time.monotonic() - self._last_work
        limit = 60 * self._farm.patience_minutes
        if passed > limit + (_LONGEST_JOB if any(session.state in _AT_WORK for session in self._sessions) else 0):
            raise TuningError(
                f"no board with the key {self._farm.key!r} was at work for {self._farm.patience_minutes:g} minutes"
                + (f": {self._tracker.gone}" if self._tracker.gone else f"; it waited for {self._waits}")
            )

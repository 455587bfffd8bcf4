"""Builds candidates on this machine, and measures them here too.

All candidates of a batch are built first, in as many processes as there are cores; then they run, one after another,
in one process with nothing beside it. What goes wrong is either the candidate's doing, and becomes its
:class:`~gf_tvm.tuning.measuring.result.Result`, or the machine's, and raises :class:`~gf_tvm.tuning.task.TuningError`:
a full disk must not make a schedule look slow.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..task import Candidate, Task, TuningError
from .measuring_process import MeasuringProcess
from .options import MeasureOptions
from .process import TICK, CandidateFailed, Ended, Process
from .result import Result
from .service import worker_for
from .worker import Worker

if TYPE_CHECKING:
    from ...machine.gpu import GpuInfo

_SCRATCH = "gf_tvm-tune-"
_SCRATCH_GRACE = 3600.0  # seconds

#: Proposes up to so many candidates; none if no more are wanted now.
CandidateSource = Callable[[int], Sequence[Candidate]]
#: Tells what goes on: "build" or "compare" and a line that the next one replaces, or "note" and a line that stays.
Notify = Callable[[str, str], None]


class Scratch:
    """A folder for what a run builds; a context manager that removes it, and what killed runs have left."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._lock = -1
        self._count = 0

    @property
    def folder(self) -> Path:
        """The folder; only while the context is entered."""
        assert self._folder is not None
        return self._folder

    def new_path(self, suffix: str) -> Path:
        """A path that was never given before: the loader would give the library that it knows by that name."""
        self._count += 1
        return self.folder / f"{self._count}{suffix}"

    def __enter__(self) -> Scratch:
        _clean_scratch()
        try:
            self._folder = Path(tempfile.mkdtemp(prefix=_SCRATCH))
            # Locked before it gets the name by which other runs tell that this folder is in use.
            self._lock = os.open(self._folder / "new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            os.rename(self._folder / "new", self._folder / "lock")
        except OSError as error:
            self.close()
            raise TuningError(f"{tempfile.gettempdir()}: cannot keep libraries here: {error.strerror}") from None
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder; harmless when repeated."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


@dataclass
class _Request:
    key: Hashable
    task: Task
    request: Callable[..., Any]
    timeout: float
    arguments: dict[str, Any]
    again: bool = field(default=False)


class Builders:
    """Processes that answer requests about candidates, in the order in which they were made.

    Args:
        count: processes; started when the first request is made.
        folder: for their output.
    """

    def __init__(self, count: int, folder: Path) -> None:
        self._count = count
        self._folder = folder
        self._processes: list[Process] = []
        self._waiting: deque[_Request] = deque()
        self._working: dict[int, _Request] = {}

    def start(self) -> None:
        """Start all processes at once: what they import takes seconds."""
        if not self._processes:
            self._processes = [self._new() for _ in range(self._count)]

    def _new(self) -> Process:
        return Process("building", 1, self._folder, worker_for)

    def submit(
        self,
        key: Hashable,
        task: Task,
        request: Callable[..., Any],
        timeout: float,
        first: bool = False,
        /,
        **arguments: Any,
    ) -> None:
        """Make a request; :meth:`collect` gives its answer with ``key``. ``first`` puts it before all that wait.

        The others are those of :meth:`Process.send <gf_tvm.tuning.measuring.process.Process.send>`.
        """
        self.start()
        made = _Request(key, task, request, timeout, arguments)
        if first:
            self._waiting.appendleft(made)
        else:
            self._waiting.append(made)
        self._fill()

    @property
    def pending(self) -> int:
        """Requests without an answer."""
        return len(self._waiting) + len(self._working)

    def connections(self) -> list[Connection]:
        """What becomes ready when there may be something to collect."""
        return [self._processes[slot].connection for slot in self._working]

    @property
    def seconds_left(self) -> float:
        """Until the next answer is overdue."""
        return min((self._processes[slot].seconds_left for slot in self._working), default=TICK)

    def collect(self) -> list[tuple[Hashable, Any, CandidateFailed | None]]:
        """The answers that are there: (key, value, failure). Does not wait for others."""
        found: list[tuple[Hashable, Any, CandidateFailed | None]] = []
        for slot in list(self._working):
            process = self._processes[slot]
            if not process.overdue:
                continue
            if not process.started:
                process.start()
                continue
            request = self._working.pop(slot)
            try:
                found.append((request.key, process.receive(), None))
            except CandidateFailed as failure:
                found.append((request.key, None, failure))
            except Ended as ended:
                if ended.killed and not request.again:
                    request.again = True
                    self._waiting.append(request)
                else:
                    found.append((request.key, None, CandidateFailed("crash", str(ended))))
        self._fill()
        return found

    def _fill(self) -> None:
        for slot in range(len(self._processes)):
            if self._waiting and slot not in self._working:
                if not self._processes[slot].alive:
                    self._processes[slot].end()
                    self._processes[slot] = self._new()
                request = self._waiting.popleft()
                self._working[slot] = request
                self._processes[slot].send(request.task, request.request, request.timeout, **request.arguments)

    def drop(self) -> None:
        """Forget all requests. What is being worked on is ended: its answer would be taken for the next one's."""
        self._waiting.clear()
        for slot in self._working:
            self._processes[slot].end()
        self._working.clear()

    def close(self) -> None:
        """End all processes; harmless when repeated."""
        for process in self._processes:
            process.end()
        self._processes, self._working = [], {}
        self._waiting.clear()


class Measurer:
    """Builds and measures on this machine; a context manager that ends all it has started.

    Args:
        options: how to measure.
        gpu: what measures if it is a GPU; see :func:`gf_tvm.machine.gpu.probe`.

    Raises:
        TuningError: no room for the candidates' libraries.
    """

    def __init__(self, options: MeasureOptions, gpu: GpuInfo | None = None) -> None:
        self.options = options
        self._gpu = gpu
        self._scratch = Scratch()
        self._builders: Builders
        self._measuring: MeasuringProcess

    def __enter__(self) -> Measurer:
        self._scratch.__enter__()
        self._builders = Builders(self.options.builders, self._scratch.folder)
        self._measuring = MeasuringProcess(self.options, self._scratch.folder)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers and remove what they made; harmless when repeated."""
        self._builders.close()
        self._measuring.end()
        self._scratch.close()

    @property
    def made(self) -> dict[str, Any]:
        """What a log's header tells about where and how candidates are measured."""
        measured = {"threads": self.options.threads, "measurement": self.options.to_dict()}
        if self._gpu is not None:
            found = {name: self._gpu[name] for name in ("driver", "max_mhz")}
            emulated = {"emulated": True} if self._gpu["emulated"] else {}
            return {"gpu": f"{self._gpu['name']} ({self._gpu['arch']})", **found, **measured, **emulated}
        from ...machine import cpu

        return {"cpu": cpu.cpu_model(), "cores": cpu.usable_cores(), **measured}

    @property
    def parallel(self) -> int:
        """Candidates that can be in work at once."""
        return self.options.builders

    @property
    def boards(self) -> tuple[int, int] | None:
        """Of a farm: how many boards are at work, and how many there are."""
        return None

    @property
    def report(self) -> dict[str, Any] | None:
        """Of a farm: what became of its boards, as plain values."""
        return None

    # ------------------------------------------------------------------------------------------------------ building

    def build(
        self, task: Task, candidates: Sequence[Candidate]
    ) -> Iterator[tuple[Candidate, Path | None, Result | None]]:
        """Build candidates in parallel.

        Yields:
            (candidate, library, None) or (candidate, None, what went wrong), in the order in which they are ready.
            The caller removes the libraries with :meth:`discard`.
        """
        paths = [self._scratch.new_path(task.suffix) for _ in candidates]
        jobs = [{"candidate": c, "path": path} for c, path in zip(candidates, paths, strict=True)]
        for index, _, failure in self._map(task, Worker.build, jobs):
            if failure is None:
                yield candidates[index], paths[index], None
            else:
                yield candidates[index], None, failed_build(failure)

    @staticmethod
    def discard(library: Path) -> None:
        """Remove a library's file; whoever has loaded it keeps it."""
        library.unlink(missing_ok=True)

    def _map(
        self, task: Task, request: Callable[..., Any], jobs: Sequence[dict[str, Any]]
    ) -> Iterator[tuple[int, Any, CandidateFailed | None]]:
        """Make requests of all builders; yields (index of the job, value, failure)."""
        self._measuring.start()
        for index, job in enumerate(jobs):
            self._builders.submit(index, task, request, self.options.build_timeout, **job)
        try:
            while self._builders.pending:
                wait(self._builders.connections(), min(TICK, self._builders.seconds_left))
                for key, value, failure in self._builders.collect():
                    assert isinstance(key, int)
                    yield key, value, failure
        finally:
            self._builders.drop()  # what the caller wants no more

    # ------------------------------------------------------------------------------------------------------- running

    def measure(
        self,
        task: Task,
        source: CandidateSource,
        best: Callable[[], float | None],
        over: Callable[[], bool],
        say: Notify,
    ) -> Generator[tuple[Candidate, Result | None], None, None]:
        """Build and run what ``source`` proposes, until it proposes nothing more.

        Args:
            task: what the candidates are for.
            source: of candidates; asked again when those that it gave are measured.
            best: seconds of the fastest so far.
            over: whether to stop in the midst of what was proposed; what is not measured then is not yielded.
            say: see :data:`Notify`.

        Yields:
            (candidate, result); a result of None says that the candidate is given up, for reasons that are not its
            own.
        """
        while candidates := source(_MANY):
            libraries: dict[str, Path] = {}
            failed = 0
            try:
                for candidate, library, failure in self.build(task, candidates):
                    if library is not None:
                        libraries[candidate.id] = library
                    else:
                        failed += 1
                        yield candidate, failure
                    say("build", f"built {len(libraries) + failed} of {len(candidates)}")
                    if over():
                        break
                for candidate in candidates:
                    if over():
                        return
                    if candidate.id in libraries:
                        library = libraries.pop(candidate.id)
                        result = self.run(task, library, best())
                        self.discard(library)
                        yield candidate, result
            finally:
                for library in libraries.values():
                    self.discard(library)

    def run(self, task: Task, library: Path, best: float | None = None) -> Result:
        """See :meth:`MeasuringProcess.run <gf_tvm.tuning.measuring.measuring_process.MeasuringProcess.run>`."""
        return self._measuring.run(task, library, best)

    def compare(
        self,
        task: Task,
        libraries: Mapping[str, Path],
        seed: int,
        over: Callable[[], bool] = lambda: False,
        say: Notify = lambda kind, line: None,
    ) -> dict[str, Result] | None:
        """See :meth:`MeasuringProcess.compare <gf_tvm.tuning.measuring.measuring_process.MeasuringProcess.compare>`.

        Args:
            task, libraries, seed: as there.
            over: whether to stop.
            say: see :data:`Notify`; its kinds are "compare" and "note".

        Returns:
            A result for each name; None if it was over before.
        """

        def round_made(done: int, rounds: int) -> None:
            say("compare", f"compared {done} of {rounds}")
            if over() and done < rounds:
                raise _Over

        try:
            return self._measuring.compare(task, libraries, seed, round_made)
        except _Over:
            self._measuring.end()  # which has the libraries loaded
            return None


class _Over(Exception):
    """There is no time left."""


#: More than any source gives at a time.
_MANY = 1 << 30


def failed_build(failure: CandidateFailed) -> Result:
    """The result of a candidate that could not be built."""
    status = "build" if failure.status == "failed" else failure.status
    return Result(status, message=f"while building: {failure}")


def _clean_scratch() -> None:
    """Remove the folders of runs that were killed: those whose lock nobody holds."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                continue
            try:
                lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                # Perhaps one that is just being made.
                if time.time() - status.st_mtime > _SCRATCH_GRACE:
                    shutil.rmtree(folder, ignore_errors=True)
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)

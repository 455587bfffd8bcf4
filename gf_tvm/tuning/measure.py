"""Builds and runs candidates in worker processes and says what became of each.

All candidates of a batch are built first, in as many processes as there are cores; then they run, one after another,
in one process with nothing beside it. What goes wrong is either the candidate's doing, and becomes its
:class:`Result`, or the machine's, and raises :class:`~gf_tvm.tuning.task.TuningError`: a full disk must not make a
schedule look slow.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .task import Candidate, Task, TuningError
from .worker import median

if TYPE_CHECKING:
    import numpy as np

# The child gets this process's module search path before it imports anything of ours.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from gf_tvm.tuning.worker import main; main(int(sys.argv[1]), int(sys.argv[3]))"
)
_START_SECONDS = 300.0  # import of torch and TVM on a slow, busy board
_PREPARE_SECONDS = 900.0  # inputs and the float64 reference of the largest workload there
_COMPARE_SECONDS = 300.0  # comparing its outputs
_SCRATCH = "gf_tvm-tune-"
_SCRATCH_GRACE = 3600.0  # seconds


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

    def to_dict(self) -> dict[str, Any]:
        """What a log's header tells about the measurement."""
        names = ("repeats", "min_seconds", "max_seconds", "final", "rounds")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Result:
    """What became of a candidate; the fields are those of :class:`~gf_tvm.tuning.log.Record`."""

    status: str
    runs: tuple[float, ...] = ()
    excess: float | None = None
    message: str = ""

    @property
    def seconds(self) -> float | None:
        """The median of the repetitions."""
        return median(self.runs) if self.runs else None


class CandidateFailed(Exception):
    """The candidate is to blame. ``status`` is one of :data:`~gf_tvm.tuning.log.STATUSES`, or "failed": it raised."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Ended(Exception):
    """A worker process ended by itself; ``code`` as in :attr:`subprocess.Popen.returncode`."""

    def __init__(self, code: int) -> None:
        super().__init__(f"its process ended with {_signal_name(-code)}" if code < 0 else f"it exited with {code}")
        # What the system does to the largest process when memory runs out; anyone may also have done it by hand.
        self.killed = code == -signal.SIGKILL


class _Clock:
    """Seconds in which this process was not stopped, by Ctrl-Z for instance, so that no candidate is blamed for it.

    To be asked every second while something is waited for: longer steps count as two seconds.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._last = time.monotonic()

    def __call__(self) -> float:
        now = time.monotonic()
        self._seconds += min(now - self._last, 2.0)
        self._last = now
        return self._seconds


_clock = _Clock()
_TICK = 1.0


class Process:
    """A worker process and the socket to it. Raises TuningError if the system cannot start one."""

    def __init__(self, role: str, threads: int, folder: Path) -> None:
        self._role = role
        self._threads = threads
        self._task: Task | None = None
        self._started = False
        self._deadline = 0.0
        environment = {
            **os.environ,
            # TVM takes half of the cores if it is not told; its waiting threads must not steal time from others.
            "TVM_NUM_THREADS": str(threads),
            "TVM_THREAD_POOL_SPIN_COUNT": "0",
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "passive",
        }
        path = json.dumps([os.path.abspath(entry) for entry in sys.path])
        ours, theirs = socket.socketpair()
        self._output = folder / f"{role}-{ours.fileno()}.txt"
        arguments = [sys.executable, "-c", _BOOT, str(theirs.fileno()), path, str(os.getpid())]
        try:
            with theirs, open(self._output, "wb") as output:
                self._process = subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    pass_fds=[theirs.fileno()],
                    # A group of its own: Ctrl-C goes to the parent alone, and a linker dies with its worker.
                    start_new_session=True,
                )
        except OSError as error:
            ours.close()
            raise TuningError(f"cannot start a {role} process: {error}") from None
        self.connection = Connection(ours.detach())
        self._send("hello", {}, None, _START_SECONDS)

    def _send(self, request: str, arguments: dict[str, Any], task: Task | None, timeout: float) -> None:
        self._deadline = _clock() + timeout
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # receive() will tell
            self.connection.send((task, request, arguments))

    def start(self) -> None:
        """Wait until the process can work. Raises TuningError."""
        if self._started:
            return
        try:
            found = self.receive()
        except (CandidateFailed, _Ended) as error:
            raise TuningError(f"a {self._role} process did not start: {self._last_words() or error}") from None
        if found["threads"] != self._threads:
            self.end()
            raise TuningError(f"TVM runs {found['threads']} threads where {self._threads} were asked for")
        self._started = True

    def send(self, task: Task, request: str, timeout: float, /, **arguments: Any) -> None:
        """Make a request; the answer comes by :meth:`receive`."""
        self.start()
        new, self._task = task is not self._task, task
        self._send(request, arguments, task if new else None, timeout)

    @property
    def seconds_left(self) -> float:
        """Until the answer is overdue."""
        return max(self._deadline - _clock(), 0.0)

    def receive(self) -> Any:
        """Wait for the answer.

        Raises:
            CandidateFailed: the request raised, or took too long (status "timeout"; the process is gone then).
            TuningError: the machine is to blame.
            _Ended: the process ended.
        """
        while not self.connection.poll(min(_TICK, self.seconds_left)):
            if not self.seconds_left:
                self.end()
                raise CandidateFailed("timeout", "did not end in time")
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            raise _Ended(self.end(patience=10)) from None
        if kind == "broken":
            raise TuningError(f"cannot go on tuning: {value}")
        if kind == "failed":
            raise CandidateFailed("failed", value)
        return value

    def call(self, task: Task, request: str, timeout: float, /, **arguments: Any) -> Any:
        """:meth:`send` and :meth:`receive`."""
        self.send(task, request, timeout, **arguments)
        return self.receive()

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            lines = self._output.read_text(errors="replace").split("\n")
            return next((line.strip() for line in reversed(lines) if line.strip()), "")
        return ""

    @property
    def alive(self) -> bool:
        """Whether the process can take requests."""
        return not self.connection.closed and not self._gone(0)

    def _gone(self, patience: float) -> bool:
        """Whether the process has ended, or does so within ``patience`` seconds. Leaves its exit code to be read."""
        end = time.monotonic() + patience
        while os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            if time.monotonic() >= end:
                return False
            time.sleep(0.005)
        return True

    def end(self, patience: float = 0) -> int:
        """End the process and its children; harmless when repeated.

        Args:
            patience: seconds that it gets to end by itself.

        Returns:
            Its exit code, as :attr:`subprocess.Popen.returncode`.
        """
        if self._process.returncode is None:
            if not self._gone(patience):
                self._process.kill()
            # The whole group, since a linker may outlive its worker; before wait(), which frees the group's number.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self.connection.close()
        return int(self._process.returncode)


class Measurer:
    """The workers of one tuning run; a context manager that ends them all.

    Raises:
        TuningError: no room for the candidates' libraries.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self._builders: list[Process] = []
        self._runner: Process | None = None
        self._scratch: Path | None = None
        self._lock = -1
        self._count = 0

    def __enter__(self) -> Measurer:
        _clean_scratch()
        try:
            self._scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH))
            # Locked before it gets the name by which other runs tell that this folder is in use.
            self._lock = os.open(self._scratch / "new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            os.rename(self._scratch / "new", self._scratch / "lock")
        except OSError as error:
            self.close()
            raise TuningError(f"{tempfile.gettempdir()}: cannot keep libraries here: {error.strerror}") from None
        return self

    def _start(self) -> None:
        """Start all processes at once, when the first is needed: what they import takes seconds."""
        if not self._builders:
            self._builders = [self._new_builder() for _ in range(self.options.builders)]
            self._runner = self._new_runner()

    def __exit__(self, *args: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers and remove what they made; harmless when repeated."""
        for process in (*self._builders, *([self._runner] if self._runner else [])):
            process.end()
        self._builders, self._runner = [], None
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _new_builder(self) -> Process:
        assert self._scratch is not None
        return Process("building", 1, self._scratch)

    def _new_runner(self) -> Process:
        assert self._scratch is not None
        return Process("measuring", self.options.threads, self._scratch)

    # ------------------------------------------------------------------------------------------------------ building

    def features(self, task: Task, candidates: Sequence[Candidate]) -> list[np.ndarray | None]:
        """What the cost model sees of each candidate, float32 (stores, features); None for what has no features."""
        chunks = [candidates[i : i + 8] for i in range(0, len(candidates), 8)]
        jobs = [{"candidates": chunk} for chunk in chunks]
        found: list[list[np.ndarray | None]] = [[None] * len(chunk) for chunk in chunks]
        for index, value, failure in self._map(task, "features", jobs):
            if failure is None:
                found[index] = value
        return [item for chunk in found for item in chunk]

    def build(
        self, task: Task, candidates: Sequence[Candidate]
    ) -> Iterator[tuple[Candidate, Path | None, Result | None]]:
        """Build candidates in parallel.

        Yields:
            (candidate, library, None) or (candidate, None, what went wrong), in the order in which they are ready.
            The caller removes the libraries with :meth:`discard`.
        """
        assert self._scratch is not None
        paths = []
        for _ in candidates:
            self._count += 1  # never a path twice: the loader would give the library that it knows by that name
            paths.append(self._scratch / f"{self._count}.so")
        jobs = [{"candidate": c, "path": path} for c, path in zip(candidates, paths, strict=True)]
        for index, _, failure in self._map(task, "build", jobs):
            if failure is None:
                yield candidates[index], paths[index], None
            else:
                status = "build" if failure.status == "failed" else failure.status
                yield candidates[index], None, Result(status, message=f"while building: {failure}")

    @staticmethod
    def discard(library: Path) -> None:
        """Remove a library's file; whoever has loaded it keeps it."""
        library.unlink(missing_ok=True)

    def _map(
        self, task: Task, name: str, jobs: Sequence[dict[str, Any]]
    ) -> Iterator[tuple[int, Any, CandidateFailed | None]]:
        """Make requests of all builders; yields (index of the job, value, failure)."""
        self._start()
        waiting = deque(range(len(jobs)))
        working: dict[int, int] = {}  # builder -> job
        again: set[int] = set()
        try:
            while waiting or working:
                for slot in range(len(self._builders)):
                    if waiting and slot not in working:
                        working[slot] = waiting.popleft()
                        self._builder(slot).send(task, name, self.options.build_timeout, **jobs[working[slot]])
                wait(
                    [self._builders[slot].connection for slot in working],
                    min(_TICK, *(self._builders[slot].seconds_left for slot in working)),
                )
                for slot in list(working):
                    builder = self._builders[slot]
                    if not builder.connection.poll(0) and builder.seconds_left:
                        continue
                    job = working.pop(slot)
                    outcome: tuple[int, Any, CandidateFailed | None]
                    try:
                        outcome = job, builder.receive(), None
                    except CandidateFailed as failure:
                        outcome = job, None, failure
                    except _Ended as ended:
                        if ended.killed and job not in again:
                            again.add(job)
                            waiting.append(job)
                            continue
                        outcome = job, None, CandidateFailed("crash", str(ended))
                    yield outcome
        finally:
            # The caller wants no more: what is being built would come as the answer to the next request.
            for slot in working:
                self._builders[slot].end()

    def _builder(self, slot: int) -> Process:
        if not self._builders[slot].alive:
            self._builders[slot].end()
            self._builders[slot] = self._new_builder()
        return self._builders[slot]

    # ------------------------------------------------------------------------------------------------------- running

    def _prepared(self, task: Task, seed: int) -> Process:
        """The process that measures, with the inputs and the reference of ``seed`` at hand."""
        self._start()
        if self._runner is None or not self._runner.alive:
            self._end_runner()
            self._runner = self._new_runner()
        try:
            self._runner.call(task, "prepare", _PREPARE_SECONDS, seed=seed)
        except (CandidateFailed, _Ended) as error:
            raise TuningError(f"{task.identity.key}: cannot compute the reference: {error}") from None
        return self._runner

    def _end_runner(self) -> None:
        if self._runner is not None:
            self._runner.end()
            self._runner = None

    def run(self, task: Task, library: Path, best: float | None = None) -> Result:
        """Check a built candidate against the reference, then time it.

        Args:
            task: what it was built for.
            library: from :meth:`build`.
            best: seconds of the fastest so far.
        """
        options = self.options
        for last in (False, True):
            runner = self._prepared(task, seed=0)
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
                )
                runner.call(task, "unload", options.run_timeout, name="candidate")
                return Result("ok", tuple(runs), excess)
            except CandidateFailed as failure:
                return _failed_run(failure)
            except _Ended as ended:
                if last or not ended.killed:
                    return Result("crash", message=f"while running: {ended}")
        raise AssertionError("not reached")

    def _check(self, runner: Process, task: Task, name: str) -> tuple[float | None, str]:
        runner.call(task, "run", self.options.run_timeout, name=name)
        excess, complaint = runner.call(task, "check", _COMPARE_SECONDS)
        if complaint:
            # What else it has written to, nobody knows.
            self._end_runner()
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
                runner = self._prepared(task, seed)
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
                            )
                        if progress is not None:
                            progress(done + 1, options.rounds)
                    for name in runs:
                        runner.call(task, "unload", options.run_timeout, name=name)
                    good = {name: Result("ok", tuple(runs[name]), excesses[name]) for name in runs}
                    return {**failed, **good}
            except CandidateFailed as failure:
                failed[name] = _failed_run(failure)
                self._end_runner()
            except _Ended as ended:
                failed[name] = Result("crash", message=f"while running: {ended}")


def _failed_run(failure: CandidateFailed) -> Result:
    return Result("run" if failure.status == "failed" else failure.status, message=f"while running: {failure}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


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

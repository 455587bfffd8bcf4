"""Worker processes: starting them, asking them with a deadline, ending them; and the loop that they run.

A worker gets requests over a socket, one at a time, and answers each with ``(kind, value)``: ``done`` and the result;
``failed`` and a line of text, if what was asked for is to blame; ``spent`` and a line of text, if it has also spoilt
the process for whatever comes next (a GPU's context is lost); ``broken`` and a line of text, if the machine is to blame
(a full disk, no memory). It ends when the socket does, and the kernel ends it with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...bundle.runtime import die_at_once
from ..task import TuningError

if TYPE_CHECKING:
    from ..task import Task

#: Makes the object whose methods a process's requests are; see :func:`serve`.
WorkerMaker = Callable[[Any], Any]

# The child gets this process's module search path before it imports anything of ours.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    f"from {__name__} import serve_named; serve_named(sys.argv[4], int(sys.argv[1]), int(sys.argv[3]))"
)
_START_SECONDS = 300.0  # import of torch and TVM on a slow, busy board
_PR_SET_PDEATHSIG = 1
_BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOMEM, errno.EMFILE, errno.ENFILE)


class CandidateFailed(Exception):
    """The candidate is to blame. ``status`` is one of :data:`~gf_tvm.tuning.log.STATUSES`, or "failed": it raised."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


class Ended(Exception):
    """A worker process ended by itself; ``code`` as in :attr:`subprocess.Popen.returncode`."""

    def __init__(self, code: int) -> None:
        super().__init__(f"its process ended with {_signal_name(-code)}" if code < 0 else f"it exited with {code}")
        # What the system does to the largest process when memory runs out; anyone may also have done it by hand.
        self.killed = code == -signal.SIGKILL


class Clock:
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


_clock = Clock()
TICK = 1.0


class Process:
    """A worker process and the socket to it.

    Args:
        role: for messages.
        threads: of TVM and PyTorch in it.
        folder: for its output.
        serves: makes its service; see :func:`serve`. A function of a module: unless forked, the process imports it.
        fork: copy this process, with all that it has imported, in place of starting Python anew. For processes that
            have no threads of their own, such as a board's session: there, importing PyTorch takes ten seconds.

    Raises:
        TuningError: the system cannot start one.
    """

    def __init__(
        self,
        role: str,
        threads: int,
        folder: Path,
        serves: WorkerMaker,
        fork: bool = False,
    ) -> None:
        self._role = role
        self._threads = threads
        self._task: Task | None = None
        self._started = False
        self._deadline = 0.0
        environment = {
            # TVM takes half of the cores if it is not told, its waiting threads steal time from others, and it would
            # bind every builder to the first core.
            "TVM_NUM_THREADS": str(threads),
            "TVM_THREAD_POOL_SPIN_COUNT": "0",
            "TVM_BIND_THREADS": "0",
            # PyTorch's threads wait as they do in training, awake for a moment: what launching a loop costs counts.
            "OMP_NUM_THREADS": str(threads),
        }
        ours, theirs = socket.socketpair()
        self._output = folder / f"{role}-{ours.fileno()}.txt"
        try:
            with theirs, open(self._output, "wb") as output:
                start = _forked if fork else _spawned
                self._process: subprocess.Popen[bytes] | _Forked = start(serves, theirs, output, environment)
        except OSError as error:
            ours.close()
            raise TuningError(f"cannot start a {role} process: {error}") from None
        self.connection = Connection(ours.detach())
        self._send("hello", {"role": role}, None, _START_SECONDS)

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
        except (CandidateFailed, Ended) as error:
            raise TuningError(f"a {self._role} process did not start: {self._last_words() or error}") from None
        if found["threads"] != self._threads:
            self.end()
            raise TuningError(f"TVM runs {found['threads']} threads where {self._threads} were asked for")
        self._started = True

    def send(self, task: Task | None, request: Callable[..., Any], timeout: float, /, **arguments: Any) -> None:
        """Make a request; the answer comes by :meth:`receive`.

        Args:
            task: that it is about.
            request: the method of the service's class, such as ``Worker.run``; over there, the service's own method of
                this name is called.
            timeout: seconds.
            arguments: of the method, by name; they are pickled.
        """
        self.start()
        new, self._task = task is not self._task, task
        self._send(request.__name__, arguments, task if new else None, timeout)

    @property
    def started(self) -> bool:
        """Whether :meth:`start` has returned."""
        return self._started

    @property
    def seconds_left(self) -> float:
        """Until the answer is overdue."""
        return max(self._deadline - _clock(), 0.0)

    def receive(self) -> Any:
        """Wait for the answer.

        Raises:
            CandidateFailed: the request raised, or took too long (status "timeout"; the process is gone then).
            TuningError: the machine is to blame.
            Ended: the process ended.
        """
        while not self.connection.poll(min(TICK, self.seconds_left)):
            if not self.seconds_left:
                self.end()
                raise CandidateFailed("timeout", "did not end in time")
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            raise Ended(self.end(patience=10)) from None
        if kind == "broken":
            raise TuningError(f"cannot go on tuning: {value}")
        if kind == "spent":
            self.end()
        if kind in ("failed", "spent"):
            raise CandidateFailed("failed", value)
        return value

    def call(self, task: Task | None, request: Callable[..., Any], timeout: float, /, **arguments: Any) -> Any:
        """:meth:`send` and :meth:`receive`."""
        self.send(task, request, timeout, **arguments)
        return self.receive()

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            lines = self._output.read_text(errors="replace").split("\n")
            return next((line.strip() for line in reversed(lines) if line.strip()), "")
        return ""

    @property
    def overdue(self) -> bool:
        """Whether an answer is there to be received, or should be by now."""
        return self.connection.poll(0) or not self.seconds_left

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
        assert self._process.returncode is not None
        return self._process.returncode


def _spawned(
    serves: WorkerMaker, theirs: socket.socket, output: Any, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    path = json.dumps([os.path.abspath(entry) for entry in sys.path])
    name = f"{serves.__module__}:{serves.__qualname__}"
    return subprocess.Popen(
        [sys.executable, "-c", _BOOT, str(theirs.fileno()), path, str(os.getpid()), name],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
        pass_fds=[theirs.fileno()],
        # A group of its own: Ctrl-C goes to the parent alone, and a linker dies with its worker.
        start_new_session=True,
    )


class _Forked:
    """What :class:`Process` needs of :class:`subprocess.Popen`, for a forked process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        if self.returncode is None:
            _, status = os.waitpid(self.pid, 0)
            self.returncode = os.waitstatus_to_exitcode(status)


def _forked(serves: WorkerMaker, theirs: socket.socket, output: Any, environment: dict[str, str]) -> _Forked:
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return _Forked(pid)
    try:
        os.setsid()
        os.environ.update(environment)
        for target in (1, 2):
            os.dup2(output.fileno(), target)
        # The parent's connections must end with the parent.
        os.closerange(3, theirs.fileno())
        os.closerange(theirs.fileno() + 1, 1 << 12)
        serve(serves, theirs.fileno(), parent)
    except BaseException as error:  # the parent's stack, of which this is a copy, must not be unwound here
        print(describe(error), file=sys.stderr, flush=True)
    finally:
        os._exit(1)


# ---------------------------------------------------------------------------------------------- in the worker's process


def serve_named(name: str, handle: int, parent: int) -> None:
    """:func:`serve` in a new Python, which knows what makes the service by its name, ``module:function``."""
    _settle(parent)  # before the import, which takes seconds
    module, _, function = name.partition(":")
    _answer_requests(getattr(import_module(module), function), handle)


def serve(serves: WorkerMaker, handle: int, parent: int) -> None:
    """Serve requests on the socket ``handle`` until it closes, then end the process.

    Args:
        serves: takes a :class:`~gf_tvm.tuning.task.Task` or None; its result's methods are the requests. It is called
            anew for each task; the first request, "hello", has none.
        handle: of the socket.
        parent: the process that must stay alive.
    """
    _settle(parent)
    _answer_requests(serves, handle)


def _settle(parent: int) -> None:
    """Make this process one that ends with its parent and takes the blame for the memory it needs."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went between starting this process and the line above
        os._exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A candidate that asks for more memory than there is must not get others killed in its place.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")


def _answer_requests(serves: WorkerMaker, handle: int) -> None:
    connection = Connection(handle)
    service = serves(None)
    while True:
        try:
            task, name, arguments = connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        if task is not None:
            service = serves(task)
        # The name is that of a method which the parent has at hand; see Process.send.
        connection.send(answer(getattr(service, name), arguments))
        if task is None:  # the libraries are loaded now
            die_at_once()


def answer(request: Callable[..., Any], arguments: dict[str, Any]) -> tuple[str, Any]:
    """Call ``request`` and put what becomes of it in the form in which it is sent."""
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
        return "spent" if getattr(error, "sticky", False) else "failed", text


def describe(error: BaseException) -> str:
    """An exception in one line: the first of its lines that says something."""
    lines = [line.strip() for line in str(error).splitlines()]
    text = next((line for line in lines if line and not line.startswith(("Traceback", "File "))), "")
    return f"{type(error).__name__}: {text}"[:500] if text else type(error).__name__


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

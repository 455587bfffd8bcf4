"""The server that runs on a board: it registers with TVM's tracker and gives each client a session of its own.

It speaks TVM's protocol, so that TVM's own clients can use it too, but differs from ``tvm.rpc.server`` in what happens
when something goes wrong:

* A session is a forked process that runs TVM's C++ server loop. One that crashes or hangs ends alone.
* The parent never blocks for long: it reads handshakes piece by piece, ends sessions whose client is gone or does
  nothing, and looks for a lost tracker again, for as long as it takes.
* TVM's runtime and PyTorch are loaded once, before the first fork, so a session starts in milliseconds.

The tracker's list of servers carries a board's state (``gf_tvm`` in its info), so ``gf-tvm farm status`` needs no
session, and no board has to stop for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import resource
import select
import selectors
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from ..bundle.runtime import die_at_once, start_extras
from ..errors import FarmError
from ..machine.gpu import GpuInfo
from ..machine.sensors import Sensors
from .protocol import Address, ClientHello, TrackerConnection, TrackerLost, keep_alive, new_match_key, show

#: Global function through which the tuner talks to a session; takes and gives JSON text.
REQUEST = "gf_tvm.request"

_TICK = 0.5
_HELLO_SECONDS = 10.0
_MAX_HELLOS = 16
_INFO_SECONDS = 5.0
_PENDING_SECONDS = 2.0
# An offer that was taken but not used for so long is made anew.
_UNUSED_SECONDS = 10.0
_GRACE_SECONDS = 3.0
_RETRY_SECONDS = (1.0, 2.0, 5.0, 10.0)
_PR_SET_PDEATHSIG = 1
_WORK = "gf_tvm-board-"
_NOWHERE = Path(os.devnull)  # below which there can be no file


class Counters:
    """Numbers that sessions share with the server: trials done, trials failed, and whether a request is worked on."""

    _FORMAT = "<3q"

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)  # anonymous and shared: forked processes write to the same page

    def _get(self) -> list[int]:
        return list(struct.unpack_from(self._FORMAT, self._memory))

    def _put(self, values: list[int]) -> None:
        struct.pack_into(self._FORMAT, self._memory, 0, *values)

    @property
    def trials(self) -> int:
        """Candidates measured, failed ones included."""
        return self._get()[0]

    @property
    def failed(self) -> int:
        """Candidates that crashed, hung, raised or were wrong."""
        return self._get()[1]

    @property
    def working(self) -> bool:
        """Whether a session is working on a request."""
        return bool(self._get()[2])

    @working.setter
    def working(self, value: bool) -> None:
        self._put([*self._get()[:2], int(value)])

    def count(self, failed: bool) -> None:
        """One more candidate."""
        trials, failures, working = self._get()
        self._put([trials + 1, failures + failed, working])


@dataclass(frozen=True)
class SessionContext:
    """What a session's service is told.

    ``trouble`` says why the session has no folder in which to keep files; empty if it has one.
    """

    name: str
    folder: Path
    counters: Counters
    sensors: Sensors
    emulated: bool
    gpu: GpuInfo | None = None
    trouble: str = ""

    def path(self, file: str) -> Path:
        """The path of a file in the session's folder. Raises ValueError for one outside, and for the folder itself."""
        path = _inside(self.folder, file)
        if path == self.folder.resolve():
            raise ValueError(f"{file!r} is the session's folder, not a file in it")
        return path


class Service(Protocol):
    """What a session does besides TVM's own functions; made in the session's process."""

    def handle(self, request: str) -> str:
        """Answer one request."""

    def close(self) -> None:
        """The client is gone."""


#: Makes a session's service, in the session's process; a class will do. None: TVM's functions only.
ServiceMaker = Callable[[SessionContext], Service] | None


@dataclass(frozen=True)
class ServerOptions:
    """How to serve.

    Args:
        key: the kind of board.
        name: of this board.
        tracker: where to register; None serves clients that know the key.
        host, port: to bind; port 0 takes a free one.
        advertise: where clients reach this server, if not at the address the tracker sees and the bound port.
        idle_seconds: a session whose client does nothing for so long is ended.
        device: profile that the board was said to be; "" if nothing was said.
        gpu: with which it measures (:func:`gf_tvm.machine.gpu.check_device`); None for none.
        service: makes what a session answers besides; None serves TVM's functions only.
        preload: called once, before any session, to import what the sessions' service needs.
        until_stdin_closes: end with standard input, and so with the ssh connection that started this.
    """

    key: str
    name: str
    tracker: Address | None = None
    host: str = "127.0.0.1"
    port: int = 0
    advertise: Address | None = None
    idle_seconds: float = 900.0
    device: str = ""
    gpu: GpuInfo | None = None
    service: ServiceMaker = None
    preload: Callable[[], None] | None = None
    until_stdin_closes: bool = False


@dataclass
class _Session:
    pid: int
    connection: socket.socket
    client: str
    folder: Path | None
    started: float
    timeout: float | None
    ticks: int = -1
    last_sign: float = 0.0
    gone: float | None = None


@dataclass
class _Hello:
    connection: socket.socket
    client: str
    deadline: float
    hello: ClientHello


class Server:
    """One board's server.

    Args:
        options: how to serve.
        say: called with a line of text about what happens.

    Raises:
        FarmError: the address cannot be bound, or there is no folder for temporary files.
    """

    def __init__(self, options: ServerOptions, say: Callable[[str], None]) -> None:
        self.options = options
        self._say = say
        self._counters = Counters()
        self._sensors = Sensors()
        gpu_emulated = options.gpu is not None and options.gpu["emulated"]
        self._emulated = gpu_emulated or bool(os.environ.get("GF_TVM_EMULATED"))
        self._session: _Session | None = None
        self._crashes = 0
        self._hellos: dict[int, _Hello] = {}
        self._tracker: TrackerConnection | None = None
        self._tracker_lost = ""
        self._attempts = 0
        self._retry_at = 0.0
        self._match_key = "" if options.tracker else options.key
        self._taken_since: float | None = None
        self._pending_at = 0.0
        self._info_at = 0.0
        self._stop = False
        self._versions = versions()
        try:
            self._temporary = tempfile.gettempdir()
        except OSError as error:
            raise FarmError(f"no folder for temporary files: {error.strerror or error}; set TMPDIR") from None
        self._selector = selectors.DefaultSelector()
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind((options.host, options.port))
            self._listener.listen(8)
        except OSError as error:
            self._listener.close()
            raise FarmError(f"cannot bind {show((options.host, options.port))}: {error.strerror or error}") from None
        self._listener.setblocking(False)
        self.address: Address = self._listener.getsockname()[:2]

    # ------------------------------------------------------------------------------------------------------- the loop

    def stop(self, *_: Any) -> None:
        """End :meth:`run` soon; may be called from a signal handler."""
        self._stop = True

    def load(self) -> None:
        """Import what every session needs, before the first is forked: on a board that takes ten seconds."""
        start_extras()
        if self.options.preload is not None:
            self.options.preload()

    def run(self) -> None:
        """Serve until :meth:`stop`."""
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        if self.options.until_stdin_closes:
            self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ, self._read_stdin)
        # A session that ends wakes the loop up.
        wake, ours = socket.socketpair()
        for end in (wake, ours):
            end.setblocking(False)
        self._selector.register(wake, selectors.EVENT_READ, lambda _: wake.recv(4096))
        before = signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)
        try:
            while not self._stop:
                self._keep_tracker()
                for key, _ in self._selector.select(_TICK):
                    key.data(key.fileobj)
                self._end_old_hellos()
                self._watch_session()
        finally:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, before)
            self._close()
            wake.close()
            ours.close()

    def _close(self) -> None:
        if self._session is not None:
            self._end_session("the server ends")
        for hello in list(self._hellos.values()):
            self._drop(hello)
        if self._tracker is not None:
            self._tracker.close()
        self._selector.close()
        self._listener.close()

    def _read_stdin(self, descriptor: Any) -> None:
        if not os.read(descriptor, 4096):
            self._stop = True

    # --------------------------------------------------------------------------------------------------- the handshake

    def _accept(self, _: Any) -> None:
        try:
            connection, address = self._listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        client = show(address[:2])
        if len(self._hellos) >= _MAX_HELLOS:  # the oldest has had its time
            self._drop(next(iter(self._hellos.values())))
        hello = _Hello(connection, client, time.monotonic() + _HELLO_SECONDS, ClientHello())
        self._hellos[connection.fileno()] = hello
        self._selector.register(connection, selectors.EVENT_READ, self._read_hello)

    def _read_hello(self, connection: Any) -> None:
        hello = self._hellos[connection.fileno()]
        try:
            data = connection.recv(65536)
            if not data:
                raise ValueError("closed the connection before it said anything")
            found = hello.hello.feed(data)
        except BlockingIOError:
            return
        except (OSError, ValueError) as error:
            self._say(f"refused {hello.client}: {error}")
            self._drop(hello)
            return
        if found is None:
            return
        match_key, timeout = found
        if match_key != self._match_key or self._session is not None:
            self._say(f"refused {hello.client}: another key, or the board is busy")
            with contextlib.suppress(OSError):
                connection.sendall(ClientHello.refuse())
            self._drop(hello)
            return
        self._forget(hello)
        try:
            connection.setblocking(True)
            keep_alive(connection)
            connection.sendall(ClientHello.accept(self.options.key))
            self._start_session(connection, hello.client, timeout)
        except OSError as error:
            self._say(f"lost {hello.client}: {error}")
            connection.close()

    def _forget(self, hello: _Hello) -> None:
        del self._hellos[hello.connection.fileno()]
        self._selector.unregister(hello.connection)

    def _drop(self, hello: _Hello) -> None:
        self._forget(hello)
        hello.connection.close()

    def _end_old_hellos(self) -> None:
        now = time.monotonic()
        for hello in [hello for hello in self._hellos.values() if now > hello.deadline]:
            self._say(f"refused {hello.client}: said nothing for {_HELLO_SECONDS:.0f} s")
            self._drop(hello)

    # -------------------------------------------------------------------------------------------------------- sessions

    def _start_session(self, connection: socket.socket, client: str, timeout: float | None) -> None:
        options = self.options
        folder, trouble = None, ""
        try:
            folder = Path(tempfile.mkdtemp(prefix=_WORK, dir=self._temporary))
        except OSError as error:
            # The client hears of it from the session: a connection that breaks off would name neither board nor reason.
            trouble = f"no files can be kept in {self._temporary}: {error.strerror or error}"
            self._say(trouble)
        context = SessionContext(
            *(options.name, folder or _NOWHERE, self._counters, self._sensors, self._emulated, options.gpu, trouble)
        )
        self._counters.working = False
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            run_session(connection, context, options.service, parent)
        now = time.monotonic()
        self._session = _Session(pid, connection, client, folder, now, timeout, last_sign=now)
        self._match_key = self._match_key if self.options.tracker is None else ""
        self._say(f"session of {client} starts")
        self._publish()

    def _watch_session(self) -> None:
        session = self._session
        if session is None:
            return
        if _ended(session.pid):
            self._end_session("")
            return
        now = time.monotonic()
        if session.timeout is not None and now - session.started > session.timeout:
            self._end_session(f"its {session.timeout:.0f} s are over")
            return
        if session.gone is None and _hung_up(session.connection):
            session.gone = now
        if session.gone is not None and now - session.gone > _GRACE_SECONDS:
            self._end_session("its client is gone")
            return
        ticks = _cpu_ticks(session.pid)
        if self._counters.working or ticks != session.ticks:
            session.ticks, session.last_sign = ticks, now
        elif now - session.last_sign > self.options.idle_seconds:
            self._end_session(f"its client did nothing for {self.options.idle_seconds:.0f} s")

    def _end_session(self, reason: str) -> None:
        session = self._session
        assert session is not None
        self._session = None
        if reason:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(session.pid, signal.SIGKILL)
        _, status = os.waitpid(session.pid, 0)
        # What the session has started belongs to its group or dies with it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(session.pid, signal.SIGKILL)
        if not reason and status:
            code = os.waitstatus_to_exitcode(status)
            self._crashes += code < 0  # not a session whose client broke off
            reason = f"crashed with {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        session.connection.close()
        if session.folder is not None:
            shutil.rmtree(session.folder, ignore_errors=True)
        self._counters.working = False
        self._say(f"session of {session.client} ended{': ' if reason else ''}{reason}")
        self._offer()

    # ----------------------------------------------------------------------------------------------------- the tracker

    def _keep_tracker(self) -> None:
        """Be registered, with an offer that can be taken; look for a lost tracker again now and then."""
        if self.options.tracker is None:
            return
        now = time.monotonic()
        try:
            if self._tracker is None:
                if now < self._retry_at:
                    return
                self._tracker = TrackerConnection(self.options.tracker)
                self._publish()
                if self._session is None:
                    self._match_key = ""
                    self._offer()
                if self._tracker is not None:
                    self._attempts, self._tracker_lost = 0, ""
                    self._say(f"registered with the tracker at {show(self.options.tracker)}")
            elif now >= self._info_at:
                self._publish()
            elif self._session is None and now >= self._pending_at:
                self._check_offer(now)
        except TrackerLost as lost:
            self._lose_tracker(lost)

    def _lose_tracker(self, lost: TrackerLost) -> None:
        if self._tracker is not None:
            self._tracker.close()
            self._tracker = None
        self._retry_at = time.monotonic() + _RETRY_SECONDS[min(self._attempts, len(_RETRY_SECONDS) - 1)]
        self._attempts += 1
        if str(lost) != self._tracker_lost:
            self._tracker_lost = str(lost)
            self._say(f"{lost}; trying again")

    def _offer(self) -> None:
        """Let the next client come."""
        if self._tracker is None or self.options.tracker is None:
            return
        match_key = new_match_key(self.options.key)
        host, port = self.options.advertise or (None, self.address[1])
        try:
            self._tracker.put(self.options.key, port, match_key, host)
        except TrackerLost as lost:
            self._lose_tracker(lost)
            return
        self._match_key = match_key
        self._taken_since = None
        self._pending_at = time.monotonic() + _PENDING_SECONDS
        self._publish()

    def _check_offer(self, now: float) -> None:
        """Offer again if a client has taken the offer and did not come."""
        assert self._tracker is not None
        self._pending_at = now + _PENDING_SECONDS
        if self._match_key and self._match_key in self._tracker.pending_match_keys():
            self._taken_since = None
        elif self._taken_since is None:
            self._taken_since = now
        elif now - self._taken_since > _UNUSED_SECONDS:
            self._offer()

    def _publish(self) -> None:
        """Tell the tracker what this board is and does."""
        if self._tracker is None:
            return
        host, port = self.options.advertise or (None, self.address[1])
        info = {"key": f"server:{self.options.key}", "addr": [host, port], "gf_tvm": self.info()}
        try:
            self._tracker.update_info(info)
        except TrackerLost as lost:
            self._lose_tracker(lost)
            return
        self._info_at = time.monotonic() + _INFO_SECONDS

    def info(self) -> dict[str, Any]:
        """The board's state, as ``gf-tvm farm status --json`` shows it."""
        return {
            "name": self.options.name,
            "state": "free" if self._session is None else "busy",
            "client": self._session.client if self._session else None,
            "arch": platform.machine(),
            "model": _model(),
            "cores": len(os.sched_getaffinity(0)),
            "device": self.options.device,
            "gpu": self.options.gpu,
            "versions": self._versions,
            "emulated": self._emulated,
            "trials": self._counters.trials,
            "failed": self._counters.failed,
            "crashed_sessions": self._crashes,
            "updated": time.time(),
            "sensors": self._sensors.read().to_dict(),
        }


# ------------------------------------------------------------------------------------------------ the session's process


def run_session(connection: socket.socket, context: SessionContext, make_service: ServiceMaker, parent: int) -> None:
    """Serve one client and end this process; called in the forked child."""
    code = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            return
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        die_at_once()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # The listening socket and others' connections must not stay open in here.
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        handle = connection.fileno()
        os.closerange(3, handle)
        os.closerange(handle + 1, 1 << 12)
        os.chdir("/" if context.trouble else context.folder)
        served = _register(context, make_service)
        import tvm_ffi

        tvm_ffi.get_global_func("rpc.ServerLoop")(handle)
        if served is not None:
            served.close()
        code = 0
    except BaseException as error:  # the copy of the parent's stack above must not run
        print(f"session failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        sys.stdout.flush()
        os._exit(code)


def _register(context: SessionContext, make_service: ServiceMaker) -> Service | None:
    """Register what TVM's clients call, and the service."""
    import tvm_ffi

    def path(file: str) -> str:
        if context.trouble:
            raise ValueError(context.trouble)
        # "" is the folder itself, which TVM's runners remove in the end.
        return str(_inside(context.folder, file))

    def load_module(file: str) -> Any:
        return tvm_ffi.load_module(path(file))

    tvm_ffi.register_global_func("tvm.rpc.server.workpath", path, override=True)
    tvm_ffi.register_global_func("tvm.rpc.server.load_module", load_module, override=True)
    if make_service is None:
        return None
    service = make_service(context)
    tvm_ffi.register_global_func(REQUEST, service.handle, override=True)
    return service


def _inside(folder: Path, file: str) -> Path:
    """The path of ``file`` in a folder. Raises ValueError for one outside."""
    target = (folder / file).resolve()
    if folder.resolve() not in (target, *target.parents):
        raise ValueError(f"{file!r} is outside the session's folder")
    return target


# ----------------------------------------------------------------------------------------------------------- the system


def _ended(pid: int) -> bool:
    """Whether a child has ended; its exit code stays to be read."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _hung_up(connection: socket.socket) -> bool:
    """Whether the other side has closed its half, even if the session has not read all that came before."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    gone = select.POLLRDHUP | select.POLLHUP | select.POLLERR | select.POLLNVAL
    return any(event & gone for _, event in poll.poll(0))


def _cpu_ticks(pid: int) -> int:
    """Processor time that a process has used, its own and that of children that have ended; -1 if unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        return sum(map(int, fields[11:15]))
    except (OSError, ValueError):
        return -1


def _model() -> str:
    for file in ("/proc/device-tree/model", "/sys/firmware/devicetree/base/model"):
        with contextlib.suppress(OSError):
            return Path(file).read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages on which host and board must agree; None for what is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("gf-tvm", "apache-tvm", "apache-tvm-ffi", "torch"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found

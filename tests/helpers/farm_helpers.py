"""A tracker, boards and a task with treacherous candidates, for the tests of the farm."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gf_tvm.codegen.linker import find_linker
from gf_tvm.core.geometry import Geometry
from gf_tvm.core.workload import Workload
from gf_tvm.farm.protocol import Address, TrackerConnection, TrackerLost
from gf_tvm.farm.tracker import Board, boards_of
from gf_tvm.farm.virtual import VirtualPi
from gf_tvm.tuning.search import ConfigSearch
from gf_tvm.tuning.task import Candidate, Config, WorkloadTask

CLI = [sys.executable, "-m", "gf_tvm.runners.cli"]

#: What a treacherous candidate does, by the status that it must get; as the body of a kernel that never returns well.
ACTS = {
    "crash": "*(volatile int *)0 = 1;",
    "timeout": "for (;;) pause();",  # without taking time from others, so that limits can be generous
    "wrong": "",
}


def treacherous_source(act: str) -> str:
    """A library in C++ whose kernel does one of ACTS."""
    entry = "int __tvm_ffi_main(void *, void *, int, void *)"
    return f'extern "C" int pause();\nextern "C" {entry} {{ {ACTS[act]} return 0; }}\n'


def small_workload(**changes: Any) -> Workload:
    """A workload that takes microseconds, half a second to build, and has a space of many points."""
    fields: dict[str, Any] = {"n": 2, "ci": 16, "co": 16, "h": 16, "w": 16, "kernel": (3, 3), "padding": (1, 1)}
    return Workload("backward", Geometry(**{**fields, "patch": (4, 4), **changes}))


class TreacherousTask(WorkloadTask):
    """Some of its candidates crash or compute nothing; which ones, follows from their configurations. One hangs."""

    _at_hand = "ok"

    @functools.cached_property
    def _hanging(self) -> Config:
        """Only one: a limit that a slow machine does not exceed by chance is worth waiting for once."""
        rng = random.Random(0)
        while (config := self.space.sample(rng)) == self.space.default:
            pass
        return config

    @property
    def examples(self) -> list[Config]:
        """One configuration for each of ACTS, so that a run meets them all; see :func:`suggesting`."""
        found: dict[str, Config] = {"timeout": self._hanging}
        rng = random.Random(1)
        while len(found) < len(ACTS):
            config = self.space.sample(rng)
            act = self.act(Candidate.of_config(config).id)
            if act != "ok":
                found.setdefault(act, config)
        return list(found.values())

    def act(self, candidate_id: str) -> str:
        """The status that a candidate deserves."""
        if candidate_id == Candidate.of_config(self.space.default).id:
            return "ok"
        if candidate_id == Candidate.of_config(self._hanging).id:
            return "timeout"
        return {0: "crash", 2: "wrong"}.get(zlib.crc32(candidate_id.encode()) % 12, "ok")

    def schedule(self, candidate: Candidate) -> Any:
        self._at_hand = self.act(candidate.id)
        return super().schedule(candidate)

    def export(self, schedule: Any, path: Path) -> None:
        if self._at_hand == "ok":
            super().export(schedule, path)
            return
        compiler = find_linker(self.profile)
        command = [compiler] if isinstance(compiler, str) else list(compiler)
        subprocess.run(
            [*command, "-x", "c++", "-", "-O1", "-shared", "-fPIC", "-o", str(path)],
            input=treacherous_source(self._at_hand).encode(),
            check=True,
            capture_output=True,
        )


def suggesting(configs: Sequence[Config]) -> type[ConfigSearch]:
    """A search that proposes these first, to be put in place of the loop's; random ones may leave out any of them."""

    class Suggesting(ConfigSearch):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.suggest(configs)

    return Suggesting


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class TrackerProcess:
    """``gf-tvm farm tracker`` on a port of its own, which it gets again after a restart."""

    def __init__(self) -> None:
        self.address: Address = ("127.0.0.1", free_port())
        self.command = CLI
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> TrackerProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self, stderr: bool = False) -> None:
        """Start it; ``stderr`` keeps what it writes there for who asks."""
        command = [*self.command, "farm", "tracker", "--port", str(self.address[1])]
        errors = subprocess.PIPE if stderr else None
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline().startswith("tracker on ")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    @property
    def text(self) -> str:
        return f"{self.address[0]}:{self.address[1]}"

    def boards(self) -> list[Board]:
        """The registered boards; a busy machine gets more time to answer than a user would wait."""
        with TrackerConnection(self.address, 250.0) as connection:
            return boards_of(connection.summary())

    def wait_for(self, count: int, seconds: float = 250.0) -> list[Board]:
        """Wait until ``count`` boards are registered."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(TrackerLost):
                if len(found := self.boards()) == count:
                    return found
            time.sleep(0.1)
        raise AssertionError(f"not {count} boards after {seconds:.0f} s: {self.boards()}")


class NativeBoard(VirtualPi):
    """A board that is this machine: the same server, without emulation."""

    def __init__(self, name: str, tracker: Address, key: str, folder: Path, *options: str, **environment: str) -> None:
        super().__init__(Path("/"), name, tracker, key, folder, **environment)
        self._options = options

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._close_stdin()
        with open(self.log, "ab") as log:
            self._from = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, *self.arguments, *self._options],
                env={**os.environ, **self._environment},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.wait_for("serving ").rpartition(":")[2])


@contextlib.contextmanager
def native_farm(
    count: int, folder: Path, *options: str, key: str = "here"
) -> Iterator[tuple[TrackerProcess, list[NativeBoard]]]:
    """A tracker with boards called board-1, board-2, ..."""
    with TrackerProcess() as tracker, contextlib.ExitStack() as stack:
        found = [NativeBoard(f"board-{i + 1}", tracker.address, key, folder, *options) for i in range(count)]
        for board in found:
            stack.enter_context(board)
        tracker.wait_for(count)
        yield tracker, found


def babble(address: Address, data: bytes, seconds: float = 0.5) -> None:
    """A client that knows nothing of TVM's protocol: says something, waits, and goes."""
    with contextlib.suppress(OSError), socket.create_connection(address, 5) as connection:
        connection.settimeout(seconds)
        if data:
            connection.sendall(data)
        with contextlib.suppress(TimeoutError):
            connection.recv(4096)


#: What strangers and broken clients send.
BABBLE = (
    b"GET / HTTP/1.1\r\nHost: board\r\n\r\n",
    b"\x71\xf2",  # and then nothing more
    b"\x71\xf2\x0f\x00\x00\x00\x00\x00",  # an empty key
    b"\x71\xf2\x0f\x00\xff\xff\xff\x7f",  # a key of two gigabytes
    b"\x71\xf2\x0f\x00\x04\x00\x00\x00\xff\xfe\x00\x20",  # a key that is no text
    b"\x71\xf2\x02\x00\xff\xff\xff\x7f",  # as a tracker's client
    b"\x71\xf2\x02\x00\x02\x00\x00\x00[]",
    b"\x71\xf2\x02\x00\x04\x00\x00\x00[99]",
)


def later(seconds: float, call: Callable[[], Any]) -> None:
    """Call something in a while, from a thread."""
    import threading

    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()


STOP, CONT = signal.SIGSTOP, signal.SIGCONT

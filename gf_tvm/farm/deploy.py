"""Setting up boards over OpenSSH, and keeping their servers running behind a tunnel.

A board needs sshd, Python with venv, and nothing else. The server on it listens on its loopback address only. One
connection carries everything: the board reaches the tracker through it (``-R``), this host reaches the server (``-L``),
and the server ends when its standard input, which is the connection, ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import socket
import subprocess
import tarfile
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import FarmError
from . import _remote
from .doctor import MIN_GLIBC, MIN_PYTHON, TORCH_GLIBC
from .protocol import Address
from .ssh import Say, Ssh, SshError, explain, last_line
from .wheel import build_wheel

#: Where a board's installation is unless told otherwise; under the user's home.
FOLDER = ".local/share/gf_tvm"
#: A Pi with a slow SD card and a slow line; what hangs for good is found by ServerAlive long before.
INSTALL_SECONDS = 3600.0
MIN_FREE_BYTES = 3 << 29
#: Seconds before the next try after a connection ended, the first to the last; one that held for so long starts anew.
BACKOFF_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
STEADY_SECONDS = 60.0
_STOP_SECONDS = 12.0

#: The newest PyTorch whose aarch64 wheel on PyPI is a CPU build: later ones install gigabytes of CUDA.
AARCH64_TORCH = "2.7.1"
#: With PyTorch that old, apache-tvm-ffi compiles its tensor exchange at the first import, and a board has no compiler;
#: this package holds it compiled. It belongs to that pin, and not to gf-tvm's dependencies.
AARCH64_EXTRA = "torch-c-dlpack-ext"
#: The newest PyTorch whose wheels run with the C library of Ubuntu 18.04 (a Jetson Nano's, 2.27). It is older than what
#: gf-tvm asks for, which is for training; measuring takes only what this one has.
OLD_TORCH = "2.5.1"

# Stands behind the architecture of such a system.
_OLD = " with an old C library"
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,63}", re.ASCII)


@dataclass(frozen=True)
class SshBoard:
    """A board that was looked at: what :func:`gf_tvm.farm._remote.probe` says of it."""

    ssh: Ssh
    name: str
    python: str
    facts: dict[str, Any]

    @property
    def folder(self) -> str:
        """Where gf_tvm is, or will be, installed there."""
        return str(self.facts["folder"])

    @property
    def glibc(self) -> tuple[int, ...]:
        """Version of its C library."""
        return tuple(int(number) for number in re.findall(r"\d+", self.facts["libc_version"])[:2])

    @property
    def system(self) -> str:
        """For what a package has to be made: its architecture, and whether its C library is an old one."""
        return str(self.facts["machine"]) + (_OLD if self.glibc < TORCH_GLIBC else "")

    @property
    def venv_python(self) -> str:
        """The installation's Python."""
        return f"{self.folder}/venv/bin/python"

    def __str__(self) -> str:
        facts = self.facts
        libc = f"{facts['libc'] or 'libc'} {facts['libc_version']}".strip()
        return f"{facts['machine']}, Python {facts['python']}, {libc}, {facts['free'] / (1 << 30):.1f} GiB free"


def board_name(target: str) -> str:
    """The default name of a board: its host's. Raises FarmError if that is no name."""
    host = target.rpartition("@")[2]
    name = re.sub(r"[^\w.-]+", "-", host, flags=re.ASCII).strip("-.")
    return check_name(name)


def check_name(name: str) -> str:
    """``name``, if it can be a board's. Raises FarmError."""
    if not _NAME.fullmatch(name):
        raise FarmError(f"a board's name has letters, digits and . _ - only, up to 64 of them; got {name!r}")
    return name


def connect(ssh: Ssh, name: str, python: str = "python3", folder: str = FOLDER) -> SshBoard:
    """Look at a board.

    Raises:
        FarmError: it cannot be reached, or has no Python.
    """
    if folder == "~" or folder.startswith("~/"):
        folder = folder[2:]
    if not folder or folder.startswith(("~", "-")):
        raise FarmError(f"--folder must be a folder on the board, got {folder!r}")
    try:
        return SshBoard(ssh, name, python, ssh.ask(python, "probe", folder))
    except SshError as error:
        text = str(error)
        if error.code in (126, 127):
            raise FarmError(
                f"{ssh.target}: no Python: {python} does not run there; install it (Debian: python3 and python3-venv)"
            ) from None
        if "annotations is not defined" in text or "SyntaxError" in text:
            raise FarmError(f"{ssh.target}: {python} there is older than Python 3.7; {_needs_python()}") from None
        raise


def _needs_python() -> str:
    return (
        f"gf_tvm needs {'.'.join(map(str, MIN_PYTHON))} or newer: install a newer OS image, or name one with --python"
    )


def check_board(board: SshBoard) -> None:
    """Raise FarmError if gf_tvm cannot be installed there."""
    facts, target = board.facts, board.ssh.target
    python = tuple(int(number) for number in re.findall(r"\d+", facts["python"])[:2])
    if python < MIN_PYTHON:
        raise FarmError(f"{target}: has Python {facts['python']}; {_needs_python()}")
    if facts["bits"] != 64 or facts["machine"] not in ("aarch64", "x86_64"):
        raise FarmError(f"{target}: is a {facts['bits']}-bit {facts['machine']} system; install a 64-bit OS")
    least = MIN_GLIBC if facts["machine"] == "aarch64" else TORCH_GLIBC
    if facts["libc"] != "glibc" or board.glibc < least:
        found = f"{facts['libc'] or 'no glibc'} {facts['libc_version']}".strip()
        raise FarmError(f"{target}: has {found}; the wheels need glibc {'.'.join(map(str, least))} or newer")
    if not facts["writable"]:
        raise FarmError(f"{target}: {board.folder} cannot be written there; choose another with --folder")
    if not facts["venv"]:
        if not facts["venv_module"]:
            raise FarmError(f"{target}: Python's venv is missing; install it there: sudo apt install python3-venv")
        if facts["free"] < MIN_FREE_BYTES:
            raise FarmError(
                f"{target}: only {facts['free'] / 1e9:.1f} GB free for {board.folder}; an installation takes "
                f"{MIN_FREE_BYTES / 1e9:.1f}"
            )


@dataclass(frozen=True)
class Package:
    """What is to be installed: files to copy, what pip is told about versions, and a digest of both."""

    machine: str
    wheel: Path
    files: tuple[Path, ...]
    constraints: str
    requirements: tuple[str, ...]
    own_requirements: bool  # whether the wheel's are to be installed
    offline: bool
    digest: str


def make_package(folder: Path, system: str, wheels: Path | None = None) -> Package:
    """Prepare what a board needs.

    Args:
        folder: for the wheel of this gf_tvm.
        system: see :attr:`Board.system`.
        wheels: a folder of all the wheels that the board needs; None lets pip download them there.

    Raises:
        FarmError: this installation cannot be packed, or there are no wheels in the folder.
    """
    wheel = build_wheel(folder)
    others: list[Path] = []
    if wheels is not None:
        others = sorted(file for file in wheels.glob("*.whl") if file.name != wheel.name)
        if not others:
            raise FarmError(f"--wheels {str(wheels)!r}: no wheels (*.whl) there")
    pins = []
    # The same TVM on both sides: compiled code and its runtime must fit together.
    for package in ("apache-tvm", "apache-tvm-ffi"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            pins.append(f"{package}=={metadata.version(package)}")
    requirements: tuple[str, ...] = ()
    machine, old = system.removesuffix(_OLD), system.endswith(_OLD)
    if old:
        pins.append(f"torch=={OLD_TORCH}")
        # Its metadata would refuse that PyTorch, so what else it names is named here.
        requirements = tuple(re.sub(r"^torch\b.*", "torch", text) for text in _base_requirements())
    elif machine == "aarch64":
        pins.append(f"torch=={AARCH64_TORCH}")
        requirements = (AARCH64_EXTRA,)
    else:
        with contextlib.suppress(metadata.PackageNotFoundError):
            pins.append(f"torch=={metadata.version('torch').partition('+')[0]}")
    constraints = "".join(f"{pin}\n" for pin in pins)
    digest = hashlib.sha256(wheel.read_bytes())
    listed = [(file.name, file.stat().st_size) for file in others]
    digest.update(json.dumps([constraints, requirements, listed]).encode())
    files, offline = (wheel, *others), wheels is not None
    return Package(machine, wheel, files, constraints, requirements, not old, offline, digest.hexdigest())


def _base_requirements() -> list[str]:
    """What gf-tvm depends on without its extras."""
    found = metadata.requires("gf-tvm") or []
    return [text.partition(";")[0].strip() for text in found if "extra ==" not in text]


def stamp_of(board: SshBoard, package: Package) -> str:
    """What the stamp file of a finished installation holds."""
    return f"{package.digest}-{board.facts['python']}"


def install(
    board: SshBoard,
    package: Package,
    say: Say,
    on_sent: Callable[[int, int], None] | None = None,
    on_line: Say | None = None,
) -> bool:
    """Install gf_tvm and its base dependencies in a virtual environment of its own; resumes one that was interrupted.

    Args:
        board: that :func:`check_board` found fit.
        package: what to install.
        say: called with a line for each step.
        on_sent: called with the bytes copied so far and in all.
        on_line: called with each line of pip's.

    Returns:
        False if it was installed before.

    Raises:
        FarmError: a step failed.
    """
    stamp = stamp_of(board, package)
    if board.facts["venv"] and board.facts["stamp"] == stamp:
        return False
    start = time.monotonic()
    folder, venv = shlex.quote(board.folder), shlex.quote(f"{board.folder}/venv")
    incoming = f"{board.folder}/incoming"
    quoted = shlex.quote(incoming)
    # Old files would be found by pip, too. The stamp comes last, so that half an installation has none.
    prepare = f"umask 022 && mkdir -p {folder} && rm -rf {quoted} {venv}/{_remote.STAMP} && mkdir {quoted}"
    _step(board, "prepare its folder", f"{prepare} && exec tar -xf - -C {quoted}", _Archive(package), on_sent)
    if not board.facts["venv"]:
        say("makes a virtual environment")
        python = shlex.quote(board.python)
        _step(board, "make a virtual environment", f"exec {python} -m venv --clear {venv}")
    say("installs PyTorch, TVM and gf_tvm")
    pip = [board.venv_python, "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    if package.offline:
        pip += ["--no-index", "--find-links", "."]
    # In that folder, because pip would take a ";" of its path for a marker. Only wheels: a board has no compiler.
    wheel = f"./{package.wheel.name}"
    constrained = [*pip, "--only-binary", ":all:", "--progress-bar", "off", "-c", "constraints.txt"]
    constrained += [wheel] if package.own_requirements else []
    # The wheel is forced in because its version may be that of the last one.
    forced = [*pip, "--quiet", "--no-deps", "--force-reinstall", wheel]
    mark = f"cd / && rm -rf {quoted} && printf %s {shlex.quote(stamp)} > {venv}/{_remote.STAMP}"
    command = f"cd {quoted} && {shlex.join([*constrained, *package.requirements])} && {shlex.join(forced)} && {mark}"
    _step(board, "install", command, on_line=on_line)
    say(f"installed in {time.monotonic() - start:.0f} s")
    return True


class _Archive:
    """The files of a package as a tar archive on disk, deleted when closed."""

    def __init__(self, package: Package) -> None:
        self._package = package

    def open(self) -> BinaryIO:
        file = tempfile.TemporaryFile()  # noqa: SIM115
        with tarfile.open(fileobj=file, mode="w") as archive:
            for path in self._package.files:
                archive.add(path, path.name, filter=_plain)
            text = self._package.constraints.encode()
            info = tarfile.TarInfo("constraints.txt")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
        file.seek(0)
        return file


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without this machine's users and permissions."""
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    info.mode = 0o644
    return info


def _step(
    board: SshBoard,
    what: str,
    remote: str,
    archive: _Archive | None = None,
    on_sent: Callable[[int, int], None] | None = None,
    on_line: Say | None = None,
) -> None:
    # The user's shell there may be any; sh is what this is written for.
    remote = f"exec sh -c {shlex.quote(remote)}"
    lines: list[str] = []

    def keep(line: str) -> None:
        lines.append(line)
        if on_line is not None:
            on_line(line)

    try:
        with contextlib.ExitStack() as stack:
            data: bytes | BinaryIO = b""
            total = 0
            if archive is not None:
                data = stack.enter_context(archive.open())
                total = os.fstat(data.fileno()).st_size
            board.ssh.run(
                remote,
                data,
                INSTALL_SECONDS,
                keep,
                None if on_sent is None else lambda sent: on_sent(sent, total),
            )
    except SshError as error:
        if error.code in (None, 255):
            raise
        reason = str(error).removeprefix(f"{board.ssh.target}: ")
        hint = ""
        if "No matching distribution" in reason or "No matching distribution" in "\n".join(lines):
            hint = " (no network there? install from a folder of wheels with --wheels)"
        raise FarmError(f"{board.ssh.target}: could not {what}: {reason}{hint}") from None


# ------------------------------------------------------------------------------------------------- tunnel and server


class Tunnel:
    """Keeps one board's server running behind an ssh connection, until told to stop.

    Args:
        board: with gf_tvm installed.
        key: of the board.
        tracker: as this host reaches it.
        port: on this host's loopback, where clients reach the board; 0 takes a free one at each connection.
        say: called with a line about what happens.
        token: of this deploy; :func:`new_token`.
        device: of the server's ``--device``, for a board whose GPU measures; None for one whose CPU does.
        allow_root: let the server run as root, if that is the board's user.
    """

    def __init__(
        self,
        board: SshBoard,
        key: str,
        tracker: Address,
        port: int,
        say: Say,
        token: str,
        device: str | None = None,
        allow_root: bool = False,
    ) -> None:
        self._board, self._key, self._tracker, self._port, self._say = board, key, tracker, port, say
        self._device, self._allow_root = device, allow_root
        self._token = token
        self._traceback: list[str] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep, name=f"tunnel to {board.name}", daemon=True)
        #: Whether the server said that it serves, and the connection is up.
        self.serving = threading.Event()
        #: Set when it has given up: another deploy took the board.
        self.ended = threading.Event()

    def start(self) -> None:
        """Connect, in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """Begin to end the server and the connection; :meth:`join` waits for it."""
        self._stop.set()
        with self._lock:
            if self._process is not None and self._process.stdin is not None:
                with contextlib.suppress(OSError, ValueError):
                    self._process.stdin.close()
                # A board that is gone does not notice; there, the server ends with the connection.
                timer = threading.Timer(_STOP_SECONDS, self._process.kill)
                timer.daemon = True
                timer.start()

    def join(self) -> None:
        """Wait until nothing of this is left running, neither here nor on the board (if it can be reached)."""
        self._thread.join()

    def _keep(self) -> None:
        failures, first = 0, True
        try:
            while not self._stop.is_set():
                start = time.monotonic()
                try:
                    reason = self._connect(take_over=first)
                    first = False
                except FarmError as error:
                    reason = str(error).removeprefix(f"{self._board.ssh.target}: ")
                except (OSError, ValueError) as error:
                    reason = str(error)
                self.serving.clear()
                if self._stop.is_set() or self.ended.is_set():
                    break
                failures = 0 if time.monotonic() - start > STEADY_SECONDS else failures
                delay = BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS) - 1)]
                failures += 1
                self._say(f"{reason}; connects again in {delay:g} s")
                self._stop.wait(delay)
        finally:
            self.ended.set()

    def _connect(self, take_over: bool) -> str:
        """One connection from its beginning to its end. Returns why it ended. Raises FarmError if it did not begin."""
        board = self._board
        answer = board.ssh.ask(
            board.venv_python, "prepare", board.folder, board.name, self._token, "yes" if take_over else "no"
        )
        if answer["other"]:
            self._say("another gf-tvm farm deploy has taken this board; gives up")
            self.ended.set()
            return ""
        if answer["ended"]:
            self._say("ended a server that an earlier connection had left")
        there, tracker_there = answer["ports"]
        host, port = self._tracker
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        here = self._port or _free_port()
        extra = (
            *("-oExitOnForwardFailure=yes", "-oControlMaster=no", "-oControlPath=none"),
            *("-R", f"127.0.0.1:{tracker_there}:{target}", "-L", f"127.0.0.1:{here}:127.0.0.1:{there}"),
        )
        process = board.ssh.start(self._remote_command(there, tracker_there, here), *extra)
        with self._lock:
            self._process = process
        if self._stop.is_set():  # asked to stop before there was a process to tell
            self.stop()
        try:
            text = self._follow(process, here)
        finally:
            ended_well = self._end(process)
        if self._stop.is_set() and not ended_well:
            with contextlib.suppress(FarmError):
                board.ssh.ask(board.venv_python, "finish", board.folder, board.name, self._token)
        code = process.returncode
        if code == 255:
            return explain(board.ssh.target, code, text).removeprefix(f"{board.ssh.target}: ")
        if code < 0:
            return f"ssh was ended by signal {-code}"
        return f"the server ended with exit code {code}" + (f": {last_line(text)}" if text else "")

    def _remote_command(self, port: int, tracker: int, advertised: int) -> str:
        board = self._board
        serve = [
            *(board.venv_python, "-u", "-m", "gf_tvm.runners.cli", "farm", "serve"),
            *("--tracker", f"127.0.0.1:{tracker}", "--key", self._key, "--name", board.name),
            *("--host", "127.0.0.1", "--port", str(port), "--advertise", f"127.0.0.1:{advertised}"),
            *(() if self._device is None else ("--device", self._device)),
            "--until-stdin-closes",
            *(("--allow-root",) if self._allow_root else ()),
        ]
        run_file = shlex.quote(f"{board.folder}/run/{board.name}")
        script = f'echo "$$ {self._token}" > {run_file} && cd {shlex.quote(board.folder)} && exec {shlex.join(serve)}'
        return f"exec sh -c {shlex.quote(script)}"

    def _follow(self, process: subprocess.Popen[bytes], port: int) -> str:
        """Pass on what the server says until it ends; returns the end of what ssh and the server complained about."""
        assert process.stdout is not None
        assert process.stderr is not None
        complaints: list[str] = []
        traceback: list[str] = []
        stderr = process.stderr

        def read() -> None:
            for raw in stderr:
                line = raw.decode("utf-8", "replace").rstrip()
                complaints[:] = [*complaints[-20:], line]
                if line.startswith(("Traceback ", " ")):
                    traceback.append(line)
                elif line:
                    self._say(line)

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        for raw in process.stdout:
            line = raw.decode("utf-8", "replace").rstrip()
            if line.startswith("serving "):
                self.serving.set()
                line += f", here 127.0.0.1:{port}"
            if line:
                self._say(line)
        process.wait()
        thread.join(5)
        # A server that cannot start fails in the same way all night long.
        if traceback and traceback != self._traceback:
            for line in traceback:
                self._say(line)
        self._traceback = traceback
        return "\n".join(complaints)

    def _end(self, process: subprocess.Popen[bytes]) -> bool:
        """Wait for a connection that was told to end, then end it; whether the server said goodbye."""
        with self._lock:
            self._process = None
        if process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):
                process.stdin.close()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        return process.returncode == 0


def new_token() -> str:
    """What tells the servers of one deploy from those of others."""
    return uuid.uuid4().hex


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])

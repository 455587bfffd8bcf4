"""gf-tvm farm deploy: install what boards need over ssh, and keep their servers running behind tunnels."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import FarmError
from .._output import LINE_INTERVAL
from ._arguments import add_root_argument, add_ssh_arguments, add_tracker_arguments, tracker_address

if TYPE_CHECKING:
    from ...farm.deploy import Package, SshBoard
    from ...farm.ssh import Ssh


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "deploy",
        help="install gf-tvm on boards over ssh and keep their servers running",
        description="Install on each board what it needs to measure and train, start its server, and connect it to "
        "the tracker through an ssh tunnel, reconnecting when necessary. Runs until Ctrl-C, which ends the servers. "
        "The exit code is 1 if a board had to be left out, 2 if all were.",
    )
    parser.add_argument("boards", nargs="+", metavar="USER@HOST", help="a board, with a key set up for ssh")
    add_tracker_arguments(parser, required=False)
    parser.add_argument(
        "--device", metavar="D", help="of the boards' servers, as of gf-tvm farm serve (jetson-nano: its GPU measures)"
    )
    parser.add_argument(
        "--port",
        type=int,
        default=0,
        metavar="P",
        help="port of this machine's loopback where the first board's server is found, the others' at those after it "
        "(default: any free ones)",
    )
    parser.add_argument("--name", metavar="NAME", help="the board's name, if there is one board (default: its host's)")
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="install without a network from a folder of all wheels needed"
    )
    add_ssh_arguments(parser)
    add_root_argument(parser)
    parser.add_argument("--install-only", action="store_true", help="install, and start nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    address = None
    if not args.install_only:
        for option, value in (("--tracker", args.tracker), ("--key", args.key)):
            if not value:
                raise FarmError(f"deploy needs {option}, or --install-only")
        address = tracker_address(args)
        if any(letter.isspace() or letter == ":" for letter in args.key):
            raise FarmError(f"--key must be a word without ':', got {args.key!r}")
    if not 0 <= args.port <= 65536 - len(args.boards):
        raise FarmError(f"--port must leave room for {len(args.boards)} boards up to 65535, got {args.port}")
    if args.wheels is not None and not args.wheels.is_dir():
        raise FarmError(f"--wheels {str(args.wheels)!r}: there is no such folder")
    from ...farm.deploy import Tunnel, new_token
    from ...farm.ssh import Ssh
    from ...machine.profiles import get_profile

    if args.device not in (None, "host", "cuda"):  # which are the boards' own matter
        get_profile(args.device)
    names = _names(args.boards, args.name)
    targets = {name: Ssh(target, args.ssh_option) for name, target in zip(names, args.boards, strict=True)}
    stop = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: stop.set())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        boards, failures = _install_all(targets, args, stop)
        for name in names:
            if name in failures:
                _say(f"{name}: left out: {failures[name]}", error=True)
        if not boards:
            raise FarmError("no board could be set up")
        if address is None:
            return int(bool(failures))
        _note_missing_tracker(address)
        token = new_token()
        tunnels = []
        for index, name in enumerate(names):
            if name in boards:
                port = args.port + index if args.port else 0
                tunnels.append(
                    Tunnel(
                        *(boards[name], args.key, address, port, _sayer(name), token, args.device),
                        allow_root=args.allow_root,
                    )
                )
        try:
            for tunnel in tunnels:
                tunnel.start()
            while not stop.wait(0.3) and not all(tunnel.ended.is_set() for tunnel in tunnels):
                pass
        finally:
            if stop.is_set():
                _say("ends the servers")
            for tunnel in tunnels:
                tunnel.stop()
            for tunnel in tunnels:
                tunnel.join()
        return int(bool(failures) or not stop.is_set())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _names(targets: list[str], name: str | None) -> list[str]:
    """A name for each board, no two alike. Raises FarmError."""
    from ...farm.deploy import board_name, check_name

    if name is not None:
        if len(targets) > 1:
            raise FarmError("--name is for one board; several are named by their hosts")
        return [check_name(name)]
    names: list[str] = []
    for target in targets:
        base = found = board_name(target)
        for number in count(2):
            if found not in names:
                break
            found = f"{base}-{number}"
        names.append(found)
    return names


def _install_all(
    targets: dict[str, Ssh], args: argparse.Namespace, stop: threading.Event
) -> tuple[dict[str, SshBoard], dict[str, str]]:
    """Install on all boards at once; returns those that are ready, and why the others are not."""
    boards: dict[str, SshBoard] = {}
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="gf_tvm-") as folder:
        packages = _Packages(Path(folder), args.wheels)

        def work(name: str, ssh: Ssh) -> None:
            try:
                boards[name] = _install_one(name, ssh, args, packages)
            except (FarmError, OSError) as error:
                failures[name] = " ".join(str(error).split())

        threads = [threading.Thread(target=work, args=item, daemon=True) for item in targets.items()]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            if stop.wait(0.1):
                for ssh in targets.values():
                    ssh.close()
                raise KeyboardInterrupt
    return boards, failures


class _Packages:
    """One package for each kind of system, made when first asked for; from any thread."""

    def __init__(self, folder: Path, wheels: Path | None) -> None:
        self._folder, self._wheels = folder, wheels
        self._made: dict[str, Package] = {}
        self._lock = threading.Lock()

    def get(self, system: str) -> Package:
        """The package for a kind of system. Raises FarmError."""
        from ...farm.deploy import make_package

        with self._lock:
            if system not in self._made:
                self._made[system] = make_package(self._folder, system, self._wheels)
            return self._made[system]


def _install_one(name: str, ssh: Ssh, args: argparse.Namespace, packages: _Packages) -> SshBoard:
    from ...farm.deploy import check_board, connect, install

    say = _sayer(name)
    say(f"connects to {ssh.target}")
    board = connect(ssh, name, args.python, args.folder)
    say(str(board))
    check_board(board)
    slow = _Slow(say)
    if not install(board, packages.get(board.system), say, slow.sent, slow.line):
        say("is up to date")
    return board


class _Slow:
    """Says now and then how far a long step is."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._start = self._last = time.monotonic()

    def sent(self, done: int, total: int) -> None:
        """Bytes were copied."""
        if self._due() and done:
            left = (total - done) * (self._last - self._start) / done
            self._say(f"copied {done / 1e6:.0f} of {total / 1e6:.0f} MB, {left:.0f} s left")

    def line(self, text: str) -> None:
        """Pip has said something."""
        if self._due():
            self._say(f"{self._last - self._start:.0f} s: {text.strip()}")

    def _due(self) -> bool:
        now = time.monotonic()
        if now - self._last < LINE_INTERVAL:
            return False
        self._last = now
        return True


def _note_missing_tracker(address: tuple[str, int]) -> None:
    from ...farm.protocol import TrackerConnection, TrackerLost

    try:
        TrackerConnection(address).close()
    except TrackerLost as error:
        _say(f"note: {error}; the boards register as soon as it is there", error=True)


_output_lock = threading.Lock()


def _say(line: str, error: bool = False) -> None:
    with _output_lock:
        print(line, file=sys.stderr if error else sys.stdout, flush=True)


def _sayer(name: str) -> Callable[[str], None]:
    return lambda line: _say(f"{name}: {line}")

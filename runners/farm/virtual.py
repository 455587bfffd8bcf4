"""gf-tvm farm virtual: virtual Pis, for trying a farm without boards."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._output import ProgressBar
from .._signals import interrupted_from_outside
from ._arguments import add_tracker_arguments, tracker_address

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...farm.virtual import VirtualPi

#: Seconds between two looks at the Pis.
_TICK = 0.2
#: Seconds before one that ended is started again: doubled each time, and back to the first when it ran for the last.
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
#: Seconds that one may take to end; it may be in the middle of its start, which has nothing to lose.
_STOP_SECONDS = 3.0


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "virtual",
        help="run virtual Pis under qemu, to try a farm without boards",
        description="Run N virtual Pis on this machine until Ctrl-C: aarch64 TVM and PyTorch under qemu, registered "
        "with a tracker like boards. They show whether everything works; their times say nothing about a board. The "
        "first call makes their system, which takes a minute and 1.2 GB.",
    )
    parser.add_argument("count", type=int, nargs="?", metavar="N", help="how many")
    parser.add_argument("--prepare", action="store_true", help="only make their system, or bring it up to date")
    add_tracker_arguments(parser, required=False)
    parser.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="where their system is stored (default: gf_tvm/virtual-pi in the cache)",
    )
    parser.add_argument(
        "--with",
        dest="extras",
        default="",
        metavar="EXTRA,...",
        help="additional packages: train (scikit-learn), rpc (what TVM's own server needs)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ...errors import FarmError
    from ...farm.virtual import VirtualPi, prepare_root

    if args.prepare == (args.count is not None):
        raise FarmError("give either the number of virtual Pis or --prepare")
    if not args.prepare:
        if args.count < 1:
            raise FarmError(f"the number of virtual Pis must be at least 1, got {args.count}")
        for option in ("tracker", "key"):
            if getattr(args, option) is None:
                raise FarmError(f"--{option} is missing; virtual Pis register with a tracker as boards do")
        tracker = tracker_address(args)
    extras = [name.strip() for name in args.extras.split(",") if name.strip()]
    with interrupted_from_outside():  # the Pis must be ended, and their folders removed, in any case
        with _Preparation() as preparation:
            root = prepare_root(args.root, extras, preparation.show)
        if args.prepare:
            print(root)
            return 0
        with tempfile.TemporaryDirectory(prefix="gf_tvm-virtual-") as folder:
            names = [f"virtual-{number}" for number in range(1, args.count + 1)]
            print("virtual Pis: times measured under emulation say nothing about a board", file=sys.stderr, flush=True)
            _watch([VirtualPi(root, name, tracker, args.key, Path(folder)) for name in names])
    return 0


class _Preparation:
    """Shows the steps of making the system; nothing if it is there."""

    def __init__(self) -> None:
        self._bar: ProgressBar | None = None

    def show(self, number: int, count: int, text: str) -> None:
        """Show that step ``number`` of ``count`` begins."""
        if not count:
            print(f"virtual Pi: {text}", file=sys.stderr, flush=True)
            return
        if self._bar is None:
            self._bar = ProgressBar(count, "making the virtual Pi", unit="step")
        self._bar.update(number, text)

    def __enter__(self) -> _Preparation:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


class _Watched:
    """A virtual Pi that is started again whenever it ends."""

    def __init__(self, pi: VirtualPi) -> None:
        self._pi = pi
        self._shown = 0
        self._pause = _FIRST_PAUSE
        self._start_at: float | None = None
        self._started = 0.0
        self.start()

    def start(self) -> None:
        """Start it."""
        self._shown, self._start_at, self._started = 0, None, time.monotonic()
        self._pi.start()

    def look(self) -> None:
        """Print what it said; start it again if it has ended for long enough. Raises FarmError if that is useless."""
        from ...errors import FarmError

        if self._start_at is not None:
            if time.monotonic() >= self._start_at:
                self.start()
            return
        alive = self._pi.alive  # before its last words are read
        lines = self._pi.output.splitlines(keepends=True)
        if alive and lines and not lines[-1].endswith("\n"):
            lines.pop()
        for line in lines[self._shown :]:
            text = line.rstrip("\n")
            if text.startswith("serving "):
                print(text, flush=True)
            else:
                print(f"{self._pi.name}: {text}", file=sys.stderr, flush=True)
        self._shown = len(lines)
        if alive:
            return
        code = self._pi.exit_code or 0
        if code == 2:  # what every command returns for a user's mistake; it has said which
            raise FarmError(f"{self._pi.name} cannot serve: {(lines or ['it did not say why'])[-1].strip()}")
        if time.monotonic() - self._started > _LONGEST_PAUSE:
            self._pause = _FIRST_PAUSE
        reason = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        print(f"{self._pi.name} {reason}; starting it again in {self._pause:.0f} s", file=sys.stderr, flush=True)
        self._start_at = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)


def _watch(pis: Sequence[VirtualPi]) -> None:
    """Run ``pis`` until this process is interrupted."""
    try:
        watched = [_Watched(pi) for pi in pis]
        while True:
            for one in watched:
                one.look()
            time.sleep(_TICK)
    finally:
        for pi in pis:  # all at once, then wait for each
            if pi.alive:
                pi.signal(signal.SIGTERM)
        for pi in pis:
            pi.stop(_STOP_SECONDS)

"""gf-tvm farm doctor: look at this machine, at a board, or at a farm, and say what is wrong."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import FarmError
from .._output import ProgressBar, check_writable, write_json
from ._arguments import add_ssh_arguments, add_tracker_arguments, tracker_address

if TYPE_CHECKING:
    from ...farm.doctor import Check


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="check this machine, a board or a farm",
        description="Check this machine, or a board over ssh: one line for each thing that measuring, training and "
        "tuning need. With --tracker also the farm, and whether versions agree. The exit code is 0 if nothing failed, "
        "1 if something failed (warnings and unknowns do not count), 2 for a wrong call.",
    )
    parser.add_argument("board", nargs="?", metavar="USER@HOST", help="the board to check over ssh; else this machine")
    add_tracker_arguments(parser, required=False)
    parser.add_argument("--device", metavar="D", help="device profile that this machine compiles for (default: host)")
    parser.add_argument(
        "--library", type=Path, metavar="FILE.gfb", help="run every kernel of a bundle and compare with float64"
    )
    add_ssh_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="also write what was found as JSON; - writes only that")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    only_json = args.json == "-"
    if args.json is not None and not only_json:
        check_writable(args.json)
    if args.library is not None:
        with open(args.library, "rb"):  # before the minutes that everything else may take
            pass
    # A variable of the environment is no reason to ask a tracker where a board or this machine is looked at.
    asked = args.tracker is not None and (args.board is None or "TVM_TRACKER_HOST" not in os.environ)
    address = tracker_address(args) if asked else None
    if args.board is not None and (args.device is not None or address is not None):
        raise FarmError("--device and --tracker are for this machine; leave out USER@HOST")
    from ...farm.doctor import failed, report
    from ...machine.profiles import get_profile

    if args.device is not None:
        get_profile(args.device)

    display = _Display(args.library)
    checks = []
    try:
        for check in _remote(args, display.show) if args.board else _local(args, address, display.show):
            checks.append(check)
            if not only_json:
                display.print(str(check))
    finally:
        display.close()
    found = report(checks)
    if args.board:  # what it says of the machine and its versions is about this one
        found = {"schema": found["schema"], "board": args.board, "time": found["time"], "checks": found["checks"]}
    if only_json:
        print(json.dumps(found, indent=2))
    elif args.json is not None:
        write_json(args.json, found)
    return int(failed(checks))


def _local(
    args: argparse.Namespace, address: tuple[str, int] | None, progress: Callable[[int, int], None]
) -> Iterator[Check]:
    from ...farm.doctor import board_checks, host_checks, verify_library

    yield from board_checks()
    wanted = args.device is not None or address is not None
    yield from host_checks(args.device or "host", address, args.key, tunes=wanted)
    if args.library is not None:
        yield from verify_library(args.library, progress)


def _remote(args: argparse.Namespace, progress: Callable[[int, int], None]) -> Iterator[Check]:
    from ...farm.doctor_ssh import remote_checks
    from ...farm.ssh import Ssh

    return remote_checks(Ssh(args.board, args.ssh_option), args.python, args.folder, args.library, progress)


class _Display:
    """Lines of checks on standard output, and the progress of a bundle's kernels."""

    def __init__(self, library: Path | None) -> None:
        self._label = "" if library is None else library.name
        self._bar: ProgressBar | None = None

    def show(self, done: int, total: int) -> None:
        """Say how many kernels were run."""
        if self._bar is None:
            self._bar = ProgressBar(total, self._label, unit="kernel", initial=0)
        self._bar.update(done)

    def print(self, line: str) -> None:
        """Print a check."""
        if self._bar is not None and sys.stdout.isatty():
            self._bar.write(line)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """End the progress."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

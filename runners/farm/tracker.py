"""gf-tvm farm tracker: TVM's tracker."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

from .._signals import interrupted_from_outside
from ._arguments import TRACKER_PORT, add_bind_arguments, check_bind, say_line


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "tracker",
        help="run TVM's tracker, where boards and tuners meet",
        description="Run TVM's RPC tracker until it is interrupted. Boards register with it, tuners ask it for boards.",
    )
    add_bind_arguments(parser, port=TRACKER_PORT)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ...farm.protocol import Address, show
    from ...farm.tracker import run_tracker

    check_bind(args)

    def ready(address: Address) -> None:
        print(f"tracker on {show(address)}", flush=True)

    with contextlib.suppress(KeyboardInterrupt), interrupted_from_outside():
        run_tracker((args.host, args.port), ready, say_line)
    return 0

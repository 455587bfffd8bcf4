"""gf-tvm farm serve: the server of one board."""

from __future__ import annotations

import argparse
import os
import signal
import socket
from typing import Any

from .._signals import handled
from ._arguments import (
    ROOT_FLAG,
    add_bind_arguments,
    add_root_argument,
    add_tracker_arguments,
    check_bind,
    parse_address,
    say_line,
    tracker_address,
)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="let tuners run kernels on this board",
        description="Register this board with a tracker and run the kernels that tuners send. It survives a "
        "crashing kernel, a lost tracker or a client that hangs; SIGTERM or Ctrl-C ends it.",
    )
    add_tracker_arguments(parser)
    parser.add_argument("--name", metavar="NAME", help="of this board (default: the host name)")
    parser.add_argument(
        "--device",
        metavar="D",
        help="what this board is; with a GPU profile (jetson-nano, sm_NN, cuda) that GPU measures, and the server "
        "only starts if it is there (default: the CPU measures, whatever it is)",
    )
    add_bind_arguments(parser, port=0)
    parser.add_argument(
        "--advertise", metavar="HOST:PORT", help="where tuners reach this server, if that is not HOST:PORT (a tunnel)"
    )
    parser.add_argument(
        "--idle-seconds",
        type=float,
        default=900.0,
        metavar="S",
        help="end a session whose client is idle for this long (default: 900)",
    )
    parser.add_argument(
        "--until-stdin-closes", action="store_true", help="end with standard input, as with an ssh connection"
    )
    add_root_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ...errors import FarmError
    from ...farm.protocol import show
    from ...farm.server import Server, ServerOptions
    from ...machine.gpu import check_device, describe

    check_bind(args)
    tracker = tracker_address(args)
    if not args.idle_seconds > 0:
        raise FarmError(f"--idle-seconds must be more than 0, got {args.idle_seconds}")
    for name, value in (("--key", args.key), ("--name", args.name)):
        if value is not None and (not value or any(c.isspace() or c == ":" for c in value)):
            raise FarmError(f"{name} must be a word without ':', got {value!r}")
    gpu = None if args.device is None else check_device(args.device)
    if gpu is not None:
        # tvm_ffi would compile a helper for passing PyTorch's tensors, for minutes on a Jetson Nano. None are passed.
        os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")
    advertise = None if args.advertise is None else parse_address(args.advertise, "--advertise")
    if os.geteuid() == 0 and not args.allow_root:
        raise FarmError(
            "a server runs what clients send, and as root that can do anything; use another user, "
            f"or {ROOT_FLAG} where the whole machine is there for it"
        )
    # After the checks: whoever has mistyped an option need not wait for it.
    from ...tuning.measuring.board_service import BoardService, preload

    options = ServerOptions(
        key=args.key,
        name=args.name or socket.gethostname(),
        tracker=tracker,
        host=args.host,
        port=args.port,
        advertise=advertise,
        idle_seconds=args.idle_seconds,
        device=args.device or "",
        gpu=gpu,
        service=BoardService,
        preload=preload,
        until_stdin_closes=args.until_stdin_closes,
    )
    server = Server(options, say_line)
    with handled(server.stop, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        server.load()
        if gpu is not None:
            say_line(f"measures with {describe(gpu)}")
        print(f"serving {options.key} as {options.name} on {show(server.address)}", flush=True)
        server.run()
    return 0

"""What the farm's commands share: where the tracker is, who may bind to an open address, lines about what happens."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import re
import sys
import time

from ...errors import FarmError

TRACKER_PORT = 9190
RISK_FLAG = "--whoever-reaches-it-runs-code"
ROOT_FLAG = "--allow-root"


def add_tracker_arguments(parser: argparse.ArgumentParser, key: bool = True, required: bool = True) -> None:
    """Add --tracker and, unless ``key`` is False, --key; TVM's own variables give their defaults."""
    default = environment_tracker()
    parser.add_argument(
        "--tracker",
        metavar="HOST:PORT",
        default=default,
        required=required and default is None,
        help="the tracker (default: TVM_TRACKER_HOST and TVM_TRACKER_PORT of the environment)",
    )
    if key:
        default = os.environ.get("TVM_TRACKER_KEY")
        parser.add_argument(
            "--key",
            metavar="KEY",
            default=default,
            required=required and default is None,
            help="the kind of board, as registered with the tracker (default: TVM_TRACKER_KEY of the environment)",
        )


def environment_tracker() -> str | None:
    """The tracker that TVM's variables name."""
    if not os.environ.get("TVM_TRACKER_HOST"):
        return None
    return f"{os.environ['TVM_TRACKER_HOST']}:{os.environ.get('TVM_TRACKER_PORT', TRACKER_PORT)}"


def tracker_address(args: argparse.Namespace) -> tuple[str, int]:
    """Host and port of --tracker. Raises FarmError."""
    return parse_address(args.tracker, "--tracker")


def parse_address(text: str, option: str) -> tuple[str, int]:
    """``HOST:PORT`` or ``[IPV6]:PORT``. Raises FarmError that names the option."""
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    number = int(port) if re.fullmatch("[0-9]{1,5}", port) else 0
    if not _HOST.fullmatch(host) or not 0 < number < 1 << 16:
        raise FarmError(f"{option} must be HOST:PORT with a port from 1 to 65535, got {text!r}{_meant(text)}")
    return host, number


#: A name, an IPv4 or an IPv6 address, the latter with a zone. Not a URL, a path or a user.
_HOST = re.compile(r"[\w.-]+|[0-9A-Fa-f:.]+(%[\w.-]+)?")


def _meant(text: str) -> str:
    """What to write instead of a URL or USER@HOST, if that is what ``text`` is."""
    found = re.fullmatch(r"(?:(?:[A-Za-z][A-Za-z0-9+.-]*:)?//)?(?:[^/@]*@)?([^/@]+?)(?::([0-9]+))?(?:/.*)?", text)
    if found is None or not {"/", "@"} & set(text):
        return ""
    return f"; write {found[1]}:{found[2] or TRACKER_PORT}"


def add_bind_arguments(parser: argparse.ArgumentParser, port: int) -> None:
    """Add --host, --port and the flag without which an address that others can reach is refused."""
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to bind (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=port, metavar="P", help=f"port (default: {port or 'any free one'})")
    parser.add_argument(
        RISK_FLAG,
        action="store_true",
        dest="open",
        help="allow an address other than loopback; TVM's protocol has no authentication",
    )


def check_bind(args: argparse.Namespace) -> None:
    """Raise FarmError for an address that other machines reach, unless the risk was accepted."""
    if not 0 <= args.port < 1 << 16:
        raise FarmError(f"--port must be from 0 to 65535, got {args.port}")
    try:
        loopback = ipaddress.ip_address(args.host).is_loopback
    except ValueError:
        loopback = args.host == "localhost"
    if not loopback and not args.open:
        raise FarmError(
            f"--host {args.host} is open to other machines, and whoever reaches it runs code there without a password; "
            f"use 127.0.0.1 with a tunnel (gf-tvm farm deploy makes one), or accept that with {RISK_FLAG}"
        )


def add_root_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag without which a board's server refuses to run as root."""
    parser.add_argument(
        ROOT_FLAG, action="store_true", help="allow the server to run as root (a container, a virtual Pi)"
    )


def say_line(line: str) -> None:
    """Print what happens, with the time, for commands that run for days."""
    with contextlib.suppress(OSError):  # of a terminal that was closed; cleaning up goes on
        print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def add_ssh_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that doctor and deploy share."""
    parser.add_argument("--python", default="python3", metavar="P", help="Python of the board (default: python3)")
    parser.add_argument(
        "--folder",
        default="~/.local/share/gf_tvm",
        metavar="DIR",
        help="the installation's folder on the board (default: ~/.local/share/gf_tvm)",
    )
    parser.add_argument(
        "--ssh-option",
        action="append",
        default=[],
        metavar="OPT",
        help="for ssh, may be repeated: NAME=VALUE as in its configuration, or -p, -i, -F, -J with a value "
        "(--ssh-option 'Port=2222', --ssh-option '-i key')",
    )

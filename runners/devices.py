"""gf-tvm devices: list the device profiles."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ._output import check_writable, format_table, write_json


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "devices",
        help="list the device profiles",
        description="List the device profiles that --device takes. 'host' stands for the first that this machine runs. "
        "Those measured on boards are tuned over an RPC tracker, or on such a board itself.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the list as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..devices import get_profile, list_profiles, runs_here
    from ..errors import DeviceError

    if args.json is not None:
        check_writable(args.json)
    profiles = list_profiles()
    try:
        host = get_profile("host").name
    except DeviceError:  # a machine for which kernels cannot be compiled can still list for which ones they can
        host = None
    rows = []
    for profile in profiles:
        here = "host" if profile.name == host else "yes" if runs_here(profile) else "no"
        cache = f"{profile.l1_bytes // 1024} / {profile.l2_bytes // 1024}"
        cache += f" for {profile.l2_cores} cores" if profile.l2_cores > 1 else ""
        threads = "all" if profile.threads is None else profile.threads
        measured = {"here": "here", "rpc": "on boards"}[profile.measured]
        rows.append((profile.name, profile.description, profile.lanes, cache, threads, measured, here))
    headers = ("device", "description", "float32 lanes", "L1 / L2 (KiB)", "threads", "measured", "runs here")
    print(format_table(headers, rows))
    if args.json is not None:
        listed = [{**asdict(profile), "runs_here": runs_here(profile)} for profile in profiles]
        write_json(args.json, {"host": host, "devices": listed})
    return 0

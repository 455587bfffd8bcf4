"""gf-tvm devices: list the device profiles."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._output import check_writable, format_table, write_json

if TYPE_CHECKING:
    from ..machine.profiles import DeviceProfile


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "devices",
        help="list the device profiles",
        description="List the device profiles that --device takes. 'host' stands for the first that this machine runs, "
        "and 'cuda' for this machine's NVIDIA GPU; sm_NN is any GPU of that architecture. Those measured on boards are "
        "tuned over an RPC tracker, or on such a board itself.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the list as JSON")
    parser.set_defaults(run=run)


def _cpu(profile: DeviceProfile) -> tuple[object, ...]:
    """Columns that tell of a CPU; empty where a GPU runs the kernels."""
    if profile.gpu is not None:
        return None, None, None
    cache = f"{profile.l1_bytes // 1024} / {profile.l2_bytes // 1024}"
    cache += f" for {profile.l2_cores} cores" if profile.l2_cores > 1 else ""
    return profile.lanes, cache, "all" if profile.threads is None else profile.threads


def run(args: argparse.Namespace) -> int:
    from ..errors import DeviceError
    from ..machine.profiles import get_profile, list_profiles, runs_here

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
        measured = {"here": "here", "rpc": "on boards"}[profile.measured]
        rows.append((profile.name, profile.description, *_cpu(profile), measured, here))
    headers = ("device", "description", "float32 lanes", "L1 / L2 (KiB)", "threads", "measured", "runs here")
    if args.json is not None:
        listed = [{**asdict(profile), "runs_here": runs_here(profile)} for profile in profiles]
        write_json(args.json, {"host": host, "devices": listed})
    print(format_table(headers, rows))
    return 0

"""gf-tvm farm status: the boards that a tracker knows."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._output import check_writable, format_table, write_json
from ._arguments import add_tracker_arguments, tracker_address

if TYPE_CHECKING:
    from ...farm.tracker import Board

#: Servers report every 5 seconds; one that has not for so long hangs, or its clock is wrong.
_SILENT_SECONDS = 60.0


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "status",
        help="list the boards that a tracker knows",
        description="List the boards that a tracker knows, without taking one. TVM's own servers report only "
        "their address.",
    )
    add_tracker_arguments(parser, key=False)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the list as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ...farm.protocol import show
    from ...farm.tracker import boards

    if args.json is not None:
        check_writable(args.json)
    address = tracker_address(args)
    found = boards(address)
    now = time.time()
    if args.json is not None:
        listed = [{"key": board.key, "address": board.address, **board.info} for board in found]
        write_json(args.json, {"tracker": show(address), "boards": listed})
    print(format_table(*_table(found, now), floats=".1f"))
    if not found:
        print(f"no board is registered with the tracker at {show(address)}")
    return 0


_HEADERS = ("board", "key", "address", "state", "gf_tvm", "TVM", "cores", "MHz", "°C")
_GPU_HEADERS = ("GPU", "GPU\nMHz", "GPU\n°C")
_LAST_HEADERS = ("throttled", "trials", "failed")


def _table(found: list[Board], now: float) -> tuple[list[str], list[list[object]]]:
    """Headers and rows; with columns about GPUs where a board has one."""
    headers = [*_HEADERS, *(_GPU_HEADERS if any(board.info.get("gpu") for board in found) else ()), *_LAST_HEADERS]
    rows = []
    for board in found:
        cells = _cells(board, now)
        rows.append([cells.get(header) for header in headers])
    return headers, rows


def _cells(board: Board, now: float) -> dict[str, object]:
    """By header; what is missing is not known."""
    info = board.info
    cells: dict[str, object] = {"board": board.name, "key": board.key, "address": board.address, "state": "?"}
    if not info:
        return cells
    sensors = info.get("sensors") or {}
    versions = info.get("versions") or {}
    gpu = info.get("gpu")
    return {
        **cells,
        "state": _state(info, now),
        "gf_tvm": versions.get("gf-tvm"),
        "TVM": versions.get("apache-tvm"),
        "cores": info.get("cores"),
        "MHz": sensors.get("mhz"),
        "°C": sensors.get("celsius"),
        "GPU": f"{gpu.get('name')} ({gpu.get('arch')}), CUDA {gpu.get('driver')}" if gpu else None,
        "GPU\nMHz": sensors.get("gpu_mhz"),
        "GPU\n°C": sensors.get("gpu_celsius"),
        "throttled": _throttled(sensors),
        "trials": info.get("trials"),
        "failed": info.get("failed"),
    }


def _state(info: dict[str, Any], now: float) -> str:
    parts = [str(info.get("state", "?"))]
    updated = info.get("updated")
    if isinstance(updated, int | float) and now - updated > _SILENT_SECONDS:
        parts.append(f"silent for {now - updated:.0f} s")
    if info.get("emulated"):
        parts.append("emulated")
    return ", ".join(parts)


def _throttled(sensors: dict[str, Any]) -> str | None:
    """None if the board cannot say."""
    if not sensors.get("known"):
        return None
    text = ", ".join(sensors.get("throttled") or ()) or "no"
    before = [flag for flag in sensors.get("throttled_before") or () if flag not in (sensors.get("throttled") or ())]
    return f"{text} (since boot: {', '.join(before)})" if before else text

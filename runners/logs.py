"""gf-tvm logs: what tuning logs have, and putting those of several farms together."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._output import check_writable, format_table, write_json

if TYPE_CHECKING:
    from ..tuning.merge import LogSummary


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "logs",
        help="show or merge tuning logs",
        description="Show the contents of tuning logs, or merge those of several farms.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    show = actions.add_parser(
        "show",
        help="list logs with their trials and best times",
        description="List the logs of some folders: trials, best and default time, boards. Times are those of the "
        "boards that measured; compare them only within a line.",
    )
    show.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folder of tuning logs")
    show.add_argument("--json", type=Path, metavar="FILE", help="also write the list as JSON")
    show.set_defaults(run=run_show)

    merge = actions.add_parser(
        "merge",
        help="combine the logs of several farms",
        description="Combine folders of logs, device by device. Refused, with nothing written, where two logs of one "
        "workload belong to different targets or kernel definitions or were measured in ways that cannot be compared.",
    )
    merge.add_argument("sources", nargs="+", type=Path, metavar="SRC", help="folder of tuning logs")
    merge.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write to; logs that it has are merged, too"
    )
    merge.add_argument("--device", metavar="D", help="only this device (default: all that the sources have)")
    merge.set_defaults(run=run_merge)


def run_show(args: argparse.Namespace) -> int:
    from ..errors import LogError
    from ..tuning.merge import devices_of, logs_of, summarize

    if args.json is not None:
        check_writable(args.json)
    found, damaged = [], []
    for path in (p for folder in args.folders for device in devices_of(folder) for p in logs_of(folder, device)):
        try:
            found.append(summarize(path))
        except LogError as error:
            damaged.append(str(error))
    headers = ("device", "kernel", "convolution", "trials", "failed", "best ms", "default ms", "gain", "boards", "note")
    if args.json is not None:
        logs = [{**asdict(summary), "gain": summary.gain} for summary in found]
        write_json(args.json, {"logs": logs, "damaged": damaged})
    print(format_table(headers, [_row(summary) for summary in found]))
    for line in damaged:
        print(f"gf-tvm: error: {line}", file=sys.stderr)
    return 2 if damaged else 0


def _row(summary: LogSummary) -> tuple[object, ...]:
    # Nearly all logs are of this dtype and layout, and the table is wide enough.
    kernel, _, convolution = summary.key.removesuffix("_float32_nchw").partition("_n")
    best, default = (seconds and f"{seconds * 1e3:.3g}" for seconds in (summary.seconds, summary.default_seconds))
    notes = [
        *(["emulated: no board's times"] if summary.emulated else []),
        *(["cold cache"] if summary.cache == "cold" else []),
        *(["not confirmed"] if summary.seconds and not summary.confirmed else []),
    ]
    return (
        *(summary.device, kernel, f"n{convolution}", summary.trials, summary.failed, best, default),
        *(summary.gain and f"{summary.gain:.2f}x", ", ".join(summary.boards) or None, ", ".join(notes) or None),
    )


def run_merge(args: argparse.Namespace) -> int:
    from ..tuning.merge import devices_of, merge

    found = [devices_of(source) for source in args.sources]
    devices = sorted({device for names in found for device in names}) if args.device is None else [args.device]
    for device in devices:
        merged = merge(args.sources, args.out, device)
        rows = [(log.path.stem, log.sources, log.records, log.added, log.repeated) for log in merged]
        print(format_table(("workload", "files", "records", "new", "repeated"), rows))
        print(f"{args.out / device}: {len(merged)} logs, {sum(log.added for log in merged)} new records")
    return 0

"""gf-tvm report: one page with plots from the JSON files of the other commands."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of the command line."""
    parser = subparsers.add_parser(
        "report",
        help="make a page with plots from results",
        description="Make one self-contained HTML page, which needs no network, and its plots as SVG and PNG, from "
        "the JSON files of gf-tvm compare, tune, train and evaluate and from tuning logs. Files of several kinds, and "
        "several of one kind, may be given; what is not given is left out.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a JSON file, or a tuning log (.jsonl)")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for index.html and the plots; made if missing"
    )
    parser.add_argument("--title", metavar="T", help="of the page")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the report. Returns the exit code; raises GfTvmError for a user's mistake."""
    from ..report.page import write_report

    page = write_report(args.files, args.out, args.title)
    print(f"{page}: its plots are next to it as SVG and PNG files")
    return 0

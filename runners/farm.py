"""gf-tvm farm: boards behind TVM's tracker."""

from __future__ import annotations

import importlib
from typing import Any

#: One module of this package each: ``_farm_<name>``; in the order of ``--help``.
COMMANDS = ("tracker", "serve", "status", "deploy", "doctor", "virtual")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "farm",
        help="tracker, boards, and their state",
        description="Boards on which gf-tvm tune measures, and the tracker where tuner and boards meet.",
    )
    commands = parser.add_subparsers(dest="farm_command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"._farm_{name}", __package__).add_parser(commands)

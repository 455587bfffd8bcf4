"""gf-tvm farm: boards behind TVM's tracker."""

from __future__ import annotations

from typing import Any

from . import deploy, doctor, serve, status, tracker, virtual

#: In the order of ``--help``.
COMMANDS = (tracker, serve, status, deploy, doctor, virtual)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "farm",
        help="tracker, boards, and their state",
        description="Boards on which gf-tvm tune measures, and the tracker where tuner and boards meet.",
    )
    commands = parser.add_subparsers(dest="farm_command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)

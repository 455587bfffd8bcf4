"""``command-help``: a section with the ``--help`` of a program and of each of its commands, at any depth.

The argument is the program's main function (``module:function``); the parser is the one that it parses with.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

#: Characters in a line of help: as many as the theme shows.
WIDTH = 90


class Found(BaseException):
    """Carries the parser out of the main function, past whatever that does with exceptions."""


def parser_of(path: str) -> argparse.ArgumentParser:
    module, _, function = path.partition(":")
    main = getattr(importlib.import_module(module), function)

    def stop(parser: argparse.ArgumentParser, *args: object) -> None:
        raise Found(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            main([])
        except Found as found:
            parser: argparse.ArgumentParser = found.args[0]
            return parser
    raise ValueError(f"{path} parses no arguments")


def commands_of(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


class CommandHelp(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        # Colours are new in Python 3.14's argparse.
        with mock.patch.dict(os.environ, {"COLUMNS": str(WIDTH), "NO_COLOR": "1"}):
            return [self.section(parser_of(self.arguments[0]))]

    def section(self, parser: argparse.ArgumentParser) -> nodes.section:
        identifier = nodes.make_id(parser.prog)
        section = nodes.section(ids=[identifier], names=[nodes.fully_normalize_name(parser.prog)])
        section += nodes.title("", "", nodes.literal("", parser.prog))
        section += nodes.literal_block("", parser.format_help(), language="none")
        section += [self.section(command) for command in commands_of(parser)]
        return section


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}

"""An option --config FILE: a JSON object of option names and values; options on the command line override the file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import GfTvmError
from ..files import MAX_JSON, read_limited


class ConfigError(GfTvmError):
    """A configuration file that cannot be read or does not fit the command."""


def add_config_option(parser: argparse.ArgumentParser, schema: str) -> None:
    """Give ``parser``, when all its other options are added, an option ``--config FILE``.

    Args:
        schema: of the file's optional field ``schema``.
    """
    parser.add_argument(
        "--config", metavar="FILE", help="take settings from this JSON file (made by gf-tvm evaluate); options override"
    )
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    reader.add_argument("--config")
    options: dict[str, list[argparse.Action]] = {}
    for action in parser._actions:
        if action.dest not in ("help", "config"):
            options.setdefault(action.dest, []).append(action)
    parse = parser.parse_known_args

    def parse_known_args(args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        # The file's values become defaults before anything is parsed: then it does not matter where --config stands.
        try:
            path = reader.parse_known_args(args)[0].config
        except argparse.ArgumentError:  # --config without a value, which the parser itself reports
            path = None
        if path is not None:
            for name, value in _read(Path(path), schema, list(options)).items():
                for action in options[name]:
                    action.default, action.required = value, False
        return parse(args, namespace)

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign, assignment]


def _read(path: Path, schema: str, known: list[str]) -> dict[str, Any]:
    """The file's settings. Raises ConfigError."""
    try:
        content = json.loads(read_limited(path, MAX_JSON).decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this configuration: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: a configuration must be JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a configuration must be an object of settings, got {type(content).__name__}")
    if content.pop("schema", schema) != schema:
        raise ConfigError(f"{path}: not a configuration of schema {schema!r}")
    for name, value in content.items():
        if name not in known:
            raise ConfigError(f"{path}: unknown setting {name!r}; known: {', '.join(known)}")
        if not isinstance(value, str | int | float | None):
            raise ConfigError(f"{path}: {name} must be a single value, got {value!r}")
    # As written on a command line, except where JSON's own type says more.
    return {name: str(value) if name == "patch" else value for name, value in content.items()}

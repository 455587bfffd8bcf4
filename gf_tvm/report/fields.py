"""Checks of values that come from files: each says in one line which field is wrong and what would be right."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ReportError


@dataclass(frozen=True)
class Kind:
    """What a field may be: a test of the value, and the words for what passes it."""

    words: str
    fits: Callable[[Any], bool]

    def or_none(self) -> Kind:
        """The same, or null."""
        return Kind(f"{self.words} or null", lambda value: value is None or self.fits(value))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _integer(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _pair(value: Any, least: int) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_integer(item, least) for item in value)


def each(kind: Kind) -> Kind:
    """A list of ``kind`` with at least one item."""
    return Kind(
        f"a list of {kind.words}, not empty",
        lambda value: isinstance(value, list) and bool(value) and all(kind.fits(item) for item in value),
    )


def list_of(kind: Kind) -> Kind:
    """A list of ``kind``, which may be empty."""
    return Kind(f"a list of {kind.words}", lambda value: isinstance(value, list) and all(map(kind.fits, value)))


def one_of(*values: str) -> Kind:
    """One of these texts."""
    return Kind(f"one of {', '.join(values)}", lambda value: isinstance(value, str) and value in values)


TEXT = Kind("text", lambda value: isinstance(value, str) and bool(value))
TRUTH = Kind("true or false", lambda value: isinstance(value, bool))
NUMBER = Kind("a number", _number)
ABOVE_ZERO = Kind("a number above 0", lambda value: _number(value) and value > 0)
NOT_NEGATIVE = Kind("a number of at least 0", lambda value: _number(value) and value >= 0)
SHARE = Kind("a number from 0 to 1", lambda value: _number(value) and 0 <= value <= 1)
# Of float32 sums, and so at times a little beyond 1.
COSINE = Kind("a number from -1 to 1", lambda value: _number(value) and abs(value) <= 1.001)
COUNT = Kind("an integer of at least 0", _integer)
SIZE = Kind("an integer of at least 1", lambda value: _integer(value, 1))
SIZES = Kind("two integers of at least 1", lambda value: _pair(value, 1))
OFFSETS = Kind("two integers of at least 0", lambda value: _pair(value, 0))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
OBJECTS = each(OBJECT)
TEXTS = Kind("an object of texts", lambda value: isinstance(value, dict) and all(map(TEXT.fits, value.values())))


def check(where: str, values: Any, kinds: Mapping[str, Kind]) -> None:
    """Raise ReportError unless ``values`` is an object that has these fields, each of its kind.

    Args:
        where: file and row, for the message.
    """
    if not isinstance(values, dict):
        raise ReportError(f"{where}: must be an object, got {shown(values)}")
    for name, kind in kinds.items():
        if name not in values:
            raise ReportError(f"{where}: {name!r} is missing; it must be {kind.words}")
        if values[name] == [] and kind.words.endswith("not empty"):
            raise ReportError(f"{where}: {name!r} is empty: there is nothing to report")
        if not kind.fits(values[name]):
            raise ReportError(f"{where}: {name!r} must be {kind.words}, got {shown(values[name])}")


def shown(value: Any) -> str:
    """``value`` in a message: a long one is cut."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

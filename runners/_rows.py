"""How rows of a comparison are named, and their numbers written."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..comparison.rows import ChainRow, Row


def label(row: Row | ChainRow) -> str:
    """The case's or the chain's name, and its dtype if that is not the usual one."""
    return row.name if row.dtype == "float32" else f"{row.name} {row.dtype}"


def digits(value: float) -> str:
    """Three significant digits, without an exponent for large numbers."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

"""What a page is made of: sections with figures, each with its table and the conditions of its numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..machine.allocator import label_of
from .sources import Source

MEASURED, EMULATED, ESTIMATED = "measured", "emulated", "estimated"

# Okabe and Ito's palette: told apart by people with any colour vision. The first three are those of
# gf_tvm.comparison.plot.
EXACT_COLOR = "#D55E00"
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

#: Inches. Narrow, so that the text of a figure can be read on a phone.
WIDTH = 4.8


@dataclass(frozen=True)
class Column:
    """A column of a table: its header, and how a value (not None) is written."""

    header: str
    write: Callable[[Any], str] = str


@dataclass(frozen=True)
class Table:
    """The numbers of a figure, as they are in the files; None is written as a dash, a tuple as several values."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Exhibit:
    """A figure with its numbers.

    Args:
        name: of its files, without ending; unique on a page after :func:`gf_tvm.report.page.numbered`.
        title, text: heading and explanation.
        figure: a matplotlib figure.
        table: the numbers that the figure shows.
        conditions: (what, value) pairs: files, machine, threads, versions; all of them, which the pictures' files hold.
            A page states those that figures share once, see :func:`common_conditions`.
        basis: measured, emulated or estimated; "measured and estimated" where both are shown.
    """

    name: str
    title: str
    text: str
    figure: Any
    table: Table
    conditions: tuple[tuple[str, str], ...]
    basis: str


@dataclass(frozen=True)
class Section:
    """Exhibits under a common heading, and paragraphs before them."""

    title: str
    exhibits: tuple[Exhibit, ...]
    paragraphs: tuple[str, ...] = field(default=())


Conditions = tuple[tuple[str, str], ...]


def common_conditions(exhibits: Sequence[Exhibit]) -> Conditions:
    """The conditions that all of ``exhibits`` have, in the first one's order."""
    return tuple(pair for pair in exhibits[0].conditions if all(pair in exhibit.conditions for exhibit in exhibits))


def without(conditions: Conditions, stated: Conditions) -> Conditions:
    """``conditions`` but for those that are stated already."""
    return tuple(pair for pair in conditions if pair not in stated)


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def megabytes(value: float) -> str:
    """Bytes as 1e6 bytes."""
    return digits(value / 1e6)


def giga(value: float) -> str:
    """In units of 1e9."""
    return digits(value / 1e9)


def milliseconds(value: float) -> str:
    """Seconds as ms."""
    return digits(value * 1e3)


def percent(value: float) -> str:
    """A share as percent, two decimals: scores differ by less than a point."""
    return f"{100 * value:.2f}"


def times(value: float) -> str:
    """A ratio."""
    return f"{digits(value)}x"


def conditions_of(sources: Iterable[Source], head: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Files, machine, threads and versions of a document's ``head``."""
    machine = head["machine"]
    gpu = machine.get("gpu")
    ran = gpu.get("name") if isinstance(gpu, Mapping) else machine.get("cpu")
    parts = [str(ran or "unknown machine")]
    if isinstance(gpu, Mapping) and machine.get("cpu"):
        parts.append(f"host: {machine['cpu']}")
    if machine.get("cores"):
        parts.append(f"{machine['cores']} cores")
    if machine.get("system"):
        parts.append(str(machine["system"]))
    return [
        ("Files", ", ".join(dict.fromkeys(source.name for source in sources))),
        ("Machine", ", ".join(parts)),
        ("Threads", str(head["threads"])),
        # Files of older versions do not say it.
        *([("Allocator", label_of(machine))] if "allocator" in machine else []),
        ("Versions", versions_line(head["versions"])),
    ]


def versions_line(versions: Mapping[str, Any]) -> str:
    """One line; what is not installed is left out."""
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)


def basis_of(machine: Mapping[str, Any]) -> str:
    """Whether numbers of this machine are measured or emulated, as its description says."""
    gpu = machine.get("gpu")
    emulated = machine.get("emulated") or (isinstance(gpu, Mapping) and gpu.get("emulated"))
    return EMULATED if emulated else MEASURED


def figure(height: float) -> Any:
    """A matplotlib figure of the page's width (without pyplot: no global state, and no display is looked for)."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def tidy(axes: Any, grid: str) -> None:
    """A grid behind the data along ``grid`` (x, y or both), and no box around it."""
    axes.grid(axis=grid, color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def horizontal_bars(
    axes: Any, labels: Sequence[str], series: Mapping[str, tuple[str, Sequence[float | None]]], write: Any
) -> None:
    """Grouped bars: for each label one bar per series, with its value beside it.

    Args:
        series: name -> (colour, one value per label; None draws no bar).
        write: value -> text.
    """
    bar = 0.8 / len(series)
    largest = max((value for _, values in series.values() for value in values if value is not None), default=0) or 1
    for index, (name, (color, values)) in enumerate(series.items()):
        shift = (index - (len(series) - 1) / 2) * bar
        known = [(place + shift, value) for place, value in enumerate(values) if value is not None]
        if not known:
            continue
        places, lengths = zip(*known, strict=True)
        axes.barh(places, lengths, bar, color=color, label=name)
        for y, value in known:
            axes.annotate(write(value), (value, y), (3, 0), textcoords="offset points", va="center", fontsize=7.5)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)  # the first on top
    axes.set_xlim(0, 1.18 * largest)  # room for the values
    tidy(axes, "x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)

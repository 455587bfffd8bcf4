"""The picture of a comparison: how much faster than the exact backward pass, case by case, and how much is possible."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import GfTvmError
from ..files import create
from ..shapes.cases import format_patch
from .rows import Row
from .run import Comparison

#: What a picture's file may end in.
ENDINGS = (".png", ".svg", ".pdf")

# Okabe and Ito's palette: told apart by people with any colour vision.
PLAIN_COLOR, KERNEL_COLOR = "#999999", "#0072B2"


def check_plot(path: str | os.PathLike[str]) -> None:
    """Raise GfTvmError where :func:`plot` could not work: no matplotlib, or an ending other than :data:`ENDINGS`."""
    if importlib.util.find_spec("matplotlib") is None:
        raise GfTvmError("a picture needs matplotlib: pip install 'gf-tvm[plot]'")
    if Path(path).suffix.lower() not in ENDINGS:
        raise GfTvmError(f"cannot draw '{os.fspath(path)}': the file must end in {', '.join(ENDINGS)}")


def plot(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Draw the rows of ``comparison`` as speedups over the exact backward pass, one panel per patch.

    Args:
        comparison: at least one row.
        path: PNG, SVG or PDF by its ending; written whole or not at all.

    Raises:
        GfTvmError: as :func:`check_plot`, or ``path`` cannot be written.
    """
    check_plot(path)
    panels: dict[str, list[Bar]] = {}
    for row in comparison.rows:
        panels.setdefault(format_patch(row.patch), []).append(_bar(row))
    first = comparison.rows[0]
    title = (
        f"Filtered against exact ({first.baseline}) backward pass\n"
        f"{comparison.device_name}, threads: {comparison.threads}, {comparison.bandwidth_gbs:.1f} GB/s, "
        f"{comparison.peak_gflops:.0f} GFLOP/s"
    )
    save(speedup_figure(panels, title), path)


@dataclass(frozen=True)
class Bar:
    """How many times as fast as the exact pass a case is: in two ways, the first the simpler one, and at the limit."""

    name: str
    plain: float
    kernel: float
    limit: float


#: What the two bars of a convolution are.
_SERIES = ("filtered, plain PyTorch operators", "filtered, gf_tvm")


def speedup_figure(
    panels: Mapping[str, Sequence[Bar]], title: str = "", narrow: bool = False, series: Sequence[str] = _SERIES
) -> Any:
    """Draw a panel of bars for each title of ``panels``.

    Args:
        panels: at least one, with at least one bar each.
        narrow: for narrow screens.
        series: what ``plain`` and ``kernel`` of the bars are, for the legend.

    Returns:
        The matplotlib figure.
    """
    from matplotlib.figure import Figure

    heights = [0.9 + 0.42 * len(bars) for bars in panels.values()]
    # Figure without pyplot: no global state, and no display is looked for.
    figure = Figure(figsize=(4.8 if narrow else 8.5, sum(heights) + 1.2), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    shown = [value for bars in panels.values() for bar in bars for value in (bar.plain, bar.kernel, bar.limit)]
    low, high = 0.9 * min(1, *shown), 1.2 * max(1, *shown)
    for axes, (name, bars) in zip(all_axes, panels.items(), strict=True):
        _panel(axes, bars, (low, high), series)
        axes.set_title(name, loc="left", fontsize=10)
    all_axes[-1].set_xlim(low, high)  # all panels share it
    all_axes[-1].set_xlabel(f"speedup over {'exact' if narrow else 'the exact backward pass'} (logarithmic)")
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1 if narrow else 3, frameon=False)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a matplotlib figure, whole or not at all. Raises GfTvmError."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part{path.suffix}")
    try:
        with create(part) as file:
            figure.savefig(file, dpi=150, format=path.suffix.removeprefix("."))
        os.replace(part, path)
    except OSError as error:
        raise GfTvmError(f"cannot write '{path}': {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)


def _bar(row: Row) -> Bar:
    name = row.name if row.dtype == "float32" else f"{row.name} {row.dtype}"
    return Bar(name, row.baseline_ms / row.reference_ms, row.speedup, row.baseline_ms / row.roofline_ms)


def _panel(axes: object, rows: Sequence[Bar], limits: tuple[float, float], series: Sequence[str]) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    plain, kernel, limit = ([getattr(row, name) for row in rows] for name in ("plain", "kernel", "limit"))
    positions = range(len(rows))
    bar = 0.38
    low, high = limits
    # A bar on a logarithmic axis starts at 1: as fast as the exact pass.
    for shift, values, color, label in (
        (-bar / 2, plain, PLAIN_COLOR, series[0]),
        (bar / 2, kernel, KERNEL_COLOR, series[1]),
    ):
        at = [position + shift for position in positions]
        axes.barh(at, [value - 1 for value in values], bar, left=1, color=color, label=label)
        for y, value in zip(at, values, strict=True):
            text = f"{value:.3g}" if value < 100 else f"{value:.0f}"
            # Inside a bar that is long enough, so that it does not hide the limit.
            inside = math.log(max(value, 1)) > 0.15 * math.log(high / low)
            axes.annotate(
                text,
                (max(value, 1), y),
                (-4 if inside else 4, 0),
                textcoords="offset points",
                va="center",
                ha="right" if inside else "left",
                color="white" if inside and color == KERNEL_COLOR else "black",
                fontsize=8,
            )
    axes.scatter(
        limit, list(positions), marker="|", s=300, color="black", label="roofline limit of this machine", zorder=3
    )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yticks(list(positions), [row.name for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)

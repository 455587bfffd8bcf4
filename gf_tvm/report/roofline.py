"""The roofline of a comparison: operations per second over operations per byte, and the machine's two limits."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..comparison.plot import KERNEL_COLOR, PLAIN_COLOR, check_plot, save
from ..shapes.cases import format_patch

#: Where a name may stand: points from its mark, and the angle; the nearest first, and beside it rather than above.
_PLACES = tuple(
    (distance, math.radians(angle))
    for distance in (8, 20, 32, 46, 62, 80)
    for angle in ((0, 180, -90, 90) if distance == 8 else (-25, 25, -50, 50, -155, 155, -130, 130, -75, 75))
)

#: The points of a case: time, colour, marker, its size, what it is.
_POINTS = (
    ("reference_ms", PLAIN_COLOR, "o", 34, "filtered, plain PyTorch operators"),
    ("gf_tvm_ms", KERNEL_COLOR, "o", 34, "filtered, gf_tvm"),
    ("gf_tvm_kernel_ms", KERNEL_COLOR, "_", 60, "gf_tvm, into existing outputs"),
)
_MARKERS = tuple(time for time, *_ in _POINTS)


def roofline_plot(document: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw :func:`roofline_figure` to a file.

    Args:
        document: what ``benchmarks/cpu.py --json`` writes, with at least one row.
        path: PNG, SVG or PDF by its ending; written whole or not at all.

    Raises:
        GfTvmError: no matplotlib, another ending, or ``path`` cannot be written.
    """
    check_plot(path)
    peak, bandwidth = limits(document)
    title = (
        f"Filtered backward pass under the limits of this machine\n{document['machine']['cpu']}, threads: "
        f"{document['threads']}, {bandwidth:.1f} GB/s, {peak:.0f} GFLOP/s (medians of the run)"
    )
    save(roofline_figure(document, title), path)


def limits(document: Mapping[str, Any]) -> tuple[float, float]:
    """GFLOP/s and GB/s: medians over the rows where each has its own, else those of the whole comparison."""
    rows = document["rows"]
    if all(isinstance(row.get(name), Mapping) for row in rows for name in ("peak_gflops", "bandwidth_gbs")):
        peak, bandwidth = (
            statistics.median(row[name]["median"] for row in rows) for name in ("peak_gflops", "bandwidth_gbs")
        )
        return peak, bandwidth
    return float(document["peak_gflops"]), float(document["bandwidth_gbs"])


def roofline_figure(document: Mapping[str, Any], title: str = "", stacked: bool = False) -> Any:
    """Draw a panel per patch; the cases of the kernel are named.

    Args:
        document: rows with ``name``, ``patch``, ``operations``, ``moved_bytes`` and times in ms, and the limits.
        stacked: one panel above the other, for narrow screens; else side by side.

    Returns:
        The matplotlib figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = document["rows"]
    patches = list(dict.fromkeys(tuple(row["patch"]) for row in rows))
    panels = [[row for row in rows if tuple(row["patch"]) == patch] for patch in patches]
    # Figure without pyplot: no global state, and no display is looked for.
    size = (4.8, 0.8 + 3.6 * len(panels)) if stacked else (1.2 + 5.4 * len(panels), 6.0)
    figure = Figure(figsize=size, layout="constrained")
    shape = (len(panels), 1) if stacked else (1, len(panels))
    all_axes = figure.subplots(*shape, squeeze=False, sharex=True, sharey=True).flatten()
    peak, bandwidth = limits(document)
    intensities = [intensity(row) for row in rows]
    speeds = [speed(row, time) for row in rows for time in ("reference_ms", "gf_tvm_ms")]
    xs = (min(*intensities, peak / bandwidth) / 2, max(*intensities, peak / bandwidth) * 4)
    ys = (min(speeds) / 1.5, max(peak, *speeds) * 2.5)
    for axes, panel, patch in zip(all_axes, panels, patches, strict=True):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(*xs)
        axes.set_ylim(*ys)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(NullFormatter())  # which, where there are few decades, has labels of its own
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.set_title(format_patch(patch), loc="left", fontsize=11)
        if not stacked or panel is panels[-1]:
            axes.set_xlabel("floating-point operations per byte moved")
        if stacked or panel is panels[0]:
            axes.set_ylabel("GFLOP/s")
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        _panel(axes, panel, (peak, bandwidth), xs)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1 if stacked else 3, frameon=False)
    if title:
        figure.suptitle(title, fontsize=11)
    # Names are placed where they cover nothing, which needs the panels' final sizes.
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes, panel in zip(all_axes, panels, strict=True):
        _slope_label(axes, bandwidth)
        _names(axes, panel, (peak, bandwidth), size=7 if stacked else 8)
    return figure


def intensity(row: Mapping[str, Any]) -> float:
    """Floating-point operations per byte moved."""
    return float(row["operations"] / row["moved_bytes"])


def speed(row: Mapping[str, Any], time: str) -> float:
    """GFLOP/s that the time in the column ``time`` (ms) means."""
    return float(row["operations"] / row[time] / 1e6)


def _panel(
    axes: Any,
    rows: Sequence[Mapping[str, Any]],
    limits: tuple[float, float],
    xs: tuple[float, float],
) -> None:
    peak, bandwidth = limits
    corner = peak / bandwidth
    axes.plot([xs[0], corner, xs[1]], [xs[0] * bandwidth, peak, peak], color="black", linewidth=1.2, zorder=2)
    axes.annotate(
        f"sgemm {peak:.0f} GFLOP/s", (xs[1], peak), (0, 4), textcoords="offset points", ha="right", fontsize=8
    )
    x = [intensity(row) for row in rows]
    for time, color, marker, size, label in _POINTS:
        found = [(a, speed(row, time)) for a, row in zip(x, rows, strict=True) if row.get(time) is not None]
        if found:
            axes.scatter(*zip(*found, strict=True), s=size, color=color, marker=marker, label=label, zorder=3)


def _slope_label(axes: Any, bandwidth: float) -> None:
    """Name the slope, along it; its angle is known once the panels have their sizes."""
    low_x, low_y = (limit[0] for limit in (axes.get_xlim(), axes.get_ylim()))
    start = max(low_x, low_y / bandwidth)
    (x, y), (further_x, further_y) = axes.transData.transform([(a, a * bandwidth) for a in (start, 2 * start)])
    axes.annotate(
        f"copying {bandwidth:.1f} GB/s",
        (1.3 * start, 1.3 * start * bandwidth),
        (0, 4),
        textcoords="offset points",
        rotation=math.degrees(math.atan2(further_y - y, further_x - x)),
        rotation_mode="anchor",
        fontsize=8,
    )


def _names(axes: Any, rows: Sequence[Mapping[str, Any]], limits: tuple[float, float], size: float) -> None:
    """Name the points of the kernel, each at the nearest place that is free."""
    from matplotlib.text import Text

    renderer = axes.figure.canvas.get_renderer()
    marks = [
        axes.transData.transform((intensity(row), speed(row, time)))
        for row in rows
        for time in _MARKERS
        if row.get(time) is not None
    ]
    peak, bandwidth = limits
    low, high = axes.get_xlim()
    slope = [low * (high / low) ** (i / 100) for i in range(101)]
    marks += [axes.transData.transform((a, min(a * bandwidth, peak))) for a in slope]
    # What stands there already: the names of the limits.
    taken: list[Any] = [Text.get_window_extent(text, renderer) for text in axes.texts]
    inside = axes.get_window_extent(renderer)
    for row in sorted(rows, key=intensity):
        point = (intensity(row), speed(row, "gf_tvm_ms"))
        for distance, angle in _PLACES:
            dx, dy = distance * math.cos(angle), distance * math.sin(angle)
            text = axes.annotate(
                row["name"],
                point,
                (dx, dy),
                textcoords="offset points",
                ha="left" if dx > 1 else "right" if dx < -1 else "center",
                va="center" if abs(dx) > 1 else "bottom" if dy > 0 else "top",
                fontsize=size,
                zorder=4,
                # A line leads to what stands far from its point.
                arrowprops=None if distance < 12 else {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6},
            )
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer).padded(5.0)  # of an annotation it would include the line
            free = not any(box.overlaps(other) for other in taken) and not any(box.contains(*mark) for mark in marks)
            if free and all(inside.contains(x, y) for x, y in (box.min, box.max)):
                break
            text.remove()
        else:  # no place is free: over something is better than not at all
            text = axes.annotate(row["name"], point, (8, 0), textcoords="offset points", va="center", fontsize=size)
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)
        taken.append(box)

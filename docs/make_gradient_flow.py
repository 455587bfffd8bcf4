"""Draws docs/gradient_flow.svg: how a gradient flows through one filtered convolution. Run with no arguments."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

# Grey: maps of full size; orange: on the patch grid; blue: not computed by gf_tvm.
FULL, GRID, EXACT = "#e9ecef", "#ffd8a8", "#a5d8ff"
LINE = "#343a40"


def tensor(ax: Axes, x: float, y: float, cells: int, name: str, shape: str, color: str, size: float = 1.0) -> None:
    """A map of ``cells`` x ``cells`` pixels or patches, centred at (x, y), with its name and shape below."""
    left, bottom = x - size / 2, y - size / 2
    ax.add_patch(Rectangle((left, bottom), size, size, facecolor=color, edgecolor=LINE, linewidth=0.6))
    inner = [i * size / cells for i in range(1, cells)]
    ax.vlines([left + i for i in inner], bottom, bottom + size, color=LINE, linewidth=0.4)
    ax.hlines([bottom + i for i in inner], left, left + size, color=LINE, linewidth=0.4)
    ax.text(x, y - size / 2 - 0.08, name, ha="center", va="top", fontsize=11, weight="bold", color=LINE)
    ax.text(x, y - size / 2 - 0.33, shape, ha="center", va="top", fontsize=7.5, color=LINE)


def kernel(ax: Axes, x: float, y: float, name: str, does: str, color: str = "white", width: float = 1.95) -> None:
    """A computation centred at (x, y)."""
    box = FancyBboxPatch(
        (x - width / 2, y - 0.32), width, 0.64, boxstyle="round,pad=0.02", facecolor=color, edgecolor=LINE
    )
    ax.add_patch(box)
    ax.text(x, y + 0.1, name, ha="center", va="center", fontsize=9, family="monospace", color=LINE)
    ax.text(x, y - 0.14, does, ha="center", va="center", fontsize=7.5, color=LINE)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], style: str = "-") -> None:
    """An arrow from ``start`` to ``end``."""
    look = {"arrowstyle": "-|>", "color": LINE, "linestyle": style, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.2}
    ax.annotate("", end, start, arrowprops=look)


def draw() -> plt.Figure:
    """The whole drawing, for patches of 2 x 2 on maps of 8 x 8."""
    figure, ax = plt.subplots(figsize=(11.0, 6.6))
    ax.set(xlim=(-0.9, 12.6), ylim=(-3.8, 4.35), aspect="equal")
    ax.axis("off")

    ax.text(-0.8, 4.1, "forward pass: exact", fontsize=12, weight="bold", color=LINE)
    tensor(ax, 0, 3, 8, "x", "n, ci, h, w", FULL)
    kernel(ax, 5.2, 3, "conv2d", "PyTorch's own", EXACT)
    tensor(ax, 11.4, 3, 8, "y", "n, co, hy, wy", FULL)
    arrow(ax, (0.6, 3), (4.17, 3))
    arrow(ax, (6.23, 3), (10.8, 3))
    kernel(ax, 2.4, 1.5, "filter_input", "sum over each patch")
    arrow(ax, (0.6, 2.6), (1.7, 1.88))
    arrow(ax, (3.42, 1.5), (4.72, 1.5))
    tensor(ax, 5.2, 1.5, 4, "", "", GRID, 0.8)
    ax.text(5.75, 1.75, "x~", fontsize=11, weight="bold", va="center", color=LINE)
    ax.text(5.75, 1.5, "n, ph, pw, ci", fontsize=7.5, va="center", color=LINE)
    ax.text(5.75, 1.25, "one value per patch: all that is kept of x", fontsize=7.5, va="center", color=LINE)

    ax.text(-0.8, 0.5, "backward pass: filtered", fontsize=12, weight="bold", color=LINE)
    frame = FancyBboxPatch(
        (1.2, -3.2), 8.85, 3.15, boxstyle="round,pad=0.05", facecolor="none", edgecolor=LINE, linestyle="--"
    )
    ax.add_patch(frame)
    ax.text(9.95, -0.22, "one fused kernel: backward", fontsize=8.5, ha="right", va="center", color=LINE)
    row, top = -2.2, -0.7
    tensor(ax, 11.4, row, 8, "grad_y", "n, co, hy, wy", FULL)
    arrow(ax, (10.8, row), (9.92, row))
    kernel(ax, 8.9, row, "filter_grad", "mean over each patch")
    arrow(ax, (7.88, row), (7.48, row))
    tensor(ax, 7.0, row, 4, "g~", "n, co, ph, pw", GRID, 0.8)
    arrow(ax, (6.52, row), (6.12, row))
    kernel(ax, 5.1, row, "input_grad", "product with W~")
    arrow(ax, (4.08, row), (3.78, row))
    tensor(ax, 3.3, row, 4, "grad_x~", "n, ci, ph, pw", GRID, 0.8)
    arrow(ax, (2.82, row), (2.57, row))
    kernel(ax, 1.95, row, "expand", "to every pixel", width=1.2)
    arrow(ax, (1.33, row), (0.6, row))
    tensor(ax, 0, row, 8, "grad_x", "n, ci, h, w", FULL)

    kernel(ax, 5.2, top, "weight_grad", "product with x~")
    arrow(ax, (5.2, 1.02), (5.2, top + 0.36), "--")
    arrow(ax, (7.0, row + 0.46), (6.1, top - 0.36))
    arrow(ax, (4.18, top), (0.78, top))
    ax.text(0.7, top, "grad_W", ha="right", va="center", fontsize=11, weight="bold", color=LINE)
    ax.text(0.7, top - 0.26, "one value for all taps", ha="right", va="center", fontsize=7.5, color=LINE)
    ax.text(5.1, -3.55, "W~: W summed over its taps", fontsize=7.5, ha="center", va="center", color=LINE)
    arrow(ax, (5.1, -3.43), (5.1, row - 0.36))
    arrow(ax, (8.9, row - 0.36), (8.9, -3.45))
    ax.text(8.9, -3.62, "grad_b", ha="center", va="center", fontsize=11, weight="bold", color=LINE)
    ax.text(9.45, -3.62, "exact", va="center", fontsize=7.5, color=LINE)
    return figure


def main() -> None:
    # A fixed salt and no date, so that the same script gives the same file.
    matplotlib.rcParams["svg.hashsalt"] = "gradient_flow"
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("gradient_flow.svg")
    metadata = {"Date": None} if out.suffix == ".svg" else None
    draw().savefig(out, metadata=metadata, bbox_inches="tight", facecolor="white", dpi=110)


if __name__ == "__main__":
    main()

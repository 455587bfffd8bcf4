"""Draws docs/patch_grid.svg: two filtered convolutions, layer by layer and as a chain. Run with no arguments."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from make_gradient_flow import FULL, GRID, LINE, arrow, kernel, tensor
from matplotlib.axes import Axes

#: Centres, from the later convolution (right) to the earlier one (left).
LATER, EARLIER = 12.6, 0.6


def ends(ax: Axes, row: float) -> None:
    """g~ of the later convolution and its product on the right, g~ of the earlier one on the left."""
    tensor(ax, LATER, row, 4, "g~", "later convolution", GRID, 0.8)
    arrow(ax, (LATER - 0.48, row), (LATER - 0.76, row))
    kernel(ax, LATER - 1.55, row, "input_grad", "product with W~", width=1.5)
    tensor(ax, EARLIER, row, 4, "g~", "earlier convolution", GRID, 0.8)


def draw() -> plt.Figure:
    """The whole drawing, for patches of 2 x 2 on maps of 8 x 8."""
    figure, ax = plt.subplots(figsize=(12.0, 5.4))
    ax.set(xlim=(-0.4, 13.5), ylim=(-3.3, 3.0), aspect="equal")
    ax.axis("off")

    row = 1.5
    ax.text(-0.3, 2.65, "layer by layer", fontsize=12, weight="bold", color=LINE)
    ends(ax, row)
    arrow(ax, (10.27, row), (9.95, row))
    kernel(ax, 9.2, row, "expand", "to every pixel", width=1.4)
    arrow(ax, (8.47, row), (8.12, row))
    tensor(ax, 7.6, row, 8, "grad_x", "all pixels", FULL)
    arrow(ax, (7.08, row), (6.72, row))
    kernel(ax, 5.55, row, "activation, norm", "f'(z) kept at full size", width=2.25)
    arrow(ax, (4.4, row), (4.07, row))
    tensor(ax, 3.55, row, 8, "grad_y", "all pixels", FULL)
    arrow(ax, (3.03, row), (2.7, row))
    kernel(ax, 2.0, row, "filter_grad", "mean", width=1.3)
    arrow(ax, (1.33, row), (1.02, row))

    row = -1.1
    ax.text(-0.3, 0.05, "as a chain: the same g~", fontsize=12, weight="bold", color=LINE)
    ends(ax, row)
    arrow(ax, (10.27, row), (8.07, row))
    tensor(ax, 7.6, row, 4, "grad_x~", "one value per patch", GRID, 0.8)
    arrow(ax, (7.18, row), (6.72, row))
    kernel(ax, 5.55, row, "product", "element by element", width=2.25)
    arrow(ax, (4.4, row), (1.07, row))
    tensor(ax, 5.55, -2.3, 4, "", "", GRID, 0.6)
    arrow(ax, (5.55, -1.97), (5.55, -1.45))
    ax.text(6.0, -2.2, "scale · mean of f'(z) over each patch", fontsize=9, va="center", color=LINE)
    ax.text(
        6.0, -2.45, "from the forward pass: all that is kept of the activation", fontsize=7.5, va="center", color=LINE
    )
    return figure


def main() -> None:
    # A fixed salt and no date, so that the same script gives the same file.
    matplotlib.rcParams["svg.hashsalt"] = "patch_grid"
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("patch_grid.svg")
    metadata = {"Date": None} if out.suffix == ".svg" else None
    draw().savefig(out, metadata=metadata, bbox_inches="tight", facecolor="white", dpi=110)


if __name__ == "__main__":
    main()

"""What a job looks like: loss and accuracy by epoch, and which classes are taken for which."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...files import replacing
from ..results import EpochRow

# Okabe and Ito's palette: told apart by people with any colour vision.
_TRAIN, _VALIDATION = "#E69F00", "#0072B2"

#: A confusion matrix of more classes has no numbers, and of many more no names.
_NUMBERS, _NAMES = 20, 60


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_curves(rows: Sequence[EpochRow], before: float, best: int, path: Path) -> None:
    """Loss and accuracy of each epoch as a PNG.

    Args:
        before: validation accuracy before training.
        best: the epoch whose weights were kept.
    """
    figure, (left, right) = _figure(2, (9, 3.6))
    epochs = [row.epoch for row in rows]
    left.plot(epochs, [row.train_loss for row in rows], color=_TRAIN, marker="o", markersize=3)
    left.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    right.plot(epochs, [100 * row.train_accuracy for row in rows], color=_TRAIN, marker="o", markersize=3)
    validation = [100 * before, *(100 * row.test_accuracy for row in rows)]
    right.plot([0, *epochs], validation, color=_VALIDATION, marker="o", markersize=3)
    right.axvline(best, color="0.6", linestyle=":", linewidth=1)
    right.set(xlabel="epoch", ylabel="accuracy %", ylim=(0, 102))
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    right.legend(["training (augmented)", "validation", "kept"], loc="lower right", frameon=False)
    _save(figure, path)


def draw_confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str], path: Path) -> None:
    """How many pictures of each class (rows) were taken for which (columns), as a PNG."""
    count = len(classes)
    side = min(max(3.5, 0.45 * count + 1.5), 14.0)
    figure, (axes,) = _figure(1, (side, side))
    totals = [max(sum(row), 1) for row in matrix]
    shares = [[cell / total for cell in row] for row, total in zip(matrix, totals, strict=True)]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if count <= _NAMES:
        # Text, not the mathematics that dollar signs begin.
        names = [name.replace("$", r"\$").encode("utf-8", "replace").decode() for name in classes]
        axes.set_xticks(range(count), names, rotation=90)
        axes.set_yticks(range(count), names)
    if count <= _NUMBERS:
        for i, row in enumerate(matrix):
            for j, cell in enumerate(row):
                if cell:
                    color = "white" if shares[i][j] > 0.5 else "black"
                    axes.text(j, i, str(cell), ha="center", va="center", color=color, fontsize=8)
    axes.set(xlabel="predicted", ylabel="class")
    _save(figure, path)


def _figure(panels: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and may open windows

    figure = Figure(figsize=size, layout="constrained")
    axes = [figure.add_subplot(1, panels, number + 1) for number in range(panels)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    import warnings

    with replacing(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a font lacks a class's letters: boxes stand for them
        figure.savefig(file, format="png", dpi=math.floor(120))

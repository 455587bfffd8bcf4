"""What training gives and costs: score, time of a step and memory by setting; cosines of the gradients by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import exhibits
from .exhibits import Column, Exhibit, Section, Table
from .settings import SettingRow, Study, variant_order

_PHASES = (("forward", "#009E73"), ("backward", "#D55E00"), ("update", "#E69F00"))

#: How names of variants end whose gradients stay on the patch grid.
_CHAINED = "chained"

#: Points of score that an axis shows at least.
_LEAST_POINTS = 5.0


def section(study: Study) -> Section:
    """The figures of one study."""
    made = [_score(study), _step(study), _memory(study)]
    if study.layers:
        made.append(_cosine(study))
    return Section(study.title, tuple(made), study.paragraphs)


#: Conditions of an evaluation that concern one figure only.
_OWN = {
    "score": ("Scores",),
    "step": ("Step times", "Operations", "Energy"),
    "training-memory": ("Kept bytes", "Peak"),
    "cosine": ("Cosines",),
}


def _conditions(study: Study, name: str) -> exhibits.Conditions:
    """The conditions of one figure: those of the whole study and its own."""
    elsewhere = {what for other, own in _OWN.items() if other != name for what in own}
    return tuple((what, how) for what, how in study.conditions if what not in elsewhere)


def _labels(settings: Sequence[SettingRow]) -> list[str]:
    several = len({setting.last for setting in settings}) > 1
    return [f"{s.variant}, last {s.last}" if several else s.variant for s in settings]


def _score(study: Study) -> Exhibit:
    settings = study.settings
    variants = sorted({setting.variant for setting in settings}, key=variant_order)
    lasts = sorted({setting.last for setting in settings})
    figure = exhibits.figure(3.1 * (1 + (len(lasts) > 1)) + 0.4)
    panels = figure.subplots(1 + (len(lasts) > 1), 1, squeeze=False, sharey=True)[:, 0]
    series = {f"last {last}": [(variants.index(s.variant), s) for s in settings if s.last == last] for last in lasts}
    ticks = [variant.replace(f" {_CHAINED}", f"\n{_CHAINED}") for variant in variants]
    _lines(panels[0], series, [*range(len(variants))], ticks, study.metric)
    panels[0].set_xlabel("backward pass: exact, or filtered with that patch")
    if len(lasts) > 1:
        series = {name: [(lasts.index(s.last), s) for s in settings if s.variant == name] for name in variants}
        _lines(panels[1], series, [*range(len(lasts))], [str(last) for last in lasts], study.metric)
        panels[1].set_xlabel("trained convolutions, counted from the network's end")
    exact = {s.last: s.mean for s in settings if s.variant == "exact"}
    rows = [
        (
            *(s.variant, s.last, s.seeds, s.mean, min(s.scores), max(s.scores)),
            None if s.last not in exact or s.variant == "exact" else s.mean - exact[s.last],
            *(s.scores, s.initial_scores),
        )
        for s in settings
    ]
    columns = (
        *(Column("backward"), Column("last"), Column("seeds"), Column("mean %", exhibits.percent)),
        *(Column("lowest %", exhibits.percent), Column("highest %", exhibits.percent)),
        Column("points vs exact", lambda value: f"{100 * value:+.2f}"),
        *(Column("each seed %", exhibits.percent), Column("before fine-tuning %", exhibits.percent)),
    )
    return Exhibit(
        "score",
        study.metric.capitalize() if study.metric.islower() else study.metric,  # mIoU stays
        f"The {study.metric} on test images after fine-tuning, mean over the seeds; bars reach from the lowest to the "
        "highest seed.",
        figure,
        Table(columns, tuple(rows)),
        _conditions(study, "score"),
        study.basis,
    )


def _lines(
    axes: Any, series: dict[str, list[tuple[int, SettingRow]]], ticks: list[int], labels: list[str], metric: str
) -> None:
    # Beside each other: seeds of different series often span the same range.
    width = 0.5 / len(series)
    looks = _looks(list(series))
    for index, (name, points) in enumerate(series.items()):
        points = sorted(points, key=lambda point: point[0])
        x = [place + (index - (len(series) - 1) / 2) * width for place, _ in points]
        y = [100 * s.mean for _, s in points]
        below = [100 * (s.mean - min(s.scores)) for _, s in points]
        above = [100 * (max(s.scores) - s.mean) for _, s in points]
        spread = [[max(0.0, value) for value in side] for side in (below, above)]  # a mean is rounded
        axes.errorbar(x, y, spread, **looks[name], capsize=3, linewidth=1.2, markersize=5, label=name)
    axes.set_xticks(ticks, labels)
    axes.set_xlim(ticks[0] - 0.5, ticks[-1] + 0.5)
    axes.set_ylabel(f"{metric}, %")
    # At least some points high, so that noise does not look like a difference.
    axes.margins(y=0.15)
    low, high = axes.get_ylim()
    more = max(0.0, _LEAST_POINTS - (high - low)) / 2
    axes.set_ylim(low - more, high + more)
    exhibits.tidy(axes, "y")
    if len(series) <= 4:
        axes.legend(loc="best", fontsize=8, ncols=len(series), framealpha=0.8)
    else:  # too many to find a free place among the lines
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8, ncols=4, frameon=False)


def _looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each series; what is chained has those of its patch, dashed and hollow
    where the patch is there without chains, too."""
    plain = list(dict.fromkeys(name.partition(f" {_CHAINED}")[0] for name in names))
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        patch, chained, _ = name.partition(f" {_CHAINED}")
        index = plain.index(patch)
        look = {
            "color": exhibits.COLORS[index % len(exhibits.COLORS)],
            "marker": exhibits.MARKERS[index % len(exhibits.MARKERS)],
        }
        found[name] = {**look, "linestyle": "--", "markerfacecolor": "none"} if chained and patch in names else look
    return found


def _step(study: Study) -> Exhibit:
    settings = study.settings
    labels = _labels(settings)
    figure = exhibits.figure(1.3 + 0.32 * len(labels))
    axes = figure.subplots()
    left = [0.0] * len(settings)
    for phase, color in _PHASES:
        values = [s.step_ms[phase] for s in settings]
        axes.barh(range(len(labels)), values, 0.7, left=left, color=color, label=phase)
        left = [start + value for start, value in zip(left, values, strict=True)]
    for place, total in enumerate(left):
        axes.annotate(
            exhibits.digits(total), (total, place), (3, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(0, 1.15 * (max(left) or 1))
    axes.set_xlabel("one training step, ms")
    exhibits.tidy(axes, "x")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    rows = [
        (
            *(s.variant, s.last, *(s.step_ms[phase] for phase, _ in _PHASES)),
            *(sum(s.step_ms[phase] for phase, _ in _PHASES), s.forward_flops, s.backward_flops, s.joules),
            s.other_cores,
        )
        for s in settings
    ]
    columns = (
        *(Column("backward"), Column("last"), *(Column(f"{phase} ms", exhibits.digits) for phase, _ in _PHASES)),
        *(
            Column("step ms", exhibits.digits),
            Column("forward GFLOP", exhibits.giga),
            Column("backward GFLOP", exhibits.giga),
        ),
        *(Column("energy J", exhibits.digits), Column("cores of other programs", exhibits.digits)),
    )
    return Exhibit(
        "step",
        "Time of a training step",
        "Forward pass with the loss, backward pass, and update of the weights. Where a setting was trained with "
        "several seeds, the median over them.",
        figure,
        _without_empty(Table(columns, tuple(rows))),
        _conditions(study, "step"),
        f"{study.basis}; operations are counted" if settings[0].forward_flops is not None else study.basis,
    )


def _memory(study: Study) -> Exhibit:
    settings = study.settings
    labels = _labels(settings)
    series: dict[str, tuple[str, Sequence[float | None]]] = {
        "saved for backward by the trained convolutions": (
            exhibits.COLORS[0],
            [s.kept_bytes_convolutions / 1e6 for s in settings],
        ),
        "total saved for backward": (exhibits.COLORS[1], [s.kept_bytes / 1e6 for s in settings]),
    }
    # The whole process is so much larger that it needs a scale of its own.
    peaks = [None if s.peak_bytes is None else s.peak_bytes / 1e6 for s in settings]
    panels = [series]
    if any(peak is not None for peak in peaks):
        panels.append({"peak of the process": (exhibits.COLORS[6], peaks)})
    heights = [0.4 + len(labels) * (0.15 + 0.17 * len(shown)) for shown in panels]
    figure = exhibits.figure(0.9 + sum(heights))
    all_axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, shown in zip(all_axes, panels, strict=True):
        exhibits.horizontal_bars(axes, labels, shown, exhibits.digits)
        axes.set_xlabel("MB per step" if shown is series else "MB of the process")
    figure.legend(loc="outside lower center", ncols=1, frameon=False)
    columns = (
        *(Column("backward"), Column("last"), Column("convolutions MB", exhibits.megabytes)),
        *(Column("saved for backward MB", exhibits.megabytes), Column("peak of the process MB", exhibits.megabytes)),
    )
    rows = [(s.variant, s.last, s.kept_bytes_convolutions, s.kept_bytes, s.peak_bytes) for s in settings]
    of_chains = ""
    if any(s.variant.endswith(_CHAINED) for s in settings):
        of_chains = " The figure of chained convolutions includes the batch norms and activations between them."
    return Exhibit(
        "training-memory",
        "Memory of a training step",
        "Memory that autograd saves for backward, parameters not counted, and, where it "
        f"was measured, the largest resident memory of the process.{of_chains} Megabytes of 1e6 bytes.",
        figure,
        _without_empty(Table(columns, tuple(rows))),
        _conditions(study, "training-memory"),
        study.basis,
    )


def _cosine(study: Study) -> Exhibit:
    names = list(dict.fromkeys(name for name, *_ in study.layers))
    variants = sorted({variant for _, variant, *_ in study.layers}, key=variant_order)
    figure = exhibits.figure(1.8 + 0.25 * len(names))
    axes = figure.subplots()
    for index, variant in enumerate(variants):
        color, marker = exhibits.COLORS[index % len(exhibits.COLORS)], exhibits.MARKERS[index % len(exhibits.MARKERS)]
        shift = 0.5 * (index - (len(variants) - 1) / 2) / len(variants)
        own = [(names.index(name) + shift, w, x) for name, of, w, x in study.layers if of == variant]
        style = {"color": color, "marker": marker, "linestyle": "", "markersize": 6}
        axes.plot([w for _, w, _ in own], [y for y, _, _ in own], **style, label=f"{variant}, weight")
        inputs = [(x, y) for y, _, x in own if x is not None]
        if inputs:
            axes.plot(*zip(*inputs, strict=True), **style, markerfacecolor="none", label=f"{variant}, input")
    axes.axvline(1, color="black", linewidth=0.8)
    low = min(value for _, _, *both in study.layers for value in both if value is not None)
    axes.set_xlim(min(0.0, low) - 0.03, 1.04)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("cosine between filtered and exact gradient")
    exhibits.tidy(axes, "both")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    columns = (
        *(Column("layer"), Column("backward"), Column("weight", lambda value: f"{value:.4f}")),
        Column("input", lambda value: f"{value:.4f}"),
    )
    return Exhibit(
        "cosine",
        "Direction of the gradients",
        "Cosine of the angle between the filtered and the exact gradient of each layer's weight and input; 1 is the "
        "same direction. As long as it is well above 0, a step with the filtered gradient goes downhill, too.",
        figure,
        Table(columns, study.layers),
        _conditions(study, "cosine"),
        study.basis,
    )


def _without_empty(table: Table) -> Table:
    """Without columns in which nothing was measured."""
    keep = [i for i in range(len(table.columns)) if any(row[i] is not None for row in table.rows)]
    return Table(tuple(table.columns[i] for i in keep), tuple(tuple(row[i] for i in keep) for row in table.rows))

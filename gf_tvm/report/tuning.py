"""Tuning curves: the best time so far over the trials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import exhibits
from .exhibits import Column, Exhibit, Section, Table
from .sources import Source

#: Curves that are named one by one; more are told apart by kernel only.
_NAMED = 8


@dataclass(frozen=True)
class _Curve:
    """The trials of one workload: seconds of each (None: failed), of the default schedule and of the winner."""

    workload: str
    trials: Sequence[float | None]
    default: float | None
    winner: float | None

    @property
    def label(self) -> str:
        return self.workload.removesuffix("_nchw").removesuffix("_float32")

    def improvements(self) -> list[tuple[int, float]]:
        """(trial from 1, seconds) of each trial that was faster than all before it."""
        found: list[tuple[int, float]] = []
        for number, seconds in enumerate(self.trials, start=1):
            if seconds is not None and (not found or seconds < found[-1][1]):
                found.append((number, seconds))
        return found


def sections(sources: Sequence[Source]) -> list[Section]:
    """A section per device and way of measuring; logs that were measured alike share one."""
    groups: dict[str, list[Source]] = {}
    for source in sources:
        conditions = _conditions([source])
        groups.setdefault(repr((source.document["device"], conditions[1:])), []).append(source)
    return [_section(group) for group in groups.values()]


def _conditions(sources: Sequence[Source]) -> list[tuple[str, str]]:
    made = sources[0].document["made"]
    names = ("gf_tvm", "tvm", "tvm_ffi", "llvm", "nvrtc", "python", "torch")
    measurement = made.get("measurement")
    found = [
        ("Files", ", ".join(source.name for source in sources)),
        ("Device profile", sources[0].document["device"]),
        ("Machine", str(made.get("gpu") or made.get("cpu") or "unknown machine")),
        ("Threads", str(made.get("threads") or "those of the device")),
        ("Versions", ", ".join(f"{name} {made[name]}" for name in names if made.get(name) is not None)),
    ]
    if isinstance(measurement, dict):
        found.append(("Measurement", ", ".join(f"{name}: {value}" for name, value in measurement.items())))
    return found


def _section(sources: Sequence[Source]) -> Section:
    conditions = _conditions(sources)
    names = [source.name for source in sources]
    if len(names) > 3:  # a folder of logs is named by its ends
        conditions[0] = ("Files", f"{names[0]}, ..., {names[-1]} ({len(names)} files)")
    document = sources[0].document
    farm = document.get("farm")
    emulated = any(isinstance(about, dict) and about.get("emulated") for about in (document["made"], farm))
    tasks = [task for source in sources for task in source.document["tasks"]]
    curves = [
        _Curve(task["workload"], task["trial_seconds"], task["default_seconds"], task["seconds"]) for task in tasks
    ]
    paragraphs = ["Emulated: these times say nothing about a board."] if emulated else []
    exhibit = Exhibit(
        "tuning",
        "Best schedule so far",
        "Speed of the best schedule found so far as a share of the best of all trials, kernel by kernel. "
        "Trials that failed count as trials. The final comparison measures the best few again, so its times differ "
        "from the trials' own.",
        _draw(curves),
        _table(curves),
        tuple(conditions),
        exhibits.EMULATED if emulated else exhibits.MEASURED,
    )
    return Section(f"Tuning: {document['device']}", (exhibit,), tuple(paragraphs))


def _draw(curves: Sequence[_Curve]) -> Any:
    kernels = list(dict.fromkeys(curve.workload.partition("_n")[0] for curve in curves))
    named = len(curves) <= _NAMED
    figure = exhibits.figure(3.2 + 0.17 * (len(curves) if named else len(kernels)))
    axes = figure.subplots()
    labels: set[str] = set()
    for index, curve in enumerate(curves):
        kernel = curve.workload.partition("_n")[0]
        label, color = (curve.label, index) if named else (kernel, kernels.index(kernel))
        steps = curve.improvements()
        if not steps:
            continue
        best = steps[-1][1]
        points = [(number, best / seconds) for number, seconds in steps]
        points.append((max(len(curve.trials), points[-1][0]), 1.0))
        axes.step(
            *zip(*points, strict=True),
            where="post",
            color=exhibits.COLORS[color % len(exhibits.COLORS)],
            linewidth=1.5 if named else 1.0,
            alpha=1.0 if named else 0.5,
            # A name that stands in the legend once.
            label=None if label in labels else label,
        )
        labels.add(label)
    axes.set_xlabel("trials")
    axes.set_ylabel("speed, share of the best trial's")
    axes.set_ylim(0, 1.05)
    axes.set_xlim(left=0)
    exhibits.tidy(axes, "both")
    if labels:
        figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=7)
    return figure


def _table(curves: Sequence[_Curve]) -> Table:
    rows = []
    for curve in curves:
        failed = sum(seconds is None for seconds in curve.trials)
        gain = curve.default / curve.winner if curve.default and curve.winner else None
        steps = curve.improvements()
        numbers, seconds = (tuple(step[index] for step in steps) or None for index in (0, 1))
        rows.append((curve.label, len(curve.trials), failed, curve.default, curve.winner, gain, numbers, seconds))
    columns = (
        *(Column("kernel"), Column("trials"), Column("failed"), Column("default ms", exhibits.milliseconds)),
        *(Column("winner ms", exhibits.milliseconds), Column("default / winner", exhibits.times)),
        *(Column("better at trial"), Column("with ms", exhibits.milliseconds)),
    )
    return Table(columns, tuple(rows))

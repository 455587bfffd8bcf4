"""Runs of ``gf-tvm train`` and settings of ``gf-tvm evaluate`` in one form."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ReportError
from . import exhibits
from .sources import Source

#: Of a training configuration: what tells the settings of one study apart. All else must be equal within it.
_VARIED = ("patch", "last", "seed")


@dataclass(frozen=True)
class SettingRow:
    """A backward pass and a number of trained convolutions, over one or more seeds.

    ``scores`` and ``initial_scores`` (before fine-tuning) are shares, one per seed; ``step_ms`` has forward, backward
    and update, sizes are bytes of one step; ``other_cores`` kept other programs busy meanwhile. None: not measured.
    """

    variant: str
    last: int
    seeds: tuple[int, ...]
    scores: tuple[float, ...]
    initial_scores: tuple[float, ...]
    step_ms: Mapping[str, float]
    kept_bytes: int
    kept_bytes_convolutions: int
    peak_bytes: int | None = None
    forward_flops: int | None = None
    backward_flops: int | None = None
    joules: float | None = None
    other_cores: float | None = None

    @property
    def mean(self) -> float:
        """Mean score."""
        return statistics.fmean(self.scores)


@dataclass(frozen=True)
class Study:
    """Settings that can be compared: same model, data, machine and protocol.

    Args:
        layers: (name, variant, cosine of the weight's gradient, of the input's) per filtered layer.
        paragraphs: what is said before the figures, such as the recommendation.
    """

    title: str
    metric: str
    settings: tuple[SettingRow, ...]
    conditions: tuple[tuple[str, str], ...]
    basis: str
    layers: tuple[tuple[str, str, float, float | None], ...] = ()
    paragraphs: tuple[str, ...] = field(default=())


def variant_order(variant: str) -> tuple[Any, ...]:
    """Sorts exact first, then by the patch's size, whatever the files' order."""
    patch = variant.partition(" ")[0][1:]
    numbers = [int(part) for part in patch.split("x") if part.isdigit()]
    return (variant != "exact", not numbers, numbers[0] * numbers[-1] if numbers else 0, variant)


def of_evaluation(source: Source) -> Study:
    """The settings of one file of ``gf-tvm evaluate``."""
    document = source.document
    settings = [
        SettingRow(
            *(row["variant"], row["last"], tuple(row["seeds"]), tuple(row["scores"]), tuple(row["initial_scores"])),
            *(row["step_ms"], row["kept_bytes"], row["kept_bytes_convolutions"], row["peak_bytes"]),
            *(row["forward_flops"], row["backward_flops"], row["energy_joules_per_step"], row.get("other_cores")),
        )
        for row in document["settings"]
    ]
    _refuse_repeated(source.name, [(setting.variant, setting.last) for setting in settings])
    layers = [(row["name"], row["variant"], row["cosine_weight"], row["cosine_input"]) for row in document["layers"]]
    conditions = [*exhibits.conditions_of([source], document)]
    conditions += [(what[:1].upper() + what[1:], how) for what, how in document["conditions"].items()]
    return Study(
        f"Evaluation: {document['model']} on {document['data']}",
        document["metric"],
        _sorted(settings),
        tuple(conditions),
        exhibits.basis_of(document["machine"]),
        tuple(layers),
        (*_recommendation(document), *_obstacles(document)),
    )


def _refuse_repeated(name: str, keys: Sequence[tuple[str, int]]) -> None:
    for number, (variant, last) in enumerate(keys, start=1):
        if (variant, last) in keys[: number - 1]:
            raise ReportError(f"{name}, setting {number}: {variant}, last {last} is there twice")


def _recommendation(document: Mapping[str, Any]) -> list[str]:
    limits, found = document["limits"], document["recommendation"]
    asked = []
    if limits["memory_budget"] is not None:
        asked.append(f"at most {exhibits.megabytes(limits['memory_budget'])} MB")
    if limits["max_score_drop"] is not None:
        # A share, as the scores are.
        asked.append(f"{document['metric']} at most {100 * limits['max_score_drop']:.3g} percentage points below exact")
    lines = [f"Limits: {', '.join(asked)}."] if asked else []
    if found is not None:
        lines.append(f"Recommended: {found['variant']}, last {found['last']} convolutions. {found['why']}")
    elif asked:
        lines.append(_sentence(document.get("obstacles", {}).get("limits") or "no setting meets the limits"))
    return lines


def _obstacles(document: Mapping[str, Any]) -> list[str]:
    """What a reader has to know before comparing settings."""
    found, lines = document.get("obstacles", {}), []
    if found.get("filtering"):
        layers = "; ".join(f"{name}: {reason}" for name, reason in found["filtering"].items())
        lines.append(f"Not filtered, exact in every setting: {layers}.")
    if found.get("cache") is not None:
        lines.append(f"The frozen layers are computed in every step: {found['cache']}.")
    busiest = max((row.get("other_cores") or 0.0 for row in document["settings"]), default=0.0)
    if busiest > 0.1:
        lines.append(
            f"Doubtful times: other programs kept up to {busiest:.1f} cores busy while steps were timed; read them as "
            "ratios, or measure on an idle machine."
        )
    return lines


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def of_training(sources: Sequence[Source]) -> list[Study]:
    """Runs of files of ``gf-tvm train``, grouped by everything but patch, number of layers and seed.

    Raises:
        ReportError: two runs of one group have the same patch, layers and seed: their scores would count twice.
    """
    groups: dict[str, list[tuple[Source, Mapping[str, Any]]]] = {}
    for source in sources:
        for run in source.document["runs"]:
            protocol = {name: value for name, value in run["config"].items() if name not in _VARIED}
            same = [protocol, run["machine"], run["threads"], run["versions"], run.get("library"), run.get("metric")]
            groups.setdefault(json.dumps(same, sort_keys=True), []).append((source, run))
    return [_training_study(group) for group in groups.values()]


def _training_study(group: Sequence[tuple[Source, Mapping[str, Any]]]) -> Study:
    by_setting: dict[tuple[str, int], dict[int, tuple[Source, Mapping[str, Any]]]] = {}
    for source, run in group:
        config = run["config"]
        seeds = by_setting.setdefault((run["variant"], config["last"]), {})
        if config["seed"] in seeds:
            other = seeds[config["seed"]][0].name
            raise ReportError(
                f"{source.name} and {other} cannot go together: both have {config['model']} on {config['data']}, "
                f"{run['variant']}, last {config['last']}, seed {config['seed']}; leave one out"
            )
        seeds[config["seed"]] = source, run
    settings = [
        _training_setting(variant, last, [run for _, run in seeds.values()])
        for (variant, last), seeds in by_setting.items()
    ]
    first = group[0][1]
    config = first["config"]
    protocol = ", ".join(f"{name} {value}" for name, value in config.items() if name not in (*_VARIED, "model", "data"))
    conditions = [*exhibits.conditions_of([source for source, _ in group], first), ("Protocol", protocol)]
    library = first.get("library")
    conditions.append(("Kernels", "plain PyTorch operators" if not library else _library(library)))
    return Study(
        f"Training: {config['model']} on {config['data']}",
        str(first.get("metric") or "accuracy"),
        _sorted(settings),
        tuple(conditions),
        exhibits.basis_of(first["machine"]),
    )


def _library(library: Any) -> str:
    return str(library.get("file", library)) if isinstance(library, Mapping) else str(library)


def _training_setting(variant: str, last: int, runs: Sequence[Mapping[str, Any]]) -> SettingRow:
    step = {
        phase: statistics.median(run["step_ms"][phase] for run in runs) for phase in ("forward", "backward", "update")
    }
    return SettingRow(
        variant,
        last,
        tuple(run["config"]["seed"] for run in runs),
        tuple(run["test_accuracy"] for run in runs),
        tuple(run["initial_test_accuracy"] for run in runs),
        step,
        max(run["rows"][-1]["kept_bytes"] for run in runs),
        max(run["rows"][-1]["kept_bytes_convolutions"] for run in runs),
    )


def _sorted(settings: Sequence[SettingRow]) -> tuple[SettingRow, ...]:
    return tuple(sorted(settings, key=lambda setting: (setting.last, variant_order(setting.variant))))

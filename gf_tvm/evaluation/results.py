"""What an evaluation reports; :meth:`Evaluation.to_dict` is what ``gf-tvm evaluate --json`` writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Any

from ..errors import GfTvmError

SCHEMA = "gf_tvm.evaluate/1"


class EvaluationError(GfTvmError, ValueError):
    """An evaluation that cannot be made as asked, or a folder of results that cannot be read or written."""


@dataclass(frozen=True)
class Setting:
    """One backward pass for the last K convolutions.

    Attributes:
        variant: ``exact``, or the patch as ``R2`` or ``R2x1``, with `` chained`` behind it where gradients stay on the
            patch grid (:mod:`gf_tvm.chains`); last: K.
        seeds: the runs; scores, initial_scores: of each after and before fine-tuning, 0 to 1.
        step_ms: milliseconds of a step's ``forward``, ``backward`` and ``update``: medians over the seeds of each
            run's median.
        kept_bytes: all that a step keeps for its backward pass, parameters and buffers excluded;
        kept_bytes_convolutions: what the K convolutions keep by themselves, in a chained run what its chains keep, for
            batch norms and activations, too, and convolutions that are in none;
        kept_bytes_by_type: ``kept_bytes`` by the type of the innermost module that saved a tensor first ("(loss)":
            outside the model; "(chains)": chains, which no single module keeps).
        peak_bytes: largest resident memory of a fresh process that trains a few steps; None where the system does not
            say.
        backward_flops, forward_flops: of a step, counted by :mod:`gf_tvm.evaluation.flops`.
        energy_joules_per_step: above idle; None where it is not measured.
        other_cores: how many cores other programs kept busy while the steps were timed (median over the seeds); from
            a tenth on, read the times as ratios. None where the system does not say.
        chains: names of the convolutions of each chain, as the first seed's run found them.
    """

    variant: str
    last: int
    seeds: tuple[int, ...]
    scores: tuple[float, ...]
    initial_scores: tuple[float, ...]
    step_ms: dict[str, float]
    kept_bytes: int
    kept_bytes_convolutions: int
    kept_bytes_by_type: dict[str, int]
    peak_bytes: int | None
    backward_flops: int
    forward_flops: int
    energy_joules_per_step: float | None
    other_cores: float | None = None
    chains: list[list[str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """For people: ``R2, last 4``."""
        return f"{self.variant}, last {self.last}"

    @property
    def score(self) -> float:
        """Mean over the seeds."""
        return fmean(self.scores)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation of the score over the seeds; None for a single seed."""
        return stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def total_ms(self) -> float:
        """Milliseconds of a whole step."""
        return sum(self.step_ms.values())


@dataclass(frozen=True)
class Layer:
    """How the filtered gradients of one convolution point where the exact ones do (means over some batches).

    ``cosine_weight`` is of its weight, ``cosine_input`` of its input: None where training needs no such gradient.
    """

    name: str
    variant: str
    cosine_weight: float
    cosine_input: float | None


@dataclass(frozen=True)
class Recommendation:
    """The setting to take, and why."""

    variant: str
    last: int
    why: str


@dataclass(frozen=True)
class Obstacles:
    """What stood in the way of a setting, of filtering, or of a faster step.

    Attributes:
        limits: which limit rules out which settings, where there is no recommendation; else None.
        filtering: name -> reason of those of the last K convolutions (the largest K) that cannot be filtered; they
            have the exact backward pass in every setting.
        cache: why the frozen layers' results were not kept, so that every step computes them (such as a network that
            cannot be traced; for the largest K, as the run found it that wrote the results); None where they were.
    """

    limits: str | None = None
    filtering: dict[str, str] = field(default_factory=dict)
    cache: str | None = None


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` parts of the work (an epoch is one part); ``label`` says what goes on."""

    label: str
    done: float
    total: int


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True)
class Evaluation:
    """Outcome of :func:`gf_tvm.evaluate`.

    Attributes:
        conditions: how everything was measured, in words, by what it is about (``scores``, ``step times``, ...).
        limits: ``memory_budget`` (bytes) and ``max_score_drop`` (0 to 1), None where there is no such limit.
        recommendation: None where no setting meets the limits.
        train_config: what ``gf-tvm train --config`` takes for the recommended setting, None without one.
        task, metric: as in :class:`gf_tvm.training.TrainResult`.
    """

    machine: dict[str, Any]
    threads: int
    versions: dict[str, str | None]
    conditions: dict[str, str]
    model: str
    data: str
    settings: tuple[Setting, ...]
    layers: tuple[Layer, ...]
    limits: dict[str, float | None]
    recommendation: Recommendation | None
    obstacles: Obstacles
    train_config: dict[str, Any] | None
    task: str
    metric: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = {key: value for key, value in vars(self).items() if key != "train_config"}
        plain["settings"] = [_plain(asdict(setting)) for setting in self.settings]
        plain["layers"] = [asdict(layer) for layer in self.layers]
        plain["obstacles"] = asdict(self.obstacles)
        plain["recommendation"] = None if self.recommendation is None else asdict(self.recommendation)
        return {"schema": SCHEMA, **plain}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

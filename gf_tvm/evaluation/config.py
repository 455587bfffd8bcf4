"""What an evaluation compares, and the limits that its recommendation must meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..core.geometry import Pair, as_pair
from ..files import size_in_bytes
from ..training.config import TrainConfig
from .results import EvaluationError


@dataclass(frozen=True)
class EvaluateConfig:
    """One evaluation: every variant for every number of last convolutions, with every seed.

    Args:
        train: model, data and protocol of all runs; its ``patch``, ``last`` and ``seed`` are replaced.
        patches: the variants: ``"exact"`` (or None), or a patch as an integer or (height, width).
        last: numbers of last convolutions that are fine-tuned.
        seeds: of the split, the weights and the order of the images.
        memory_budget: largest ``kept_bytes`` of a step that may be recommended, in bytes; None for no limit.
        max_score_drop: largest drop of the mean score, 0 to 1, against the exact backward pass with the same ``last``;
            None for no limit. The exact variant must then be among ``patches``.
        cosine_batches: batches of which the cosine between filtered and exact gradients is averaged.
        peak_steps: steps that the process trains whose peak memory is read.
        layer_by_layer: with chains, evaluate every patch without them, too.

    Raises:
        EvaluationError: an empty list, a value out of range, or ``layer_by_layer`` without chains. TrainingError,
            GeometryError: as for TrainConfig.
    """

    train: TrainConfig
    patches: Sequence[int | Pair | str | None] = ("exact", 2, 4, 7)
    last: Sequence[int] = (1, 2, 4)
    seeds: Sequence[int] = (0,)
    memory_budget: int | None = None
    max_score_drop: float | None = None
    cosine_batches: int = 4
    peak_steps: int = 3
    layer_by_layer: bool = False

    def __post_init__(self) -> None:
        for name in ("patches", "last", "seeds"):
            values = getattr(self, name)
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise EvaluationError(f"{name} must be a list of at least one value, got {values!r}")
        patches = (None if patch in (None, "exact") else as_pair(patch, "patch", 1) for patch in self.patches)  # type: ignore[arg-type]
        object.__setattr__(self, "patches", tuple(dict.fromkeys(patches)))
        for name in ("last", "seeds"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        for last in self.last:
            replace(self.train, last=last)  # raises TrainingError
        for seed in self.seeds:
            replace(self.train, seed=seed)
        for name in ("cosine_batches", "peak_steps"):
            if not _is_whole(getattr(self, name)) or getattr(self, name) < 1:
                raise EvaluationError(f"{name} must be an integer of at least 1, got {getattr(self, name)!r}")
        if self.layer_by_layer and not self.train.chain:
            raise EvaluationError(
                "layer_by_layer adds runs without chains, but chain=False (--no-chain) has no others: leave one out"
            )
        budget, drop = self.memory_budget, self.max_score_drop
        if budget is not None and (not _is_whole(budget) or budget < 1):
            raise EvaluationError(f"memory_budget must be a number of bytes of at least 1, or None, got {budget!r}")
        if drop is not None:
            if isinstance(drop, bool) or not isinstance(drop, int | float) or not 0 <= drop <= 1:
                raise EvaluationError(f"max_score_drop must lie between 0 and 1, or be None, got {drop!r}")
            if None not in self.patches:
                raise EvaluationError("a largest score drop is one against the exact backward pass: add exact")

    def run(self, variant: str, last: int, seed: int) -> TrainConfig:
        """The training configuration of one run."""
        patch, chain = self.variants[variant]
        return replace(self.train, patch=patch, chain=chain, last=last, seed=seed)

    def pretraining(self, seed: int) -> TrainConfig:
        """A configuration with the pretrained weights of all runs with ``seed``."""
        return replace(self.train, patch=None, chain=False, last=max(self.last), seed=seed)

    @property
    def variants(self) -> dict[str, tuple[Pair | None, bool | str]]:
        """Patch, and what :class:`TrainConfig` has as ``chain``, by name: ``exact``, ``R2``, ``R2 chained``."""
        found: dict[str, tuple[Pair | None, bool | str]] = {}
        filtered = (False, self.train.chain) if self.layer_by_layer else (self.train.chain,)
        for patch in self.patches:
            for chain in (False,) if patch is None else filtered:
                found[replace(self.train, patch=patch, chain=chain).variant] = (patch, chain)  # type: ignore[assignment]
        return found


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def parse_size(text: str) -> int:
    """A size in bytes, see :func:`gf_tvm.files.size_in_bytes`. Raises EvaluationError."""
    size = size_in_bytes(text)
    if size is None:
        raise EvaluationError(f"a memory budget is written as 64MB, 500kB or 1.5GiB, got {text!r}")
    return size

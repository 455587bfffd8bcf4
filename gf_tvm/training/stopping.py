"""Early stopping, decided from the scores so far alone: so it needs no state in a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence


def best_epoch(scores: Sequence[float], min_delta: float = 0.0) -> int:
    """The epoch (from 1) after which no score was higher by more than ``min_delta``; 0 without scores."""
    best = 0
    for epoch, score in enumerate(scores, 1):
        if best == 0 or score > scores[best - 1] + min_delta:
            best = epoch
    return best


def stops(scores: Sequence[float], patience: int | None, min_delta: float = 0.0) -> bool:
    """Whether training ends here: ``patience`` epochs have passed since the best one (None: never)."""
    return patience is not None and len(scores) - best_epoch(scores, min_delta) >= patience and len(scores) > 0

"""Which setting to train with: a pure function of an evaluation's rows and the user's limits.

The rule: of the settings whose step keeps at most the memory budget, and whose score is at most the allowed drop below
that of the exact backward pass with the same K (means over the seeds), the one with the highest mean score. Settings
that the noise cannot tell from it are taken as equally good, and of those the one with the shortest step wins (then the
one that keeps less). Noise is judged on the differences seed by seed, since runs with one seed share data and initial
weights: a setting ties if its mean difference to the best is at most one standard error of that mean. A single seed
shows no noise, so only equal scores tie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from .results import EvaluationError, Recommendation, Setting

#: Scores are shares of few images: differences below this are rounding errors.
_ROUNDING = 1e-9


def recommend(
    settings: Sequence[Setting], memory_budget: int | None = None, max_score_drop: float | None = None
) -> tuple[Recommendation | None, str | None]:
    """Choose one of ``settings``, see the module's description.

    Args:
        settings: of one model and its data, all with the same seeds; never empty.
        memory_budget: largest ``kept_bytes``, in bytes.
        max_score_drop: largest drop of the mean score against ``exact`` with the same ``last``, 0 to 1.

    Returns:
        The recommendation and None, or None and what rules out what.

    Raises:
        EvaluationError: a drop is limited, and a setting has no exact one to be compared with.
    """
    drops = {id(setting): score_drop(setting, settings) for setting in settings}
    if max_score_drop is not None:
        for setting in settings:
            if drops[id(setting)] is None:
                raise EvaluationError(f"{setting.name}: no exact setting with last {setting.last} to compare with")
    heavy = [s for s in settings if memory_budget is not None and s.kept_bytes > memory_budget]
    inexact = [s for s in settings if max_score_drop is not None and (drops[id(s)] or 0.0) > max_score_drop + _ROUNDING]
    ruled_out = {id(s) for s in (*heavy, *inexact)}
    fitting = [s for s in settings if id(s) not in ruled_out]
    if not fitting:
        return None, _obstacles(settings, heavy, inexact, drops, memory_budget, max_score_drop)
    best = max(fitting, key=lambda s: s.score)
    equal = [s for s in fitting if _ties(best, s)]
    chosen = min(equal, key=lambda s: (s.total_ms, s.kept_bytes))
    return Recommendation(chosen.variant, chosen.last, _why(chosen, best, equal, fitting, settings, drops)), None


def score_drop(setting: Setting, settings: Sequence[Setting]) -> float | None:
    """How much lower the mean score is than that of ``exact`` with the same ``last``; None without such a setting."""
    exact = next((s for s in settings if s.variant == "exact" and s.last == setting.last), None)
    return None if exact is None else exact.score - setting.score


def _ties(best: Setting, other: Setting) -> bool:
    differences = [a - b for a, b in zip(best.scores, other.scores, strict=True)]
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return fmean(differences) <= error + _ROUNDING


def _why(
    chosen: Setting,
    best: Setting,
    equal: Sequence[Setting],
    fitting: Sequence[Setting],
    settings: Sequence[Setting],
    drops: dict[int, float | None],
) -> str:
    limits = f"{len(fitting)} of {len(settings)} settings meet the limits"
    if chosen is best:
        reason = f"it has the highest score of them ({_percent(best.score)})"
        if len(equal) > 1:
            reason += f" and the shortest step of the {len(equal)} that the noise cannot tell apart"
    else:
        reason = (
            f"its score ({_percent(chosen.score)}) cannot be told from the highest of them ({_percent(best.score)}, "
            f"{best.name}), and of {len(equal)} such settings it has the shortest step ({chosen.total_ms:.3g} ms)"
        )
    drop = drops[id(chosen)]
    against = ""
    if drop is not None and chosen.variant != "exact":
        against = f", {0.0 - 100 * drop:+.2f} points against exact with the same convolutions"
    return f"{limits}; {reason}; a step keeps {_mb(chosen.kept_bytes)}{against}"


def _obstacles(
    settings: Sequence[Setting],
    heavy: Sequence[Setting],
    inexact: Sequence[Setting],
    drops: dict[int, float | None],
    memory_budget: int | None,
    max_score_drop: float | None,
) -> str:
    parts = []
    if memory_budget is not None and heavy:
        listed = ", ".join(f"{s.name} ({_mb(s.kept_bytes)})" for s in heavy)
        parts.append(f"the memory budget of {_mb(memory_budget)} kept for the backward pass rules out {listed}")
    if max_score_drop is not None and inexact:
        listed = ", ".join(f"{s.name} ({100 * (drops[id(s)] or 0.0):.2f} points)" for s in inexact)
        parts.append(f"a drop of at most {100 * max_score_drop:g} points rules out {listed}")
    return f"none of the {len(settings)} settings meets the limits: {'; '.join(parts)}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _mb(size: int) -> str:
    """Megabytes, 1e6 bytes."""
    return f"{size / 1e6:.3g} MB"

"""Learning-rate schedules as formulas of the step's number: a resumed run needs no state for them."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "constant", "step", "linear")


def learning_rate(
    schedule: str, lr: float, step: int, total: int, warmup: int = 0, drop_every: int = 1, drop_factor: float = 0.1
) -> float:
    """The learning rate of one step.

    It rises linearly over the warm-up, ``lr * (step + 1) / (warmup + 1)``; then the schedule runs over the steps that
    are left, as torch's ``SequentialLR`` of ``LinearLR`` and the schedule of the same name would have it.

    Args:
        schedule: ``cosine`` and ``linear`` fall to 0 at ``total``; ``step`` multiplies by ``drop_factor`` after every
            ``drop_every`` steps; ``constant`` stays.
        lr: the peak, at the end of the warm-up.
        step: from 0.
        total, warmup, drop_every: in steps; ``warmup`` below ``total``.
    """
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    step, total = step - warmup, total - warmup
    if schedule == "constant":
        return lr
    if schedule == "step":
        return float(lr * drop_factor ** (step // drop_every))
    if schedule == "linear":
        return lr * (1.0 - step / total)
    return lr * 0.5 * (1.0 + math.cos(math.pi * step / total))

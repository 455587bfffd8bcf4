"""What a user may choose about measuring: how it is done, and on which boards."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ...errors import FarmError
from ...farm.protocol import Address


@dataclass(frozen=True)
class MeasureOptions:
    """How to measure.

    Args:
        threads: threads of the kernels.
        builders: processes that build.
        repeats: repetitions of a measurement; the score is their median.
        min_seconds: least duration of one repetition.
        max_seconds: most time for all repetitions of a candidate.
        build_timeout, run_timeout: seconds until a build, or one call of a kernel, counts as hung.
        cutoff: a candidate that is so many times slower than the best is timed only once.
        final: how many of the fastest candidates the final comparison takes.
        rounds: repetitions of the final comparison; in each round every candidate runs once.
        cold: drive the arguments out of the caches before each call: what a kernel meets whose inputs were made long
            ago. By default they are warm.
        least_calls: in one repetition of a trial, if ``max_seconds`` allows for them.
    """

    threads: int = 1
    builders: int = 1
    repeats: int = 5
    min_seconds: float = 0.01
    max_seconds: float = 1.0
    build_timeout: float = 120.0
    run_timeout: float = 30.0
    cutoff: float = 3.0
    final: int = 4
    rounds: int = 9
    cold: bool = False
    least_calls: int = 1

    def to_dict(self) -> dict[str, Any]:
        """What a log's header tells about the measurement."""
        names = ("repeats", "min_seconds", "max_seconds", "final", "rounds")
        return {**{name: getattr(self, name) for name in names}, "cache": "cold" if self.cold else "warm"}


@dataclass(frozen=True)
class FarmOptions:
    """Where the boards are and how they are treated.

    Args:
        tracker: its address.
        key: the kind of board.
        boards: use at most so many at once.
        hot_celsius: a trial that ends hotter is repeated when the board has cooled down by 10 degrees.
        cool_minutes: a board that has not cooled down in this time is put aside.
        drift: a board whose reference kernel takes so much longer than at first, or than on the other boards in the
            middle, is put aside (0.2: 20 %). None does without; boards under emulation always do.
        aside_seconds: for so long.
        patience_minutes: end the run if no board is at work for so long.
    """

    tracker: Address
    key: str
    boards: int | None = None
    hot_celsius: float = 80.0
    cool_minutes: float = 10.0
    drift: float | None = 0.2
    aside_seconds: float = 300.0
    patience_minutes: float = 30.0

    def __post_init__(self) -> None:
        limits = {"boards": self.boards, "drift": self.drift, "hot_celsius": self.hot_celsius}
        limits |= {"cool_minutes": self.cool_minutes, "aside_seconds": self.aside_seconds}
        limits |= {"patience_minutes": self.patience_minutes}
        for name, value in limits.items():
            if value is not None and not 0 < value < math.inf:
                raise FarmError(f"{name} must be more than 0, got {value}")

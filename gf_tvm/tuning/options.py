"""What a user may choose about a search."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from .log import SPACES
from .task import TuningError

#: Candidates that are proposed, built and measured together, by kind of space. Ours learns from each batch at no cost
#: to speak of; MetaSchedule's takes seconds to propose.
BATCH = {"ours": 8, "metaschedule": 16}


@dataclass(frozen=True)
class SearchOptions:
    """How much to search, where, and when to stop.

    Args:
        trials: trials per workload that the log shall have in the end.
        minutes: end after this time, divided evenly between the workloads that are left; None: when all is done.
        early_stop: end with a workload after so many trials without an improvement by 1 %; None: go on.
        space: "ours" (:mod:`gf_tvm.schedules`) or "metaschedule" (its own rules on the same definition).
        seed: of the search.
        seed_logs: other folders of logs of this device; their fastest configurations are measured first.
        batch: candidates of one round; default: :data:`BATCH`.
    """

    trials: int = 64
    minutes: float | None = None
    early_stop: int | None = None
    space: str = "ours"
    seed: int = 0
    seed_logs: Sequence[str | os.PathLike[str]] = ()
    batch: int | None = None

    def check(self, threads: int) -> None:
        """Raise TuningError for what cannot be done; ``threads`` are those of the kernels."""
        counts = {"trials": self.trials, "early_stop": self.early_stop, "threads": threads, "batch": self.batch}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise TuningError(f"{name} must be at least 1, got {value}")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise TuningError(f"minutes must be more than 0, got {self.minutes}")
        if self.space not in SPACES:
            raise TuningError(f"unknown space {self.space!r}; known: {', '.join(SPACES)}")

    @property
    def batch_size(self) -> int:
        """Candidates of one round."""
        return self.batch or BATCH[self.space]

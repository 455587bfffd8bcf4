"""What comes of measuring a candidate."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """What became of a candidate; the fields are those of :class:`~gf_tvm.tuning.log.Record`."""

    status: str
    runs: tuple[float, ...] = ()
    excess: float | None = None
    message: str = ""
    board: dict[str, Any] | None = None

    @property
    def seconds(self) -> float | None:
        """The median of the repetitions."""
        return statistics.median(self.runs) if self.runs else None

"""The cost model of our own spaces: xgboost's regression trees on the knobs of a candidate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .measuring.result import Result
from .task import import_tool

#: A few hundred trials at most times a dozen features: shallow trees, and not many, or they learn the noise.
_TREES, _DEPTH, _RATE = 60, 4, 0.2


class CostModel:
    """How fast a candidate is, compared with the fastest that is known; one that failed counts as infinitely slow.

    Args:
        seed: of the fit.

    Raises:
        TuningError: xgboost is not installed.
    """

    def __init__(self, seed: int) -> None:
        self._xgboost = import_tool("xgboost")
        # One thread: a few hundred samples give a second one less to do than waiting for it costs.
        self._parameters = {"max_depth": _DEPTH, "eta": _RATE, "seed": seed % (1 << 31), "nthread": 1, "verbosity": 0}
        self._rows: list[Sequence[float]] = []
        self._seconds: list[float | None] = []
        self._booster: Any = None

    def update(self, rows: Sequence[Sequence[float]], results: Sequence[Result]) -> None:
        """Fit anew, to further trials as well; ``rows`` are their features, equally many for each."""
        self._rows += rows
        self._seconds += (result.seconds if result.status == "ok" else None for result in results)
        best = min((seconds for seconds in self._seconds if seconds is not None), default=0.0)
        speeds = [best / seconds if seconds else 0.0 for seconds in self._seconds]
        self._booster = self._xgboost.train(self._parameters, self._matrix(self._rows, label=speeds), _TREES)

    def predict(self, rows: Sequence[Sequence[float]]) -> list[float]:
        """The higher, the faster. Only after :meth:`update`."""
        return [float(score) for score in self._booster.predict(self._matrix(rows))]

    def _matrix(self, rows: Sequence[Sequence[float]], **label: Any) -> Any:
        import numpy as np

        return self._xgboost.DMatrix(np.asarray(rows, dtype="float32").reshape(len(rows), -1), nthread=1, **label)

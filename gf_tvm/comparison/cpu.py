"""Comparing on a CPU in more detail: the machine's limits timed among the variants, and further implementations.

The clock and the memory of a shared machine change by a third within a minute. A limit that was measured before the
run says little about a kernel that is timed later, so a copy and a matrix product take part in every case's rounds,
and each row is held against its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..machine import cpu
from ..shapes.cases import Case
from .backend import Call, Host, Times
from .convolutions import Data, Other, Timing, Variants
from .rows import LimitedHostRow, Row
from .run import roofline, traffic

if TYPE_CHECKING:
    from ..bundle.library import Library

#: Makes a further implementation for a case and its inputs; None where it cannot compute such a case.
Maker = Callable[[Case, Data], Other | None]

#: Names of the two calls that the limits come from.
COPY, SGEMM = "copy", "sgemm"

#: Names that rows and calls have a meaning for already.
_TAKEN = ("baseline", "reference", "gf_tvm", "kernel", "filter_input", COPY, SGEMM)


def of_library(library: Library) -> Maker:
    """A library's kernels as a further implementation, beside those of the library that is compared."""
    return lambda case, data: Variants(case, data, library).as_other()


class LimitedHost(Host):
    """This machine's CPU; rows are :class:`~gf_tvm.comparison.rows.LimitedHostRow`.

    The limits of the whole comparison are the best of all rounds.

    Args:
        makers: further implementations by name, timed in the same rounds.

    Raises:
        ValueError: a name that is taken.
    """

    def __init__(self, makers: Mapping[str, Maker] | None = None) -> None:
        self._makers = dict(makers or {})
        if taken := [name for name in self._makers if name in _TAKEN or " " in name]:
            raise ValueError(f"an implementation cannot be called {taken[0]!r}")
        self.results = Host.results + len(self._makers)
        self._best = (0.0, 0.0)
        self._units: dict[str, float] = {}
        self._products: dict[str, float] = {}
        self._limit_calls: dict[str, Call] = {}

    @contextmanager
    def running(self, threads: int | None) -> Iterator[int]:
        with super().running(threads) as used:
            self._products = cpu.sgemm_rates()
            fastest = max(self._products, key=self._products.__getitem__)
            product = cpu.products(cpu.SGEMM_SIZE)[fastest]
            limits = {SGEMM: (product, cpu.sgemm_gflop(cpu.SGEMM_SIZE)), COPY: cpu.copy_call()}
            for name, (call, units) in limits.items():
                self._limit_calls[name], self._units[name] = call, units
            try:
                yield used
            finally:
                self._limit_calls.clear()  # their buffers are large

    def limits(self) -> tuple[float, float]:
        """The best of all rounds so far; zeros before the first."""
        return self._best

    def variants(self, case: Case, data: Data, library: Library | None) -> Variants:
        made = {name: make(case, data) for name, make in self._makers.items()}
        return Variants(case, data, library, {name: other for name, other in made.items() if other is not None})

    def calls(self, data: Data, variants: Sequence[Variants]) -> dict[str, Call]:
        return {**super().calls(data, variants), **self._limit_calls}

    def time(
        self, data: Data, variants: Sequence[Variants], effort: tuple[int, float], progress: Callable[[float], None]
    ) -> Times:
        measured = super().time(data, variants, effort, progress)
        peak, bandwidth = (_rates(measured.times[name], self._units[name]) for name in (SGEMM, COPY))
        self._best = max(self._best[0], peak["best"]), max(self._best[1], bandwidth["best"])
        more = tuple(
            {
                "geometry": variant.case.geometry,
                "peak_gflops": peak,
                "bandwidth_gbs": bandwidth,
                "times": measured.times,
                "index": index,
                "others": _others(variant, measured.times, index),
            }
            for index, variant in enumerate(variants)
        )
        return Times(measured.times, measured.baseline, more)

    def row(self, row: Row, more: Mapping[str, Any], limits: tuple[float, float]) -> Row:
        peak, bandwidth, times, index = (more[name] for name in ("peak_gflops", "bandwidth_gbs", "times", "index"))
        moved, operations = traffic(more["geometry"], row.dtype)
        limit, what = roofline(more["geometry"], row.dtype, peak["median"], bandwidth["median"])
        limit_best, _ = roofline(more["geometry"], row.dtype, peak["best"], bandwidth["best"])
        names = {"baseline": "baseline", **{name: f"{name} {index}" for name in ("reference", "gf_tvm", "kernel")}}
        best = {name: times[key].best for name, key in names.items() if key in times}
        whole, kernel = best.get("gf_tvm", best["reference"]), times.get(f"kernel {index}")
        pooled = (row.saved_bytes_baseline + row.saved_bytes_gf_tvm) / bandwidth["median"] / 1e6
        return LimitedHostRow(
            **vars(row),
            operations=operations,
            moved_bytes=moved,
            peak_gflops=peak,
            bandwidth_gbs=bandwidth,
            limit=what,
            limit_ms=limit,
            limit_best_ms=limit_best,
            best_ms={**best, "filter_input": times[f"filter_input {index}"].best},
            gf_tvm_kernel_ms_quartiles=kernel.quartiles if kernel else None,
            fraction_of_limit=limit / row.gf_tvm_ms,
            fraction_of_limit_best=limit_best / whole,
            kernel_fraction_of_limit=limit / kernel.median if kernel else None,
            kernel_fraction_of_limit_best=limit_best / kernel.best if kernel else None,
            filter_input_limit_ms=pooled,
            filter_input_fraction_of_limit=pooled / row.filter_input_ms,
            others=more["others"],
        )

    def conditions(self) -> dict[str, Any]:
        found = super().conditions()
        found["limits"] = (
            "copy bandwidth (read + write) by torch.copy_, peak by the fastest float32 product of matrices, both timed "
            "in the rounds of every case; of the whole comparison the best of all rounds, of a row median and best of "
            "its own"
        )
        found["products_gflops"] = self._products
        found["fractions"] = (
            "limit / time: medians of a row's own rounds; those called best: bests of the same rounds. roofline_ms "
            "alone is made with the limits of the whole comparison"
        )
        found["caches"] = "the copy runs among the variants, so small tensors are often out of the caches"
        return found


def _rates(timing: Timing, units: float) -> dict[str, Any]:
    """What a call of ``units`` (GB or GFLOP) reached, a second."""
    assert timing.best is not None
    slow, fast = timing.quartiles[1], timing.quartiles[0]
    rates = [1e3 * units / ms for ms in (timing.median, slow, fast, timing.best)]
    return {"median": rates[0], "quartiles": (rates[1], rates[2]), "best": rates[3], "repeats": timing.repeats}


def _others(variant: Variants, times: Mapping[str, Timing], index: int) -> dict[str, dict[str, Any]]:
    found = {}
    for name, other in variant.others.items():
        backward, pooling = times[f"{name} {index}"], times.get(f"{name} filter_input {index}")
        error = variant.errors.get(name, math.nan)
        found[name] = {
            "ms": backward.median,
            "ms_quartiles": backward.quartiles,
            "best_ms": backward.best,
            "repeats": backward.repeats,
            "schedule": other.schedule,
            "max_rel_error": error,
            "filter_input_ms": pooling.median if pooling else None,
            "filter_input_ms_quartiles": pooling.quartiles if pooling else None,
        }
    return found

"""Comparing on a CPU: the exact backward pass by oneDNN, the machine's limits timed among the variants, and further
implementations.

The clock and the memory of a shared machine change by a third within a minute. A limit that was measured before the
run says little about a kernel that is timed later, so a copy and a matrix product take part in every case's rounds,
and each row is held against its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gf_cuda import rounds

from ..machine import cpu
from ..machine.timing import Timing, measure
from ..shapes.cases import Case
from .backend import Backend, Call, CaseTimings, variant_calls
from .convolutions import (
    Contender,
    Data,
    Variants,
    baseline_name,
    check_baseline,
    exact_backward,
)
from .limits import copying, roofline
from .rows import CpuRow, Row

if TYPE_CHECKING:
    from ..bundle.library import Library

#: Makes a further implementation for a case and its inputs; None where it cannot compute such a case.
Maker = Callable[[Case, Data], Contender | None]

#: Names of the two calls that the limits come from.
COPY, SGEMM = "copy", "sgemm"

#: Names that rows and calls have a meaning for already.
_TAKEN = ("baseline", "reference", "gf_tvm", "kernel", "filter_input", COPY, SGEMM)


def of_library(library: Library) -> Maker:
    """A library's kernels as a further implementation, beside those of the library that is compared."""
    return lambda case, data: Variants(case, data, library).as_contender()


@dataclass(frozen=True)
class LimitCall:
    """A call that one of the limits comes from, and what it moves (GB) or computes (GFLOP)."""

    name: str
    call: Call
    units: float

    def rates(self, timing: Timing) -> dict[str, Any]:
        """What was reached, a second."""
        assert timing.best is not None
        fast, slow = timing.quartiles
        median, low, high, best = (1e3 * self.units / ms for ms in (timing.median, slow, fast, timing.best))
        return {"median": median, "quartiles": (low, high), "best": best, "repeats": timing.repeats}


class CpuBackend(Backend):
    """This machine's CPU; rows are :class:`~gf_tvm.comparison.rows.CpuRow`.

    The limits of the whole comparison are the best of all rounds.

    Args:
        makers: further implementations by name, timed in the same rounds.

    Raises:
        ValueError: a name that is taken.
    """

    limits_in_rounds = True

    def __init__(self, makers: Mapping[str, Maker] | None = None) -> None:
        self._makers = dict(makers or {})
        if taken := [name for name in self._makers if name in _TAKEN or " " in name]:
            raise ValueError(f"an implementation cannot be called {taken[0]!r}")
        self.results = Backend.results + len(self._makers)
        self._best = (0.0, 0.0)
        self._products: dict[str, float] = {}

    def available_bytes(self) -> int | None:
        return cpu.available_bytes()

    def limits(self) -> tuple[float, float]:
        """The best of all rounds; where there were none, because chains alone are compared, what is measured now."""
        return self._best if all(self._best) else (cpu.sgemm_peak(), cpu.copy_bandwidth())

    def data(self, case: Case) -> Data:
        return Data.random(case)

    def check_baseline(self, case: Case, data: Data) -> None:
        check_baseline(case, data)

    def variants(self, case: Case, data: Data, library: Library | None) -> Variants:
        made = {name: make(case, data) for name, make in self._makers.items()}
        return Variants(case, data, library, {name: other for name, other in made.items() if other is not None})

    def time(
        self, data: Data, variants: Sequence[Variants], effort: tuple[int, float], progress: Callable[[float], None]
    ) -> CaseTimings:
        geometry = variants[0].case.geometry
        # Made for each convolution, so that their large buffers take what memory is left beside its tensors.
        limits = self._limit_calls()
        calls: dict[str, Call] = {"baseline": lambda: exact_backward(data.grad_y, data.x, data.weight, geometry)}
        calls |= variant_calls([variants])
        times = measure({**calls, **{limit.name: limit.call for limit in limits}}, *effort, progress)
        peak, bandwidth = (limit.rates(times[limit.name]) for limit in limits)
        self._best = max(self._best[0], peak["best"]), max(self._best[1], bandwidth["best"])
        more = tuple(
            {
                "geometry": variant.case.geometry,
                "peak_gflops": peak,
                "bandwidth_gbs": bandwidth,
                "times": times,
                "index": index,
                "others": _others(variant, times, index),
            }
            for index, variant in enumerate(variants)
        )
        return CaseTimings(times, baseline_name(data, geometry), more)

    def row(self, row: Row, more: Mapping[str, Any]) -> Row:
        geometry, peak, bandwidth, times, index = (
            more[name] for name in ("geometry", "peak_gflops", "bandwidth_gbs", "times", "index")
        )
        limit, what = roofline(geometry, row.dtype, peak["median"], bandwidth["median"])
        limit_best, _ = roofline(geometry, row.dtype, peak["best"], bandwidth["best"])
        names = {"baseline": "baseline", **{name: f"{name} {index}" for name in ("reference", "gf_tvm", "kernel")}}
        best = {name: times[key].best for name, key in names.items() if key in times}
        whole, kernel = best.get("gf_tvm", best["reference"]), times.get(f"kernel {index}")
        pooled = copying(row.saved_bytes_baseline + row.saved_bytes_gf_tvm, bandwidth["median"])
        own = replace(row, limit=what, limit_ms=limit, fraction_of_limit=limit / row.gf_tvm_ms)
        return CpuRow(
            **vars(own),
            peak_gflops=peak,
            bandwidth_gbs=bandwidth,
            limit_best_ms=limit_best,
            best_ms={**best, "filter_input": times[f"filter_input {index}"].best},
            fraction_of_limit_best=limit_best / whole,
            kernel_fraction_of_limit=limit / kernel.median if kernel else None,
            kernel_fraction_of_limit_best=limit_best / kernel.best if kernel else None,
            filter_input_limit_ms=pooled,
            filter_input_fraction_of_limit=pooled / row.filter_input_ms,
            others=more["others"],
        )

    def conditions(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "statistic": "median; quartiles (lower, upper)",
            "repeats": {"min": rounds.MIN_REPEATS, "min_slow": rounds.MIN_REPEATS_SLOW},
            "order": "variants interleaved in one run, order shuffled in every round",
            "outputs": "allocated in every call of every variant; gf_tvm_kernel_ms alone writes into existing ones",
            "gradients": "baseline and reference: grad_x, grad_W; gf_tvm: grad_x, grad_W, grad_b",
            "saved_bytes": "what autograd keeps of the input: x or x~; the weights, kept by both, are not counted",
        }
        if not all(self._best):
            found["limits"] = (
                "copy bandwidth (read + write) by torch.copy_, peak by float32 products; best of start and end"
            )
            return found
        found["limits"] = (
            "copy bandwidth (read + write) by torch.copy_, peak by the fastest float32 product of matrices, both timed "
            "in the rounds of every case; of the whole comparison the best of all rounds, of a row median and best of "
            "its own"
        )
        found["products_gflops"] = self._products
        found["fractions"] = (
            "limit / time: medians of a row's own rounds; those called best: bests of the same rounds; kernel: into "
            "outputs that exist; filter_input: x read and x~ written at copy speed. roofline_ms alone is made with the "
            "limits of the whole comparison"
        )
        found["caches"] = "the copy runs among the variants, so small tensors are often out of the caches"
        return found

    def _limit_calls(self) -> tuple[LimitCall, LimitCall]:
        """The fastest product, and a copy."""
        self._products = self._products or cpu.sgemm_rates()
        fastest = max(self._products, key=self._products.__getitem__)
        product = cpu.products(cpu.SGEMM_SIZE)[fastest]
        return LimitCall(SGEMM, product, cpu.sgemm_gflop(cpu.SGEMM_SIZE)), LimitCall(COPY, *cpu.copy_call())


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

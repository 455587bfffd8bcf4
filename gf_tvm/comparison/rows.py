"""What a comparison finds of one case, and means over several."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..core.geometry import Pair
from ..machine.timing import Quartiles


@dataclass(frozen=True)
class Row:
    """One case on one device. Times in milliseconds (medians), quartiles as (lower, upper), sizes in bytes.

    The limit is ``moved_bytes`` at the copy bandwidth, or ``operations`` (floating-point) at the sgemm peak, whichever
    takes longer: ``roofline_ms`` with the limits of the whole comparison (``roofline`` says which it is, "bandwidth"
    or "arithmetic"), ``limit_ms`` with those of the row's own rounds where they were measured there (``limit`` says
    which), and ``fraction_of_limit`` is limit_ms / gf_tvm_ms. ``gf_tvm_kernel_ms`` is the kernel alone, into outputs
    that exist already. ``filter_input_ms`` is the pooling of x in the forward pass, for which the baseline needs
    nothing.
    """

    name: str
    device: str
    dtype: str
    n: int
    ci: int
    co: int
    h: int
    w: int
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    patch: Pair
    baseline: str
    baseline_ms: float
    baseline_ms_quartiles: Quartiles
    reference_ms: float
    reference_ms_quartiles: Quartiles
    gf_tvm_ms: float
    gf_tvm_ms_quartiles: Quartiles
    gf_tvm_kernel_ms: float | None
    gf_tvm_kernel_ms_quartiles: Quartiles | None
    schedule: str
    filter_input_ms: float
    filter_input_ms_quartiles: Quartiles
    filter_input_schedule: str
    roofline_ms: float
    roofline: str
    limit_ms: float
    limit: str
    fraction_of_limit: float
    operations: int
    moved_bytes: int
    saved_bytes_baseline: int
    saved_bytes_gf_tvm: int
    max_rel_error: float
    repeats: dict[str, int]
    layers: tuple[str, ...]

    @property
    def speedup(self) -> float:
        """Exact backward / filtered backward."""
        return self.baseline_ms / self.gf_tvm_ms

    @property
    def speedup_reference(self) -> float:
        """Plain operators / kernel."""
        return self.reference_ms / self.gf_tvm_ms

    @property
    def limit_fraction(self) -> float:
        """As ``fraction_of_limit``, with the limits of the whole comparison."""
        return self.roofline_ms / self.gf_tvm_ms


@dataclass(frozen=True)
class GpuRow(Row):
    """One case on a GPU: further fields, see ``conditions`` for how they are measured.

    ``baselines``: every exact backward pass by memory format and precision, with ``ms`` (None: not measured, and a
    ``reason``), ``ms_quartiles`` and ``repeats``; ``baseline`` is the fastest of them. By variant: ``host_us``,
    microseconds that the host takes to queue a call; ``peak_bytes``, allocated during a call at most; ``joules`` of a
    call (None: not measured). ``host_bound`` lists the variants that wait for the GPU themselves. ``input_sets`` is
    how many copies of the inputs the calls rotate among. ``filter_input_roofline_ms`` is the limit of the pooling.
    """

    baselines: dict[str, dict[str, Any]]
    host_us: dict[str, float]
    host_bound: tuple[str, ...]
    peak_bytes: dict[str, int]
    joules: dict[str, float | None]
    input_sets: int
    filter_input_roofline_ms: float


@dataclass(frozen=True)
class CpuRow(Row):
    """One case on a CPU, with the machine's limits as they were in the rounds in which the case was timed.

    ``peak_gflops`` and ``bandwidth_gbs`` have ``median``, ``quartiles`` (lower, upper) and ``best`` of this case's
    rounds; ``best_ms`` is the fastest call of each variant. ``limit_ms`` follows from the medians of both,
    ``limit_best_ms`` from their bests. The fractions are limit / time, median over median and best over best:
    ``fraction_of_limit`` of ``gf_tvm_ms``, outputs allocated; ``kernel_fraction_of_limit`` of ``gf_tvm_kernel_ms``,
    into existing ones, as the limit's copies are; None where there is no kernel. ``filter_input_fraction_of_limit`` is
    that of the pooling, whose limit is copying.

    ``others``: further implementations by name, without those that cannot compute the case. Each has ``ms``,
    ``ms_quartiles``, ``best_ms``, ``repeats``, ``schedule``, ``max_rel_error``, and of the pooling in the forward pass
    ``filter_input_ms`` and its quartiles (None: not timed).
    """

    peak_gflops: dict[str, Any]
    bandwidth_gbs: dict[str, Any]
    limit_best_ms: float
    best_ms: dict[str, float]
    fraction_of_limit_best: float
    kernel_fraction_of_limit: float | None
    kernel_fraction_of_limit_best: float | None
    filter_input_limit_ms: float
    filter_input_fraction_of_limit: float
    others: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class ChainRow:
    """One chain of a model with one patch. Times in ms (medians), quartiles as (lower, upper), sizes in bytes.

    What has a value for each variant is an object with ``exact``, ``filtered`` (layer by layer) and ``chained``:
    ``forward_ms``, ``backward_ms`` and their quartiles, ``repeats``, ``kept_bytes`` (what autograd keeps from the
    forward to the backward pass, everything but parameters). ``input`` is the shape of the model's input, ``entries``
    and ``exits`` the shapes of the maps with which the chain begins and ends, ``ends`` where gradients of full size
    come in and why. ``schedule`` is the least of the chain's kernels ("tuned", "default", or "torch" where PyTorch
    operators run in place of one), ``filtered_schedule`` of those that run layer by layer; ``kernels`` counts both.

    ``roofline_ms`` is the limit of the chained backward pass: ``moved_bytes`` at the copy bandwidth, or ``operations``
    at the sgemm peak, whichever takes longer (``roofline`` says which). Bytes: what was kept, the weights and the
    gradients that come in read once, the gradients of parameters and of ``entries`` written once; maps on the patch
    grid are not counted, since they may stay in a cache. Operations: two for each multiply-add of the products.
    ``max_rel_error`` is the largest of all gradients of the chained variant: max|a - b| / max|b| against the unchained
    filtered model in float64.
    """

    name: str
    device: str
    dtype: str
    patch: Pair
    input: tuple[int, ...]
    convolutions: tuple[str, ...]
    ends: tuple[str, ...]
    entries: tuple[tuple[int, ...], ...]
    exits: tuple[tuple[int, ...], ...]
    forward_ms: dict[str, float]
    forward_ms_quartiles: dict[str, Quartiles]
    backward_ms: dict[str, float]
    backward_ms_quartiles: dict[str, Quartiles]
    repeats: dict[str, int]
    schedule: str
    filtered_schedule: str
    kernels: dict[str, dict[str, int]]
    kept_bytes: dict[str, int]
    roofline_ms: float
    roofline: str
    operations: int
    moved_bytes: int
    max_rel_error: float

    @property
    def speedup(self) -> float:
        """Exact backward / chained backward."""
        return self.backward_ms["exact"] / self.backward_ms["chained"]

    @property
    def speedup_filtered(self) -> float:
        """Backward layer by layer / chained backward."""
        return self.backward_ms["filtered"] / self.backward_ms["chained"]

    @property
    def limit_fraction(self) -> float:
        """Limit / chained backward."""
        return self.roofline_ms / self.backward_ms["chained"]


def geometric_means(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Geometric means of the speed-ups and of the fractions of the limit, per patch, in the order of the patches.

    If there are rows of several dtypes: per patch and ``dtype``.
    """
    rows = list(rows)
    several = len({row.dtype for row in rows}) > 1
    by_patch: dict[tuple[Pair, str], list[Row]] = {}
    for row in rows:
        by_patch.setdefault((row.patch, row.dtype), []).append(row)
    return [
        {
            "patch": patch,
            **({"dtype": dtype} if several else {}),
            "rows": len(group),
            "speedup": statistics.geometric_mean(row.speedup for row in group),
            "speedup_reference": statistics.geometric_mean(row.speedup_reference for row in group),
            "limit_fraction": statistics.geometric_mean(row.limit_fraction for row in group),
            "fraction_of_limit": statistics.geometric_mean(row.fraction_of_limit for row in group),
        }
        for (patch, dtype), group in by_patch.items()
    ]

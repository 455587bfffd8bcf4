"""Measure the filtered backward pass against the exact one, on the machine this runs on.

Three variants of one convolution's backward pass are timed in one interleaved run, each with freshly allocated
outputs, as a training step allocates them:

- *baseline*: grad_x and grad_W by the framework (``aten.convolution_backward``; oneDNN on CPUs), contiguous NCHW;
- *reference*: gradient filtering by plain PyTorch operators (:func:`gf_tvm.core.reference.backward`);
- *gf_tvm*: the kernel of a library, grad_b included.

Nothing is timed before its result agreed with float64, see :mod:`gf_tvm.comparison.convolutions`.

Chains of convolutions are measured besides, see :mod:`gf_tvm.comparison.chains`.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gf_cuda import rounds

from ..core.dtypes import itemsize
from ..core.geometry import Geometry
from ..errors import DeviceError
from ..machine import cpu, profiles
from ..shapes.cases import Case, format_patch
from .backend import Backend, CaseTimings
from .convolutions import ComparisonError, Data, Variants, schedule_of
from .cpu import CpuBackend
from .limits import roofline, saved_bytes, traffic
from .rows import ChainRow, Row, geometric_means

if TYPE_CHECKING:
    from ..bundle.library import Library
    from .chains import ChainCase, Outcome
    from .steps import StepRow

SCHEMA_VERSION = 1

#: Called with the work done, all work (both in seconds, roughly) and what is being done now.
ProgressCallback = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Comparison:
    """Rows and the conditions they were measured under; see :meth:`to_dict` for the JSON form.

    ``conditions["other_cores"]`` says how many cores other programs kept busy meanwhile (None: unknown): from a tenth
    of a core on, times are doubtful, because PyTorch's threads wait for each other.
    """

    machine: dict[str, Any]
    threads: int
    versions: dict[str, str | None]
    peak_gflops: float
    bandwidth_gbs: float
    conditions: dict[str, Any]
    rows: tuple[Row, ...]
    chains: tuple[ChainRow, ...] = ()
    steps: tuple[StepRow, ...] = ()

    @property
    def device_name(self) -> str:
        """What ran: the GPU's name, or the CPU's."""
        gpu = self.machine.get("gpu")
        return str(gpu["name"] if gpu else self.machine["cpu"])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: schema version, head, rows, geometric means per patch, rows of chains and steps."""
        return {
            "schema_version": SCHEMA_VERSION,
            "machine": self.machine,
            "threads": self.threads,
            "versions": self.versions,
            "peak_gflops": self.peak_gflops,
            "bandwidth_gbs": self.bandwidth_gbs,
            "conditions": self.conditions,
            "rows": [asdict(row) for row in self.rows],
            "geometric_means": geometric_means(self.rows),
            "chains": [asdict(row) for row in self.chains],
            "steps": [row.to_dict() for row in self.steps],
        }


def compare(
    cases: Sequence[Case],
    library: Library | str | os.PathLike[str] | None = None,
    device: str = "host",
    threads: int | None = None,
    repeats: int = 100,
    seconds: float = 5.0,
    progress: ProgressCallback | None = None,
    energy: bool | None = None,
    backend: Backend | None = None,
    chains: Sequence[ChainCase] = (),
) -> Comparison:
    """Check and measure cases.

    Args:
        cases: see :mod:`gf_tvm.shapes`. Neighbours that differ in nothing but the patch share one baseline. May be
            empty where there are chains.
        library: a loaded bundle or its file. Cases that it lacks, or all without one, run the plain PyTorch
            operators: their ``schedule`` is "torch" and ``gf_tvm_ms`` is ``reference_ms``.
        device: a device profile that describes this machine.
        threads: CPU threads for all variants; None: as many as PyTorch uses now.
        repeats: timed calls of one variant at most, at least 5.
        seconds: to spend on timing one convolution with all of its patches; at least 5 calls of each variant are
            made (3 where a call takes over a second).
        progress: told how far the work is.
        energy: measure joules on a GPU; None: where there is a meter.
        backend: how to measure; None: as usual on such a device (:class:`gf_tvm.comparison.cpu.CpuBackend` can time
            further implementations).
        chains: models whose chains are measured besides, made by :func:`gf_tvm.comparison.chains.chain_cases`; on CPUs
            only. ``conditions["unchained"]`` names by patch the filtered convolutions that are in no chain, and why.

    Raises:
        DeviceError: unknown device, one that is not this machine, a PyTorch without CUDA for a GPU, energy asked for
            where it cannot be measured, or fewer than 1 thread.
        ComparisonError: no cases, a wrong result (nothing of that convolution was timed), or too little memory.
    """
    profile, backend = _check_request(cases, device, threads, repeats, seconds, energy, backend, chains)
    loaded = _load(library)
    groups = [list(group) for _, group in groupby(cases, key=_without_patch)]
    # A chain takes as long as a convolution, and how many there are is seen when the model has run.
    work = [*(_estimated_seconds(group, seconds) for group in groups), *(2 * seconds + 1 for _ in chains)]
    report = progress or (lambda done, total, what: None)
    pending: list[Callable[[tuple[float, float]], Row]] = []
    other_load = cpu.OtherLoad()
    with backend.running(threads) as used_threads:
        limits = []
        if not (cases and backend.limits_in_rounds):
            report(0.0, sum(work), "the machine's limits")
            limits.append(backend.limits())
        for index, group in enumerate(groups):
            before, name = sum(work[:index]), group[0].name
            report(before, sum(work), f"checking {name}")
            data, variants, errors = _check_group(group, loaded, backend)

            def timing(part: float, done: float = before, own: float = work[index], name: str = name) -> None:
                report(done + own * (0.3 + 0.7 * part), sum(work), f"timing {name}")

            times = backend.time(data, variants, (repeats, seconds), timing)
            for i, (variant, error) in enumerate(zip(variants, errors, strict=True)):
                schedules = (schedule_of(variant.backward), schedule_of(variant.pooling))
                pending.append(partial(_row, variant.case, schedules, profile.name, error, times, i, backend))
            del data, variants, variant  # the next convolution may need the memory
        outcomes: list[Outcome] = []
        for case_index, chain in enumerate(chains, start=len(groups)):
            from .chains import measure_chains  # here, because it needs all of training

            def part_done(
                part: float, what: str, done: float = sum(work[:case_index]), own: float = work[case_index]
            ) -> None:
                report(done + own * part, sum(work), what)

            outcomes.append(measure_chains(chain, loaded, (repeats, seconds), part_done))
        # A limit is the best that was seen: a busy moment must not pass for one.
        limits.append(backend.limits())
        report(sum(work), sum(work), "done")
    peak, bandwidth = (max(values) for values in zip(*limits, strict=True))
    other_cores = other_load.cores()
    conditions = backend.conditions()
    conditions["repeats"]["max"] = repeats
    return Comparison(
        machine=backend.machine(),
        threads=used_threads,
        versions=backend.versions(),
        peak_gflops=peak,
        bandwidth_gbs=bandwidth,
        conditions={
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds_per_convolution": seconds,
            "other_cores": other_cores,
            **conditions,
            **_of_chains(chains, outcomes),
            "library": None if loaded is None else {"file": Path(loaded.path).name, "sha256": loaded.digest},
        },
        rows=tuple(row((peak, bandwidth)) for row in pending),
        chains=tuple(
            measured.row(profile.name, (peak, bandwidth)) for outcome in outcomes for measured in outcome.chains
        ),
    )


def _of_chains(chains: Sequence[ChainCase], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """How chains were measured, and what is in none."""
    if not chains:
        return {}
    from .chains import CONDITIONS

    return {
        "chains": CONDITIONS,
        "unchained": {
            format_patch(case.patch): outcome.alone
            for case, outcome in zip(chains, outcomes, strict=True)
            if outcome.alone
        },
    }


def check_request(
    cases: Sequence[Case],
    device: str = "host",
    threads: int | None = None,
    repeats: int = 100,
    seconds: float = 5.0,
    energy: bool | None = None,
    chains: Sequence[ChainCase] = (),
) -> profiles.DeviceProfile:
    """Raise what :func:`compare` would raise for these arguments before it measures; return the device's profile.

    For callers that have kernels to build first.
    """
    return _check_request(cases, device, threads, repeats, seconds, energy, None, chains)[0]


def _check_request(
    cases: Sequence[Case],
    device: str,
    threads: int | None,
    repeats: int,
    seconds: float,
    energy: bool | None,
    backend: Backend | None = None,
    chains: Sequence[ChainCase] = (),
) -> tuple[profiles.DeviceProfile, Backend]:
    if not cases and not chains:
        raise ComparisonError("there is nothing to compare: no cases")
    if repeats < rounds.MIN_REPEATS:
        raise ComparisonError(f"repeats must be at least {rounds.MIN_REPEATS}, got {repeats}")
    if not seconds >= 0 or math.isinf(seconds):
        raise ComparisonError(f"seconds must be a number of at least 0, got {seconds}")
    if threads is not None and threads < 1:
        raise DeviceError(f"threads must be at least 1, got {threads}")
    profile = profiles.get_profile(device)
    if chains and profile.gpu is not None:
        raise DeviceError(f"chains are measured on CPUs, and {profile.name!r} is a GPU: leave them out there")
    usual = _backend(profile, energy)
    backend = backend or usual
    for case in cases:
        _check_memory(case, backend)
    return profile, backend


def _backend(profile: profiles.DeviceProfile, energy: bool | None) -> Backend:
    if profile.gpu is not None:
        from . import gpu

        gpu.require_cuda(profile)
        if not profiles.runs_here(profile):
            raise DeviceError(
                f"device {profile.name!r} ({profile.description}) is not this machine's GPU "
                f"({profiles.present_gpu()}); compare measures the machine it runs on, so run it there"
            )
        return gpu.CudaBackend(gpu.open_gpu(energy))
    if energy:
        raise DeviceError(f"energy is measured on GPUs only, and {profile.name!r} is a CPU")
    if not profiles.runs_here(profile):
        raise DeviceError(
            f"device {profile.name!r} ({profile.description}) is not this machine ({cpu.cpu_model()}, "
            f"{platform.machine()}); compare measures the machine it runs on, so run it there"
        )
    return CpuBackend()


def _load(library: Library | str | os.PathLike[str] | None) -> Library | None:
    if not isinstance(library, (str, os.PathLike)):
        return library
    from ..bundle.library import load  # here, because plain operators can be compared without TVM

    return load(library)


def _without_patch(case: Case) -> tuple[Any, ...]:
    return (case.name, case.dtype, replace(case.geometry, patch=(1, 1)))


def _exact_operations(geometry: Geometry) -> int:
    """Floating-point operations of the exact grad_x and grad_W."""
    return 4 * math.prod(geometry.y_shape) * geometry.ci_group * math.prod(geometry.kernel)


def _estimated_seconds(group: Sequence[Case], seconds: float) -> float:
    """Rough: the budget, the baseline's least calls, float64 checks."""
    geometry = group[0].geometry
    elements = math.prod(geometry.x_shape) + math.prod(geometry.y_shape)
    return seconds + 4 * _exact_operations(geometry) / 7e10 + len(group) * elements / 5e7


def _check_memory(case: Case, backend: Backend) -> None:
    geometry, available = case.geometry, backend.available_bytes()
    elements = math.prod(geometry.x_shape) + math.prod(geometry.y_shape)
    # Inputs, the results held for the check, and the framework's reordered copies.
    needed = (2 + backend.results) * elements * itemsize(case.dtype)
    if available is not None and needed > available:
        raise ComparisonError(
            f"case {case.name} needs about {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available"
        )


def _check_group(
    group: Sequence[Case], library: Library | None, backend: Backend
) -> tuple[Data, list[Variants], list[float]]:
    """Inputs, variants and errors of one convolution with all of its patches. Raises ComparisonError."""
    data = backend.data(group[0])
    backend.check_baseline(group[0], data)
    variants = [backend.variants(case, data, library) for case in group]
    return data, variants, [variant.check() for variant in variants]


def _row(
    case: Case,
    schedules: tuple[str, str],
    device: str,
    error: float,
    measured: CaseTimings,
    index: int,
    backend: Backend,
    limits: tuple[float, float],
) -> Row:
    geometry, times = case.geometry, measured.times
    exact, plain, pooling = times["baseline"], times[f"reference {index}"], times[f"filter_input {index}"]
    own, kernel = times.get(f"gf_tvm {index}", plain), times.get(f"kernel {index}")
    limit, limit_name = roofline(geometry, case.dtype, *limits)
    moved, operations = traffic(geometry, case.dtype)
    row = Row(
        name=case.name,
        device=device,
        dtype=case.dtype,
        **{field: getattr(geometry, field) for field in geometry.__match_args__},
        baseline=measured.baseline,
        baseline_ms=exact.median,
        baseline_ms_quartiles=exact.quartiles,
        reference_ms=plain.median,
        reference_ms_quartiles=plain.quartiles,
        gf_tvm_ms=own.median,
        gf_tvm_ms_quartiles=own.quartiles,
        gf_tvm_kernel_ms=kernel.median if kernel else None,
        gf_tvm_kernel_ms_quartiles=kernel.quartiles if kernel else None,
        schedule=schedules[0],
        filter_input_ms=pooling.median,
        filter_input_ms_quartiles=pooling.quartiles,
        filter_input_schedule=schedules[1],
        roofline_ms=limit,
        roofline=limit_name,
        limit_ms=limit,
        limit=limit_name,
        fraction_of_limit=limit / own.median,
        operations=operations,
        moved_bytes=moved,
        saved_bytes_baseline=math.prod(geometry.x_shape) * itemsize(case.dtype),
        saved_bytes_gf_tvm=saved_bytes(geometry, case.dtype),
        max_rel_error=error,
        repeats={"baseline": exact.repeats, "reference": plain.repeats, "gf_tvm": own.repeats},
        layers=case.layers,
    )
    return backend.row(row, measured.more[index])

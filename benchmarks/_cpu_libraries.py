"""The bundles that benchmarks/cpu.py times beside each other: tuned, untuned, and found by stock MetaSchedule."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from gf_tvm.building import build
from gf_tvm.bundle.library import Library, load
from gf_tvm.core.workload import Workload
from gf_tvm.machine.profiles import DeviceProfile
from gf_tvm.runners._output import ProgressBar
from gf_tvm.tuning import Event, find_best, tune


def tuned(workloads: Sequence[Workload], profile: DeviceProfile, logs: Sequence[Path], out: Path) -> Library:
    """The best schedules of ``logs`` and of the shipped ones; default schedules where there is none."""
    return _built(workloads, profile, logs, out, "building", shipped=True)


def untuned(workloads: Sequence[Workload], profile: DeviceProfile, out: Path) -> Library:
    """The default schedules of the spaces, whatever the logs have."""
    return _built(workloads, profile, (), out, "building default schedules", shipped=False)


def stock(
    workloads: Sequence[Workload], profile: DeviceProfile, trials: int, threads: int | None, logs: Path, out: Path
) -> Library | None:
    """What MetaSchedule's own space, rules and search find for the same definitions in so many trials each.

    These are those of ``meta_schedule.tune_tir``; building and measuring are ours, as for all others, so every result
    is checked and compared fairly. Trials in ``logs`` count and are not made again. Kernels of which no trial ended
    well are left out; None if that is all of them.
    """
    with ProgressBar(len(workloads) * trials, "tuning with stock MetaSchedule", unit="trial") as progress:

        def update(event: Event) -> None:
            best = "" if event.best is None else f"best {1e3 * event.best:.3g} ms"
            progress.update((event.index - 1) * trials + min(event.trial, trials), f"{event.workload} {best}")

        tune(
            workloads,
            profile.name,
            logs=logs,
            trials=trials,
            space="metaschedule",
            threads=threads,
            progress=update,
        )
    found = []
    for workload in workloads:
        record, _ = find_best(workload, profile, [logs])
        if record is not None and record.space == "metaschedule":
            found.append(workload)
        else:
            print(f"stock MetaSchedule found nothing that works for {workload.key}", file=sys.stderr)
    if not found:
        return None
    return _built(found, profile, (logs,), out, "building what it found", shipped=False)


def _built(
    workloads: Sequence[Workload], profile: DeviceProfile, logs: Sequence[Path], out: Path, label: str, shipped: bool
) -> Library:
    with ProgressBar(len(workloads), label, unit="kernel") as progress:
        build(
            workloads,
            profile,
            logs,
            out,
            lambda done, of, kernel: progress.update(done, f"{kernel.schedule} {kernel.workload.key}"),
            shipped=shipped,
        )
    return load(out)

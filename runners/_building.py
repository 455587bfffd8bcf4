"""Building a bundle from logs, as build, tune and compare share it: the option, the progress, the reasons."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ._output import ProgressBar

if TYPE_CHECKING:
    from ..building import BuildReport, BuiltKernel
    from ..bundle.program import Program
    from ..core.workload import Workload
    from ..machine.profiles import DeviceProfile


def add_logs_argument(parser: argparse.ArgumentParser) -> None:
    """Add --logs."""
    parser.add_argument(
        "--logs",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder of tuning logs, searched before those that come with gf_tvm; may be given more than once",
    )


def check_logs(logs: list[Path]) -> None:
    """Raise LogError for a folder that does not exist: a mistyped name would silently give default schedules."""
    from ..errors import LogError

    for folder in logs:
        if not folder.is_dir():
            raise LogError(f"there is no folder of tuning logs {str(folder)!r}")


def build_with_progress(
    workloads: list[Workload],
    profile: DeviceProfile,
    logs: list[Path],
    out: Path,
    programs: Sequence[Program] = (),
    sign: Path | None = None,
) -> BuildReport:
    """:func:`gf_tvm.build`, with a progress bar."""
    from ..building import BuiltKernel, build

    with ProgressBar(len(workloads) + len(programs), "building", unit="kernel") as progress:

        def update(done: int, of: int, built: BuiltKernel | Program) -> None:
            name = built.key if not isinstance(built, BuiltKernel) else f"{built.schedule} {built.workload.kernel}"
            progress.update(done, name)

        return build(workloads, profile, logs, out, update, programs=programs, sign=sign)


def print_reasons(report: BuildReport) -> None:
    """Say once each why kernels have default schedules, and what is to be said about tuned ones."""
    for reason, count in Counter(kernel.reason for kernel in report.kernels if kernel.reason).items():
        print(f"{count} with default schedules: {reason}")
    for note, count in Counter(kernel.note for kernel in report.kernels if kernel.note).items():
        print(f"{count} {'kernel' if count == 1 else 'kernels'} {note}")

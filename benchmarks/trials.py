"""How much a long search finds that a short one does not: the winners of both, timed in the same rounds.

    python benchmarks/trials.py --shapes paper --cases 4-7 --few 64 --many 1000 --json trials.json

For the backward pass of each case: a search of ``--few`` trials as ``gf-tvm tune`` makes it, then the same log
continued to ``--many``. The winners of both, and the default schedule, are checked against float64 and timed
interleaved, so that neither profits from a quiet minute in which it was measured. Also told is after how many trials
the long search had seen a time within 5 % of the shortest that it saw at all. The machine has to be idle.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _allocator import keep_freed_memory
from _bench import UsageError, conditions
from _cpu_libraries import tuned, untuned

from gf_tvm.comparison.cpu import CpuBackend, of_library
from gf_tvm.comparison.rows import CpuRow
from gf_tvm.comparison.run import check_request, compare
from gf_tvm.core.workload import Workload
from gf_tvm.machine.profiles import DeviceProfile
from gf_tvm.runners._cases import add_case_arguments, cases_from
from gf_tvm.runners._output import ProgressBar, check_results, format_table, write_json
from gf_tvm.runners.cli import Parser, run_command, run_parsed
from gf_tvm.schedules import get_space
from gf_tvm.shapes import Case, format_patch
from gf_tvm.tuning import Event, Summary, tune

#: What counts as good as the best.
CLOSE = 1.05


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="trials.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_arguments(parser)
    parser.add_argument("--few", type=int, default=64, metavar="N", help="trials of the short search (default: 64)")
    parser.add_argument("--many", type=int, default=1000, metavar="N", help="of the long one (default: 1000)")
    parser.add_argument(
        "--trial-logs", type=Path, metavar="DIR", help="keep the trials there, and continue what is there"
    )
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="timing of each case (default: 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    check_results(args.json, None)
    if not 1 <= args.few < args.many:
        raise UsageError(f"--few must be at least 1 and less than --many, got {args.few} and {args.many}")
    if not 0 <= args.seconds < math.inf:
        raise UsageError(f"--seconds must be a number of at least 0, got {args.seconds}")
    cases = cases_from(args)
    profile = check_request(cases, args.device, seconds=args.seconds)
    document: dict[str, Any] = {"schema_version": 1, "few": args.few, "many": args.many, "conditions": conditions()}
    document["conditions"]["keeps_freed_memory"] = keep_freed_memory()
    with tempfile.TemporaryDirectory(prefix="gf_tvm-trials-") as folder:
        document |= measure(cases, profile, args, Path(folder))
    print_rows(document)
    if args.json is not None:
        write_json(args.json, document)
    return 0


def measure(cases: Sequence[Case], profile: DeviceProfile, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both searches, and their winners beside each other."""
    workloads = [Workload("backward", case.geometry, case.dtype) for case in cases]
    kept: Path = args.trial_logs or folder
    few, many = kept / "few", kept / "many"
    search(workloads, profile, args.few, few, "short search")
    if not many.exists():
        shutil.copytree(few, many)
    found = search(workloads, profile, args.many, many, "long search")
    libraries = {
        name: tuned(workloads, profile, [logs], folder / f"{name}.gfb") for name, logs in (("few", few), ("many", many))
    }
    makers = {
        "few": of_library(libraries["few"]),
        "default": of_library(untuned(workloads, profile, folder / "default.gfb")),
    }
    with ProgressBar(1000, "comparing the winners", unit="part") as progress:
        result = compare(
            cases,
            libraries["many"],
            profile.name,
            seconds=args.seconds,
            progress=lambda done, of, what: progress.update(int(1000 * done / of), what),
            backend=CpuBackend(makers),
        )
    rows = []
    for workload, task, row in zip(workloads, found.tasks, result.rows, strict=True):
        assert isinstance(row, CpuRow)
        rows.append(
            {
                "name": row.name,
                "patch": row.patch,
                "points": get_space(workload, profile).size,
                "trials": task.trials,
                "few_ms": row.others["few"]["ms"],
                "many_ms": row.gf_tvm_ms,
                "default_ms": row.others["default"]["ms"],
                "few_ms_quartiles": row.others["few"]["ms_quartiles"],
                "many_ms_quartiles": row.gf_tvm_ms_quartiles,
                "max_rel_error": row.max_rel_error,
                "trials_until_close": until_close(task.trial_seconds),
                "search": {**asdict(task), "log": Path(task.log).name},
            }
        )
    return {
        "machine": result.machine,
        "threads": result.threads,
        "other_cores": result.conditions["other_cores"],
        "rows": rows,
    }


def search(workloads: Sequence[Workload], profile: DeviceProfile, trials: int, logs: Path, label: str) -> Summary:
    """Tune with cold caches, as the shipped logs were."""
    with ProgressBar(len(workloads) * trials, label, unit="trial") as progress:

        def update(event: Event) -> None:
            progress.update((event.index - 1) * trials + min(event.trial, trials), event.workload)

        return tune(workloads, profile.name, logs=logs, trials=trials, cold=True, progress=update)


def until_close(seconds: Sequence[float | None]) -> int | None:
    """The number of the first trial whose time is within 5 % of the shortest; None if none ended well."""
    best = min((value for value in seconds if value is not None), default=None)
    if best is None:
        return None
    return next(k for k, value in enumerate(seconds, 1) if value is not None and value <= CLOSE * best)


def print_rows(document: dict[str, Any]) -> None:
    """Medians in ms."""
    few, many = document["few"], document["many"]
    headers = (
        "case",
        "patch",
        "points",
        "trials",
        "default",
        f"of {few}",
        f"of {many}",
        f"{few} / {many}",
        "close after",
    )
    table = [
        (
            *(row["name"], format_patch(row["patch"]), row["points"], row["trials"]),
            *(f"{row[name]:.3g}" for name in ("default_ms", "few_ms", "many_ms")),
            f"{row['few_ms'] / row['many_ms']:.3f}",
            row["trials_until_close"],
        )
        for row in document["rows"]
    ]
    print(f"The backward pass with the winners of {few} and of {many} trials, medians in ms, timed interleaved.")
    print(format_table(headers, table))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 for a user's mistake, 130 after Ctrl-C; trials that were made are kept then."""
    return run_command("trials.py", lambda: run_parsed(build_parser(), argv))


if __name__ == "__main__":
    sys.exit(main())

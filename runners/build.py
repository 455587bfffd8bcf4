"""gf-tvm build: compile the logs' winners into a bundle."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._cases import add_case_arguments, add_chain_argument, cases_from, programs_from
from ._output import OutputError, Progress, check_writable, format_table, write_json

if TYPE_CHECKING:
    from ..building import BuildReport, BuiltKernel, Program
    from ..core.workload import Workload
    from ..machine.profiles import DeviceProfile


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "build",
        help="compile tuned kernels into a bundle",
        description="Compile the kernels of some convolutions into a bundle, with the best schedules of the tuning "
        "logs, or the default schedules where the logs have none.",
    )
    add_case_arguments(parser)
    add_chain_argument(parser)
    parser.add_argument(
        "--train-bn-affine",
        action="store_true",
        help="with --model and --chain: build the chains that gf-tvm train --train-bn-affine needs",
    )
    add_logs_argument(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.gfb", help="the bundle to write")
    parser.add_argument(
        "--runtime",
        type=Path,
        metavar="FILE.whl|DIR",
        help="for a GPU: also write gf_cuda's wheel, all that a board needs in addition to PyTorch",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was built as JSON")
    parser.set_defaults(run=run)


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


def run(args: argparse.Namespace) -> int:
    from ..machine.profiles import get_profile
    from ..shapes import workloads_of

    for path in (args.out, args.json):
        if path is not None:
            check_writable(path)
    if args.out.exists() and not args.out.is_file():  # a bundle is renamed into place, which would replace a device
        raise OutputError(f"cannot write '{args.out}': not a regular file")
    check_logs(args.logs)
    profile = get_profile(args.device)
    runtime = None if args.runtime is None else _runtime_folder(args.runtime, profile)
    workloads = workloads_of(cases_from(args), args.chain)
    programs = [] if profile.gpu else programs_from(args)
    report = build_with_progress(workloads, profile, args.logs, args.out, programs)
    rows = [(k.schedule, k.workload.kernel, k.workload.geometry.key, k.workload.dtype) for k in report.kernels]
    print(format_table(("schedule", "kernel", "convolution", "dtype"), rows))
    print_reasons(report)
    counts = Counter(kernel.schedule for kernel in report.kernels)
    summary = ", ".join(f"{counts[name]} {name}" for name in ("tuned", "default") if counts[name])
    size = report.path.stat().st_size
    chains = f" and {len(programs)} whole chains" if programs else ""
    print(f"{report.path}: {len(report.kernels)} kernels for {profile.name} ({summary}){chains}, {size / 1e3:.0f} kB")
    if runtime is not None:
        from ..farm.wheel import build_runtime_wheel

        try:
            wheel = build_runtime_wheel(runtime)
        except OSError as error:
            raise OutputError(f"cannot write a wheel into {str(runtime)!r}: {error.strerror}") from None
        print(f"{wheel}: for the board: pip3 install {wheel.name}; python3 -m gf_cuda check {report.path.name}")
    elif profile.gpu and profile.measured == "rpc":
        print("a board without gf_tvm needs gf_cuda and PyTorch to use it: --runtime DIR writes gf_cuda's wheel")
    if args.json is not None:
        write_json(args.json, _document(report, profile, size))
    return 0


def _runtime_folder(path: Path, profile: DeviceProfile) -> Path:
    """Where --runtime wants its wheel. Raises OutputError."""
    from ..farm.wheel import runtime_name

    if profile.gpu is None:
        raise OutputError(f"--runtime: a bundle for {profile.name} is loaded by gf_tvm; gf_cuda is for GPUs")
    folder = path
    if path.suffix == ".whl":
        if path.name != runtime_name():
            raise OutputError(f"--runtime: pip takes this wheel under the name {runtime_name()} only, not {path.name}")
        folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"--runtime: there is no folder {str(folder)!r}")
    return folder


def build_with_progress(
    workloads: list[Workload], profile: DeviceProfile, logs: list[Path], out: Path, programs: Sequence[Program] = ()
) -> BuildReport:
    """:func:`gf_tvm.build`, with a progress bar."""
    from ..building import BuiltKernel, build

    with Progress(len(workloads) + len(programs), "building", unit="kernel") as progress:

        def update(done: int, of: int, built: BuiltKernel | Program) -> None:
            name = built.key if not isinstance(built, BuiltKernel) else f"{built.schedule} {built.workload.kernel}"
            progress.update(done, name)

        return build(workloads, profile, logs, out, update, programs=programs)


def print_reasons(report: BuildReport) -> None:
    """Say once each why kernels have default schedules, and what is to be said about tuned ones."""
    for reason, count in Counter(kernel.reason for kernel in report.kernels if kernel.reason).items():
        print(f"{count} with default schedules: {reason}")
    for note, count in Counter(kernel.note for kernel in report.kernels if kernel.note).items():
        print(f"{count} {'kernel' if count == 1 else 'kernels'} {note}")


def _document(report: BuildReport, profile: DeviceProfile, size: int) -> dict[str, Any]:
    return {
        "bundle": report.path,
        "device": profile.name,
        "bytes": size,
        "programs": list(report.programs),
        "kernels": [
            {
                "key": kernel.workload.key,
                "workload": kernel.workload.to_dict(),
                "schedule": kernel.schedule,
                "config": kernel.config,
                "log": kernel.log,
                "reason": kernel.reason or None,
                "note": kernel.note or None,
            }
            for kernel in report.kernels
        ],
    }

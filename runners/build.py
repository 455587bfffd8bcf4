"""gf-tvm build: compile the logs' winners into a bundle."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._building import add_logs_argument, build_with_progress, check_logs, print_reasons
from ._cases import add_case_arguments, add_chain_argument, programs_from, workloads_from
from ._output import OutputError, check_writable, format_table, write_json

if TYPE_CHECKING:
    from ..building import BuildReport
    from ..machine.profiles import DeviceProfile


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "build",
        help="compile tuned kernels into a bundle",
        description="Compile the kernels of some convolutions into a bundle, with the best schedules of the tuning "
        "logs, or the default schedules where the logs have none. A bundle with chains also serves training without "
        "them.",
    )
    add_case_arguments(parser)
    add_chain_argument(
        parser,
        "with --model: build only the kernels that convolutions call one by one, for gf-tvm train --no-chain (default: "
        "also the kernels of chains and, for CPUs and without --cases, the model's chains as whole functions)",
    )
    parser.add_argument(
        "--train-bn-affine",
        action="store_true",
        help="with --model: build the chains that gf-tvm train --train-bn-affine needs",
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
    parser.add_argument("--sign", type=Path, metavar="KEY.pem", help="sign the bundle with this Ed25519 private key")
    parser.add_argument(
        "--make-key",
        action=_MakeKey,
        type=Path,
        metavar="KEY.pem",
        help="only make a key to sign with, and KEY.pub.pem for those who load what it has signed",
    )
    parser.set_defaults(run=run)


class _MakeKey(argparse.Action):
    """Makes a key and ends the command, as --help does, whatever else is required."""

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any) -> None:
        from ..bundle.signing import make_key

        private, public = make_key(arguments[1])
        print(f"{private}: keep it to yourself, for --sign")
        print(f"{public}: for gf_tvm.load(..., trusted=[...])")
        parser.exit()


def run(args: argparse.Namespace) -> int:
    from ..machine.profiles import get_profile

    for path in (args.out, args.json):
        if path is not None:
            check_writable(path)
    if args.out.exists() and not args.out.is_file():  # a bundle is renamed into place, which would replace a device
        raise OutputError(f"cannot write '{args.out}': not a regular file")
    check_logs(args.logs)
    profile = get_profile(args.device)
    runtime = None if args.runtime is None else _runtime_folder(args.runtime, profile)
    workloads = workloads_from(args)
    programs = [] if profile.gpu else programs_from(args)
    report = build_with_progress(workloads, profile, args.logs, args.out, programs, args.sign)
    size = report.path.stat().st_size
    if args.json is not None:
        write_json(args.json, _document(report, profile, size))
    rows = [(k.schedule, k.workload.kernel, k.workload.geometry.key, k.workload.dtype) for k in report.kernels]
    print(format_table(("schedule", "kernel", "convolution", "dtype"), rows))
    print_reasons(report)
    counts = Counter(kernel.schedule for kernel in report.kernels)
    summary = ", ".join(f"{counts[name]} {name}" for name in ("tuned", "default") if counts[name])
    whole = f" and {len(programs)} programs" if programs else ""
    print(f"{report.path}: {len(report.kernels)} kernels for {profile.name} ({summary}){whole}, {size / 1e3:.0f} kB")
    if runtime is not None:
        from ..farm.wheel import build_runtime_wheel

        try:
            wheel = build_runtime_wheel(runtime)
        except OSError as error:
            raise OutputError(f"cannot write a wheel into {str(runtime)!r}: {error.strerror}") from None
        print(f"{wheel}: for the board: pip3 install {wheel.name}; python3 -m gf_cuda check {report.path.name}")
    elif profile.gpu and profile.measured == "rpc":
        print("a board without gf_tvm needs gf_cuda and PyTorch to use it: --runtime DIR writes gf_cuda's wheel")
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

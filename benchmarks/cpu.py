"""The CPU kernels of this machine, measured in one run: each case against the exact backward pass (oneDNN), plain
operators, the authors' formulation, the default schedule, stock MetaSchedule and the machine's limits; what memory the
kernels take; and whether a training step gains what the kernels promise. Writes JSON, prints tables, draws a roofline.

    python benchmarks/cpu.py --shapes paper --json cpu.json --plot roofline.svg
    python benchmarks/cpu.py --model resnet18 --input 8x3x224x224 --last 8 --json resnet18.json
    python benchmarks/cpu.py --step resnet18 --input 32x3x32x32 --patch 2,4 --json step.json

The machine has to be idle. Everything that is compared is timed in the same rounds, the limits too.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from _allocator import keep_freed_memory
from _authors import published
from _bench import UsageError
from _cpu_libraries import stock, tuned, untuned
from _cpu_memory import extra_bytes
from _cpu_report import COLUMNS, plain_row, print_rows, print_step, summarize, with_memory
from _cpu_step import Layer, layers_of, measure_step, network

from gf_tvm.bundle.library import Library, load
from gf_tvm.comparison.cpu import CpuBackend, Maker, of_library
from gf_tvm.comparison.rows import CpuRow
from gf_tvm.comparison.run import check_request, compare
from gf_tvm.core.geometry import Pair
from gf_tvm.core.workload import Workload
from gf_tvm.errors import DeviceError
from gf_tvm.machine import cpu
from gf_tvm.machine.profiles import DeviceProfile
from gf_tvm.report.roofline import roofline_plot
from gf_tvm.runners._building import add_logs_argument, check_logs
from gf_tvm.runners._cases import add_case_arguments, cases_from
from gf_tvm.runners._output import ProgressBar, check_results, write_json
from gf_tvm.runners.cli import Parser, run_command, run_parsed
from gf_tvm.shapes import Case, parse_input, parse_patches, workloads_of

#: Convolutions that --step filters unless --last says otherwise.
STEP_LAST = 4


@dataclass(frozen=True)
class Step:
    """The training step to measure."""

    model: str
    shape: tuple[int, int, int, int]
    last: int
    patches: tuple[Pair, ...]
    layers: tuple[Layer, ...]  # with each patch


@dataclass(frozen=True)
class Request:
    """What one run measures, checked."""

    profile: DeviceProfile
    cases: tuple[Case, ...]
    step: Step | None
    folder: Path
    args: argparse.Namespace

    @property
    def case_workloads(self) -> list[Workload]:
        """Without what training calls besides in a model's first trained layer: that is not compared."""
        return [workload for workload in workloads_of(self.cases) if workload.kernel in ("filter_input", "backward")]

    @property
    def bundle(self) -> Path:
        """The file that is measured. Equal bundles are one library, whose path may be another's."""
        return self.folder / "tuned.gfb" if self.args.library is None else Path(self.args.library)

    @property
    def workloads(self) -> list[Workload]:
        layers = self.step.layers if self.step is not None else ()
        return list(dict.fromkeys([*self.case_workloads, *(w for layer in layers for w in layer.workloads)]))


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="cpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_arguments(parser, required=False)
    parser.add_argument(
        "--step", metavar="M", help=f"also: a training step of this model (--input; --last, default: {STEP_LAST})"
    )
    parser.add_argument(
        "--library", type=Path, metavar="FILE.gfb", help="the bundle (default: one built from the logs)"
    )
    add_logs_argument(parser)
    parser.add_argument(
        "--stock-trials", type=int, default=0, metavar="N", help="trials of stock MetaSchedule a kernel (default: none)"
    )
    parser.add_argument(
        "--stock-logs", type=Path, metavar="DIR", help="keep its trials there, and continue those that are there"
    )
    parser.add_argument(
        "--default",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time default schedules too",
    )
    parser.add_argument(
        "--keep-freed",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let the process keep freed memory, see docs/performance.md",
    )
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure extra memory")
    parser.add_argument("--threads", type=int, metavar="T", help="CPU threads (default: as many as PyTorch takes)")
    parser.add_argument(
        "--seconds", type=float, default=10.0, metavar="S", help="timing of each convolution or step (default: 10)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the roofline (png, svg or pdf)")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="gf_tvm-cpu-") as folder:
        request = check(args, Path(folder))
        if args.keep_freed and not keep_freed_memory():
            raise UsageError("this process's allocator cannot be told to keep memory; say --no-keep-freed")
        if args.library is None:
            library = tuned(request.workloads, request.profile, args.logs, request.bundle)
        else:
            library = load(args.library)
        document = measure_cases(request, library) if request.cases else head(request, library)
        if request.step is not None:
            document["steps"] = measure_steps(request, request.step, library)
    if request.cases:
        print_rows(document)
    for step in document.get("steps", ()):
        print_step(step)
    document["conditions"]["keeps_freed_memory"] = args.keep_freed
    if args.json is not None:
        write_json(args.json, document)
    if args.plot is not None:
        roofline_plot(document, args.plot)
    return 0


def check(args: argparse.Namespace, folder: Path) -> Request:
    """Find every mistake before anything is built. Raises GfTvmError."""
    check_results(args.json, args.plot)
    check_logs(args.logs)
    if args.stock_trials < 0:
        raise UsageError(f"--stock-trials must be at least 0, got {args.stock_trials}")
    if not 0 <= args.seconds < math.inf:
        raise UsageError(f"--seconds must be a number of at least 0, got {args.seconds}")
    if args.threads is not None and args.threads < 1:
        raise UsageError(f"--threads must be at least 1, got {args.threads}")
    has_cases = args.shapes is not None or args.model is not None
    if not has_cases and args.step is None:
        raise UsageError("say what to measure: --shapes paper|FILE, --model M or --step M")
    if args.plot is not None and not has_cases:
        raise UsageError("--plot draws cases: it needs --shapes or --model")
    step = None if args.step is None else _step(args)
    cases = tuple(_cases(args)) if has_cases else ()
    asked = (*cases, *(layer.case for layer in (step.layers if step is not None else ())))
    profile = check_request(asked, args.device, args.threads, seconds=args.seconds)
    if profile.gpu is not None:
        raise DeviceError(f"{profile.name!r} is a GPU, and this measures CPUs; see benchmarks/gpu_check.py")
    return Request(profile, cases, step, folder, args)


def _cases(args: argparse.Namespace) -> list[Case]:
    own = copy.copy(args)
    if args.model is None and args.step is not None:
        own.input = own.last = None  # they are the step's
    return cases_from(own)


def _step(args: argparse.Namespace) -> Step:
    if args.input is None:
        raise UsageError("--step needs --input NxCxHxW")
    if args.cases is not None and args.shapes is None and args.model is None:
        raise UsageError("--cases chooses among the convolutions of --shapes or --model")
    shape, last = parse_input(args.input), STEP_LAST if args.last is None else args.last
    patches = tuple(parse_patches(args.patch or "2,4"))
    model, names = network(args.step, shape, last)
    layers = [layer for patch in patches for layer in layers_of(model, names, shape, patch)]
    return Step(args.step, shape, last, patches, tuple(layers))


def measure_cases(request: Request, library: Library) -> dict[str, Any]:
    """All columns of all cases; see :data:`_cpu_report.COLUMNS` for those that ``gf-tvm compare`` has not."""
    args, workloads, folder = request.args, request.case_workloads, request.folder
    makers: dict[str, Maker] = {"authors": published}
    if args.default:
        makers["default"] = of_library(untuned(workloads, request.profile, folder / "default.gfb"))
    if args.stock_trials:
        logs = args.stock_logs or folder / "stock_logs"
        found = stock(workloads, request.profile, args.stock_trials, args.threads, logs, folder / "stock.gfb")
        if found is not None:
            makers["stock"] = of_library(found)
    parts = 1000
    with ProgressBar(parts, "comparing", unit="part") as progress:
        result = compare(
            request.cases,
            library,
            request.profile.name,
            args.threads,
            seconds=args.seconds,
            progress=lambda done, of, what: progress.update(int(parts * done / of), what),
            backend=CpuBackend(makers),
        )
    rows = []
    with ProgressBar(len(result.rows) if args.memory else 0, "measuring memory", unit="case") as progress:
        for case, row in zip(request.cases, result.rows, strict=True):
            assert isinstance(row, CpuRow)
            plain = plain_row(row)
            plain["grad_y_bytes"] = math.prod(case.geometry.y_shape) * getattr(torch, case.dtype).itemsize
            if args.memory:
                workload = Workload("backward", case.geometry, case.dtype)
                plain = with_memory(plain, extra_bytes(request.bundle, workload, result.threads))
                progress.advance(note=case.name)
            rows.append(plain)
    return {
        **result.to_dict(),
        "columns": COLUMNS,
        "stock_trials": args.stock_trials,
        "rows": rows,
        "summary": summarize(rows),
    }


def head(request: Request, library: Library) -> dict[str, Any]:
    """Where a step alone was measured."""
    return {
        "schema_version": 1,
        "machine": cpu.describe(),
        "threads": request.args.threads or torch.get_num_threads(),
        "versions": cpu.versions(),
        "conditions": {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "library": {"file": request.bundle.name, "sha256": library.digest},
        },
    }


def measure_steps(request: Request, step: Step, library: Library) -> list[dict[str, Any]]:
    """The training step with each patch."""
    parts, found = 1000, []
    with (
        cpu.torch_threads(request.args.threads),
        ProgressBar(parts * len(step.patches), "timing training steps", unit="part") as progress,
    ):
        for index, patch in enumerate(step.patches):

            def update(part: float, before: int = parts * index) -> None:
                progress.update(before + int(parts * part))

            others = cpu.OtherLoad()
            figures = measure_step(step.model, step.shape, step.last, patch, library, request.args.seconds, update)
            found.append({**figures, "other_cores": others.cores()})
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 for a user's mistake, 130 after Ctrl-C; then nothing was written."""
    return run_command("cpu.py", lambda: run_parsed(build_parser(), argv))


if __name__ == "__main__":
    sys.exit(main())

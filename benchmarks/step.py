"""Whole training steps on this machine's CPU: exact, compiled by torch.compile, filtered, chained; beside them forward
passes by ONNX Runtime and OpenVINO. Writes JSON, prints a table.

    python benchmarks/step.py --json benchmarks/results/step.json --markdown step.md
    ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2 \\
        python benchmarks/step.py --device x86-64-v3 --json benchmarks/results/step_avx2.json

The machine has to be idle. All variants of one model run in the same rounds and under the same allocator; a plain
process's figures are those of ``--allocator system``. ``peak_bytes`` come from a process of their own for each
variant. Restricted to AVX2 by the variables above are oneDNN (OpenVINO's too), MKL, PyTorch and inductor; ONNX Runtime
chooses its code by itself, so it is left out then. See ``gf_tvm.comparison.steps``.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from _bench import UsageError, conditions
from _cpu_step import CLASSES
from _forward_baselines import forwards, missing
from tabulate import tabulate

from gf_tvm.building import build
from gf_tvm.bundle.library import load
from gf_tvm.comparison.chains import ChainCase, chain_cases, programs, workloads
from gf_tvm.comparison.run import check_request
from gf_tvm.comparison.step_memory import peaks
from gf_tvm.comparison.steps import CONDITIONS, StepRow, TrainingStep, front_programs, measure_steps
from gf_tvm.machine import cpu
from gf_tvm.models import build_model
from gf_tvm.runners._allocator import add_allocator_argument
from gf_tvm.runners._building import add_logs_argument, check_logs
from gf_tvm.runners._output import ProgressBar, check_results, check_writable, write_json
from gf_tvm.runners._steps import HEADERS, print_steps, step_cells
from gf_tvm.runners.cli import Parser, run_command, run_parsed
from gf_tvm.shapes import parse_patches

#: What keeps libraries to older instructions.
RESTRICTIONS = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="step.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models",
        default="mobilenetv2,resnet18,efficientnet_lite0,mcunet",
        metavar="M,...",
        help="built-in names, or package.module:factory (default: %(default)s)",
    )
    parser.add_argument("--batches", default="8,32", metavar="N,...", help="images in a step (default: 8,32)")
    parser.add_argument("--size", type=int, default=224, metavar="P", help="pixels of an image's side (default: 224)")
    parser.add_argument(
        "--last", default="4,8,all", metavar="K,...", help="how many convolutions are trained (default: 4,8,all)"
    )
    parser.add_argument("--patch", default="2,4", metavar="R,...", help="patches (default: 2,4)")
    parser.add_argument("--device", default="host", metavar="D", help="device profile of this machine (default: host)")
    add_logs_argument(parser)
    parser.add_argument("--threads", type=int, metavar="T", help="CPU threads (default: as many as PyTorch takes)")
    parser.add_argument(
        "--seconds", type=float, default=30.0, metavar="S", help="timing of each model, batch and K (default: 30)"
    )
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peaks of memory")
    parser.add_argument(
        "--baselines",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time the forward pass of ONNX Runtime and OpenVINO where they are installed",
    )
    add_allocator_argument(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as Markdown")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    jobs = check(args)
    restricted = {name: os.environ[name] for name in RESTRICTIONS if name in os.environ}
    document: dict[str, Any] = {
        "schema_version": 1,
        "machine": cpu.describe(),
        "versions": cpu.versions(),
        "conditions": {
            **conditions(),
            "steps": CONDITIONS,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "restrictions": restricted,
            "seconds_per_model": args.seconds,
            "forward_only": "a process of its own for each; OpenVINO under the system's allocator, which it needs",
            "forward_only_missing": missing() if args.baselines else {},
        },
        "rows": [],
    }
    rows: list[StepRow] = []
    others = cpu.OtherLoad()
    with cpu.torch_threads(args.threads) as threads, ProgressBar(1000 * len(jobs), "measuring", unit="part") as bar:
        document["threads"] = threads
        limits = limits_now()
        document |= {"peak_gflops": limits[0], "bandwidth_gbs": limits[1]}
        for number, (name, cases) in enumerate(jobs):

            def progress(part: float, what: str, number: int = number) -> None:
                bar.update(int(1000 * (number + part)), what)

            # ONNX Runtime cannot be kept to older instructions.
            without = ["ONNX Runtime"] if restricted else []
            rows += measure(args, name, cases, limits, threads, without, progress)
    document["rows"] = [row.to_dict() for row in rows]
    document["conditions"]["other_cores"] = others.cores()
    print_steps(rows)
    if args.json is not None:
        write_json(args.json, document)
    if args.markdown is not None:
        table = tabulate(step_cells(rows), HEADERS, tablefmt="github", missingval="", disable_numparse=True)
        args.markdown.write_text(table + "\n", encoding="utf-8")
    return 0


def limits_now() -> tuple[float, float]:
    """GFLOP/s of products, GB/s of a copy."""
    return cpu.sgemm_peak(), cpu.copy_bandwidth()


def measure(
    args: argparse.Namespace,
    name: str,
    cases: Sequence[ChainCase],
    limits: tuple[float, float],
    threads: int,
    without: Sequence[str],
    progress: Any,
) -> list[StepRow]:
    """The rows of one model, batch and number of convolutions; the kernels are built for it."""
    with tempfile.TemporaryDirectory(prefix="gf_tvm-step-") as folder:
        bundle = Path(folder) / "step.gfb"
        progress(0.0, f"building for {name}")
        profile = check_request((), args.device, chains=cases)
        wanted = [*programs(cases), *front_programs(cases, profile)]
        build(workloads(cases), profile, args.logs, bundle, programs=wanted)
        x = TrainingStep(cases[0].model, cases[0].input_shape).x
        with forwards(cases[0].model, x, threads, without) if args.baselines else nullcontext({}) as others:
            return measure_steps(
                name,
                cases,
                load(bundle),
                args.device,
                (100, args.seconds),
                limits,
                progress,
                (lambda variant, patch, case: peaks(variant, patch, case, bundle)) if args.memory else None,
                others,
            )


def check(args: argparse.Namespace) -> list[tuple[str, list[ChainCase]]]:
    """Find every mistake before anything is built; the cases of each model, batch and K. Raises GfTvmError."""
    check_results(args.json, None)
    if args.markdown is not None:
        check_writable(args.markdown)
    check_logs(args.logs)
    if not 0 <= args.seconds < math.inf:
        raise UsageError(f"--seconds must be a number of at least 0, got {args.seconds}")
    if args.size < 1:
        raise UsageError(f"--size must be at least 1, got {args.size}")
    patches = parse_patches(args.patch)
    batches = [_integer(text, "--batches", "an integer of at least 1") for text in args.batches.split(",")]
    counts = [
        None if text == "all" else _integer(text, "--last", "an integer of at least 1, or all")
        for text in args.last.split(",")
    ]
    jobs = []
    for name in args.models.split(","):
        for batch in batches:
            shape = (batch, 3, args.size, args.size)
            for last in counts:
                with torch.random.fork_rng(devices=()):
                    torch.manual_seed(0)
                    model = build_model(name, CLASSES, image_size=args.size)
                cases = chain_cases(model, shape, last=last, patches=patches)
                check_request((), args.device, args.threads, seconds=args.seconds, chains=cases)
                jobs.append((name, cases))
    return jobs


def _integer(text: str, flag: str, what: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"{flag} takes {what}, got {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 for a user's mistake, 130 after Ctrl-C; then nothing was written."""
    return run_command("step.py", lambda: run_parsed(build_parser(), argv))


if __name__ == "__main__":
    sys.exit(main())

"""gf-tvm compare: measure the filtered backward pass against the exact one."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..machine.allocator import label_of
from ._allocator import add_allocator_argument
from ._building import add_logs_argument, build_with_progress, check_logs, print_reasons
from ._cases import add_case_arguments, add_chain_argument, cases_from, chains_from
from ._compare_gpu import print_gpu
from ._output import ProgressBar, check_results, format_table, write_json
from ._rows import digits, label
from ._steps import print_steps

if TYPE_CHECKING:
    from ..building import BuildReport
    from ..bundle.program import Program
    from ..comparison.chains import ChainCase
    from ..comparison.run import Comparison
    from ..machine.profiles import DeviceProfile
    from ..shapes import Case


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="measure against the exact backward pass",
        description="Measure the filtered backward pass of convolutions on this machine against the framework's exact "
        "one and against gradient filtering with plain PyTorch operators. Results are checked before they are timed.",
    )
    add_case_arguments(parser)
    add_chain_argument(
        parser,
        "only single convolutions (default: with --model, without --cases and on CPUs also the model's chains: "
        "exactly, filtered layer by layer, and chained)",
    )
    parser.add_argument(
        "--library", type=Path, metavar="FILE.gfb", help="the bundle to measure (default: build one from the logs)"
    )
    add_logs_argument(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: as many as PyTorch takes)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=5.0,
        metavar="S",
        help="time to spend on each convolution and chain (default: 5); at least 5 calls",
    )
    parser.add_argument(
        "--energy",
        action=argparse.BooleanOptionalAction,
        help="GPUs: measure joules per step (default: where there is a meter)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and conditions as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the rows (png, svg or pdf)")
    parser.add_argument(
        "--steps",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with --model, where its chains are measured in float32: first whole training steps, exact, compiled by "
        "torch.compile, filtered, chained, with the memory that a process takes",
    )
    add_allocator_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..comparison.run import check_request

    check_results(args.json, args.plot)
    check_logs(args.logs)
    cases = cases_from(args)
    chains = chains_from(args)
    profile = check_request(cases, args.device, args.threads, seconds=args.seconds, energy=args.energy, chains=chains)
    with tempfile.TemporaryDirectory(prefix="gf_tvm-") as folder:
        file, built = _library(args, cases, chains, profile, Path(folder))
        result = _compare(args, cases, chains, profile, file)
    if args.json is not None:
        write_json(args.json, result.to_dict())
    if args.plot is not None:
        from ..comparison.plot import plot

        plot(result, args.plot)
    if built is not None:
        print_reasons(built)
    if result.steps:
        print_steps(result.steps)
        print()
    print_comparison(result)
    if chains:
        print_chains(result)
    return 0


def _compare(
    args: argparse.Namespace, cases: Sequence[Case], chains: Sequence[ChainCase], profile: DeviceProfile, file: Path
) -> Comparison:
    """Convolutions and chains, then whole steps."""
    from ..bundle.library import load
    from ..comparison.run import compare

    library, parts = load(file), 1000
    with ProgressBar(parts, "comparing", unit="part") as progress:

        def update(done: float, of: float, what: str) -> None:
            progress.update(int(parts * done / of), what)

        options: dict[str, Any] = {"seconds": args.seconds, "progress": update, "energy": args.energy}
        result = compare(cases, library, profile.name, args.threads, chains=chains, **options)
    stepped = [case for case in chains if case.dtype == "float32"] if args.steps else []
    if not stepped:
        return result

    from ..comparison.step_memory import peaks
    from ..comparison.steps import CONDITIONS, measure_steps
    from ..machine.cpu import torch_threads

    with ProgressBar(parts, "comparing steps", unit="part") as progress, torch_threads(args.threads):
        rows = measure_steps(
            args.model,
            stepped,
            library,
            profile.name,
            (100, args.seconds),
            (result.peak_gflops, result.bandwidth_gbs),
            lambda part, what: progress.update(int(parts * part), what),
            lambda variant, patch, case: peaks(variant, patch, case, file),
        )
    return replace(result, steps=tuple(rows), conditions={**result.conditions, "steps": CONDITIONS})


def _library(
    args: argparse.Namespace,
    cases: Sequence[Case],
    chains: Sequence[ChainCase],
    profile: DeviceProfile,
    folder: Path,
) -> tuple[Path, BuildReport | None]:
    """The bundle that was named, or one that is built from the logs in ``folder``, and its report."""
    from ..shapes import workloads_of

    if args.library is not None:
        return args.library, None
    # Without the workloads that training calls in a model's first trained layer: they are not compared.
    workloads = [workload for workload in workloads_of(cases) if workload.kernel in ("filter_input", "backward")]
    programs: list[Program] = []
    if chains:
        from ..comparison import chains as chain_comparison

        workloads = list(dict.fromkeys([*workloads, *chain_comparison.workloads(chains)]))
        programs += chain_comparison.programs(chains)
        if args.steps:
            from ..comparison.steps import front_programs

            programs += front_programs([case for case in chains if case.dtype == "float32"], profile)
    report = build_with_progress(workloads, profile, args.logs, folder / "compare.gfb", programs)
    return Path(report.path), report


def print_comparison(result: Comparison) -> None:
    """Tables, geometric means, and what has to be said about them."""
    from ..shapes import format_patch

    gpu = "gpu" in result.machine
    ran = result.device_name if gpu else f"{result.device_name}, threads: {result.threads}"
    ran += f", allocator: {label_of(result.machine)}"
    print(f"{ran}, copying: {result.bandwidth_gbs:.1f} GB/s, sgemm: {result.peak_gflops:.0f} GFLOP/s")
    baseline = "the fastest of those below" if gpu else result.rows[0].baseline
    copying = "copying and sgemm in the same rounds (medians; above are the best)"
    print(
        f"Backward pass, medians in ms: exact ({baseline}), filtered with plain PyTorch operators, filtered by "
        f"gf_tvm; limit: roofline limit of {'this bandwidth and this sgemm' if gpu else copying}; saved: memory "
        "saved for backward."
    )
    headers = (
        *("case", "patch", "exact", "plain", "gf_tvm", "limit", "speedup\nover exact", "speedup\nover plain"),
        *("share of\nlimit", "x saved\nMB", "x~ saved\nMB", "schedule", "error"),
    )
    rows = [
        (
            label(row),
            format_patch(row.patch),
            *(digits(ms) for ms in (row.baseline_ms, row.reference_ms, row.gf_tvm_ms, row.limit_ms)),
            f"{row.speedup:.1f}",
            f"{row.speedup_reference:.2f}",
            f"{row.fraction_of_limit:.0%}",
            digits(row.saved_bytes_baseline / 1e6),
            digits(row.saved_bytes_gf_tvm / 1e6),
            row.schedule,
            f"{row.max_rel_error:.0e}",
        )
        for row in result.rows
    ]
    print(format_table(headers, rows))
    for mean in result.to_dict()["geometric_means"]:
        print(
            f"geometric mean of {mean['rows']} {_kind(mean)} rows: speedup {mean['speedup']:.1f}x over "
            f"exact, {mean['speedup_reference']:.2f}x over plain operators, "
            f"{mean['fraction_of_limit']:.0%} of the limit"
        )
    missing = sum(row.schedule == "torch" for row in result.rows)
    if missing:
        print(f"{missing} of {len(result.rows)} rows ran plain PyTorch operators: the bundle lacks their kernels")
    if gpu:
        print_gpu(result)
    other_cores = result.conditions["other_cores"]
    if other_cores is not None and other_cores > 0.1:
        print(f"Doubtful: other programs kept {other_cores:.1f} cores busy meanwhile; measure on an idle machine")


def print_chains(result: Comparison) -> None:
    """A table of the chains, and what is in none."""
    from ..shapes import format_patch

    print(
        "\nChains: medians in ms of the same operations exactly, filtered layer by layer, and chained; limit: roofline "
        "limit of the chain's backward pass. MB: all memory saved for backward."
    )
    headers = (
        *("chain", "convs", "patch", "exact\nbackward", "filtered\nbackward", "chained\nbackward", "limit"),
        *("speedup\nover exact", "speedup\nover filtered", "share of\nlimit"),
        *("exact\nforward", "filtered\nforward", "chained\nforward"),
        *("exact\nsaved MB", "filtered\nsaved MB", "chained\nsaved MB", "schedule", "error"),
    )
    rows = [
        (
            *(label(row), len(row.convolutions), format_patch(row.patch)),
            *(digits(ms) for ms in (*row.backward_ms.values(), row.roofline_ms)),
            *(f"{row.speedup:.1f}", f"{row.speedup_filtered:.2f}", f"{row.limit_fraction:.0%}"),
            *(digits(ms) for ms in row.forward_ms.values()),
            *(digits(size / 1e6) for size in row.kept_bytes.values()),
            *(row.schedule, f"{row.max_rel_error:.0e}"),
        )
        for row in result.chains
    ]
    if rows:
        print(format_table(headers, rows))
    else:
        print("there is no chain")
    for patch, alone in result.conditions["unchained"].items():
        by_reason: dict[str, list[str]] = {}
        for name, reason in alone.items():
            by_reason.setdefault(reason, []).append(name or "the model")
        for reason, names in by_reason.items():
            print(f"{patch}: in no chain: {', '.join(names)}: {reason}")
    for row in result.chains:
        lacking = [variant for variant, counted in row.kernels.items() if counted.get("torch")]
        if lacking:
            kernels = " and ".join(f"{row.kernels[v]['torch']} of {sum(row.kernels[v].values())} {v}" for v in lacking)
            print(f"{label(row)} {format_patch(row.patch)}: plain PyTorch operators ran in place of {kernels}")


def _kind(mean: dict[str, Any]) -> str:
    from ..shapes import format_patch

    return " ".join([format_patch(mean["patch"]), *([mean["dtype"]] if "dtype" in mean else [])])

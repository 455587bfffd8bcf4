"""What chains gain: the same training step with the exact, the filtered and the chained backward pass, in one run.

    python benchmarks/chains.py --json benchmarks/results/chains.json

Networks: two residual blocks of 64 to 512 channels as ResNet-18 has them at 224 x 224, with average pooling and a
classifier behind them, and the last convolutions of whole models (``--models resnet18:4``). Their convolutions and the
classifier are trained, batch norms are frozen. Filtered and chained run the same compiled kernels, default schedules
where no log has any. All steps are interleaved, and timed only after their gradients agreed. ``expected`` is what bytes
and operations alone promise for a chain's backward pass over that of single layers, 1 + 180 / C at patch 2 and
1 + 730 / C at patch 4 (35 GB/s, 200 GFLOP/s).
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _allocator import keep_freed_memory
from _bench import conditions
from _cpu_step import CLASSES, TrainingStep, agree, network
from torch import Tensor, nn

import gf_tvm
from gf_cuda.timing import interleaved, quantile
from gf_tvm.chains import chains_of
from gf_tvm.errors import GfTvmError
from gf_tvm.geometry import Pair
from gf_tvm.models.layers import BasicBlock
from gf_tvm.nn import select_layers
from gf_tvm.runners._output import Progress, check_results, format_table, write_json
from gf_tvm.runners.cli import Parser, run_command, run_parsed
from gf_tvm.shapes import format_patch, model_cases, parse_patches, workloads_of
from gf_tvm.training.measure import StepTimes, count_kept_bytes


class UsageError(GfTvmError):
    """Options that do not go together."""


VARIANTS = ("exact", "filtered", "chained")
#: Height and width of ResNet-18's stages at 224 x 224.
STAGES = {64: 56, 128: 28, 256: 14, 512: 7}
#: Expected gain of a convolution of C channels over its filtered backward pass: 1 + this / C.
EXPECTED = {(2, 2): 180, (4, 4): 730}


class Stage(nn.Module):
    """Two residual blocks and a classifier: (n, channels, h, w) -> (n, classes)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(BasicBlock(channels, channels, 1), BasicBlock(channels, channels, 1))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.pool(self.blocks(x)))
        return y


def stage(channels: int) -> tuple[nn.Module, list[str]]:
    """A stage with frozen batch norms, and the names of its convolutions."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = Stage(channels)
    names = [name for name, _ in select_layers(model, last=4)]
    model.requires_grad_(False).eval()
    for module in (*(model.get_submodule(name) for name in names), model.head):
        module.requires_grad_(True)
    return model, names


def measure(
    model: nn.Module,
    names: Sequence[str],
    shape: Sequence[int],
    patch: Pair,
    folder: Path,
    seconds: float,
) -> dict[str, Any]:
    """Time the three steps, interleaved; times in ms, medians and quartiles. Raises ComparisonError."""
    cases = model_cases(copy.deepcopy(model), shape, layers=list(names), patches=[patch])
    library = gf_tvm.load(gf_tvm.build(workloads_of(cases, chained=True), "host", [], folder / "chains.gfb").path)

    def filtered(chain: bool) -> nn.Module:
        return gf_tvm.filter_model(copy.deepcopy(model), patch, layers=list(names), library=library, chain=chain)

    models = {"exact": model, "filtered": filtered(chain=False), "chained": filtered(chain=True)}
    steps = {variant: TrainingStep(models[variant], shape) for variant in VARIANTS}
    kept = {}
    for variant, step in steps.items():
        with count_kept_bytes(models[variant], {}) as counted:
            step()
        kept[variant] = counted.total
    agree(steps["filtered"], steps["chained"])
    once = sum(_seconds(step) for step in steps.values())
    for step in steps.values():
        step.times = StepTimes()
    interleaved(
        dict.fromkeys(VARIANTS, max(7, min(200, int(seconds / once)))), lambda variant: _seconds(steps[variant])
    )
    return {
        "input": list(shape),
        "patch": list(patch),
        "convolutions": list(names),
        "chains": [list(chain.convolutions) for chain in chains_of(models["chained"]).chains],
        "kept_bytes": kept,
        **{variant: _figures(step) for variant, step in steps.items()},
    }


def _seconds(step: TrainingStep) -> float:
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def _figures(step: TrainingStep) -> dict[str, Any]:
    parts = {"forward": step.times.forward, "backward": step.times.backward}
    return {
        f"{part}_ms{suffix}": 1e3 * quantile(values, at)
        for part, values in parts.items()
        for suffix, at in (("", 0.5), ("_lower", 0.25), ("_upper", 0.75))
    }


def expected(model: nn.Module, names: Sequence[str], patch: Pair) -> float | None:
    """The mean over the convolutions of what bytes and operations promise; None for other patches."""
    gain = EXPECTED.get(patch)
    channels = [model.get_submodule(name).weight.shape[0] for name in names]
    return None if gain is None else sum(1 + gain / c for c in channels) / len(channels)


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Medians in ms, and ratios of medians."""
    headers = ("network", "input", "patch", *(f"{v} fwd" for v in VARIANTS), *(f"{v} bwd" for v in VARIANTS))
    headers += ("filtered / chained bwd", "expected", "step gain", "kept: exact MB", "filtered", "chained")
    table = []
    for row in rows:
        forward, backward = ([row[v][f"{part}_ms"] for v in VARIANTS] for part in ("forward", "backward"))
        step = [f + b for f, b in zip(forward, backward, strict=True)]
        kept = [row["kept_bytes"][v] / 1e6 for v in VARIANTS]
        table.append(
            (
                *(row["network"], "x".join(map(str, row["input"])), format_patch(row["patch"])),
                *(f"{value:.3g}" for value in (*forward, *backward)),
                f"{backward[1] / backward[2]:.2f}x",
                "" if row["expected"] is None else f"{row['expected']:.1f}x",
                f"{step[1] / step[2]:.2f}x",
                *(f"{value:.3g}" for value in kept),
            )
        )
    print(format_table(headers, table))


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="chains.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--channels", default="64,128,256,512", metavar="C,...", help="of the stages (default: 64,128,256,512)"
    )
    parser.add_argument(
        "--models", default="resnet18:4,mobilenetv2:8", metavar="M:K,...", help="models and how many convolutions"
    )
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="images (default: 8)")
    parser.add_argument("--patch", default="2,4", metavar="R,...", help="patches (default: 2,4)")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="timing of each row (default: 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.set_defaults(run=run)
    return parser


def networks(args: argparse.Namespace) -> list[tuple[str, nn.Module, list[str], tuple[int, ...]]]:
    """Name, model, its filtered convolutions and its input, for each network asked for. Raises GfTvmError."""
    found = []
    for text in filter(None, args.channels.split(",")):
        if not text.isdecimal() or int(text) not in STAGES:
            raise UsageError(f"--channels must be among {', '.join(map(str, STAGES))}, got {text!r}")
        channels = int(text)
        found.append((f"stage {channels}", *stage(channels), (args.batch, channels, *[STAGES[channels]] * 2)))
    for text in filter(None, args.models.split(",")):
        name, _, last = text.partition(":")
        if not last.isdecimal() or int(last) < 1:
            raise UsageError(f"--models takes MODEL:K with K of at least 1, got {text!r}")
        shape = (args.batch, 3, 224, 224)
        found.append((text, *network(name, shape, int(last)), shape))
    return found


def run(args: argparse.Namespace) -> int:
    check_results(args.json, None)
    if args.batch < 1:
        raise UsageError(f"--batch must be at least 1, got {args.batch}")
    patches = parse_patches(args.patch)
    document: dict[str, Any] = {"schema_version": 1, "conditions": conditions(), "rows": []}
    document["conditions"] |= {"threads": torch.get_num_threads(), "keeps_freed_memory": keep_freed_memory()}
    jobs = [(*found, patch) for found in networks(args) for patch in patches]
    warnings.simplefilter("error", gf_tvm.FallbackWarning)  # a missing kernel is no result
    with Progress(len(jobs), "measuring", unit="network") as progress, tempfile.TemporaryDirectory() as folder:
        for name, model, names, shape, patch in jobs:
            row = measure(model, names, shape, patch, Path(folder), args.seconds)
            document["rows"].append({"network": name, "expected": expected(model, names, patch), **row})
            progress.advance(note=name)
    print_rows(document["rows"])
    if args.json is not None:
        write_json(args.json, document)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("chains.py", lambda: run_parsed(build_parser(), argv))


if __name__ == "__main__":
    raise SystemExit(main())

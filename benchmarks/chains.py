"""What chains gain: the same part of a network with the exact, the filtered and the chained backward pass, in one run.

    python benchmarks/chains.py --json benchmarks/results/chains.json

Networks: two residual blocks of 64 to 512 channels as ResNet-18 has them at 224 x 224, with average pooling and a
classifier behind them, and the last convolutions of whole models (``--models resnet18:4``). Their convolutions and the
classifier are trained, batch norms are frozen. Each chain of a network is measured by ``gf_tvm.compare``, see
``gf_tvm.comparison.chains``; filtered and chained run the kernels of one library, default schedules where no log has
any. ``expected`` is what bytes and operations alone promise for a chain's backward pass over that of single layers,
1 + 180 / C at patch 2 and 1 + 730 / C at patch 4 (35 GB/s, 200 GFLOP/s); ``expected_of_chain`` is the same counted on
the operations of this chain, with the maps of full size at its ends. ``step_peak_bytes`` is how far the memory of a
process rises in a training step of the whole network.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _allocator import keep_freed_memory
from _bench import UsageError, conditions
from _chain_expectation import expected_gain
from _chain_memory import step_bytes
from _cpu_step import CLASSES, network
from torch import Tensor, nn

import gf_tvm
from gf_tvm.chains.piece import pieces_of
from gf_tvm.comparison.chain_variants import VARIANTS, plain_operators_wanted
from gf_tvm.comparison.chains import ChainCase, chain_cases, programs, workloads
from gf_tvm.comparison.run import Comparison
from gf_tvm.core.geometry import Pair
from gf_tvm.models.layers import BasicBlock
from gf_tvm.nn import select_layers
from gf_tvm.runners._building import add_logs_argument, check_logs
from gf_tvm.runners._output import ProgressBar, check_results, format_table, write_json
from gf_tvm.runners.cli import Parser, run_command, run_parsed
from gf_tvm.shapes import format_patch, parse_patches

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
    """A stage, and the names of its convolutions."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = Stage(channels)
    return model, [name for name, _ in select_layers(model, last=4)]


def measure(
    model: nn.Module,
    names: Sequence[str],
    shape: Sequence[int],
    patches: Sequence[Pair],
    logs: Sequence[Path],
    seconds: float,
    progress: Callable[[float], None],
    memory: Callable[[Pair, Path], dict[str, int | None]],
) -> tuple[Comparison, dict[Pair, dict[str, int | None]], dict[tuple[Pair, tuple[str, ...]], float]]:
    """A row for each chain and patch; by patch what ``memory`` says of the bundle; by patch and chain what is expected.

    Raises ComparisonError.
    """
    chains = chain_cases(model, shape, layers=list(names), patches=patches)
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "chains.gfb"
        library = gf_tvm.load(gf_tvm.build(workloads(chains), "host", logs, bundle, programs=programs(chains)).path)
        peaks = {patch: memory(patch, bundle) for patch in patches}

    def update(done: float, of: float, _: str) -> None:
        progress(done / of)

    gains = {key: gain for case in chains for key, gain in expected_of_chains(case).items()}
    return gf_tvm.compare([], library, seconds=seconds, chains=chains, progress=update), peaks, gains


def expected_of_chains(case: ChainCase) -> dict[tuple[Pair, tuple[str, ...]], float]:
    """What is expected of each chain of a case."""
    run = gf_tvm.filter_model(copy.deepcopy(case.model), case.patch, layers=list(case.layers))
    with plain_operators_wanted():
        run(torch.zeros(case.input_shape))
    return {(case.patch, piece.convolutions): expected_gain(piece) for piece in pieces_of(run)}


def expected(model: nn.Module, names: Sequence[str], patch: Pair) -> float | None:
    """The mean over the convolutions of what bytes and operations promise; None for other patches."""
    gain = EXPECTED.get(patch)
    channels = [model.get_submodule(name).weight.shape[0] for name in names]
    return None if gain is None else sum(1 + gain / c for c in channels) / len(channels)


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Medians in ms, and ratios of medians."""
    headers = ("network", "chain", "patch", *(f"{v} fwd" for v in VARIANTS), *(f"{v} bwd" for v in VARIANTS))
    headers += ("limit", "filtered / chained bwd", "expected", "of chain", "step gain")
    headers += ("saved: exact MB", "filtered", "chained")
    headers += ("step's peak: exact MB", "filtered", "chained")
    table = []
    for row in rows:
        forward, backward, kept = (
            [row[what][v] for v in VARIANTS] for what in ("forward_ms", "backward_ms", "kept_bytes")
        )
        step = [f + b for f, b in zip(forward, backward, strict=True)]
        table.append(
            (
                *(row["network"], len(row["convolutions"]), format_patch(row["patch"])),
                *(f"{value:.3g}" for value in (*forward, *backward, row["roofline_ms"])),
                f"{backward[1] / backward[2]:.2f}x",
                "" if row["expected"] is None else f"{row['expected']:.1f}x",
                f"{row['expected_of_chain']:.1f}x",
                f"{step[1] / step[2]:.2f}x",
                *(f"{size / 1e6:.3g}" for size in kept),
                *(
                    "" if size is None else f"{size / 1e6:.3g}"
                    for size in (row["step_peak_bytes"][v] for v in VARIANTS)
                ),
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
    parser.add_argument("--size", type=int, default=224, metavar="P", help="pixels of an image's side (default: 224)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="images (default: 8)")
    parser.add_argument("--patch", default="2,4", metavar="R,...", help="patches (default: 2,4)")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="timing of each row (default: 10)")
    add_logs_argument(parser)
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
        side = -(-STAGES[channels] * args.size // 224)
        found.append((f"stage {channels}", *stage(channels), (args.batch, channels, side, side)))
    for text in filter(None, args.models.split(",")):
        name, _, last = text.partition(":")
        if not last.isdecimal() or int(last) < 1:
            raise UsageError(f"--models takes MODEL:K with K of at least 1, got {text!r}")
        shape = (args.batch, 3, args.size, args.size)
        found.append((text, *network(name, shape, int(last)), shape))
    return found


def run(args: argparse.Namespace) -> int:
    check_results(args.json, None)
    check_logs(args.logs)
    for name in ("batch", "size"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(args, name)}")
    patches = parse_patches(args.patch)
    document: dict[str, Any] = {"schema_version": 2, "conditions": conditions(), "rows": []}
    document["conditions"] |= {"threads": torch.get_num_threads(), "keeps_freed_memory": keep_freed_memory()}
    jobs = networks(args)
    warnings.simplefilter("error", gf_tvm.FallbackWarning)  # a missing kernel is no result
    with ProgressBar(1000 * len(jobs), "measuring", unit="part") as progress:
        for number, (name, model, names, shape) in enumerate(jobs):

            def update(part: float, number: int = number, name: str = name) -> None:
                progress.update(int(1000 * (number + part)), name)

            def memory(patch: Pair, bundle: Path, number: int = number) -> dict[str, int | None]:
                wanted = {key: getattr(args, key) for key in ("channels", "models", "batch", "size")}
                return step_bytes({**wanted, "threads": torch.get_num_threads()}, number, patch, bundle)

            found, peaks, gains = measure(model, names, shape, patches, args.logs, args.seconds, update, memory)
            for row in found.chains:
                more = {
                    "expected": expected(model, row.convolutions, row.patch),
                    "expected_of_chain": gains[row.patch, row.convolutions],
                    "step_peak_bytes": peaks[row.patch],
                }
                document["rows"].append({"network": name, **more, **asdict(row)})
            limits = {"peak_gflops": found.peak_gflops, "bandwidth_gbs": found.bandwidth_gbs}
            document["conditions"].setdefault("of_networks", {})[name] = {**limits, **found.conditions}
    print_rows(document["rows"])
    if args.json is not None:
        write_json(args.json, document)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("chains.py", lambda: run_parsed(build_parser(), argv))


if __name__ == "__main__":
    raise SystemExit(main())

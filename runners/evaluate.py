"""gf-tvm evaluate: what gradient filtering gains for a model and its data, what it costs, and which setting to take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.config import EvaluateConfig, parse_size
from ..evaluation.results import EvaluationError
from ..training.config import SCHEDULES, TrainConfig
from ._cases import add_chain_argument, add_means_argument, parse_variants
from ._output import ProgressBar, check_writable, format_table, write_json

if TYPE_CHECKING:
    from ..evaluation.results import Evaluation
    from ..evaluation.results import Progress as Step

_DESCRIPTION = """\
Fine-tunes a network with the exact backward pass and with each patch, for each number of last convolutions and each
seed, and says what each setting scores, how long a step takes, what it keeps in memory and computes, and how near the
filtered gradients come to the exact ones. Ends with the setting that meets the limits best, and writes it into
DIR/train.json for gf-tvm train --config. What is finished is kept in DIR: the same command goes on where it was
stopped."""

#: Settings of a run that an evaluation chooses by itself, or that have an option of their own here.
_OWN = ("model", "data", "patch", "last", "seed", "schedule", "chain")


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of the command line."""
    parser = subparsers.add_parser(
        "evaluate", help="measure what filtering gains and costs for a model", description=_DESCRIPTION
    )
    parser.add_argument(
        "--model", required=True, metavar="M", help="as in gf-tvm train: a built-in name or package.module:factory"
    )
    parser.add_argument("--data", default="digits", metavar="DATA", help="as in gf-tvm train (default: digits)")
    parser.add_argument(
        "--patch", default="exact,2,4,7", metavar="R,...", help="the backward passes (default: exact,2,4,7)"
    )
    parser.add_argument(
        "--last", default="1,2,4", metavar="K,...", help="numbers of last convolutions to fine-tune (default: 1,2,4)"
    )
    parser.add_argument(
        "--protocol",
        choices=("paper",),
        default="paper",
        help="of gf-tvm train: every run pretrains on one part of the data and fine-tunes on another one",
    )
    parser.add_argument("--seeds", default="0", metavar="N,...", help="runs of each setting (default: 0)")
    chains = parser.add_mutually_exclusive_group()
    add_chain_argument(chains, "each patch without chains, as in gf-tvm train --no-chain")
    add_means_argument(chains)
    parser.add_argument("--layer-by-layer", action="store_true", help="each patch in chains, and again without them")
    parser.add_argument("--library", type=Path, metavar="FILE.gfb", help="compiled kernels, made by gf-tvm build")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the results; resumed if used"
    )
    limits = parser.add_argument_group("limits for the recommendation")
    limits.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="limit of the memory that a step saves for backward, such as 64MB or 1.5GiB",
    )
    limits.add_argument(
        "--max-accuracy-drop",
        type=float,
        metavar="POINTS",
        help="limit relative to the exact backward pass of the same convolutions, mean over the seeds",
    )
    protocol = parser.add_argument_group("protocol, as in gf-tvm train")
    for field in fields(TrainConfig):
        if field.name not in _OWN:
            _add_setting(protocol, field)
    protocol.add_argument("--schedule", default=TrainConfig.schedule, choices=SCHEDULES, help="of the learning rate")
    parser.add_argument("--threads", type=int, metavar="N", help="threads (default: as many as PyTorch takes)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON to this file")
    parser.set_defaults(run=run)


def _add_setting(group: Any, field: Field[Any]) -> None:
    """An option for a field of TrainConfig, of the field's type."""
    flag, annotation = f"--{field.name.replace('_', '-')}", str(field.type)
    if annotation == "bool":
        group.add_argument(flag, action="store_true", help="as in gf-tvm train")
        return
    kind: Callable[[str], Any] = {"int": int, "float": float}.get(annotation.split(" ")[0], str)
    text = f"(default: {field.default}" + ("; 0: none)" if annotation.endswith("| None") else ")")
    group.add_argument(flag, type=kind, default=field.default, metavar="X", help=text)


def run(args: argparse.Namespace) -> int:
    """Evaluate as the parsed arguments say. Returns the exit code; raises GfTvmError for a user's mistake."""
    config = _config(args)
    if args.json is not None:
        check_writable(args.json)

    from ..bundle.library import load
    from ..evaluation.evaluator import evaluate
    from ..machine.cpu import torch_threads

    library = None if args.library is None else load(args.library)
    with _Lines() as lines, torch_threads(args.threads):
        evaluation = evaluate(config, args.out, library=library, callback=lines)
    if args.json is not None:
        write_json(args.json, evaluation.to_dict())
    _print(evaluation, args.out)
    return 0


def _config(args: argparse.Namespace) -> EvaluateConfig:
    values: dict[str, Any] = {}
    for field in fields(TrainConfig):
        if hasattr(args, field.name) and field.name not in ("patch", "last", "seed"):
            value = getattr(args, field.name)
            values[field.name] = None if str(field.type).endswith("| None") and not value else value
    drop = args.max_accuracy_drop
    if drop is not None and not 0 <= drop <= 100:
        raise EvaluationError(f"--max-accuracy-drop must lie between 0 and 100 points, got {drop:g}")
    return EvaluateConfig(
        TrainConfig(**values),
        patches=parse_variants(args.patch),
        last=_integers(args.last, "--last"),
        seeds=_integers(args.seeds, "--seeds"),
        memory_budget=None if args.memory_budget is None else parse_size(args.memory_budget),
        max_score_drop=None if drop is None else drop / 100,
        layer_by_layer=args.layer_by_layer,
    )


def _integers(text: str, flag: str) -> list[int]:
    """``"1,2,4"`` -> [1, 2, 4]. Raises EvaluationError."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise EvaluationError(f"{flag} is written as 1,2,4, got {text!r}") from None


class _Lines:
    """Shows the progress: one bar for all that is to be done."""

    def __init__(self) -> None:
        # Until the first step: data are read, kernels built.
        self._progress = ProgressBar(None, "preparing", leave=False)

    def __call__(self, step: Step) -> None:
        if self._progress.total is None:
            self._progress.close()
            self._progress = ProgressBar(step.total, "evaluating", unit="part")
        self._progress.update(step.done, step.label)

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()


def _print(evaluation: Evaluation, out: Path) -> None:
    print(f"protocol paper: {evaluation.model} on {evaluation.data}, {evaluation.threads} threads")
    for what, how in evaluation.conditions.items():
        print(f"  {what}: {how}")
    print()
    headers = [
        "setting",
        f"{evaluation.metric} %",
        "spread",
        "points vs exact",
        "forward ms",
        "backward ms",
        "update ms",
    ]
    headers += ["saved for\nbackward kB", "saved by\nconvolutions kB", "peak MB", "forward MFLOP", "backward MFLOP"]
    exact = {s.last: s.score for s in evaluation.settings if s.variant == "exact"}
    measured = any(s.energy_joules_per_step is not None for s in evaluation.settings)
    rows = []
    for s in evaluation.settings:
        difference = 100 * (s.score - exact[s.last]) if s.last in exact and s.variant != "exact" else None
        row: list[object] = [s.name, 100 * s.score, None if s.spread is None else 100 * s.spread, difference]
        row += [s.step_ms["forward"], s.step_ms["backward"], s.step_ms["update"]]
        row += [s.kept_bytes / 1e3, s.kept_bytes_convolutions / 1e3]
        row += [None if s.peak_bytes is None else s.peak_bytes / 1e6, s.forward_flops / 1e6, s.backward_flops / 1e6]
        rows.append([*row, s.energy_joules_per_step] if measured else row)
    print(format_table([*headers, "J per step"] if measured else headers, rows, floats=".1f"))
    busiest = max((s.other_cores or 0.0 for s in evaluation.settings), default=0.0)
    if busiest > 0.1:
        print(f"Doubtful times: other programs kept up to {busiest:.1f} cores busy meanwhile")
    if evaluation.layers:
        print("\ncosine between the filtered and the exact gradient")
        cells = [[layer.name, layer.variant, layer.cosine_weight, layer.cosine_input] for layer in evaluation.layers]
        print(format_table(["layer", "patch", "of the weight", "of the input"], cells, floats=".3f"))
    print("\nmemory saved for backward in a step, by the type of the module that saved it:")
    for s in evaluation.settings:
        print(f"  {s.name}: {', '.join(f'{name} {size / 1e3:.0f} kB' for name, size in s.kept_bytes_by_type.items())}")
    for s in evaluation.settings:
        for chain in s.chains:
            print(f"{s.name}: a chain of {len(chain)}: {', '.join(chain)}")
        if " chained" in s.variant and not s.chains:
            print(f"{s.name}: there is no chain, so each convolution is filtered by itself")
    found = evaluation.obstacles
    if found.filtering:
        print("\nnot filtered, exact in every setting:")
        for name, reason in found.filtering.items():
            print(f"  {name}: {reason}")
    if found.cache is not None:
        print(f"\nthe frozen layers are computed in every step: {found.cache}")
    best = evaluation.recommendation
    if best is None:
        print(f"\nno recommendation: {found.limits}")
    else:
        print(f"\nrecommended: {best.variant}, last {best.last}: {best.why}")
        print(f"train with it: gf-tvm train --config {out / 'train.json'}")

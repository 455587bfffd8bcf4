"""gf-tvm train --protocol transfer: a trained network, somebody's pictures, a model to take away."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from ..training.config import TrainingError
from ..training.job.config import JobConfig
from ._cases import parse_variants
from ._output import format_table, write_json
from ._training import Lines, metrics_of

if TYPE_CHECKING:
    from ..training.job.run import JobResult

#: Classes of which the table shows the best and the worst.
_SHOWN = 20


def run(args: argparse.Namespace) -> int:
    """Fine-tune as the parsed arguments say. Returns the exit code; raises GfTvmError for a user's mistake."""
    from ..bundle.library import load
    from ..machine.cpu import torch_threads
    from ..training.job.run import CHECKPOINT, fine_tune_model

    given = vars(args)
    config = job_of(args)
    if "out" not in given:
        raise TrainingError("--out DIR is needed, a folder for the model (or --protocol paper, which makes none)")
    out: Path = given["out"]
    library = None if args.library is None else load(args.library)
    try:
        with metrics_of(args) as metrics, Lines() as lines, torch_threads(args.threads):
            lines.say("protocol transfer: fine-tuning on your pictures (--protocol paper compares backward passes)")
            if "data" not in given:
                lines.say("no --data: scikit-learn's 1797 images of digits, enlarged")
            result = fine_tune_model(
                config, out, library=library, resume=args.resume, callback=lines, metrics=metrics, say=lines.say
            )
    except KeyboardInterrupt:
        if (out / CHECKPOINT).exists():
            print(f"finished epochs are kept in {out}: the same command with --resume goes on", file=sys.stderr)
        raise
    if args.json is not None:
        write_json(args.json, result.to_dict())
    _print(result, out)
    return 0


def job_of(args: argparse.Namespace) -> JobConfig:
    """The configuration that the options name. Raises GfTvmError."""
    values = {field.name: vars(args)[field.name] for field in fields(JobConfig) if field.name in vars(args)}
    if "clip" in values:
        values["clip"] = values["clip"] or None
    if "patch" in values:
        patches = parse_variants(values["patch"])
        if len(patches) > 1:
            raise TrainingError(
                f"--patch {values['patch']} names {len(patches)} backward passes, and one model is made: give one (or "
                "--protocol paper, which compares them)"
            )
        values["patch"] = patches[0]
    return JobConfig(**values)


def _print(result: JobResult, out: Path) -> None:
    shown = sorted(
        ((share, name) for name, share in result.class_accuracy.items() if share is not None), key=lambda row: row[0]
    )
    if len(shown) > _SHOWN:
        print(f"the {_SHOWN} classes of {len(shown)} with the lowest accuracy:")
    rows = [(name, sum(result.confusion[result.classes.index(name)]), 100 * share) for share, name in shown[:_SHOWN]]
    print(format_table(["class", "validation pictures", "accuracy %"], rows, floats=".1f"))
    step = result.step_ms
    print(
        f"accuracy {100 * result.initial_accuracy:.1f} % before, {100 * result.accuracy:.1f} % after epoch "
        f"{result.best_epoch} of {len(result.rows)}, on {result.counts['validation']} validation pictures\n"
        f"a step of {result.batch}: forward {step['forward']:.1f}, backward {step['backward']:.1f}, update "
        f"{step['update']:.1f} ms"
    )
    folder = shlex.quote(str(out))
    print(f"model: {folder}    try it: gf-tvm predict --model {folder} PICTURE...")

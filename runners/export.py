"""gf-tvm export: a model that gf-tvm train left, for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ._output import check_writable, write_json

SCHEMA = "gf_tvm.export/1"

_DESCRIPTION = """\
Writes a model from gf-tvm train as ONNX. Its input "image" has the shape (n, 3, size, size) and is prepared as the
model's config.json says; its output "logits" has one value for each class. Classes and preprocessing are also in the
file's metadata."""


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of the command line."""
    parser = subparsers.add_parser("export", help="write a trained model as ONNX", description=_DESCRIPTION)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="what gf-tvm train --out made")
    parser.add_argument("--onnx", type=Path, required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what the file takes and gives as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export as the parsed arguments say. Returns the exit code; raises GfTvmError for a user's mistake."""
    from ..training.job.saved import load_model
    from ..training.job.using import export_onnx

    for file in (args.onnx, args.json):
        if file is not None:
            check_writable(file)
    saved = load_model(args.model)
    export_onnx(saved, args.onnx)
    if args.json is not None:
        size = saved.preprocessing.size
        about = {"classes": list(saved.classes), "preprocessing": saved.preprocessing.to_dict()}
        about |= {"inputs": {"image": ["n", 3, size, size]}, "outputs": {"logits": ["n", len(saved.classes)]}}
        write_json(args.json, {"schema": SCHEMA, "model": saved.name, "onnx": str(args.onnx), **about})
    print(f"{args.onnx}: {saved.name}, {len(saved.classes)} classes, {args.onnx.stat().st_size / 1e6:.1f} MB")
    return 0

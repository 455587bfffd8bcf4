"""gf-tvm predict: what a model that gf-tvm train left says of pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ._output import ProgressBar, check_writable, printable, write_json

SCHEMA = "gf_tvm.predictions/1"

_DESCRIPTION = """\
Names the classes that a model from gf-tvm train thinks most probable for each picture. A picture that cannot be read is
named, and the exit code is then 2."""


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of the command line."""
    parser = subparsers.add_parser("predict", help="classify pictures with a trained model", description=_DESCRIPTION)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="what gf-tvm train --out made")
    parser.add_argument("pictures", type=Path, nargs="+", metavar="PICTURE", help="a picture, or a folder of pictures")
    parser.add_argument(
        "--top", type=int, default=3, metavar="K", help="how many classes to name (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the predictions as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Predict as the parsed arguments say. Returns the exit code; raises GfTvmError for a user's mistake."""
    from ..errors import ModelError, PictureError
    from ..training.data.pictures import check_pillow, is_picture
    from ..training.job.saved import load_model
    from ..training.job.using import predict

    if args.json is not None:
        check_writable(args.json)
    check_pillow(args.model)
    saved = load_model(args.model)
    pictures: list[Path] = []
    for path in args.pictures:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if is_picture(file) and file.is_file())
            if not found:
                raise ModelError(f"the folder {str(path)!r} has no pictures")
            pictures += found
        else:
            pictures.append(path)
    rows, broken = [], 0
    with ProgressBar(len(pictures), "predicting", "picture", leave=False) as progress:
        for prediction in predict(saved, pictures, args.top):
            if isinstance(prediction, PictureError):
                broken += 1
                progress.write(f"gf-tvm: error: {prediction}")
            else:
                rows.append(prediction.to_dict())
                said = ", ".join(f"{name} {100 * share:.1f} %" for name, share in prediction.classes)
                print(printable(f"{prediction.picture}: {said}"))
            progress.advance()
    if args.json is not None:
        write_json(args.json, {"schema": SCHEMA, "model": str(args.model), "predictions": rows})
    if broken:
        print(f"gf-tvm: {broken} of {len(pictures)} pictures could not be read", file=sys.stderr)
    return 2 if broken else 0

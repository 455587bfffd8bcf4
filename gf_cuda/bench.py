"""``python3 -m gf_cuda bench FILE.gfb``: the filtered backward passes of a bundle against cuDNN's exact ones.

For boards on which gf_tvm does not run (a Jetson Nano has Python 3.6); elsewhere ``gf-tvm compare`` does more. The
JSON has the fields of ``gf-tvm compare --json``; what is not measured here (plain PyTorch operators) is null.
"""

import argparse
import json
import math
import os
import sys
from typing import Any, Optional, Sequence

from ._bench_report import show
from .bundle import load
from .errors import GfCudaError


def add_parser(subparsers: Any) -> None:
    """Add the command to ``python3 -m gf_cuda``; its ``run`` is :func:`run`."""
    parser = subparsers.add_parser("bench", help="measure a bundle's backward kernels against cuDNN's exact ones")
    _add_arguments(parser)
    parser.set_defaults(run=run)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="FILE.gfb")
    parser.add_argument("--gpu", type=int, default=0, metavar="N", help="number of the GPU (default: 0)")
    parser.add_argument("--only", metavar="TEXT", help="only convolutions whose key contains this, as r4x4 or ci512")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="timing of each kernel (default: 5)")
    parser.add_argument("--no-energy", action="store_true", help="do not measure joules")
    parser.add_argument("--json", metavar="FILE", help="write rows and conditions as JSON")


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m gf_cuda bench", description="Measure against cuDNN.")
    _add_arguments(parser)
    return run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Measure, print, write. Raises GfCudaError for what the user can put right."""
    if not (args.seconds >= 0 and not math.isinf(args.seconds)):
        raise GfCudaError(f"seconds must be a number of at least 0, got {args.seconds}")
    if args.json is not None:
        folder = os.path.dirname(os.path.abspath(args.json))
        if not os.access(folder, os.W_OK) or os.path.isdir(args.json):
            raise GfCudaError(f"cannot write '{args.json}'")
    try:
        from . import _bench  # with PyTorch, which those who only look into bundles need not have
    except ImportError as error:
        raise GfCudaError(f"cuDNN is used through PyTorch, which cannot be imported: {error}") from None
    bundle = load(args.bundle)
    setup = _bench.open_setup(bundle, args.gpu, not args.no_energy, args.seconds)
    document = _bench.bench(bundle, setup, args.only, lambda text: print(text, file=sys.stderr, flush=True))
    show(document)
    if args.json is not None:
        part = f"{args.json}.part"
        if os.path.lexists(part):
            os.remove(part)
        with open(part, "x", encoding="utf-8") as file:  # never through a link
            json.dump(document, file, indent=1)
            file.write("\n")
        os.replace(part, args.json)
    return 0

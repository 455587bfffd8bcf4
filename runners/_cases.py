"""The options that say which convolutions a command works on; shared by tune, build and compare."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..training.config import CHAIN_MEANS

if TYPE_CHECKING:
    from torch import nn

    from ..building import Program
    from ..comparison.chains import ChainCase
    from ..core.geometry import Pair
    from ..core.workload import Workload
    from ..shapes import Case

#: With --model.
_PATCHES = (2, 4)


def add_case_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add --device, --shapes or --model with --input and --last, --patch, --dtype and --cases.

    ``required``: whether one of --shapes and --model has to be given.
    """
    parser.add_argument(
        "--device", default="host", metavar="D", help="device profile (default: host; see gf-tvm devices)"
    )
    source = parser.add_argument_group("convolutions")
    either = source.add_mutually_exclusive_group(required=required)
    either.add_argument(
        "--shapes", metavar="paper|FILE", help="the paper's seven cases, or a JSON file of the form of paper_cases.json"
    )
    either.add_argument(
        "--model", metavar="M", help="as in gf-tvm train: resnet18, fcn_resnet18, package.module:factory"
    )
    source.add_argument("--input", metavar="NxCxHxW", help="with --model: shape of a training batch, such as 8x3x32x32")
    source.add_argument("--last", type=int, metavar="K", help="with --model: its last K convolutions")
    source.add_argument(
        "--patch",
        metavar="R,...",
        help="patches, such as 2,4 or 2x1,4 (default: those of the shapes; with --model: 2,4)",
    )
    source.add_argument(
        "--dtype",
        metavar="T,...",
        help="storage dtypes, such as float32,float16 (default: those of the shapes or model)",
    )
    source.add_argument("--cases", metavar="LIST", help="only these, by number or name: 4-7 or 1,3 or 'layer4.*'")


def add_chain_argument(parser: Any, text: str) -> None:
    """Add --no-chain, which makes ``args.chain`` False; ``text``: its help."""
    parser.add_argument("--no-chain", dest="chain", action="store_false", default=True, help=text)


def add_means_argument(parser: Any) -> None:
    """Add --means, which makes ``args.chain`` a dtype."""
    parser.add_argument(
        "--means",
        dest="chain",
        choices=CHAIN_MEANS,
        default=True,
        help="dtype in which chains store the means of derivatives (default: as they are summed)",
    )


def chains_from(args: argparse.Namespace) -> list[ChainCase]:
    """With --model for a CPU: it, to be measured chain by chain, unless single convolutions are picked.

    Raises GeometryError, ModelError and DeviceError.
    """
    from ..comparison.chains import chain_cases
    from ..machine.profiles import get_profile
    from ..shapes import parse_dtypes, parse_patches

    if not _has_chains(args) or get_profile(args.device).gpu is not None:
        return []
    model, shape = _model_from(args)
    patches = _PATCHES if args.patch is None else parse_patches(args.patch)
    dtypes = None if args.dtype is None else parse_dtypes(args.dtype)
    return chain_cases(model, shape, last=args.last, patches=patches, dtypes=dtypes)


def _has_chains(args: argparse.Namespace) -> bool:
    """Chains are found in a model; --shapes and --cases name single convolutions."""
    return args.chain and args.model is not None and args.cases is None


def _model_from(args: argparse.Namespace) -> tuple[nn.Module, tuple[int, int, int, int]]:
    """The model of --model, and a batch's shape. Raises GeometryError and ModelError."""
    from ..errors import ModelError
    from ..models import build_model
    from ..shapes import parse_input

    if args.input is None or args.last is None:
        raise ModelError("--model needs --input NxCxHxW and --last K")
    shape = parse_input(args.input)
    # The number of classes does not matter here: no convolution depends on it.
    return build_model(args.model, num_classes=10, in_channels=shape[1], image_size=min(shape[2:])), shape


def cases_from(args: argparse.Namespace) -> list[Case]:
    """The cases that the options of :func:`add_case_arguments` name. Raises GeometryError and ModelError."""
    from ..errors import GeometryError
    from ..shapes import load_cases, model_cases, paper_cases, parse_dtypes, parse_patches, pick_cases, with_dtypes

    patches = None if args.patch is None else parse_patches(args.patch)
    if args.model is not None:
        model, shape = _model_from(args)
        cases = model_cases(model, shape, last=args.last, patches=patches or _PATCHES)
    else:
        if args.input is not None or args.last is not None:
            raise GeometryError("--input and --last belong to --model, not to --shapes")
        cases = paper_cases(patches) if args.shapes == "paper" else load_cases(args.shapes, patches)
    if args.dtype is not None:
        cases = with_dtypes(cases, parse_dtypes(args.dtype))
    return cases if args.cases is None else pick_cases(cases, args.cases)


def workloads_from(args: argparse.Namespace) -> list[Workload]:
    """What training on these cases calls; with --model what its chains call, too. Raises as :func:`cases_from`."""
    from ..shapes import workloads_of

    return workloads_of(cases_from(args), args.chain and args.model is not None)


def parse_variants(text: str) -> list[Pair | None]:
    """``"exact,2,2x1"``, runs of a training -> [None, (2, 2), (2, 1)], each once. Raises GeometryError."""
    from ..errors import GeometryError
    from ..shapes import parse_patches

    patches: list[Pair | None] = []
    for part in text.split(","):
        if part.strip().lower() == "exact":
            patches.append(None)
            continue
        try:
            patches += parse_patches(part)
        except GeometryError as error:
            if "written as" not in str(error):
                raise
            raise GeometryError(f"patches are written as exact,2,4 or 2x1 (height x width), got {text!r}") from None
    return list(dict.fromkeys(patches))


def programs_from(args: argparse.Namespace) -> list[Program]:
    """With --model: what training's steps are compiled to, unless single convolutions are picked.
    ``args.train_bn_affine`` as for gf-tvm train.

    Raises GeometryError, ModelError and DeviceError.
    """
    from ..shapes import parse_patches
    from ..training import chain_programs

    if args.model is None or args.cases is not None:
        return []
    model, shape = _model_from(args)
    patches = _PATCHES if args.patch is None else parse_patches(args.patch)
    return [*chain_programs(model, shape, args.last, patches, args.train_bn_affine, args.device, args.chain)]

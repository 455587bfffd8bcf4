"""gf-tvm train: fine-tune a network on somebody's pictures; or compare backward passes by the paper's protocol."""

from __future__ import annotations

import argparse
from argparse import SUPPRESS
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.config import AMP, CACHES, SCHEDULES, TrainConfig, TrainingError
from ..training.job.config import JobConfig
from ._cases import add_chain_argument, add_means_argument, parse_variants
from ._config import add_config_option
from ._output import check_writable, format_table, write_json
from ._training import Lines, mb, metrics_of

if TYPE_CHECKING:
    from ..training.results import TrainResult

PROTOCOLS = ("transfer", "paper")

#: Options that only one protocol has.
_ONLY = {
    "transfer": ("weights", "out", "augment", "validation"),
    "paper": (*("pretrain_epochs", "pretrain_lr", "flip", "shift", "skew", "test_fraction", "checkpoint", "cache"),),
}

_DESCRIPTION = """\
Fine-tunes the last K convolutions and the classifier of a trained network on a folder of pictures, one folder a class,
and leaves a model to take away in --out. Batch-norm statistics are frozen. The batch size is fixed, a last batch that
is not full is filled up: kernels are compiled for one batch size. --protocol paper compares backward passes instead: it
pretrains on one part of a data set and fine-tunes on another part with other class frequencies, once for each patch and
from the same weights; it leaves no model."""


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of the command line."""
    parser = subparsers.add_parser(
        "train", help="fine-tune a network with filtered gradients", description=_DESCRIPTION
    )
    defaults = [{field.name: field.default for field in fields(config)} for config in (JobConfig, TrainConfig)]

    def option(group: Any, flag: str, kind: Any, metavar: str, text: str) -> None:
        # Without a default here: what was not given is filled in as the protocol has it.
        name = flag[2:].replace("-", "_")
        known = [str(values[name]) for values in defaults if values.get(name) is not None]
        told = known[0] if len(set(known)) == 1 else f"{known[0]}; paper: {known[1]}"
        group.add_argument(flag, type=kind, default=SUPPRESS, metavar=metavar, help=f"{text} (default: {told})")

    parser.add_argument(
        "--model",
        required=True,
        metavar="M",
        help="mobilenetv2, resnet18, resnet34, mcunet, efficientnet_lite0; for segmentation fcn_, pspnet_, "
        "deeplabv3_ or upernet_ and one of these (fcn_resnet18); each also with a width in percent (resnet18_025); "
        "package.module:factory; or a folder, of an earlier --out or of Hugging Face's save_pretrained",
    )
    parser.add_argument(
        "--weights",
        default=SUPPRESS,
        metavar="W",
        help="imagenet, a file (.safetensors, or of torch.save), or none for random weights (default: imagenet where "
        "there is a package of them, else the model's own)",
    )
    option(
        parser,
        "--data",
        str,
        "DATA",
        "a folder of class folders of images, or of train and val with those; of CIFAR's files; an .npz with x and y; "
        "digits; with --protocol paper also scenes, or a folder of images and masks as PASCAL VOC has them",
    )
    parser.add_argument(
        "--out", type=Path, default=SUPPRESS, metavar="DIR", help="folder for the model and all about it"
    )
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default=PROTOCOLS[0],
        help="transfer: fine-tune a trained network on these pictures, and leave the model in --out; paper: compare "
        "backward passes on two parts of a data set (default: %(default)s)",
    )
    parser.add_argument(
        "--patch",
        default=SUPPRESS,
        metavar="R",
        help="exact for the exact backward pass, or a patch as 2 or 2x1; paper: one for each run (default: 2; paper: "
        "exact,2,4)",
    )
    option(parser, "--last", int, "K", "fine-tune the last K convolutions")
    parser.add_argument("--library", type=Path, metavar="FILE.gfb", help="compiled kernels, made by gf-tvm build")
    chains = parser.add_mutually_exclusive_group()
    add_chain_argument(
        chains,
        "filter each convolution by itself, as in the paper: same gradients, more time and memory (default: gradients "
        "stay on the patch grid between filtered convolutions where that is exact)",
    )
    add_means_argument(chains)
    parser.add_argument(
        "--image-size",
        type=int,
        default=SUPPRESS,
        metavar="PIXELS",
        help="pixels per side that the network sees (default: what its weights were trained with; paper: 32)",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        default=SUPPRESS,
        help="stop at a picture that cannot be read (default: skip and count it)",
    )
    parser.add_argument(
        "--no-augment",
        dest="augment",
        action="store_false",
        default=SUPPRESS,
        help="show whole pictures while training (default: random parts, mirrored or not)",
    )
    option(parser, "--validation", float, "X", "share of each class for validation, where there is no folder val")
    steps = parser.add_argument_group("steps")
    option(steps, "--epochs", int, "N", "fine-tuning epochs")
    option(steps, "--batch", int, "N", "images in a step")
    option(steps, "--lr", float, "X", "learning rate of fine-tuning")
    option(steps, "--momentum", float, "X", "momentum of SGD")
    option(steps, "--weight-decay", float, "X", "weight decay of SGD")
    steps.add_argument(
        "--schedule",
        default=SUPPRESS,
        choices=SCHEDULES,
        help=f"of the learning rate (default: {JobConfig.schedule})",
    )
    option(steps, "--warmup-epochs", float, "X", "epochs in which the learning rate rises, may be a fraction")
    option(steps, "--step-epochs", int, "N", "schedule step: epochs between two falls of the learning rate")
    option(steps, "--step-factor", float, "X", "schedule step: what the learning rate is multiplied by")
    steps.add_argument(
        "--patience",
        type=int,
        default=SUPPRESS,
        metavar="N",
        help="stop when the score has not improved for N epochs; keep the best epoch's weights (default: never stop; "
        "transfer keeps the best epoch's weights in any case)",
    )
    option(steps, "--min-delta", float, "X", "what counts as an improvement for --patience: more than this fraction")
    steps.add_argument(
        "--amp",
        default=SUPPRESS,
        choices=AMP,
        help=f"mixed precision: forward passes under torch.autocast (default: {JobConfig.amp})",
    )
    steps.add_argument(
        "--clip",
        type=float,
        default=SUPPRESS,
        metavar="X",
        help=f"clip the norm of all gradients together; 0: no clipping (default: {JobConfig.clip})",
    )
    steps.add_argument(
        "--train-bn-affine",
        action="store_true",
        default=SUPPRESS,
        help="also fine-tune scale and shift of the batch norms after the first fine-tuned convolution",
    )
    option(steps, "--seed", int, "N", "of the split, new weights and the order of the images")
    paper = parser.add_argument_group("protocol paper")
    option(paper, "--pretrain-epochs", int, "N", "pretraining epochs; 0 keeps the weights that the model comes with")
    option(paper, "--pretrain-lr", float, "X", "learning rate of pretraining")
    paper.add_argument("--flip", action="store_true", default=SUPPRESS, help="mirror training images at random")
    option(paper, "--shift", int, "PIXELS", "shift training images at random by up to this many pixels")
    option(paper, "--skew", float, "X", "share of a class's images in its main part, 0.5 (even) to 1")
    option(
        paper,
        "--test-fraction",
        float,
        "X",
        "share of the images that are only tested on, unless the data has test images",
    )
    paper.add_argument(
        "--checkpoint",
        type=Path,
        default=SUPPRESS,
        metavar="DIR",
        help="keep pretrained weights (used again by later runs) and, after every epoch, each run's state there",
    )
    paper.add_argument(
        "--cache",
        default=SUPPRESS,
        choices=CACHES,
        help="where to keep what the frozen layers compute, instead of computing it in every epoch: in memory, on disk "
        f"(in --checkpoint), or auto: memory if it fits, else disk (default: {TrainConfig.cache})",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the interrupted job in --out (paper: the runs in --checkpoint) instead of starting over",
    )
    parser.add_argument(
        "--metrics", type=Path, metavar="FILE.jsonl", help="write a line of JSON after every epoch; --resume appends"
    )
    parser.add_argument(
        "--tensorboard", type=Path, metavar="DIR", help="write scalars for TensorBoard (package tensorboard)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads (default: as many as PyTorch takes)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    add_config_option(parser, "gf_tvm.train_config/1")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train as the parsed arguments say. Returns the exit code; raises GfTvmError for a user's mistake."""
    given = vars(args)
    foreign = _ONLY[PROTOCOLS[0] if args.protocol == "paper" else "paper"]
    for name in foreign:
        if name in given:
            flag = {"augment": "--no-augment"}.get(name, f"--{name.replace('_', '-')}")
            raise TrainingError(f"{flag} does not belong to --protocol {args.protocol}")
    for file in (args.json, args.metrics):
        if file is not None:
            check_writable(file)
    if args.protocol == "paper":
        return _run_paper(args, given)
    from . import _transfer

    return _transfer.run(args)


def _run_paper(args: argparse.Namespace, given: dict[str, Any]) -> int:
    from ..bundle.library import load
    from ..machine.cpu import torch_threads
    from ..training.results import SCHEMA
    from ..training.trainer import train_variants

    values = {field.name: given[field.name] for field in fields(TrainConfig) if field.name in given}
    if "clip" in values:
        values["clip"] = values["clip"] or None
    patches = parse_variants(given.get("patch", "exact,2,4"))
    config = TrainConfig(**{**values, "patch": None})
    library = None if args.library is None else load(args.library)
    with metrics_of(args) as metrics, Lines() as lines, torch_threads(args.threads):
        results = train_variants(
            config,
            patches,
            library=library,
            checkpoint=given.get("checkpoint"),
            resume=args.resume,
            callback=lines,
            metrics=metrics,
        )
    if args.json is not None:
        write_json(args.json, {"schema": SCHEMA, "runs": [result.to_dict() for result in results]})
    _print_summary(results)
    return 0


def _print_summary(results: list[TrainResult]) -> None:
    first = results[0]
    images, config = first.dataset["images"], first.config
    print(
        f"protocol paper: {config.model} on {config.data}: fine-tuned {len(first.trained_layers)} convolutions and the "
        f"classifier ({first.trained_parameters} of {first.parameters} parameters) on {images['finetune_train']} "
        f"images, tested on {images['finetune_test']} ({first.metric}); batch {config.batch}, {first.threads} threads"
    )
    exact = next((result for result in results if result.config.patch is None), None)
    headers = ["run", "before %", "after %", "points vs exact", "forward ms", "backward ms", "update ms"]
    headers += ["saved by convolutions kB", "saved for backward kB", "gradients by"]
    rows: list[tuple[object, ...]] = []
    for result in results:
        step, last, difference = result.step_ms, result.rows[-1], None
        if exact is not None and exact is not result:
            difference = 100 * (result.test_accuracy - exact.test_accuracy)
        rows.append(
            (
                *(result.config.variant, 100 * result.initial_test_accuracy, 100 * result.test_accuracy, difference),
                *(step[phase] for phase in ("forward", "backward", "update")),
                *(last.kept_bytes_convolutions / 1e3, last.kept_bytes / 1e3),
                ", ".join(dict.fromkeys(result.kernels.values())),
            )
        )
    print(format_table(headers, rows, floats=".1f"))
    print("\n".join(_cache_lines(results)))
    for result in results:
        for chain in result.chains:
            print(f"{result.config.variant}: a chain of {len(chain)}: {', '.join(chain)}")
    for result in results:
        if result.best_epoch is not None:
            print(f"{result.config.variant}: weights of epoch {result.best_epoch}, trained {len(result.rows)}")


def _cache_lines(results: list[TrainResult]) -> list[str]:
    """What became of the frozen layers' results: a line for all runs of which the same is true."""
    runs: dict[str, list[str]] = {}
    for result in results:
        cache = result.cache
        if cache["kind"] == "off":
            text = f"computed in every epoch: {cache['reason']}"
        else:
            text = f"kept {'in memory' if cache['kind'] == 'memory' else 'on disk'} ({mb(cache['bytes'])} MB)"
            text += ", found there" if cache["reused"] else ""
        for line in (text, *cache["notes"]):
            runs.setdefault(line, []).append(result.config.variant)
    return [f"frozen layers' results ({', '.join(names)}): {text}" for text, names in runs.items()]

"""gf-tvm train: fine-tune the last convolutions of a network with the exact and the filtered backward pass."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..machine.allocator import label_of
from ..training.config import AMP, CACHES, SCHEDULES, TrainConfig
from ._allocator import add_allocator_argument
from ._cases import add_chain_argument, add_means_argument, parse_variants
from ._config import add_config_option
from ._output import ProgressBar, check_writable, format_table, write_json

if TYPE_CHECKING:
    from ..training.results import EpochRow, Event, TrainResult

_DESCRIPTION = """\
Pretrains a network on one part of a data set and fine-tunes it on another part with other class frequencies. Only the
last K convolutions and the classifier are fine-tuned; batch-norm statistics are frozen. Every patch is a run of its own
from the same pretrained weights. The batch size is fixed, a last batch that is not full is left out: kernels are
compiled for one batch size."""


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of the command line."""
    parser = subparsers.add_parser(
        "train", help="fine-tune a network with filtered gradients", description=_DESCRIPTION
    )
    default = {field.name: field.default for field in fields(TrainConfig)}

    def option(group: Any, flag: str, kind: Any, metavar: str, text: str) -> None:
        value = default[flag[2:].replace("-", "_")]
        group.add_argument(flag, type=kind, default=value, metavar=metavar, help=f"{text} (default: {value})")

    parser.add_argument(
        "--model",
        required=True,
        metavar="M",
        help="mobilenetv2, resnet18, resnet34, mcunet; for segmentation fcn_, pspnet_, deeplabv3_ or upernet_ and one "
        "of these (fcn_resnet18); each also with a width in percent (resnet18_025); or package.module:factory",
    )
    option(
        parser,
        "--data",
        str,
        "DATA",
        "digits; scenes (for segmentation); a folder of class folders of images, of CIFAR's files, or of images and "
        "masks as PASCAL VOC has them; or an .npz with x and y",
    )
    parser.add_argument(
        "--patch",
        default="exact,2,4",
        metavar="R,...",
        help="the runs: exact for the exact backward pass, or a patch as 2 or 2x1 (default: exact,2,4)",
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
    option(parser, "--image-size", int, "PIXELS", "resize images to that many pixels per side")
    protocol = parser.add_argument_group("protocol")
    option(protocol, "--epochs", int, "N", "fine-tuning epochs")
    option(protocol, "--pretrain-epochs", int, "N", "pretraining epochs; 0 keeps the weights that the model comes with")
    option(protocol, "--batch", int, "N", "images in a step")
    option(protocol, "--lr", float, "X", "learning rate of fine-tuning")
    option(protocol, "--pretrain-lr", float, "X", "learning rate of pretraining")
    option(protocol, "--momentum", float, "X", "momentum of SGD")
    option(protocol, "--weight-decay", float, "X", "weight decay of SGD")
    protocol.add_argument(
        "--schedule", default=default["schedule"], choices=SCHEDULES, help="of the learning rate (default: %(default)s)"
    )
    option(protocol, "--warmup-epochs", float, "X", "epochs in which the learning rate rises, may be a fraction")
    option(protocol, "--step-epochs", int, "N", "schedule step: epochs between two falls of the learning rate")
    option(protocol, "--step-factor", float, "X", "schedule step: what the learning rate is multiplied by")
    protocol.add_argument(
        "--patience",
        type=int,
        metavar="N",
        help="stop when the test score has not improved for N epochs; keep the best epoch's weights (default: never)",
    )
    option(protocol, "--min-delta", float, "X", "what counts as an improvement for --patience: more than this fraction")
    protocol.add_argument(
        "--amp",
        default=default["amp"],
        choices=AMP,
        help="mixed precision: forward passes under torch.autocast (default: %(default)s)",
    )
    protocol.add_argument(
        "--clip", type=float, default=default["clip"], metavar="X",
        help="clip the norm of all gradients together; 0: no clipping (default: %(default)s)",
    )  # fmt: skip
    protocol.add_argument("--flip", action="store_true", help="mirror training images at random")
    option(protocol, "--shift", int, "PIXELS", "shift training images at random by up to this many pixels")
    protocol.add_argument(
        "--train-bn-affine",
        action="store_true",
        help="also fine-tune scale and shift of the batch norms after the first fine-tuned convolution",
    )
    option(protocol, "--seed", int, "N", "of the split, the weights and the order of the images")
    option(protocol, "--skew", float, "X", "share of a class's images in its main part, 0.5 (even) to 1")
    option(
        protocol,
        "--test-fraction",
        float,
        "X",
        "share of the images that are only tested on, unless the data has test images",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="keep pretrained weights (used again by later runs) and, after every epoch, each run's state there",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the runs in --checkpoint instead of starting over"
    )
    parser.add_argument(
        "--cache",
        default=default["cache"],
        choices=CACHES,
        help="where to keep what the frozen layers compute, instead of computing it in every epoch: in memory, on disk "
        "(in --checkpoint), or auto: memory if it fits, else disk (default: %(default)s)",
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
    add_allocator_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train as the parsed arguments say. Returns the exit code; raises GfTvmError for a user's mistake."""
    from ..bundle.library import load
    from ..machine.cpu import torch_threads
    from ..training.metrics import JsonLines, Metrics, Sink, TensorBoard
    from ..training.results import SCHEMA
    from ..training.trainer import train_variants

    values = {field.name: getattr(args, field.name) for field in fields(TrainConfig)}
    values["clip"] = args.clip or None
    patches = parse_variants(args.patch)
    config = TrainConfig(**{**values, "patch": None})
    for file in (args.json, args.metrics):
        if file is not None:
            check_writable(file)
    library = None if args.library is None else load(args.library)
    sinks: list[Sink] = []
    if args.tensorboard is not None:
        sinks.append(TensorBoard(args.tensorboard))
    if args.metrics is not None:
        sinks.append(JsonLines(args.metrics, args.resume))
    with Metrics(sinks) as metrics, _Lines() as lines, torch_threads(args.threads):
        results = train_variants(
            config,
            patches,
            library=library,
            checkpoint=args.checkpoint,
            resume=args.resume,
            callback=lines,
            metrics=metrics,
        )
    if args.json is not None:
        write_json(args.json, {"schema": SCHEMA, "runs": [result.to_dict() for result in results]})
    _print_summary(results)
    return 0


class _Lines:
    """Shows events: a progress bar per phase and run, and a line per epoch."""

    def __init__(self) -> None:
        self._progress: ProgressBar | None = None
        self._shown: tuple[str, str] | None = None

    def __call__(self, event: Event) -> None:
        done = (event.epoch - 1) * event.steps + event.step
        if self._shown != (event.phase, event.variant):
            self.close()
            label = "pretraining" if event.phase == "pretrain" else f"fine-tuning {event.variant}"
            self._progress = ProgressBar(event.epochs * event.steps, label, initial=done)
            self._shown = (event.phase, event.variant)
        assert self._progress is not None
        if event.row is not None:
            self._progress.write(_epoch_line(event, event.row))
        elif done > self._progress.done:
            self._progress.update(done)

    def close(self) -> None:
        """End the bar."""
        if self._progress is not None:
            self._progress.close()
            self._progress = None

    def __enter__(self) -> _Lines:
        # Until the first event: data are read, kernels built.
        self._progress = ProgressBar(None, "preparing", leave=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _epoch_line(event: Event, row: EpochRow) -> str:
    name = "pretrain" if event.phase == "pretrain" else event.variant
    kept = f"saved for backward {_mb(row.kept_bytes)} MB"
    if event.phase == "finetune":
        kept += f", {_mb(row.kept_bytes_convolutions)} by the convolutions"
    return (
        f"{name} {row.epoch}/{event.epochs}: loss {row.train_loss:.3f}, "
        f"{event.metric} train {_percent(row.train_accuracy)} test {_percent(row.test_accuracy)} %, "
        f"a step: forward {row.forward_ms:.1f} backward {row.backward_ms:.1f} update {row.update_ms:.1f} ms, {kept}"
    )


def _print_summary(results: list[TrainResult]) -> None:
    first = results[0]
    images, config = first.dataset["images"], first.config
    print(
        f"{config.model} on {config.data}: fine-tuned {len(first.trained_layers)} convolutions and the classifier "
        f"({first.trained_parameters} of {first.parameters} parameters) on {images['finetune_train']} images, "
        f"tested on {images['finetune_test']} ({first.metric}); batch {config.batch}, {first.threads} threads, "
        f"allocator: {label_of(first.machine)}"
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
            text = f"kept {'in memory' if cache['kind'] == 'memory' else 'on disk'} ({_mb(cache['bytes'])} MB)"
            text += ", found there" if cache["reused"] else ""
        for line in (text, *cache["notes"]):
            runs.setdefault(line, []).append(result.config.variant)
    return [f"frozen layers' results ({', '.join(names)}): {text}" for text, names in runs.items()]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _mb(size: int) -> str:
    """Megabytes, 1e6 bytes."""
    return f"{size / 1e6:.2f}"

"""The job itself: pictures, network, training, and what is left."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...files import replacing
from ...machine import cpu
from ...models import Preprocessing
from ...nn import filter_model, unfilter_model
from ...shapes.model import last_to_run
from .. import checkpoint as files
from ..config import TrainConfig, TrainingError
from ..data import CHANNELS, Photos
from ..data.pictures import Skipped
from ..loop import Fit, precision
from ..metrics import Metrics
from ..results import EpochRow, EventCallback
from ..tasks import objective_of
from ..trainer import freeze
from .config import JobConfig
from .dataset import find_pictures
from .drawing import can_draw, draw_confusion, draw_curves
from .memory import bytes_per_image, check_step, told_if_too_large
from .network import Network, build_network
from .saved import CONFIG, save_model

if TYPE_CHECKING:
    from ...bundle.library import Library

SCHEMA = "gf_tvm.job/1"

CHECKPOINT, METRICS = "checkpoint.pt", "metrics.json"


@dataclass(frozen=True)
class JobResult:
    """Outcome of a job; :meth:`to_dict` is what ``metrics.json`` has.

    Attributes:
        classes: names in the order of the logits; counts: pictures to train on and for validation.
        how: what was done, one line each: pictures, weights, classifier, what was trained.
        trained_layers: names of the fine-tuned convolutions; head: of the classifier.
        parameters, trained_parameters: numbers of scalars.
        initial_accuracy: of the validation pictures before training; rows: after each epoch.
        best_epoch: whose weights the model has.
        confusion: of the validation pictures: how many of each class (rows) were taken for which (columns).
        skipped: broken files; resumed: epochs taken from a checkpoint.
        model: the plain network, in evaluation mode; not part of :meth:`to_dict`.
    """

    config: JobConfig
    classes: tuple[str, ...]
    counts: dict[str, int]
    how: tuple[str, ...]
    preprocessing: Preprocessing
    batch: int
    machine: dict[str, Any]
    threads: int
    versions: dict[str, str | None]
    trained_layers: tuple[str, ...]
    head: str | None
    parameters: int
    trained_parameters: int
    initial_accuracy: float
    rows: tuple[EpochRow, ...]
    best_epoch: int
    confusion: tuple[tuple[int, ...], ...]
    skipped: int
    resumed: int
    chains: tuple[tuple[str, ...], ...]
    model: nn.Module = field(repr=False, compare=False)

    @property
    def accuracy(self) -> float:
        """Of the validation pictures, by the model that was left: the best epoch's."""
        return self.rows[self.best_epoch - 1].test_accuracy

    @property
    def class_accuracy(self) -> dict[str, float | None]:
        """Share of each class's validation pictures that are named right; None where there are none."""
        found = {}
        for number, name in enumerate(self.classes):
            total = sum(self.confusion[number])
            found[name] = self.confusion[number][number] / total if total else None
        return found

    @property
    def step_ms(self) -> dict[str, float]:
        """Milliseconds of one step's forward and backward pass and update: the median epoch's median step."""
        phases = ("forward", "backward", "update")
        return {phase: median(getattr(row, f"{phase}_ms") for row in self.rows) for phase in phases}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = {name: value for name, value in vars(self).items() if name not in ("model", "config", "preprocessing")}
        plain["rows"] = [asdict(row) for row in self.rows]
        return {
            "schema": SCHEMA,
            "protocol": "transfer",
            "config": self.config.to_dict(),
            "preprocessing": self.preprocessing.to_dict(),
            "accuracy": self.accuracy,
            "class_accuracy": self.class_accuracy,
            "step_ms": self.step_ms,
            **plain,
        }


def fine_tune_model(
    config: JobConfig,
    out: str | Path,
    *,
    library: Library | None = None,
    resume: bool = False,
    callback: EventCallback | None = None,
    metrics: Metrics | None = None,
    say: Callable[[str], Any] | None = None,
) -> JobResult:
    """Fine-tune a network on somebody's pictures, and leave the model in a folder.

    The last convolutions and the classifier are trained, with the exact or the filtered backward pass; batch norms
    keep their statistics. After every epoch the state is in ``out``, so an interrupted job loses no finished epoch.

    Args:
        config: the job.
        out: folder for model, configuration, metrics and pictures (see :mod:`gf_tvm.training.job.saved`).
        library: compiled kernels for the filtered backward pass.
        resume: go on with the interrupted job in ``out``.
        callback, metrics: told of steps and epochs.
        say: takes what is worth a line: pictures, weights, classifier, skipped files.

    Raises:
        ModelError: pictures, network or weights that cannot be used.
        TrainingError: ``out`` has another job; a step does not fit into memory (the batch that would is named); a
            loss that is not finite; a file that cannot be written.
    """
    out, say = Path(out), say or (lambda line: None)
    _check_out(out, resume)
    skipped = Skipped(config.strict, say)
    pictures = find_pictures(config.data, config.validation, config.seed, skipped, config.image_size or 224)
    how, counted = [pictures.how], len(pictures.train) + len(pictures.validation) + skipped.count
    say(pictures.how)
    network = build_network(config, pictures.classes)
    for line in network.how:
        say(line)
    how += network.how
    size = network.preprocessing.size
    train_photos, validation_photos = pictures.photos(network.preprocessing, config.augment)
    settings = config.steps(size, min(config.batch, len(train_photos)))
    model = network.model
    names = last_to_run(model, config.last, (1, CHANNELS, size, size))
    head = freeze(model, names, config.train_bn_affine)
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    how.append(_told_trained(settings, names, head, trained, sum(p.numel() for p in parameters)))
    say(how[-1])
    check_step(settings.batch, bytes_per_image(model, names, settings))
    if settings.patch is not None:
        assert isinstance(settings.patch, tuple)
        chosen = set(names)
        filter_model(
            model,
            settings.patch,
            layers=lambda name, _: name in chosen,
            library=library,
            chain=settings.chained,
            means=settings.chain_means,
        )
    files.prepare_folder(out)
    modules = dict(model.named_modules())
    fit = Fit(
        config=settings,
        phase="finetune",
        model=model,
        layers={name: modules[name] for name in names},
        train_images=train_photos,
        test_images=validation_photos,
        epochs=config.epochs,
        lr=config.lr,
        metrics=metrics,
    )
    identity = {
        **{name: value for name, value in config.to_dict().items() if name not in ("strict", "data", "model")},
        "network": network.name,
        "preprocessing": network.preprocessing.to_dict(),
        "classes": list(pictures.classes),
        "train": train_photos.digest,
        "validation": validation_photos.digest,
        "weights": files.state_digest(model.state_dict()),
    }
    initial = _initial(fit, out, identity, resume)
    resumed = len(fit.rows)
    if resumed:
        say(f"going on after epoch {resumed} of {config.epochs}")
    identity["initial_accuracy"] = initial
    told_if_too_large(partial(fit.run, out / CHECKPOINT, identity, callback), settings.batch)
    chains = fit.chains
    unfilter_model(model)
    model.eval()
    skipped.end(counted, config.data)
    result = JobResult(
        config=config,
        classes=pictures.classes,
        counts={"train": len(train_photos), "validation": len(validation_photos)},
        how=tuple(how),
        preprocessing=network.preprocessing,
        batch=settings.batch,
        machine=cpu.describe(),
        threads=torch.get_num_threads(),
        versions=cpu.versions(),
        trained_layers=tuple(names),
        head=head,
        parameters=sum(p.numel() for p in parameters),
        trained_parameters=trained,
        initial_accuracy=initial,
        rows=tuple(fit.rows),
        best_epoch=fit.best_epoch or len(fit.rows),
        confusion=_confusion(model, validation_photos, settings),
        skipped=skipped.count,
        resumed=resumed,
        chains=chains,
        model=model,
    )
    _leave(out, network, result, say)
    return result


def _check_out(out: Path, resume: bool) -> None:
    """Raise TrainingError where a job would overwrite another's model, or there is none to go on with."""
    if (out / CONFIG).exists():
        raise TrainingError(f"{str(out)!r} has a finished model: name another folder (--out), or remove it")
    if (out / CHECKPOINT).exists() and not resume:
        raise TrainingError(
            f"{str(out)!r} has a job that was interrupted: --resume goes on with it; or name another folder (--out)"
        )
    if resume and not (out / CHECKPOINT).exists():
        raise TrainingError(f"there is no interrupted job in {str(out)!r} to go on with")


def _initial(fit: Fit, out: Path, identity: dict[str, Any], resume: bool) -> float:
    """The validation accuracy before training: measured, or what the interrupted job measured."""
    if not resume:
        return fit.test_score()
    content = files.load(out / CHECKPOINT)
    found = content.get("identity") if content is not None else None
    initial = found.get("initial_accuracy") if isinstance(found, dict) else None
    if not isinstance(initial, float):
        raise TrainingError(f"the checkpoint {str(out / CHECKPOINT)!r} is not of such a job; delete it")
    fit.restore(out / CHECKPOINT, {**identity, "initial_accuracy": initial})
    return initial


def _told_trained(config: TrainConfig, names: list[str], head: str | None, trained: int, parameters: int) -> str:
    way = "exact gradients" if config.patch is None else f"gradients filtered in patches, {config.variant}"
    what = f"the last {len(names)} convolutions" + ("" if head is None else " and the classifier")
    return f"training {what}, {trained / 1e6:.2f} of {parameters / 1e6:.2f} million parameters, with {way}"


def _confusion(model: nn.Module, photos: Photos, config: TrainConfig) -> tuple[tuple[int, ...], ...]:
    count = len(photos.classes)
    matrix = torch.zeros(count, count, dtype=torch.int64)
    objective = objective_of(photos)
    with torch.no_grad(), precision(config):
        for x, y in photos.batches(config.batch):
            predicted = objective.logits(model(x)).argmax(1)
            matrix.index_put_((y, predicted), torch.ones(len(y), dtype=torch.int64), accumulate=True)
    return tuple(tuple(row) for row in matrix.tolist())


def _leave(out: Path, network: Network, result: JobResult, say: Callable[[str], Any]) -> None:
    """Write everything; the configuration last: where it is, all is there, and the checkpoint is needed no more."""
    if can_draw():
        draw_curves(result.rows, result.initial_accuracy, result.best_epoch, out / "curves.png")
        draw_confusion(result.confusion, result.classes, out / "confusion.png")
    else:
        say("no pictures of curves and confusion: pip install matplotlib")
    with replacing(out / METRICS) as file:
        file.write((json.dumps(result.to_dict(), indent=2, default=str) + "\n").encode())
    training = {
        "config": result.config.to_dict(),
        "how": list(result.how),
        "pictures": result.counts,
        "accuracy": result.accuracy,
        "epochs": len(result.rows),
        "best_epoch": result.best_epoch,
        "versions": result.versions,
    }
    save_model(out, result.model, network.name, network.built_for, result.classes, result.preprocessing, training)
    (out / CHECKPOINT).unlink(missing_ok=True)

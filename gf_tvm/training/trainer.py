"""The paper's protocol in small: pretrain on part A of a data set, fine-tune the last convolutions on part B.

Fine-tuning trains the last K convolutions and the classifier (the last linear layer); everything else is frozen, and
so are all batch norms: their statistics always, their scale and shift unless asked. The K convolutions run either the
exact backward pass or the filtered one; nothing else differs between such runs, which start from the same weights.

Source: Yang, Li, Marculescu, CVPR 2023, section 4.1 and its supplement (SGD, cosine schedule, clipping at 2).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ModelError
from ..machine import cpu
from ..models import build_model
from ..nn import filter_model, select_filterable
from ..shapes.cases import workloads_of
from ..shapes.model import last_to_run, model_cases
from . import checkpoint as files
from .config import TrainConfig, TrainingError
from .data import CHANNELS, Dataset, load_dataset
from .frozen import build as build_cache
from .frozen import plan as plan_cache
from .loop import Fit, is_batch_norm, precision, seeded, training_mode
from .metrics import Metrics
from .results import EventCallback, Pretrained, TrainResult
from .tasks import objective_of

if TYPE_CHECKING:
    from ..bundle.library import Library
    from ..core.geometry import Pair


def train(
    config: TrainConfig,
    *,
    library: Library | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    callback: EventCallback | None = None,
    metrics: Metrics | None = None,
) -> TrainResult:
    """Load the data, pretrain and fine-tune; arguments and errors as for :func:`pretrain` and :func:`finetune`."""
    return train_variants(
        config,
        [config.patch],
        library=library,
        checkpoint=checkpoint,
        resume=resume,
        callback=callback,
        metrics=metrics,
    )[0]


def train_variants(
    config: TrainConfig,
    patches: Sequence[int | Pair | str | None],
    *,
    library: Library | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    callback: EventCallback | None = None,
    metrics: Metrics | None = None,
) -> list[TrainResult]:
    """Pretrain once and fine-tune once per patch, each time from the same pretrained weights.

    Args:
        config: of all runs, except for its ``patch``.
        patches: the runs: ``"exact"`` (or None) or a patch.

    Other arguments and errors as for :func:`pretrain` and :func:`finetune`. Mistakes that can be found beforehand are
    found before anything is trained.
    """
    configs = [replace(config, patch=patch) for patch in patches]
    if not configs:
        raise TrainingError("nothing to train: give at least one patch, or 'exact'")
    _check_folder(config, checkpoint, resume)
    dataset = load_data(config)
    for run in configs:
        check(run, dataset)
        if resume and checkpoint is not None:
            _check_resumable(run, dataset, Path(checkpoint))
    pretrained = pretrain(config, dataset, checkpoint=checkpoint, callback=callback, metrics=metrics)
    return [
        finetune(
            run,
            dataset,
            pretrained,
            library=library,
            checkpoint=checkpoint,
            resume=resume,
            callback=callback,
            metrics=metrics,
        )
        for run in configs
    ]


def load_data(config: TrainConfig) -> Dataset:
    """The data set of a configuration. Raises ModelError, also if a part has fewer images than one batch."""
    dataset = load_dataset(
        config.data, config.image_size, config.seed, config.skew, config.test_fraction, config.strict
    )
    needed = ["finetune_train", *(["pretrain_train"] if config.pretrain_epochs else [])]
    for name in needed:
        if dataset.sizes[name] < config.batch:
            raise ModelError(
                f"the {name} part of {config.data!r} has {dataset.sizes[name]} images, fewer than one batch of "
                f"{config.batch}"
            )
    return dataset


def check(config: TrainConfig, dataset: Dataset) -> None:
    """Raise ModelError unless the model can be built, gives logits for such images and labels, and has the layers to
    fine-tune."""
    model = _build(config, dataset)
    x = dataset.pretrain_train.x[:2]
    model.eval()
    try:
        with torch.no_grad():
            output = model(x)
    except Exception as error:  # the model is the user's code
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{config.model!r} does not run on images of shape {tuple(x.shape)}: {reason}") from error
    logits = objective_of(dataset.pretrain_train).logits(output)
    if len(logits) != len(x) or logits.shape[1] < len(dataset.classes):
        raise ModelError(
            f"{config.model!r} gives logits of shape {tuple(logits.shape)} for {len(x)} images of "
            f"{len(dataset.classes)} classes"
        )
    chosen = set(_last(model, config, dataset))
    if config.patch is not None:
        filter_model(model, patch=_patch(config), layers=lambda name, _: name in chosen, chain=False)


def _last(model: nn.Module, config: TrainConfig, dataset: Dataset) -> list[str]:
    """The convolutions that are fine-tuned, by name, in the order in which they run."""
    return last_to_run(model, config.last, (1, *dataset.pretrain_train.x.shape[1:]))


def obstacles(config: TrainConfig, dataset: Dataset) -> tuple[dict[str, str], str | None]:
    """What a run cannot do as one would expect: (name -> reason) of those of its convolutions that cannot be filtered
    and have the exact backward pass, and why the frozen layers' results are not kept (None where they are). ModelError
    as for :func:`check`.
    """
    model = _build(config, dataset)
    names = _last(model, config, dataset)
    freeze(model, names, config.train_bn_affine)
    _, planned = plan_cache(
        config,
        model,
        dataset.finetune_train,
        dataset.finetune_test,
        training_mode=partial(training_mode, model, "finetune"),
        precision=partial(precision, config),
        folder=None,
    )
    if config.patch is None:
        return {}, planned.reason
    selection = select_filterable(model, layers=lambda name, _: name in names)
    return dict(selection.obstacles), planned.reason


def pretrain(
    config: TrainConfig,
    dataset: Dataset,
    *,
    checkpoint: str | Path | None = None,
    callback: EventCallback | None = None,
    metrics: Metrics | None = None,
) -> Pretrained:
    """Train the whole network on part A with the exact backward pass.

    Args:
        checkpoint: a folder. A checkpoint there with the same configuration, data and initial weights (they name the
            file) is continued or, if it is complete, used as it is.
        metrics: gets a row after every epoch; what a checkpoint has, too.

    Raises:
        ModelError: a model that cannot be built.
        TrainingError: a checkpoint that cannot be read or written; a loss that is not finite.
    """
    model = _build(config, dataset)
    initial = files.state_digest(model.state_dict())
    identity = {**config.pretraining(), "dataset": dataset.digest, "initial_weights": initial}
    path = None
    if checkpoint is not None:
        files.prepare_folder(Path(checkpoint))
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        path = Path(checkpoint) / files.file_name(f"pretrain-{config.model}-{key}.pt")
    model.requires_grad_(True)
    fit = Fit(
        config=config,
        phase="pretrain",
        model=model,
        layers={},
        train_images=dataset.pretrain_train,
        test_images=dataset.pretrain_test,
        epochs=config.pretrain_epochs,
        lr=config.pretrain_lr,
        metrics=metrics,
    )
    if path is not None:
        fit.restore(path, identity)
    cached = fit.finished
    fit.run(path, identity, callback)
    state = model.state_dict()
    return Pretrained(state, files.state_digest(state), tuple(fit.rows), cached)


def finetune(
    config: TrainConfig,
    dataset: Dataset,
    pretrained: Pretrained,
    *,
    library: Library | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    callback: EventCallback | None = None,
    metrics: Metrics | None = None,
) -> TrainResult:
    """Fine-tune the last convolutions and the classifier on part B, from pretrained weights.

    Args:
        library: compiled kernels for the filtered backward pass; without it, and for workloads that it lacks,
            PyTorch computes the same.
        checkpoint: a folder; after every epoch the run's state is written there, the trained weights under ``model``.
        resume: continue the run's checkpoint (if there is one) instead of starting over it.

    Raises:
        ModelError: no such layers, or a model that does not fit the weights.
        TrainingError: ``resume`` without ``checkpoint``; a checkpoint that cannot be read or written or is of another
            run; a loss that is not finite.
    """
    _check_folder(config, checkpoint, resume)
    if resume and checkpoint is not None:
        _check_form(config, Path(checkpoint))
    model = _build(config, dataset)
    try:
        model.load_state_dict(pretrained.state)
    except RuntimeError as error:
        raise ModelError(f"the pretrained weights do not fit {config.model!r}: {str(error).splitlines()[0]}") from None
    names = _last(model, config, dataset)
    head = freeze(model, names, config.train_bn_affine)
    if config.patch is not None:
        patch, means = _patch(config), config.chain_means
        chosen = set(names)
        filter_model(
            model, patch, layers=lambda name, _: name in chosen, library=library, chain=config.chained, means=means
        )
    if checkpoint is not None:
        files.prepare_folder(Path(checkpoint))
    cache, cache_report = build_cache(
        config,
        model,
        dataset.finetune_train,
        dataset.finetune_test,
        training_mode=partial(training_mode, model, "finetune"),
        precision=partial(precision, config),
        digest=dataset.digest,
        folder=None if checkpoint is None else Path(checkpoint),
    )
    modules = dict(model.named_modules())
    fit = Fit(
        config=config,
        phase="finetune",
        model=model,
        layers={name: modules[name] for name in names},
        train_images=dataset.finetune_train,
        test_images=dataset.finetune_test,
        epochs=config.epochs,
        lr=config.lr,
        cache=cache,
        metrics=metrics,
    )
    initial_accuracy = fit.test_score()
    path = None
    identity = {**_identity(config, dataset), "pretrained": pretrained.digest}
    if checkpoint is not None:
        path = _path(config, Path(checkpoint))
        if resume:
            fit.restore(path, identity)
    resumed = len(fit.rows)
    fit.run(path, identity, callback)
    parameters = list(model.parameters())
    kernels, missing = dict.fromkeys(names, "exact"), tuple[str, ...]()
    if config.patch is not None:
        kernels, missing = _kernels(fit, names, config, library)
    return TrainResult(
        config=config,
        machine=cpu.describe(),
        threads=torch.get_num_threads(),
        versions=cpu.versions(),
        dataset={
            "name": dataset.name,
            "classes": list(dataset.classes),
            "images": dataset.sizes,
            "digest": dataset.digest,
        },
        task=fit.objective.name,
        metric=fit.objective.metric,
        parameters=sum(p.numel() for p in parameters),
        trained_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        trained_layers=tuple(names),
        head=head,
        library=None if library is None else {"path": str(library.path), "digest": library.digest},
        kernels=kernels,
        missing_workloads=missing,
        pretrain_rows=pretrained.rows,
        pretrain_cached=pretrained.cached,
        pretrained_digest=pretrained.digest,
        initial_test_accuracy=initial_accuracy,
        rows=tuple(fit.rows),
        resumed=resumed,
        model=model,
        cache=cache_report.to_dict(),
        best_epoch=fit.best_epoch,
        chains=fit.chains,
    )


def _build(config: TrainConfig, dataset: Dataset) -> nn.Module:
    with seeded(config.seed, "weights"):
        return build_model(config.model, len(dataset.classes), CHANNELS, config.image_size)


def _patch(config: TrainConfig) -> Pair:
    assert isinstance(config.patch, tuple)  # TrainConfig made it a pair
    return config.patch


def _path(config: TrainConfig, folder: Path) -> Path:
    """The checkpoint of a fine-tuning run: one file per model, data, patch, K and seed."""
    data = Path(config.data).stem or "data"
    name = f"finetune-{config.model}-{data}-{config.variant}-last{config.last}-seed{config.seed}.pt"
    return folder / files.file_name(name)


def _identity(config: TrainConfig, dataset: Dataset) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued.

    Neither the number of threads nor the library nor the cache: a run may go on with others, then equal to rounding
    errors. Whether broken pictures are errors neither, only which pictures there are.
    """
    settings = {name: value for name, value in config.to_dict().items() if name not in ("cache", "strict")}
    return {**settings, "dataset": dataset.digest}


def _check_folder(config: TrainConfig, checkpoint: str | Path | None, resume: bool) -> None:
    """Raise TrainingError for what needs the checkpoint folder where there is none."""
    if resume and checkpoint is None:
        raise TrainingError("resuming needs the checkpoint folder of the run")
    if config.cache == "disk" and checkpoint is None:
        raise TrainingError("cache 'disk' keeps its files in the checkpoint folder: name one, or use 'memory'")


def _check_resumable(config: TrainConfig, dataset: Dataset, folder: Path) -> None:
    """Refuse a checkpoint of another configuration before hours of pretraining, not after."""
    path, identity = _path(config, folder), _identity(config, dataset)
    content = files.load(path)
    if content is not None:
        found = content.get("identity")
        files.check_same(path, {key: found.get(key) for key in identity} if isinstance(found, dict) else {}, identity)
    _check_form(config, folder)


def _check_form(config: TrainConfig, folder: Path) -> None:
    """Refuse to begin a chained run where only the one without chains can be continued: it was the default once."""
    other = _path(replace(config, chain=False), folder)
    if config.chained and other.exists() and not _path(config, folder).exists():
        raise TrainingError(
            f"{str(folder)!r} has no checkpoint of {config.variant!r} to resume, but one without chains "
            f"({other.name}): continue that one with --no-chain (chain=False), or do not resume"
        )


def freeze(model: nn.Module, layers: list[str], train_bn_affine: bool = False) -> str | None:
    """Leave only the named convolutions, the last linear layer and, if asked, the batch norms after the first of
    these convolutions trainable. Returns the linear layer's name, None if there is none."""
    head = None
    after = False
    trained: set[int] = set()
    for name, module in model.named_modules():
        after = after or name in layers
        if isinstance(module, nn.Linear):
            head = name
        if name in layers or (train_bn_affine and after and is_batch_norm(module)):
            trained.update(id(p) for p in module.parameters())
    if head is not None:
        trained.update(id(p) for p in model.get_submodule(head).parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return head


def _kernels(
    fit: Fit, layers: list[str], config: TrainConfig, library: Library | None
) -> tuple[dict[str, str], tuple[str, ...]]:
    """What computes the gradients of each layer, and the keys of the workloads that the library lacks."""
    found, chained = fit.filtered, {name for chain in fit.chains for name in chain}
    filtered = [name for name in layers if name in found]
    sources = {name: "torch" if name in filtered else "exact" for name in layers}
    missing: dict[str, None] = {}
    if library is not None and filtered:
        shape = (config.batch, CHANNELS, config.image_size, config.image_size)
        for case in model_cases(fit.model, shape, layers=filtered, patches=[_patch(config)]):
            case = case if config.amp == "off" else replace(case, dtype=config.amp)
            for in_chain in (False, True):
                names = [name for name in case.layers if (name in chained) == in_chain]
                wanted = [w for w in workloads_of([case], in_chain) if names and w.kernel not in _UNUSED[in_chain]]
                lacking = [w.key for w in wanted if library.find(w.kernel, w.geometry, w.dtype) is None]
                missing.update(dict.fromkeys(lacking))
                sources.update(dict.fromkeys(names, "torch" if lacking else "tvm"))
    return sources, tuple(missing)


#: What a convolution can do without: `backward` serves where its specialised form is not in the library, and in a chain
#: (True) the products are kernels of their own.
_UNUSED = {False: ("backward_weight",), True: ("backward", "backward_weight")}

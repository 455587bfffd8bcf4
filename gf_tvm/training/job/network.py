"""The network of a job: built, with weights, and a classifier of as many classes as the data have."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import ModelError
from ...models import (
    MODELS,
    Preprocessing,
    Weights,
    build_model,
    find_weights,
    load_weights,
    logits_of,
    replace_classifier,
)
from ...models.preprocessing import of_folder, of_model
from ...models.weights import IMAGENET
from ..data import CHANNELS
from ..loop import seeded
from .config import JobConfig
from .saved import is_saved, load_model, load_transformers


@dataclass(frozen=True)
class Network:
    """A network that is ready to be fine-tuned.

    Attributes:
        model: with the weights.
        name: by which :func:`gf_tvm.models.build_model` makes it, or ``transformers``.
        built_for: pixels per side of the images that it was built for.
        preprocessing: what it sees of a picture.
        how: one line each: where the weights are from, whether the classifier is a new one.
    """

    model: nn.Module
    name: str
    built_for: int
    preprocessing: Preprocessing
    how: tuple[str, ...]


def build_network(config: JobConfig, classes: tuple[str, ...]) -> Network:
    """Build the network of a job.

    Raises:
        ModelError: it cannot be built, the weights do not fit, or its output is not one logit for each class.
    """
    folder = Path(config.model)
    with seeded(config.seed, "weights"):
        if ":" not in config.model and folder.is_dir():
            network = _from_folder(config, folder, classes)
        else:
            network = _built(config, len(classes))
        return _with_classes(network, len(classes))


def _sized(preprocessing: Preprocessing, config: JobConfig) -> Preprocessing:
    return preprocessing if config.image_size is None else preprocessing.at(config.image_size)


def _from_folder(config: JobConfig, folder: Path, classes: tuple[str, ...]) -> Network:
    if config.weights is not None:
        raise ModelError(f"the folder {config.model!r} has weights of its own: leave out --weights {config.weights}")
    if is_saved(folder):
        saved = load_model(folder)
        preprocessing = _sized(saved.preprocessing, config)
        return Network(saved.model, saved.name, saved.built_for, preprocessing, (f"weights of {config.model!r}",))
    model, before = load_transformers(folder, len(classes))
    how = [f"weights of {config.model!r} (transformers)"]
    if before != len(classes):
        how.append(_replaced(before, len(classes)))
    preprocessing = _sized(of_folder(folder) or Preprocessing(), config)
    return Network(model, "transformers", preprocessing.size, preprocessing, tuple(how))


def _built(config: JobConfig, classes: int) -> Network:
    found = _weights(config)
    preprocessing = Preprocessing() if found is None or found.preprocessing is None else found.preprocessing
    preprocessing = _sized(preprocessing, config)
    built_for = preprocessing.size
    model = build_model(config.model, classes, CHANNELS, built_for)
    if (found is None or found.preprocessing is None) and (said := of_model(model)) is not None:
        preprocessing = _sized(said, config)
    how = ["random weights" if found is None and ":" not in config.model else "the model's own weights"]
    if found is not None:
        replaced = load_weights(model, found)
        how = [f"weights: {found.source}"]
        if replaced is not None:
            how.append(_replaced(replaced, classes))
    return Network(model, config.model, built_for, preprocessing, tuple(how))


def _weights(config: JobConfig) -> Weights | None:
    """The weights that are asked for; None for random ones or a factory's own. Raises ModelError."""
    if config.weights == "none":
        return None
    if config.weights is not None:
        return find_weights(config.weights, config.model)
    if ":" in config.model:
        return None
    if config.model in IMAGENET:
        return find_weights("imagenet", config.model)
    if re.sub(r"_\d{3}$", "", config.model) in MODELS:
        raise ModelError(
            f"{config.model!r} has random weights, and fine-tuning needs trained ones: name a file (--weights FILE), "
            f"or take a network with a package of them ({', '.join(IMAGENET)}); --weights none trains from random ones"
        )
    return None  # an unknown name, which build_model explains


def _replaced(before: int | None, after: int) -> str:
    was = "" if before is None else f" instead of {before}"
    return f"a new classifier: {after} classes{was}"


def _with_classes(network: Network, classes: int) -> Network:
    """The network, with another classifier if it does not have one logit for each class. Raises ModelError."""
    found = _logits(network)
    if found == classes:
        return network
    before = replace_classifier(network.model, classes)
    if (found := _logits(network)) != classes:
        raise ModelError(f"{network.name!r} gives {found} logits for {classes} classes")
    return replace(network, how=(*network.how, _replaced(before, classes)))


def _logits(network: Network) -> int:
    """How many logits it gives for an image. Raises ModelError."""
    size = network.preprocessing.size
    x = torch.zeros(2, CHANNELS, size, size)
    network.model.eval()
    try:
        with torch.no_grad():
            output: Any = network.model(x)
    except Exception as error:  # the model is the user's code
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{network.name!r} does not run on images of shape {tuple(x.shape)}: {reason}") from error
    return int(logits_of(output).shape[1])

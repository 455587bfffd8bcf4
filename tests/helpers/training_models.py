"""Networks for the tests of training, named as ``training_models:factory``; and a data set to train them on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def tiny(num_classes: int) -> nn.Module:
    """Two convolutions, batch norms, dropout and a classifier: everything that training treats on its own."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Dropout(0.1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, num_classes)),
    )


def pointwise(num_classes: int) -> nn.Module:
    """1x1 convolutions only: filtered with patch 1 they have the exact gradients."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, num_classes)),
    )


class _ByValues(nn.Module):
    """Python code that depends on values: torch.fx cannot trace it, and Dynamo ends a graph there."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.last(torch.relu(self.first(x)))
        if h.mean() > 1e6:
            h = -h
        logits: Tensor = self.head(h.mean(dim=(2, 3)))
        return logits


def not_traceable(num_classes: int) -> nn.Module:
    return _ByValues(num_classes)


class SubclassedConv(nn.Conv2d):
    """A convolution with a class of its own: filtered where it is captured."""


def subclassed(num_classes: int) -> nn.Module:
    """The last convolution is a subclass of Conv2d."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), SubclassedConv(8, 8, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)),
    )


class _Complex(nn.Module):
    """A convolution with complex weights, which cannot be filtered."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3, padding=1, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.view_as_real(self.conv(x.to(torch.complex64)))
        return y.sum(-1)


def half_filterable(num_classes: int) -> nn.Module:
    """The last convolution cannot be filtered."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), _Complex(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)),
    )


def not_filterable(num_classes: int) -> nn.Module:
    """Its only convolution cannot be filtered."""
    return nn.Sequential(_Complex(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


def no_convolutions(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))


def no_head(num_classes: int) -> nn.Module:
    """Its classifier is a convolution."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, num_classes, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


def two_classes() -> nn.Module:
    return tiny(2)


def wants_wide_images(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(100, num_classes))


class _Map(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


def segmentation(num_classes: int) -> nn.Module:
    return _Map()


def explodes(num_classes: int) -> nn.Module:
    """Its loss is not finite from the first step."""
    model = tiny(num_classes)
    with torch.no_grad():
        model[-1].weight.fill_(float("nan"))  # type: ignore[index, operator, union-attr]
    return model


def transformers_mobilenetv2(num_classes: int, image_size: int) -> nn.Module:
    """Hugging Face's MobileNetV2 with random weights, small enough to train in a test."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return MobileNetV2ForImageClassification(
        MobileNetV2Config(num_labels=num_classes, image_size=image_size, depth_multiplier=0.1, output_stride=8)
    )


def transformers_resnet(num_classes: int) -> nn.Module:
    """Hugging Face's ResNet with random weights, small enough to train in a test."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16], depths=[1, 1, 1], layer_type="basic", num_labels=num_classes
    )
    return ResNetForImageClassification(config)


def patterns(path: Path, per_class: int = 40, size: int = 8, classes: int = 4) -> str:
    """Write an ``.npz`` of grey images, one bright quarter per class and noise, that a tiny network learns."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(classes), per_class)
    x = rng.normal(0, 0.3, (len(y), size, size)).astype(np.float32)
    half = size // 2
    for image, label in zip(x, y, strict=True):
        top, left = divmod(int(label), 2)
        image[top * half : (top + 1) * half, left * half : (left + 1) * half] += np.linspace(0.5, 1.5, half)[:, None]
    np.savez(path, x=x, y=y)
    return str(path)


def state_of(checkpoint: Path) -> dict[str, Any]:
    """The weights in a checkpoint."""
    content: dict[str, Any] = torch.load(checkpoint, weights_only=True)
    weights: dict[str, Any] = content["model"]
    return weights

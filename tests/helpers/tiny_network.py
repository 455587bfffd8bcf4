"""A network that a virtual Pi trains in seconds: three convolutions on 8 x 8 images."""

from __future__ import annotations

from torch import nn


def tiny(num_classes: int, in_channels: int) -> nn.Module:
    """For ``--model tiny_network:tiny``."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, num_classes),
    )

"""Segmentation networks: four heads on the trunks of the classifiers.

Sources: FCN: Long, Shelhamer, Darrell, CVPR 2015; PSPNet: Zhao, Shi, Qi, Wang, Jia, "Pyramid Scene Parsing Network",
CVPR 2017; DeepLabV3: Chen, Papandreou, Schroff, Adam, "Rethinking Atrous Convolution for Semantic Image
Segmentation", 2017; UPerNet: Xiao, Liu, Zhou, Jiang, Sun, "Unified Perceptual Parsing for Scene Understanding", ECCV
2018. Of FCN it is the form without skip connections that became usual on dilated trunks.

The classifier of a pixel is a linear layer over its channels. That is a 1x1 convolution by another name: so the last
K convolutions are those of head and trunk, as in a classifier, and none of them depends on the number of classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .classification import build_trunk
from .layers import SMALL_IMAGE, Strides, conv, initialise, scaled

#: A dilated trunk reduces images by this much, as the papers' networks do; small images, which have no stem stride
#: and no pooling either, by half of it.
OUTPUT_STRIDE = 8

#: Sides, in cells, of the maps that pyramid pooling averages to (PSPNet, section 3.2).
POOLED = (1, 2, 3, 6)

#: Rates of the atrous spatial pyramid at output stride 8 on maps of ``RATES_MAP`` pixels (DeepLabV3, section 4).
RATES, RATES_MAP = (12, 24, 36), 64


def _unit(ci: int, co: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(conv(ci, co, kernel, dilation=dilation), nn.BatchNorm2d(co), nn.ReLU())


def _pooled(ci: int, co: int, cells: int) -> nn.Sequential:
    """The map averaged to ``cells`` x ``cells``, then 1x1. One cell of one image has no statistics: no batch norm."""
    if cells == 1:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(ci, co, 1), nn.ReLU())
    return nn.Sequential(nn.AdaptiveAvgPool2d(cells), *_unit(ci, co, 1))


def _resized(x: Tensor, like: Tensor) -> Tensor:
    """``x`` enlarged (bilinear) to the height and width of ``like``."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


class FCNHead(nn.Module):
    """Two 3x3 convolutions on the last map."""

    dilated = True

    def __init__(self, channels: tuple[int, ...], co: int, map_size: int) -> None:
        """``channels``: of the trunk's maps; ``co``: of the result; ``map_size``: pixels per side of the last map."""
        super().__init__()
        self.layers = nn.Sequential(_unit(channels[-1], co, 3), _unit(co, co, 3))

    def forward(self, maps: list[Tensor]) -> Tensor:
        """The trunk's maps -> (n, co, h, w) of the last map's size."""
        y: Tensor = self.layers(maps[-1])
        return y


class PyramidPooling(nn.Module):
    """The map and its averages over ever smaller regions, joined by a 3x3 convolution (PSPNet)."""

    def __init__(self, ci: int, co: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(_pooled(ci, co, cells) for cells in POOLED)
        self.join = _unit(ci + len(POOLED) * co, co, 3)

    def forward(self, x: Tensor) -> Tensor:
        """x (n, ci, h, w) -> (n, co, h, w)."""
        y: Tensor = self.join(torch.cat([x, *(_resized(branch(x), x) for branch in self.branches)], dim=1))
        return y


class PSPHead(nn.Module):
    """Pyramid pooling of the last map (PSPNet)."""

    dilated = True

    def __init__(self, channels: tuple[int, ...], co: int, map_size: int) -> None:
        """Arguments as for :class:`FCNHead`."""
        super().__init__()
        self.pyramid = PyramidPooling(channels[-1], co)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """The trunk's maps -> (n, co, h, w) of the last map's size."""
        y: Tensor = self.pyramid(maps[-1])
        return y


class DeepLabV3Head(nn.Module):
    """Atrous spatial pyramid pooling: 1x1, three dilated 3x3 convolutions and the image's mean, joined.

    The rates shrink with the map, down to 2, 3 and 4: a 3x3 kernel that is dilated beyond the map is a 1x1 one
    (DeepLabV3, section 3.3).
    """

    dilated = True

    def __init__(self, channels: tuple[int, ...], co: int, map_size: int) -> None:
        """Arguments as for :class:`FCNHead`."""
        super().__init__()
        ci, share = channels[-1], min(map_size / RATES_MAP, 1.0)
        self.rates = tuple(max(number, round(rate * share)) for number, rate in enumerate(RATES, start=2))
        self.branches = nn.ModuleList([_unit(ci, co, 1), *(_unit(ci, co, 3, rate) for rate in self.rates)])
        self.mean = _pooled(ci, co, 1)
        self.join = _unit((len(RATES) + 2) * co, co, 1)
        self.last = _unit(co, co, 3)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """The trunk's maps -> (n, co, h, w) of the last map's size."""
        x = maps[-1]
        joined = self.join(torch.cat([*(branch(x) for branch in self.branches), _resized(self.mean(x), x)], dim=1))
        y: Tensor = self.last(joined)
        return y


class UPerHead(nn.Module):
    """A feature pyramid over all maps, its top from pyramid pooling, fused at the largest map (UPerNet)."""

    dilated = False

    def __init__(self, channels: tuple[int, ...], co: int, map_size: int) -> None:
        """Arguments as for :class:`FCNHead`."""
        super().__init__()
        self.pyramid = PyramidPooling(channels[-1], co)
        self.lateral = nn.ModuleList(_unit(ci, co, 1) for ci in channels[:-1])
        self.smooth = nn.ModuleList(_unit(co, co, 3) for _ in channels[:-1])
        self.fuse = _unit(len(channels) * co, co, 3)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """The trunk's maps -> (n, co, h, w) of the first map's size."""
        top = self.pyramid(maps[-1])
        levels = [top]
        for x, lateral in zip(reversed(maps[:-1]), reversed(self.lateral), strict=True):
            side = lateral(x)
            top = side + _resized(top, side)
            levels.append(top)
        levels.reverse()
        smoothed = [smooth(level) for smooth, level in zip(self.smooth, levels[:-1], strict=True)]
        fused: Tensor = self.fuse(torch.cat([_resized(level, levels[0]) for level in (*smoothed, levels[-1])], dim=1))
        return fused


Head = FCNHead | PSPHead | DeepLabV3Head | UPerHead

#: Heads by the first part of a network's name.
HEADS: dict[str, type[Head]] = {
    "fcn": FCNHead,
    "pspnet": PSPHead,
    "deeplabv3": DeepLabV3Head,
    "upernet": UPerHead,
}


class SegmentationNetwork(nn.Module):
    """A head on a trunk, and a linear classifier of pixels.

    Args:
        head, trunk: keys of ``HEADS`` and of :data:`~.classification.TRUNKS`.
        num_classes, in_channels: logits and input channels.
        image_size: pixels per side; decides which strides the trunk keeps. The last map of a dilated trunk (all but
            UPerNet's) is an eighth of the image, below ``SMALL_IMAGE`` pixels a quarter.
        width: multiplies all channel counts.
    """

    #: Channels of the heads at width 1, a quarter of ResNet-18's last map.
    HEAD_CHANNELS = 128

    def __init__(
        self,
        head: str,
        trunk: str,
        num_classes: int,
        in_channels: int = 3,
        image_size: int = 64,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        kind, co = HEADS[head], scaled(width, self.HEAD_CHANNELS)
        output_stride = OUTPUT_STRIDE if image_size >= SMALL_IMAGE else OUTPUT_STRIDE // 2
        strides = Strides(image_size, output_stride=output_stride if kind.dilated else None)
        self.trunk = build_trunk(trunk, in_channels, image_size, width, strides)
        self.head = kind(self.trunk.channels, co, -(-image_size // strides.total))
        self.classifier = nn.Linear(co, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, in_channels, h, w) -> logits (n, num_classes, h, w), bilinear between the pixels of the map."""
        y = self.head(self.trunk.maps(x))
        logits = self.classifier(y.movedim(1, -1)).movedim(-1, 1)
        return _resized(logits, x)

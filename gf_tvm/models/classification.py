"""Image classifiers, and their trunks, which segmentation networks share.

Sources: MobileNetV2: Sandler et al., CVPR 2018, table 2. ResNet-18 and ResNet-34: He et al., CVPR 2016, table 1.
MCUNet: Lin, Chen, Lin, Cohn, Gan, Han, "MCUNet: Tiny Deep Learning on IoT Devices", NeurIPS 2020; the paper shows its
networks as figures, so the table is that of the authors' model zoo. EfficientNet-Lite0: Tan, Le, "EfficientNet:
Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019, table 1 (B0), without squeeze and excitation and
with ReLU6, as its authors published it for devices (tensorflow/tpu, efficientnet/lite).

Parameters are named as in torchvision's networks, so that its published weights load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from .layers import LAST_MAP, SMALL_IMAGE, BasicBlock, InvertedResidual, Norm, Strides, conv, initialise, scaled, unit

#: (expansion, channels, kernel size, nominal stride) of an inverted residual.
Block = tuple[int, int, int, int]

#: Of the features before the classifier, while training; as the networks were published.
DROPOUT = 0.2

#: TensorFlow's defaults in the networks that were trained there.
_LITE_NORM = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


class InvertedResidualTrunk(nn.Module):
    """A 3x3 stem and inverted residuals.

    Attributes:
        channels: of the maps that :meth:`maps` gives.
    """

    def __init__(
        self,
        stem: int,
        blocks: Sequence[Block],
        in_channels: int,
        width: float,
        strides: Strides,
        stem_stride: int,
        norm: Norm = nn.BatchNorm2d,
        same: int | None = None,
    ) -> None:
        """``stem``, ``blocks``: channels at width 1. ``stem_stride``: 2, or 1 for a small image. ``norm``, ``same``: as
        for :func:`~.layers.unit`; ``same`` is the images' size."""
        super().__init__()
        channels = scaled(width, stem)
        first = strides.take(stem_stride)
        layers: list[nn.Module] = [unit(in_channels, channels, 3, first, norm=norm, same=same)]
        size = None if same is None else -(-same // first)
        self._ends: dict[int, int] = {}  # layer after which a map of the pyramid is complete -> its channels
        for number, (expansion, block_channels, kernel, nominal) in enumerate(blocks):
            if nominal > 1 and any(b[3] > 1 for b in blocks[:number]):
                self._ends[len(layers) - 1] = channels
            dilation = strides.dilation  # a strided block that loses its stride keeps the dilation before it
            stride = strides.take(nominal)
            co = scaled(width, block_channels)
            layers.append(InvertedResidual(channels, co, stride, expansion, kernel, dilation, norm, size))
            channels, size = co, None if size is None else -(-size // stride)
        self._ends[len(layers) - 1] = channels
        self.channels = tuple(self._ends.values())
        self.features = nn.Sequential(*layers)

    def maps(self, x: Tensor) -> list[Tensor]:
        """Images (n, c, h, w) -> the maps before each reduction but the first, and the last map."""
        found = []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self._ends:
                found.append(x)
        return found


def _repeated(stages: Sequence[tuple[int, int, int, int]]) -> list[Block]:
    """The blocks of (expansion, channels, blocks, stride of the first block), all 3x3."""
    return [(t, c, 3, s if i == 0 else 1) for t, c, n, s in stages for i in range(n)]


class MobileNetV2(InvertedResidualTrunk):
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
        strides, stem_stride = Strides(image_size), 2 if image_size >= SMALL_IMAGE else 1
        super().__init__(32, _repeated(self.STAGES), in_channels, width, strides, stem_stride)
        last = scaled(width, 1280)
        self.features.append(unit(self.channels[-1], last, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(last, num_classes))
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, in_channels, h, w) -> logits (n, num_classes)."""
        logits: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return logits


class EfficientNetLite0(InvertedResidualTrunk):
    """EfficientNet-Lite0: EfficientNet-B0 for devices, without gates and with ReLU6. Arguments as for
    :class:`MobileNetV2`.

    Padded as in TensorFlow, where it was trained: at stride 2 the odd row and column of zeros come after the map.
    """

    #: (expansion, channels, blocks, kernel size, stride of the first block).
    STAGES = (
        *((1, 16, 1, 3, 1), (6, 24, 2, 3, 2), (6, 40, 2, 5, 2), (6, 80, 3, 3, 2)),
        *((6, 112, 3, 5, 1), (6, 192, 4, 5, 2), (6, 320, 1, 3, 1)),
    )
    BLOCKS = tuple((t, c, k, s if i == 0 else 1) for t, c, n, k, s in STAGES for i in range(n))

    def __init__(self, num_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0) -> None:
        strides, stem_stride = Strides(image_size), 2 if image_size >= SMALL_IMAGE else 1
        super().__init__(32, self.BLOCKS, in_channels, width, strides, stem_stride, _LITE_NORM, image_size)
        last = scaled(width, 1280)
        self.features.append(unit(self.channels[-1], last, 1, norm=_LITE_NORM))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(last, num_classes))
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, in_channels, h, w) -> logits (n, num_classes)."""
        logits: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return logits


class MCUNet(InvertedResidualTrunk):
    """MCUNet for 5 images a second on an STM32F746 (Lin et al. 2020): 0.64 M parameters, 12.8 M multiplications at 96.

    Arguments as for :class:`MobileNetV2`. From ``RESOLUTION`` pixels on it has the published strides (96 pixels give
    3x3 maps at the end), below it those that small images keep.
    """

    #: From this image size on the network is the published one; it was searched for images of that size.
    RESOLUTION = 96

    #: (expansion, channels, kernel size, stride): ``mcunet-5fps_imagenet.json`` of the authors' model zoo
    #: (github.com/mit-han-lab/mcunet, ``mcunet-in1``). The stem has 16 channels; no convolution follows the blocks.
    BLOCKS = (
        *((1, 8, 3, 1), (4, 16, 3, 2), (3, 16, 3, 1), (3, 24, 7, 2), (5, 24, 3, 1), (5, 40, 3, 2), (4, 40, 7, 1)),
        *((4, 48, 5, 1), (3, 48, 3, 1), (4, 48, 3, 1), (5, 96, 7, 2), (4, 96, 5, 1), (4, 96, 5, 1), (6, 160, 3, 1)),
    )

    def __init__(self, num_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0) -> None:
        published = image_size >= self.RESOLUTION
        strides = Strides(image_size, 3 if published else LAST_MAP)
        super().__init__(16, self.BLOCKS, in_channels, width, strides, 2 if published else 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(self.channels[-1], num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, in_channels, h, w) -> logits (n, num_classes)."""
        logits: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return logits


class ResNetTrunk(nn.Module):
    """A stem and four stages of basic blocks.

    Attributes:
        channels: of the maps that :meth:`maps` gives.
    """

    def __init__(self, blocks: Sequence[int], in_channels: int, image_size: int, width: float, strides: Strides):
        """``blocks``: in each stage."""
        super().__init__()
        ci = scaled(width, 64)
        self.conv1: nn.Module
        self.pool: nn.Module = nn.Identity()
        if image_size >= SMALL_IMAGE:
            self.conv1 = conv(in_channels, ci, 7, strides.take(2))
            if strides.take(2) == 2:
                self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = conv(in_channels, ci, 3)
        self.bn1 = nn.BatchNorm2d(ci)
        self.relu = nn.ReLU()
        self.channels = tuple(scaled(width, channels) for channels in (64, 128, 256, 512))
        stages: list[nn.Module] = []
        for (before, co), nominal, count in zip(pairwise((ci, *self.channels)), (1, 2, 2, 2), blocks, strict=True):
            dilation = strides.dilation  # the first block of a stage that loses its stride keeps the one before
            first = BasicBlock(before, co, strides.take(nominal), dilation)
            stages.append(nn.Sequential(first, *(BasicBlock(co, co, 1, strides.dilation) for _ in range(count - 1))))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages

    def maps(self, x: Tensor) -> list[Tensor]:
        """Images (n, c, h, w) -> the four stages' maps."""
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        found = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            found.append(x)
        return found


class ResNet18(ResNetTrunk):
    """ResNet-18 (He et al. 2016).

    Args:
        num_classes, in_channels: logits and input channels.
        image_size: pixels per side; decides which strides are kept (32: a 3x3 stem at stride 1, no pooling, 8x8 maps
            at the end).
        width: multiplies all channel counts.
    """

    #: Blocks in each stage.
    BLOCKS = (2, 2, 2, 2)

    def __init__(self, num_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0) -> None:
        super().__init__(self.BLOCKS, in_channels, image_size, width, Strides(image_size))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(self.channels[-1], num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, in_channels, h, w) -> logits (n, num_classes)."""
        logits: Tensor = self.fc(self.avgpool(self.maps(x)[-1]).flatten(1))
        return logits


class ResNet34(ResNet18):
    """ResNet-34 (He et al. 2016); arguments as for :class:`ResNet18`."""

    BLOCKS = (3, 4, 6, 3)


def build_trunk(name: str, in_channels: int, image_size: int, width: float, strides: Strides) -> Trunk:
    """The trunk of the classifier ``name`` (a key of ``TRUNKS``), its strides given by ``strides``."""
    kind = TRUNKS[name]
    if issubclass(kind, ResNet18):
        return ResNetTrunk(kind.BLOCKS, in_channels, image_size, width, strides)
    stem_stride = 2 if image_size >= SMALL_IMAGE else 1
    if kind is EfficientNetLite0:
        blocks = EfficientNetLite0.BLOCKS
        return InvertedResidualTrunk(32, blocks, in_channels, width, strides, stem_stride, _LITE_NORM, image_size)
    stem, stages = (16, MCUNet.BLOCKS) if kind is MCUNet else (32, _repeated(MobileNetV2.STAGES))
    return InvertedResidualTrunk(stem, stages, in_channels, width, strides, stem_stride)


Trunk = ResNetTrunk | InvertedResidualTrunk

#: The classifiers whose trunks segmentation networks can have.
TRUNKS: dict[str, type[Trunk]] = {
    "mobilenetv2": MobileNetV2,
    "resnet18": ResNet18,
    "resnet34": ResNet34,
    "mcunet": MCUNet,
    "efficientnet_lite0": EfficientNetLite0,
}

"""The blocks of the built-in networks, and which strides these keep for small images.

Sources: the inverted residual: Sandler, Howard, Zhu, Zhmoginov, Chen, "MobileNetV2: Inverted Residuals and Linear
Bottlenecks", CVPR 2018; the basic block: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR
2016; dilation in place of strides: Chen, Papandreou, Schroff, Adam, "Rethinking Atrous Convolution for Semantic Image
Segmentation", 2017 (DeepLabV3), section 3.2.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

#: Makes a batch norm of so many channels.
Norm = Callable[[int], nn.Module]

#: Below this image size (pixels) a network starts at full resolution, without the papers' stem stride and pooling.
SMALL_IMAGE = 128

#: The papers reduce 224 pixels to 7; smaller images are reduced as long as the last map keeps this many pixels.
LAST_MAP = 7


class Strides:
    """Hands out the strides of a network in forward order until the last map would become too small.

    Attributes:
        total: product of the strides handed out so far.
        dilation: of the convolutions that follow; above 1 only in a dilated network.
    """

    def __init__(self, image_size: int, last_map: int = LAST_MAP, output_stride: int | None = None) -> None:
        """``output_stride``: a dilated network, whose strides beyond that product become dilation."""
        self.left = max(image_size // last_map, 1)
        self.dilated = output_stride is not None
        if output_stride is not None:
            self.left = min(self.left, output_stride)
        self.total = self.dilation = 1

    def take(self, stride: int) -> int:
        """``stride`` if the map can still be reduced by it, else 1."""
        if self.left < stride:
            if self.dilated:
                self.dilation *= stride
            return 1
        self.left //= stride
        self.total *= stride
        return stride


def scaled(width: float, channels: int) -> int:
    """``channels`` times ``width``, rounded to a multiple of 8 (at least 8, and at most a tenth less)."""
    rounded = max(8, int(channels * width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels * width else rounded


def conv(
    ci: int, co: int, kernel: int, stride: int = 1, groups: int = 1, dilation: int = 1, padding: int | None = None
) -> nn.Conv2d:
    """A convolution without bias (a batch norm follows) that keeps the map's size, but for the stride.

    ``padding``: where something else pads.
    """
    padding = dilation * (kernel // 2) if padding is None else padding
    return nn.Conv2d(ci, co, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=False)


def initialise(model: nn.Module) -> None:
    """He initialisation of convolutions, small normal weights of the classifier (as the networks' papers train)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)


def same_padding(size: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """What TensorFlow's padding "SAME" puts before and after an axis of ``size`` pixels: the odd pixel comes after."""
    total = max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
    return total // 2, total - total // 2


def unit(
    ci: int,
    co: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
    norm: Norm = nn.BatchNorm2d,
    same: int | None = None,
) -> nn.Sequential:
    """Convolution ``0``, batch norm ``1`` and ReLU6 ``2``, names that torchvision's weights have, too.

    Args:
        same: pixels per side of the input, to be padded as TensorFlow does; where both sides are not padded
            alike, a layer ``pad`` comes first. None for :func:`conv`'s padding.
    """
    layers, padding = OrderedDict[str, nn.Module](), None
    if same is not None:
        before, after = same_padding(same, kernel, stride, dilation)
        if before != after:
            layers["pad"] = nn.ZeroPad2d((before, after, before, after))
        padding = before if before == after else 0
    layers["0"] = conv(ci, co, kernel, stride, groups, dilation, padding)
    layers.update({"1": norm(co), "2": nn.ReLU6()})
    return nn.Sequential(layers)


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter depthwise, project by 1x1 without activation; a residual where shapes allow it."""

    def __init__(
        self,
        ci: int,
        co: int,
        stride: int,
        expansion: int,
        kernel: int = 3,
        dilation: int = 1,
        norm: Norm = nn.BatchNorm2d,
        same: int | None = None,
    ) -> None:
        """``norm``, ``same``: as for :func:`unit`."""
        super().__init__()
        hidden = ci * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(unit(ci, hidden, 1, norm=norm))
        layers.append(unit(hidden, hidden, kernel, stride, hidden, dilation, norm, same))
        layers += [conv(hidden, co, 1), norm(co)]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and ci == co

    def forward(self, x: Tensor) -> Tensor:
        """x (n, ci, h, w) -> (n, co, h / stride, w / stride)."""
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a residual, projected by 1x1 where the shape changes.

    The projection comes first, in the order of registration and of execution: the last convolutions of a stage are
    then its 3x3 ones.
    """

    def __init__(self, ci: int, co: int, stride: int, dilation: int = 1) -> None:
        super().__init__()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or ci != co:
            self.downsample = nn.Sequential(conv(ci, co, 1, stride), nn.BatchNorm2d(co))
        self.conv1 = conv(ci, co, 3, stride, dilation=dilation)
        self.bn1 = nn.BatchNorm2d(co)
        self.conv2 = conv(co, co, 3, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(co)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """x (n, ci, h, w) -> (n, co, h / stride, w / stride)."""
        residual = self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.relu(y + residual)
        return out

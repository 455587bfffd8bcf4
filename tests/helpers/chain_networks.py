"""Random small networks of filtered convolutions and everything that may stand between them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

ACTIVATIONS: dict[str, Any] = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "hardtanh": lambda: nn.Hardtanh(-0.7, 0.9),
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "elu": lambda: nn.ELU(0.8),
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "silu": lambda: nn.SiLU(inplace=True),
    "mish": nn.Mish,
    "gelu": nn.GELU,
    "gelu tanh": lambda: nn.GELU("tanh"),
    "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
    "dropout": lambda: nn.Dropout(0.3),
    "dropout of channels": lambda: nn.Dropout2d(0.3),
    "two": lambda: nn.Sequential(nn.Tanh(), nn.Dropout(0.2), nn.SiLU()),
}
#: Channels of every map between blocks.
CHANNELS = 4


class Unit(nn.Module):
    """Convolution, batch norm, activation."""

    def __init__(self, spec: dict[str, Any], ci: int = CHANNELS, co: int = CHANNELS) -> None:
        super().__init__()
        kernel, stride, dilation = spec["kernel"], spec["stride"], spec["dilation"]
        groups = spec["groups"] if ci % spec["groups"] == co % spec["groups"] == 0 else 1
        padding = spec["padding"] if spec["padding"] is not None else dilation * (kernel // 2)
        self.conv = nn.Conv2d(ci, co, kernel, stride, padding, dilation, groups, bias=spec["bias"])
        self.norm: nn.Module = nn.Identity()
        if spec["norm"] != "none":
            self.norm = nn.BatchNorm2d(co, affine=spec["norm"] != "not affine")
            self.norm.frozen = spec["norm"] != "batch statistics"
            self.norm.trained = spec["norm"] == "trained"
        self.act = ACTIVATIONS[spec["act"]]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


def same_size(spec: dict[str, Any]) -> dict[str, Any]:
    """The unit's specification, changed so that it keeps the map's size."""
    return {**spec, "stride": 1, "padding": None, "kernel": spec["kernel"] // 2 * 2 + 1}


class Residual(nn.Module):
    def __init__(self, first: dict[str, Any], second: dict[str, Any], projected: bool, how: str, act: str) -> None:
        super().__init__()
        first, second = {**same_size(first), "stride": first["stride"] if projected else 1}, same_size(second)
        self.first, self.second = Unit(first), Unit({**second, "act": "identity"})
        shortcut = {**first, "kernel": 1, "dilation": 1, "act": "identity"}
        self.shortcut = Unit(shortcut) if projected else nn.Identity()
        self.how, self.act = how, ACTIVATIONS[act]()

    def forward(self, x: Tensor) -> Tensor:
        y, shortcut = self.second(self.first(x)), self.shortcut(x)
        if self.how == "in place":
            y += shortcut
        elif self.how == "torch.add":
            y = torch.add(y, shortcut, alpha=0.5)
        elif self.how == "minus":
            y = shortcut - y
        else:
            y = y + shortcut
        return self.act(y)


class Inverted(nn.Module):
    """Expand, depthwise, project."""

    def __init__(self, spec: dict[str, Any], residual: bool) -> None:
        super().__init__()
        depthwise = {**same_size(spec), "stride": 1 if residual else spec["stride"], "groups": 6}
        self.layers = nn.Sequential(
            Unit({**spec, "kernel": 1, "stride": 1, "padding": 0, "groups": 1}, CHANNELS, 6),
            Unit(depthwise, 6, 6),
            Unit({**spec, "kernel": 1, "stride": 1, "padding": 0, "groups": 1, "act": "identity"}, 6, CHANNELS),
        )
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class Joined(nn.Module):
    """Branches, joined along the channels."""

    def __init__(self, first: dict[str, Any], second: dict[str, Any], with_input: bool) -> None:
        super().__init__()
        first, second = same_size(first), same_size(second)
        self.first, self.second, self.with_input = Unit(first, CHANNELS, 2), Unit(second, CHANNELS, 3), with_input
        self.last = Unit({**second, "kernel": 1}, 5 + with_input * CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.first(x), self.second(x), *([x] if self.with_input else [])]
        return self.last(torch.cat(maps, 1))


class Halves(nn.Module):
    """One part of the channels is convolved, the other passed on."""

    def __init__(self, spec: dict[str, Any], how: str, act: str) -> None:
        super().__init__()
        self.unit, self.how, self.act = Unit(same_size(spec), 2, 2), how, ACTIVATIONS[act]()

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "chunk":
            a, b = x.chunk(2, dim=1)
        elif self.how == "split":
            a, b = torch.split(x, [2, 2], 1)
        else:
            a, b = x[:, :2], x[:, 2:]
        return self.act(torch.cat([b, self.unit(a)], dim=1))


class Squeeze(nn.Module):
    """Squeeze-excitation."""

    def __init__(self, act: str, method: bool) -> None:
        super().__init__()
        self.reduce, self.act = nn.Conv2d(CHANNELS, 2, 1), ACTIVATIONS[act]()
        self.expand, self.gate = nn.Conv2d(2, CHANNELS, 1, bias=False), nn.Sigmoid()
        self.pool, self.method = nn.AdaptiveAvgPool2d(1), method

    def forward(self, x: Tensor) -> Tensor:
        s = x.mean((2, 3), keepdim=True) if self.method else self.pool(x)
        s = self.gate(self.expand(self.act(self.reduce(s))))
        return s * x if self.method else x * s


class SqueezeLinear(nn.Module):
    """Squeeze-excitation by linear layers, in the ways in which it is written."""

    def __init__(self, act: str, how: str) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Linear(CHANNELS, 2), nn.Linear(2, CHANNELS, bias=False)
        self.act, self.pool, self.how = ACTIVATIONS[act](), nn.AdaptiveAvgPool2d(1), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "mean":
            s = x.mean((2, 3))
        elif self.how == "view":
            b, c, _, _ = x.size()
            s = self.pool(x).view(b, c)
        else:
            s = torch.flatten(self.pool(x), 1)
        s = torch.sigmoid(self.expand(self.act(self.reduce(s))))
        if self.how == "flatten":
            return x * s[:, :, None, None]
        if self.how == "view":
            return x * s.view(b, c, 1, 1).expand_as(x)
        s = s.view(-1, CHANNELS, 1, 1)
        return x * s if self.how == "mean" else x * s + self.pool(x).flatten(1).mean(1)[:, None, None, None]


class Context(nn.Module):
    """The map's mean, convolved, is added everywhere: resizing that is exact on the grid, by a size read on the way."""

    def __init__(self, act: str, mode: str, how: str) -> None:
        super().__init__()
        self.conv, self.act, self.mode, self.how = nn.Conv2d(CHANNELS, CHANNELS, 1), ACTIVATIONS[act](), mode, how

    def forward(self, x: Tensor) -> Tensor:
        mean = self.act(self.conv(F.adaptive_avg_pool2d(x, 1)))
        size = (x.size(2), x.size(-1)) if self.how == "size" else x.shape[-2:]
        y = F.interpolate(mean, size=size, mode=self.mode)
        return F.interpolate(x, size=size, mode=self.mode) + y if self.how == "same size" else x + y


class TopDown(nn.Module):
    """A smaller map enlarged to the size of another one, which is read before that one is used."""

    def __init__(self, first: dict[str, Any], second: dict[str, Any], how: str) -> None:
        super().__init__()
        self.side, self.top, self.last = Unit(same_size(first)), Unit(same_size(second)), Unit(same_size(first))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        side = self.side(x)
        small = F.avg_pool2d(x, 2, ceil_mode=True) if self.how == "pool" else x[:, :, ::2, ::2]
        _, _, h, w = side.size()
        side = side + F.interpolate(self.top(small), size=(h, (w + w) // 2), mode="bilinear")
        return self.last(side)


class Scaled(nn.Module):
    """Constant and trained scales; a hook is an operation like any other."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        if how == "hook":
            self.hooked = nn.ReLU()
            self.hooked.register_forward_hook(lambda module, args, y: y * 0.5)
        if how == "trained":
            self.scale = nn.Parameter(torch.randn(1, CHANNELS, 1, 1))
        if how == "buffer":
            self.register_buffer("scale", torch.randn(CHANNELS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.how in ("trained", "buffer"):
            return x * self.scale
        if self.how == "hook":
            return self.hooked(x)
        return {"times": lambda: 0.7 * x, "divided": lambda: x / 3, "negative": lambda: -x}[self.how]()


class Breaker(nn.Module):
    """What cannot stay on the patch grid."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        if how == "unfiltered":
            self.exact = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        if how == "padding mode":
            self.padded = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, padding_mode="circular")
        if how == "hook":
            self.hooked = nn.ReLU()
            self.hooked.register_forward_hook(lambda module, args, y: y.flip(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "unfiltered":
            return self.exact(x)
        if self.how == "padding mode":
            return self.padded(x)
        if self.how == "hook":
            return self.hooked(x)
        if self.how == "max pool":
            return F.max_pool2d(x, 3, 2, 1)
        if self.how == "resize":
            return F.interpolate(x, scale_factor=1.5, mode="bilinear")
        if self.how == "square":
            return x * x
        if self.how == "side way":
            return x + F.interpolate(F.max_pool2d(x, 2, 2, ceil_mode=True), size=x.shape[-2:])
        return x.transpose(2, 3)


#: And what reports say of it.
BREAKERS = {
    "unfiltered": "blocks.1.exact is not filtered",
    "padding mode": "blocks.1.padded.pad pads in mode 'circular'",
    "hook": "blocks.1.hooked cannot stay on the patch grid",
    "max pool": "do not fit the windows of what comes after it",
    "resize": "blocks.1.upsample_bilinear2d cannot stay on the patch grid",
    "square": "blocks.1.mul multiplies two maps",
    "side way": "do not fit the windows of what comes after it",
    "transpose": "blocks.1.transpose cannot stay on the patch grid",
}


class Twice(nn.Module):
    """One unit, run twice."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self.unit = Unit(same_size(spec))

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(self.unit(x))


class Head(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        if how in ("pool", "mean"):
            self.pool, self.linear = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(CHANNELS, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "pool":
            return self.linear(torch.flatten(self.pool(x), 1))
        if self.how == "mean":
            return self.linear(x.mean([2, 3]))
        return x


UNITS = st.fixed_dictionaries(
    {
        "kernel": st.sampled_from([3, 3, 1, 2, 5]),
        "stride": st.sampled_from([1, 1, 1, 2, 3]),
        "dilation": st.sampled_from([1, 1, 1, 2, 3]),
        "padding": st.sampled_from([None, None, None, 0, 1, 3]),
        "groups": st.sampled_from([1, 1, 2, 4]),
        "bias": st.booleans(),
        "norm": st.sampled_from(["trained", "trained", "frozen", "frozen", "not affine", "none", "batch statistics"]),
        "act": st.sampled_from([*ACTIVATIONS, "relu"]),
    }
)
BLOCKS = st.one_of(
    st.builds(Unit, UNITS),
    st.builds(
        Residual,
        UNITS,
        UNITS,
        st.booleans(),
        st.sampled_from(["plus", "in place", "torch.add", "minus"]),
        st.sampled_from([*ACTIVATIONS]),
    ),
    st.builds(lambda a, b, act: Residual(a, b, False, "plus", act), UNITS, UNITS, st.sampled_from([*ACTIVATIONS])),
    st.builds(Inverted, UNITS, st.booleans()),
    st.builds(Joined, UNITS, UNITS, st.booleans()),
    st.builds(Halves, UNITS, st.sampled_from(["chunk", "split", "slice"]), st.sampled_from([*ACTIVATIONS])),
    st.builds(Squeeze, st.sampled_from([*ACTIVATIONS]), st.booleans()),
    st.builds(
        SqueezeLinear,
        st.sampled_from([act for act in ACTIVATIONS if act != "dropout of channels"]),
        st.sampled_from(["mean", "view", "flatten", "used elsewhere"]),
    ),
    st.builds(
        Context,
        st.sampled_from([*ACTIVATIONS]),
        st.sampled_from(["nearest", "bilinear", "area"]),
        st.sampled_from(["shape", "size", "same size"]),
    ),
    st.builds(TopDown, UNITS, UNITS, st.sampled_from(["pool", "slice"])),
    st.builds(Scaled, st.sampled_from(["times", "divided", "negative", "trained", "buffer", "hook"])),
    st.builds(Twice, UNITS),
    st.builds(Breaker, st.sampled_from([*BREAKERS])),
)


class Network(nn.Module):
    """Blocks, one after the other, and a head."""

    def __init__(self, blocks: list[nn.Module], head: str) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(*blocks), Head(head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))

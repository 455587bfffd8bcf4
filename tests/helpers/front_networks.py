"""Random regions without gradients, what they give in float64, and how far float32 may be from that."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gf_tvm.blocked.steps import Convolution, Tile, Winograd
from gf_tvm.blocked.tiling import divisors, tile_of
from gf_tvm.chains.capture.assemble import part_of
from gf_tvm.chains.plan import elementwise
from gf_tvm.chains.plan.graph import (
    Add,
    Conv,
    Gate,
    Map,
    Misfit,
    Norm,
    Op,
    Pad,
    Part,
    Pool,
    Region,
    Scale,
    View,
    WindowPool,
)
from gf_tvm.core import verify
from gf_tvm.forward.front import Call, Front, lines, nests
from gf_tvm.forward.lower import Lowered, can_compile
from gf_tvm.machine.profiles import DeviceProfile

_EPS = torch.finfo(torch.float32).eps
#: Every function that is compiled, with settings.
MAPS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("relu", ()),
    ("relu6", ()),
    ("hardtanh", (-0.5, 0.75)),
    ("leaky_relu", (0.2,)),
    ("hardswish", ()),
    ("hardsigmoid", ()),
    ("threshold", (0.1, -0.3)),
    ("clamp", (-0.4, None)),
    ("clamp", (-0.4, 0.6)),
    ("hardshrink", (0.3,)),
    ("softshrink", (0.3,)),
    ("softsign", ()),
    ("abs", ()),
    ("square", ()),
    ("sqrt", ()),
    ("elu", (0.7,)),
    ("selu", ()),
    ("celu", (0.8,)),
    ("sigmoid", ()),
    ("tanh", ()),
    ("silu", ()),
    ("mish", ()),
    ("gelu", ("tanh",)),
    ("gelu", ("none",)),
    ("tanhshrink", ()),
    ("exp", ()),
)
#: Functions whose results can be large, or are only defined on a side.
_DELICATE = {"exp", "square", "sqrt"}


@dataclass
class Network:
    """A region that can be compiled as a whole, with its entries and tensors; ``seed`` makes it again."""

    seed: int
    part: Part
    entries: list[Tensor]
    tensors: list[Tensor]

    def __str__(self) -> str:
        region = self.part.region
        lines = [f"network {self.seed}, entries {[tuple(e.shape) for e in self.entries]}, exits {self.part.exits}"]
        return "\n".join([*lines, *(f"{region.result(i)}: {op}" for i, op in enumerate(region.ops))])


class _Builder:
    def __init__(self, seed: int, wide: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.wide = wide
        self.batch = self.random.choice((1, 2, 3, 4, 8))
        self.shapes: list[Any] = []
        self.ops: list[Op] = []
        self.tensors: list[Tensor] = []
        self.flat: set[int] = set()
        self.entries: list[Tensor] = []
        for _ in range(self.random.choice((1, 1, 1, 2))):
            shape = (self.batch, self.channels(), *(self.random.choice((1, 2, 3, 5, 7, 9, 12, 14)) for _ in "hw"))
            self.entries.append(self.normal(*shape))
            self.shapes.append(shape)

    def channels(self) -> int:
        return self.random.choice(
            (1, 2, 3, 3, 4, 5, 8, 12, 16, 17, 24, 32, self.wide, self.wide, self.random.randint(1, 50))
        )

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def tensor(self, *shape: int, scale: float = 1.0, at: float = 0.0) -> int:
        self.tensors.append(self.normal(*shape) * scale + at)
        return len(self.tensors) - 1

    def add(self, op: Op) -> int:
        shape: Any
        try:
            shape = op.shape(*(self.shapes[v] for v in op.inputs))
        except Misfit as misfit:
            shape = misfit.shape
        assert shape is not None
        self.shapes.append(shape)
        self.ops.append(op)
        value = len(self.shapes) - 1
        if op.flat:
            self.flat.add(value)
        return value

    def pick(self, flat: bool = False) -> int:
        """A value: often the last."""
        values = [v for v in range(len(self.shapes)) if (v in self.flat) == flat and not self.is_pad(v)]
        return values[-1] if self.random.random() < 0.6 else self.random.choice(values)

    def is_pad(self, value: int) -> bool:
        return value >= len(self.entries) and isinstance(self.ops[value - len(self.entries)], Pad)

    def conv(self, x: int | None = None, padded: bool = False) -> int:
        r = self.random
        x = self.pick() if x is None else x
        _, ci, h, w = self.shapes[x]
        kind = r.choice(("dense", "dense", "plain", "three", "three", "grouped", "depthwise", "depthwise"))
        kernel = (r.randint(1, 7), r.randint(1, 7)) if r.random() < 0.3 else (r.choice((1, 2, 3, 3, 5, 7)),) * 2
        stride = (r.randint(1, 3), r.randint(1, 3)) if r.random() < 0.2 else (r.choice((1, 1, 2)),) * 2
        dilation = (r.randint(1, 3), r.randint(1, 3)) if r.random() < 0.2 else (1, 1)
        padding = (r.randint(0, 3), r.randint(0, 3)) if r.random() < 0.3 else (kernel[0] // 2, kernel[1] // 2)
        groups, co = 1, self.channels()
        if kind == "plain":
            kernel, stride, dilation, padding = (1, 1), (1, 1), (1, 1), (0, 0)
        elif kind == "three":
            kernel, stride, dilation, padding = (3, 3), (1, 1), (1, 1), (r.choice((1, 1, 0, 2)),) * 2
            co = r.choice((self.wide, co))
        elif kind == "grouped":
            groups = r.choice(divisors(ci))
            co = groups * r.choice((1, 1, 2, 2, 4, 3, r.randint(1, 9), self.wide // 2 if groups < 9 else 1))
        elif kind == "depthwise":
            groups, co = ci, ci
        if padded:
            padding = (0, 0)
        sizes = zip((h, w), kernel, stride, dilation, padding, strict=True)
        outs = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, d, p in sizes]
        if min(outs) < 1:
            kernel, dilation, padding = (1, 1), (1, 1), (0, 0)
        fan = ci // groups * kernel[0] * kernel[1]
        tensors = (
            self.tensor(co, ci // groups, *kernel, scale=fan**-0.5),
            r.choice((None, self.tensor(co, scale=0.3))),
        )
        return self.add(
            Conv(
                f"conv{len(self.ops)}",
                (x,),
                tensors,
                False,
                kernel,
                stride,
                padding,
                dilation,
                groups,
                co,
                filtered=False,
            )
        )

    def wide_ones(self) -> int:
        """For Winograd's algorithm, or with groups that blocks fit: both maps have many channels, and some pixels."""
        r, x = self.random, self.pick()
        if min(self.shapes[x][2:]) < 2:
            return self.conv(x)
        for kernel in (1, 3) if self.shapes[x][1] != self.wide else (3,):
            ci = self.shapes[x][1]
            groups = 1 if kernel == 1 else r.choice((1, 1, 1, 2, self.wide // 2, self.wide // 4))
            size = (self.wide, ci // groups, kernel, kernel)
            tensors = (self.tensor(*size, scale=(ci // groups * kernel**2) ** -0.5), self.tensor(self.wide))
            settings: Any = {"kernel": (kernel,) * 2, "padding": (kernel // 2,) * 2, "groups": groups, "co": self.wide}
            x = self.add(Conv("wide", (x,), tensors, filtered=False, **settings))
        return x

    def pad(self) -> int:
        r, x = self.random, self.pick()
        rows, cols = ((r.randint(0, 3), r.randint(0, 3)) for _ in "rc")
        padded = self.add(Pad("pad", (x,), (), rows=rows, cols=cols))
        if r.random() < 0.3:
            self.conv(padded, padded=r.random() < 0.5)
        return self.conv(padded, padded=r.random() < 0.7)

    def norm(self) -> int:
        x = self.pick(flat=bool(self.flat) and self.random.random() < 0.2)
        x = x if x not in self.flat else self.pick()
        c, r = self.shapes[x][1], self.random
        variance = self.tensor(c)
        self.tensors[variance] = self.tensors[variance].abs() + 0.5
        scale, shift = self.tensor(c, scale=0.3, at=1.0), self.tensor(c, scale=0.3)
        tensors = (self.tensor(c, scale=0.3), variance, r.choice((scale, None)), r.choice((shift, None)))
        return self.add(Norm("norm", (x,), tensors, eps=r.choice((1e-5, 1e-3))))

    def map(self) -> int:
        flat = bool(self.flat) and self.random.random() < 0.3
        x = self.pick(flat)
        kind, settings = self.random.choice(MAPS)
        delicate = any(isinstance(op, Map) and op.kind in _DELICATE for op in self.ops)
        if kind in _DELICATE and delicate:
            kind, settings = "relu", ()
        if kind == "sqrt":
            x = self.add(Map("abs", (x,), flat=flat, kind="abs"))
        return self.add(Map(kind, (x,), flat=flat, kind=kind, settings=settings))

    def plus(self) -> int:
        a, r = self.pick(), self.random
        alike = [
            v
            for v in range(len(self.shapes))
            if self.shapes[v] == self.shapes[a] and v not in self.flat and not self.is_pad(v)
        ]
        b = r.choice(alike)
        if b == a and r.random() < 0.7:
            # Something of the same shape, made of it.
            c = self.shapes[a][1]
            tensors = (self.tensor(c, c, 3, 3, scale=(9 * c) ** -0.5), None)
            b = self.add(Conv("branch", (a,), tensors, False, (3, 3), padding=(1, 1), co=c, filtered=False))
        pair = (a, b) if r.random() < 0.5 else (b, a)
        return self.add(Add("add", pair, alpha=r.choice((1.0, 1.0, -0.5, 2.0))))

    def gate(self) -> int:
        x = self.pick()
        c = self.shapes[x][1]
        mean = self.add(Pool("pool", (x,)))
        tensors = (self.tensor(c, c, 1, 1, scale=c**-0.5), self.tensor(c))
        gate = self.add(Conv("excite", (mean,), tensors, co=c, filtered=False))
        gate = self.add(Map("sigmoid", (gate,), kind="sigmoid"))
        return self.add(Gate("gate", (x, gate)))

    def window(self) -> int:
        r, x = self.random, self.pick()
        h, w = self.shapes[x][2:]
        kernel = tuple(min(size, r.randint(1, 4)) for size in (h, w))
        stride, padding = tuple(r.randint(1, 3) for _ in "hw"), tuple(r.randint(0, k // 2) for k in kernel)
        kind, ceil = r.choice(("max", "mean")), r.random() < 0.4
        op = WindowPool("window", (x,), (), False, kind, kernel, stride, padding, ceil, r.random() < 0.7)
        try:
            op.shape(self.shapes[x])
        except Misfit:
            op = replace(op, kernel=(1, 1), stride=(1, 1), padding=(0, 0))
        return self.add(op)

    def mean(self) -> int:
        return self.add(Pool("pool", (self.pick(),)))

    def scale(self) -> int:
        return self.add(Scale("scale", (self.pick(),), factor=self.random.choice((0.5, -1.5))))

    def head(self) -> int:
        """A mean, a view, and perhaps a linear layer or another view after it."""
        r = self.random
        x = self.add(Pool("pool", (self.pick(),)))
        x = self.add(View("view", (x,), flat=True))
        if r.random() < 0.3:
            return self.add(View("back", (x,)))
        if r.random() < 0.8:
            c, co = self.shapes[x][1], self.channels()
            tensors = (self.tensor(co, c, scale=c**-0.5), self.tensor(co))
            x = self.add(Conv("linear", (x,), tensors, True, co=co, filtered=False))
        return x

    KINDS = (
        ("conv", 7), ("wide_ones", 2), ("pad", 1), ("norm", 3), ("map", 4), ("plus", 3), ("gate", 1), ("window", 2),
        ("mean", 0.3), ("scale", 0.5), ("head", 0.7),
    )  # fmt: skip

    def network(self, seed: int) -> Network | None:
        r = self.random
        kinds, weights = zip(*self.KINDS, strict=True)
        for kind in r.choices(kinds, weights, k=r.randint(2, 7)):
            getattr(self, kind)()
        first = len(self.entries)
        read = {v for op in self.ops for v in op.inputs}
        made = [v for v in range(first, len(self.shapes)) if not self.is_pad(v)]
        exits = {v: "x" for v in made if v not in read or r.random() < 0.08}
        region = Region(first, tuple(self.ops), exits)
        if not all(can_compile(region, i, self.shapes) for i in range(len(self.ops))):
            return None
        part = part_of(region, self.shapes, range(len(self.ops)))
        entries = [self.entries[v] for v in part.entries]
        return Network(seed, part, entries, self.tensors) if set(part.entries) <= set(range(first)) else None


def random_networks(count: int, seed: int, wide: int) -> list[Network]:
    """Networks that can be compiled.

    Args:
        wide: channels that many maps have, such that Winograd's algorithm is used.
    """
    found: list[Network] = []
    while len(found) < count:
        seed += 1
        network = _Builder(seed, wide).network(seed)
        if network is not None:
            found.append(network)
    return found


def varied(given: Lowered, profile: DeviceProfile, seed: int, outputs: int | None = None) -> Lowered:
    """The same otherwise: other tiles, other numbers of images at a time, threads that share other steps.

    ``outputs``: of Winograd's tiles; None: of some 2, of some 4.
    """
    rng = random.Random(seed)
    batch, at = given.front.batch, 0
    calls: list[tuple[Call, bool]] = []
    by_images, images = rng.random() < 0.5, batch
    for call in given.front.calls:
        if rng.random() < 0.3:
            by_images = rng.random() < 0.5
            images = rng.choice(divisors(batch))
        step = replace(call.step, images=1 if by_images else images, shared=not by_images)
        if isinstance(step, Winograd):
            step = replace(step, outputs=outputs or rng.choice((2, 4)))
        if isinstance(step, Convolution):
            step = replace(step, tile=tile_of(step, profile))
            step = replace(step, tile=_other_tile(step, rng))
        calls.append((replace(call, step=step, weights=at), by_images))
        at += lines(step.weights)
    front = Front(batch, given.front.entries, given.front.exits, nests(calls), given.front.parts)
    return Lowered(front, given.parameters)


def _other_tile(step: Convolution, rng: random.Random) -> Tile:
    vectors = rng.randint(1, min(4, step.dst.blocks)) if step.groups == 1 else 1
    columns, turns = rng.randint(1, 6), rng.choice(divisors(step.srcs[0].block))
    if isinstance(step, Winograd):
        rows = rng.choice(divisors(step.grid[0] * step.images))
        return Tile(rows, columns, vectors, 1, False, turns)
    columns = min(columns, step.dst.width)
    chunk = rng.choice(divisors(step.dst.height))
    if step.depthwise:
        return Tile(columns=columns, chunk=chunk)
    return Tile(rng.randint(1, min(2, chunk)), columns, vectors, chunk, rng.random() < 0.3, turns)


def network_of(
    ops: Sequence[Op], entries: Sequence[Tensor], tensors: Sequence[Tensor], exits: Sequence[int]
) -> Network:
    """A network of these operations; those behind the first that cannot be compiled are outside."""
    region = Region(len(entries), tuple(ops), dict.fromkeys(exits, "x"))
    shapes: Any = [tuple(t.shape) if t.dim() == 4 else (*t.shape, 1, 1) for t in entries]
    shapes = region.shapes(shapes)[0]
    compiled = list(itertools.takewhile(lambda i: can_compile(region, i, shapes), range(len(ops))))
    part = part_of(region, shapes, compiled)
    return Network(0, part, [entries[v] for v in part.entries], list(tensors))


# ------------------------------------------------------------------------------------------------------- float64


@dataclass
class Exact:
    """A value in float64, and by how much float32 may miss it, element by element."""

    value: Tensor
    error: Tensor


def exact(network: Network, by_winograd: Sequence[int] = ()) -> list[Exact]:
    """The exits.

    Rounding errors are taken for independent of each other where sums of many are made, as in
    :mod:`gf_tvm.core.verify`, and as they are everywhere else; so are functions that jump or are steep.

    Args:
        by_winograd: numbers of the weights of convolutions that are computed in this way.
    """
    part = network.part
    values: dict[int, Exact] = {
        v: Exact(t.double(), torch.zeros_like(t, dtype=torch.float64))
        for v, t in zip(part.entries, network.entries, strict=True)
    }
    for i in part.ops:
        op = part.region.ops[i]
        given = [values[v] for v in op.inputs]
        tensors = [None if t is None else network.tensors[t].double() for t in op.tensors]
        values[part.region.result(i)] = _apply(op, given, tensors, bool(set(op.tensors[:1]) & set(by_winograd)))
    return [values[v] for v in part.exits]


def _apply(op: Op, given: list[Exact], tensors: list[Tensor | None], winograd: bool) -> Exact:
    x, e = given[0].value, given[0].error
    if isinstance(op, Conv):
        weight, bias = tensors
        assert weight is not None
        if op.flat:
            y, size = F.linear(x, weight, bias), F.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
            return Exact(y, _rounded(weight[0].numel() + 1) * size + F.linear(e**2, weight**2).sqrt())
        settings = (op.stride, op.padding, op.dilation, op.groups)
        y = F.conv2d(x, weight, bias, *settings)
        seen = x.abs()
        if winograd:
            # All pixels of a tile take part in every result of it.
            seen = F.max_pool2d(seen, 11, 1, 5)
            seen = F.max_pool2d(F.pad(seen, [4] * 4), 9, 1)
        size = F.conv2d(seen, weight.abs(), None if bias is None else bias.abs(), *settings)
        inherited = F.conv2d(e**2, weight**2, None, *settings).clamp(min=0).sqrt()
        return Exact(y, _rounded(weight[0].numel() + 1) * size + inherited)
    if isinstance(op, Norm):
        mean, variance, scale, shift = tensors
        assert mean is not None
        assert variance is not None
        factor = (1.0 if scale is None else scale) / torch.sqrt(variance + op.eps)
        offset = torch.zeros_like(mean) if shift is None else shift
        f, m, o = (t.view(-1, 1, 1) for t in (factor, mean, offset))
        return Exact((x - m) * f + o, e * f.abs() + _rounded(3) * ((x.abs() + m.abs()) * f.abs() + o.abs()))
    if isinstance(op, Map):
        function = elementwise.FUNCTIONS[op.kind]
        y = function.apply(x, False, *op.settings)
        low = (x - e).clamp(min=0) if op.kind == "sqrt" else x - e
        ends = [(function.apply(end, False, *op.settings) - y).abs() for end in (low, x + e)]
        return Exact(y, torch.maximum(*ends) + _rounded(4) * (y.abs() + x.abs() + 1))
    if isinstance(op, Scale):
        return Exact(x * op.factor, (e + _EPS * x.abs()) * abs(op.factor))
    if isinstance(op, Add):
        y, f = given[1].value, given[1].error
        size = x.abs() + abs(op.alpha) * y.abs()
        return Exact(x + op.alpha * y, e + abs(op.alpha) * f + 2 * _EPS * size)
    if isinstance(op, Gate):
        y, f = given[1].value, given[1].error
        return Exact(x * y, e * y.abs() + f * x.abs() + e * f + _EPS * (x * y).abs())
    if isinstance(op, Pool):
        terms = _rounded(x[0, 0].numel())
        return Exact(
            x.mean((2, 3), keepdim=True), e.mean((2, 3), keepdim=True) + terms * x.abs().mean((2, 3), keepdim=True)
        )
    if isinstance(op, View):
        shape = x.shape[:2] if op.flat else (*x.shape[:2], 1, 1)
        return Exact(x.view(shape), e.view(shape))
    if isinstance(op, Pad):
        pads = (*op.cols, *op.rows)
        return Exact(F.pad(x, pads), F.pad(e, pads))
    assert isinstance(op, WindowPool)
    if op.kind == "max":
        settings = {"kernel_size": op.kernel, "stride": op.stride, "padding": op.padding, "ceil_mode": op.ceil}
        return Exact(*(F.max_pool2d(t, **settings) for t in (x, e)))

    def mean_of(t: Tensor) -> Tensor:
        return F.avg_pool2d(t, op.kernel, op.stride, op.padding, op.ceil, op.include_pad)

    return Exact(mean_of(x), mean_of(e) + _rounded(math.prod(op.kernel)) * mean_of(x.abs()))


def _rounded(terms: int) -> float:
    """The relative error of a sum of so many terms."""
    return verify.SAFETY * math.sqrt(terms) * _EPS


def excess(results: Sequence[Tensor], expected: Sequence[Exact]) -> float:
    """The largest error in units of what is allowed; NaN counts as infinite."""
    worst = 0.0
    for result, wanted in zip(results, expected, strict=True):
        assert result.shape == wanted.value.shape
        off = ((result.double() - wanted.value).abs() / (wanted.error + torch.finfo(torch.float32).tiny)).max()
        worst = max(worst, math.inf if off.isnan() else float(off))
    return worst

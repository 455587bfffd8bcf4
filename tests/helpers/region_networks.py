"""Random regions of chains, and what they compute: operation by operation, and as chains."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gf_tvm
from gf_tvm.chains.plan.graph import (
    Add,
    Cat,
    Conv,
    Gate,
    Map,
    Misfit,
    Norm,
    Op,
    Pad,
    Pool,
    Region,
    Resize,
    Scale,
    Shape,
    Slice,
    WindowPool,
)
from gf_tvm.chains.plan.partition import Layout, partition
from gf_tvm.chains.run.plan import Plan, make_plan
from gf_tvm.chains.run.run import run_chain

#: Element-wise functions by the kinds of ``Map``, with settings.
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...]]] = {
    "relu": (F.relu, ()),
    "leaky_relu": (F.leaky_relu, (0.2,)),
    "silu": (F.silu, ()),
    "tanh": (torch.tanh, ()),
    "sigmoid": (torch.sigmoid, ()),
    "hardswish": (F.hardswish, ()),
}


@dataclass
class Case:
    """A region with its entries and tensors, whose gradients are needed where they require them.

    ``means``: as of :func:`make_plan`.
    """

    region: Region
    entries: list[Tensor]
    tensors: list[Tensor]
    means: torch.dtype | None = None

    def layout(self) -> Layout:
        shapes: list[Shape | None] = [_shape(t) for t in self.entries]
        needs = [t.requires_grad for t in self.entries]
        trained = frozenset(k for k, t in enumerate(self.tensors) if t.requires_grad)
        return partition(self.region, shapes, needs, trained)

    def plans(self) -> list[Plan]:
        layout = self.layout()
        chains = [unit for unit in layout.units if isinstance(unit, tuple)]
        return [make_plan(self.region, layout.situation, unit, self.means) for unit in chains]

    def plain(self) -> list[Tensor]:
        """The exits, operation by operation, every convolution filtered by itself."""
        values = list(self.entries)
        for op in self.region.ops:
            values.append(apply(op, [values[v] for v in op.inputs], self.tensors))
        return [values[v] for v in self.region.exits]

    def chained(self) -> list[Tensor]:
        """The exits, with chains where there are such."""
        layout = self.layout()
        values = dict(enumerate(self.entries))
        for unit in layout.units:
            if isinstance(unit, int):
                op = self.region.ops[unit]
                values[self.region.result(unit)] = apply(op, [values[v] for v in op.inputs], self.tensors)
            else:
                plan = make_plan(self.region, layout.situation, unit, self.means)
                found = run_chain(plan, [values[v] for v in plan.entries], [self.tensors[t] for t in plan.tensors])
                values.update(zip(plan.exits, found, strict=True))
        return [values[v] for v in self.region.exits]

    def results(self, exits: Sequence[Tensor]) -> list[Tensor]:
        """Exits, and the gradients of all that requires one, zero where there is none."""
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in exits]
        wanted = [t for t in (*self.entries, *self.tensors) if t.requires_grad]
        pairs = [(y, w) for y, w in zip(exits, weights, strict=True) if y.requires_grad]
        if not pairs:
            return [y.detach() for y in exits]
        outputs, given = zip(*pairs, strict=True)
        grads = torch.autograd.grad(outputs, wanted, given, allow_unused=True)
        found = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, wanted, strict=True)]
        return [*(y.detach() for y in exits), *found]


def _shape(t: Tensor) -> Shape:
    n, c, h, w = t.shape
    return n, c, h, w


def apply(op: Op, x: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """What an operation computes, by PyTorch and :func:`gf_tvm.functional.conv2d`."""
    own = [None if t is None else tensors[t] for t in op.tensors]
    if isinstance(op, Conv):
        weight, bias = own
        assert weight is not None
        if not op.filtered:
            return F.conv2d(x[0], weight, bias)
        how = (op.stride, op.padding, op.dilation, op.groups)
        return gf_tvm.functional.conv2d(x[0], weight, bias, *how, patch=op.patch)
    if isinstance(op, Norm):
        mean, variance, scale, shift = own
        return F.batch_norm(x[0], mean, variance, scale, shift, False, 0.0, op.eps)
    if isinstance(op, Map):
        function, _ = FUNCTIONS[op.kind]
        return function(x[0], *op.settings)
    if isinstance(op, Gate):
        scale = x[1] if len(x) == 2 else own[0]
        assert scale is not None
        return x[0] * scale
    if isinstance(op, Scale):
        return x[0] * op.factor
    if isinstance(op, Add):
        return x[0] + op.alpha * x[1]
    if isinstance(op, Cat):
        return torch.cat(list(x), 1)
    if isinstance(op, Slice):
        start, width = op.start, op.width
        return x[0][:, start : start + width]
    if isinstance(op, Pad):
        return F.pad(x[0], (*op.cols, *op.rows, *op.channels), value=op.value)
    if isinstance(op, WindowPool) and op.kind == "mean":
        return F.avg_pool2d(x[0], op.kernel, op.stride, op.padding, op.ceil, op.include_pad, op.divisor)
    if isinstance(op, WindowPool):
        return F.max_pool2d(x[0], op.kernel, op.stride, op.padding, ceil_mode=op.ceil)
    if isinstance(op, Resize):
        how = {"size": op.size} if op.scale is None else {"scale_factor": op.scale}
        return F.interpolate(x[0], mode=op.mode, align_corners=op.corners, **how)  # type: ignore[arg-type]
    assert isinstance(op, Pool)
    return x[0].mean((2, 3), keepdim=True)


@dataclass
class Builder:
    """Adds operations to a region. Values are numbers: entries first, which all have to be there before."""

    seed: int
    dtype: torch.dtype = torch.float64
    entries: list[Tensor] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.choice = random.Random(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def entry(self, *shape: int, needs: bool = False) -> int:
        assert not self.ops
        self.entries.append(self.randn(*shape).requires_grad_(needs))
        self.shapes.append(_shape(self.entries[-1]))
        return len(self.shapes) - 1

    def tensor(self, *shape: int, trained: bool = True, shift: float = 0.0) -> int:
        self.tensors.append((self.randn(*shape) + shift).requires_grad_(trained))
        return len(self.tensors) - 1

    def add(self, op: Op) -> int:
        """The value that an operation computes, which may also be one that ends a chain. Raises Misfit."""
        inputs = [self.shapes[v] for v in op.inputs]
        try:
            shape = op.shape(*inputs)
        except Misfit as misfit:
            if misfit.shape is None:
                raise
            shape = misfit.shape
        if min(shape) < 1:
            raise Misfit("is empty")
        self.ops.append(op)
        self.shapes.append(shape)
        return len(self.shapes) - 1

    def name(self, kind: str) -> str:
        return f"{kind}{len(self.ops)}"

    def conv(self, x: int, co: int, kernel: Any = 3, patch: Any = 2, trained: bool = True, **how: Any) -> int:
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        patch = (patch, patch) if isinstance(patch, int) else patch
        ci = self.shapes[x][1] // how.get("groups", 1)
        size = (ci * kernel[0] * kernel[1]) ** 0.5
        weight, bias = self.tensor(co, ci, *kernel, trained=False), self.tensor(co, trained=trained)
        self.tensors[weight] = (self.tensors[weight] / size).requires_grad_(trained)
        op = Conv(self.name("conv"), (x,), (weight, bias), kernel=kernel, co=co, patch=patch, **how)
        return self.add(op)

    def norm(self, x: int, trained: bool = True) -> int:
        c = self.shapes[x][1]
        mean, variance = self.tensor(c, trained=False), self.tensor(c, trained=False)
        self.tensors[variance] = self.tensors[variance].abs() + 0.5
        own = (self.tensor(c, trained=trained, shift=1.0), self.tensor(c, trained=trained))
        return self.add(Norm(self.name("norm"), (x,), (mean, variance, *own), eps=1e-5))

    def map(self, x: int, kind: str) -> int:
        return self.add(Map(self.name(kind), (x,), kind=kind, settings=FUNCTIONS[kind][1]))

    def pad(self, x: int, rows: Any = (0, 0), cols: Any = (0, 0), channels: Any = (0, 0), value: float = 0.0) -> int:
        return self.add(Pad(self.name("pad"), (x,), rows=rows, cols=cols, channels=channels, value=value))

    def pool(self, x: int, kind: str = "mean", kernel: Any = (2, 2), stride: Any = None, **how: Any) -> int:
        return self.add(WindowPool(self.name("pool"), (x,), kind=kind, kernel=kernel, stride=stride or kernel, **how))

    def resize(self, x: int, size: Any = None, scale: Any = None, **how: Any) -> int:
        """To a size, or by a scale, as PyTorch takes them."""
        if size is None:
            h, w = (math.floor(pixels * factor) for pixels, factor in zip(self.shapes[x][2:], scale, strict=True))
            size = (h, w)
        return self.add(Resize(self.name("resize"), (x,), size=size, scale=scale, **how))

    def case(self, *exits: int) -> Case:
        names = tuple(f"entry {k}" for k in range(len(self.entries)))
        region = Region(len(self.entries), tuple(self.ops), dict.fromkeys(exits, "is used outside"), entry_names=names)
        return Case(region, self.entries, self.tensors)


def random_case(seed: int, dtype: torch.dtype = torch.float64, smooth: bool = False) -> Case:
    """A random region of convolutions and everything that may stand between them."""
    b = Builder(seed, dtype)
    choice = b.choice
    n, c = choice.choice([1, 2, 3]), 4
    x = b.entry(n, c, choice.randint(5, 15), choice.randint(5, 15), needs=choice.random() < 0.5)
    noises = [b.entry(n, 1, 1, 1), b.entry(1, c, 1, 1), b.entry(n, c, 1, 1), b.entry(1, 1, 1, 1)]
    patches: list[Any] = choice.choice([[2], [2], [4], [2, 4], [(2, 4), 3], [1, 2]])
    trained_norms = choice.random() < 0.5
    functions = ["silu", "tanh", "sigmoid"] if smooth else list(FUNCTIONS)

    def conv(v: int) -> int:
        how: dict[str, Any] = {"stride": (1, 1), "dilation": (1, 1), "groups": choice.choice([1, 1, 2, c])}
        kernel = choice.choice([1, 2, 3, 3])
        if choice.random() < 0.2:
            how["stride"] = (choice.choice([1, 2]), 2)
        elif kernel > 1 and choice.random() < 0.2:
            how["dilation"] = (2, 2)
        how["padding"] = choice.choice([(0, 0), (kernel // 2,) * 2, (kernel // 2,) * 2])
        return b.conv(v, c, kernel, choice.choice(patches), trained=choice.random() < 0.8, **how)

    def pad(v: int) -> int:
        rows, cols = (choice.choice([(0, 0), (0, 1), (1, 2), (3, 0), (-1, 0), (2, -2), (-1, -1)]) for _ in range(2))
        return b.pad(v, rows, cols, value=choice.choice([0.0, 0.0, 1.5]))

    def channels(v: int) -> int:
        more = b.pad(v, channels=(choice.randint(0, 3), choice.randint(0, 3)))
        more = b.map(more, choice.choice(functions)) if choice.random() < 0.5 else more
        start = choice.randint(0, b.shapes[more][1] - c)
        return b.add(Slice(b.name("slice"), (more,), start=start, width=c))

    def pool(v: int) -> int:
        kind = choice.choice(["mean", "mean", "max"])
        kernel = choice.choice([(2, 2), (2, 2), (1, 2), (3, 2), (3, 3), (4, 4)])
        stride = choice.choice([kernel, kernel, kernel, (2, 2), (1, 1)])
        how: dict[str, Any] = {"ceil": choice.random() < 0.4, "include_pad": choice.random() < 0.5}
        if choice.random() < 0.4:
            how["padding"] = tuple(choice.randint(0, k // 2) for k in kernel)
        if kind == "mean" and choice.random() < 0.2:
            how["divisor"] = choice.randint(2, 5)
        return b.pool(v, kind, kernel, stride, **how)

    def resize(v: int) -> int:
        mode = choice.choice(["nearest", "nearest-exact"])
        if choice.random() < 0.6:
            return b.resize(v, mode=mode, scale=(choice.choice([1.0, 2.0, 3.0]), choice.choice([2.0, 2.0, 0.5])))
        if choice.random() < 0.2:
            return b.resize(v, mode="bilinear", corners=False, size=(7, 8))
        return b.resize(v, mode=mode, size=(choice.randint(4, 17), choice.randint(4, 17)))

    def gate(v: int) -> int:
        if choice.random() < 0.6:
            return b.add(Gate(b.name("gate"), (v, choice.choice(noises))))
        squeezed = b.add(Pool(b.name("mean"), (v,)))
        excited = b.map(b.conv(squeezed, c, 1, 1, filtered=False), "sigmoid")
        return b.add(Gate(b.name("gate"), (v, excited)))

    def join(v: int) -> int:
        others = [u for u in range(len(b.entries), len(b.shapes)) if b.shapes[u] == b.shapes[v] and u != v]
        if not others:
            return b.add(Scale(b.name("scale"), (v,), factor=0.7))
        u = choice.choice(others)
        if choice.random() < 0.7:
            return b.add(Add(b.name("add"), (v, u), alpha=choice.choice([1.0, -0.5])))
        both = b.add(Cat(b.name("cat"), (u, v)))
        return b.add(Slice(b.name("slice"), (both,), start=2, width=c))

    def function(v: int) -> int:
        return b.map(v, choice.choice(functions))

    def norm(v: int) -> int:
        return b.norm(v, trained_norms)

    def fitting(v: int) -> int:
        """What a product of derivatives can be taken through, where patches fit, between two functions."""
        v = norm(v) if choice.random() < 0.4 else function(v)
        size = choice.choice([(2, 2), (2, 2), (1, 2)])
        kind = choice.choice(["mean", "max", "resize", "pad", "any size"])
        if kind == "resize":
            v = b.resize(v, mode="nearest", scale=(2.0, 2.0))
        elif kind == "any size":
            v = b.resize(v, mode="nearest", size=(choice.randint(5, 12), choice.randint(5, 12)))
        else:
            v = pad(v) if kind == "pad" else b.pool(v, kind, size, ceil=choice.random() < 0.5, include_pad=False)
        return function(norm(v) if choice.random() < 0.3 else v)

    between = [
        fitting,
        fitting,
        pad,
        channels,
        pool,
        pool,
        resize,
        gate,
        join,
        join,
        function,
        function,
        function,
        norm,
    ]
    v = x
    for _ in range(choice.randint(2, 4)):
        steps = [conv, *(choice.choice(between) for _ in range(choice.randint(0, 4)))]
        for step in steps:
            known = len(b.ops), len(b.shapes), len(b.tensors)
            try:
                v = step(v)
            except Misfit:
                del b.ops[known[0] :], b.shapes[known[1] :], b.tensors[known[2] :]
            if max(b.shapes[v][2:]) > 40:
                v = b.pool(v, "mean", (4, 4), ceil=True)
    with contextlib.suppress(Misfit):
        v = conv(v)
    if v == x:
        v = b.add(Scale(b.name("scale"), (v,), factor=0.7))
    return b.case(*({v, choice.randrange(len(b.entries), len(b.shapes))} if choice.random() < 0.3 else {v}))

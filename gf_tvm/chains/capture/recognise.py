"""Which steps of a graph of ATen operators can stay on the patch grid, and as which operation."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from ..plan import elementwise
from ..plan.graph import (
    Add,
    Cat,
    Conv,
    Drop,
    Gate,
    Map,
    Norm,
    Op,
    Outside,
    Pad,
    Pool,
    Resize,
    Scale,
    Shape,
    Slice,
    View,
    WindowPool,
)
from .aten import arguments_of, value_of
from .sites import Filter, Site, name_of

_aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Found:
    """An operation. ``op`` has no inputs and tensors yet: they are the results of these steps."""

    op: Op
    inputs: tuple[fx.Node, ...]
    tensors: tuple[fx.Node | None, ...] = ()


@dataclass(frozen=True)
class Same:
    """A step that returns ``source`` as it is."""

    source: fx.Node


Recognised = Found | Same


@dataclass
class Known:
    """What is known while a graph is gone through.

    Attributes:
        filters: the convolutions that are filtered, by result. sites: all convolutions, by result.
        early: steps that can be computed before everything else, as weights must be.
        found: the steps before this one.
    """

    filters: Mapping[fx.Node, Filter]
    sites: Mapping[fx.Node, Site]
    early: frozenset[fx.Node]
    found: dict[fx.Node, Recognised] = field(default_factory=dict)

    def source(self, node: fx.Node) -> fx.Node:
        """The step whose result ``node`` returns as it is."""
        while isinstance(what := self.found.get(node), Same):
            node = what.source
        return node


def shape_of(node: fx.Node, known: Known | None = None) -> Shape | None:
    """(n, c, h, w) of a step's result if it is a map; of (n, c) the shape with one pixel."""
    value = value_of(node)
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
        return None
    if value.dim() == 4:
        n, c, h, w = value.shape
        return n, c, h, w
    return (value.shape[0], value.shape[1], 1, 1) if value.dim() == 2 else None


def is_flat(node: fx.Node) -> bool:
    """Whether a step's result is (n, c)."""
    value = value_of(node)
    return isinstance(value, Tensor) and value.dim() == 2


def recognise(node: fx.Node, known: Known) -> Recognised:
    """What a step is."""
    site = known.sites.get(node)
    if site is not None:
        return _convolution(node, site, known)
    found = None
    if node.op == "call_function" and node.target is operator.getitem:
        found = _piece(node, known)
    elif node.op == "call_function" and isinstance(node.target, OpOverload):
        found = _composed(node, known)
        if found is None:
            found = _RULES.get(node.target, _function)(Call(node, known))
    if isinstance(found, Found):
        found = _checked(node, found)
    return outside(node, known) if found is None else found


def outside(node: fx.Node, known: Known, reason: str = "cannot stay on the patch grid") -> Found:
    """A step that runs as it is."""
    value = value_of(node)
    stops = node.target in (_aten.detach.default, _aten.detach_.default) or (
        isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())
    )
    return Found(
        Outside(name_of(node), (), reason=reason, result=shape_of(node), stops=stops), tuple(node.all_input_nodes)
    )


def _checked(node: fx.Node, found: Found) -> Found | None:
    """An operation whose result is flat says so; (n, c) behaves as (n, c, 1, 1) does in a few only."""
    flat = is_flat(node)
    if any(is_flat(i) for i in found.inputs) and not isinstance(found.op, Map | Scale | View | Conv):
        return None
    return replace(found, op=replace(found.op, flat=flat))


class Call:
    """A call of an ATen operator, arguments by name, defaults filled in."""

    def __init__(self, node: fx.Node, known: Known) -> None:
        self.node, self.known = node, known
        self.arguments = arguments_of(node)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def name(self) -> str:
        """For people."""
        return name_of(self.node)

    def outside(self, reason: str) -> Found:
        """The call runs as it is, for this reason."""
        return outside(self.node, self.known, reason)

    def early(self, *tensors: Any) -> bool:
        """Whether these tensors are there before the network runs, as parameters are."""
        return all(t is None or (isinstance(t, fx.Node) and t in self.known.early) for t in tensors)


def _is_map(node: Any) -> bool:
    return isinstance(node, fx.Node) and shape_of(node) is not None


def _is_small(node: Any) -> bool:
    """Whether a step's result is a map of one pixel."""
    shape = shape_of(node) if isinstance(node, fx.Node) else None
    return shape is not None and shape[2:] == (1, 1) and not is_flat(node)


def _dtype(node: fx.Node) -> Any:
    return value_of(node).dtype


# Convolutions


def _convolution(node: fx.Node, site: Site, known: Known) -> Recognised:
    chosen, a = known.filters.get(node), site.arguments
    if a is None:
        return outside(node, known, site.obstacle or "is not filtered")

    def apart(reason: str) -> Found:
        inputs = tuple(t for t in (a.x, a.weight, a.bias) if t is not None)
        return Found(Outside(site.name, (), reason=reason, result=shape_of(node)), inputs)

    if a.weight not in known.early or (a.bias is not None and a.bias not in known.early):
        return apart("is not filtered" if chosen is None else "has a weight that is computed from the network's input")
    kernel = value_of(a.weight).shape
    op = Conv(
        site.name,
        (),
        kernel=(kernel[2], kernel[3]),
        stride=a.stride,
        padding=a.padding,
        dilation=a.dilation,
        groups=a.groups,
        co=kernel[0],
        patch=(1, 1) if chosen is None else chosen.patch,
        library="" if chosen is None else chosen.library,
        filtered=chosen is not None,
    )
    return Found(op, (a.x,), (a.weight, a.bias))


def _linear(c: Call) -> Recognised | None:
    if not (_is_map(c["input"]) and is_flat(c["input"]) and c.early(c["weight"], c["bias"])):
        return None
    co = value_of(c["weight"]).shape[0]
    return Found(Conv(c.name, (), co=co, filtered=False), (c["input"],), (c["weight"], c["bias"]))


# Norms, activations, dropout


def _batch_norm(c: Call) -> Recognised | None:
    statistics = (c["running_mean"], c["running_var"])
    if c["training"] or None in statistics:
        return c.outside("uses batch statistics")
    if not _is_map(c["input"]) or not c.early(*statistics, c["weight"], c["bias"]):
        return None
    return Found(Norm(c.name, (), eps=c["eps"]), (c["input"],), (*statistics, c["weight"], c["bias"]))


def _function(c: Call) -> Recognised | None:
    """An element-wise function."""
    found = elementwise.recognised(c.node.target, c.arguments)
    x = c.arguments.get("self")
    if found is None or not _is_map(x):
        return None
    kind, settings = found
    return Found(Map(c.name, (), kind=kind, settings=settings), (x,))  # type: ignore[arg-type]


def _composed(node: fx.Node, known: Known) -> Recognised | None:
    """An element-wise function that PyTorch makes of several operators, at the last of them."""
    found = elementwise.recognised_at(node) if _is_map(node) else None
    if found is None or not _is_map(found[1]):
        return None
    kind, x = found
    return Found(Map(name_of(node), (), kind=kind), (x,))


def _dropout(c: Call) -> Recognised | None:
    if not c["train"] or c["p"] == 0:
        return Same(c["input"])
    return Found(Map(c.name, (), kind="dropout", settings=(c["p"],)), (c["input"],)) if _is_map(c["input"]) else None


def _drop(c: Call) -> Recognised | None:
    if not c["train"] or c["p"] == 0:
        return Same(c["input"])
    return Found(Drop(c.name, (), p=c["p"]), (c["input"],)) if _is_map(c["input"]) and not is_flat(c["input"]) else None


# Arithmetic


def _add(sign: float) -> Callable[[Call], Recognised | None]:
    def rule(c: Call) -> Recognised | None:
        x, y, alpha = c["self"], c["other"], c["alpha"]
        if not (_is_map(x) and _is_map(y)) or not isinstance(alpha, int | float):
            return c.outside("adds something else than two maps")
        if value_of(x).shape != value_of(y).shape:
            return c.outside("adds maps of different shapes")
        return Found(Add(c.name, (), alpha=sign * alpha), (x, y))

    return rule


def _multiply(c: Call) -> Recognised | None:
    x, y = c["self"], c["other"]
    if _is_number(y) and _is_map(x):
        return Found(Scale(c.name, (), factor=float(y)), (x,))
    if not isinstance(y, fx.Node) or not isinstance(value_of(y), Tensor):
        return None
    for map_, scale in ((x, _unexpanded(y, c.known)), (y, _unexpanded(x, c.known))):
        if not _is_map(map_) or is_flat(map_) or not isinstance(value_of(scale), Tensor):
            continue
        one = tuple(value_of(scale).shape)
        channels = value_of(map_).shape[1]
        if (
            c.early(scale)
            and len(one) in (3, 4)
            and one[-2:] == (1, 1)
            and one[-3] == channels
            and one[:-3] in ((), (1,))
        ):
            return Found(Gate(c.name, ()), (map_,), (scale,)) if _dtype(scale) == _dtype(map_) else None
        if _is_small(scale) and one[1] in (1, channels) and value_of(c.node).shape == value_of(map_).shape:
            return Found(Gate(c.name, ()), (map_, scale))
    return c.outside("multiplies two maps")


def _unexpanded(node: fx.Node, known: Known) -> fx.Node:
    """The map of one pixel that ``node`` repeats, or ``node``: what is multiplied is repeated by itself."""
    found = known.found.get(known.source(node))
    repeats = isinstance(found, Found) and isinstance(found.op, Resize) and found.op.mode == "nearest"
    return found.inputs[0] if isinstance(found, Found) and repeats and _is_small(found.inputs[0]) else node


def _divide(c: Call) -> Recognised | None:
    if _is_map(c["self"]) and _is_number(c["other"]) and c["other"] != 0:
        return Found(Scale(c.name, (), factor=1 / c["other"]), (c["self"],))
    return None


def _negate(c: Call) -> Recognised | None:
    return Found(Scale(c.name, (), factor=-1.0), (c["self"],)) if _is_map(c["self"]) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# Channels


def _concatenate(c: Call) -> Recognised | None:
    maps, dim = c["tensors"], c["dim"]
    if dim not in (1, -3) or not all(_is_map(m) and not is_flat(m) for m in maps):
        return c.outside("joins something else than maps along their channels")
    return Found(Cat(c.name, ()), tuple(maps))


def _slice(c: Call) -> Recognised | None:
    x, value = c["self"], value_of(c["self"])
    if not isinstance(value, Tensor) or c["step"] != 1:
        return None
    size = value.shape[c["dim"]]
    start, stop, _ = slice(c["start"], c["end"]).indices(size)
    if (start, stop) == (0, size):
        return Same(x)
    channels = _is_map(x) and not is_flat(x) and c["dim"] in (1, -3)
    return Found(Slice(c.name, (), start=start, width=stop - start), (x,)) if channels and stop > start else None


#: Operators that cut a map into several.
_CUTS = (
    _aten.chunk.default,
    _aten.split.Tensor,
    _aten.split.sizes,
    _aten.split_with_sizes.default,
    _aten.tensor_split.sections,
    _aten.tensor_split.indices,
)


def _piece(node: fx.Node, known: Known) -> Recognised | None:
    """One of the maps that a cut gives."""
    cut, number = node.args
    if not isinstance(cut, fx.Node) or cut.target not in _CUTS or not isinstance(number, int):
        return None
    x = cut.args[0]
    dim = Call(cut, known)["dim"]
    if not _is_map(x) or is_flat(x) or dim not in (1, -3):  # type: ignore[arg-type]
        return None
    widths = [piece.shape[1] for piece in value_of(cut)]
    number %= len(widths)
    return Found(Slice(name_of(node), (), start=sum(widths[:number]), width=widths[number]), (x,))  # type: ignore[arg-type]


# Sizes


def _mean(c: Call) -> Recognised | None:
    x, dim = c["self"], c["dim"]
    value = value_of(x)
    if c["dtype"] is not None or not isinstance(value, Tensor):
        return None
    dims = sorted(d % value.dim() for d in (dim or range(value.dim())))
    if _is_map(x) and not is_flat(x) and dims == [2, 3]:
        return Found(Pool(c.name, ()), (x,))
    source = _pixels_in_a_row(x)
    if source is not None and dims == [2] and is_flat(c.node):
        return Found(Pool(c.name, ()), (source,))
    return c.outside("is a mean over something else than the whole map")


def _pixels_in_a_row(node: fx.Node) -> fx.Node | None:
    """The map whose pixels ``node``, (n, c, h * w), holds one after the other."""
    if node.op != "call_function" or node.target not in _RESHAPES:
        return None
    source, value = node.args[0], value_of(node)
    if not _is_map(source) or is_flat(source) or value.dim() != 3:  # type: ignore[arg-type]
        return None
    n, c, h, w = value_of(source).shape  # type: ignore[arg-type]
    return source if tuple(value.shape) == (n, c, h * w) else None  # type: ignore[return-value]


def _adaptive_pool(c: Call) -> Recognised | None:
    x, wanted = c["self"], tuple(c["output_size"])
    if not _is_map(x) or is_flat(x):
        return None
    h, w = value_of(x).shape[2:]
    if wanted == (1, 1):
        return Found(Pool(c.name, ()), (x,))
    if h % wanted[0] or w % wanted[1]:
        return None
    kernel = (h // wanted[0], w // wanted[1])
    return Same(x) if kernel == (1, 1) else Found(WindowPool(c.name, (), kernel=kernel, stride=kernel), (x,))


def _window_pool(kind: str) -> Callable[[Call], Recognised | None]:
    def rule(c: Call) -> Recognised | None:
        x = c["self"]
        if not _is_map(x) or is_flat(x) or _pair(c.arguments.get("dilation") or [1]) != (1, 1):
            return None
        kernel, padding = _pair(c["kernel_size"]), _pair(c["padding"])
        divisor = c.arguments.get("divisor_override")
        plain = kind == "mean" and divisor is None and padding == (0, 0)
        if plain and kernel == tuple(value_of(x).shape[2:]) and value_of(c.node).shape[2:] == (1, 1):
            return Found(Pool(c.name, ()), (x,))
        op = WindowPool(
            c.name,
            (),
            kind=kind,
            kernel=kernel,
            stride=_pair(c["stride"] or c["kernel_size"]),
            padding=padding,
            ceil=bool(c["ceil_mode"]),
            include_pad=bool(c.arguments.get("count_include_pad", True)),
            divisor=divisor,
        )
        return Found(op, (x,))

    return rule


def _pair(value: Sequence[int]) -> tuple[int, int]:
    return (value[0], value[-1])


def _resize(mode: str) -> Callable[[Call], Recognised | None]:
    def rule(c: Call) -> Recognised | None:
        x = c.node.args[0]
        if not _is_map(x):
            return None
        h, w = value_of(c.node).shape[2:]
        scale = None if c["scale_factors"] is None else tuple(c["scale_factors"])
        how = {"mode": mode, "corners": c.arguments.get("align_corners"), "size": (h, w), "scale": scale}
        return Found(Resize(c.name, (), **how), (x,))  # type: ignore[arg-type]

    return rule


def _expand(c: Call) -> Recognised | None:
    x, result = c["self"], value_of(c.node)
    if not isinstance(x, fx.Node) or not isinstance(value_of(x), Tensor):
        return None
    if value_of(x).shape == result.shape:
        return Same(x)
    if _is_small(x) and result.dim() == 4 and result.shape[:2] == value_of(x).shape[:2]:
        h, w = result.shape[2:]
        return Found(Resize(c.name, (), mode="nearest", size=(h, w)), (x,))
    return None


#: Operators that only give a tensor another shape.
_RESHAPES = (
    _aten.view.default,
    _aten.reshape.default,
    _aten._unsafe_view.default,
    _aten.flatten.using_ints,
    _aten.unflatten.int,
    _aten.squeeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.unsqueeze.default,
)


def _reshape(c: Call) -> Recognised | None:
    """(n, c, 1, 1) as (n, c), or back, perhaps by several steps."""
    source, result = c.node.args[0], value_of(c.node)
    if not isinstance(result, Tensor):
        return None
    while isinstance(source, fx.Node):
        value = value_of(source)
        if isinstance(value, Tensor) and value.shape == result.shape:
            return Same(source)
        one_pixel = _is_small(source) or (_is_map(source) and is_flat(source))
        if one_pixel and (is_flat(c.node) or _is_small(c.node)) and value.shape[:2] == result.shape[:2]:
            return Found(View(c.name, ()), (source,))
        if source.op != "call_function" or source.target not in _RESHAPES:
            return None
        source = source.args[0]
    return None


def _cast(c: Call) -> Recognised | None:
    """A cast to what the tensor is already."""
    x, result = c["self"], value_of(c.node)
    value = value_of(x)
    same = (
        isinstance(value, Tensor)
        and isinstance(result, Tensor)
        and (value.dtype, value.device) == (result.dtype, result.device)
    )
    return Same(x) if same and not c.arguments.get("copy") and c.arguments.get("memory_format") is None else None


def _contiguous(c: Call) -> Recognised | None:
    return (
        Same(c["self"])
        if c["memory_format"] in (None, torch.contiguous_format) and value_of(c["self"]).is_contiguous()
        else None
    )


def _pad(c: Call) -> Recognised | None:
    pads, x = [int(p) for p in c["pad"]], c["self"]
    if not any(pads):
        return Same(x)
    if c.arguments.get("mode", "constant") != "constant":
        return c.outside(f"pads in mode {c['mode']!r}")
    if not _is_map(x) or is_flat(x) or len(pads) > 6 or not _is_number(c["value"] or 0):
        return None
    pads += [0] * (6 - len(pads))
    cols, rows, channels = ((pads[k], pads[k + 1]) for k in (0, 2, 4))
    return Found(Pad(c.name, (), rows=rows, cols=cols, channels=channels, value=float(c["value"] or 0)), (x,))


def _alias(c: Call) -> Recognised | None:
    return Same(c["self"])


Rule = Callable[[Call], Recognised | None]

_RULES: dict[OpOverload, Rule] = {
    _aten.batch_norm.default: _batch_norm,
    _aten.linear.default: _linear,
    _aten.dropout.default: _dropout,
    _aten.feature_dropout.default: _drop,
    _aten.add.Tensor: _add(1),
    _aten.sub.Tensor: _add(-1),
    _aten.mul.Tensor: _multiply,
    _aten.mul.Scalar: _multiply,
    _aten.div.Tensor: _divide,
    _aten.div.Scalar: _divide,
    _aten.neg.default: _negate,
    _aten.cat.default: _concatenate,
    _aten.concat.default: _concatenate,
    _aten.slice.Tensor: _slice,
    _aten.mean.dim: _mean,
    _aten.adaptive_avg_pool2d.default: _adaptive_pool,
    _aten.avg_pool2d.default: _window_pool("mean"),
    _aten.max_pool2d.default: _window_pool("max"),
    _aten.upsample_nearest2d.vec: _resize("nearest"),
    _aten._upsample_nearest_exact2d.vec: _resize("nearest-exact"),
    _aten.upsample_bilinear2d.vec: _resize("bilinear"),
    _aten.expand.default: _expand,
    _aten.expand_as.default: _expand,
    _aten.to.dtype: _cast,
    _aten.to.device: _cast,
    _aten.contiguous.default: _contiguous,
    _aten.alias.default: _alias,
    _aten.pad.default: _pad,
    _aten.constant_pad_nd.default: _pad,
    **dict.fromkeys(_RESHAPES, _reshape),
}


def early_steps(graph: fx.Graph, sites: Sequence[Site]) -> frozenset[fx.Node]:
    """Parameters and other inputs, and what is computed of parameters alone for a convolution's weight.

    Such steps can run before all others.
    """
    found = {node for node in graph.nodes if node.op in ("placeholder", "get_attr")}
    weights = [t for site in sites if site.arguments for t in (site.arguments.weight, site.arguments.bias)]
    wanted: dict[fx.Node, None] = {}
    stack = [t for t in weights if t is not None and t not in found]
    while stack:
        node = stack.pop()
        if node not in wanted and node not in found:
            wanted[node] = None
            stack += node.all_input_nodes
    maps = {site.node for site in sites}
    for node in graph.nodes:  # in order: a step is early if all that it reads is
        if node in wanted and node not in maps and all(i in found for i in node.all_input_nodes) and _is_pure(node):
            found.add(node)
    return frozenset(found)


def _is_pure(node: fx.Node) -> bool:
    """Whether a step only computes a tensor."""
    operator_ = node.target if node.op == "call_function" else None
    return isinstance(operator_, OpOverload) and not operator_._schema.is_mutable and isinstance(value_of(node), Tensor)

"""Which steps of a traced network can stay on the patch grid, and as which operation."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ..core.geometry import as_pair
from ..ops.module import FilteredConv2d
from .graph import Add, Cat, Conv, Drop, Gate, Map, Norm, Op, Outside, Pool, Resize, Scale, Shape, Slice, View


@dataclass(frozen=True)
class Found:
    """An operation. ``op`` has no inputs and tensors yet: they are these steps, and these attributes by path.

    ``number``: what the operation takes from its region's numbers: an argument of the step, which may be or contain
    steps that are :class:`Number`.
    """

    op: Op
    inputs: tuple[fx.Node, ...]
    tensors: tuple[str | None, ...] = ()
    number: Any = None

    @property
    def number_steps(self) -> list[fx.Node]:
        """The steps in ``number``."""
        return steps_in(self.number)

    def settled(self, numbers: Mapping[fx.Node, Any]) -> Op:
        """The operation, given the numbers that it takes."""
        if self.number is None:
            return self.op
        assert isinstance(self.op, Resize | View)
        return replace(self.op, number=0).given((fx.node.map_arg(self.number, numbers.__getitem__),))


@dataclass(frozen=True)
class Alias:
    """A step that returns ``source`` as it is."""

    source: fx.Node


@dataclass(frozen=True)
class Pieces:
    """A step that cuts a map's channels; its users pick the pieces. ``how`` is that of Slice, without the index."""

    source: fx.Node
    how: tuple[Any, ...]


@dataclass(frozen=True)
class Number:
    """A size of a map, or what is computed from sizes alone: it can be known before the map is there.

    ``source``: the step whose result is measured, None where only numbers are computed with. ``inputs``: the steps
    that it has to wait for.
    """

    source: fx.Node | None
    inputs: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Other:
    """A step that cannot stay on the patch grid; the reason completes "<name> ...\""""

    reason: str


Recognised = Found | Alias | Pieces | Number | Other

_BREAKS = Other("cannot stay on the patch grid")


def has_hooks(module: nn.Module) -> bool:
    """Whether something runs before or after a module's forward or backward pass that a chain would leave out."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def only_metadata(node: fx.Node) -> bool:
    """Whether a step reads a tensor's shape or type and not its values."""
    if node.op == "call_function" and node.target is getattr and node.args[1] in ("dtype", "device"):
        return True
    return _reads_size(node)


def _reads_size(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "dim", "ndimension", "numel") and isinstance(node.args[0], fx.Node)
    return node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim")


#: Functions of numbers alone whose result is a number (or a tuple of numbers).
_ARITHMETIC = frozenset(
    {
        *(operator.getitem, operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv),
        *(operator.mod, operator.neg, math.floor, math.ceil, math.sqrt, round),
    }
)


def _number(node: fx.Node, known: Mapping[fx.Node, Recognised]) -> Number | None:
    if _reads_size(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        # A tensor can be measured; the sizes of a number cannot, nor can anything be made of values, as by size(dim=y).
        measured = node.all_input_nodes == [source] and not isinstance(known[source], Number | Pieces)
        return Number(source) if measured else None
    inputs = node.all_input_nodes
    if node.op == "call_function" and node.target in _ARITHMETIC and inputs:
        return Number(None, tuple(inputs)) if all(isinstance(known[i], Number) for i in inputs) else None
    return None


def is_flat(node: fx.Node, known: Mapping[fx.Node, Recognised]) -> bool:
    """Whether a step is an operation whose result is (n, c)."""
    found = known[node]
    return is_flat(found.source, known) if isinstance(found, Alias) else isinstance(found, Found) and found.op.flat


def recognise(node: fx.Node, modules: Mapping[str, nn.Module], known: Mapping[fx.Node, Recognised]) -> Recognised:
    """What a step of a traced graph is. ``known`` has the steps before it."""
    number = _number(node, known)
    if number is not None:
        return number
    found = _kind(node, modules, known)
    if not isinstance(found, Found) or not any(is_flat(i, known) for i in found.inputs):
        return found
    if isinstance(found.op, Map | Scale):
        return replace(found, op=replace(found.op, flat=True))
    # (n, c) behaves as (n, c, 1, 1) does in these only.
    return found if isinstance(found.op, View) or (isinstance(found.op, Conv) and found.op.flat) else _BREAKS


def _kind(node: fx.Node, modules: Mapping[str, nn.Module], known: Mapping[fx.Node, Recognised]) -> Recognised:
    if node.op == "call_module":
        return _module(node, str(node.target), modules[str(node.target)], known)
    if node.op == "call_function" and node.target in _FUNCTIONS:
        return _call(node, _FUNCTIONS[node.target], known, modules)
    if node.op == "call_method" and node.target in ("view", "reshape"):
        return _view(node, known)
    if node.op == "call_method" and node.target == "expand_as":
        return _expand_as(node, known)
    if node.op == "call_method" and node.target in _METHODS:
        return _call(node, _METHODS[str(node.target)], known, modules)
    return _BREAKS


# Modules

_ACTIVATIONS: dict[type[nn.Module], Callable[[Any], tuple[str, tuple[Any, ...]]]] = {
    nn.ReLU: lambda m: ("relu", ()),
    nn.ReLU6: lambda m: ("relu6", ()),
    nn.Hardtanh: lambda m: ("hardtanh", (m.min_val, m.max_val)),
    nn.LeakyReLU: lambda m: ("leaky_relu", (m.negative_slope,)),
    nn.ELU: lambda m: ("elu", (m.alpha,)),
    nn.Hardswish: lambda m: ("hardswish", ()),
    nn.Hardsigmoid: lambda m: ("hardsigmoid", ()),
    nn.SiLU: lambda m: ("silu", ()),
    nn.Mish: lambda m: ("mish", ()),
    nn.GELU: lambda m: ("gelu", (m.approximate,)),
    nn.Softplus: lambda m: ("softplus", (m.beta, m.threshold)),
    nn.Sigmoid: lambda m: ("sigmoid", ()),
    nn.Tanh: lambda m: ("tanh", ()),
}


def _module(node: fx.Node, path: str, module: nn.Module, known: Mapping[fx.Node, Recognised]) -> Recognised:
    kind = parametrize.type_before_parametrizations(module)
    named = f"({kind.__name__})"
    if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return Other(f"{named} takes more than a map")
    x = node.args[0]
    if has_hooks(module):
        return Other(f"{named} has hooks")
    if "forward" in vars(module) or "_conv_forward" in vars(module):
        return Other(f"{named} has a forward pass of its own")
    if isinstance(module, FilteredConv2d) and kind is FilteredConv2d:
        return _filtered(path, module, x)
    if kind is nn.Conv2d and _is_small(x, known):
        assert isinstance(module, nn.Conv2d)  # with a parametrized weight, perhaps
        plain = (module.kernel_size, module.stride, module.padding) == ((1, 1), (1, 1), (0, 0))
        if plain and module.padding_mode == "zeros":
            return Found(
                Conv(path, (), groups=module.groups, co=module.out_channels, filtered=False),
                (x,),
                (f"{path}.weight", None if module.bias is None else f"{path}.bias"),
            )
    if isinstance(module, nn.Conv2d):
        return _outside(path, module, x, f"{named} is not filtered")
    if kind is nn.BatchNorm2d:
        assert isinstance(module, nn.BatchNorm2d)
        if module.training or module.running_mean is None or module.running_var is None:
            return _outside(path, module, x, f"{named} uses batch statistics")
        scale = None if module.weight is None else f"{path}.weight"
        shift = None if module.bias is None else f"{path}.bias"
        tensors = (f"{path}.running_mean", f"{path}.running_var", scale, shift)
        return Found(Norm(path, (), eps=module.eps), (x,), tensors)
    if kind in _ACTIVATIONS:
        which, settings = _ACTIVATIONS[kind](module)
        return Found(Map(path, (), kind=which, settings=settings), (x,))
    if kind is nn.Identity:
        return Alias(x)
    if kind in (nn.Dropout, nn.Dropout2d):
        assert isinstance(module, nn.modules.dropout._DropoutNd)
        if not module.training or module.p == 0:
            return Alias(x)
        if kind is nn.Dropout:
            return Found(Map(path, (), kind="dropout", settings=(module.p,)), (x,))
        return Found(Drop(path, (), p=module.p), (x,))
    if kind is nn.Linear and is_flat(x, known):
        assert isinstance(module, nn.Linear)
        linear = Conv(path, (), flat=True, co=module.out_features, filtered=False)
        return Found(linear, (x,), (f"{path}.weight", None if module.bias is None else f"{path}.bias"))
    if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1) and _is_small(x, known):
        return Found(View(path, (), flat=True), (x,))
    if kind is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1)):
        return Found(Pool(path, ()), (x,))
    if kind is nn.Upsample:
        assert isinstance(module, nn.Upsample)
        how = {"size": module.size, "scale_factor": module.scale_factor, "mode": module.mode}
        corners = module.align_corners
        return _resize(path, {"input": x, **how, "align_corners": corners, "antialias": False}, known, {})
    return _outside(path, module, x, f"{named} cannot stay on the patch grid")


#: Modules without parameters whose result's shape their own forward pass tells, on tensors without values.
_MEASURED = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d, nn.ReflectionPad2d)


def _outside(path: str, module: nn.Module, x: fx.Node, reason: str) -> Recognised:
    """A module that cannot stay on the grid; where its result's shape is known, a region may go on after it."""
    kind = type(module)
    tensors = tuple(f"{path}.{name}" for name, _ in module.named_parameters(recurse=False))
    if kind in (nn.Conv2d, FilteredConv2d):
        assert isinstance(module, nn.Conv2d)
        conv = module
        return Found(Outside(path, (), reason=reason, measure=lambda shape: _conv_shape(conv, shape)), (x,), tensors)
    if kind in (nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d):
        return Found(Outside(path, (), reason=reason), (x,), tensors)
    if kind in _MEASURED and not getattr(module, "return_indices", False):
        forward: Any = kind.forward
        return Found(Outside(path, (), reason=reason, measure=_measured(lambda t: forward(module, t))), (x,))
    return Other(reason)


def _conv_shape(module: nn.Conv2d, shape: Shape) -> Sequence[int]:
    """Of a convolution's result, with any padding."""
    weight = torch.empty(module.weight.shape, device="meta")
    x = torch.empty(shape, device="meta")
    padding: Any = module.padding
    return F.conv2d(x, weight, None, module.stride, padding, module.dilation, module.groups).shape


def _measured(run: Callable[[Tensor], Tensor]) -> Callable[[Shape], Sequence[int]]:
    """The shape that ``run`` gives a map; it is run on a tensor without values."""
    return lambda shape: run(torch.empty(shape, device="meta")).shape


def _filtered(path: str, module: FilteredConv2d, x: fx.Node) -> Recognised:
    if module.padding_mode != "zeros":
        return _outside(path, module, x, f"pads in mode {module.padding_mode!r} before it filters")
    padding: Any = module.padding
    kernel, dilation = as_pair(module.kernel_size, "kernel", 1), as_pair(module.dilation, "dilation", 1)
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if any(t % 2 for t in total):
            return _outside(path, module, x, "pads one side more than the other before it filters")
        padding = (total[0] // 2, total[1] // 2)
    op = Conv(
        path,
        (),
        kernel=kernel,
        stride=as_pair(module.stride, "stride", 1),
        padding=as_pair(padding, "padding", 0),
        dilation=dilation,
        groups=module.groups,
        co=module.out_channels,
        patch=module.patch,
        library="" if module.library is None else module.library.digest,
    )
    return Found(op, (x,), (f"{path}.weight", None if module.bias is None else f"{path}.bias"))


# Functions and methods


def _arguments(node: fx.Node, signature: str) -> dict[str, Any] | None:
    """A call's arguments by name, defaults filled in; ``signature`` as in ``"input, slope=0.01"``. None if they differ.

    torch's functions in C have no signature that Python can read.
    """
    parameters = []
    for part in signature.split(","):
        name, _, default = part.strip().partition("=")
        value = eval(default, {}) if default else inspect.Parameter.empty  # our own constants below
        parameters.append(inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=value))
    try:
        bound = inspect.Signature(parameters).bind(*node.args, **node.kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    return bound.arguments


Build = Callable[[str, dict[str, Any], Mapping[fx.Node, Recognised], Mapping[str, nn.Module]], Recognised]


def _call(
    node: fx.Node, how: tuple[str, Build], known: Mapping[fx.Node, Recognised], modules: Mapping[str, nn.Module]
) -> Recognised:
    signature, build = how
    arguments = _arguments(node, signature)
    if arguments is None:
        return Other("is called in a way that is not known here")
    return build(node.name, arguments, known, modules)


def _activation(kind: str, *names: str) -> Build:
    def build(name: str, a: dict[str, Any], *_: Any) -> Recognised:
        settings = tuple(a[n] for n in names)
        if not isinstance(a["input"], fx.Node) or any(isinstance(s, fx.Node) for s in settings):
            return _BREAKS
        return Found(Map(name, (), kind=kind, settings=settings), (a["input"],))

    return build


def _dropout(name: str, a: dict[str, Any], *_: Any) -> Recognised:
    if isinstance(a["training"], fx.Node) or isinstance(a["p"], fx.Node) or not isinstance(a["input"], fx.Node):
        return _BREAKS
    if not a["training"] or a["p"] == 0:
        return Alias(a["input"])
    return Found(Map(name, (), kind="dropout", settings=(a["p"],)), (a["input"],))


def _drop(name: str, a: dict[str, Any], *_: Any) -> Recognised:
    found = _dropout(name, a)
    return Found(Drop(name, (), p=a["p"]), found.inputs) if isinstance(found, Found) else found


def _flatten(name: str, a: dict[str, Any], known: Mapping[fx.Node, Recognised], _: Any) -> Recognised:
    x = a["input"]
    if isinstance(x, fx.Node) and (a["start_dim"], a["end_dim"]) in ((1, -1), (1, 3)) and _is_small(x, known):
        return Found(View(name, (), flat=True), (x,))
    return _BREAKS


def _view(node: fx.Node, known: Mapping[fx.Node, Recognised]) -> Recognised:
    """``x.view(n, c)`` and ``x.view(n, c, 1, 1)``, with sizes as numbers or one by one."""
    x, *sizes = node.args
    if len(sizes) == 1 and isinstance(sizes[0], list | tuple):
        sizes = list(sizes[0])
    if node.kwargs or not isinstance(x, fx.Node) or len(sizes) not in (2, 4):
        return _BREAKS
    flat = len(sizes) == 2
    numbers = steps_in(tuple(sizes))
    known_sizes = all(isinstance(s, int | fx.Node) for s in sizes) and all(
        isinstance(known[s], Number) for s in numbers
    )
    if not known_sizes or not (_is_small(x, known) if flat else is_flat(x, known) and sizes[2:] == [1, 1]):
        return _BREAKS
    return Found(View(node.name, (), flat=flat), (x,), number=tuple(sizes))


def _expand_as(node: fx.Node, known: Mapping[fx.Node, Recognised]) -> Recognised:
    """A scale expanded to the map that it is multiplied with: that happens by itself."""
    if len(node.args) != 2 or not isinstance(node.args[0], fx.Node) or not _is_small(node.args[0], known):
        return _BREAKS
    products = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
    if all(user.target in products and set(user.args) == {node, node.args[1]} for user in node.users):
        return Alias(node.args[0])
    return _BREAKS


def _add(sign: float) -> Build:
    def build(name: str, a: dict[str, Any], *_: Any) -> Recognised:
        x, y, alpha = a["input"], a["other"], a.get("alpha", 1)
        if not (isinstance(x, fx.Node) and isinstance(y, fx.Node)) or not isinstance(alpha, int | float):
            return Other("adds something else than two maps")
        return Found(Add(name, (), alpha=sign * alpha), (x, y))

    return build


def _multiply(name: str, a: dict[str, Any], known: Mapping[fx.Node, Recognised], modules: Any) -> Recognised:
    x, y = a["input"], a["other"]
    if isinstance(x, int | float) and not isinstance(x, bool):
        x, y = y, x
    if isinstance(x, fx.Node) and isinstance(y, int | float) and not isinstance(y, bool):
        return Found(Scale(name, (), factor=float(y)), (x,))
    if not (isinstance(x, fx.Node) and isinstance(y, fx.Node)):
        return _BREAKS
    for map_, scale in ((x, y), (y, x)):
        if _is_small(scale, known):
            return Found(Gate(name, ()), (map_, scale))
        if scale.op == "get_attr" and map_.op != "get_attr":
            tensor = attribute(modules, str(scale.target))
            if isinstance(tensor, Tensor) and tensor.shape[-2:] == (1, 1) and tensor.dim() in (3, 4):
                one_image = tensor.dim() == 3 or tensor.shape[0] == 1
                if one_image and tensor.shape[-3] > 1:
                    return Found(Gate(name, ()), (map_,), (str(scale.target),))
    return Other("multiplies two maps")


def _divide(name: str, a: dict[str, Any], *_: Any) -> Recognised:
    x, y = a["input"], a["other"]
    if isinstance(x, fx.Node) and isinstance(y, int | float) and y != 0:
        return Found(Scale(name, (), factor=1 / y), (x,))
    return _BREAKS


def _negate(name: str, a: dict[str, Any], *_: Any) -> Recognised:
    return Found(Scale(name, (), factor=-1.0), (a["input"],))


def _concatenate(name: str, a: dict[str, Any], *_: Any) -> Recognised:
    maps, dim = a["tensors"], a["dim"]
    if dim not in (1, -3) or not isinstance(maps, list | tuple) or not all(isinstance(m, fx.Node) for m in maps):
        return Other("joins something else than maps along their channels")
    return Found(Cat(name, ()), tuple(maps))


def _mean(name: str, a: dict[str, Any], *_: Any) -> Recognised:
    dim = a["dim"]
    if isinstance(dim, list | tuple) and sorted(dim) in ([2, 3], [-2, -1]) and isinstance(a["input"], fx.Node):
        return Found(Pool(name, (), flat=not a["keepdim"]), (a["input"],))
    return Other("is a mean over something else than the whole map")


def _adaptive_pool(name: str, a: dict[str, Any], *_: Any) -> Recognised:
    x, size = a["input"], a["output_size"]
    if size in (1, (1, 1), [1, 1]):
        return Found(Pool(name, ()), (x,))
    if not isinstance(x, fx.Node) or steps_in(size):
        return _BREAKS
    measure = _measured(lambda t: F.adaptive_avg_pool2d(t, size))
    return Found(Outside(name, (), reason=_BREAKS.reason, measure=measure), (x,))


def _max_pool(name: str, a: dict[str, Any], *_: Any) -> Recognised:
    settings = {key: value for key, value in a.items() if key not in ("input", "return_indices")}
    if not isinstance(a["input"], fx.Node) or a["return_indices"] or steps_in(settings):
        return _BREAKS
    measure = _measured(lambda t: F.max_pool2d(t, **settings))
    return Found(Outside(name, (), reason=_BREAKS.reason, measure=measure), (a["input"],))


def _avg_pool(name: str, a: dict[str, Any], *_: Any) -> Recognised:
    settings = {key: value for key, value in a.items() if key != "input"}
    if not isinstance(a["input"], fx.Node) or steps_in(settings):
        return _BREAKS
    measure = _measured(lambda t: F.avg_pool2d(t, **settings))
    return Found(Outside(name, (), reason=_BREAKS.reason, measure=measure), (a["input"],))


#: Ways of resizing that repeat a single pixel everywhere.
_REPEATING = ("nearest", "nearest-exact", "bilinear", "area")


def _resize(name: str, a: dict[str, Any], known: Mapping[fx.Node, Recognised], _: Any) -> Recognised:
    x, size, scale, mode, corners = (a[k] for k in ("input", "size", "scale_factor", "mode", "align_corners"))
    if not isinstance(x, fx.Node) or a["antialias"] or mode not in _REPEATING or steps_in((scale, corners)):
        return _BREAKS
    if steps := steps_in(size):
        if not all(isinstance(known[step], Number) for step in steps):
            return _BREAKS
        number = tuple(size) if isinstance(size, list | tuple) else size
        return Found(Resize(name, (), mode=mode, corners=corners), (x,), number=number)
    if size is not None:
        fixed = as_pair(size, "size", 1) if isinstance(size, int | list | tuple) else None
        return _BREAKS if fixed is None else Found(Resize(name, (), mode=mode, corners=corners, size=fixed), (x,))
    both = (scale, scale) if isinstance(scale, int | float) else tuple(scale or ())
    if len(both) != 2:
        return _BREAKS
    return Found(Resize(name, (), mode=mode, corners=corners, scale=(float(both[0]), float(both[1]))), (x,))


def steps_in(argument: Any) -> list[fx.Node]:
    """The steps in an argument."""
    found: list[fx.Node] = []
    fx.node.map_arg(argument, found.append)
    return found


def _chunk(name: str, a: dict[str, Any], *_: Any) -> Recognised:
    return (
        Pieces(a["input"], ("chunk", a["chunks"])) if a["dim"] in (1, -3) and isinstance(a["chunks"], int) else _BREAKS
    )


def _split(name: str, a: dict[str, Any], *_: Any) -> Recognised:
    size = a["size"]
    sizes = size if isinstance(size, int) else tuple(size) if isinstance(size, list | tuple) else None
    plain = isinstance(sizes, int) or (sizes is not None and all(isinstance(s, int) for s in sizes))
    return Pieces(a["input"], ("split", sizes)) if a["dim"] in (1, -3) and plain else _BREAKS


def _item(name: str, a: dict[str, Any], known: Mapping[fx.Node, Recognised], modules: Any) -> Recognised:
    source, index = a["a"], a["b"]
    if not isinstance(source, fx.Node):
        return _BREAKS
    pieces = known.get(source)
    if isinstance(pieces, Pieces):
        if not isinstance(index, int):
            return _BREAKS
        return Found(Slice(name, (), how=(*pieces.how, index)), (pieces.source,))
    everything = slice(None)
    whole = (everything, None)
    if isinstance(index, tuple) and len(index) >= 2 and index[0] == everything and all(i in whole for i in index[2:]):
        channels = index[1]
        if isinstance(channels, slice) and channels.step in (None, 1) and len(index) <= 4:
            bounds = (channels.start, channels.stop)
            if index[2:] == (None, None) and bounds == (None, None) and is_flat(source, known):
                return Found(View(name, ()), (source,))
            if None not in index[2:] and all(b is None or isinstance(b, int) for b in bounds):
                return Found(Slice(name, (), how=("slice", *bounds)), (source,))
    return _BREAKS


_UNARY, _BINARY = "input, inplace=False", "input, other"
_FUNCTIONS: dict[Any, tuple[str, Build]] = {
    F.relu: (_UNARY, _activation("relu")),
    torch.relu: ("input", _activation("relu")),
    torch.relu_: ("input", _activation("relu")),
    F.relu6: (_UNARY, _activation("relu6")),
    F.hardtanh: ("input, min_val=-1.0, max_val=1.0, inplace=False", _activation("hardtanh", "min_val", "max_val")),
    F.leaky_relu: ("input, negative_slope=0.01, inplace=False", _activation("leaky_relu", "negative_slope")),
    F.elu: ("input, alpha=1.0, inplace=False", _activation("elu", "alpha")),
    F.hardswish: (_UNARY, _activation("hardswish")),
    F.hardsigmoid: (_UNARY, _activation("hardsigmoid")),
    F.silu: (_UNARY, _activation("silu")),
    F.mish: (_UNARY, _activation("mish")),
    F.gelu: ("input, approximate='none'", _activation("gelu", "approximate")),
    F.softplus: ("input, beta=1, threshold=20", _activation("softplus", "beta", "threshold")),
    torch.sigmoid: ("input", _activation("sigmoid")),
    F.sigmoid: ("input", _activation("sigmoid")),
    torch.tanh: ("input", _activation("tanh")),
    F.tanh: ("input", _activation("tanh")),
    F.dropout: ("input, p=0.5, training=True, inplace=False", _dropout),
    F.dropout2d: ("input, p=0.5, training=True, inplace=False", _drop),
    torch.flatten: ("input, start_dim=0, end_dim=-1", _flatten),
    operator.add: (_BINARY, _add(1)),
    operator.iadd: (_BINARY, _add(1)),
    torch.add: (f"{_BINARY}, alpha=1", _add(1)),
    operator.sub: (_BINARY, _add(-1)),
    operator.isub: (_BINARY, _add(-1)),
    torch.sub: (f"{_BINARY}, alpha=1", _add(-1)),
    operator.mul: (_BINARY, _multiply),
    operator.imul: (_BINARY, _multiply),
    torch.mul: (_BINARY, _multiply),
    operator.truediv: (_BINARY, _divide),
    operator.itruediv: (_BINARY, _divide),
    operator.neg: ("input", _negate),
    torch.cat: ("tensors, dim=0", _concatenate),
    torch.concat: ("tensors, dim=0", _concatenate),
    torch.mean: ("input, dim=None, keepdim=False", _mean),
    F.adaptive_avg_pool2d: ("input, output_size", _adaptive_pool),
    F.max_pool2d: (
        "input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False",
        _max_pool,
    ),
    F.avg_pool2d: (
        "input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None",
        _avg_pool,
    ),
    F.interpolate: (
        "input, size=None, scale_factor=None, mode='nearest', align_corners=None, recompute_scale_factor=None, "
        "antialias=False",
        _resize,
    ),
    torch.chunk: ("input, chunks, dim=0", _chunk),
    torch.split: ("input, size, dim=0", _split),
    operator.getitem: ("a, b", _item),
}
_METHODS: dict[str, tuple[str, Build]] = {
    "flatten": _FUNCTIONS[torch.flatten],
    "relu": _FUNCTIONS[torch.relu],
    "relu_": _FUNCTIONS[torch.relu],
    "sigmoid": _FUNCTIONS[torch.sigmoid],
    "sigmoid_": _FUNCTIONS[torch.sigmoid],
    "tanh": _FUNCTIONS[torch.tanh],
    "tanh_": _FUNCTIONS[torch.tanh],
    "add": _FUNCTIONS[torch.add],
    "add_": _FUNCTIONS[torch.add],
    "sub": _FUNCTIONS[torch.sub],
    "sub_": _FUNCTIONS[torch.sub],
    "mul": _FUNCTIONS[torch.mul],
    "mul_": _FUNCTIONS[torch.mul],
    "div": _FUNCTIONS[operator.truediv],
    "neg": _FUNCTIONS[operator.neg],
    "mean": _FUNCTIONS[torch.mean],
    "chunk": _FUNCTIONS[torch.chunk],
    "split": _FUNCTIONS[torch.split],
}


def attribute(modules: Mapping[str, nn.Module], path: str) -> Any:
    """The attribute at a dotted path, or None."""
    owner, _, name = path.rpartition(".")
    return getattr(modules.get(owner), name, None)


def _is_small(node: fx.Node, known: Mapping[fx.Node, Recognised]) -> bool:
    """Whether a step's map surely is one pixel: it comes from a mean over the whole map by steps that keep that."""
    found = known.get(node)
    if isinstance(found, Alias):
        return _is_small(found.source, known)
    if not isinstance(found, Found) or isinstance(found.op, Outside | Resize):
        return False
    if found.op.flat:
        return False
    if isinstance(found.op, Pool | View):
        return True
    if isinstance(found.op, Conv) and found.op.filtered and (found.op.kernel, found.op.padding) != ((1, 1), (0, 0)):
        return False
    return all(_is_small(source, known) for source in found.inputs)


def changes_input(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a step works in place on its first argument."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, nn.modules.dropout._DropoutNd) and not module.training:
            return False
        return bool(getattr(module, "inplace", False))
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        arithmetic = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
        if node.target in arithmetic or (name.endswith("_") and not name.startswith("_")) or name == "setitem":
            return True
        if node.kwargs.get("inplace", False) or node.kwargs.get("out") is not None:
            return True
        try:
            given = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
        except (TypeError, ValueError):  # a function in C, which has no argument of that name
            return False
        return bool(given.arguments.get("inplace", False))
    return False

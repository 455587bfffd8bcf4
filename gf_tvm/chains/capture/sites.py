"""The convolutions in a graph: where each is computed, what it is called, and which are filtered."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...core.geometry import Pair, as_pair
from ...errors import ModelError
from .aten import MODULE, PATH, SOURCE, arguments_of, checkpoints, graph_of, value_of

_aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Arguments:
    """What a two-dimensional convolution is called with."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int


@dataclass(frozen=True)
class Site:
    """One call of a convolution.

    Attributes:
        node: whose value is its result.
        name: fully qualified name of the module that computes it; with a number where one module has several.
        arguments: None where it is no two-dimensional convolution that can be filtered, for ``obstacle``.
        patch, library: of a convolution that is filtered by its own module.
    """

    node: fx.Node
    name: str
    arguments: Arguments | None
    obstacle: str | None = None
    patch: Pair | None = None
    library: str = ""


@dataclass(frozen=True)
class Filter:
    """How a convolution is filtered; ``library``: a digest, or none."""

    patch: Pair
    library: str = ""


def module_of(node: fx.Node) -> tuple[str, type[Any] | None]:
    """Fully qualified name and class of the module whose code computes a step."""
    found: tuple[str, type[Any] | None] = node.meta.get(MODULE, ("", None))
    return found


@dataclass(frozen=True)
class Place:
    """Where in a model the code lies that Dynamo captures.

    Attributes:
        names: fully qualified names of the model's modules, by ``id``.
        owner: the module whose code it is, if it is one.
        whole: whether it is the model's only graph, if it does not end early.
    """

    names: Mapping[int, str]
    owner: nn.Module | None
    whole: bool

    @property
    def prefix(self) -> str:
        """What stands before names that are relative to ``owner``."""
        name = "" if self.owner is None else self.names.get(id(self.owner), "")
        return f"{name}." if name else ""


def name_modules(graph: fx.GraphModule, place: Place) -> None:
    """Write where modules lie in the model into a graph that Dynamo captured, graphs inside of it too.

    Dynamo names them by how the captured code reaches them: from a part of the model, where it breaks the graph, and
    by a list that holds them, where there is one.
    """
    own = {} if place.owner is None else {str(id(place.owner)): ("", type(place.owner))}
    for part in graph.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            if node.op != "placeholder":
                stack = node.meta.get("nn_module_stack") or own
                node.meta["nn_module_stack"] = {
                    key: (_named(key, path, place.names), kind) for key, (path, kind) in stack.items()
                }


def _named(key: str, path: str, names: Mapping[int, str]) -> str:
    number = key.partition("@")[0]  # a module that runs again has the number of the call behind it
    name = names.get(int(number)) if number.isdecimal() else None
    if name is None:
        return path
    return "L['module']" + "".join(f"[{part!r}]" for part in name.split(".") if name)


def name_of(node: fx.Node) -> str:
    """What people call a step: the module that it is, or the module that it lies in and the operation."""
    if node.op == "placeholder":
        return str(node.meta.get(PATH, node.meta[SOURCE]))
    path, kind = module_of(node)
    own = str(node.target).split(".")[1] if isinstance(node.target, torch._ops.OpOverload) else node.name
    if kind is not None and str(getattr(kind, "__module__", "")).startswith("torch.nn.modules"):
        return path or own
    return f"{path}.{own}" if path else own


_OTHERS = {
    "conv1d": "is a one-dimensional convolution",
    "conv3d": "is a three-dimensional convolution",
    "conv_transpose1d": "is a transposed convolution",
    "conv_transpose2d": "is a transposed convolution",
    "conv_transpose3d": "is a transposed convolution",
}


def sites_of(module: fx.GraphModule) -> list[Site]:
    """The convolutions of a graph and of its checkpointed parts, in the order in which they run."""
    found: list[Site] = []
    _collect(module, found, {})
    return found


def _collect(module: fx.GraphModule, found: list[Site], weights: dict[str, dict[Any, int]]) -> None:
    parts = {node: getattr(module, graph_of(node)) for node in checkpoints(module.graph)}

    def named(node: fx.Node, weight: Any) -> str:
        path, _ = module_of(node)
        known = weights.setdefault(path, {})
        number = known.setdefault(weight, len(known))
        path = path or "conv2d"
        return path if number == 0 else f"{path}:{number}"

    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        if node in parts:
            _collect(parts[node], found, weights)
        elif node.target in (_aten.conv2d.default, _aten.conv2d.padding):
            arguments, obstacle = _plain(node)
            found.append(Site(node, named(node, node.args[1]), arguments, obstacle))
        elif node.target is torch.ops.gf_tvm.conv2d.default:
            for user in node.users:
                if user.target is operator.getitem and user.args[1] == 0:
                    x, weight, bias, stride, padding, dilation, groups, patch, library, _ = node.args
                    pairs = (as_pair(p, "", 0) for p in (stride, padding, dilation))
                    s, p, d = pairs
                    arguments = Arguments(x, weight, bias, s, p, d, groups)
                    own = as_pair(patch, "patch", 1)
                    found.append(Site(user, named(node, weight), arguments, None, own, library))
        elif isinstance(node.target, torch._ops.OpOverload):
            reason = _OTHERS.get(str(node.target).split(".")[1])
            if reason is not None:
                found.append(Site(node, named(node, node.args[1]), None, reason))


def _plain(node: fx.Node) -> tuple[Arguments | None, str | None]:
    given = arguments_of(node)
    x, weight = given["input"], given["weight"]
    shapes = [value_of(t) for t in (x, weight)]
    if not all(isinstance(t, Tensor) for t in shapes):
        return None, "its tensors are not known when it is compiled"
    if any(not t.dtype.is_floating_point for t in shapes):
        return None, f"its weight is {shapes[1].dtype}"
    if shapes[0].dim() != 4:
        return None, "its input is a single image without a batch"
    stride, dilation = as_pair(_pair(given["stride"]), "stride", 1), as_pair(_pair(given["dilation"]), "dilation", 1)
    padding = given["padding"]
    if isinstance(padding, str):  # "valid", or "same" where that is even
        same = padding == "same"
        padding = [d * (k - 1) // 2 if same else 0 for d, k in zip(dilation, shapes[1].shape[2:], strict=True)]
    padding = as_pair(_pair(padding), "padding", 0)
    return Arguments(x, weight, given["bias"], stride, padding, dilation, int(given["groups"])), None


def _pair(value: Any) -> Any:
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


@dataclass(frozen=True)
class Choice:
    """Which convolutions are filtered, and how.

    Attributes:
        patch: for all, or by name.
        last: that many of the last in the order in which they run; a name that runs several times counts once.
        names: these; with ``last`` what counts where the order is not known.
    """

    patch: Pair | Mapping[str, Pair]
    last: int | None = None
    names: frozenset[str] | None = None
    library: str = ""

    def patch_of(self, name: str) -> Pair | None:
        """Of a convolution that was chosen; None where there is none for this name."""
        return self.patch.get(name) if isinstance(self.patch, Mapping) else self.patch


@dataclass
class Chosen:
    """The convolutions of a graph, chosen or not.

    Attributes:
        filters: by result.
        left_alone: by name, why a convolution is not filtered.
    """

    sites: Sequence[Site]
    filters: dict[fx.Node, Filter] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)


def choose(sites: Sequence[Site], choice: Choice | None, whole: bool) -> Chosen:
    """Apply a choice to a graph's convolutions.

    Args:
        choice: None for those that are filtered by their own modules, no others.
        whole: whether the graph is the model's only one, so that its order is the model's.

    Raises:
        ModelError: ``last`` is more than there are.
    """
    found = Chosen(sites)
    picked: set[str] | None = None
    if choice is not None and choice.last is not None and (whole or choice.names is None):
        order = list(dict.fromkeys(site.name for site in sites if site.arguments is not None))
        if choice.last > len(order) and whole and choice.names is not None:
            raise ModelError(
                f"last must be between 1 and {len(order)}, the number of convolutions that run; got {choice.last}"
            )
        picked = set(order[-choice.last :])
    for site in sites:
        if site.arguments is None:
            found.left_alone[site.name] = site.obstacle or "cannot be filtered"
            continue
        if choice is not None and picked is not None:
            # What an earlier choice filtered stays; what this one filtered by a guess at the order need not.
            chosen = site.name in picked or (site.patch is not None and site.name not in (choice.names or ()))
        elif choice is None or site.patch is not None:
            chosen = site.patch is not None
        else:
            chosen = choice.names is not None and site.name in choice.names
        patch = site.patch if choice is None or site.patch is not None else choice.patch_of(site.name)
        if not chosen or patch is None:
            found.left_alone[site.name] = "not selected"
            continue
        library = site.library if choice is None or site.patch is not None else choice.library
        found.filters[site.node] = Filter(patch, library)
    return found

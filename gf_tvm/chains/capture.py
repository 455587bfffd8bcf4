"""Traces a module with torch.fx and finds the regions of it that may stay on the patch grid."""

from __future__ import annotations

import operator
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..ops.module import FilteredConv2d
from .graph import Conv, Op, Outside, Pool, Region, Resize, View
from .recognise import (
    Alias,
    Found,
    Number,
    Other,
    Pieces,
    Recognised,
    attribute,
    changes_input,
    has_hooks,
    is_flat,
    only_metadata,
    recognise,
    steps_in,
)

_hooks = threading.local()
_counting = threading.Lock()

#: Why a convolution is in no chain.
UNTRAINED = "has nothing trained in it or before it"


class CannotTrace(Exception):
    """Why a module cannot be traced; the message completes "cannot be traced: ..."."""


@dataclass(frozen=True)
class CapturedRegion:
    """A region, and where its values and tensors are found.

    Attributes:
        nodes: the step that computes each value, entries first.
        tensors: paths of parameters and buffers.
        numbers: arguments that operations take when they run: numbers and steps.
    """

    region: Region
    nodes: tuple[fx.Node, ...]
    tensors: tuple[str, ...]
    numbers: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Capture:
    """A traced module.

    Attributes:
        graph: its steps; modules are named relative to it.
        order: steps and regions in the order of execution.
        result: how the traced module's result is put together from the tuple that the graph returns.
        alone: filtered convolutions that are in no region, and why.
        numbers: steps that are known before the maps that they measure are there.
        ways: by step that is measured, the operations from which its result's size follows.
    """

    graph: fx.Graph
    order: tuple[fx.Node | CapturedRegion, ...]
    result: pytree.TreeSpec
    alone: dict[str, str]
    numbers: dict[fx.Node, Number]
    ways: dict[fx.Node, tuple[tuple[fx.Node, Found], ...]]


class _Module(nn.Module):
    """Calls a module's own forward pass, without its hooks: those run around it in any case.

    Results of other classes than fx knows (transformers' outputs) are taken apart, into a tuple.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.result: pytree.TreeSpec | None = None

    def run(self, *given: Tensor) -> tuple[Any, ...]:
        leaves, self.result = pytree.tree_flatten(type(self.module).forward(self.module, *given))
        return tuple(leaves)


class _One(_Module):
    def forward(self, a: Tensor) -> Any:
        return self.run(a)


class _Two(_Module):
    def forward(self, a: Tensor, b: Tensor) -> Any:
        return self.run(a, b)


class _Three(_Module):
    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Any:
        return self.run(a, b, c)


#: By number of tensors that the module is called with; a tracer reads names of arguments from a signature.
_WRAPPERS: dict[int, type[_Module]] = {1: _One, 2: _Two, 3: _Three}


class _Proxy(fx.Proxy):
    """Records ``y += x`` as what it is; fx would record ``y = y + x``, and another name of y would keep its value."""

    def _inplace(self, operation: Callable[..., Any], other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._inplace(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._inplace(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._inplace(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._inplace(operator.itruediv, other)


class _Tracer(fx.Tracer):
    def __init__(self, coarse: bool) -> None:
        super().__init__()
        self.coarse = coarse
        self.context = _context()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """A graph does not record under which ``torch.no_grad``, ``torch.autocast`` or checkpointing a step ran."""
        if _context() != self.context:
            raise CannotTrace("its Python code switches gradients or autocast on or off, or checkpoints a part")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """What has hooks is one step, and what has nothing filtered inside where Python code cannot be traced."""
        if isinstance(m, FilteredConv2d) or has_hooks(m):
            return True
        if self.coarse and not any(isinstance(inner, FilteredConv2d) for inner in m.modules()):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """What is traced into has no hooks of its own; those for all modules must not run on stand-ins."""
        return super().call_module(m, m.forward, args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        """A tensor that forward made itself would be the same in every run (and is hung on the module by fx)."""
        if isinstance(a, dict) and type(a) not in (dict, fx.immutable_collections.immutable_dict):
            raise CannotTrace(f"its Python code makes a {type(a).__name__}")  # fx would make it a plain dictionary
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            held = any(a is buffer for buffer in self.root.buffers()) or a in self.tensor_attrs
            if not held:
                raise CannotTrace("its Python code makes a tensor")
        return super().create_arg(a)


def capture(module: nn.Module, needs: Sequence[bool], everything: bool = False) -> Capture:
    """Trace ``module`` in its present mode.

    Args:
        needs: for each tensor that it is called with, whether its gradient is needed.
        everything: take all parameters as trained, whatever they say.

    Raises:
        CannotTrace: its Python code depends on values, makes tensors, draws random numbers, or changes maps in place
            that are used elsewhere.
    """
    if len(needs) not in _WRAPPERS:
        raise CannotTrace(f"it is called with {len(needs)} tensors")
    wrapper = _WRAPPERS[len(needs)](module)
    wrapper.training = module.training
    graph = _trace(wrapper)
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = str(node.target).removeprefix("module.")
    modules = dict(module.named_modules(remove_duplicate=False))
    _refuse_shared_changes(graph, modules)
    known: dict[fx.Node, Recognised] = {}
    for node in graph.nodes:
        known[node] = recognise(node, modules, known)
    _settle(graph, known)
    _leave_untrained(graph, known, modules, needs, everything)
    _leave_flat(graph, known)
    ways = _measure(graph, known)
    parts, alone = _parts(graph, known, modules)
    numbers = {node: found for node, found in known.items() if isinstance(found, Number)}
    assert wrapper.result is not None
    return Capture(graph, _order(graph, known, parts), wrapper.result, alone, numbers, ways)


def _trace(wrapper: _Module) -> fx.Graph:
    before = _generators()
    failure: Exception | None = None
    for coarse in (False, True):
        try:
            with _counted_hooks():
                graph = _Tracer(coarse).trace(wrapper)
        except Exception as error:  # the module is the user's code, and tracing runs it on stand-ins
            failure = failure or error
            continue
        if _generators() != before:
            raise CannotTrace("its Python code draws random numbers")
        return graph
    assert failure is not None
    text = " ".join(str(failure).split())[:160]
    raise CannotTrace(text if isinstance(failure, CannotTrace) else f"{type(failure).__name__}: {text}") from None


def _context() -> tuple[Any, ...]:
    """Switches of this thread that decide how a step runs."""
    devices = ("cpu", "cuda")
    autocast = tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices)
    hooks = getattr(_hooks, "count", 0)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), autocast, hooks


@contextmanager
def _counted_hooks() -> Iterator[None]:
    """Meanwhile ``_hooks.count`` tells how many hooks on saved tensors hold in this thread, as checkpointing sets them.

    Newer versions of PyTorch would tell, 2.7 does not.
    """
    with _counting:
        yield from _count_hooks()


def _count_hooks() -> Iterator[None]:
    module, thread = torch._C._autograd, threading.get_ident()
    names = {"_push_saved_tensors_default_hooks": 1, "_pop_saved_tensors_default_hooks": -1}
    true = {name: getattr(module, name) for name in names}

    def counted(name: str, *args: Any) -> Any:
        if threading.get_ident() == thread:
            _hooks.count += names[name]
        return true[name](*args)

    _hooks.count = 0
    try:
        for name in names:
            setattr(module, name, partial(counted, name))
        yield
    finally:
        for name, function in true.items():
            setattr(module, name, function)


def _generators() -> tuple[bytes, str]:
    return torch.get_rng_state().numpy().tobytes(), repr(random.getstate())


def _refuse_shared_changes(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
    """Steps are run in another order, so nothing may be changed in place that something else reads, too."""
    for node in graph.nodes:
        if node.op not in ("call_module", "call_function", "call_method") or not changes_input(node, modules):
            continue
        source = node.args[0] if node.args else None
        while isinstance(source, fx.Node) and _hands_on(source, modules) and _readers_of_values(source) == 1:
            source = source.args[0]
        if not isinstance(source, fx.Node) or _readers_of_values(source) > 1 or not _fresh(source, modules):
            raise CannotTrace(f"{node.name} changes in place what may be used elsewhere")


def _readers_of_values(node: fx.Node) -> int:
    return sum(not only_metadata(user) for user in node.users)


def _hands_on(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a step returns its argument, or a view of it."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        module = modules[str(node.target)]
        idle = isinstance(module, nn.modules.dropout._DropoutNd) and not module.training
        passes = idle or type(module) in (nn.Identity, nn.Flatten)
        return passes and not has_hooks(module) and "forward" not in vars(module)
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op in ("call_method", "call_function") and name in ("flatten", "view", "reshape", "squeeze")


def _fresh(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a step's result is memory of its own."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, nn.Identity | nn.Flatten | nn.Unflatten | nn.modules.dropout._DropoutNd):
            return False
        if getattr(module, "inplace", False):  # its input was seen to be fresh
            return True
        return isinstance(module, nn.Conv2d) or type(module).__module__.startswith("torch.nn")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        return name in _MAKES
    return node.op == "call_method" and str(node.target).rstrip("_") in _MAKES


#: Functions and methods whose result is never a view of an argument (unless they work in place on a fresh one).
_MAKES = frozenset(
    """add iadd sub isub mul imul truediv itruediv div neg cat concat mean adaptive_avg_pool2d relu relu6 hardtanh elu
    leaky_relu hardswish hardsigmoid silu mish gelu softplus sigmoid tanh conv2d batch_norm interpolate max_pool2d
    avg_pool2d matmul linear""".split()  # noqa: SIM905 (a list of forty strings is no better to read)
)


def _settle(graph: fx.Graph, known: dict[fx.Node, Recognised]) -> None:
    """Pieces that are used in other ways than one by one are steps like any other, and so are their users."""
    for node in graph.nodes:
        if isinstance(known[node], Pieces) and not all(isinstance(known[user], Found) for user in node.users):
            known[node] = Other("cannot stay on the patch grid")
            for user in node.users:
                known[user] = Other("cannot stay on the patch grid")


def _leave_untrained(
    graph: fx.Graph,
    known: dict[fx.Node, Recognised],
    modules: Mapping[str, nn.Module],
    needs: Sequence[bool],
    everything: bool,
) -> None:
    """Steps that no gradient is needed of run as they are, and form no region."""
    flags = iter(needs)
    needed: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            needed[node] = next(flags)
            continue
        trained = False
        if node.op == "call_module":
            trained = any(p.requires_grad or everything for p in modules[str(node.target)].parameters())
        elif node.op == "get_attr":
            value = attribute(modules, str(node.target))
            trained = isinstance(value, Tensor) and (value.requires_grad or (everything and value.is_floating_point()))
        needed[node] = trained or any(needed[source] for source in node.all_input_nodes)
        if isinstance(known[node], Found) and not needed[node]:
            known[node] = Other(UNTRAINED)


def _leave_flat(graph: fx.Graph, known: dict[fx.Node, Recognised]) -> None:
    """Values (n, c) that go elsewhere than back to a map are no part of a region: a classifier is one step as ever.

    The mean over a map may be a region's last operation.
    """

    while True:
        outside = {
            _source(source, known)
            for node in graph.nodes
            if not isinstance(known[node], Found | Alias | Number)
            for source in node.all_input_nodes
        }
        gone = []
        for node in graph.nodes:
            found = known[node]
            if not isinstance(found, Found) or isinstance(found.op, Pool):
                continue
            back, there = (isinstance(found.op, View) and found.op.flat is flat for flat in (False, True))
            source = _inputs(node, known)[0]
            reads_flat = back or (found.op.flat and not there)
            if (found.op.flat and node in outside) or (
                reads_flat and (source in outside or not is_flat(source, known))
            ):
                gone.append(node)
        if not gone:
            return
        known.update(dict.fromkeys(gone, Other("cannot stay on the patch grid")))


def _source(node: fx.Node, known: Mapping[fx.Node, Recognised]) -> fx.Node:
    """The step whose result ``node`` returns as it is."""
    while isinstance(found := known[node], Alias):
        node = found.source
    return node


def _measure(graph: fx.Graph, known: dict[fx.Node, Recognised]) -> dict[fx.Node, tuple[tuple[fx.Node, Found], ...]]:
    """Let sizes wait for no region: they follow from those of the maps that come into it.

    Returns, by step that is measured, the operations between those maps and its result, with the steps that compute
    their inputs.
    """
    origins: dict[fx.Node, dict[fx.Node, None]] = {}  # what has to run before the size of a result is known
    before: dict[fx.Node, set[fx.Node]] = {}
    ways: dict[fx.Node, tuple[tuple[fx.Node, Found], ...]] = {}
    for position, node in enumerate(graph.nodes):
        found = known[node]
        if isinstance(found, Number) and found.source is not None:
            source = _source(found.source, known)
            if is_flat(source, known):  # it has two dimensions in the network and four in a region
                known[node], ways[source] = Number(source, (source,)), ()
                continue
            known[node] = Number(source, tuple(origins[source]))
            steps = [step for step in list(graph.nodes)[:position] if step in before[source]]
            ways[source] = tuple(
                (step, replace(what, inputs=tuple(_inputs(step, known))))
                for step in steps
                if isinstance(what := known[step], Found)
            )
        if not isinstance(found, Found):
            origins[node], before[node] = {node: None}, set()
            continue
        inputs = _inputs(node, known)
        origins[node] = {o: None for source in inputs for o in origins[source]} | dict.fromkeys(found.number_steps)
        before[node] = {node}.union(*(before[source] for source in inputs))
    return ways


def _inputs(node: fx.Node, known: Mapping[fx.Node, Recognised]) -> list[fx.Node]:
    """The maps (and what else comes from outside of all regions) that a step reads."""
    found = known[node]
    steps = found.inputs if isinstance(found, Found | Number) else node.all_input_nodes
    return [_source(step, known) for step in steps]


def _waits_for(node: fx.Node, known: Mapping[fx.Node, Recognised]) -> list[fx.Node]:
    """What has to be there before a step can run."""
    found = known[node]
    return [*_inputs(node, known), *(found.number_steps if isinstance(found, Found) else ())]


def _parts(
    graph: fx.Graph, known: Mapping[fx.Node, Recognised], modules: Mapping[str, nn.Module]
) -> tuple[list[CapturedRegion], dict[str, str]]:
    """Regions: connected operations with nothing between them that is none.

    A step's depth counts how often the way to it leaves and enters regions; operations of one depth can run together.
    """
    depth = _depths(graph, known)
    group = _groups(graph, known, lambda source, node: depth[source] == depth[node])
    parts, alone = [], {}
    positions = {node: k for k, node in enumerate(graph.nodes)}
    for members in {id(g): g for g in group.values()}.values():
        ordered = sorted(members, key=positions.__getitem__)
        convs = {node: op for node in ordered if isinstance(op := _op(known[node]), Conv) and op.filtered}
        if convs and sum(not isinstance(_op(known[node]), Outside) for node in ordered) > 1:
            parts.append(_part(ordered, known, modules, graph))
        else:
            alone.update({op.name: _only_neighbours(node, known, modules) for node, op in convs.items()})
    for node in graph.nodes:
        found = known[node]
        filtered = node.op == "call_module" and isinstance(modules[str(node.target)], FilteredConv2d)
        if filtered and isinstance(found, Other):
            alone[str(node.target)] = found.reason
    return parts, alone


def _depths(graph: fx.Graph, known: Mapping[fx.Node, Recognised]) -> dict[fx.Node, int]:
    """How often the way to a step leaves and enters regions, at least; later, where that joins it to its users."""
    depth: dict[fx.Node, int] = {}
    for node in graph.nodes:
        inputs = _waits_for(node, known)
        if isinstance(known[node], Found):
            depth[node] = max((depth[i] + (not isinstance(known[i], Found)) for i in inputs), default=0)
        else:
            depth[node] = max((depth[i] for i in inputs), default=-1)
    readers = _readers(graph, known)
    leaves = {
        node
        for node in readers
        if any(not isinstance(known[user], Found) and not only_metadata(user) for user in readers[node])
    }
    while True:
        # What a value that has to leave in any case would connect is connected by nothing.
        group = _groups(graph, known, lambda source, node: depth[source] == depth[node] and source not in leaves)
        for members in {id(g): g for g in group.values()}.values():
            users = {user for node in members for user in readers[node]} - members
            inside = {user for user in users if isinstance(known[user], Found)}
            later = min((depth[user] for user in inside), default=-1)
            if users == inside and later > max(depth[node] for node in members):
                depth.update(dict.fromkeys(members, later))
                break
        else:
            return depth


def _readers(graph: fx.Graph, known: Mapping[fx.Node, Recognised]) -> dict[fx.Node, set[fx.Node]]:
    """By step, the steps that read its result, perhaps through one that hands it on."""
    readers: dict[fx.Node, set[fx.Node]] = {node: set() for node in graph.nodes}
    for node in graph.nodes:
        if not isinstance(known[node], Alias | Pieces):
            for source in _inputs(node, known):
                readers[source].add(node)
    return readers


def _groups(
    graph: fx.Graph, known: Mapping[fx.Node, Recognised], joined_by: Callable[[fx.Node, fx.Node], bool]
) -> dict[fx.Node, set[fx.Node]]:
    """Operations that are connected by what ``joined_by`` (source, reader) says."""
    group: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        if not isinstance(known[node], Found):
            continue
        joined = {node}
        for source in _inputs(node, known):
            if source in group and joined_by(source, node):
                joined |= group[source]
        for member in joined:
            group[member] = joined
    return group


def _op(found: Recognised) -> Op | None:
    return found.op if isinstance(found, Found) else None


def _part(
    ordered: list[fx.Node],
    known: Mapping[fx.Node, Recognised],
    modules: Mapping[str, nn.Module],
    graph: fx.Graph,
) -> CapturedRegion:
    members = set(ordered)
    entries = list(dict.fromkeys(i for node in ordered for i in _inputs(node, known) if i not in members))
    numbers = {node: v for v, node in enumerate((*entries, *ordered))}
    paths: dict[str, int] = {}
    ops = []
    taken: list[Any] = []
    for node in ordered:
        found = known[node]
        assert isinstance(found, Found)
        tensors = tuple(None if path is None else paths.setdefault(path, len(paths)) for path in found.tensors)
        op = replace(found.op, inputs=tuple(numbers[i] for i in _inputs(node, known)), tensors=tensors)
        if found.number is not None:
            assert isinstance(op, Resize | View)
            op = replace(op, number=len(taken))
            taken.append(found.number)
        ops.append(op)
    exits: dict[int, str] = {}
    seen: set[int] = set()
    for node in graph.nodes:
        if node in members or isinstance(known[node], Alias | Pieces):
            continue
        for source in _inputs(node, known):
            if source in members and only_metadata(node):
                seen.add(numbers[source])
            elif source in members:
                exits.setdefault(numbers[source], _user(node, known, modules))
    names = tuple(str(node.target) if node.op == "call_module" else node.name for node in entries)
    return CapturedRegion(
        Region(len(entries), tuple(ops), exits, frozenset(seen - exits.keys()), names),
        (*entries, *ordered),
        tuple(paths),
        tuple(taken),
    )


def _user(node: fx.Node, known: Mapping[fx.Node, Recognised], modules: Mapping[str, nn.Module]) -> str:
    """Why a gradient that comes from ``node`` has full size."""
    found = known[node]
    if node.op == "output":
        return "it is a result of the traced module"
    name = str(node.target) if node.op == "call_module" else node.name
    if isinstance(found, Other):
        return f"{name} {found.reason}"
    if isinstance(found, Found) and isinstance(found.op, Outside):
        return f"{name} {found.op.reason}"
    return f"{name} reads something else as well that comes later"


def _only_neighbours(node: fx.Node, known: Mapping[fx.Node, Recognised], modules: Mapping[str, nn.Module]) -> str:
    users = list(node.users)
    return _user(users[0], known, modules) if users else "nothing reads it"


def _order(
    graph: fx.Graph, known: Mapping[fx.Node, Recognised], parts: list[CapturedRegion]
) -> tuple[fx.Node | CapturedRegion, ...]:
    """Every step after what it reads, as near to the traced order as regions allow."""
    part_of = {node: part for part in parts for node in part.nodes[part.region.entries :]}
    order: list[fx.Node | CapturedRegion] = []
    done: set[int] = set()

    def emit(what: fx.Node | CapturedRegion) -> None:
        if id(what) in done:
            return
        done.add(id(what))
        if isinstance(what, CapturedRegion):
            for step in [*what.nodes[: what.region.entries], *steps_in(what.numbers)]:
                visit(step)
        else:
            number = known[what]
            for step in number.inputs if isinstance(number, Number) else what.all_input_nodes:
                visit(step)
        order.append(what)

    def visit(node: fx.Node) -> None:
        emit(part_of.get(node, node))

    def superfluous(node: fx.Node) -> bool:
        """Whether a step only hands on what regions read from its source."""
        passes = isinstance(known[node], Alias | Pieces)
        others = [user for user in node.users if user not in part_of and not isinstance(known[user], Number)]
        return passes and all(superfluous(user) for user in others)

    for node in graph.nodes:
        if node not in part_of and not superfluous(node):
            visit(node)
    return tuple(order)

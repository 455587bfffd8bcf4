"""A graph again, with its chains as single steps and its other filtered convolutions as they are filtered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from ...blocked.convolution import ConvolutionProgram
from ...core.geometry import Geometry
from ...machine.profiles import DeviceProfile
from ...ops import operators
from ...ops.functional import cast_for_convolution
from ..compile.programs import Program
from ..plan.graph import Conv, Pad, Part, Region, Shape, View
from ..plan.partition import Layout, partition
from ..run.plan import Plan, make_plan
from ..run.run import run_chain
from .aten import IN_PLACE, checkpoints, graph_of, placeholders, stretches, switches, value_of, without_changes
from .recognise import Known, early_steps, shape_of
from .regions import Stretch, as_stretch
from .rest import Backend, compile_rest
from .sites import Arguments, Chosen, Filter, Site

_aten: Any = torch.ops.aten


class ChainStep(nn.Module):
    """One chain of a graph: called with its entries, then its tensors; gives its exits.

    Attributes:
        plan: what it does; another one once there is a library for it.
        reasons: by value, why its gradient has full size.
        kept_bytes: what its last forward pass kept for the backward pass, parameters not counted.
    """

    def __init__(self, stretch: Stretch, layout: Layout, ops: Sequence[int], means: torch.dtype | None) -> None:
        super().__init__()
        self.stretch, self.situation, self.reasons = stretch, layout.situation, layout.reasons
        self.ops, self.means = tuple(ops), means
        self.plan: Plan = make_plan(stretch.region, layout.situation, ops, means)
        self.kept_bytes = 0

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        plan = self.plan
        results = run_chain(plan, given[: len(plan.entries)], given[len(plan.entries) :])
        self.kept_bytes = getattr(results[0].grad_fn, "kept_bytes", 0)
        return results

    def use(self, digest: str) -> None:
        """Take kernels from the loaded library of this digest, from the next step on."""
        self.plan = make_plan(self.stretch.region.with_library(digest), self.situation, self.ops, self.means)


class ConvolutionStep(nn.Module):
    """A convolution that is filtered by itself: called with input, weight and bias.

    ``needs_input``, ``needs_weight``: the gradients that its backward pass is asked for.
    """

    def __init__(self, site: Site, chosen: Filter, needs_input: bool = True, needs_weight: bool = True) -> None:
        super().__init__()
        self.needs_input, self.needs_weight = needs_input, needs_weight
        assert site.arguments is not None
        self.site, self.patch, self.digest = site, chosen.patch, chosen.library
        a = site.arguments
        self._settings = (a.stride, a.padding, a.dilation, a.groups)

    @property
    def geometry(self) -> Geometry:
        """Of the convolution, on the shapes that it was compiled for."""
        a = self.site.arguments
        assert a is not None
        n, ci, h, w = value_of(a.x).shape
        co, _, kh, kw = value_of(a.weight).shape
        return Geometry(n, ci, co, h, w, (kh, kw), self.patch, a.stride, a.padding, a.dilation, a.groups)

    @property
    def programs(self) -> list[ConvolutionProgram]:
        """The compiled function that its forward pass can call, if there is one."""
        assert self.site.arguments is not None
        program = ConvolutionProgram(self.geometry, self.site.arguments.bias is not None)
        return [program] if ConvolutionProgram.exists(self.geometry) else []

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, weight, bias = cast_for_convolution(x, weight, bias)
        y: Tensor = operators.conv2d(x, weight, bias, *self._settings, self.patch, self.digest, weight.requires_grad)[0]
        return y

    def use(self, digest: str) -> None:
        """Take kernels from the loaded library of this digest, from the next step on."""
        self.digest = digest


class CheckpointStep(nn.Module):
    """A part whose values are computed again in the backward pass."""

    def __init__(self, body: nn.Module, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.body, self.settings = body, {"use_reentrant": False, **settings}

    def forward(self, *given: Any) -> Any:
        return checkpoint(self.body, *given, **self.settings)


class ForwardStep(nn.Module):
    """A part without gradients: called with its entries, then its tensors; gives a tuple of its exits.

    Attributes:
        library: digest of the library whose function it calls; "" while it calls none.
    """

    library: str

    def program(self, profile: DeviceProfile) -> Program:
        """What a library needs for it."""
        raise NotImplementedError

    def use(self, digest: str) -> None:
        """Take the compiled function from the loaded library of this digest, from the next step on."""
        raise NotImplementedError


class Forward(Protocol):
    """What compiles parts of a graph that need no gradients: :class:`gf_tvm.forward.engine.Engine`."""

    def takes(self, region: Region, op: int, shapes: Sequence[Shape | None]) -> bool:
        """Whether an operation can be in such a part."""

    def is_worth(self, part: Part) -> bool:
        """Whether the part had better be compiled."""

    def step(self, part: Part, body: fx.GraphModule) -> ForwardStep:
        """What runs in its place; ``body``: the same by PyTorch's operators."""


@dataclass
class Assembled:
    """A graph with chains in it.

    Attributes:
        module: called as the graph was.
        chains, convolutions: its steps of these kinds, in the order of execution, those of checkpointed parts too.
        fronts: its parts without gradients, as :class:`Forward` compiled them.
        alone: filtered convolutions that are in no chain, by name, and why.
    """

    module: fx.GraphModule
    chains: list[ChainStep] = field(default_factory=list)
    convolutions: list[ConvolutionStep] = field(default_factory=list)
    fronts: list[ForwardStep] = field(default_factory=list)
    alone: dict[str, str] = field(default_factory=dict)


def assemble(
    aten: fx.GraphModule,
    chosen: Chosen,
    trained: Sequence[bool],
    chain: bool = True,
    means: torch.dtype | None = None,
    rest: Backend | None = None,
    forward: Forward | None = None,
) -> Assembled:
    """Put a graph together.

    Args:
        aten: of :func:`.aten.to_aten`; its in-place steps are rewritten here.
        trained: by input of the graph, whether its gradient is needed.
        chain: whether filtered convolutions form chains.
        rest: what compiles the steps that are neither chains nor filtered convolutions; None: they run one by one.
        forward: what compiles parts that need no gradients; None: nothing.
    """
    found = _Assembly(aten, chosen, trained, chain, means, rest, forward).run()
    if rest is not None:
        found.module = compile_rest(found.module, rest)
    return found


class _Assembly:
    def __init__(
        self,
        aten: fx.GraphModule,
        chosen: Chosen,
        trained: Sequence[bool],
        chain: bool,
        means: torch.dtype | None,
        rest: Backend | None,
        forward: Forward | None,
    ) -> None:
        self.aten, self.chosen, self.chain, self.means, self.rest = aten, chosen, chain, means, rest
        self.forward = forward
        self.checkpoints = set(checkpoints(aten.graph))
        self.sites = {site.node: site for site in chosen.sites}
        without_changes(aten.graph)
        early = early_steps(aten.graph, chosen.sites)
        self.known = Known(chosen.filters, self.sites, early)
        self.needs = dict(zip(placeholders(aten.graph), trained, strict=True))
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.parts: dict[str, Any] = {}
        self.from_chains: set[fx.Node] = set()
        self.gradients = True
        self.result = Assembled(aten)

    def run(self) -> Assembled:
        for node in self.aten.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = self.graph.node_copy(node)
            elif node.op == "get_attr" and node.users:
                self.parts[str(node.target)] = getattr(self.aten, str(node.target))
                self.env[node] = self.graph.node_copy(node)
                self.needs[node] = False
        for part in stretches(self.aten.graph):
            if isinstance(part, fx.Node):
                self._border(part)
            else:
                self._stretch(part)
        output = next(iter(reversed(self.aten.graph.nodes)))
        self.graph.output(fx.node.map_arg(output.args[0], self._new))
        self.graph.lint()
        self.result.module = fx.GraphModule(self.parts, self.graph, "Filtered")
        return self.result

    def _new(self, node: fx.Node) -> fx.Node:
        source = self.known.source(node)
        if source not in self.env:  # what only hands on to steps that ran otherwise was left out
            self._copy(source)
        return self.env[source]

    def _copy(self, node: fx.Node) -> None:
        new = self.graph.node_copy(node, self._new)
        again = node.meta.get(IN_PLACE)
        if again is not None and self.rest is None and self.known.source(node.args[0]) not in self.from_chains:  # type: ignore[arg-type]
            new.target = again
        self.env[node] = new

    def _call(self, kind: str, module: nn.Module, arguments: Sequence[fx.Node | None]) -> fx.Node:
        name = f"{kind}_{len(self.parts)}"
        self.parts[name] = module
        return self.graph.call_module(name, tuple(None if a is None else self._new(a) for a in arguments))

    def _reads_trained(self, node: fx.Node) -> bool:
        return any(self.needs[self.known.source(i)] for i in node.all_input_nodes)

    # Borders

    def _border(self, node: fx.Node) -> None:
        if node.target is torch._C._set_grad_enabled:
            self.gradients = bool(node.args[0])
        self.needs[node] = self.gradients and not switches(node) and self._reads_trained(node)
        if node in self.checkpoints:
            given = node.args[1:]
            flags = [isinstance(g, fx.Node) and self.needs[self.known.source(g)] for g in given]
            inner = assemble(
                self.parts[graph_of(node)], self.chosen, flags, self.chain, self.means, self.rest, self.forward
            )
            self.result.chains += inner.chains
            self.result.convolutions += inner.convolutions
            self.result.fronts += inner.fronts
            self.result.alone |= inner.alone
            settings = {k: v for k, v in node.kwargs.items() if k in ("use_reentrant", "preserve_rng_state")}
            self.env[node] = self._call("checkpoint", CheckpointStep(inner.module, settings), given)  # type: ignore[arg-type]
            return
        self._copy(node)

    # Stretches

    def _stretch(self, steps: list[fx.Node]) -> None:
        for node in steps:
            if node in self.known.early:
                self._copy(node)
                self.needs[node] = self.gradients and self._reads_trained(node)
        stretch = as_stretch([node for node in steps if node not in self.known.early], self.known)
        region, nodes = stretch.region, stretch.nodes
        entries = nodes[: region.entries]
        flags = [self.gradients and self.needs[node] for node in entries]
        trained = frozenset(i for i, t in enumerate(stretch.tensors) if self.gradients and self.needs[t])
        layout = partition(region, [shape_of(node) for node in entries], flags, trained, self.chain)
        self.needs.update(zip(nodes[region.entries :], layout.situation.needs[region.entries :], strict=True))
        group: list[int] = []
        for unit in layout.units:
            if not isinstance(unit, tuple) and self._compiles(stretch, layout, unit, group):
                group.append(unit)
                continue
            made = {region.result(i) for i in group}
            if any(made & set(region.ops[i].inputs) for i in (unit if isinstance(unit, tuple) else (unit,))):
                self._front(stretch, layout, group)
                group = []
            if isinstance(unit, tuple):
                self._chain(stretch, layout, unit)
            else:
                self._plain(nodes[region.result(unit)])
        self._front(stretch, layout, group)
        chained = {i for unit in layout.units if isinstance(unit, tuple) for i in unit}
        for i, op in enumerate(region.ops):
            node = nodes[region.result(i)]
            if node in self.chosen.filters and i not in chained:
                if not layout.situation.needs[region.result(i)]:
                    reason = "nothing is trained in it or before it"
                elif not self.chain:
                    reason = "chains are switched off"
                elif isinstance(op, Conv):
                    reason = layout.reasons.get(region.result(i), "nothing next to it can stay on the patch grid")
                else:
                    reason = getattr(op, "reason", "cannot stay on the patch grid")
                self.result.alone[self.sites[node].name] = reason

    # Parts without gradients

    def _compiles(self, stretch: Stretch, layout: Layout, i: int, group: Sequence[int]) -> bool:
        """Whether an operation goes into the part that ``group`` is of."""
        region, nodes, shapes = stretch.region, stretch.nodes, layout.situation.shapes
        value, op = region.result(i), region.ops[i]
        if self.forward is None or layout.situation.needs[value] or not self.forward.takes(region, i, shapes):
            return False
        if isinstance(op, View) and op.inputs[0] - region.entries not in group:
            return False
        tensors = (stretch.tensors[t] for t in op.tensors if t is not None)
        same_batch = {shapes[v][0] for v in (*op.inputs, value)} == {shapes[region.result((*group, i)[0])][0]}  # type: ignore[index]
        return same_batch and all(map(_is_plain, (*(nodes[v] for v in (*op.inputs, value)), *tensors)))

    def _front(self, stretch: Stretch, layout: Layout, group: Sequence[int]) -> None:
        """Run a part, compiled where that is worth it."""
        region, nodes = stretch.region, stretch.nodes
        part = part_of(region, layout.situation.shapes, group)
        if self.forward is None or not group or not self.forward.is_worth(part):
            for i in group:
                self._plain(nodes[region.result(i)])
            return
        given = [nodes[v] for v in part.entries] + [stretch.tensors[t] for t in part.tensors]
        step = self.forward.step(part, self._body(part, stretch, given))
        self.result.fronts.append(step)
        call = self._call("forward", step, given)
        for number, value in enumerate(part.exits):
            self.env[nodes[value]] = self.graph.call_function(_item, (call, number))
        for i in group:
            if isinstance(region.ops[i], Pad) and _read_outside(region, i, group):
                self._plain(nodes[region.result(i)])

    def _body(self, part: Part, stretch: Stretch, given: Sequence[fx.Node]) -> fx.GraphModule:
        """A part by PyTorch's operators."""
        graph, env = self.graph, self.env
        self.graph = fx.Graph()
        self.env = {node: self.graph.placeholder(f"given_{k}") for k, node in enumerate(given)}
        for i in part.ops:
            self._plain(stretch.nodes[part.region.result(i)])
        self.graph.output(tuple(self._new(stretch.nodes[value]) for value in part.exits))
        body = fx.GraphModule(self.parts, self.graph, "Forward")
        self.graph, self.env = graph, env
        return body

    def _chain(self, stretch: Stretch, layout: Layout, ops: tuple[int, ...]) -> None:
        step = ChainStep(stretch, layout, ops, self.means)
        self.result.chains.append(step)
        arguments = [stretch.nodes[v] for v in step.plan.entries] + [stretch.tensors[t] for t in step.plan.tensors]
        call = self._call("chain", step, arguments)
        for number, value in enumerate(step.plan.exits):
            node = stretch.nodes[value]
            self.env[node] = self.graph.call_function(_item, (call, number))
            self.from_chains.add(node)

    def _plain(self, node: fx.Node) -> None:
        site = self.sites.get(node)
        a = site.arguments if site is not None else None
        if site is None or a is None:
            self._copy(node)
            return
        chosen = self.chosen.filters.get(node)
        if chosen is not None and self.needs[node]:
            needs = (self.needs[self.known.source(t)] for t in (a.x, a.weight))
            step = ConvolutionStep(site, chosen, *needs)
            self.result.convolutions.append(step)
            self.env[node] = self._call("convolution", step, (a.x, a.weight, a.bias))
            self.env[node].meta = dict(node.meta)
        elif site.patch is None:
            self._copy(node)
        else:
            self.env[node] = self._exact(a)

    def _exact(self, a: Arguments) -> fx.Node:
        given = (self._new(a.x), self._new(a.weight), None if a.bias is None else self._new(a.bias))
        return self.graph.call_function(
            _aten.conv2d.default, (*given, *map(list, (a.stride, a.padding, a.dilation)), a.groups)
        )


def _item(results: tuple[Tensor, ...], number: int) -> Tensor:
    return results[number]


def part_of(region: Region, shapes: Sequence[Shape | None], ops: Sequence[int]) -> Part:
    """These operations, in order, as a part. Of a padding no result is an exit: who reads it elsewhere pads again."""
    inputs = {v for i in ops for v in region.ops[i].inputs}
    ops = [i for i in ops if not isinstance(region.ops[i], Pad) or region.result(i) in inputs]
    made = {region.result(i) for i in ops}
    pads = {region.result(i): region.ops[i].inputs[0] for i in ops if isinstance(region.ops[i], Pad)}
    entries = dict.fromkeys(v for i in ops for v in region.ops[i].inputs if v not in made)
    outside = [i for i in range(len(region.ops)) if i not in set(ops)]
    read = {v for i in outside for v in region.ops[i].inputs} | set(region.exits)
    exits = dict.fromkeys(pads.get(v, v) for v in sorted(made & read))
    tensors = dict.fromkeys(t for i in ops for t in region.ops[i].tensors if t is not None)
    kept = tuple(v for v in exits if v in made)
    return Part(region, tuple(ops), tuple(shapes), tuple(entries), kept, tuple(tensors))


def _read_outside(region: Region, i: int, group: Sequence[int]) -> bool:
    value = region.result(i)
    others = (op for k, op in enumerate(region.ops) if k not in group)
    return value in region.exits or any(value in op.inputs for op in others)


def _is_plain(node: fx.Node) -> bool:
    """Whether a step's result is a tensor of float32 on the CPU, or on none."""
    value = value_of(node)
    # A model whose programs are wanted, and nothing else, runs on no device.
    return isinstance(value, Tensor) and value.dtype is torch.float32 and value.device.type in ("cpu", "meta")

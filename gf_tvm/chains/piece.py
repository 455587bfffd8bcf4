"""A chain by itself: its operations apart from the network around them, in a chain or one by one.

For measuring and checking. The operations are those of the captured graph, the tensors those of whatever copy of the
network they are run with: an unfiltered one, one that is filtered layer by layer, one in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..core.geometry import Geometry
from ..ops.module import FilteredConv2d
from .capture.assemble import ChainStep, ConvolutionStep
from .capture.aten import IN_PLACE, PATH
from .capture.sites import Filter, Site, name_of
from .model import graphs_of
from .plan.graph import Shape
from .plan.steps import ConvInput, ConvWeight
from .run.plan import Plan
from .run.run import run_chain

#: Called with a step and its result; what it returns takes the result's place.
Watch = Callable[[fx.Node, Tensor], Tensor]


@dataclass(frozen=True)
class Piece:
    """One chain of a model.

    Attributes:
        root: name of the module that compiled it.
        step: the chain in its graph.
        sites: the graph's convolutions, by result.
    """

    root: str
    step: ChainStep
    sites: Mapping[fx.Node, Site]

    @property
    def plan(self) -> Plan:
        """What the chain does."""
        return self.step.plan

    @property
    def convolutions(self) -> tuple[str, ...]:
        """Fully qualified names of the filtered ones, in the order of execution."""
        prefix = f"{self.root}." if self.root else ""
        return tuple(prefix + name for name in self.plan.convolutions)

    @property
    def entries(self) -> list[tuple[Shape, bool]]:
        """The maps that it takes: shape, and whether the gradient is needed."""
        return [(self.plan.shapes[v], v in self.plan.needs) for v in self.plan.entries]

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Of its parameters and buffers, by number."""
        return tuple(map(name_of, self.step.stretch.tensors))

    def products(self) -> dict[int, tuple[Geometry, set[str]]]:
        """By the register of g~: the convolution, and the kernels of the products that are made of it."""
        found: dict[int, tuple[Geometry, set[str]]] = {}
        for step in self.plan.steps:
            if isinstance(step, ConvInput | ConvWeight):
                _, made = found.setdefault(step.src, (step.geometry, set()))
                made.add("input_grad" if isinstance(step, ConvInput) else "weight_grad")
        return found


def pieces_of(model: nn.Module) -> Iterator[Piece]:
    """The chains of ``model``'s last training step, as :func:`gf_tvm.chains_of` lists them."""
    for name, graph in graphs_of(model):
        sites = {site.node: site for site in graph.chosen.sites}
        for step in graph.assembled.chains:
            yield Piece(name, step, sites)


class Bound:
    """A piece with the tensors of ``model``: the one that it was found in, or a copy, filtered or not."""

    def __init__(self, piece: Piece, model: nn.Module) -> None:
        self.piece, self.model = piece, model.get_submodule(piece.root)
        self._readers: dict[fx.Node, int] = {}
        nodes = piece.step.stretch.nodes
        for k, step in enumerate(piece.plan.forward):
            for v in step.op.inputs:
                self._readers[nodes[v]] = k
        self._convolutions: dict[fx.Node, nn.Module | None] = {}
        for node, site in piece.sites.items():
            module = dict(self.model.named_modules(remove_duplicate=False)).get(site.name)
            if isinstance(module, FilteredConv2d) and site.arguments is not None:
                digest = "" if module.library is None else module.library.digest
                self._convolutions[node] = ConvolutionStep(site, Filter(module.patch, digest))

    @property
    def tensors(self) -> list[Tensor]:
        """Parameters and buffers, by ``plan.tensors``."""
        env: dict[fx.Node, Any] = {}
        return [self._value(self.piece.step.stretch.tensors[t], env) for t in self.piece.plan.tensors]

    @property
    def trained(self) -> list[Tensor]:
        """Of these, the parameters whose gradients are needed."""
        return [t for i, t in zip(self.piece.plan.tensors, self.tensors, strict=True) if i in self.piece.plan.trained]

    def chained(self, entries: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The exits, with the chain's own backward pass."""
        return run_chain(self.piece.plan, entries, self.tensors)

    def one_by_one(self, entries: Sequence[Tensor], watch: Watch | None = None) -> tuple[Tensor, ...]:
        """The exits, each operation as the network runs it without chains. What works in place may change entries."""
        plan, nodes = self.piece.plan, self.piece.step.stretch.nodes
        exits = [nodes[v] for v in plan.exits]
        env: dict[fx.Node, Any] = {nodes[v]: entry for v, entry in zip(plan.entries, entries, strict=True)}
        for k, step in enumerate(plan.forward):
            node = nodes[step.result]
            env[node] = self._run(node, env)
            if watch is not None:
                env[node] = watch(node, env[node])
            # As in the network: what nobody reads any more is held by autograd alone, if at all.
            for gone in [n for n in env if n not in exits and self._readers.get(n, -1) <= k]:
                del env[gone]
        return tuple(env[node] for node in exits)

    def _value(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        """A step's result: one that is there, a parameter, or what is computed of these."""
        if node in env:
            return env[node]
        if node.op == "placeholder":
            owner, _, name = str(node.meta[PATH]).rpartition(".")
            return getattr(self.model.get_submodule(owner), name)
        return self._run(node, env)

    def _run(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        def value(source: fx.Node) -> Any:
            return self._value(source, env)

        site = self.piece.sites.get(node)
        if site is not None and site.arguments is not None:
            a = site.arguments
            given = (value(a.x), value(a.weight), None if a.bias is None else value(a.bias))
            own = self._convolutions.get(node)
            if own is not None:
                return own(*given)
            if site.patch is not None:
                return torch.nn.functional.conv2d(*given, a.stride, a.padding, a.dilation, a.groups)
        args, kwargs = fx.node.map_arg(node.args, value), fx.node.map_arg(node.kwargs, value)
        target = node.meta.get(IN_PLACE) or node.target
        assert callable(target)
        return target(*args, **kwargs)

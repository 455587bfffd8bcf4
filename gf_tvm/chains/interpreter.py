"""Runs a captured module: its steps one by one, its regions as chains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .capture import Capture, CapturedRegion
from .graph import Misfit, Region, Shape
from .partition import Layout, partition
from .plan import Plan, make_plan
from .recognise import steps_in
from .run import run_chain

#: What a region does in one situation: plans and single steps, and the steps whose results nobody needs afterwards.
Unit = tuple[Plan | fx.Node, tuple[fx.Node, ...]]


class Interpreter:
    """A captured module, ready to run. Plans are made when shapes or what is trained are met first, and kept.

    ``means``: dtype in which chains keep the means of derivatives; None: as they are summed.
    """

    def __init__(self, module: nn.Module, captured: Capture, means: torch.dtype | None = None) -> None:
        self.module, self.captured, self.means = module, captured, means
        self.modules = dict(module.named_modules(remove_duplicate=False))
        self.regions = {
            id(part): _RegionInterpreter(self, part) for part in captured.order if isinstance(part, CapturedRegion)
        }
        self.release = self._release()
        self.shapes: dict[Any, Shape | None] = {}

    def __call__(self, *arguments: Tensor) -> Any:
        """The module's result, for tensors as its forward pass takes them."""
        env: dict[fx.Node, Any] = {}
        given = iter(arguments)
        for what, gone in zip(self.captured.order, self.release, strict=True):
            if isinstance(what, CapturedRegion):
                self.regions[id(what)].run(env)
            elif what in self.captured.numbers:
                env[what] = self.number(what, env)
            elif what.op == "placeholder":
                env[what] = next(given)
            elif what.op == "output":
                results: Any = fx.node.map_arg(what.args[0], env.__getitem__)
                return pytree.tree_unflatten(results, self.captured.result)
            else:
                env[what] = self.step(what, env)
            for node in gone:
                env.pop(node, None)
        raise AssertionError("a traced module has an output")

    def step(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        """Run one step as the module would."""
        if node.op == "get_attr":
            return self.attribute(str(node.target))
        args = fx.node.map_arg(node.args, env.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, env.__getitem__)
        if node.op == "call_module":
            return self.modules[str(node.target)](*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def compute(self, node: fx.Node, env: dict[fx.Node, Any]) -> None:
        """Run one operation as the module would, and before it what it needs and is not there."""
        for source in node.all_input_nodes:
            if source not in env:
                self.compute(source, env)
        env[node] = self.number(node, env) if node in self.captured.numbers else self.step(node, env)

    def number(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """A size of a map that need not be there yet, or what is computed from sizes."""
        source = self.captured.numbers[node].source
        if source is None:
            return self.step(node, env)
        assert isinstance(node.args[0], fx.Node)
        if source in env:
            return self.step(node, {node.args[0]: env[source]})
        shape = self._shape(source, self.captured.numbers[node].inputs, env)
        if shape is None:  # the map itself has to tell; what comes before it then runs unchained
            for before, _ in self.captured.ways[source]:
                if before not in env:
                    self.compute(before, env)
            return self.step(node, {node.args[0]: env[source]})
        return self.step(node, {node.args[0]: torch.empty(shape, device="meta")})

    def _shape(self, source: fx.Node, origins: Sequence[fx.Node], env: Mapping[fx.Node, Any]) -> Shape | None:
        """The shape of a step's result, None if it cannot be told before the step has run."""
        known = {node: tuple(env[node].shape) if isinstance(env[node], Tensor) else env[node] for node in origins}
        key = (source, *known.values())
        if key not in self.shapes:
            for node, found in self.captured.ways[source]:
                inputs = [known[step] for step in found.inputs]
                if any(shape is None or len(shape) != 4 for shape in inputs):
                    known[node] = None
                    continue
                try:
                    known[node] = found.settled(known).shape(*inputs)
                except Misfit as misfit:
                    known[node] = misfit.shape
            self.shapes[key] = known[source]
        return self.shapes[key]

    def attribute(self, path: str) -> Any:
        """The parameter, buffer or attribute at a dotted path."""
        owner, _, name = path.rpartition(".")
        return getattr(self.modules[owner], name)

    @property
    def layouts(self) -> list[tuple[Region, Layout, list[tuple[Plan, int]]]]:
        """What each region did when it ran last: its chains, with the bytes that they kept for the backward pass."""
        runners = self.regions.values()
        return [(runner.part.region, *runner.last) for runner in runners if runner.last is not None]

    def in_chains(self) -> list[fx.Node]:
        """The steps that ran in chains when each region ran last, those between them that only hand on a value too."""
        found: dict[fx.Node, None] = {}
        for runner in self.regions.values():
            part = runner.part
            for plan, _ in () if runner.last is None else runner.last[1]:
                steps = [part.nodes[step.result] for step in plan.forward]
                entries = {part.nodes[v] for v in plan.entries}
                while steps:
                    node = steps.pop()
                    if node not in found and node not in entries:
                        found[node] = None
                        steps += [source for source in node.all_input_nodes if source.op != "placeholder"]
        return list(found)

    def _release(self) -> list[tuple[fx.Node, ...]]:
        """By position in the order, the steps whose results are not read afterwards."""
        last: dict[fx.Node, int] = {}
        for k, what in enumerate(self.captured.order):
            if isinstance(what, CapturedRegion):
                for node in what.nodes:
                    last[node] = k
                # A step outside may read a value through one that hands it on, which a region runs plainly.
                for node in what.nodes[what.region.entries :]:
                    for source in node.all_input_nodes:
                        last[source] = k
                for node in steps_in(what.numbers):
                    last[node] = k
            else:
                last[what] = k
                number = self.captured.numbers.get(what)
                for node in what.all_input_nodes if number is None else number.inputs:
                    last[node] = k
        gone: list[list[fx.Node]] = [[] for _ in self.captured.order]
        for node, k in last.items():
            gone[k].append(node)
        return [tuple(nodes) for nodes in gone]


class _RegionInterpreter:
    """One region: what it does for each set of shapes and trained tensors."""

    def __init__(self, whole: Interpreter, part: CapturedRegion) -> None:
        self.whole, self.part = whole, part
        self.known: dict[Any, tuple[Layout, list[Unit]] | None] = {}
        self.last: tuple[Layout, list[tuple[Plan, int]]] | None = None
        self.sizes: dict[fx.Node, Any] = {}  # in the last run, of maps inside and outside of the region
        self._sized = tuple(steps_in(part.numbers))

    def run(self, env: dict[fx.Node, Any]) -> None:
        """Compute the region's values from its entries in ``env``."""
        part = self.part
        entries = [env[node] for node in part.nodes[: part.region.entries]]
        tensors = [self.whole.attribute(path) for path in part.tensors]
        self.sizes = {node: env[node] for node in self._sized}
        numbers = fx.node.map_arg(part.numbers, self.sizes.__getitem__)
        inside = part.nodes[part.region.entries :]
        found = None if any(node in env for node in inside) else self._situation(entries, tensors, numbers)
        if found is None:
            self.last = None
            for node in inside:
                if node not in env:
                    self.whole.compute(node, env)
            return
        layout, units = found
        chains: list[tuple[Plan, int]] = []
        self.last = layout, chains
        for unit, gone in units:
            if isinstance(unit, Plan):
                values = [env[part.nodes[v]] for v in unit.entries]
                results = run_chain(unit, values, [tensors[t] for t in unit.tensors])
                chains.append((unit, getattr(results[0].grad_fn, "kept_bytes", 0)))
                env.update({part.nodes[v]: result for v, result in zip(unit.exits, results, strict=True)})
            else:
                self.whole.compute(unit, env)
            for node in gone:
                env.pop(node, None)

    def _situation(
        self, entries: Sequence[Any], tensors: Sequence[Any], numbers: tuple[Any, ...]
    ) -> tuple[Layout, list[Unit]] | None:
        """What to do with these tensors; None where they are no maps."""
        if not all(isinstance(t, Tensor) for t in entries):
            return None
        maps = [t.dim() == 4 and t.is_floating_point() and t.numel() > 0 for t in entries]
        if not any(maps):
            return None
        shapes: tuple[Shape | None, ...] = tuple(
            tuple(t.shape) if is_map else None for t, is_map in zip(entries, maps, strict=True)
        )
        needs = tuple(t.requires_grad for t in entries)
        trained = frozenset(i for i, t in enumerate(tensors) if isinstance(t, Tensor) and t.requires_grad)
        key = (shapes, needs, trained, numbers)
        if key not in self.known:
            region = self.part.region.given(numbers)
            layout = partition(region, shapes, needs, trained)
            self.known[key] = layout, self._units(region, layout)
        return self.known[key]

    def _units(self, region: Region, layout: Layout) -> list[Unit]:
        nodes = self.part.nodes
        units: list[tuple[Plan | fx.Node, set[fx.Node]]] = []
        for ops in layout.units:
            if isinstance(ops, tuple):
                plan = make_plan(region, layout.situation, ops, self.whole.means)
                units.append((plan, {nodes[v] for v in plan.entries}))
            else:
                units.append((nodes[region.result(ops)], {nodes[v] for v in region.ops[ops].inputs}))
        keep = {nodes[v] for v in (*region.exits, *region.seen)} | set(nodes[: region.entries])
        result: list[Unit] = []
        for unit, reads in reversed(units):
            result.append((unit, tuple(reads - keep)))
            keep |= reads
        return result[::-1]


def has_global_hooks() -> bool:
    """Whether hooks run around every module's forward or backward pass in this process."""
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    return any(getattr(torch.nn.modules.module, f"_global_{kind}_hooks") for kind in kinds)

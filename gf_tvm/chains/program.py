"""Runs a captured module: its steps one by one, its regions as chains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .capture import Capture, Part
from .graph import Region, Shape
from .partition import Layout, partition
from .plan import Plan, make_plan
from .run import run_chain

#: What a region does in one situation: plans and single steps, and the steps whose results nobody needs afterwards.
Unit = tuple[Plan | fx.Node, tuple[fx.Node, ...]]


class Program:
    """A captured module, ready to run. Plans are made when shapes or what is trained are met first, and kept."""

    def __init__(self, module: nn.Module, captured: Capture) -> None:
        self.module, self.captured = module, captured
        self.modules = dict(module.named_modules(remove_duplicate=False))
        self.regions = {id(part): _PartRunner(self, part) for part in captured.order if isinstance(part, Part)}
        self.release = self._release()

    def __call__(self, *arguments: Tensor) -> Any:
        """The module's result, for tensors as its forward pass takes them."""
        env: dict[fx.Node, Any] = {}
        given = iter(arguments)
        for what, gone in zip(self.captured.order, self.release, strict=True):
            if isinstance(what, Part):
                self.regions[id(what)].run(env)
            elif what.op == "placeholder":
                env[what] = next(given)
            elif what.op == "output":
                return fx.node.map_arg(what.args[0], env.__getitem__)
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

    def attribute(self, path: str) -> Any:
        """The parameter, buffer or attribute at a dotted path."""
        owner, _, name = path.rpartition(".")
        return getattr(self.modules[owner], name)

    @property
    def layouts(self) -> list[tuple[Region, Layout, list[Plan]]]:
        """What each region did when it ran last."""
        runners = self.regions.values()
        return [(runner.part.region, *runner.last) for runner in runners if runner.last is not None]

    def _release(self) -> list[tuple[fx.Node, ...]]:
        """By position in the order, the steps whose results are not read afterwards."""
        last: dict[fx.Node, int] = {}
        for k, what in enumerate(self.captured.order):
            if isinstance(what, Part):
                for node in what.nodes:
                    last[node] = k
                # A step outside may read a value through one that hands it on, which a region runs plainly.
                for node in what.nodes[what.region.entries :]:
                    for source in node.all_input_nodes:
                        last[source] = k
            else:
                last[what] = k
                for node in what.all_input_nodes:
                    last[node] = k
        gone: list[list[fx.Node]] = [[] for _ in self.captured.order]
        for node, k in last.items():
            gone[k].append(node)
        return [tuple(nodes) for nodes in gone]


class _PartRunner:
    """One region: what it does for each set of shapes and trained tensors."""

    def __init__(self, program: Program, part: Part) -> None:
        self.program, self.part = program, part
        self.known: dict[Any, tuple[Layout, list[Unit]] | None] = {}
        self.last: tuple[Layout, list[Plan]] | None = None

    def run(self, env: dict[fx.Node, Any]) -> None:
        """Compute the region's values from its entries in ``env``."""
        part = self.part
        entries = [env[node] for node in part.nodes[: part.region.entries]]
        tensors = [self.program.attribute(path) for path in part.tensors]
        found = self._situation(entries, tensors)
        if found is None:
            self.last = None
            for node in part.nodes[part.region.entries :]:
                self._plain(node, env)
            return
        layout, units = found
        self.last = (layout, [unit for unit, _ in units if isinstance(unit, Plan)])
        for unit, gone in units:
            if isinstance(unit, Plan):
                values = [env[part.nodes[v]] for v in unit.entries]
                results = run_chain(unit, values, [tensors[t] for t in unit.tensors])
                env.update({part.nodes[v]: result for v, result in zip(unit.exits, results, strict=True)})
            else:
                self._plain(unit, env)
            for node in gone:
                env.pop(node, None)

    def _plain(self, node: fx.Node, env: dict[fx.Node, Any]) -> None:
        """Run one operation as the module would, and before it what only hands on a value to it."""
        for source in node.all_input_nodes:
            if source not in env:
                self._plain(source, env)
        env[node] = self.program.step(node, env)

    def _situation(self, entries: Sequence[Any], tensors: Sequence[Any]) -> tuple[Layout, list[Unit]] | None:
        """What to do with these tensors; None where they are no maps."""
        if not all(isinstance(t, Tensor) and t.dim() == 4 and t.is_floating_point() and t.numel() for t in entries):
            return None
        shapes: tuple[Shape, ...] = tuple(tuple(t.shape) for t in entries)
        needs = tuple(t.requires_grad for t in entries)
        trained = frozenset(i for i, t in enumerate(tensors) if isinstance(t, Tensor) and t.requires_grad)
        key = (shapes, needs, trained)
        if key not in self.known:
            layout = partition(self.part.region, shapes, needs, trained)
            self.known[key] = layout, self._units(layout)
        return self.known[key]

    def _units(self, layout: Layout) -> list[Unit]:
        region, nodes = self.part.region, self.part.nodes
        units: list[tuple[Plan | fx.Node, set[fx.Node]]] = []
        for ops in layout.units:
            if isinstance(ops, tuple):
                plan = make_plan(region, layout.situation, ops)
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

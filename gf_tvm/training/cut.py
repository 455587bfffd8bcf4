"""Cuts a network at its first trained layers: a frozen part, whose results can be kept, and the trained rest."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..chains.model import filter_alike


class CannotSplit(Exception):
    """Why a network cannot be cut; the message completes "the frozen part cannot be cut off: ..."."""


@dataclass(frozen=True)
class Split:
    """A network in one mode (training or evaluation), as two graphs over the network's own modules and parameters.

    Attributes:
        frozen: x (n, c, h, w) -> a tuple of what the rest needs of the frozen part: residuals, too.
        rest: those values -> the network's output (or its ``.logits``); compiles itself as the network does.
    """

    frozen: fx.GraphModule
    rest: fx.GraphModule


class _Whole(nn.Module):
    """The network with its input alone as parameter, so that a tracer sees the others' defaults."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        output = self.model(x)
        plain = isinstance(output, Tensor | fx.Proxy) or not hasattr(output, "logits")
        return output if plain else output.logits


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """A module with nothing to train is one step, whatever Python is in it."""
        trained = any(parameter.requires_grad for parameter in m.parameters())
        # Convolutions, whose classes need not be PyTorch's, keep the names by which they are filtered.
        return not trained or isinstance(m, nn.Conv2d) or super().is_leaf_module(m, module_qualified_name)


def split(model: nn.Module, x: Tensor, enter: Callable[[], object]) -> Split:
    """Cut ``model`` where parameters that require a gradient come in first.

    Everything that depends on no such parameter belongs to the frozen part, parallel branches included. The two parts
    together are compared with the model on ``x`` and must give the same bits.

    Args:
        model: unchanged afterwards.
        x: (n, c, h, w) images to try the parts on.
        enter: puts the model into the mode in which it is traced; called before each trial.

    Raises:
        CannotSplit: the model cannot be traced (its Python code depends on values), draws random numbers or changes
            its buffers in the frozen part, or trains its first layer.
    """
    whole = _Whole(model)
    with put_back(whole) as buffers:
        graph = _trace(whole, enter, buffers)
    depends = _depending(graph, whole)
    crossing = [
        node
        for node in graph.nodes
        if node not in depends and node.op != "get_attr" and any(user in depends for user in node.users)
    ]
    if all(node.op == "placeholder" for node in crossing):
        raise CannotSplit("the first layer that is trained reads the images themselves")
    parts = Split(_frozen(whole, graph, depends, crossing), _rest(whole, graph, depends, crossing))
    with put_back(whole) as buffers:
        _try(whole, parts, x, enter, buffers)
    filter_alike(parts.rest, model, "model.")
    return parts


def _trace(whole: _Whole, enter: Callable[[], object], buffers: dict[str, Tensor]) -> fx.Graph:
    enter()
    before = _generators()
    try:
        graph = _Tracer().trace(whole)
    except Exception as error:  # the model is the user's code, and tracing runs it on stand-ins
        raise CannotSplit(f"the model cannot be traced: {_one_line(error)}") from None
    if _generators() != before:
        raise CannotSplit("the model's Python code draws random numbers")
    if _reset(whole, buffers):
        raise CannotSplit("the model's Python code changes its buffers")
    return graph


def _depending(graph: fx.Graph, root: nn.Module) -> set[fx.Node]:
    """The steps that depend on a trained parameter, and the output."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        trained = False
        if node.op == "call_module":
            trained = any(p.requires_grad for p in root.get_submodule(str(node.target)).parameters())
        elif node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            value = getattr(root.get_submodule(path), name)
            trained = isinstance(value, Tensor) and value.requires_grad
        if trained or node.op == "output" or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _frozen(root: nn.Module, graph: fx.Graph, depends: set[fx.Node], crossing: list[fx.Node]) -> fx.GraphModule:
    part, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        if node not in depends:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[node] for node in crossing))
    return fx.GraphModule(root, part)


def _rest(root: nn.Module, graph: fx.Graph, depends: set[fx.Node], crossing: list[fx.Node]) -> fx.GraphModule:
    part = fx.Graph()
    copies = {node: part.placeholder(f"value_{i}") for i, node in enumerate(crossing)}
    for node in graph.nodes:
        if node in depends or (node.op == "get_attr" and any(user in depends for user in node.users)):
            copies[node] = part.node_copy(node, copies.__getitem__)
    return fx.GraphModule(root, part)


def _try(whole: _Whole, parts: Split, x: Tensor, enter: Callable[[], object], buffers: dict[str, Tensor]) -> None:
    """Run the model and its parts on ``x``. Raises CannotSplit where they differ."""
    results = []
    runs: tuple[Callable[[Tensor], Any], ...] = (whole, lambda x: parts.rest(*parts.frozen(x)))
    try:
        with torch.no_grad():
            for run in runs:
                torch.manual_seed(0)
                random.seed(0)
                np.random.seed(0)
                enter()
                results.append(run(x.clone()))
                _reset(whole, buffers)
            before = _generators()
            parts.frozen(x.clone())
    except Exception as error:  # again the user's code
        raise CannotSplit(f"its parts do not run: {_one_line(error)}") from None
    if _generators() != before:
        raise CannotSplit("random numbers are drawn before the first layer that is trained")
    if _reset(whole, buffers):
        raise CannotSplit("a frozen layer changes its buffers in training")
    if not _same(*results):
        raise CannotSplit("its parts give other results than the model")


@contextmanager
def put_back(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield copies of the buffers; afterwards they and the global generators are as they were."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield buffers
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        _reset(module, buffers)


def _reset(module: nn.Module, buffers: dict[str, Tensor]) -> bool:
    """Give the buffers these values again; returns whether one had another."""
    changed = False
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if name in buffers and not torch.equal(buffer, buffers[name]):
                buffer.copy_(buffers[name])
                changed = True
    return changed


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same: bool = a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
        return same
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and bool(a == b)


def _generators() -> tuple[bytes, str, str]:
    """The states of the generators that a model may draw from, comparable."""
    return torch.get_rng_state().numpy().tobytes(), repr(random.getstate()), repr(np.random.get_state(legacy=False))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__

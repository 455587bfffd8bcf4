"""Gradient filtering as a backend of ``torch.compile``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .assemble import Assembled, ChainStep, assemble
from .aten import to_aten
from .sites import Choice, Chosen, choose, module_of, sites_of

logger = logging.getLogger("gf_tvm")

#: Called with what was put together, to look for kernels.
FindKernels = Callable[[Assembled], None]


@dataclass(frozen=True)
class Captured:
    """One graph of a model, for one situation: shapes, dtypes, what is trained, settings.

    Attributes:
        chosen: its convolutions, in the order in which they run.
        interrupted: why the graph ends before the model does, or None.
    """

    assembled: Assembled
    chosen: Chosen
    interrupted: str | None


@dataclass(frozen=True)
class Backend:
    """What ``torch.compile(backend=...)`` takes.

    Attributes:
        choice: which convolutions are filtered; None: those that are by their own modules.
        chain: whether gradients stay on the patch grid between them.
        means: dtype in which chains keep the means of derivatives; None: as they are summed.
        find_kernels: gets everything that was put together.
        whole: asked whether a graph that does not end early is the model's only one.
        captured: told of each graph once.
        runs: told of a graph whenever it runs.
    """

    choice: Choice | None = None
    chain: bool = True
    means: torch.dtype | None = None
    find_kernels: FindKernels | None = None
    whole: Callable[[], bool] | None = None
    captured: Callable[[Captured], None] | None = None
    runs: Callable[[Captured], None] | None = None

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        reason = getattr(graph, "compile_subgraph_reason", None)
        interrupted = str(reason.reason).splitlines()[0] if reason is not None and reason.graph_break else None
        trained = [isinstance(t, Tensor) and t.requires_grad for t in inputs]
        if not any(trained) or not any(_may_be_convolution(node) for node in _steps(graph)):
            return graph
        try:
            aten = to_aten(graph)
        except Exception as error:  # PyTorch's tracers run the user's model on tensors without values
            logger.warning("runs as it is, exactly: its graph cannot be put into ATen operators: %s", _line(error))
            return graph
        whole = interrupted is None and (self.whole is None or self.whole())
        chosen = choose(sites_of(aten), self.choice, whole)
        assembled = assemble(aten, chosen, trained, self.chain, self.means)
        found = Captured(assembled, chosen, interrupted)
        if self.find_kernels is not None:
            self.find_kernels(assembled)
        if self.captured is not None:
            self.captured(found)
        module, runs = assembled.module, self.runs
        if runs is None:
            return module

        def run(*given: Any) -> Any:
            runs(found)
            watch = _watching.get()
            if watch is None:
                return module(*given)
            try:
                return _Watched(module, watch).run(*given)
            finally:
                watch(None, None)

        return run


#: Called before each step of a graph with the path and the class's name of the module whose code it is ("" and "" for
#: the compiled module's own, where it has no name), or with None and "" for a chain; after the graph with None twice.
Watch = Callable[[str | None, str | None], None]

_watching: ContextVar[Watch | None] = ContextVar("gf_tvm_watching", default=None)


@contextmanager
def watch_steps(watch: Watch) -> Iterator[None]:
    """Meanwhile ``watch`` is told what each step of the graphs that run in this thread is part of."""
    token = _watching.set(watch)
    try:
        yield
    finally:
        _watching.reset(token)


class _Watched(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, watch: Watch) -> None:
        super().__init__(module)
        self._watch = watch

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module" and isinstance(self.module.get_submodule(str(n.target)), ChainStep):
            self._watch(None, "")
        elif n.op.startswith("call"):
            path, kind = module_of(n)
            self._watch(path, "" if kind is None else kind.__name__)
        return super().run_node(n)


def _steps(graph: fx.GraphModule) -> list[fx.Node]:
    """All steps, those of graphs inside of it too."""
    return [node for m in graph.modules() if isinstance(m, fx.GraphModule) for node in m.graph.nodes]


def _may_be_convolution(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and "conv" in str(getattr(node.target, "__name__", node.target))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"

"""Gradient filtering as a backend of ``torch.compile``."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .assemble import Assembled, ChainStep, Forward, assemble
from .aten import NotTaken, has_symbols, to_aten, without_values
from .rest import Backend as Rest
from .sites import Choice, Chosen, Place, choose, module_of, name_modules, sites_of

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
        rest: backend of ``torch.compile`` for what is neither a chain nor a filtered convolution; None: it runs as is.
        find_kernels: gets everything that was put together.
        forward: compiles the parts that need no gradients; None: they run as they are.
        place: asked, when a graph is captured, whose code it is.
        captured: told of each graph once.
        runs: told of a graph whenever it runs.
    """

    choice: Choice | None = None
    chain: bool = True
    means: torch.dtype | None = None
    rest: Rest | None = None
    find_kernels: FindKernels | None = None
    forward: Forward | None = None
    place: Callable[[], Place] | None = None
    captured: Callable[[Captured], None] | None = None
    runs: Callable[[Captured], None] | None = None

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        trained = any(isinstance(t, Tensor) and t.requires_grad for t in inputs)
        if not trained or not any(_may_be_convolution(node) for node in _steps(graph)):
            return graph
        place = Place({}, None, True) if self.place is None else self.place()
        name_modules(graph, place)
        if has_symbols(graph):
            return _ForEachSize(self, graph, place)
        return self.compile(graph, inputs, None, place)

    def compile(
        self, graph: fx.GraphModule, inputs: Sequence[Any], given: Sequence[Any] | None, place: Place
    ) -> Callable[..., Any]:
        """The graph with chains in it, for inputs of these sizes; ``given``: see :func:`.aten.to_aten`."""
        reason = getattr(graph, "compile_subgraph_reason", None)
        interrupted = str(reason.reason).splitlines()[0] if reason is not None and reason.graph_break else None
        if interrupted is None and place.prefix:
            interrupted = f"{place.prefix.rstrip('.')} is captured by itself"
        try:
            aten = to_aten(graph, given, place.prefix)
        except NotTaken as error:
            logger.warning("runs as it is, exactly: its graph cannot be put into ATen operators: %s", error)
            return graph
        chosen = choose(sites_of(aten), self.choice, place.whole and interrupted is None)
        trained = [isinstance(t, Tensor) and t.requires_grad for t in inputs]
        assembled = assemble(aten, chosen, trained, self.chain, self.means, self.rest, self.forward)
        found = Captured(assembled, chosen, interrupted)
        for step in assembled.chains:
            logger.info("a chain of %d: %s", len(step.plan.convolutions), ", ".join(step.plan.convolutions))
        if self.find_kernels is not None:
            self.find_kernels(assembled)
        if self.captured is not None:
            self.captured(found)
        module, runs = assembled.module, self.runs

        def run(*given: Any) -> Any:
            if runs is not None:
                runs(found)
            watch = _watching.get()
            if watch is None:
                return module(*given)
            try:
                return _Watched(module, watch).run(*given)
            finally:
                watch(None, None)

        return run


class _ForEachSize:
    """A graph that Dynamo captured for any size, compiled for each that comes: chains depend on sizes."""

    def __init__(self, backend: Backend, graph: fx.GraphModule, place: Place) -> None:
        self._backend, self._graph, self._place = backend, graph, place
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def __call__(self, *inputs: Any) -> Any:
        key = tuple((t.shape, t.requires_grad) if isinstance(t, Tensor) else t for t in inputs)
        if key not in self._compiled:
            with self._lock:
                self._compiled[key] = self._backend.compile(self._graph, inputs, without_values(inputs), self._place)
        return self._compiled[key](*inputs)


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

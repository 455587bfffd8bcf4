"""A filtered model that compiles itself: in place, and again whenever what it depends on changes.

``torch.nn.Module`` calls ``_compiled_call_impl`` where there is one, as ``Module.compile`` sets it. Ours hands the
module to a compiled function as an argument, so that Dynamo guards everything that the module's code reads, in
PyTorch's own containers too, and replicas of the module can share what was compiled.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

from ...errors import GfTvmError
from .assemble import Forward
from .backend import Backend, Captured, FindKernels
from .rest import Backend as Rest
from .sites import Choice, Place

logger = logging.getLogger("gf_tvm")

M = TypeVar("M", bound=nn.Module)

#: In the ``__dict__`` of a model that compiles itself: its :class:`Filtered`.
_STATE = "_filtered_by_gf_tvm"
#: A method of modules that ours stands for, on the instance.
_REPLICATE = "_replicate_for_data_parallel"
#: In the flags of a module's hooks, where there is no hook of this number.
_NO_HOOK = "gf_tvm"

NOT_RUN = "it has not run a training step"

#: Situations (shapes, modes, what is trained) in which one piece of code is kept compiled, before it begins anew.
_SITUATIONS = 256
#: Dynamo's own limit, beyond which it runs code as it is, for good: what is filtered in graphs alone would be exact.
#: One step may compile the code of a block for every block.
_LIMIT = 16 * _SITUATIONS


@dataclass(frozen=True)
class Settings:
    """How a model is filtered: see :class:`.backend.Backend`.

    ``captured``: whether convolutions are filtered that are no filtered modules, but only where they are captured.
    """

    choice: Choice | None
    chain: bool
    means: torch.dtype | None
    captured: bool = False
    rest: str | None = None
    forward: Forward | None = None


class Filtered:
    """What makes a module compile itself. Copies and pickles of the module take it along, and compile anew.

    Attributes:
        last: the graphs that ran in the last step with gradients, in order; or why there are none.
        breaks: why Dynamo ended graphs before the model's end.
    """

    def __init__(self, module: nn.Module, settings: Settings, find_kernels: FindKernels | None) -> None:
        self.settings, self.find_kernels = settings, find_kernels
        # Dynamo runs a module's ``forward`` without asking for ours, if it has no hooks. This is none, but counts.
        module._forward_hooks_with_kwargs[_NO_HOOK] = True  # type: ignore[index]
        self._install(module)

    def _install(self, module: nn.Module) -> None:
        self.module = module
        self.last: list[Captured] | str = NOT_RUN
        self.breaks: dict[str, None] = {}
        self._running = threading.local()
        self._functions: dict[Any, Callable[..., Any]] = {}
        self._codes: list[CodeType] = []
        # Not by setattr: a copy of the module is still being made, and has none of its own parts yet.
        vars(module)[_STATE] = self
        vars(module)[_REPLICATE] = self.replicate
        vars(module)["_compiled_call_impl"] = _Call(self, module)

    def remove(self) -> None:
        """Let the module run as it is."""
        self.module._forward_hooks_with_kwargs.pop(_NO_HOOK, None)  # type: ignore[call-overload]
        for name in (_STATE, _REPLICATE, "_compiled_call_impl"):
            vars(self.module).pop(name, None)

    # ``nn.Module`` leaves ``_compiled_call_impl`` out of copies and pickles, so this puts it back.
    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "settings": self.settings, "find_kernels": self.find_kernels}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.settings, self.find_kernels = state["settings"], state["find_kernels"]
        self._install(state["module"])

    def replicate(self) -> nn.Module:
        """What ``torch.nn.DataParallel`` makes of the module: one that runs with tensors of its own."""
        kind: Any = type(self.module)
        replica: nn.Module = kind._replicate_for_data_parallel(self.module)
        vars(replica)["_compiled_call_impl"] = _Call(self, replica)
        return replica

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rest: Rest | None = None) -> Any:
        """The module's result, by what is compiled; ``rest``: see :class:`.backend.Backend`."""
        ran: list[Captured] = []
        before, self._running.graphs = getattr(self._running, "graphs", None), ran
        outer, self._running.module = getattr(self._running, "module", self.module), module
        self._running.started = False
        try:
            compiled = self._compiled(self.settings.rest or rest)
            with _settings:
                result = compiled(module, args, kwargs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if isinstance(error.inner_exception, GfTvmError):
                raise error.inner_exception from None
            raise
        finally:
            self._running.graphs, self._running.module = before, outer
        if ran:
            self.last = ran
        else:
            self.unfiltered("nothing that is filtered runs in what Dynamo captures")
        return result

    def unfiltered(self, reason: str) -> None:
        """Say, once, why a step with gradients runs as it is."""
        if self.last != reason:
            logger.warning("%s runs unchained: %s", type(self.module).__name__, reason)
        self.last = reason

    def _compiled(self, rest: Rest | None) -> Callable[..., Any]:
        if rest not in self._functions:
            # Code of its own for every model: Dynamo counts what it compiles by code.
            code = _call.__code__.replace(co_name=f"call_{type(self.module).__name__}")
            self._codes.append(code)
            function = FunctionType(code, _call.__globals__)
            backend = Backend(
                self.settings.choice,
                self.settings.chain,
                self.settings.means,
                rest,
                self.find_kernels,
                self.settings.forward,
                place=self._place,
                captured=self._captured,
                runs=self._runs,
            )
            limits = {"recompile_limit": _LIMIT} if _HAS_LIMIT else {}
            self._functions[rest] = torch.compile(function, backend=backend, dynamic=False, **limits)  # type: ignore[call-overload]
        return self._functions[rest]

    def _place(self) -> Place:
        from torch._dynamo.guards import GuardBuilder, install_guard
        from torch._dynamo.source import LocalSource
        from torch._dynamo.symbolic_convert import InstructionTranslator

        frame = InstructionTranslator.current_tx().output.root_tx
        model: nn.Module = getattr(self._running, "module", self.module)
        names = {id(module): name for name, module in model.named_modules()}
        # Dynamo captures other code than ours where it comes to a part of the model after it broke the model's graph.
        ours = any(frame.f_code is code for code in self._codes)
        owner = None if ours else frame.f_locals.get("self")
        if not isinstance(owner, nn.Module):
            owner = None
        elif owner is not model:  # other parts of the same class have other names, and may not be filtered
            install_guard(LocalSource("self").make_guard(GuardBuilder.ID_MATCH))
        return Place(names, owner, ours and not getattr(self._running, "started", False))

    def _captured(self, graph: Captured) -> None:
        self._running.started = True
        _note_if_full(type(self.module).__name__)
        if graph.interrupted is not None and graph.interrupted not in self.breaks:
            self.breaks[graph.interrupted] = None
            logger.warning(
                "%s: a chain ends where Dynamo ends a graph: %s", type(self.module).__name__, graph.interrupted
            )

    def _runs(self, graph: Captured) -> None:
        graphs = getattr(self._running, "graphs", None)
        if graphs is not None:
            graphs.append(graph)


#: Code that is compiled for as many situations as are kept, by ``id``: the functions of two models may be equal.
_full: dict[int, CodeType] = {}


def _note_if_full(model: str) -> None:
    """While a graph is compiled: whether its code has all the situations that are kept."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    code = InstructionTranslator.current_tx().output.root_tx.f_code
    if id(code) not in _full and len(torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code)) + 1 >= _SITUATIONS:
        _full[id(code)] = code
        logger.warning(
            "%s: %s was compiled for %d situations and begins anew: what its forward pass reads changes all the time "
            "(a float attribute, say; TORCH_LOGS=recompiles tells)",
            model,
            code.co_name,
            _SITUATIONS,
        )


def _begin_anew() -> None:
    """Forget what is compiled of code that has too much of it. No thread may run such code meanwhile."""
    with torch._dynamo.convert_frame.compile_lock:
        while _full:
            torch._C._dynamo.eval_frame.reset_code(_full.popitem()[1])


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


#: Whether a dispatch mode is on in which Dynamo captures nothing; the older name counts some more.
_in_dispatch_mode: Callable[[], bool] = getattr(
    _python_dispatch, "is_in_any_mode_without_ignore_compile_internals", _python_dispatch.is_in_torch_dispatch_mode
)


#: Newer versions of PyTorch take the limit for one function; before, there is one for all.
_HAS_LIMIT = "recompile_limit" in inspect.signature(torch.compile).parameters


#: Of PyTorch's module of modules: hooks that run for all of them.
_HOOKS_ON_ALL = tuple(f"_global_{kind}_hooks" for kind in ("forward_pre", "forward", "backward_pre", "backward"))

_ONE_GRAPH = (
    "under torch.compile(fullgraph=True) convolutions that are filtered only where gf_tvm captures them would have "
    "exact gradients: compile without fullgraph, or filter plain Conv2d layers only"
)


class _Call:
    """What stands for a module's ``_compiled_call_impl``.

    The module runs as it is where gradients are off, and while it is exported or traced. Under an outer
    ``torch.compile`` it interrupts that graph and runs with its chains; where ``fullgraph=True`` forbids that, it is
    compiled as it is, each convolution filtered by itself.
    """

    def __init__(self, filtered: Filtered, module: nn.Module) -> None:
        self.filtered, self.module = filtered, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # not is_compiling(): that is true while any thread compiles
            eager = not torch.compiler.is_exporting()
            wanted = self.filtered.settings.chain or self.filtered.settings.captured
            if eager and wanted and torch.is_grad_enabled():
                if not _one_graph():
                    return self._eager(*args, **kwargs)
                if self.filtered.settings.captured:
                    raise GfTvmError(_ONE_GRAPH)
            return self.module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self._run(args, kwargs)

    @_disable_dynamo
    def _eager(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(args, kwargs, _outer[-1])

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], rest: Rest | None = None) -> Any:
        own: Any = self.module._call_impl
        # PyTorch's flags for compiling and torch.fx are those of all threads: what is set in this one tells.
        exported = torch.compiler.is_exporting()
        symbolic = any(isinstance(value, torch.fx.Proxy) for value in (*args, *kwargs.values()))
        if not torch.is_grad_enabled() or torch._C._is_tracing() or exported or symbolic or _by_modules.get():
            return own(*args, **kwargs)
        transform = torch._C._functorch.peek_interpreter_stack()
        if transform is not None:
            return self._transformed(f"torch.func.{transform.key().name.lower()}", own, args, kwargs)
        if forward_ad._current_level >= 0:
            return self._transformed("forward-mode differentiation", own, args, kwargs)
        if _in_dispatch_mode():
            return self._transformed("a dispatch mode", own, args, kwargs)
        if any(getattr(nn.modules.module, name) for name in _HOOKS_ON_ALL):
            # Dynamo calls those of single modules only.
            self.filtered.unfiltered("hooks on all modules see each module by itself")
            return own(*args, **kwargs)
        return self.filtered.run(self.module, args, kwargs, rest)

    def _transformed(self, kind: str, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Where nothing is captured: module by module, where every convolution knows that it is filtered."""
        if self.filtered.settings.captured and kind not in ("torch.func.jvp", "torch.func.functionalize"):
            raise GfTvmError(
                f"{type(self.module).__name__} has convolutions that are filtered only where Dynamo captures them, and "
                f"under {kind} it captures nothing, so their gradients would be exact: run it under torch.no_grad(), "
                "or filter plain Conv2d layers only"
            )
        return own(*args, **kwargs)


def _one_graph() -> bool:
    """Whether ``torch.compile`` was told to make one graph. Runs while it traces, and says so once."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    output = InstructionTranslator.current_tx().output
    one = getattr(output.root_tx, "one_graph", True)
    _outer[:] = [_backend_of(output)]
    if one and not _said_one_graph:
        _said_one_graph.append(True)
        logger.warning("chains interrupt a compiled graph; under fullgraph=True each convolution is filtered by itself")
    return bool(one)


_said_one_graph: list[bool] = []
#: The backend of the ``torch.compile`` around that was traced last: it compiles what is no chain in here, too.
_outer: list[Rest | None] = [None]


def _backend_of(output: Any) -> Rest | None:
    given = output.compiler_fn
    name = getattr(given, "_compiler_name", None) or getattr(given, "compiler_name", None)
    return name if isinstance(name, str) and name in torch.compiler.list_backends(None) and name != "eager" else None


# What torch.compiler.assume_constant_result sets, without importing the compiler: the function runs while it traces.
_one_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


_by_modules: ContextVar[bool] = ContextVar("gf_tvm_by_modules", default=False)


@contextmanager
def by_modules() -> Iterator[None]:
    """Meanwhile filtered models run uncompiled in this thread, module by module, so that hooks see all of them."""
    token = _by_modules.set(True)
    try:
        yield
    finally:
        _by_modules.reset(token)


class _Count:
    """How many calls that want the settings run, and what was set before the first of them."""

    def __init__(self) -> None:
        self.depth = 0
        self.before: dict[str, Any] = {}


class _OwnCount(threading.local, _Count):
    """One in each thread."""


@functools.cache
def _settings_are_per_thread() -> bool:
    """Newer versions of PyTorch have settings for each thread, which begins with the defaults."""
    entry = torch._dynamo.config._config["optimize_ddp"]  # type: ignore[attr-defined]
    return isinstance(getattr(entry, "user_override", None), ContextVar)


class _DynamoSettings:
    """Dynamo's settings while something of ours runs, in any thread: it may compile at any call."""

    #: Hooks are part of what a module computes, so they are guarded. DistributedDataParallel would have graphs cut
    #: where its buckets of gradients end, to send them early; a chain's gradients come all at once. Another thread may
    #: trace by torch.fx, whose flag is one for all threads; older versions have no such setting.
    _wanted: ClassVar[dict[str, Any]] = {
        "skip_nnmodule_hook_guards": False,
        "optimize_ddp": False,
        "force_compile_during_fx_trace": True,
        "accumulated_recompile_limit": _LIMIT,
    }
    if not _HAS_LIMIT:
        _wanted["recompile_limit"] = _LIMIT

    def __init__(self) -> None:
        self._lock, self._all, self._own = threading.Lock(), _Count(), _OwnCount()
        self._inside = 0

    def __enter__(self) -> None:
        config = torch._dynamo.config
        count = self._own if _settings_are_per_thread() else self._all
        with self._lock:
            count.depth += 1
            if count.depth == 1:
                count.before = {name: getattr(config, name) for name in self._wanted if hasattr(config, name)}
                for name in count.before:
                    setattr(config, name, self._wanted[name])
            if self._inside == 0 and _full:
                _begin_anew()
            self._inside += 1
            if self._inside == 1:
                _generators_end_graphs(True)

    def __exit__(self, *_: object) -> None:
        count = self._own if _settings_are_per_thread() else self._all
        with self._lock:
            count.depth -= 1
            if count.depth == 0:
                for name, value in count.before.items():
                    setattr(torch._dynamo.config, name, value)
            self._inside -= 1
            if self._inside == 0:
                _generators_end_graphs(False)


_settings = _DynamoSettings()


def _generators_end_graphs(wanted: bool) -> None:
    """Have Dynamo not capture what an object of ``random.Random`` gives: it would give the same in every step."""
    from torch._dynamo.variables import misc

    kind = getattr(misc, "RandomVariable", None)
    if kind is None or not hasattr(kind, "is_supported_random_obj"):
        return
    if wanted:
        _true.setdefault("random", kind.__dict__["is_supported_random_obj"])
        kind.is_supported_random_obj = staticmethod(lambda value: False)
    else:
        kind.is_supported_random_obj = _true["random"]


_true: dict[str, Any] = {}


def compile_model(model: M, settings: Settings, find_kernels: FindKernels | None = None) -> M:
    """Make ``model`` compile itself when it runs with gradients, in place; returns ``model``."""
    release_model(model)
    Filtered(model, settings, find_kernels)
    return model


def release_model(model: M) -> M:
    """Let every module of ``model`` run as it is, in place; returns ``model``."""
    for module in model.modules():
        state = vars(module).get(_STATE)
        if isinstance(state, Filtered):
            state.remove()
    return model


def filtered_parts(model: nn.Module) -> Iterator[tuple[str, Filtered]]:
    """The modules of ``model`` that compile themselves, by name."""
    for name, module in model.named_modules():
        state = vars(module).get(_STATE)
        if isinstance(state, Filtered):
            yield name, state

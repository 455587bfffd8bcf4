"""Puts chains into a live model, and tells which there are.

The forward pass of a traced module is replaced on the instance, by an object that holds nothing but the module, so
that parameters, names, classes, copies and pickles stay what they are. Everything else is found when the module runs:
the trace for its present mode, the plans for the shapes that come.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ..errors import ModelError
from ..ops.module import FilteredConv2d
from .capture import CannotTrace, CapturedRegion, capture
from .graph import Region
from .interpreter import Interpreter, has_global_hooks
from .partition import Layout
from .plan import Plan
from .programs import ChainProgram
from .recognise import has_hooks

logger = logging.getLogger("gf_tvm")

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Chain:
    """Filtered convolutions whose gradients stay on patch grids between them.

    Attributes:
        convolutions: fully qualified names, in the order of execution.
        ends: where gradients of full size (or of a single pixel) come in, and why.
        needs_input: whether it gives a gradient of full size to what comes before it.
        kept_values: numbers that the forward pass keeps for the backward pass, parameters not counted.
        kept_bytes: the memory that they took in the last step.
    """

    convolutions: tuple[str, ...]
    ends: tuple[str, ...]
    needs_input: bool
    kept_values: int
    kept_bytes: int

    def __str__(self) -> str:
        lines = [f"chain of {len(self.convolutions)}: {', '.join(self.convolutions)}"]
        lines += [f"  ends {end}" for end in self.ends]
        return "\n".join(lines)


@dataclass(frozen=True)
class ChainReport:
    """The chains of a model's last training step. ``str()`` is a readable list.

    Attributes:
        chains: in the order of execution.
        alone: filtered convolutions that are in no chain, by fully qualified name, and why.
        untraced: modules that could not be traced, and why; their children were tried.
        waiting: traced modules that have not run a training step, or ran the last one unchained, and why.
    """

    chains: tuple[Chain, ...]
    alone: Mapping[str, str]
    untraced: Mapping[str, str]
    waiting: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.chains)} chains of {sum(len(c.convolutions) for c in self.chains)} filtered convolutions"]
        lines += [f"  {line}" for chain in self.chains for line in str(chain).splitlines()]
        lines += [f"  {name}: by itself, {reason}" for name, reason in self.alone.items()]
        lines += [f"  {name or 'the model'}: unchained, {reason}" for name, reason in self.waiting.items()]
        lines += [f"  {name or 'the model'}: cannot be traced, {reason}" for name, reason in self.untraced.items()]
        return "\n".join(lines)


NOT_RUN = "it has not run a training step"


class ChainedForward:
    """A module's forward pass with chains; it stands for ``forward`` in the module's ``__dict__``.

    The module runs as it is where gradients are off, while it is exported or traced, where hooks are registered for all
    modules, and in a mode in which it cannot be traced. Under ``torch.compile`` it interrupts the graph and runs
    eagerly, with its chains; where ``fullgraph=True`` forbids that it is compiled as it is.
    """

    def __init__(self, module: nn.Module, means: torch.dtype | None = None) -> None:
        self.module, self.means = module, means
        self._forget()

    def _forget(self) -> None:
        self._interpreters: dict[Any, Interpreter | str] = {}
        self.last: Interpreter | str = NOT_RUN

    # Copies and pickles take the module along and trace it anew.
    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "means": self.means}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.module, self.means = state["module"], state["means"]
        self._forget()

    # What inspects a forward pass, as torch.export does, sees the module's own.
    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.module).forward.__get__(self.module))

    @property
    def __code__(self) -> CodeType:
        code: CodeType = type(self.module).forward.__code__
        return code

    def _own(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            eager = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
            if eager and torch.is_grad_enabled() and not _one_graph():
                return self._eager(*args, **kwargs)
            return self._own(*args, **kwargs)
        return self._run(*args, **kwargs)

    @_disable_dynamo  # torch.compiler.disable would import the compiler with this module
    def _eager(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        given = self._positional(args, kwargs)
        interpreter = self._interpreter(given)
        if interpreter is None:
            return self._own(*args, **kwargs)
        return interpreter(*given)

    def _positional(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments without names, or with what cannot be given so."""
        if not kwargs:
            return args
        try:
            bound = inspect.signature(self).bind(*args, **kwargs)
        except TypeError:  # the module's own call will say so
            return (*args, kwargs)
        return (*bound.args, bound.kwargs) if bound.kwargs else bound.args

    def _interpreter(self, args: tuple[Any, ...]) -> Interpreter | None:
        if not torch.is_grad_enabled() or torch._C._is_tracing():
            return None
        if not args or not all(isinstance(arg, Tensor) for arg in args):
            if not any(isinstance(arg, torch.fx.Proxy) for arg in args):
                self._unchained("it is called with something else than tensors")
            return None
        if has_global_hooks():
            self._unchained("hooks are registered for all modules")
            return None
        needs = tuple(arg.requires_grad for arg in args)
        key = (needs, *self._mode())
        if key not in self._interpreters:
            try:
                self._interpreters[key] = Interpreter(self.module, capture(self.module, needs), self.means)
            except CannotTrace as reason:
                self._interpreters[key] = f"it cannot be traced in this mode: {reason}"
        interpreter = self._interpreters[key]
        if isinstance(interpreter, str):
            self._unchained(interpreter)
            return None
        self.last = interpreter
        return interpreter

    def _mode(self) -> Iterator[Any]:
        """What a trace depends on, besides the number of tensors."""
        for module in self.module.modules():
            trained = tuple(p is not None and p.requires_grad for p in module._parameters.values())
            yield id(module), type(module), module.training, has_hooks(module), trained
            if isinstance(module, FilteredConv2d):
                yield module.patch, None if module.library is None else module.library.digest

    def _unchained(self, reason: str) -> None:
        if self.last != reason:
            logger.warning("%s runs without chains: %s", type(self.module).__name__, reason)
        self.last = reason


def _one_graph() -> bool:
    """Whether ``torch.compile`` was told to make one graph. Runs while it traces, and says so once."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    one = getattr(InstructionTranslator.current_tx().output.root_tx, "one_graph", True)
    if one and not _said_one_graph:
        _said_one_graph.append(True)
        logger.warning("chains interrupt a compiled graph; under fullgraph=True each convolution is filtered by itself")
    return bool(one)


_said_one_graph: list[bool] = []
# What torch.compiler.assume_constant_result sets, without importing the compiler: the function runs while it traces.
_one_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


#: In the ``__dict__`` of a module that could not be traced: why.
_UNTRACED = "_untraced_by_gf_tvm"


#: In which the means of derivatives may be kept.
MEANS = (None, torch.float16, torch.bfloat16)


def check_means(means: torch.dtype | None) -> None:
    """Raises ModelError."""
    if means not in MEANS:
        raise ModelError(f"means must be None (as they are summed), torch.float16 or torch.bfloat16, got {means!r}")


def chain_model(model: M, means: torch.dtype | None = None) -> M:
    """Chain the filtered convolutions of ``model``, in place; returns ``model``. See :func:`gf_tvm.filter_model`."""
    check_means(means)
    unchain_model(model)
    for module, reason in list(_roots(model)):
        if reason is None:
            module.forward = ChainedForward(module, means)
        else:
            vars(module)[_UNTRACED] = reason
    return model


def unchain_model(model: M) -> M:
    """Give every module of ``model`` its own forward pass back, in place; returns ``model``."""
    for module in model.modules():
        vars(module).pop(_UNTRACED, None)
        if isinstance(vars(module).get("forward"), ChainedForward):
            del module.forward
    return model


def _roots(module: nn.Module) -> Iterator[tuple[nn.Module, str | None]]:
    """The largest modules that can be traced and have a region, and (with the reason) those that cannot be traced."""
    if isinstance(module, FilteredConv2d) or not any(isinstance(m, FilteredConv2d) for m in module.modules()):
        return
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        reason: str | None = "its forward was replaced on the instance"
        if "forward" not in vars(module):
            try:
                if any(isinstance(what, CapturedRegion) for what in _order_of(module)):
                    yield module, None
                    if not isinstance(module, nn.Sequential):
                        return
                # Code that cannot be traced may call a sequence's members one by one, as for checkpointing.
                reason = None
            except CannotTrace as error:
                reason = str(error)
        if reason is not None:
            yield module, reason
    for child in module.children():
        yield from _roots(child)


def _order_of(module: nn.Module) -> tuple[Any, ...]:
    """The order of steps and regions of a module, called with as many tensors as it takes."""
    code = type(module).forward.__code__ if hasattr(type(module).forward, "__code__") else None
    defaults = len(getattr(type(module).forward, "__defaults__", None) or ())
    arguments = 1 if code is None else max(code.co_argcount - 1 - defaults, 1)
    return capture(module, [True] * arguments, everything=True).order


def chains_of(model: nn.Module) -> ChainReport:
    """The chains of ``model``'s last training step: a forward pass with gradients on.

    Chains depend on shapes and on what is trained, so they are known once the model has run.
    """
    chains: list[Chain] = []
    alone: dict[str, str] = {}
    waiting: dict[str, str] = {}
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        if not isinstance(forward, ChainedForward):
            continue
        if isinstance(forward.last, str):
            if forward.last != NOT_RUN or not _runs_elsewhere(model, name):
                waiting[name] = forward.last
            continue
        prefix = f"{name}." if name else ""
        alone |= {prefix + conv: reason for conv, reason in forward.last.captured.alone.items()}
        found, others = _of_interpreter(forward.last, prefix)
        chains += found
        alone |= others
    untraced = {name: vars(m)[_UNTRACED] for name, m in model.named_modules() if _UNTRACED in vars(m)}
    return ChainReport(tuple(chains), alone, untraced, waiting)


def programs_of(model: nn.Module) -> list[ChainProgram]:
    """What :func:`gf_tvm.build` can compile of the chains of ``model``'s last training step, besides single kernels.

    They are for the shapes of that step, and for what was trained in it.
    """
    found: dict[str, ChainProgram] = {}
    for plan in plans_of(model):
        found |= {segment.key: ChainProgram(segment) for segment in plan.segments}
        if plan.backward is not None:
            found[plan.backward.program.key] = ChainProgram(plan.backward.program)
    return list(found.values())


def is_chained(model: nn.Module) -> bool:
    """Whether a module of ``model`` runs, where it can, in chains."""
    return any(isinstance(vars(module).get("forward"), ChainedForward) for module in model.modules())


def plans_of(model: nn.Module) -> Iterator[Plan]:
    """The plans of the chains of :func:`chains_of`."""
    for interpreter in _interpreters(model):
        for _, _, plans in interpreter.layouts:
            yield from (plan for plan, _ in plans)


def inside_chains(model: nn.Module) -> set[int]:
    """Ids of the modules without which there would not be the chains of the last training step.

    Those that run in them, and those around these inside of what was traced: hooks on them end the chains.
    """
    found: set[int] = set()
    for interpreter in _interpreters(model):
        for node in interpreter.in_chains():
            # The trace names the modules that a step lies in, outermost first, below a wrapper of its own.
            paths = [str(path).removeprefix("module.") for path, _ in node.meta.get("nn_module_stack", {}).values()]
            found |= {id(interpreter.modules[path]) for path in paths if path in interpreter.modules}
    return found


def _interpreters(model: nn.Module) -> Iterator[Interpreter]:
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, ChainedForward) and isinstance(forward.last, Interpreter):
            yield forward.last


def _runs_elsewhere(model: nn.Module, name: str) -> bool:
    """Whether a module around a sequence's member runs it, or the members of a sequence run one by one."""

    def ran(other: str) -> bool:
        forward = vars(model.get_submodule(other)).get("forward")
        return isinstance(forward, ChainedForward) and forward.last != NOT_RUN

    others = [other for other, _ in model.named_modules() if other != name]
    around = (o for o in others if not o or name.startswith(f"{o}."))
    inside = (o for o in others if not name or o.startswith(f"{name}."))
    return any(ran(other) for other in (*around, *inside))


def _of_interpreter(interpreter: Interpreter, prefix: str) -> tuple[list[Chain], dict[str, str]]:
    chains, alone = [], {}
    for region, layout, plans in interpreter.layouts:
        chained = {name for plan, _ in plans for name in plan.convolutions}
        for plan, kept_bytes in plans:
            names = tuple(prefix + name for name in plan.convolutions)
            ends = tuple(_ends(plan, layout, region, prefix))
            chains.append(Chain(names, ends, bool(plan.needs), plan.kept_values, kept_bytes))
        for op, value in region.filtered():
            if op.name in chained:
                continue
            reason = layout.reasons.get(value, "nothing next to it can stay on the patch grid")
            alone[prefix + op.name] = reason
    return chains, alone


def _ends(plan: Plan, layout: Layout, region: Region, prefix: str) -> Iterator[str]:
    for value in plan.exits:
        op = region.ops[value - region.entries]
        if value in region.seen:
            continue
        if value in layout.reasons:
            yield f"after {prefix}{op.name}: {layout.reasons[value]}"
        else:
            yield f"after {prefix}{op.name}: its map is one pixel, so the gradient is the same on every grid"

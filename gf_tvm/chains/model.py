"""Puts chains into a live model, and tells which there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn

from ..errors import ModelError
from ..machine.profiles import DeviceProfile, get_profile
from .capture.assemble import ChainStep, Forward
from .capture.backend import Captured, FindKernels
from .capture.live import Settings, compile_model, filtered_parts, release_model
from .capture.sites import Choice
from .capture.wanted import Program, programs_of_steps
from .run.plan import Plan

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
        breaks: by module, why Dynamo ended graphs before the module's end; chains end there.
        waiting: modules that have not run a training step, or ran the last one unchained, and why.
    """

    chains: tuple[Chain, ...]
    alone: Mapping[str, str]
    breaks: Mapping[str, tuple[str, ...]]
    waiting: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.chains)} chains of {sum(len(c.convolutions) for c in self.chains)} filtered convolutions"]
        lines += [f"  {line}" for chain in self.chains for line in str(chain).splitlines()]
        lines += [f"  {name}: by itself, {reason}" for name, reason in self.alone.items()]
        lines += [f"  {name or 'the model'}: unchained, {reason}" for name, reason in self.waiting.items()]
        for name, reasons in self.breaks.items():
            lines += [f"  {name or 'the model'}: a graph ends early, {reason}" for reason in reasons]
        return "\n".join(lines)


#: In which the means of derivatives may be kept.
MEANS = (None, torch.float16, torch.bfloat16)


def check_means(means: torch.dtype | None) -> None:
    """Raises ModelError."""
    if means not in MEANS:
        raise ModelError(f"means must be None (as they are summed), torch.float16 or torch.bfloat16, got {means!r}")


def chain_model(
    model: M,
    means: torch.dtype | None = None,
    choice: Choice | None = None,
    chain: bool = True,
    captured: bool = False,
    rest: str | None = None,
    find_kernels: FindKernels | None = None,
    forward: Forward | None = None,
) -> M:
    """Make ``model`` compile itself, with chains of its filtered convolutions, in place; returns ``model``.

    See :func:`gf_tvm.filter_model`.

    Args:
        choice: of convolutions that are no filtered modules themselves; None: of those only.
        chain: without, each convolution is filtered by itself.
        captured: whether ``choice`` has convolutions that are no filtered modules.
        rest: backend of ``torch.compile`` for what is neither a chain nor a filtered convolution.
        find_kernels: looks for kernels of what was captured.
        forward: compiles the parts that need no gradients; None: they run as they are.
    """
    check_means(means)
    return compile_model(model, Settings(choice, chain, means, captured, rest, forward), find_kernels)


def unchain_model(model: M) -> M:
    """Let every module of ``model`` run as it is, in place; returns ``model``."""
    return release_model(model)


def chains_of(model: nn.Module) -> ChainReport:
    """The chains of ``model``'s last training step: a forward pass with gradients on.

    Chains depend on shapes and on what is trained, so they are known once the model has run.
    """
    chains: list[Chain] = []
    alone: dict[str, str] = {}
    waiting: dict[str, str] = {}
    breaks: dict[str, tuple[str, ...]] = {}
    for name, state in filtered_parts(model):
        prefix = f"{name}." if name else ""
        if state.breaks:
            breaks[name] = tuple(state.breaks)
        if isinstance(state.last, str):
            waiting[name] = state.last
            continue
        for graph in state.last:
            alone |= {prefix + conv: reason for conv, reason in graph.assembled.alone.items()}
            chains += [_chain(step, prefix) for step in graph.assembled.chains]
    return ChainReport(tuple(chains), alone, breaks, waiting)


def _chain(step: ChainStep, prefix: str) -> Chain:
    plan, region = step.plan, step.stretch.region
    names = tuple(prefix + name for name in plan.convolutions)
    ends = []
    for value in plan.exits:
        op = region.ops[value - region.entries]
        reason = step.reasons.get(value, "its map is one pixel, so the gradient is the same on every grid")
        ends.append(f"after {prefix}{op.name}: {reason}")
    return Chain(names, tuple(ends), bool(plan.needs), plan.kept_values, step.kept_bytes)


def programs_of(model: nn.Module, device: DeviceProfile | str = "host") -> list[Program]:
    """What :func:`gf_tvm.build` can compile of ``model``'s last training step, besides single kernels.

    The chains, the exact convolutions of what is filtered, and the parts without gradients. They are for the shapes of
    that step, and for what was trained in it.

    Args:
        device: the CPU that it is built for.

    Raises:
        DeviceError: there is no such profile, or there are no kernels for this CPU.
    """
    found: dict[str, Program] = {}
    for _, graph in graphs_of(model):
        assembled = graph.assembled
        programs: list[Program] = [*programs_of_steps([*assembled.chains, *assembled.convolutions])]
        if assembled.fronts:
            profile = get_profile(device) if isinstance(device, str) else device
            programs += [front.program(profile) for front in assembled.fronts]
        found |= {program.key: program for program in programs}
    return list(found.values())


def compiles_itself(model: nn.Module) -> bool:
    """Whether a module of ``model`` runs compiled where gradients are on, so that hooks on its parts change what is
    compiled."""
    return any(True for _ in filtered_parts(model))


def filter_alike(model: M, other: nn.Module, prefix: str = "") -> M:
    """Make ``model``, in which modules of ``other`` run, compile itself as ``other`` does, in place; returns ``model``.

    Where ``other`` runs as it is, so does ``model``.

    Args:
        prefix: what stands before a name of ``other`` in ``model``: ``"model."``.
    """
    state = dict(filtered_parts(other)).get("")
    if state is None:
        return release_model(model)
    settings, choice = state.settings, state.settings.choice
    if choice is not None:
        patch = choice.patch
        if isinstance(patch, Mapping):
            patch = {prefix + name: value for name, value in patch.items()}
        names = None if choice.names is None else frozenset(prefix + name for name in choice.names)
        settings = replace(settings, choice=replace(choice, patch=patch, names=names))
    return compile_model(model, settings, state.find_kernels)


def graphs_of(model: nn.Module) -> Iterator[tuple[str, Captured]]:
    """The graphs of the last training step, each with the name of the module that it is of."""
    for name, state in filtered_parts(model):
        for graph in () if isinstance(state.last, str) else state.last:
            yield name, graph


def plans_of(model: nn.Module) -> Iterator[Plan]:
    """The plans of the chains of :func:`chains_of`."""
    for _, graph in graphs_of(model):
        yield from (step.plan for step in graph.assembled.chains)

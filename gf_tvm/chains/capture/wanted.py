"""What compiled kernels and programs a captured graph can use."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...core.geometry import Geometry
from ...core.workload import DTYPES, Workload
from ..compile.programs import ChainProgram, Program
from ..plan.graph import Conv
from ..plan.lowering import Kept
from ..plan.steps import ConvInput, ConvWeight
from ..run.plan import Plan
from .assemble import Assembled, ChainStep, ConvolutionStep
from .aten import value_of


def programs_of_plan(plan: Plan) -> list[Program]:
    """The functions that one chain can call."""
    found: list[Program] = [ChainProgram(segment) for segment in plan.segments]
    found += [] if plan.backward is None else [ChainProgram(plan.backward.program)]
    return [*found, *plan.convolution_programs]


def without_library(assembled: Assembled) -> list[ChainStep | ConvolutionStep]:
    """The steps that have no library yet, and work on tensors that kernels for a CPU take."""
    chains = [step for step in assembled.chains if not _libraries(step.plan) and _takes(step)]
    alone = [step for step in assembled.convolutions if not step.digest and _takes(step)]
    return [*chains, *alone]


def workloads_of(steps: list[ChainStep | ConvolutionStep]) -> tuple[Workload, ...]:
    """The kernels that these steps call beside their programs."""
    return tuple(dict.fromkeys(workload for step in steps for workload in _workloads(step)))


def programs_of_steps(steps: list[ChainStep | ConvolutionStep]) -> tuple[Program, ...]:
    """The functions that these steps call."""
    found: list[Program] = []
    for step in steps:
        found += programs_of_plan(step.plan) if isinstance(step, ChainStep) else step.programs
    return tuple({program.key: program for program in found}.values())


def _libraries(plan: Plan) -> set[str]:
    found = {step.op.library for step in plan.forward if isinstance(step.op, Conv) and step.op.filtered}
    return found - {""}


def _takes(step: ChainStep | ConvolutionStep) -> bool:
    values = [value_of(node) for node in _results(step)]
    return all(v.device.type == "cpu" and _name(v.dtype) in DTYPES and v.numel() > 0 for v in values)


def _results(step: ChainStep | ConvolutionStep) -> list[torch.fx.Node]:
    if isinstance(step, ConvolutionStep):
        return [step.site.node]
    forward = step.plan.forward
    return [step.stretch.nodes[f.result] for f in forward if isinstance(f.op, Conv) and f.op.filtered]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _workloads(step: ChainStep | ConvolutionStep) -> Iterator[Workload]:
    if isinstance(step, ConvolutionStep):
        dtype = _name(value_of(step.site.node).dtype)
        if step.needs_weight:
            yield Workload("filter_input", step.geometry, dtype)
        kernel = {(True, True): "backward", (True, False): "backward_input"}.get(
            (step.needs_input, step.needs_weight), "backward_weight"
        )
        yield Workload(kernel, step.geometry, dtype)
        return
    plan = step.plan
    kept = {what.op for what in plan.slots if isinstance(what, Kept) and what.what == "x~"}
    dtypes: dict[Geometry, str] = {}
    for forward in plan.forward:
        if isinstance(forward.op, Conv) and forward.op.filtered:
            n, ci, h, w = value_of(step.stretch.nodes[forward.op.inputs[0]]).shape
            geometry = forward.op.geometry((n, ci, h, w))
            dtypes[geometry] = _name(value_of(step.stretch.nodes[forward.result]).dtype)
            if forward.index in kept:
                yield Workload("filter_input", geometry, dtypes[geometry])
    if plan.backward is None:
        for product in plan.steps:
            if isinstance(product, ConvInput | ConvWeight):
                kernel = "input_grad" if isinstance(product, ConvInput) else "weight_grad"
                yield Workload(kernel, product.geometry, dtypes.get(product.geometry, "float32"))

"""A training step with filtered convolutions: does it gain what the kernels alone promise?

As in fine-tuning (:mod:`gf_tvm.training`), the last convolutions and the classifier are trained, the rest is frozen
and batch norms are in evaluation mode. Three copies of the model make the same step: exact, filtered by plain
operators, filtered by a library. In the same rounds the backward pass of every filtered layer is timed alone, exact
and filtered; a gain is the difference of two times of one round, so the drift of the machine's clock cancels out.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import gf_tvm
from gf_cuda.rounds import interleaved, quantile
from gf_tvm.bundle.kernel import Kernel
from gf_tvm.bundle.library import Library
from gf_tvm.comparison.convolutions import ComparisonError, Data
from gf_tvm.comparison.steps import TrainingStep, agree
from gf_tvm.core import reference, verify
from gf_tvm.core.geometry import Geometry, Pair
from gf_tvm.core.workload import Workload
from gf_tvm.models import build_model
from gf_tvm.nn import select_layers
from gf_tvm.shapes import Case, format_patch, model_cases
from gf_tvm.training.step_costs import StepTimes

CLASSES = 10
ROUNDS_LEAST, ROUNDS_MOST = 5, 200

Call = Callable[[], Any]


@dataclass(frozen=True)
class Layer:
    """Filtered layers that are alike: their geometry, and whether their inputs need a gradient."""

    case: Case
    names: tuple[str, ...]
    needs_x: bool

    @property
    def workloads(self) -> tuple[Workload, Workload]:
        """What a training step calls: the pooling in the forward pass, and the backward pass."""
        kernel = "backward" if self.needs_x else "backward_weight"
        geometry, dtype = self.case.geometry, self.case.dtype
        return Workload("filter_input", geometry, dtype), Workload(kernel, geometry, dtype)


def network(name: str, shape: Sequence[int], last: int) -> tuple[nn.Module, list[str]]:
    """The model with its last convolutions and its classifier left trainable, and these convolutions' names."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = build_model(name, CLASSES, in_channels=shape[1], image_size=min(shape[2:]))
    names = [layer for layer, _ in select_layers(model, last=last)]
    model.requires_grad_(False).eval()
    heads = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for module in (*(model.get_submodule(layer) for layer in names), *heads[-1:]):
        module.requires_grad_(True)
    return model, names


def layers_of(model: nn.Module, names: Sequence[str], shape: Sequence[int], patch: Pair) -> list[Layer]:
    """The filtered layers of a model of :func:`network`, those that are alike together."""
    needs: dict[str, bool] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args: needs.update({name: needs.get(name, False) or args[0].requires_grad})

    hooks = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    try:
        model(torch.zeros(tuple(shape)))
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[tuple[Geometry, bool], list[str]] = {}
    cases: dict[Geometry, Case] = {}
    for case in model_cases(copy.deepcopy(model), shape, layers=list(names), patches=[patch]):
        cases[case.geometry] = case
        for name in case.layers:
            found.setdefault((case.geometry, needs[name]), []).append(name)
    return [Layer(cases[geometry], tuple(users), needs_x) for (geometry, needs_x), users in found.items()]


def measure_step(
    name: str,
    shape: Sequence[int],
    last: int,
    patch: Pair,
    library: Library,
    seconds: float,
    progress: Callable[[float], None],
) -> dict[str, Any]:
    """Time the steps and the layers alone, interleaved.

    Args:
        name, shape, last: the model, its input (n, c, h, w), how many convolutions are filtered.
        seconds: for all of it; at least 5 rounds are made.
        progress: told the part of the rounds that is done.

    Returns:
        Plain values for JSON, times in ms: medians and quartiles over the rounds.

    Raises:
        ComparisonError: the library lacks a kernel, a kernel is wrong, or the steps do not agree.
    """
    model, names = network(name, shape, last)
    layers = layers_of(model, names, shape, patch)
    for layer in layers:
        for workload in layer.workloads:
            _check(library, workload)
    steps = {
        "exact": TrainingStep(model, shape),
        "plain": TrainingStep(gf_tvm.filter_model(copy.deepcopy(model), patch, layers=names), shape),
        "gf_tvm": TrainingStep(gf_tvm.filter_model(copy.deepcopy(model), patch, layers=names, library=library), shape),
    }
    calls: dict[str, Call] = {f"step {variant}": step for variant, step in steps.items()}
    for index, layer in enumerate(layers):
        calls.update({f"{what} {index}": call for what, call in _alone(layer, library).items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gf_tvm.FallbackWarning)  # the plain copy has no library on purpose
        for call in calls.values():  # warm-up; oneDNN compiles at the first call
            call()
        agree(steps["gf_tvm"], steps["plain"])
        once = sum(_seconds(call) for call in calls.values())
        rounds = max(ROUNDS_LEAST, min(ROUNDS_MOST, int(seconds / once)))
        for step in steps.values():
            step.times = StepTimes()
        samples = interleaved(dict.fromkeys(calls, rounds), lambda key: 1e3 * _seconds(calls[key]), progress)
    return {
        "model": name,
        "input": list(shape),
        "patch": list(patch),
        "filtered": names,
        "trained": "these convolutions and the classifier; batch norms in evaluation mode",
        "rounds": rounds,
        "steps": {
            variant: {**_figures(samples[f"step {variant}"]), **step.times.medians()} for variant, step in steps.items()
        },
        "layers": [_layer_figures(layer, samples, index) for index, layer in enumerate(layers)],
        "gains": {variant: _gains(variant, layers, samples) for variant in ("plain", "gf_tvm")},
    }


def _check(library: Library, workload: Workload) -> None:
    """Compare a kernel with float64. Raises ComparisonError, also where the library lacks it."""
    kernel = _kernel(library, workload)
    inputs, outputs = verify.random_inputs(workload, 0), verify.poisoned_outputs(workload)
    kernel(*inputs, *outputs)
    excess = verify.excess(outputs, verify.expected(workload, inputs))
    if not excess <= 1:
        raise ComparisonError(
            f"{workload.key} is wrong, so it was not timed: {excess:.3g} times what rounding explains"
        )


def _kernel(library: Library, workload: Workload) -> Kernel:
    kernel = library.find(workload.kernel, workload.geometry, workload.dtype)
    if kernel is None:
        raise ComparisonError(f"{library.path.name} lacks {workload.key}, so the step would run plain operators")
    return kernel


def _alone(layer: Layer, library: Library) -> dict[str, Call]:
    """The exact and the filtered passes of a layer, with outputs allocated in every call as in a step."""
    case, geometry, needs = layer.case, layer.case.geometry, (layer.needs_x, True, False)
    data = Data.random(case)
    pooling, backward = (_kernel(library, workload) for workload in layer.workloads)
    plain_saved = reference.filter_input(data.x, geometry)
    saved = verify.to_saved(plain_saved, geometry)

    def exact() -> Any:
        return torch.ops.aten.convolution_backward(
            *(data.grad_y, data.x, data.weight, None, geometry.stride, geometry.padding, geometry.dilation, False),
            *((0, 0), geometry.groups, needs),
        )

    def plain_pooling() -> Tensor:
        return verify.to_saved(reference.filter_input(data.x, geometry), geometry)

    def kernel_pooling() -> Tensor:
        sums = data.x.new_empty(geometry.saved_shape, dtype=plain_saved.dtype)
        pooling(data.x, sums)
        return sums

    def kernel_backward() -> tuple[Tensor, ...]:
        new = data.x.new_empty
        grad_w, grad_b = new(geometry.weight_shape), new(geometry.co)
        if not layer.needs_x:
            backward(data.grad_y, saved, grad_w, grad_b)
            return grad_w, grad_b
        grad_x = (new if geometry.covers_input else data.x.new_zeros)(geometry.x_shape)
        backward(data.grad_y, saved, data.weight, grad_x, grad_w, grad_b)
        return grad_x, grad_w, grad_b

    calls: dict[str, Call] = {
        "exact": exact,
        "plain": partial(reference.backward, data.grad_y, plain_saved, data.weight, geometry, needs),
        "plain filter_input": plain_pooling,
        "gf_tvm": kernel_backward,
        "gf_tvm filter_input": kernel_pooling,
    }
    return {what: torch.no_grad()(call) for what, call in calls.items()}


def _layer_figures(layer: Layer, samples: dict[str, list[float]], index: int) -> dict[str, Any]:
    whats = ("exact", "plain", "plain filter_input", "gf_tvm", "gf_tvm filter_input")
    return {
        "names": list(layer.names),
        "patch": format_patch(layer.case.geometry.patch),
        **layer.case.geometry.to_dict(),
        "needs_grad_x": layer.needs_x,
        **{what.replace(" ", "_"): _figures(samples[f"{what} {index}"]) for what in whats},
    }


def _gains(variant: str, layers: Sequence[Layer], samples: dict[str, list[float]]) -> dict[str, Any]:
    """What a step gains by ``variant`` and what its kernels alone gain, round by round; and the ratio of the two."""
    in_step = [a - b for a, b in zip(samples["step exact"], samples[f"step {variant}"], strict=True)]
    of_kernels = [0.0] * len(in_step)
    for index, layer in enumerate(layers):
        parts = (samples[f"exact {index}"], samples[f"{variant} {index}"], samples[f"{variant} filter_input {index}"])
        for round_, (exact, backward, pooling) in enumerate(zip(*parts, strict=True)):
            of_kernels[round_] += len(layer.names) * (exact - backward - pooling)
    step, kernels = _figures(in_step), _figures(of_kernels)
    return {
        "gain_in_step": step,
        "gain_of_kernels": kernels,
        "ratio": step["ms"] / kernels["ms"] if kernels["ms"] > 0 else None,
    }


def _figures(milliseconds: Sequence[float]) -> dict[str, Any]:
    return {
        "ms": quantile(milliseconds, 0.5),
        "ms_quartiles": [quantile(milliseconds, 0.25), quantile(milliseconds, 0.75)],
    }


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - start
    del result  # freed outside of the timing
    return elapsed

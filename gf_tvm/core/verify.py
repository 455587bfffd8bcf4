"""Is a kernel right? Random inputs, poisoned outputs, a float64 reference and an error bound; no TVM here.

The bound is not a number somebody liked: a float32 sum of K terms, in any order, differs from the exact one by about
``sqrt(K) * eps`` times the sum of the terms' magnitudes (the worst case has K in place of its root), and storing it
adds half a unit in the last place of the storage dtype. The magnitudes come from running the reference on absolute
values, so cancellation in the data neither hides a fault nor raises a false alarm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from . import reference
from .geometry import Geometry
from .workload import Workload

#: Roots of sums are typical errors; this many times that has never been seen from a correct kernel.
SAFETY = 4.0
# Elements that are compared at a time: some doubles of each fit into a cache.
_PIECE = 1 << 15


@dataclass(frozen=True)
class ArgumentSpec:
    """One argument of a kernel, in call order: inputs, then outputs."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    output: bool


@dataclass(frozen=True)
class Expected:
    """What an output should be: float64 values, the sums of the terms' magnitudes, and how long those sums are."""

    value: Tensor
    magnitude: Tensor
    terms: int


_ARGUMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "filter_input": (("x",), ("filtered_x",)),
    "filter_grad": (("grad_y",), ("g", "grad_b")),
    "input_grad": (("g", "weight"), ("grad_x_grid",)),
    "weight_grad": (("g", "filtered_x"), ("grad_w",)),
    "expand": (("grad_x_grid",), ("grad_x",)),
    "backward": (("grad_y", "filtered_x", "weight"), ("grad_x", "grad_w", "grad_b")),
    "backward_input": (("grad_y", "weight"), ("grad_x", "grad_b")),
    "backward_weight": (("grad_y", "filtered_x"), ("grad_w", "grad_b")),
}


def argument_specs(workload: Workload) -> list[ArgumentSpec]:
    """The arguments of a workload's kernel. Tensors on the patch grid are float32, the others of storage dtype."""
    geometry = workload.geometry
    dtype = getattr(torch, workload.dtype)
    grid = geometry.grid
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "x": (geometry.x_shape, dtype),
        "grad_x": (geometry.x_shape, dtype),
        "grad_y": (geometry.y_shape, dtype),
        "weight": (geometry.weight_shape, dtype),
        "grad_w": (geometry.weight_shape, dtype),
        "grad_b": ((geometry.co,), dtype),
        "filtered_x": (geometry.saved_shape, torch.float32),
        "g": ((geometry.n, geometry.co, *grid), torch.float32),
        "grad_x_grid": ((geometry.n, geometry.ci, *grid), torch.float32),
    }
    inputs, outputs = _ARGUMENTS[workload.kernel]
    return [ArgumentSpec(name, *shapes[name], False) for name in inputs] + [
        ArgumentSpec(name, *shapes[name], True) for name in outputs
    ]


def random_inputs(workload: Workload, seed: int) -> list[Tensor]:
    """Normally distributed inputs, reproducible."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(argument.shape, generator=generator).to(argument.dtype)
        for argument in argument_specs(workload)
        if not argument.output
    ]


def poisoned_outputs(workload: Workload) -> list[Tensor]:
    """Outputs full of NaN; pixels of grad_x in no patch are zero, which is the caller's part of the contract."""
    made = [torch.empty(spec.shape, dtype=spec.dtype) for spec in argument_specs(workload) if spec.output]
    poison(workload, made)
    return made


def poison(workload: Workload, outputs: Sequence[Tensor]) -> None:
    """Make ``outputs`` what :func:`poisoned_outputs` gives, in place."""
    for spec, tensor in zip((spec for spec in argument_specs(workload) if spec.output), outputs, strict=True):
        tensor.fill_(math.nan)
        if spec.name == "grad_x" and not workload.geometry.covers_input:
            tensor.masked_fill_(~_covered(workload.geometry), 0.0)


@lru_cache(maxsize=4)
def _covered(geometry: Geometry) -> Tensor:
    """Which pixels of a map lie in a patch, bool (h, w)."""
    plane = replace(geometry, n=1, ci=1, co=1, groups=1)
    return reference.expand(torch.ones(1, 1, *geometry.grid), plane)[0, 0] > 0


def to_saved(filtered_x: Tensor, geometry: Geometry) -> Tensor:
    """x~ (n, ci, ph, pw) in the order in which it is kept (:attr:`Geometry.saved_shape`), contiguous."""
    return (filtered_x if geometry.depthwise else filtered_x.permute(0, 2, 3, 1)).contiguous()


def from_saved(saved: Tensor, geometry: Geometry) -> Tensor:
    """Inverse of :func:`to_saved`, as a view."""
    return saved if geometry.depthwise else saved.permute(0, 3, 1, 2)


def _run(workload: Workload, inputs: list[Tensor]) -> list[Tensor]:
    geometry, kernel = workload.geometry, workload.kernel
    if kernel == "filter_input":
        return [to_saved(reference.filter_input(inputs[0], geometry), geometry)]
    if kernel == "filter_grad":
        return [reference.filter_grad(inputs[0], geometry), inputs[0].sum(dim=(0, 2, 3))]
    if kernel == "input_grad":
        return [reference.input_grad(inputs[0], inputs[1], geometry)]
    if kernel == "weight_grad":
        return [reference.weight_grad(inputs[0], from_saved(inputs[1], geometry), geometry)]
    if kernel == "expand":
        return [reference.expand(inputs[0], geometry)]
    grad_y = inputs[0]
    needs_x, needs_w = workload.gives_x, workload.gives_w
    filtered_x = from_saved(inputs[1], geometry) if needs_w else None
    weight = inputs[-1] if needs_x else torch.empty(geometry.weight_shape, dtype=grad_y.dtype)
    results = reference.backward(grad_y, filtered_x, weight, geometry, (needs_x, needs_w, True))
    return [result for result in results if result is not None]


def _terms(workload: Workload) -> dict[str, int]:
    """Length of the sums behind each output, pooling included."""
    geometry = workload.geometry
    patch = geometry.patch[0] * geometry.patch[1]
    patches = geometry.n * geometry.grid[0] * geometry.grid[1]
    taps = geometry.kernel[0] * geometry.kernel[1]
    return {
        "filtered_x": geometry.rows.window * geometry.cols.window,
        "g": patch,
        "grad_b": geometry.n * geometry.rows.out * geometry.cols.out,
        "grad_x_grid": geometry.co_group * taps,
        "grad_x": patch + geometry.co_group * taps,
        "grad_w": patch + patches,
    }


def expected(workload: Workload, inputs: list[Tensor]) -> list[Expected]:
    """The outputs that ``inputs`` should give, computed by the reference in float64."""
    exact = [tensor.double() for tensor in inputs]
    terms = _terms(workload)
    names = [argument.name for argument in argument_specs(workload) if argument.output]
    values, magnitudes = _run(workload, exact), _run(workload, [tensor.abs() for tensor in exact])
    return [
        Expected(value, magnitude, terms[name])
        for name, value, magnitude in zip(names, values, magnitudes, strict=True)
    ]


def excess(outputs: list[Tensor], wanted: list[Expected]) -> float:
    """The largest error in units of what is allowed: up to 1 is right, NaN counts as infinite."""
    worst = 0.0
    for output, want in zip(outputs, wanted, strict=True):
        if output.numel() == 0:
            continue
        storage = torch.finfo(output.dtype)
        typical = SAFETY * math.sqrt(want.terms) * torch.finfo(torch.float32).eps
        # Piece by piece, since a large tensor's temporaries take longer to get from the system than to compute.
        got, value, magnitude = (tensor.reshape(-1) for tensor in (output, want.value, want.magnitude))
        for begin in range(0, output.numel(), _PIECE):
            piece = slice(begin, begin + _PIECE)
            bound = typical * magnitude[piece]
            bound += storage.eps * value[piece].abs() + storage.tiny
            error = ((got[piece].double() - value[piece]).abs() / bound).max().item()
            worst = max(worst, math.inf if math.isnan(error) else error)
    return worst

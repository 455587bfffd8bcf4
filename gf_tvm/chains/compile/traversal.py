"""How the steps of a compiled backward pass go through their registers: what decides which of them share a loop."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...core.geometry import Geometry
from ..plan.steps import Channels, ConvInput, ConvWeight, Gather, Part, PatchSum, Plus, Step, Times, TimesSaved
from .packs import LINE


def space(step: Step, registers: Sequence[tuple[int, int, int]]) -> tuple[int, int, int] | None:
    """(channels, ph, pw) that a step goes through element by element, or None if it does not."""
    if isinstance(step, Gather):
        return (step.channels, *step.grid.shape) if simple(step, registers) else None
    if isinstance(step, PatchSum):
        return (step.width, *step.grid.shape)
    if isinstance(step, ConvInput | ConvWeight):
        geometry = step.geometry
        over_patches = isinstance(step, ConvInput) and geometry.dilated and math.prod(geometry.kernel) > 1
        return (geometry.ci, *geometry.grid) if geometry.depthwise and not over_patches else None
    return registers[step.dst] if isinstance(step, Times | TimesSaved | Channels | Plus) else None


def simple(step: Gather, registers: Sequence[tuple[int, int, int]]) -> bool:
    """Whether every patch of the sum takes the same patch of each part, or the only one that there is."""
    ph, pw = step.grid.shape
    for part in step.parts:
        same = tuple(range(ph)), tuple(range(pw))
        source = part.rows.in_b, part.cols.in_b
        if (part.rows.in_a, part.cols.in_a) != same or (part.start, part.width) != (0, step.channels):
            return False
        if any(weight != 1 for weight in (*part.weight_rows, *part.weight_cols)):
            return False
        if registers[part.src][1:] != (1, 1) and (registers[part.src][1:] != (ph, pw) or source != same):
            return False
    return True


def indices(part: Part) -> tuple[Sequence[float] | Sequence[int], ...]:
    """By cell: the patches of the sum and of the part, and weights, along rows, then columns."""
    return (
        *(tuple(int(k) for k in numbers) for numbers in (part.rows.in_a, part.rows.in_b)),
        tuple(float(weight) for weight in part.weight_rows),
        *(tuple(int(k) for k in numbers) for numbers in (part.cols.in_a, part.cols.in_b)),
        tuple(float(weight) for weight in part.weight_cols),
    )


def scratch_of(geometry: Geometry) -> tuple[int, int]:
    """Elements, whole lines, that the gradient of x of a dilated convolution needs: g~ and W, tap by tap."""
    taps = math.prod(geometry.kernel)
    sizes = geometry.n * geometry.co * taps * math.prod(geometry.grid), geometry.co * geometry.ci_group * taps
    first, second = (size + -size % LINE for size in sizes)
    return first, second

"""Strategies: every kind of convolution that gradient filtering is defined for, on small maps. And random tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from gf_tvm.core.geometry import Axis, Geometry

PAIRS_1_2 = st.tuples(st.integers(1, 2), st.integers(1, 2))
PAIRS_1_3 = st.tuples(st.integers(1, 3), st.integers(1, 3))
PAIRS_1_4 = st.tuples(st.integers(1, 4), st.integers(1, 4))
PAIRS_0_3 = st.tuples(st.integers(0, 3), st.integers(0, 3))
SEEDS = st.integers(0, 2**31 - 1)
NEEDS = st.tuples(st.booleans(), st.booleans(), st.booleans())


def compiling(examples: int) -> settings:
    """For tests that compile something for each example."""
    return settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        phases=[Phase.explicit, Phase.reuse, Phase.generate],  # a failing geometry is small already; shrinking compiles
    )


@st.composite
def channels(draw: st.DrawFn, largest: int = 3) -> tuple[int, int, int]:
    """ci, co, groups: dense, grouped, depthwise, or depthwise with several outputs per channel."""
    kind = draw(st.sampled_from(["dense", "grouped", "depthwise", "multiplied"]))
    if kind == "dense":
        return draw(st.integers(1, largest)), draw(st.integers(1, largest)), 1
    groups = draw(st.integers(2, 3))
    if kind == "depthwise":
        return groups, groups, groups
    if kind == "multiplied":
        return groups, groups * draw(st.integers(2, 3)), groups
    return groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2)), groups


@st.composite
def geometries(draw: st.DrawFn, smallest_n: int = 0, largest_out: int = 9, largest_channels: int = 3) -> Geometry:
    """Any kernel, stride, padding, dilation, groups and patch. One in four is of the dilated case on purpose."""
    ci, co, groups = draw(channels(largest_channels))
    kernel, stride, padding = draw(PAIRS_1_4), draw(PAIRS_1_3), draw(PAIRS_0_3)
    if draw(st.integers(0, 3)) == 0:
        patch = draw(PAIRS_1_3)
        dilation = tuple(draw(st.integers(max(2, r), 2 * r + 1)) for r in patch)
    else:
        patch = draw(st.one_of(PAIRS_1_4, st.tuples(st.integers(1, 12), st.integers(1, 12))))
        dilation = draw(PAIRS_1_2)
    size = []
    for axis in (0, 1):
        reach = dilation[axis] * (kernel[axis] - 1) + 1 - 2 * padding[axis]  # the smallest map with an output
        out = draw(st.integers(1, largest_out))
        unused = draw(st.integers(0, stride[axis] - 1))  # rows at the end that no window reaches
        size.append(max(1, reach + (out - 1) * stride[axis] + unused))
    n = draw(st.sampled_from([n for n in (1, 2, 3, 0) if n >= smallest_n]))
    return Geometry(n, ci, co, *size, kernel, patch, stride, padding, dilation, groups)


def _axes(geometry: Geometry) -> tuple[Axis, Axis]:
    return geometry.rows, geometry.cols


#: What is special about a geometry, to show that a test met all of it.
KINDS: dict[str, Callable[[Geometry], bool]] = {
    "empty batch": lambda g: g.n == 0,
    "dense": lambda g: g.groups == 1,
    "grouped": lambda g: g.groups > 1 and not g.depthwise,
    "depthwise": lambda g: g.depthwise and g.groups > 1,
    "several outputs per group of one": lambda g: g.groups == g.ci > 1 and g.co > g.ci,
    "even kernel": lambda g: any(k % 2 == 0 for k in g.kernel),
    "non-square kernel": lambda g: g.kernel[0] != g.kernel[1],
    "non-square patch": lambda g: g.patch[0] != g.patch[1],
    "non-square map": lambda g: g.h != g.w,
    "strided": lambda g: max(g.stride) > 1,
    "padded": lambda g: max(g.padding) > 0,
    "undivided map": lambda g: not all(axis.out_exact for axis in _axes(g)),
    "patch larger than the map": lambda g: any(axis.patch > axis.out for axis in _axes(g)),
    "negative in_offset": lambda g: any(axis.in_offset < 0 for axis in _axes(g)),
    "uncovered input": lambda g: not g.covers_input,
    "a patch without input": lambda g: any(not axis.in_range(i) for axis in _axes(g) for i in range(axis.patches)),
    "dilated": lambda g: max(g.dilation) > 1 and not g.dilated,
    "dilated case": lambda g: g.dilated,
    "dilated case, d // r > 1": lambda g: g.dilated and max(g.grid_dilation) > 1,
    "dilated case, even kernel": lambda g: g.dilated and any(k % 2 == 0 for k in g.kernel),
    "dilated case, several patches": lambda g: g.dilated and min(g.grid) > 1 and max(g.kernel) > 1,
    "dilated case, grouped": lambda g: g.dilated and g.groups > 1,
}


def kinds(geometry: Geometry) -> set[str]:
    """The KINDS that ``geometry`` is of."""
    return {name for name, holds in KINDS.items() if holds(geometry)}


def tensors(geometry: Geometry, seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Normal random x, weight, bias and grad_y."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (geometry.x_shape, geometry.weight_shape, (geometry.co,), geometry.y_shape)
    x, weight, bias, grad_y = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    )
    return x, weight, bias, grad_y


@contextlib.contextmanager
def saved_tensors() -> Iterator[list[torch.Tensor]]:
    """What autograd keeps for the backward pass of what runs meanwhile."""
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved

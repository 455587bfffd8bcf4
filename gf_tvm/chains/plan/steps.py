"""The steps of a chain's backward pass. Everything about shapes is settled in them: they only say what to compute.

A register holds a gradient on a patch grid, (n, channels, ph, pw) in the dtype of sums, or None where no gradient came
in. Slots number what the forward pass kept: see ``run.plan.Plan``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

from ...core.geometry import Geometry
from .grids import Grid, Shared


@dataclass(frozen=True)
class Filter:
    """dst = means, over the patches of a convolution's output, of the full-size gradient that came in for ``value``."""

    dst: int
    value: int
    geometry: Geometry


@dataclass(frozen=True)
class Take:
    """dst = the gradient that came in for ``value``, whose map is a single pixel."""

    dst: int
    value: int


@dataclass(frozen=True)
class Part:
    """One summand of :class:`Gather`: channels ``start`` and following of the sum.

    Attributes:
        mean: slot of the factor's means over the cells; None where the factor is one.
        rows, cols: the cells, in the grid of the sum (``in_a``) and of ``src`` (``in_b``).
        weight_rows, weight_cols: by cell, its share of the patch of the sum that it lies in.
    """

    src: int
    mean: int | None
    start: int
    width: int
    rows: Shared
    cols: Shared
    weight_rows: tuple[float, ...]
    weight_cols: tuple[float, ...]


@dataclass(frozen=True)
class Gather:
    """dst (n, channels, ph, pw) = the mean, over each patch of ``grid``, of the sum of all parts."""

    dst: int
    channels: int
    grid: Grid
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class ConvInput:
    """dst = grad_x~ from g~ in ``src``."""

    dst: int
    src: int
    weight: int  # slot
    geometry: Geometry
    library: str  # digest, or none


@dataclass(frozen=True)
class ConvWeight:
    """Gradient of the parameter ``tensor`` += grad_W from g~ in ``src`` and x~."""

    tensor: int
    src: int
    filtered: int  # slot of x~
    geometry: Geometry
    library: str  # digest, or none


@dataclass(frozen=True)
class PatchSum:
    """Gradient of ``tensor`` += sum of src * mean * pixels: ``width`` values from ``start`` of its ``channels``."""

    tensor: int
    channels: int
    src: int
    mean: int | None
    start: int
    width: int
    grid: Grid


@dataclass(frozen=True)
class MapSum:
    """dst (n or 1, width, 1, 1) = sum of src * mean * pixels over the map, and over the batch if ``batch``."""

    dst: int
    src: int
    mean: int
    grid: Grid
    batch: bool


@dataclass(frozen=True)
class Times:
    """dst = src * factor."""

    dst: int
    src: int
    factor: float


@dataclass(frozen=True)
class TimesSaved:
    """dst = src * channels ``start`` and following of what a slot holds, (n or 1, c, 1, 1)."""

    dst: int
    src: int
    slot: int
    start: int
    width: int


@dataclass(frozen=True)
class Channels:
    """dst = channels ``start`` and following of src."""

    dst: int
    src: int
    start: int
    width: int


@dataclass(frozen=True)
class Plus:
    """dst = a + b."""

    dst: int
    a: int
    b: int


@dataclass(frozen=True)
class Expand:
    """Gradient of the entry ``value`` (channels ``start`` and following) += src at every pixel of its patches."""

    value: int
    src: int
    grid: Grid
    start: int
    width: int


Step = Union[  # noqa: UP007 (Python 3.10 makes no union of these at run time that mypy reads as an alias)
    Filter,
    Take,
    Gather,
    ConvInput,
    ConvWeight,
    PatchSum,
    MapSum,
    Times,
    TimesSaved,
    Channels,
    Plus,
    Expand,
]


def reads(step: Step) -> tuple[int, ...]:
    """Registers that a step reads."""
    if isinstance(step, Filter | Take):
        return ()
    if isinstance(step, Gather):
        return tuple(part.src for part in step.parts)
    return (step.a, step.b) if isinstance(step, Plus) else (step.src,)


def writes(step: Step) -> tuple[int, ...]:
    """Registers that a step writes."""
    return () if isinstance(step, ConvWeight | PatchSum | Expand) else (step.dst,)

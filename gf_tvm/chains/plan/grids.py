"""Patches of a map as cut points along its two axes, and what two grids of the same map have in common.

A value that is constant over each patch of one grid, averaged over the patches of another, needs only the cells that
both grids cut out of the map together. Where the grids coincide the cells are their patches; where one refines the
other, they are the finer one's.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ...core.geometry import Axis, Geometry
from ...core.reference import sum_dtype
from ...ops.dispatch import without_autocast


@dataclass(frozen=True)
class Cuts:
    """Patches along one axis of a map: patch i covers the pixels from ``points[i]`` up to ``points[i + 1]``.

    Attributes:
        size: pixels of the map along the axis.
        points: one more than there are patches, rising, clipped to the map; a patch may be empty, and pixels before
            the first point and after the last belong to no patch.
    """

    size: int
    points: tuple[int, ...]

    @property
    def patches(self) -> int:
        """Number of patches, empty ones included."""
        return len(self.points) - 1

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Pixels of each patch."""
        return tuple(b - a for a, b in zip(self.points, self.points[1:], strict=False))


def _clipped(axis: Axis, window: int, offset: int, size: int) -> Cuts:
    return Cuts(size, tuple(min(max(i * window - offset, 0), size) for i in range(axis.patches + 1)))


@dataclass(frozen=True)
class Grid:
    """Patches of a map: ``rows`` cut its height, ``cols`` its width."""

    rows: Cuts
    cols: Cuts

    @classmethod
    def of_output(cls, geometry: Geometry) -> Grid:
        """The grid on a filtered convolution's output; its patches cover the map, and none is empty."""
        return cls(*(_clipped(a, a.patch, a.out_offset, a.out) for a in (geometry.rows, geometry.cols)))

    @classmethod
    def of_input(cls, geometry: Geometry) -> Grid:
        """The grid on a filtered convolution's input."""
        return cls(*(_clipped(a, a.window, a.in_offset, a.size) for a in (geometry.rows, geometry.cols)))

    @classmethod
    def whole(cls, size: tuple[int, int]) -> Grid:
        """One patch that is the whole map of ``size`` (height, width)."""
        return cls(*(Cuts(pixels, (0, pixels)) for pixels in size))

    @property
    def shape(self) -> tuple[int, int]:
        """Patches (vertically, horizontally)."""
        return self.rows.patches, self.cols.patches


def uniform(grid: Grid) -> bool:
    """Whether all patches have as many pixels."""
    return len(set(grid.rows.counts)) <= 1 and len(set(grid.cols.counts)) <= 1


def pixels(grid: Grid) -> tuple[float, ...]:
    """Pixels of each patch, row by row."""
    return tuple(float(a * b) for a, b in itertools.product(grid.rows.counts, grid.cols.counts))


def covers(grid: Grid) -> bool:
    """Whether every pixel lies in a patch."""
    return all(cuts.points[0] == 0 and cuts.points[-1] == cuts.size for cuts in (grid.rows, grid.cols))


@dataclass(frozen=True)
class Shared:
    """What the patches of two grids, ``a`` and ``b``, have in common along one axis.

    Attributes:
        cells: the pieces into which both together cut the pixels that lie in patches of both.
        in_a, in_b: the patch of each grid in which a cell lies.
    """

    cells: Cuts
    in_a: tuple[int, ...]
    in_b: tuple[int, ...]


@lru_cache(maxsize=4096)
def shared(a: Cuts, b: Cuts) -> Shared:
    """The cells of two grids along one axis of the same map."""
    first, last = max(a.points[0], b.points[0]), min(a.points[-1], b.points[-1])
    points = tuple(sorted({p for p in (*a.points, *b.points) if first <= p <= last})) or (0,)
    starts = points[:-1]
    return Shared(Cuts(a.size, points), _patches_at(a, starts), _patches_at(b, starts))


def _patches_at(cuts: Cuts, pixels: tuple[int, ...]) -> tuple[int, ...]:
    """The patch of each pixel, which has one."""
    owners = [i for i, count in enumerate(cuts.counts) for _ in range(count)]
    return tuple(owners[pixel - cuts.points[0]] for pixel in pixels)


#: How many cells two grids may have in common along an axis, in patches of the finer one, for a chain to go on. At 1
#: grids have to coincide or to refine each other. Two grids of a and b patches have at most a + b - 1 cells, so that 2
#: allows all; cells cost memory, but a chain that ends costs more, since what follows keeps maps of full size: see
#: docs/patch_grid.md for ResNet-18.
MAX_CELLS = 2.0


def fits(a: Grid, b: Grid) -> bool:
    """Whether gradients may go from one grid to the other without leaving the patch grid."""
    for x, y in ((a.rows, b.rows), (a.cols, b.cols)):
        finer = max(sum(count > 0 for count in cuts.counts) for cuts in (x, y))
        if shared(x, y).cells.patches > MAX_CELLS * finer:
            return False
    return True


def patch_means(t: Tensor, grid: Grid) -> Tensor:
    """t (n, c, h, w) -> (n, c, ph, pw): its mean over the pixels of each patch, in the dtype of sums.

    Zero where a patch is empty.
    """
    with without_autocast(t.device.type):
        t = t.to(sum_dtype(t.dtype))
        # Twice as fast as torch's pooling on CPUs, whose loops over a patch are not vectorised.
        by_rows = torch.matmul(t, _means(grid.cols, t.dtype, t.device).transpose(0, 1))
        return torch.matmul(_means(grid.rows, t.dtype, t.device), by_rows)


@lru_cache(maxsize=256)
def _means(cuts: Cuts, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(patches, pixels): one over the pixels of a patch where the pixel lies in it, else zero."""
    pixel = torch.arange(cuts.size, device=device)
    points = torch.tensor(cuts.points, device=device)
    inside = (pixel >= points[:-1, None]) & (pixel < points[1:, None])
    return inside.to(dtype) / inside.sum(1, keepdim=True).clamp(min=1)


def expand(t: Tensor, grid: Grid) -> Tensor:
    """t (n, c, ph, pw) -> (n, c, h, w): each patch's value at all of its pixels, zero outside of the grid."""
    for dim, cuts in ((2, grid.rows), (3, grid.cols)):
        counts = cuts.counts
        if counts and len(set(counts)) == 1:
            t = t.repeat_interleave(counts[0], dim)
        else:
            t = t.repeat_interleave(torch.tensor(counts, dtype=torch.long, device=t.device), dim)
        before, after = cuts.points[0], cuts.size - cuts.points[-1]
        if before or after:
            t = torch.nn.functional.pad(t, (0, 0, before, after) if dim == 2 else (before, after))
    return t


def to_cells(t: Tensor, dim: int, patch_of: tuple[int, ...]) -> Tensor:
    """Values of patches along ``dim`` -> values of cells, each of which lies in the patch ``patch_of`` says.

    A grid of one patch may stay as it is: it is broadcast.
    """
    if t.shape[dim] == 1 and all(patch == 0 for patch in patch_of):
        return t
    if patch_of == tuple(range(t.shape[dim])):
        return t
    return t.index_select(dim, torch.tensor(patch_of, dtype=torch.long, device=t.device))


def add_cells(t: Tensor, dim: int, patch_of: tuple[int, ...], patches: int) -> Tensor:
    """Values of cells along ``dim`` -> their sums over the cells of each patch."""
    if patch_of == tuple(range(patches)):
        return t
    shape = list(t.shape)
    shape[dim] = patches
    index = torch.tensor(patch_of, dtype=torch.long, device=t.device)
    return t.new_zeros(shape).index_add_(dim, index, t)


def vector(values: tuple[float, ...], like: Tensor) -> Tensor:
    """A tensor of these values with the dtype and device of ``like``."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)

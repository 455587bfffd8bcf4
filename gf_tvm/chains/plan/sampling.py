"""What padding, pooling and resizing do along one axis of a map, and what becomes of patches that they meet.

Such an operation T makes each pixel of its result from a window of its input's pixels. Two ways lead a gradient
through it without leaving the patch grid; docs/patch_grid.md derives them.

*Back*: a gradient that is constant over patches of the result is constant over pieces of the input, those with the same
windows of the same patches around them. :meth:`Sampling.back` finds the pieces.

*Forth*: where no window lies in two patches of the input, T of what is zero outside of a patch is zero outside of that
patch's image, so means over a patch of the input are sums over its image. :meth:`Sampling.image` finds it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import groupby

import torch
import torch.nn.functional as F

from . import grids
from .grids import Cuts, Shared


@dataclass(frozen=True)
class Back:
    """A gradient on patches of the result, on the input's patches (or pieces of them).

    Attributes:
        cuts: of the input.
        factor: where every patch has become one of the input's, what its value is multiplied with; else None.
        sums: else, by summand, the piece and the patch of the result.
        weights: what each summand is multiplied with.
    """

    cuts: Cuts
    factor: float | None
    sums: Shared
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Sampling:
    """One axis: pixel j of the result is the sum of the input's pixels ``windows[j]`` divided by ``divisors[j]``.

    Attributes:
        size: pixels of the input.
        windows: (first pixel, the one after the last), neither of which falls from one window to the next. An empty
            window's pixel is a constant; only the first and the last pixels have such.
        divisors: of an operation that picks one pixel of each window, like the maximum: the window's size.
    """

    size: int
    windows: tuple[tuple[int, int], ...]
    divisors: tuple[int, ...]

    @classmethod
    def of_windows(cls, size: int, starts: Iterable[int], kernel: int) -> Sampling:
        """Means of ``kernel`` pixels from each start on, those outside of the map left out."""
        ends = [(start, start + kernel) for start in starts]
        windows = tuple((min(max(a, 0), size), min(max(b, 0), size)) for a, b in ends)
        return cls(size, windows, tuple(max(b - a, 1) for a, b in windows))

    @property
    def pixels(self) -> int:
        """Pixels of the result."""
        return len(self.windows)

    @cached_property
    def means(self) -> bool:
        """Whether each pixel that is no constant is a mean of its window."""
        return all(a == b or b - a == d for (a, b), d in zip(self.windows, self.divisors, strict=True))

    def image(self, cuts: Cuts) -> Cuts | None:
        """By patch of the input, the result's pixels that are made of it; None where a window lies in two patches.

        Constants are in no patch.
        """
        return _image(self, cuts)

    def back(self, cuts: Cuts) -> Back | None:
        """Where a gradient that is constant over patches of the result is constant over the input.

        None where it is not nearly, so that it takes more than ``grids.MAX_CELLS`` pieces a patch (and one more, at the
        border), or zero everywhere.
        """
        found = _back(self, cuts)
        patches = sum(count > 0 for count in cuts.counts)
        limit = max(grids.MAX_CELLS * patches + 1, cuts.patches)
        return None if found is None or found.cuts.patches > limit else found


@lru_cache(maxsize=4096)
def _image(axis: Sampling, cuts: Cuts) -> Cuts | None:
    made = [j for j, (a, b) in enumerate(axis.windows) if a < b]
    if not made or any(a < point < b for a, b in axis.windows for point in cuts.points):
        return None
    points = (next((j for j in made if axis.windows[j][0] >= point), made[-1] + 1) for point in cuts.points)
    return Cuts(axis.pixels, tuple(points))


@lru_cache(maxsize=4096)
def _back(axis: Sampling, cuts: Cuts) -> Back | None:
    parts: list[Counter[int]] = [Counter() for _ in range(axis.size)]  # by pixel of the input: patches and weights
    for patch, (start, stop) in enumerate(zip(cuts.points, cuts.points[1:], strict=False)):
        for j in range(start, stop):
            share = Fraction(1, axis.divisors[j])
            for pixel in range(*axis.windows[j]):
                parts[pixel][patch] += share  # type: ignore[assignment]  # counts are fractions
    used = [pixel for pixel, part in enumerate(parts) if part]
    if not used:
        return None
    first, last = used[0], used[-1] + 1
    pieces = [(dict(part), len(list(pixels))) for part, pixels in groupby(parts[first:last])]
    points = [first]
    for _, count in pieces:
        points.append(points[-1] + count)
    weights = {weight for part, _ in pieces for weight in part.values()}
    if len(weights) == 1 and all(len(part) == 1 for part, _ in pieces):
        # Patches in the order of their pieces, those that have none between them.
        end_of = {patch: end for (part, _), end in zip(pieces, points[1:], strict=True) for patch in part}
        ends = [first]
        for patch in range(cuts.patches):
            ends.append(end_of.get(patch, ends[-1]))
        whole = Cuts(axis.size, tuple(ends))
        every = tuple(range(cuts.patches))
        return Back(whole, float(weights.pop()), Shared(whole, every, every), ())
    sums = [(piece, patch, float(weight)) for piece, (part, _) in enumerate(pieces) for patch, weight in part.items()]
    in_a, in_b, shares = zip(*sums, strict=True)
    # Only the number of summands counts where there are no means over them.
    cells = Cuts(len(sums), tuple(range(len(sums) + 1)))
    return Back(Cuts(axis.size, tuple(points)), None, Shared(cells, in_a, in_b), shares)


def padded(size: int, before: int, after: int) -> Sampling:
    """``before`` constants before a map and ``after`` behind it; negative ones are pixels that are cut off."""
    return Sampling.of_windows(size, range(-before, size + after), 1)


def pooled_size(size: int, kernel: int, stride: int, padding: int, ceil: bool) -> int:
    """Number of windows, as PyTorch counts them; below one where the kernel does not fit."""
    count = (size + 2 * padding - kernel + (stride - 1 if ceil else 0)) // stride + 1
    # The last window has to begin in the map or in the padding before it.
    return count - 1 if ceil and (count - 1) * stride >= size + padding else count


def pooled(
    size: int,
    kernel: int,
    stride: int,
    padding: int = 0,
    ceil: bool = False,
    include_pad: bool = False,
    fixed: bool = False,
) -> Sampling:
    """Means over windows, as of ``torch.nn.functional.avg_pool2d``.

    ``include_pad``: whether padding counts as pixels. ``fixed``: divide by ``kernel`` in any case.
    """
    starts = [j * stride - padding for j in range(pooled_size(size, kernel, stride, padding, ceil))]
    found = Sampling.of_windows(size, starts, kernel)
    if fixed:
        return Sampling(size, found.windows, (kernel,) * len(starts))
    if include_pad:
        return Sampling(size, found.windows, tuple(min(start + kernel, size + padding) - start for start in starts))
    return found


@lru_cache(maxsize=1024)
def nearest(size: int, target: int, scale: float | None, exact: bool) -> Sampling | None:
    """Resizing by nearest neighbours; None where it depends on rounding which they are, or they are no exact ratio's.

    Args:
        scale: what PyTorch is told, or None where it is told the size.
        exact: "nearest-exact".
    """
    shift = Fraction(1, 2) if exact else Fraction(0)
    wanted = [min(int((j + shift) * size / target), size - 1) for j in range(target)]
    for dtype in (torch.float32, torch.float64):
        row = torch.arange(size, dtype=dtype).view(1, 1, 1, size)
        how = {"size": (1, target)} if scale is None else {"scale_factor": (1.0, scale)}
        got = F.interpolate(row, mode="nearest-exact" if exact else "nearest", **how)
        if got.flatten().tolist() != wanted:
            return None
    return Sampling.of_windows(size, wanted, 1)

"""How one row of a map is pooled, and how one row of patches is spread over a map, a vector register at a time.

Pure index tables, without TVM: which pixels to load together and which lane takes which of them. All loads stay inside
of the row, whatever its width: the last one overlaps the one before. Rows are described by the pixels of each patch
(:meth:`gf_tvm.core.geometry.Axis.out_range` and ``in_range``); a row of W or grad_W is the same thing, with the taps of
a channel as its "patch".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace


def power_of_two(number: int, up: bool = False) -> int:
    """The largest power of two up to ``number``; with ``up`` the smallest that is not less."""
    return 1 << ((number - 1).bit_length() if up else number.bit_length() - 1)


def alignment(size: int) -> int:
    """The largest power of two that all multiples of ``size`` are multiples of."""
    return size & -size


@dataclass(frozen=True)
class Pooling:
    """One vector of patches: sums of pixels of one row.

    Attributes:
        patch: the first patch.
        count: patches that it stands for; further lanes are zero.
        lanes: of the result, a power of two.
        loads: first pixel of each load.
        width: pixels of each load, a power of two.
        taps: the result is the sum of these picks; each names for every lane a pixel of the loads, counted through
            them, or None for zero.
    """

    patch: int
    count: int
    lanes: int
    loads: tuple[int, ...]
    width: int
    taps: tuple[tuple[int | None, ...], ...]


@dataclass(frozen=True)
class Spreading:
    """One vector of pixels of a row, each a copy of its patch.

    Attributes:
        pixel: the first pixel.
        patch: first patch of the load.
        width: patches to load, a power of two; they may reach beyond the row's last patch.
        picks: for every pixel the loaded lane to take.
    """

    pixel: int
    patch: int
    width: int
    picks: tuple[int, ...]

    @property
    def lanes(self) -> int:
        """Pixels, a power of two."""
        return len(self.picks)


@dataclass(frozen=True)
class PlaneVector:
    """One vector of pixels of some whole planes that lie one after the other, each a copy of its patch.

    Attributes:
        pixel: the first pixel, counted through the planes.
        loads: (plane, first patch) of the vectors to load.
        width: patches of each load, a power of two; they may reach beyond the plane's last patch.
        picks: for every pixel the lane to take, counted through the loads.
    """

    pixel: int
    loads: tuple[tuple[int, int], ...]
    width: int
    picks: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """``times`` vectors alike: each ``pixels`` and ``patches`` further on than the one before."""

    first: Pooling | Spreading
    times: int = 1
    pixels: int = 0
    patches: int = 0


def pooling(patches: Sequence[range], size: int, lanes: int) -> list[Pooling]:
    """Vectors of at most ``lanes`` patches for a row of ``size`` pixels; ``patches`` gives the pixels of each."""
    return [
        _pool(patches, start, min(lanes, len(patches) - start), size, lanes) for start in range(0, len(patches), lanes)
    ]


def _pool(patches: Sequence[range], start: int, count: int, size: int, lanes: int) -> Pooling:
    own = patches[start : start + count]
    filled = [pixels for pixels in own if pixels]
    if not filled:
        return Pooling(start, count, power_of_two(count, up=True), (), 1, ())
    first, end = min(p.start for p in filled), max(p.stop for p in filled)
    width = min(lanes, power_of_two(size), power_of_two(end - first, up=True))
    loads: list[int] = []
    while not loads or loads[-1] + width < end:
        loads.append(min(loads[-1] + width if loads else first, size - width))
    # A pixel that two loads hold is taken from the later one; any would do.
    place = {pixel: k * width + pixel - load for k, load in enumerate(loads) for pixel in range(load, load + width)}
    wide = power_of_two(count, up=True)
    taps = tuple(
        tuple(place[own[lane][tap]] if lane < count and tap < len(own[lane]) else None for lane in range(wide))
        for tap in range(max(len(p) for p in own))
    )
    return Pooling(start, count, wide, tuple(loads), width, taps)


def spreading(patches: Sequence[range], lanes: int, aligned: int | None = None) -> list[Spreading]:
    """Vectors of pixels that write each patch's value to all of its pixels; pixels of no patch are left out.

    Args:
        patches: the pixels of each patch, one after the other without gaps (some may be empty).
        lanes: of the registers.
        aligned: where rows begin at multiples of this many pixels, and the stores must too; then no two overlap.
    """
    owner = {pixel: patch for patch, pixels in enumerate(patches) for pixel in pixels}
    if not owner:
        return []
    first, end = min(owner), max(owner) + 1
    starts: list[tuple[int, int]] = []
    if aligned is not None:
        at = first
        while at < end:
            width = min(lanes, aligned, power_of_two(end - at))
            while at % width:
                width //= 2
            starts.append((at, width))
            at += width
    else:
        width = min(lanes, power_of_two(end - first))
        starts = [(min(at, end - width), width) for at in range(first, end, width)]
    vectors = []
    for at, width in starts:
        owners = [owner[pixel] for pixel in range(at, at + width)]
        load = power_of_two(max(owners) - min(owners) + 1, up=True)
        vectors.append(Spreading(at, min(owners), load, tuple(o - min(owners) for o in owners)))
    return vectors


def planes_together(size: int, lanes: int) -> int:
    """How many planes of ``size`` pixels fill registers without a rest."""
    planes = 1
    while planes * size % lanes:
        planes *= 2
    return planes


def spreading_planes(
    rows: Sequence[range], columns: Sequence[range], size: tuple[int, int], planes: int, lanes: int
) -> list[PlaneVector] | None:
    """Vectors that write whole planes as one row of pixels; None if some pixel belongs to no patch.

    Args:
        rows, columns: pixels of each patch along both axes.
        size: of a plane (height, width), in pixels.
        planes: as :func:`planes_together` says.
        lanes: of the registers.
    """
    owners = []
    for patches, extent in zip((rows, columns), size, strict=True):
        owner = {pixel: patch for patch, pixels in enumerate(patches) for pixel in pixels}
        if len(owner) < extent:
            return None
        owners.append([owner[pixel] for pixel in range(extent)])
    sources = [(plane, i * len(columns) + j) for plane in range(planes) for i in owners[0] for j in owners[1]]
    vectors = []
    for pixel in range(0, len(sources), lanes):
        own = sources[pixel : pixel + lanes]
        loads: list[tuple[int, int]] = []
        for plane, patch in sorted(set(own)):
            if not loads or loads[-1][0] != plane or patch >= loads[-1][1] + lanes:
                loads.append((plane, patch))
        place = [max(k for k, load in enumerate(loads) if load <= source) for source in own]
        inner = [patch - loads[k][1] for k, (_, patch) in zip(place, own, strict=True)]
        width = power_of_two(max(inner) + 1, up=True)
        picks = tuple(k * width + lane for k, lane in zip(place, inner, strict=True))
        vectors.append(PlaneVector(pixel, tuple(loads), width, picks))
    return vectors


def runs(vectors: Sequence[Pooling] | Sequence[Spreading], least: int = 3) -> Iterator[Run]:
    """The vectors in order, at least ``least`` of a kind in one run."""
    at = 0
    while at < len(vectors):
        first, times, step = vectors[at], 1, (0, 0)
        if at + 1 < len(vectors):
            step = _distance(first, vectors[at + 1])
            while at + times < len(vectors) and vectors[at + times] == _moved(first, step[0] * times, step[1] * times):
                times += 1
        if times >= least:
            yield Run(first, times, *step)
        else:
            times = 1
            yield Run(first)
        at += times


def _distance(a: Pooling | Spreading, b: Pooling | Spreading) -> tuple[int, int]:
    if isinstance(a, Pooling) and isinstance(b, Pooling):
        return (b.loads[0] - a.loads[0] if a.loads and b.loads else 0), b.patch - a.patch
    assert isinstance(a, Spreading)
    assert isinstance(b, Spreading)
    return b.pixel - a.pixel, b.patch - a.patch


def _moved(vector: Pooling | Spreading, pixels: int, patches: int) -> Pooling | Spreading:
    if isinstance(vector, Pooling):
        return replace(vector, patch=vector.patch + patches, loads=tuple(load + pixels for load in vector.loads))
    return replace(vector, pixel=vector.pixel + pixels, patch=vector.patch + patches)

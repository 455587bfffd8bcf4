"""The code of a segment: one sweep over its maps, plane by plane. Needs TVM; imported when a bundle is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from ...kernels.cpu import emit, maps, simd
from ...kernels.cpu.strips import alignment, pooling, power_of_two
from ...kernels.stages import ACC
from ...machine.profiles import DeviceProfile
from ..plan.grids import Cuts, Grid
from . import emit_functions
from .segment import Average, Node, Part, Product, Segment

#: Pixels that go through the operations before what is averaged of them is pooled: a few KiB for each product, which
#: stay in the first-level cache, and whole small planes, whose short rows would not fill registers.
CHUNK = 1024
#: Rows whose sum is written out.
ROWS = 32
#: Bands of a small plane that are written out, without a loop.
WRITTEN_OUT = 8
#: Planes ahead of which memory is asked for: at least these many pixels.
AHEAD = 4096


def forward_segment(segment: Segment, profile: DeviceProfile) -> Any:
    """IRModule of a segment."""
    with emit.function() as module:
        _Sweep(segment, profile.lanes).emit()
    return module()


@dataclass(frozen=True)
class Band:
    """Rows that lie in one patch row of every grid: ``places`` are their numbers, None outside of a grid."""

    start: int
    rows: int
    places: tuple[int | None, ...]


@dataclass(frozen=True)
class Run:
    """Bands that follow each other, ``times`` times, each time ``rows`` and, by grid, ``places`` further on."""

    bands: tuple[Band, ...]
    times: int = 1
    rows: int = 0
    places: tuple[int, ...] = ()


def bands(height: int, grids: Sequence[Grid], most: int) -> list[Band]:
    """The rows of a map, cut where a patch of some grid begins or ends, at most ``most`` at a time."""
    points = sorted({0, height, *(p for grid in grids for p in grid.rows.points)})
    found = []
    for first, end in pairwise(points):
        places = tuple(_patch_at(grid.rows, first) for grid in grids)
        found += [Band(at, min(most, end - at), places) for at in range(first, end, most)]
    return found


def _patch_at(cuts: Cuts, pixel: int) -> int | None:
    places = (i for i, (a, b) in enumerate(pairwise(cuts.points)) if a <= pixel < b)
    return next(places, None)


def runs(found: Sequence[Band]) -> list[Run]:
    """The bands in order, those that repeat at least three times in one run."""
    result, at = [], 0
    while at < len(found):
        best = _alone(found[at])
        for period in (1, 2, 3, 4):
            run = _repeated(found, at, period)
            if run.times >= 3 and run.times * period > best.times * len(best.bands):
                best = run
        result.append(best)
        at += best.times * len(best.bands)
    return result


def _alone(band: Band) -> Run:
    return Run((band,), 1, 0, (0,) * len(band.places))


def _repeated(found: Sequence[Band], at: int, period: int) -> Run:
    first = tuple(found[at : at + period])
    nothing = Run(first, 0, 0, (0,) * len(first[0].places))
    if at + 2 * period > len(found):
        return nothing
    second = found[at + period]
    rows = second.start - first[0].start
    steps = []
    for a, b in zip(first[0].places, second.places, strict=True):
        if (a is None) != (b is None):
            return nothing
        steps.append(0 if a is None or b is None else b - a)
    times = 1
    while at + (times + 1) * period <= len(found):
        moved = tuple(
            Band(
                band.start + times * rows,
                band.rows,
                tuple(None if p is None else p + times * step for p, step in zip(band.places, steps, strict=True)),
            )
            for band in first
        )
        if moved != tuple(found[at + times * period : at + (times + 1) * period]):
            break
        times += 1
    return Run(first, times, rows, tuple(steps))


class _Sweep:
    def __init__(self, segment: Segment, lanes: int) -> None:
        self.segment, self.lanes = segment, lanes
        self.n, self.c, self.h, self.w = segment.shape
        self.plane = self.h * self.w
        self.grids = list(dict.fromkeys(average.grid for average in segment.averages))
        self.products = list(dict.fromkeys(average.product for average in segment.averages))
        turned = any(_turned(average) for average in segment.averages)
        # A square of that many channels and patches is turned in registers.
        self.square = min(lanes, alignment(self.c)) if turned else 1
        # Of small planes several, so that what was just written is not read back at once.
        self.block = max(1, min(lanes, alignment(self.c), power_of_two(max(CHUNK // self.plane, 1))))
        self.group = max(self.square, self.block)
        self.whole = self.plane <= CHUNK or not segment.averages
        found = bands(self.h, self.grids, max(1, min(CHUNK // self.w, ROWS)))
        self.runs: list[Run] = []
        if segment.averages:
            few = self.whole and len(found) <= WRITTEN_OUT
            self.runs = [_alone(band) for band in found] if few else runs(found)
        #: Pixels that are in the lines at a time.
        self.line = self.plane if self.whole else max(band.rows for band in found) * self.w
        #: By grid, whether each row of patches is one band: then its sums are stored, else added up.
        self.single = [_once(found, k, grid) for k, grid in enumerate(self.grids)]

    def emit(self) -> None:
        self._arguments()
        self._prologue()
        parallel = prod(self.segment.shape) >= emit.PARALLEL_WORK
        with emit.loop(self.n * self.c // self.group, parallel=parallel) as task:
            self._task(task)

    # Arguments, and what is the same for all planes

    def _arguments(self) -> None:
        segment, given = self.segment, []
        given += [T.arg(f"map{k}", T.buffer(segment.shape, ACC)) for k in range(segment.maps)]
        given += [T.arg(f"{name}{k}", T.buffer((self.c,), ACC)) for k, name in segment.parameters()]
        given += [T.arg(f"out{k}", T.buffer(shape, ACC)) for k, shape in enumerate(segment.outputs)]
        tensors = iter([simd.flat(tensor) for tensor in given])
        self.maps = [next(tensors) for _ in range(segment.maps)]
        self.parameters = {which: next(tensors) for which in segment.parameters()}
        self.written = [(value, next(tensors) if over is None else self.maps[over]) for value, over in segment.written]
        self.handed = [(product, next(tensors)) for product in segment.handed]
        self.averages = [(average, next(tensors)) for average in segment.averages]
        self.slopes = [(node, next(tensors)) for node in segment.slopes]

    def _prologue(self) -> None:
        self.norms = {k: self._norm(k, node) for k, node in enumerate(self.segment.nodes) if node.kind == "norm"}
        for node, target in self.slopes:
            emit.each_vector(self.c, self.lanes, self._copy(self.norms[node]["slope"], target))
        means = {average.grid for average, _ in self.averages if average.layout == "means"}
        self.scales = [_scales(grid, self.block if self.whole else 1) if grid in means else None for grid in self.grids]

    @staticmethod
    def _copy(source: Any, target: Any) -> Callable[[Any, int], None]:
        return lambda at, width: simd.store(target, at, simd.load(source, at, width))

    def _norm(self, k: int, node: Node) -> dict[str, Any]:
        """By channel: the batch norm's result is x * slope + offset, its normalised map (x - mean) * inverse."""
        eps, has_scale, has_shift = node.settings
        vectors = {name: T.alloc_buffer((self.c,), ACC) for name in ("inverse", "slope", "offset")}

        def some(at: Any, width: int) -> None:
            def given(name: str) -> Any:
                return simd.load(self.parameters[k, name], at, width)

            inverse = T.bind(simd.splat(1.0, width) / tirx.sqrt(given("variance") + simd.splat(eps, width)))
            slope = T.bind(inverse * given("scale")) if has_scale else inverse
            offset = simd.splat(0.0, width) - given("mean") * slope
            simd.store(vectors["inverse"], at, inverse)
            simd.store(vectors["slope"], at, slope)
            simd.store(vectors["offset"], at, offset + given("shift") if has_shift else offset)

        emit.each_vector(self.c, self.lanes, some)
        return {**vectors, "mean": self.parameters[k, "mean"]}

    # Planes

    def _task(self, task: Any) -> None:
        """A group of planes, in blocks."""
        planes = self.block if self.whole else 1
        self.lines = [T.alloc_buffer((planes * self.line + self.lanes,), ACC) for _ in self.products]
        self.sums = [
            T.alloc_buffer(((self.group if _turned(average) else planes) * self._stride(average) + self.lanes,), ACC)
            for average, _ in self.averages
        ]
        first = T.bind(task * self.group)
        with emit.loop(self.group // planes) as block:
            before = block * planes
            if self.whole:
                with emit.loop(planes) as q:
                    self._start(first + (before + q))
                    self._sweep(self.base, q * self.plane, self.plane)
            if self.averages:
                with emit.loop(planes) as q:
                    if not self.whole:
                        self._start(first + (before + q))
                    self._averages(q, before)
            for (average, target), sums in zip(self.averages, self.sums, strict=True):
                if not _turned(average):
                    self._finish(average, target, sums, first + before, planes)
        for (average, target), sums in zip(self.averages, self.sums, strict=True):
            if _turned(average):
                patches = prod(average.grid.shape)
                with emit.loop(self.group // self.square) as part:
                    k = T.bind(first + part * self.square)
                    maps.to_channels_last(
                        sums,
                        part * self.square * self._stride(average),
                        self._stride(average),
                        self.square,
                        patches,
                        target,
                        k // self.c * patches,
                        self.c,
                        k % self.c,
                    )

    def _stride(self, average: Average) -> int:
        """From one plane's sums to the next's: vectors of these may reach beyond what has been written."""
        return prod(average.grid.shape) + (self.lanes if _turned(average) else 0)

    def _start(self, k: Any) -> None:
        """What the operations need of plane ``k``."""
        channel = T.bind(k % self.c)
        self.scalars = {
            (node, name): T.bind(simd.load(vector, channel, 1))
            for node, vectors in self.norms.items()
            for name, vector in vectors.items()
        }
        self.base = T.bind(k * self.plane)

    def _averages(self, q: Any, before: Any) -> None:
        """Fill the sums of plane ``q`` of the block that begins with plane ``before`` of the group."""
        places = [(before + q if _turned(a) else q) * self._stride(a) for a, _ in self.averages]
        for place, (average, _), sums in zip(places, self.averages, self.sums, strict=True):
            if not self.single[self.grids.index(average.grid)]:
                emit.clear(sums, place, prod(average.grid.shape), self.lanes)
        for run in self.runs:
            with emit.loop(run.times) as t:
                for band in run.bands:
                    row = band.start + t * run.rows
                    if not self.whole:
                        self._sweep(self.base + row * self.w, 0, band.rows * self.w)
                    line = T.bind(q * self.plane + row * self.w) if self.whole else 0
                    self._pool(band, line, run, t, places)

    def _finish(self, average: Average, target: Any, sums: Any, first: Any, planes: int) -> None:
        """From a block's sums to the output."""
        patches = prod(average.grid.shape)
        scales = self.scales[self.grids.index(average.grid)]

        def some(at: Any, width: int) -> None:
            value = simd.load(sums, at, width)
            if average.layout == "means":
                by = simd.splat(scales, width) if isinstance(scales, float) else simd.load(scales, at, width)
                value = value * by
            simd.store(target, first * patches + at, value)

        emit.each_vector(planes * patches, self.lanes, some)

    def _pool(self, band: Band, start: Any, run: Run, t: Any, places: Sequence[Any]) -> None:
        """Add a band, which begins in the lines at ``start``, to the sums of its patches."""
        for (average, _), sums, place in zip(self.averages, self.sums, places, strict=True):
            g = self.grids.index(average.grid)
            number = band.places[g]
            if number is None:
                continue
            line, single = self.lines[self.products.index(average.product)], self.single[g]
            at = place + (number + t * run.places[g]) * average.grid.shape[1]

            def sink(patch: Any, value: Any, sums: Any = sums, at: Any = at, single: bool = single) -> None:
                if not single:
                    value = simd.load(sums, at + patch, simd.lanes_of(value)) + value
                simd.store(sums, at + patch, value)

            pixels = maps.pixel_rows(line, start, self.w, band.rows)
            self._pool_columns(average.grid.cols, pixels, sink)

    def _pool_columns(self, cuts: Cuts, pixels: Any, sink: Any) -> None:
        if min(cuts.counts) < self.lanes:
            columns = [range(a, b) for a, b in pairwise(cuts.points)]
            # A line may be read beyond its rows, so short ones are one load.
            maps.pool(pooling(columns, power_of_two(self.w, up=True), self.lanes), pixels, sink)
            return
        for patch, (first, count) in enumerate(zip(cuts.points, cuts.counts, strict=False)):
            whole = count // self.lanes
            total = T.bind(pixels(first, self.lanes))
            for k in range(1, whole):
                total = T.bind(total + pixels(first + k * self.lanes, self.lanes))
            total = emit.total(total)
            for at, width in emit.pieces(count - whole * self.lanes, self.lanes):
                total = total + emit.total(pixels(first + whole * self.lanes + at, width))
            sink(patch, T.bind(total))

    # Pixels

    def _sweep(self, base: Any, line: Any, count: int) -> None:
        """All operations on ``count`` pixels, whatever rows they are in; what is averaged goes to ``line``."""
        base, line = T.bind(base), line if isinstance(line, int) else T.bind(line)
        whole = count // self.lanes
        if whole:
            emit.unrolled(
                whole, whole if whole <= 8 else 4, lambda v: self._vector(base, line, v * self.lanes, self.lanes)
            )
        for at, width in emit.pieces(count - whole * self.lanes, self.lanes):
            self._vector(base, line, whole * self.lanes + at, width)

    def _vector(self, base: Any, first: Any, at: Any, width: int) -> None:
        ahead = max(1, AHEAD // self.plane) * self.plane
        for buffer in self.maps if width == self.lanes else ():
            simd.prefetch(buffer, base + at + ahead)
        values = [T.bind(simd.load(buffer, base + at, width)) for buffer in self.maps]
        inputs = len(values)
        for k, node in enumerate(self.segment.nodes):
            values.append(T.bind(self._result(k, node, [values[v] for v in node.inputs], width)))
        known: dict[Part, Any] = {}

        def factor(part: Part) -> Any:
            if part not in known:
                known[part] = T.bind(self._factor(part, values, inputs, width))
            return known[part]

        partial: dict[Product, Any] = {}

        def product(parts: Product) -> Any:
            if parts not in partial:
                last = factor(parts[-1])
                partial[parts] = last if len(parts) == 1 else T.bind(product(parts[:-1]) * last)
            return partial[parts]

        for parts, line in zip(self.products, self.lines, strict=True):
            simd.store(line, first + at, product(parts))
        for parts, target in self.handed:
            simd.store(target, base + at, product(parts))
        for value, target in self.written:
            simd.store(target, base + at, values[value])

    def _result(self, k: int, node: Node, x: Sequence[Any], width: int) -> Any:
        if node.kind == "norm":
            slope, offset = (simd.splat(self.scalars[k, name], width) for name in ("slope", "offset"))
            return x[0] * slope + offset
        if node.kind == "add":
            (alpha,) = node.settings
            return x[0] + (x[1] if alpha == 1 else x[1] * simd.splat(float(alpha), width))
        if node.kind == "scale":
            return x[0] * simd.splat(float(node.settings[0]), width)
        return emit_functions.function(node.kind, node.settings, x[0])

    def _factor(self, part: Part, values: Sequence[Any], inputs: int, width: int) -> Any:
        if part.what == "map":
            return values[part.of]
        if part.what == "result":
            return emit_functions.slope_of_result(part.kind, part.settings, values[part.of])
        node = self.segment.nodes[part.of]
        x = values[node.inputs[0]]
        if node.kind == "norm":
            mean, inverse = (simd.splat(self.scalars[part.of, name], width) for name in ("mean", "inverse"))
            return (x - mean) * inverse
        return emit_functions.slope(node.kind, node.settings, x)


def _turned(average: Average) -> bool:
    return average.layout == "sums, channels last"


def _once(found: Sequence[Band], g: int, grid: Grid) -> bool:
    return [p for band in found if (p := band.places[g]) is not None] == list(range(grid.shape[0]))


def _scales(grid: Grid, times: int) -> Any:
    """One over the pixels of each patch, zero for empty ones: a number if it is the same for all, else a buffer.

    The buffer holds them for ``times`` planes.
    """
    by_row, by_column = ([1.0 / count if count else 0.0 for count in cuts.counts] for cuts in (grid.rows, grid.cols))
    if len({*by_row}) == len({*by_column}) == 1:
        return by_row[0] * by_column[0]
    ph, pw = grid.shape
    rows, columns = T.alloc_buffer((ph,), ACC), T.alloc_buffer((pw,), ACC)
    scales = T.alloc_buffer((times * ph * pw,), ACC)
    for buffer, values in ((rows, by_row), (columns, by_column)):
        for k, value in enumerate(values):
            simd.store(buffer, k, tirx.const(value, ACC))
    with emit.loop(times) as k, emit.loop(ph) as i, emit.loop(pw) as j:
        simd.store(scales, (k * ph + i) * pw + j, simd.load(rows, i, 1) * simd.load(columns, j, 1))
    return scales

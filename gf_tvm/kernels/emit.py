"""Pieces of loops that the CPU kernels share: pooling and spreading a row of patches, outer products in registers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from ..geometry import Axis, Geometry
from ..workload import Workload
from . import simd
from .ahead import Ahead
from .stages import ACC
from .strips import PlaneVector, Pooling, Run, Spreading, pooling, power_of_two, runs, spreading

#: Work (multiplications, or elements moved) below which a loop is done before a sleeping thread has woken up to help.
PARALLEL_WORK = 16384

#: A row of more vectors is written vector by vector, not row by row: its values would not stay in registers.
_ROW_IN_REGISTERS = 10
#: Multiply-adds in one turn of a product's loop, at least, before it is unrolled.
_PRODUCTS_A_TURN = 16


@contextmanager
def loop(extent: int, parallel: bool = False) -> Iterator[Any]:
    """A loop, or no loop where it would run once."""
    if extent == 1 and not parallel:
        yield 0
    else:
        with (T.parallel if parallel else T.serial)(0, extent) as variable:
            yield variable


def by_row(rows: Sequence[range], i: Any, emit: Callable[[Any, int], None]) -> None:
    """``emit(first pixel row, number of rows)`` for patch row ``i``; patch rows that are clipped get their own code."""
    inner = rows[len(rows) // 2]
    step = rows[1].stop - rows[0].stop if len(rows) > 1 else 0
    offset = inner.stop - step * (len(rows) // 2) - len(inner)

    def regular(k: int) -> bool:
        return len(rows[k]) == len(inner) and (not rows[k] or rows[k].start == step * k + offset)

    special = [k for k in range(len(rows)) if not regular(k)]

    if isinstance(i, int):
        emit(rows[i].start, len(rows[i]))
        return

    def rest(special: list[int]) -> None:
        if not special:
            emit(i * step + offset, len(inner))
            return
        k, *others = special
        with T.If(i == k):
            with T.Then():
                emit(rows[k].start, len(rows[k]))
            with T.Else():
                rest(others)

    if len(rows) == 1:
        emit(rows[0].start, len(rows[0]))
    else:
        rest(special)


def _each(vectors: Sequence[Any], emit: Callable[[Run, Any], None]) -> None:
    for run in runs(vectors):
        with loop(run.times) as t:
            emit(run, t)


def pool(vectors: Sequence[Pooling], pixels: Callable[[Any, int], Any], sink: Callable[[Any, Any], None]) -> None:
    """Pool one row.

    Args:
        vectors: see :func:`strips.pooling`.
        pixels: (first pixel, lanes) -> their sums over the rows of the patch.
        sink: takes the first patch and the sums.
    """

    def one(run: Run, t: Any) -> None:
        plan = run.first
        assert isinstance(plan, Pooling)
        loaded = [T.bind(pixels(at + t * run.pixels, plan.width)) for at in plan.loads]
        total = simd.splat(0.0, plan.lanes)
        for k, tap in enumerate(plan.taps):
            picked = simd.pick(loaded, tap)
            total = picked if k == 0 else total + picked
        sink(plan.patch + t * run.patches, T.bind(total))

    _each(vectors, one)


def spread(
    vectors: Sequence[Spreading], patches: Callable[[Any, int], Any], rows: int, sink: Callable[[int, Any, Any], None]
) -> None:
    """Write one row of patches to ``rows`` rows of pixels.

    Args:
        vectors: see :func:`strips.spreading`.
        patches: (first patch, lanes) -> their values; lanes beyond the last patch may hold anything.
        rows: pixel rows to write.
        sink: takes the row, the first pixel and the vector.
    """
    if not rows:
        return

    def value(run: Run, t: Any) -> Any:
        plan = run.first
        assert isinstance(plan, Spreading)
        return T.bind(simd.pick([patches(plan.patch + t * run.patches, plan.width)], plan.picks))

    if len(vectors) <= _ROW_IN_REGISTERS:
        values = [value(Run(plan), 0) for plan in vectors]
        for row in range(rows):
            for plan, filled in zip(vectors, values, strict=True):
                sink(row, plan.pixel, filled)
        return

    def one(run: Run, t: Any) -> None:
        assert isinstance(run.first, Spreading)
        filled = value(run, t)
        for row in range(rows):
            sink(row, run.first.pixel + t * run.pixels, filled)

    _each(vectors, one)


def pieces(count: int, lanes: int) -> list[tuple[int, int]]:
    """(start, lanes) of vectors, powers of two, that cover ``count`` elements exactly."""
    found, at = [], 0
    while at < count:
        width = min(lanes, power_of_two(count - at))
        found.append((at, width))
        at += width
    return found


def copy(target: Any, to: Any, source: Any, start: Any, count: int, lanes: int) -> None:
    """Copy ``count`` neighbouring elements."""
    for at, width in pieces(count, lanes):
        simd.store(target, to + at, simd.load(source, start + at, width))


def total(value: Any) -> Any:
    """Sum of a vector's lanes, halving it."""
    lanes = simd.lanes_of(value)
    while lanes > 1:
        lanes //= 2
        value = T.bind(value)
        value = simd.pick([value], range(lanes)) + simd.pick([value], range(lanes, 2 * lanes))
    return value


class Products:
    """A tile of sums that stays in registers: ``rows`` scalars times ``vectors`` registers, added up.

    Args:
        rows, vectors, lanes: of the tile.
        start: (row, register) -> what the sums begin with; None: zero.
    """

    def __init__(self, rows: int, vectors: int, lanes: int, start: Callable[[int, int], Any] | None = None) -> None:
        self.rows, self.vectors, self.lanes = rows, vectors, lanes
        self._sums = T.alloc_buffer((rows * vectors * lanes,), ACC, scope="local")
        for row in range(rows):
            for v in range(vectors):
                simd.store(self._sums, self._at(row, v), start(row, v) if start else simd.splat(0.0, lanes))

    def _at(self, row: int, v: int) -> int:
        return (row * self.vectors + v) * self.lanes

    def add(
        self,
        steps: int,
        scalars: Callable[[Any, int], Any],
        registers: Callable[[Any, int], Any],
        ahead: Ahead | None = None,
    ) -> None:
        """Add scalars(step, row) * registers(step, v) to every sum, for every step, and fetch ``ahead`` meanwhile."""

        def step(k: Any) -> None:
            loaded = [T.bind(registers(k, v)) for v in range(self.vectors)]
            for row in range(self.rows):
                scalar = simd.splat(scalars(k, row), self.lanes)
                for v in range(self.vectors):
                    old = simd.load(self._sums, self._at(row, v), self.lanes)
                    simd.store(self._sums, self._at(row, v), old + scalar * loaded[v])

        # Tiles of few sums get several steps in one turn of the loop, so that its own instructions do not count.
        times = power_of_two(max(1, _PRODUCTS_A_TURN // (self.rows * self.vectors)))
        whole, rest = divmod(steps, ahead.pace) if ahead is not None else (0, steps)
        if whole and ahead is not None:
            pace = ahead.pace
            with loop(whole) as turn:
                ahead.fetch()
                unrolled(pace, times, lambda k: step(turn * pace + k))
        if rest:
            unrolled(rest, times, lambda k: step(steps - rest + k))

    def sums(self) -> Iterator[tuple[int, int, Any]]:
        """(row, register, sums), in order."""
        for row in range(self.rows):
            for v in range(self.vectors):
                yield row, v, simd.load(self._sums, self._at(row, v), self.lanes)


def unrolled(extent: int, times: int, emit: Callable[[Any], None]) -> None:
    """A loop whose body is written out ``times`` times; what does not divide comes after it."""
    times = min(times, extent)
    if extent // times:
        with loop(extent // times) as outer:
            for place in range(times):
                emit(outer * times + place)
    for k in range(extent // times * times, extent):
        emit(k)


def arguments(workload: Workload) -> dict[str, Any]:
    """The function's parameters, in the order in which kernels take them, as flat memory."""
    geometry, dtype, kernel = workload.geometry, workload.dtype, workload.kernel
    found: list[tuple[str, tuple[int, ...], str]] = []
    if kernel == "filter_input":
        found += [("x", geometry.x_shape, dtype), ("filtered_x", geometry.saved_shape, ACC)]
    else:
        with_x, with_w = kernel != "backward_weight", kernel != "backward_input"
        found += [("grad_y", geometry.y_shape, dtype)]
        found += [("saved", geometry.saved_shape, ACC)] if with_w else []
        found += [("weight", geometry.weight_shape, dtype)] if with_x else []
        found += [("grad_x", geometry.x_shape, dtype)] if with_x else []
        found += [("grad_w", geometry.weight_shape, dtype)] if with_w else []
        found += [("grad_b", (geometry.co,), dtype)]
    # All of them first: TVM takes no parameters after anything else.
    tensors = {name: T.arg(name, T.buffer(shape, kind)) for name, shape, kind in found}
    return {name: simd.flat(tensor) for name, tensor in tensors.items()}


def threads() -> Any:
    """How many threads a parallel loop has when the kernel runs."""
    return tirx.call_packed("runtime.NumThreads")


@contextmanager
def function() -> Iterator[Callable[[], Any]]:
    """Everything emitted inside is the function ``main``; afterwards what is yielded gives its IRModule."""
    with IRBuilder() as builder, T.prim_func():
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        yield lambda: tvm.IRModule({"main": builder.get()})


def out_ranges(axis: Axis) -> list[range]:
    """Output pixels of each patch."""
    return [axis.out_range(i) for i in range(axis.patches)]


def out_axes(geometry: Geometry) -> tuple[list[range], list[range]]:
    """Output pixels of each patch, rows and columns."""
    return out_ranges(geometry.rows), out_ranges(geometry.cols)


def in_axes(geometry: Geometry) -> tuple[list[range], list[range]]:
    """Input pixels of each patch, rows and columns."""
    return in_ranges(geometry.rows), in_ranges(geometry.cols)


def in_ranges(axis: Axis) -> list[range]:
    """Input pixels of each patch."""
    return [axis.in_range(i) for i in range(axis.patches)]


def pixel_rows(buffer: Any, base: Any, width: int, count: int, ahead: int = 0) -> Callable[[Any, int], Any]:
    """For :func:`pool`: sums of ``count`` rows, ``width`` pixels apart.

    Args:
        buffer, base: the map, and where the first row begins in it.
        ahead: every line that is read asks for the one that lies that many elements behind it; 0: none does.
    """

    def pixels(at: Any, lanes: int) -> Any:
        if not count:
            return simd.splat(0.0, lanes)
        for row in range(count) if ahead else ():
            simd.prefetch(buffer, base + (row * width + at + ahead))
        values = [simd.load(buffer, base + (row * width + at), lanes) for row in range(count)]
        return sum(values[1:], values[0])

    return pixels


def pool_row(
    axes: tuple[Sequence[range], Sequence[range]],
    source: Any,
    plane: Any,
    size: tuple[int, int],
    i: Any,
    target: Any,
    at: Any,
    lanes: int,
    ahead: int,
) -> None:
    """Pool patch row ``i`` of a plane.

    Args:
        axes: pixels of each patch, rows and columns.
        source, plane, size: the map, the number of the plane in it, and a plane's height and width.
        target, at: where the sums go; up to ``lanes`` elements behind them may be overwritten.
        ahead: see :func:`pixel_rows`.
    """
    (rows, columns), (height, width) = axes, size
    plan = pooling(columns, width, lanes)

    def pooled(first: Any, count: int) -> None:
        base = T.bind((plane * height + first) * width)
        pixels = pixel_rows(source, base, width, count, ahead)
        pool(plan, pixels, lambda patch, sums: simd.store(target, at + patch, sums))

    by_row(rows, i, pooled)


def patch_scales(geometry: Geometry, repeated: int) -> Any:
    """1 / pixels of each patch of a map, its first ``repeated`` ones once more behind them; None if all are equal."""
    if geometry.rows.out_exact and geometry.cols.out_exact:
        return None
    ph, pw = geometry.grid
    patches = ph * pw
    scales, columns = T.alloc_buffer((patches + repeated,), ACC), T.alloc_buffer((pw,), ACC)
    for j, count in enumerate(geometry.cols.out_counts):
        simd.store(columns, j, tirx.const(1.0 / count, ACC))
    with loop(ph) as i:

        def row(_: Any, count: int) -> None:
            with loop(pw) as j:
                simd.store(scales, i * pw + j, simd.load(columns, j, 1) * tirx.const(1.0 / count, ACC))

        by_row(out_ranges(geometry.rows), i, row)
    if repeated:
        with loop(repeated) as k:
            simd.store(scales, patches + k, simd.load(scales, k % patches, 1))
    return scales


def mean_scale(geometry: Geometry, scales: Any, at: Any, lanes: int) -> Any:
    """What turns ``lanes`` sums of patches, from patch ``at`` on, into means."""
    if scales is None:
        return simd.splat(1.0 / (geometry.rows.patch * geometry.cols.patch), lanes)
    return simd.load(scales, at, lanes)


def can_stream_rows(wanted: bool, width: int, dtype: str, lanes: int) -> bool:
    """Whether rows of ``width`` pixels begin where streaming stores of registers, or parts of them, can go."""
    return wanted and simd.can_stream(dtype, min(width & -width, lanes))


def spread_planes(
    vectors: Sequence[PlaneVector], patches: Callable[[int, Any, int], Any], grad_x: Any, base: Any, stream: bool
) -> None:
    """Write whole planes of grad_x.

    Args:
        vectors: see :func:`strips.spreading_planes`.
        patches: (plane, first patch, lanes) -> their values.
        grad_x, base: the map, and where the first plane begins.
        stream: past the caches; ``base`` is a multiple of the registers then.
    """
    for plan in vectors:
        loaded = [T.bind(patches(plane, patch, plan.width)) for plane, patch in plan.loads]
        simd.write(grad_x, base + plan.pixel, simd.pick(loaded, plan.picks), stream)


def spread_row(
    geometry: Geometry, lanes: int, patches: Any, at: Any, grad_x: Any, plane: Any, i: Any, stream: bool
) -> None:
    """Write patch row ``i`` of a plane of grad_x.

    Args:
        patches, at: where the row's values are; up to ``lanes`` elements behind them are read.
        grad_x, plane: the map, and the number of the plane in it.
        stream: past the caches, see :func:`can_stream_rows`.
    """
    width = geometry.w
    plan = spreading(in_ranges(geometry.cols), lanes, width & -width if stream else None)

    def rows(first: Any, count: int) -> None:
        base = T.bind((plane * geometry.h + first) * width)

        def sink(row: int, pixel: Any, value: Any) -> None:
            simd.write(grad_x, base + (row * width + pixel), value, stream)

        spread(plan, lambda patch, width: simd.load(patches, at + patch, width), count, sink)

    by_row(in_ranges(geometry.rows), i, rows)


def pool_windows(
    weight: Any, base: Any, channels: int, kernel: tuple[int, int], lanes: int, sink: Callable[[Any, Any], None]
) -> None:
    """Sums of W over its window, for channels that follow each other: first over its columns, then over its rows.

    Args:
        weight, base: W, and where the first channel's window begins.
        channels, kernel: how many windows, and their size.
        sink: takes the first channel and the sums.
    """
    (height, width), source, at = kernel, weight, base
    if width > 1 and height > 1:
        count = channels * height
        source, at = T.alloc_buffer((count + lanes,), ACC), 0
        plan = pooling(_windows(count, width), count * width, lanes)
        pool(plan, pixel_rows(weight, base, 0, 1), lambda first, sums: simd.store(source, first, sums))
    size = height if width > 1 and height > 1 else height * width
    plan = pooling(_windows(channels, size), channels * size, lanes)
    pool(plan, pixel_rows(source, at, 0, 1), sink)


def _windows(count: int, size: int) -> list[range]:
    return [range(k * size, (k + 1) * size) for k in range(count)]


def spread_windows(
    sums: Any, at: Any, channels: int, taps: int, lanes: int, grad_w: Any, base: Any, aligned: int | None
) -> None:
    """Write each channel's sum to all taps of its window, for channels that follow each other.

    Args:
        sums, at: where the sums are; up to ``lanes`` elements behind them are read.
        channels, taps: how many windows, and their size.
        grad_w, base: grad_W, and where the first window begins in it.
        aligned: elements that ``base`` is a multiple of, to write past the caches; None: through them.
    """

    def some(first: Any, count: int) -> None:
        plan = spreading(_windows(count, taps), lanes, aligned)

        def sink(_: int, pixel: Any, value: Any) -> None:
            simd.write(grad_w, base + (first * taps + pixel), value, aligned is not None)

        spread(plan, lambda channel, width: simd.load(sums, at + first + channel, width), 1, sink)

    # A register of channels fills as many registers as there are taps.
    whole, rest = divmod(channels, lanes)
    if whole:
        with loop(whole) as k:
            some(k * lanes, lanes)
    if rest:
        some(whole * lanes, rest)


def transposed(columns: Sequence[Any]) -> list[Any]:
    """Rows of a square of as many vectors as they have lanes, by exchanging ever smaller squares."""
    rows, size = list(columns), len(columns)
    half = size // 2
    while half:
        for i in range(size):
            if not i & half:
                a, b = rows[i], rows[i + half]
                swap = [lane if not lane & half else size + lane - half for lane in range(size)]
                back = [lane + half if not lane & half else size + lane for lane in range(size)]
                rows[i], rows[i + half] = T.bind(simd.pick([a, b], swap)), T.bind(simd.pick([a, b], back))
        half //= 2
    return rows

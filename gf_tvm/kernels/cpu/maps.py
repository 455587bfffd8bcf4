"""Pooling and spreading maps, row of patches by row of patches, and the windows of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from ...core.geometry import Axis, Geometry
from ..stages import ACC
from . import emit, simd
from .strips import PlaneVector, Pooling, Run, Spreading, alignment, pooling, runs, spreading

#: A row of more vectors is written vector by vector, not row by row: its values would not stay in registers.
_ROW_IN_REGISTERS = 10


def by_row(rows: Sequence[range], i: Any, visit: Callable[[Any, int], None]) -> None:
    """``visit(first pixel row, number of rows)`` for patch row ``i``; clipped patch rows get code of their own."""
    inner = rows[len(rows) // 2]
    step = rows[1].stop - rows[0].stop if len(rows) > 1 else 0
    offset = inner.stop - step * (len(rows) // 2) - len(inner)

    def regular(k: int) -> bool:
        return len(rows[k]) == len(inner) and (not rows[k] or rows[k].start == step * k + offset)

    special = [k for k in range(len(rows)) if not regular(k)]

    if isinstance(i, int):
        visit(rows[i].start, len(rows[i]))
        return

    def rest(special: list[int]) -> None:
        if not special:
            visit(i * step + offset, len(inner))
            return
        k, *others = special
        with T.If(i == k):
            with T.Then():
                visit(rows[k].start, len(rows[k]))
            with T.Else():
                rest(others)

    if len(rows) == 1:
        visit(rows[0].start, len(rows[0]))
    else:
        rest(special)


def _each(vectors: Sequence[Any], visit: Callable[[Run, Any], None]) -> None:
    for run in runs(vectors):
        with emit.loop(run.times) as t:
            visit(run, t)


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


def out_ranges(axis: Axis) -> list[range]:
    """Output pixels of each patch."""
    return [axis.out_range(i) for i in range(axis.patches)]


def in_ranges(axis: Axis) -> list[range]:
    """Input pixels of each patch."""
    return [axis.in_range(i) for i in range(axis.patches)]


def out_axes(geometry: Geometry) -> tuple[list[range], list[range]]:
    """Output pixels of each patch, rows and columns."""
    return out_ranges(geometry.rows), out_ranges(geometry.cols)


def in_axes(geometry: Geometry) -> tuple[list[range], list[range]]:
    """Input pixels of each patch, rows and columns."""
    return in_ranges(geometry.rows), in_ranges(geometry.cols)


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
    with emit.loop(ph) as i:

        def row(_: Any, count: int) -> None:
            with emit.loop(pw) as j:
                simd.store(scales, i * pw + j, simd.load(columns, j, 1) * tirx.const(1.0 / count, ACC))

        by_row(out_ranges(geometry.rows), i, row)
    if repeated:
        with emit.loop(repeated) as k:
            simd.store(scales, patches + k, simd.load(scales, k % patches, 1))
    return scales


def mean_scale(geometry: Geometry, scales: Any, at: Any, lanes: int) -> Any:
    """What turns ``lanes`` sums of patches, from patch ``at`` on, into means."""
    if scales is None:
        return simd.splat(1.0 / (geometry.rows.patch * geometry.cols.patch), lanes)
    return simd.load(scales, at, lanes)


def can_stream_rows(wanted: bool, width: int, dtype: str, lanes: int) -> bool:
    """Whether rows of ``width`` pixels begin where streaming stores of registers, or parts of them, can go."""
    return wanted and simd.can_stream(dtype, min(alignment(width), lanes))


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
    plan = spreading(in_ranges(geometry.cols), lanes, alignment(width) if stream else None)

    def rows(first: Any, count: int) -> None:
        base = T.bind((plane * geometry.h + first) * width)

        def sink(row: int, pixel: Any, value: Any) -> None:
            simd.write(grad_x, base + (row * width + pixel), value, stream)

        spread(plan, lambda patch, width: simd.load(patches, at + patch, width), count, sink)

    by_row(in_ranges(geometry.rows), i, rows)


def to_channels_last(
    sums: Any,
    base: Any,
    stride: int,
    square: int,
    patches: int,
    target: Any,
    first: Any,
    channels: int,
    channel: Any,
) -> None:
    """Write sums, channel by channel, with the channels last.

    Args:
        sums, base, stride, square: from ``base`` on ``square`` channels, a power of two, each ``stride`` elements
            behind the one before; up to ``square`` elements behind its patches may be read.
        patches: of each channel.
        target, first, channels, channel: (patches, channels), the first patch and channel in it, and its channels.
    """

    def turn(at: Any, count: int) -> None:
        columns = [T.bind(simd.load(sums, base + (c * stride + at), square)) for c in range(square)]
        for p, turned in enumerate(emit.transposed(columns)[:count]):
            simd.store(target, (first + at + p) * channels + channel, turned)

    if patches // square:
        with emit.loop(patches // square) as t:
            turn(t * square, square)
    if patches % square:
        turn(patches // square * square, patches % square)


def pool_windows(
    weight: Any,
    base: Any,
    channels: int,
    kernel: tuple[int, int],
    lanes: int,
    sink: Callable[[Any, Any], None],
    ahead: int,
) -> None:
    """Sums of W over its window, for channels that follow each other: first over its columns, then over its rows.

    Args:
        weight, base: W, and where the first channel's window begins.
        channels, kernel: how many windows, and their size.
        sink: takes the first channel and the sums.
        ahead: see :func:`pixel_rows`.
    """
    (height, width), source, at = kernel, weight, base
    if width > 1 and height > 1:
        count = channels * height
        source, at = T.alloc_buffer((count + lanes,), ACC), 0
        plan = pooling(_windows(count, width), count * width, lanes)
        pool(plan, pixel_rows(weight, base, 0, 1, ahead), lambda first, sums: simd.store(source, first, sums))
        ahead = 0
    size = height if width > 1 and height > 1 else height * width
    plan = pooling(_windows(channels, size), channels * size, lanes)
    pool(plan, pixel_rows(source, at, 0, 1, ahead), sink)


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
        # One register, as it was stored: loads that two stores have a part of wait until both are in the cache.
        loaded = T.bind(simd.load(sums, at + first, lanes))
        for plan in spreading(_windows(count, taps), lanes, aligned):
            value = simd.pick([loaded], [plan.patch + lane for lane in plan.picks])
            simd.write(grad_w, base + (first * taps + plan.pixel), value, aligned is not None)

    # A register of channels fills as many registers as there are taps.
    whole, rest = divmod(channels, lanes)
    if whole:
        with emit.loop(whole) as k:
            some(k * lanes, lanes)
    if rest:
        some(whole * lanes, rest)

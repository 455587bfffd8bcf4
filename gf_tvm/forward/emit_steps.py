"""The code of the steps of a compiled forward pass. Needs TVM; imported when a program is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from ..chains.compile import emit_functions
from ..kernels.cpu import emit, simd
from ..kernels.stages import ACC
from .maps import MapLayout
from .steps import Convolution, Each, Enter, Leave, Mean, Step, Window
from .tiling import Cut, cuts, divisors

#: Registers that are named at a time where there is no other limit.
_UNROLLED = 8


def step_function(step: Step, name: str, lanes: int) -> Any:
    """The PrimFunc of a step: takes pointers to its sources, its parameters if it has any, and its result."""
    with IRBuilder() as builder, T.prim_func(is_private=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True})
        T.func_ret(tvm.ir.PrimType("int32"))
        sizes = {f"src{k}": step.images * layout.image for k, layout in enumerate(step.srcs)}
        sizes |= {"weights": step.weights} if step.weights else {}
        sizes["dst"] = step.images * step.dst.image
        pointers = {key: T.arg(key, T.handle(ACC)) for key in sizes}
        buffers = {key: T.decl_buffer((size,), ACC, data=pointers[key]) for key, size in sizes.items()}
        _EMITTERS[type(step)](step, buffers, lanes).emit()
        T.add_to_parent(tirx.Return(tirx.IntImm("int32", 0)))
    return builder.get()


class StepCode:
    """A step whose function is being emitted: its tensors, and what all kinds of steps do alike."""

    def __init__(self, step: Any, buffers: dict[str, Any], lanes: int) -> None:
        self.step, self.buffers, self.lanes = step, buffers, lanes
        self.dst: MapLayout = step.dst
        self.src: MapLayout = step.srcs[0]

    def emit(self) -> None:
        """Emit it whole."""
        raise NotImplementedError

    @contextmanager
    def tasks(self, *extents: int) -> Iterator[list[Any]]:
        """A parallel loop over everything that these extents count."""
        total = 1
        for extent in extents:
            total *= extent
        with emit.loop(total, parallel=total > 1) as task:
            found = []
            for extent in reversed(extents):
                found.append(T.bind(task % extent) if extent > 1 else 0)
                task = T.bind(task // extent) if extent > 1 else task
            yield found[::-1]

    def finished(self, value: Any, other: Any) -> Any:
        """``value`` after everything that the step does to it. ``other()``: the same elements of its other map."""
        for kind, settings in self.step.after:
            if kind == "add":
                (factor,) = settings
                more = other()
                value = value + (more if factor == 1 else more * simd.splat(float(factor), simd.lanes_of(more)))
            elif kind == "gate":
                value = value * other()
            elif kind == "scale":
                value = value * simd.splat(float(settings[0]), simd.lanes_of(value))
            else:
                value = emit_functions.function(kind, settings, value)
            value = T.bind(value)
        return value

    def other(self, image: Any, block: Any, row: Any, column: Any) -> Callable[[], Any]:
        """The elements of the other map that belong to a pixel of the result, or to its image and channels."""

        def load() -> Any:
            layout = self.step.srcs[1]
            if layout.height == layout.width == 1:
                row_, column_ = 0, 0
            else:
                row_, column_ = row, column
            at = image * layout.image + block * layout.plane + layout.origin + row_ * layout.row
            return simd.load(self.buffers["src1"], at + column_ * layout.block, layout.block)

        return load

    def border(self, image: Any, block: Any, first: Any, rows: int) -> None:
        """Fill the border beside ``rows`` rows of the result, and above the first and below the last of all."""
        dst, lanes = self.dst, self.lanes
        if not dst.has_border:
            return

        def fill(at: Any, count: int) -> None:
            for k, width in emit.pieces(count, lanes):
                simd.store(self.buffers["dst"], at + k, simd.splat(dst.fill, width))

        base = T.bind(image * dst.image + block * dst.plane)
        if dst.left or dst.right:
            with emit.loop(rows) as r:
                start = T.bind(base + (first + (r + dst.top)) * dst.row)
                fill(start, dst.left * dst.block)
                fill(start + (dst.left + dst.width) * dst.block, dst.right * dst.block)

        def strip(at: Any, count: int) -> None:
            with emit.loop(count * dst.row // dst.block) as k:
                fill(at + k * dst.block, dst.block)

        ends = ((0, base, dst.top), (dst.height - rows, base + (dst.top + dst.height) * dst.row, dst.bottom))
        for row, at, count in ends:
            if not count:
                continue
            if isinstance(first, int):
                assert first == row == 0
                strip(at, count)
            else:
                with T.If(tirx.EQ(first, row)), T.Then():
                    strip(at, count)


class Products(StepCode):
    """A convolution by products of one pixel's input channel with registers of output channels."""

    def emit(self) -> None:
        step, tile, dst = self.step, self.step.tile, self.dst
        families = self._families()
        chunks = dst.height // tile.chunk
        if tile.by_channels:
            for family, weights in families:
                with self.tasks(family.count) as (k,), emit.loop(step.images) as image:
                    self._rows(image, family, weights, k, 0, dst.height)
            return
        with self.tasks(step.images, chunks) as (image, chunk):
            first = T.bind(chunk * tile.chunk)
            for family, weights in families:
                with emit.loop(family.count) as k:
                    self._rows(image, family, weights, k, first, tile.chunk)

    def _families(self) -> list[tuple[Cut, int]]:
        """Tiles of output channels of equal widths, and where the weights of the first begin."""
        found, at = [], 0
        for cut in cuts(self.dst.blocks, self.step.tile.vectors):
            found.append((cut, at))
            at += cut.count * cut.size * self.dst.block * self.step.depth * self.step.taps
        return found

    def _rows(self, image: Any, family: Cut, weights: int, k: Any, first: Any, rows: int) -> None:
        step, dst, vectors = self.step, self.dst, family.size
        block = T.bind(family.start + k * vectors)
        at = T.bind(weights + k * (vectors * dst.block * step.depth * step.taps))
        for v in range(vectors):
            self.border(image, block + v, first, rows)
        for r in cuts(rows, step.tile.rows):
            for c in cuts(dst.width, step.tile.columns):
                with emit.loop(r.count) as i, emit.loop(c.count) as j:
                    row = T.bind(first + (r.start + i * r.size))
                    column = c.start + j * c.size
                    self._tile(image, block, vectors, at, row, column, r.size, c.size)

    def _tile(
        self, image: Any, block: Any, vectors: int, weights: Any, row: Any, column: Any, rows: int, columns: int
    ) -> None:
        step, src, dst, lanes = self.step, self.src, self.dst, self.dst.block
        (sy, sx), (dy, dx), (ky, kx) = step.stride, step.dilation, step.kernel
        pixels = [(r, c) for r in range(rows) for c in range(columns)]
        offsets = [r * sy * src.row + c * sx * src.block for r, c in pixels]
        start = src.origin - step.before[0] * src.row - step.before[1] * src.block
        start = start + image * src.image + row * (sy * src.row) + column * (sx * src.block)
        source = T.bind(start + step.first_block(block) * src.plane)
        sums = T.alloc_buffer((len(pixels) * vectors * lanes,), ACC, scope="local")
        for p in range(len(pixels)):
            for v in range(vectors):
                bias = simd.load(self.buffers["weights"], step.bias_at + (block + v) * lanes, lanes)
                simd.store(sums, (p * vectors + v) * lanes, bias)

        def products(x: Any, w: Any, count: int, turns: int) -> None:
            def one(c: Any) -> None:
                loaded = [
                    T.bind(simd.load(self.buffers["weights"], w + (c * vectors + v) * lanes, lanes))
                    for v in range(vectors)
                ]
                for p, offset in enumerate(offsets):
                    scalar = simd.splat(simd.load(self.buffers["src0"], x + (c + offset), 1), lanes)
                    for v in range(vectors):
                        place = (p * vectors + v) * lanes
                        simd.store(sums, place, simd.load(sums, place, lanes) + scalar * loaded[v])

            emit.unrolled(count, turns, one)

        wide = vectors * lanes
        whole, rest = divmod(step.depth, src.block)
        with emit.loop(whole) as b, emit.loop(ky) as y:
            line = T.bind(source + b * src.plane + y * (dy * src.row))
            # Planes have few channels, and then a turn of the loop is a row of the kernel.
            with self._taps(kx, src.block == 1) as turn:
                for x in turn:
                    w = T.bind(weights + ((b * ky + y) * kx + x) * (src.block * wide))
                    products(T.bind(line + x * (dx * src.block)), w, src.block, step.tile.turns)
        if rest:
            with emit.loop(ky) as y, emit.loop(kx) as x:
                tap = T.bind(source + whole * src.plane + y * (dy * src.row) + x * (dx * src.block))
                w = T.bind(weights + whole * src.block * step.taps * wide + (y * kx + x) * (rest * wide))
                products(tap, w, rest, rest)
        base = T.bind(image * dst.image + block * dst.plane + dst.origin + row * dst.row + column * dst.block)
        for p, (r, c) in enumerate(pixels):
            for v in range(vectors):
                value = simd.load(sums, (p * vectors + v) * lanes, lanes)
                value = self.finished(value, self.other(image, block + v, row + r, column + c))
                at = base + v * dst.plane + (r * dst.row + c * dst.block)
                simd.store(self.buffers["dst"], at, value)

    @staticmethod
    @contextmanager
    def _taps(count: int, written_out: bool) -> Iterator[list[Any]]:
        if written_out:
            yield list(range(count))
        else:
            with emit.loop(count) as x:
                yield [x]


class Rows(StepCode):
    """What is done to each block of channels by itself, a few pixels of a row at a time."""

    columns = _UNROLLED

    @property
    def chunk(self) -> int:
        """Rows of a task."""
        few = 16384 // (self.dst.row * 4) + 1
        return max(k for k in divisors(self.dst.height) if k <= few)

    def emit(self) -> None:
        chunk = self.chunk
        with self.tasks(self.step.images, self.dst.blocks, self.dst.height // chunk) as (image, block, part):
            first = T.bind(part * chunk)
            self.border(image, block, first, chunk)
            self.prepare(image, block)
            with emit.loop(chunk) as r:
                row = T.bind(first + r)
                to = T.bind(image * self.dst.image + block * self.dst.plane + self.dst.origin + row * self.dst.row)
                for c in cuts(self.dst.width, self.columns):
                    with emit.loop(c.count) as j:
                        column = c.start + j * c.size
                        for k, value in enumerate(self.pixels(image, block, row, column, c.size)):
                            value = self.finished(value, self.other(image, block, row, column + k))
                            simd.store(self.buffers["dst"], to + (column + k) * self.dst.block, value)

    def prepare(self, image: Any, block: Any) -> None:
        """What is the same for all pixels of a block."""

    def pixels(self, image: Any, block: Any, row: Any, column: Any, count: int) -> list[Any]:
        """The values of ``count`` pixels, from this one on."""
        raise NotImplementedError

    def source(self, image: Any, block: Any, row: Any, column: Any) -> Any:
        """Where a pixel of the map that is read begins."""
        src = self.src
        return image * src.image + block * src.plane + src.origin + row * src.row + column * src.block

    def load(self, at: Any) -> Any:
        """A pixel's block of channels."""
        return T.bind(simd.load(self.buffers["src0"], at, self.src.block))


class Depthwise(Rows):
    """A convolution of every channel by itself."""

    @property
    def columns(self) -> int:  # type: ignore[override]
        return int(self.step.tile.columns)

    @property
    def chunk(self) -> int:
        return int(self.step.tile.chunk)

    def prepare(self, image: Any, block: Any) -> None:
        step, width = self.step, self.dst.block
        at = T.bind(block * (step.taps * width))
        self.taps = [T.bind(simd.load(self.buffers["weights"], at + k * width, width)) for k in range(step.taps)]
        self.bias = T.bind(simd.load(self.buffers["weights"], step.bias_at + block * width, width))

    def pixels(self, image: Any, block: Any, row: Any, column: Any, count: int) -> list[Any]:
        step, src = self.step, self.src
        (sy, sx), (dy, dx), (ky, kx) = step.stride, step.dilation, step.kernel
        at = T.bind(self.source(image, block, row * sy - step.before[0], column * sx - step.before[1]))
        sums = [self.bias] * count
        for y in range(ky):
            loaded: dict[int, Any] = {}
            for x in range(kx):
                for k in range(count):
                    place = k * sx + x * dx
                    if place not in loaded:
                        loaded[place] = self.load(at + (y * dy * src.row + place * src.block))
                    sums[k] = T.bind(sums[k] + loaded[place] * self.taps[y * kx + x])
        return sums


class Windows(Rows):
    """Pooling by windows."""

    def pixels(self, image: Any, block: Any, row: Any, column: Any, count: int) -> list[Any]:
        step, src = self.step, self.src
        (sy, sx), (ky, kx) = step.stride, step.kernel
        at = T.bind(self.source(image, block, row * sy - step.before[0], column * sx - step.before[1]))
        # In memory, which LLVM turns into registers: TVM would put the expressions into each other.
        found = T.alloc_buffer((count * src.block,), ACC, scope="local")
        for k in range(count):
            for y in range(ky):
                for x in range(kx):
                    pixel = self.load(at + (y * src.row + (k * sx + x) * src.block))
                    so_far = simd.load(found, k * src.block, src.block)
                    simd.store(found, k * src.block, self._joined(so_far, pixel) if x or y else pixel)
        values = [simd.load(found, k * src.block, src.block) for k in range(count)]
        return values if step.kind == "max" else [v * simd.splat(1.0 / (ky * kx), src.block) for v in values]

    def _joined(self, a: Any, b: Any) -> Any:
        if self.step.kind == "mean":
            return a + b
        # NaN wins, as in PyTorch.
        return tirx.Select(tirx.GT(b, a), b, tirx.Select(tirx.NE(b, b), b, a))


class Means(Rows):
    """The mean over whole maps: every block of channels is one pixel."""

    def pixels(self, image: Any, block: Any, row: Any, column: Any, count: int) -> list[Any]:
        src, lanes = self.src, self.src.block
        height, width = src.height, src.width
        sums = T.alloc_buffer((_UNROLLED * lanes,), ACC, scope="local")
        for k in range(_UNROLLED):
            simd.store(sums, k * lanes, simd.splat(0.0, lanes))
        with emit.loop(height) as y:
            at = T.bind(self.source(image, block, y, 0))
            for cut in cuts(width, _UNROLLED):
                with emit.loop(cut.count) as j:
                    for k in range(cut.size):
                        pixel = self.load(at + (cut.start + j * cut.size + k) * src.block)
                        simd.store(sums, k * lanes, simd.load(sums, k * lanes, lanes) + pixel)
        total = simd.load(sums, 0, lanes)
        for k in range(1, _UNROLLED):
            total = total + simd.load(sums, k * lanes, lanes)
        return [T.bind(total * simd.splat(1.0 / (height * width), lanes))]


class Elements(Rows):
    """Nothing but what is done to each element."""

    def pixels(self, image: Any, block: Any, row: Any, column: Any, count: int) -> list[Any]:
        at = T.bind(self.source(image, block, row, column))
        return [self.load(at + k * self.src.block) for k in range(count)]


class Entering(StepCode):
    """Planes into blocks, or into planes with a border."""

    def emit(self) -> None:
        src, dst = self.src, self.dst
        with self.tasks(self.step.images, dst.blocks) as (image, block):
            self.border(image, block, 0, dst.height)
            base = T.bind(image * dst.image + block * dst.plane + dst.origin)
            if dst.block == 1:
                with emit.loop(dst.height) as row:
                    at, to = T.bind(image * src.image + block * src.plane + row * src.row), T.bind(base + row * dst.row)

                    def some(k: Any, width: int, at: Any = at, to: Any = to) -> None:
                        simd.store(self.buffers["dst"], to + k, simd.load(self.buffers["src0"], at + k, width))

                    emit.each_vector(dst.width, self.lanes, some)
                return
            with emit.loop(dst.height) as row, emit.loop(dst.width) as column:
                to = T.bind(base + row * dst.row + column * dst.block)
                for lane in range(dst.block):
                    channel = tirx.min(block * dst.block + lane, src.channels - 1) if src.channels % dst.block else (
                        block * dst.block + lane
                    )
                    at = image * src.image + channel * src.plane + row * src.row + column
                    simd.store(self.buffers["dst"], to + lane, simd.load(self.buffers["src0"], at, 1))


class Leaving(StepCode):
    """Blocks into planes."""

    def emit(self) -> None:
        src, dst = self.src, self.dst
        whole, rest = divmod(src.channels, src.block)
        for blocks, before, channels in ((whole, 0, src.block), (min(rest, 1), whole, rest)):
            if not blocks:
                continue
            with self.tasks(self.step.images, blocks) as (image, k):
                start = T.bind(image * src.image + (before + k) * src.plane + src.origin)
                to = T.bind(image * dst.image + (before + k) * (src.block * dst.plane))
                with emit.loop(channels) as lane, emit.loop(src.height) as row, emit.loop(src.width) as column:
                    value = simd.load(self.buffers["src0"], start + row * src.row + column * src.block + lane, 1)
                    simd.store(self.buffers["dst"], to + lane * dst.plane + row * dst.row + column, value)


def _convolution(step: Convolution, buffers: dict[str, Any], lanes: int) -> StepCode:
    return (Depthwise if step.depthwise else Products)(step, buffers, lanes)


_EMITTERS: dict[type, Callable[[Any, dict[str, Any], int], StepCode]] = {
    Convolution: _convolution,
    Window: Windows,
    Mean: Means,
    Each: Elements,
    Enter: Entering,
    Leave: Leaving,
}

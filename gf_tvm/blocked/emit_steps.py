"""The code of the steps of a compiled forward pass. Needs TVM; imported when a program is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from ..kernels.cpu import emit, simd
from ..kernels.stages import ACC
from .maps import MapLayout
from .steps import Convolution, Each, Enter, Leave, Mean, Step, Window, Winograd
from .tiling import Cut, cuts, divisors
from .winograd import Matrix, matrices

#: Registers that are named at a time where there is no other limit.
_UNROLLED = 8


#: (kind, settings, z) -> f(z) for element-wise functions among what comes after a step.
Functions = Callable[[str, tuple[Any, ...], Any], Any]


def step_function(step: Step, name: str, lanes: int, functions: Functions) -> Any:
    """The PrimFunc of a step: takes pointers to its sources, its parameters if it has any, and its result."""
    sizes = {f"src{k}": step.images * layout.image for k, layout in enumerate(step.srcs)}
    sizes |= {"weights": step.weights} if step.weights else {}
    sizes["dst"] = step.images * step.dst.image
    return private_function(name, sizes, lambda buffers: _EMITTERS[type(step)](step, buffers, lanes, functions).emit())


def private_function(name: str, sizes: dict[str, int], emit_body: Callable[[dict[str, Any]], None]) -> Any:
    """A PrimFunc that takes pointers to buffers of these sizes, by name, which ``emit_body`` gets."""
    with IRBuilder() as builder, T.prim_func(is_private=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True})
        # Where a parallel loop fails TVM's code returns a number. At the end there is no return of our own: memory is
        # given back after the last statement, and would not be.
        T.func_ret(tvm.ir.PrimType("int32"))
        pointers = {key: T.arg(key, T.handle(ACC)) for key in sizes}
        buffers = {key: T.decl_buffer((size,), ACC, data=pointers[key]) for key, size in sizes.items()}
        with simd.streaming(ACC, shared=True):
            emit_body(buffers)
    return builder.get()


class StepCode:
    """A step whose function is being emitted: its tensors, and what all kinds of steps do alike."""

    def __init__(self, step: Any, buffers: dict[str, Any], lanes: int, functions: Functions) -> None:
        self.step, self.buffers, self.lanes, self.functions = step, buffers, lanes, functions
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
        with emit.loop(total, parallel=self.step.shared and total > 1) as task:
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
                value = self.functions(kind, settings, value)
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


class Sums:
    """Sums of products in registers: of some pixels, each of some registers of output channels.

    Args:
        start: by register, what they begin with.
    """

    def __init__(self, pixels: int, vectors: int, lanes: int, start: Sequence[Any]) -> None:
        self.vectors, self.lanes = vectors, lanes
        self._sums = T.alloc_buffer((pixels * vectors * lanes,), ACC, scope="local")
        for p in range(pixels):
            for v in range(vectors):
                simd.store(self._sums, self._at(p, v), start[v])

    def _at(self, pixel: int, v: int) -> int:
        return (pixel * self.vectors + v) * self.lanes

    def __getitem__(self, which: tuple[int, int]) -> Any:
        return simd.load(self._sums, self._at(*which), self.lanes)

    def add(
        self, pixels: Any, weights: Any, offsets: Sequence[int], at: Any, first: Any, channels: int, turns: int
    ) -> None:
        """Add the products of ``channels`` neighbouring input channels, ``turns`` in one turn of the loop.

        Args:
            offsets: of the pixels, from ``at`` in the buffer ``pixels``. first: where the weights begin.
        """
        lanes, wide = self.lanes, self.vectors * self.lanes

        def one(c: Any) -> None:
            loaded = [T.bind(simd.load(weights, first + c * wide + v * lanes, lanes)) for v in range(self.vectors)]
            for p, offset in enumerate(offsets):
                scalar = simd.splat(simd.load(pixels, at + (c + offset), 1), lanes)
                for v in range(self.vectors):
                    simd.store(self._sums, self._at(p, v), self[p, v] + scalar * loaded[v])

        emit.unrolled(channels, turns, one)


class Products(StepCode):
    """A convolution by products of one pixel's input channel with registers of output channels."""

    def emit(self) -> None:
        step, tile, dst = self.step, self.step.tile, self.dst
        families = self._families()
        chunks = dst.height // tile.chunk
        self.weights = self.buffers["weights"]
        if tile.by_channels:
            for family, weights in families:
                with self.tasks(family.count) as (k,):
                    at = self.packed(family, weights, k)
                    with emit.loop(step.images) as image:
                        self._rows(image, family, at, k, 0, dst.height)
            return
        with self.tasks(step.images, chunks) as (image, chunk):
            first = T.bind(chunk * tile.chunk)
            for family, weights in families:
                with emit.loop(family.count) as k:
                    self._rows(image, family, self.packed(family, weights, k), k, first, tile.chunk)

    def packed(self, family: Cut, weights: int, k: Any) -> Any:
        """Where the weights of a family's tile ``k`` begin, if those of its first are at ``weights``."""
        return T.bind(weights + k * (family.size * self.dst.block * self.step.depth * self.step.taps))

    def _families(self) -> list[tuple[Cut, int]]:
        """Tiles of output channels of equal widths, and where the weights of the first begin."""
        found, at = [], 0
        for cut in cuts(self.dst.blocks, self.step.tile.vectors):
            found.append((cut, at))
            at += cut.count * cut.size * self.dst.block * self.step.depth * self.step.taps
        return found

    def _rows(self, image: Any, family: Cut, at: Any, k: Any, first: Any, rows: int) -> None:
        step, dst, vectors = self.step, self.dst, family.size
        block = T.bind(family.start + k * vectors)
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
        start = src.origin - step.before[0] * src.row - step.before[1] * src.block
        start = start + image * src.image + row * (sy * src.row) + column * (sx * src.block)
        source = T.bind(start + step.first_block(block) * src.plane)
        offsets = [r * sy * src.row + c * sx * src.block for r, c in pixels]
        sums = Sums(len(pixels), vectors, lanes, self.bias(block, vectors))
        wide = vectors * lanes
        whole, rest = divmod(step.depth, src.block)
        given = (self.buffers["src0"], self.weights, offsets)
        # Pixels of one block follow each other, so a row of the kernel is as one pixel of more channels.
        across, channels = (1, kx * src.block) if src.blocks == 1 and dx == 1 and not rest else (kx, src.block)
        with emit.loop(whole) as b, emit.loop(ky) as y, emit.loop(across) as x:
            tap = T.bind(source + b * src.plane + y * (dy * src.row) + x * (dx * src.block))
            w = T.bind(weights + ((b * ky + y) * across + x) * (channels * wide))
            sums.add(*given, tap, w, channels, step.tile.turns)
        if rest:
            with emit.loop(ky) as y, emit.loop(kx) as x:
                tap = T.bind(source + whole * src.plane + y * (dy * src.row) + x * (dx * src.block))
                w = T.bind(weights + whole * src.block * step.taps * wide + (y * kx + x) * (rest * wide))
                sums.add(*given, tap, w, rest, rest)
        base = T.bind(image * dst.image + block * dst.plane + dst.origin + row * dst.row + column * dst.block)
        for p, (r, c) in enumerate(pixels):
            for v in range(vectors):
                value = self.finished(sums[p, v], self.other(image, block + v, row + r, column + c))
                simd.store(self.buffers["dst"], base + v * dst.plane + (r * dst.row + c * dst.block), value)

    def bias(self, block: Any, vectors: int) -> list[Any]:
        """The bias of some blocks of output channels."""
        lanes = self.dst.block
        at = [self.step.bias_at + (block + v) * lanes for v in range(vectors)]
        return [T.bind(simd.load(self.buffers["weights"], a, lanes)) for a in at]


class ByWinograd(Products):
    """A convolution by Winograd's algorithm: tiles are transformed, multiplied and transformed back, a block of rows of
    tiles at a time."""

    def emit(self) -> None:
        step = self.step
        self.tiles_down, self.tiles_across = step.grid
        self.rows = step.tile.rows
        self.tiles = self.rows * self.tiles_across
        self.a, _, self.b = matrices(step.outputs)
        sizes = [step.taps * layout.blocks * self.tiles * layout.block for layout in (self.src, self.dst)]
        self.read, self.made = (T.alloc_buffer((size,), ACC) for size in sizes)
        with emit.loop(step.images * self.tiles_down // self.rows) as part:
            first = T.bind(part * self.rows)
            with self.tasks(self.rows, self.src.blocks) as (r, block), emit.loop(self.tiles_across) as t:
                self._transform(first, r, block, t)
            weights = 0
            for family in cuts(self.dst.blocks, step.tile.vectors):
                self._multiply(family, weights)
                weights += family.count * family.size * self.dst.block * step.depth
            with self.tasks(self.rows, self.dst.blocks) as (r, block):
                self._finish(first, r, block)

    def _transform(self, first: Any, r: Any, block: Any, t: Any) -> None:
        """B^T d B of a tile."""
        src, m, n = self.src, self.step.outputs, self.step.points
        image, row = T.bind((first + r) // self.tiles_down), T.bind((first + r) % self.tiles_down)
        at = image * src.image + block * src.plane + src.origin + row * (m * src.row) + t * (m * src.block)
        at = T.bind(at - self.step.before[0] * src.row - self.step.before[1] * src.block)
        half = _Square(n, n, src.block)
        for x in range(n):
            column = [simd.load(self.buffers["src0"], at + y * src.row + x * src.block, src.block) for y in range(n)]
            half.put_column(x, combined(self.b, column))
        for y in range(n):
            for x, value in enumerate(combined(self.b, half.row(y))):
                simd.store(self.read, self._place(src, y * n + x, block, r * self.tiles_across + t), value)

    def _place(self, layout: MapLayout, product: int, block: Any, tile: Any) -> Any:
        return ((product * layout.blocks + block) * self.tiles + tile) * layout.block

    def _multiply(self, family: Cut, weights: int) -> None:
        """The products of a family of output channels, which lie from ``weights`` on for each of a tile's products."""
        step, src, dst, vectors = self.step, self.src, self.dst, family.size
        wide = vectors * dst.block
        zeros = [simd.splat(0.0, dst.block)] * vectors
        whole, rest = divmod(step.depth, src.block)
        with self.tasks(step.taps, family.count) as (product, k):
            w = T.bind(product * (step.bias_at // step.taps) + weights + k * (wide * step.depth))
            for cut in cuts(self.tiles, step.tile.columns):
                with emit.loop(cut.count) as j:
                    tile = T.bind(cut.start + j * cut.size)
                    offsets = [q * src.block for q in range(cut.size)]
                    sums = Sums(cut.size, vectors, dst.block, zeros)
                    source = T.bind(self._place(src, product, 0, tile))
                    plane = self.tiles * src.block
                    given = (self.read, self.buffers["weights"], offsets)
                    with emit.loop(whole) as b:
                        at, first = T.bind(source + b * plane), T.bind(w + b * (src.block * wide))
                        sums.add(*given, at, first, src.block, step.tile.turns)
                    if rest:
                        sums.add(*given, source + whole * plane, w + whole * src.block * wide, rest, rest)
                    for v in range(vectors):
                        to = T.bind(self._place(dst, product, family.start + k * vectors + v, tile))
                        for q in range(cut.size):
                            simd.store(self.made, to + q * dst.block, sums[q, v])

    def _finish(self, first: Any, r: Any, block: Any) -> None:
        """A^T M A of a row of tiles, and all that comes after it."""
        dst, m = self.dst, self.step.outputs
        image, down = T.bind((first + r) // self.tiles_down), T.bind((first + r) % self.tiles_down)
        row = T.bind(down * m)
        if dst.has_border:
            self._tile_border(image, block, row)
        (bias,) = self.bias(block, 1)
        across, over = divmod(dst.width, m)
        for tiles, start, width in ((across, 0, m), (min(over, 1), across, over)):
            if tiles:
                with emit.loop(tiles) as t:
                    self._tile_back(image, block, r, row, start + t, width, bias)

    def _tile_back(self, image: Any, block: Any, r: Any, row: Any, t: Any, width: int, bias: Any) -> None:
        dst, m, n = self.dst, self.step.outputs, self.step.points
        half = _Square(m, n, dst.block)
        tile = T.bind(r * self.tiles_across + t)
        for x in range(n):
            column = [simd.load(self.made, self._place(dst, y * n + x, block, tile), dst.block) for y in range(n)]
            half.put_column(x, combined(self.a, column))
        column_ = T.bind(t * m)
        to = T.bind(image * dst.image + block * dst.plane + dst.origin + row * dst.row + column_ * dst.block)

        def line(y: int) -> None:
            for x, value in enumerate(combined(self.a, half.row(y))[:width]):
                done = self.finished(T.bind(value + bias), self.other(image, block, row + y, column_ + x))
                simd.store(self.buffers["dst"], to + y * dst.row + x * dst.block, done)

        left = dst.height % m
        for y in range(m):
            if left and y >= left:
                with T.If(tirx.LT(row + y, dst.height)), T.Then():
                    line(y)
            else:
                line(y)

    def _tile_border(self, image: Any, block: Any, row: Any) -> None:
        """The border beside a row of tiles."""
        m, height = self.step.outputs, self.dst.height
        left = height % m
        if height <= m:
            self.border(image, block, 0, height)
        elif not left:
            self.border(image, block, row, m)
        else:
            with T.If(tirx.LT(row, height - left)):
                with T.Then():
                    self.border(image, block, row, m)
                with T.Else():
                    self.border(image, block, row, left)


class _Square:
    """Vectors in memory that LLVM turns into registers, or keeps in the first-level cache."""

    def __init__(self, rows: int, columns: int, lanes: int) -> None:
        self.rows, self.columns, self.lanes = rows, columns, lanes
        self._values = T.alloc_buffer((rows * columns * lanes,), ACC, scope="local")

    def put_column(self, x: int, values: Sequence[Any]) -> None:
        """Store a column."""
        for y, value in enumerate(values):
            simd.store(self._values, (y * self.columns + x) * self.lanes, value)

    def row(self, y: int) -> list[Any]:
        """A row."""
        at = [(y * self.columns + x) * self.lanes for x in range(self.columns)]
        return [simd.load(self._values, a, self.lanes) for a in at]


def combined(matrix: Matrix, values: Sequence[Any]) -> list[Any]:
    """The products of a matrix with vectors. Rows that differ in signs of even or odd columns share their sums."""
    values = [T.bind(value) for value in values]
    lanes = simd.lanes_of(values[0])
    known: dict[tuple[float, ...], Any] = {}

    def total(row: Sequence[float]) -> Any:
        """The sum of these multiples, or None."""
        key = tuple(row)
        if key not in known:
            found = None
            for factor, value in zip(row, values, strict=True):
                if factor == 0:
                    continue
                if found is None:
                    found = value if factor == 1 else value * simd.splat(factor, lanes)
                elif factor == 1:
                    found = found + value
                elif factor == -1:
                    found = found - value
                else:
                    found = found + value * simd.splat(factor, lanes)
            known[key] = None if found is None else T.bind(found)
        return known[key]

    found = []
    for row in matrix:
        even = tuple(f if k % 2 == 0 else 0.0 for k, f in enumerate(row))
        odd = tuple(f if k % 2 else 0.0 for k, f in enumerate(row))
        opposite = tuple(-f for f in odd)
        a = total(even)
        if opposite in known and known[opposite] is not None:
            b = known[opposite]
            found.append(T.bind(a - b) if a is not None else T.bind(simd.splat(0.0, lanes) - b))
            continue
        b = total(odd)
        if b is None:
            found.append(a)
        else:
            found.append(b if a is None else T.bind(a + b))
    return found


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
        # NaN wins, as in PyTorch: its sums are NaN. TVM takes it that b != b never holds.
        return tirx.Select(tirx.GT(b, a), b, tirx.Select(tirx.GE(a, b), a, a + b))


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
    """Planes into blocks."""

    def emit(self) -> None:
        src, dst, side = self.src, self.dst, self.dst.block
        with self.tasks(self.step.images, dst.blocks) as (image, block):
            self.border(image, block, 0, dst.height)
            base = T.bind(image * dst.image + block * dst.plane + dst.origin)
            planes = [T.bind(image * src.image + self._channel(block * side + k) * src.plane) for k in range(side)]
            if side == self.lanes and dst.height * dst.width >= side:
                self._by_squares(planes, base)
                return
            with emit.loop(dst.height) as row, emit.loop(dst.width) as column:
                to = T.bind(base + row * dst.row + column * side)
                for lane, plane in enumerate(planes):
                    value = simd.load(self.buffers["src0"], plane + row * src.row + column, 1)
                    simd.store(self.buffers["dst"], to + lane, value)

    def _by_squares(self, planes: Sequence[Any], base: Any) -> None:
        """Turning as many pixels as a block has channels in registers."""
        dst, side = self.dst, self.dst.block

        def square(first: Any) -> None:
            rows = [T.bind(simd.load(self.buffers["src0"], plane + first, side)) for plane in planes]
            for k, value in enumerate(emit.transposed(rows)):
                pixel = first + k
                at = pixel // dst.width * dst.row + pixel % dst.width * side if dst.has_border else pixel * side
                simd.store(self.buffers["dst"], base + at, value)

        _squares(dst.height * dst.width, side, square)

    def _channel(self, channel: Any) -> Any:
        """A channel; what fills up the last block is as the last one."""
        return tirx.min(channel, self.src.channels - 1) if self.src.channels % self.dst.block else channel


class Leaving(StepCode):
    """Blocks into planes."""

    def _by_squares(self) -> None:
        """Turning as many pixels as a block has channels in registers, where rows follow each other."""
        src, dst, side = self.src, self.dst, self.src.block
        with self.tasks(self.step.images, src.blocks) as (image, block):
            start = T.bind(image * src.image + block * src.plane)
            to = T.bind(image * dst.image + block * (side * dst.plane))

            def square(first: Any) -> None:
                pixels = [
                    T.bind(simd.load(self.buffers["src0"], start + (first + k) * side, side)) for k in range(side)
                ]
                for lane, value in enumerate(emit.transposed(pixels)):
                    simd.store(self.buffers["dst"], to + lane * dst.plane + first, value)

            _squares(src.height * src.width, side, square)

    def emit(self) -> None:
        src, dst = self.src, self.dst
        whole, rest = divmod(src.channels, src.block)
        if not rest and not src.has_border and src.plane >= src.block**2:
            self._by_squares()
            return
        for blocks, before, channels in ((whole, 0, src.block), (min(rest, 1), whole, rest)):
            if not blocks:
                continue
            with self.tasks(self.step.images, blocks) as (image, k):
                start = T.bind(image * src.image + (before + k) * src.plane + src.origin)
                to = T.bind(image * dst.image + (before + k) * (src.block * dst.plane))
                with emit.loop(channels) as lane, emit.loop(src.height) as row, emit.loop(src.width) as column:
                    value = simd.load(self.buffers["src0"], start + row * src.row + column * src.block + lane, 1)
                    simd.store(self.buffers["dst"], to + lane * dst.plane + row * dst.row + column, value)


def _squares(pixels: int, side: int, square: Callable[[Any], None]) -> None:
    """``square(first)`` for groups of ``side`` pixels that cover all: the last one overlaps the one before."""
    with emit.loop(pixels // side) as k:
        square(T.bind(k * side))
    if pixels % side:
        square(tirx.IntImm("int32", pixels - side))


def _convolution(step: Convolution, buffers: dict[str, Any], lanes: int, functions: Functions) -> StepCode:
    return (Depthwise if step.depthwise else Products)(step, buffers, lanes, functions)


_EMITTERS: dict[type, Callable[[Any, dict[str, Any], int, Functions], StepCode]] = {
    Convolution: _convolution,
    Winograd: ByWinograd,
    Window: Windows,
    Mean: Means,
    Each: Elements,
    Enter: Entering,
    Leave: Leaving,
}

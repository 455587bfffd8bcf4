"""The backward pass of dense and grouped convolutions as one sweep over the batch.

A *block* is some patch rows of one image, or all of those of several images, so that a strip of a large map and small
maps together are the same thing. For every block, while its data are in the caches: grad_y is pooled into panels of g~,
grad_x~ is computed for some channels at a time and spread over grad_x at once, and the block's part of grad_W is added
to sums that each *part* of the batch keeps for itself. A last small loop adds the parts up. Nothing of the size of a
map is kept: a part needs the panels of one block and one matrix of weight sums.

Written in TVM's IR, not as TE stages: the loads, picks and stores of whole registers are the point of it, and TE has no
words for them. :mod:`gf_tvm.kernels.definitions` says the same in TE, as plainly as possible.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from ...core.geometry import Geometry, ceil_div, pad
from ...core.workload import Workload
from ..stages import ACC
from . import emit, maps, simd
from .accumulators import Accumulators
from .prefetch import Ahead, PrefetchRange
from .strips import alignment, planes_together, power_of_two, spreading_planes

#: Maps of at most that many rows of patches are pooled without a loop over them.
UNROLLED_ROWS = 8
#: Planes are spread as one row of pixels where that takes no more vectors than this.
UNROLLED_VECTORS = 64
#: While weights are summed, those that many elements further on are asked for: hardware that has to notice that they
#: are read straight on brings them in later.
_WEIGHTS_AHEAD = 1024
#: Threads that share a sweep at most.
MOST_PARTS = 32


@dataclass(frozen=True)
class Tiles:
    """Sizes of a sweep, in elements; those along vectors are multiples of the register's lanes.

    Attributes:
        rows: patch rows in a block: a divisor of ph, or ph times a divisor of n.
        m: patches in a tile of grad_x~ (its vector axis); panels of g~ are as wide.
        ci: input channels in that tile.
        co: output channels in a tile of grad_W.
        cv: input channels in that tile (its vector axis).
        together: input channels whose products with one piece of g~'s panel follow each other; a multiple of ``ci``.
        depth: output channels in such a piece, at most: it should fit into L1.
        stream: grad_x is written past the caches, where its rows are aligned well enough.
        near: while a channel is pooled, the one that many channels further on is prefetched; 0: none is.
        ahead: the next block is fetched and pooled during a block's products, a cache line every so many cycles at
            least, see :class:`.prefetch.Ahead`; 0: it is not.
        by_channels: threads share channels, see :class:`ByChannels`, not blocks; then there is one block.
    """

    rows: int
    m: int
    ci: int
    co: int
    cv: int
    together: int = 64
    depth: int = 128
    stream: bool = False
    near: int = 0
    ahead: int = 0
    by_channels: bool = False


class Sweep:
    """By patches: every thread takes a part of the batch through all products."""

    def __init__(self, workload: Workload, tiles: Tiles, lanes: int) -> None:
        self.workload = workload
        self.geometry: Geometry = workload.geometry
        self.dtype, self.lanes = workload.dtype, lanes
        self.tiles = replace(tiles, ci=min(tiles.ci, self.geometry.ci_group), co=min(tiles.co, self.geometry.co_group))
        self.needs_x, self.needs_w, self.needs_b = workload.gives_x, workload.gives_w, workload.pools_grad
        ph, pw = self.geometry.grid
        self.patches = tiles.rows * pw
        self.padded = pad(self.patches, lanes)
        # (patches, first, number) of the tiles of a block: those of full width, and one for the rest.
        self.columns = split(self.padded, tiles.m)
        self.blocks, rest = divmod(self.geometry.n * ph, tiles.rows)
        assert not rest, f"{tiles.rows} rows do not divide {self.geometry.n * ph}"
        assert tiles.rows % ph == 0 or ph % tiles.rows == 0, f"{tiles.rows} rows are no part or multiple of {ph}"
        self.together = min(tiles.together // self.tiles.ci * self.tiles.ci or self.tiles.ci, self.geometry.ci_group)
        # Tiles of grad_W are as wide as the group has channels, where that is less than a tile.
        cig = self.geometry.ci_group
        self.wide = min(tiles.cv, power_of_two(cig, up=True))
        self.wide_lanes = min(lanes, self.wide)
        self.wide_tiles = ceil_div(cig, self.wide)
        self.ahead: Ahead | None = None
        self.panel_at: Any = 0

    def emit(self, tensors: dict[str, Any] | None = None) -> None:
        """Emit it whole.

        ``tensors``: flat, as :func:`emit.arguments` calls them, inside of :func:`simd.streaming`; None: the function's
        parameters.
        """
        self.tensors = emit.arguments(self.workload) if tensors is None else tensors
        geometry, lanes = self.geometry, self.lanes
        # Room for as many as there can be; memory that no part uses is never touched, so it is only addresses.
        most = min(self.blocks, MOST_PARTS)
        if self.needs_b:
            self.bias_parts = T.alloc_buffer((most * geometry.co * lanes,), ACC)
        if self.needs_w:
            self.weight_sums = geometry.co * self.wide_tiles * self.wide
            self.weight_parts = T.alloc_buffer((most * self.weight_sums,), ACC)
        # As many parts of the batch as there are threads to take them.
        self.parts = T.bind(tirx.min(emit.threads(), most))
        if self.needs_x:
            self._sum_taps()
        self.scales = maps.patch_scales(geometry, self.padded)
        self.stream = self.tiles.stream
        with simd.streaming(self.dtype, self.stream and tensors is None):
            self._sweep()
            self._add_up()

    # --- before the sweep ------------------------------------------------------------------------------------------

    def _sum_taps(self) -> None:
        """W~ in panels (group, tile of ci, co, ci)."""
        geometry, lanes = self.geometry, self.lanes
        cig, cog = geometry.ci_group, geometry.co_group
        taps = geometry.kernel[0] * geometry.kernel[1]
        self.taps = T.alloc_buffer((geometry.co * cig,), ACC)
        with emit.loop(geometry.co, parallel=geometry.co * cig * taps >= emit.PARALLEL_WORK) as o:
            line = T.alloc_buffer((cig + lanes,), ACC)
            self._pack_taps(o * (cig * taps), cig, line, o // cog * (cog * cig), o % cog, _WEIGHTS_AHEAD)

    def _pack_taps(self, base: Any, channels: int, line: Any, panels: Any, o: Any, ahead: int) -> None:
        """One output channel's part of panels of W~ (tile of ci, co, ci) that begin at ``panels``.

        ``base`` is where its first window begins in W, ``line`` room for its sums, ``o`` its number in the group,
        ``ahead`` how many elements further on W is prefetched.
        """
        geometry = self.geometry
        maps.pool_windows(
            *(self.tensors["weight"], base, channels, geometry.kernel, self.lanes),
            lambda channel, sums: simd.store(line, channel, sums),
            ahead,
        )
        for rows, first, count in split(channels, self.tiles.ci):
            with emit.loop(count) as t:
                start = first + t * rows
                at = panels + start * geometry.co_group + o * rows
                emit.copy(self.taps, at, line, start, rows, self.lanes)

    # --- the sweep -------------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        geometry, lanes = self.geometry, self.lanes
        with T.parallel(0, self.parts) as part:
            size = geometry.co * self.padded
            self.panel = T.alloc_buffer((2 * size if self.tiles.ahead else size,), ACC)
            self.line = T.alloc_buffer((self.padded + lanes,), ACC)
            if self.needs_x:
                self.tile = T.alloc_buffer((self.together * self.padded + lanes,), ACC)
            if self.needs_w:
                self.panel_x = T.alloc_buffer((self.patches * self.wide,), ACC)
            if self.tiles.ahead:
                self.ahead = self._ahead()
                self.pooled = T.alloc_buffer((1,), "int32", scope="local")
                T.buffer_store(self.pooled, tirx.IntImm("int32", 0), [0])
            if self.needs_b:
                with emit.loop(geometry.co) as o:
                    simd.store(self.bias_parts, (part * geometry.co + o) * lanes, simd.splat(0.0, lanes))
            first, end = part * self.blocks // self.parts, (part + 1) * self.blocks // self.parts
            with T.serial(first, end) as block:
                if self.ahead is None:
                    self._pool(part, block, 0, geometry.co)
                else:
                    self.panel_at = T.bind((block - first) % 2 * size)
                    self._pool(part, block, T.bind(tirx.BufferLoad(self.pooled, [0])), geometry.co)
                    T.buffer_store(self.pooled, tirx.IntImm("int32", 0), [0])
                    self.ahead.begin(self._saved_start(block), self._grad_start(block + 1), block + 1 == end)
                if self.needs_x:
                    self._input_grad(part, block)
                if self.needs_w:
                    self._weight_grad(part, block, block == first)
            if self.stream:
                simd.fence()

    def _ahead(self) -> Ahead:
        """Fetches grad_y of the next block and, before it, x~ of this one."""
        geometry, tiles, rows, ph = self.geometry, self.tiles, self.tiles.rows, self.geometry.grid[0]
        cig, cog = geometry.ci_group, geometry.co_group
        steps, sums = [], []
        if self.needs_x:
            tall = sum(count * len(_sizes(size, tiles.ci)) for size, _, count in split(cig, self.together))
            steps.append(geometry.groups * len(_sizes(self.padded, tiles.m)) * tall * cog)
            sums.append(tiles.ci * tiles.m)
        if self.needs_w:
            steps.append(geometry.groups * self.wide_tiles * len(_sizes(cog, tiles.co)) * self.patches)
            sums.append(tiles.co * self.wide)
        # Two multiply-adds of whole registers in a cycle.
        cycles = sum(count * size for count, size in zip(steps, sums, strict=True)) / self.lanes / 2 / sum(steps)
        height, width = geometry.y_shape[2:]
        plane, item = height * width, simd.item_bytes(self.dtype)
        images = max(1, rows // ph)
        size = plane if rows % ph == 0 else rows * geometry.rows.patch * width
        grad_y = PrefetchRange(self.tensors["grad_y"], geometry.co, images, size, plane, geometry.co * plane, item)
        saved = None
        if self.needs_x and self.needs_w:
            size = self.patches * geometry.ci
            saved = PrefetchRange(self.tensors["saved"], 1, 1, size, size, size, simd.item_bytes(ACC))
        return Ahead(sum(steps), cycles, tiles.ahead, saved, grad_y)

    def _grad_start(self, block: Any) -> Any:
        """Where in grad_y that of ``block`` begins."""
        geometry, rows, ph = self.geometry, self.tiles.rows, self.geometry.grid[0]
        height, width = geometry.y_shape[2:]
        image, strip = block * rows // ph, block * rows % ph
        first = strip * geometry.rows.patch - geometry.rows.out_offset
        return image * (geometry.co * height * width) + first * width

    def _saved_start(self, block: Any) -> Any:
        """Where in x~ that of ``block`` begins."""
        return block * (self.patches * self.geometry.ci)

    def _pool_arrived(self, part: Any, block: Any) -> None:
        """Pool those channels of the block after ``block`` that have arrived meanwhile."""
        if self.ahead is None:
            return
        here, size = self.panel_at, self.geometry.co * self.padded
        start = T.bind(tirx.BufferLoad(self.pooled, [0]))
        end = T.bind(tirx.max(start, self.ahead.arrived()))
        self.panel_at = size - here
        self._pool(part, block + 1, start, end, near=0)
        self.panel_at = here
        T.buffer_store(self.pooled, end, [0])

    def _each_row(self, block: Any, visit: Callable[[Any, Any, Any], None]) -> None:
        """``visit(image, patch row, row of the block)`` for every row of a block, with as few divisions as it takes."""
        ph, rows = self.geometry.grid[0], self.tiles.rows
        if rows % ph == 0:
            with emit.loop(rows // ph) as image:
                if ph <= UNROLLED_ROWS:
                    for i in range(ph):
                        visit(block * (rows // ph) + image, i, image * ph + i)
                else:
                    with emit.loop(ph) as i:
                        visit(block * (rows // ph) + image, i, image * ph + i)
        else:
            with emit.loop(rows) as q:
                visit(block // (ph // rows), block % (ph // rows) * rows + q, q)

    def _pool(self, part: Any, block: Any, start: Any, end: Any, near: int | None = None) -> None:
        """Channels of grad_y into panels of g~ (tile of patches, co, patches), and into sums for grad_b."""
        with T.serial(start, end) as o:
            sums = self._pool_channel(block, o, self.tiles.near if near is None else near)
            if sums is not None:
                at = (part * self.geometry.co + o) * self.lanes
                simd.store(self.bias_parts, at, simd.load(self.bias_parts, at, self.lanes) + sums)

    def _pool_channel(self, block: Any, o: Any, near: int) -> Any:
        """One output channel's part of the panels; returns the sums of its pixels, lane by lane, if they are needed."""
        geometry, lanes = self.geometry, self.lanes
        ph, pw = geometry.grid
        self._fill_line(block, o, near)
        first = T.bind((block * self.tiles.rows) % ph * pw)
        if self.needs_b:
            bias = T.alloc_buffer((lanes,), ACC, scope="local")
            simd.store(bias, 0, simd.splat(0.0, lanes))

        def pack(start: Any, width: int) -> None:
            for inner in range(0, width, lanes):
                at = start + inner
                sums = simd.load(self.line, at, lanes)
                if isinstance(at, int) and at + lanes > self.patches:
                    sums = simd.pick([sums], [k if at + k < self.patches else None for k in range(lanes)])
                sums = T.bind(sums)
                if self.needs_b:
                    simd.store(bias, 0, simd.load(bias, 0, lanes) + sums)
                means = self._means(sums, first + at)
                simd.store(self.panel, self.panel_at + start * geometry.co + o * width + inner, means)

        for width, start, count in self.columns:
            # The last vector of a block may end in lanes of no patch.
            loops = count if (start + count * width) <= self.patches else count - 1
            if loops:
                with emit.loop(loops) as t:
                    pack(start + t * width, width)
            if loops < count:
                pack(start + loops * width, width)
        return simd.load(bias, 0, lanes) if self.needs_b else None

    def _fill_line(self, block: Any, o: Any, near: int) -> None:
        """Sums over the patches of a block of one output channel, one after the other."""
        geometry = self.geometry
        height, width = geometry.y_shape[2:]
        axes, grad_y = maps.out_axes(geometry), self.tensors["grad_y"]

        def row(n: Any, i: Any, q: Any) -> None:
            at, ahead = q * geometry.grid[1], near * height * width
            maps.pool_row(axes, grad_y, n * geometry.co + o, (height, width), i, self.line, at, self.lanes, ahead)

        self._each_row(block, row)

    def _means(self, sums: Any, at: Any) -> Any:
        """Means from the sums of patches, from patch ``at`` of an image on."""
        return sums * maps.mean_scale(self.geometry, self.scales, at, simd.lanes_of(sums))

    def _input_grad(self, part: Any, block: Any) -> None:
        geometry = self.geometry
        cig, cog = geometry.ci_group, geometry.co_group
        with emit.loop(geometry.groups) as group:
            for channels, first, count in split(cig, self.together):
                with emit.loop(count) as k:
                    start = first + k * channels
                    self._input_channels(block, group, start, channels, (group * cig + start) * cog)
                    self._pool_arrived(part, block)

    def _input_channels(self, block: Any, group: Any, start: Any, channels: int, taps: Any) -> None:
        """grad_x~ of some input channels, and their pixels of grad_x. ``taps``: where their W~ (tile, co, ci) begin.

        A tile of g~'s panel that fits into L1 meets all of the channels before the next one does.
        """
        geometry, tiles, lanes = self.geometry, self.tiles, self.lanes
        cig, cog = geometry.ci_group, geometry.co_group
        steps = ceil_div(cog, ceil_div(cog, tiles.depth))
        if steps < cog:
            with emit.loop(channels * self.padded // lanes) as v:
                simd.store(self.tile, v * lanes, simd.splat(0.0, lanes))

        def tile_of(column: Any, width: int, t: Any, rows: int, k_start: Any, k_count: int) -> None:
            at = t * tiles.ci * self.padded + column
            panel = self.panel_at + column * geometry.co + (group * cog + k_start) * width
            own_taps = taps + t * (tiles.ci * cog) + k_start * rows

            def place(c: int, v: int) -> Any:
                return at + (c * self.padded + v * lanes)

            def before(c: int, v: int) -> Any:
                return simd.load(self.tile, place(c, v), lanes)

            products = Accumulators(rows, width // lanes, lanes, before if steps < cog else None)

            def scalars(k: Any, c: int) -> Any:
                return simd.load(self.taps, own_taps + k * rows + c, 1)

            def registers(k: Any, v: int) -> Any:
                return simd.load(self.panel, panel + k * width + v * lanes, lanes)

            products.add(k_count, scalars, registers, self.ahead)
            for c, v, sums in products.sums():
                simd.store(self.tile, place(c, v), sums)

        for width, first_m, times in self.columns:
            with emit.loop(times) as mt:
                for k_count, k_first, k_times in split(cog, steps):
                    with emit.loop(k_times) as kb:
                        for rows, first, count in split(channels, tiles.ci):
                            with emit.loop(count) as t:
                                column, k_start = first_m + mt * width, k_first + kb * k_count
                                tile_of(column, width, first // tiles.ci + t, rows, k_start, k_count)
        self._spread(block, group * cig + start, channels)

    def _spread(self, block: Any, first: Any, channels: int) -> None:
        """Write the pixels of ``channels`` channels of grad_x, from channel ``first`` on."""
        geometry, lanes, rows = self.geometry, self.lanes, self.tiles.rows
        (ph, pw), plane = geometry.grid, geometry.h * geometry.w
        together = planes_together(plane, lanes)
        grad_x = self.tensors["grad_x"]
        whole = all(c % together == 0 for c in (channels, self.together, geometry.ci_group)) and rows % ph == 0
        if whole and together * plane <= UNROLLED_VECTORS * lanes:
            plan = spreading_planes(*maps.in_axes(geometry), (geometry.h, geometry.w), together, lanes)
            if plan is not None and max(len(vector.loads) for vector in plan) <= 4:
                images = rows // ph
                with emit.loop(channels // together) as c, emit.loop(images) as image:
                    base = T.bind(((block * images + image) * geometry.ci + first + c * together) * plane)

                    def patches(k: int, patch: Any, width: int) -> Any:
                        at = (c * together + k) * self.padded + image * (ph * pw) + patch
                        return simd.load(self.tile, at, width)

                    maps.spread_planes(plan, patches, grad_x, base, self.stream)
                return
        stream = self.stream and maps.can_stream_rows(True, geometry.w, self.dtype, lanes)
        with emit.loop(channels) as c:

            def row(n: Any, i: Any, q: Any) -> None:
                plane, at = n * geometry.ci + first + c, c * self.padded + q * pw
                maps.spread_row(geometry, lanes, self.tile, at, grad_x, plane, i, stream)

            self._each_row(block, row)

    def _weight_grad(self, part: Any, block: Any, is_first: Any) -> None:
        geometry = self.geometry
        with emit.loop(geometry.groups) as group:
            for channels, first, count in split(geometry.ci_group, self.wide):
                with emit.loop(count) as k:
                    column = first // self.wide + k
                    self._pack_x(block, group, column, channels)
                    for rows, first_o, count_o in split(geometry.co_group, self.tiles.co):
                        with emit.loop(count_o) as t:
                            self._weight_tile(part, is_first, group, column, first_o + t * rows, rows)
                    self._pool_arrived(part, block)

    def _pack_x(self, block: Any, group: Any, column: Any, channels: int) -> None:
        """x~ of some channels, patch by patch, filled up with zeros to the tile's width."""
        geometry = self.geometry
        source = block * (self.patches * geometry.ci) + group * geometry.ci_group + column * self.wide
        with emit.loop(self.patches) as p:
            emit.copy(
                self.panel_x, p * self.wide, self.tensors["saved"], source + p * geometry.ci, channels, self.lanes
            )
            for at, width in emit.pieces(self.wide - channels, self.lanes):
                simd.store(self.panel_x, p * self.wide + channels + at, simd.splat(0.0, width))

    def _weight_tile(self, part: Any, is_first: Any, group: Any, column: Any, start: Any, channels: int) -> None:
        lanes, cog = self.wide_lanes, self.geometry.co_group
        row = part * self.weight_sums + ((group * self.wide_tiles + column) * cog + start) * self.wide
        # What the products are added to may have left the near caches since the last block.
        for at in range(0, channels * self.wide, simd.LINE // 4):
            simd.prefetch(self.weight_parts, row + at)
        products = self._weight_products(group, start, channels)

        def write(add: bool) -> None:
            for o, v, sums in products.sums():
                at = row + o * self.wide + v * lanes
                simd.store(self.weight_parts, at, simd.load(self.weight_parts, at, lanes) + sums if add else sums)

        with T.If(is_first):
            with T.Then():
                write(add=False)
            with T.Else():
                write(add=True)

    def _weight_products(self, group: Any, start: Any, channels: int) -> Accumulators:
        """A block's sums over patches of g~ of some output channels of a group times the panel of x~."""
        geometry, lanes = self.geometry, self.wide_lanes
        products = Accumulators(channels, self.wide // lanes, lanes)

        def steps(column: Any, width: int, count: int) -> None:
            panel = self.panel_at + column * geometry.co + (group * geometry.co_group + start) * width
            products.add(
                count,
                lambda k, o: simd.load(self.panel, panel + o * width + k, 1),
                lambda k, v: simd.load(self.panel_x, (column + k) * self.wide + v * lanes, lanes),
                self.ahead,
            )

        for width, first, count in self.columns:
            whole = min(count, (self.patches - first) // width)
            if whole:
                with emit.loop(whole) as t:
                    steps(first + t * width, width, width)
            if whole < count:
                steps(first + whole * width, width, self.patches - first - whole * width)
        return products

    # --- after the sweep -------------------------------------------------------------------------------------------

    def _add_up(self) -> None:
        """grad_b, and grad_W with every sum at all of its taps."""
        if not (self.needs_b or self.needs_w):
            return
        geometry, lanes = self.geometry, self.lanes
        cig, cog = geometry.ci_group, geometry.co_group
        taps = geometry.kernel[0] * geometry.kernel[1]
        work = geometry.co * (1 + taps) * (cig if self.needs_w else lanes)
        with emit.loop(geometry.co, parallel=work >= emit.PARALLEL_WORK) as o:
            if self.needs_b:
                bias = self._over_parts(self.bias_parts, geometry.co * lanes, o * lanes, lanes)
                simd.store(self.tensors["grad_b"], o, emit.total(bias))
            if self.needs_w:
                line = T.alloc_buffer((self.wide_tiles * self.wide + lanes,), ACC, scope="local")
                group, inner = o // cog, o % cog
                with emit.loop(self.wide_tiles) as column:
                    row = ((group * self.wide_tiles + column) * cog + inner) * self.wide
                    for v in range(0, self.wide, self.wide_lanes):
                        sums = self._over_parts(self.weight_parts, self.weight_sums, row + v, self.wide_lanes)
                        simd.store(line, column * self.wide + v, sums)
                aligned = alignment(cig * taps) if self.stream else None
                maps.spread_windows(line, 0, cig, taps, lanes, self.tensors["grad_w"], o * (cig * taps), aligned)
                if self.stream:
                    simd.fence()

    def _over_parts(self, buffer: Any, size: int, at: Any, lanes: int) -> Any:
        """Sum over the parts, ``size`` elements apart, of what lies at ``at``."""
        sums = T.alloc_buffer((lanes,), ACC, scope="local")
        simd.store(sums, 0, simd.load(buffer, at, lanes))
        with T.serial(1, self.parts) as part:
            simd.store(sums, 0, simd.load(sums, 0, lanes) + simd.load(buffer, part * size + at, lanes))
        return simd.load(sums, 0, lanes)


def split(size: int, piece: int) -> list[tuple[int, int, int]]:
    """(size, first, number) of the pieces that cover ``size``: those of full size, and what is left."""
    whole, rest = divmod(size, piece)
    found = [(piece, 0, whole)] if whole else []
    return [*found, (rest, whole * piece, 1)] if rest else found


def _sizes(size: int, piece: int) -> list[int]:
    """Sizes of the pieces that cover ``size``."""
    return [length for length, _, count in split(size, piece) for _ in range(count)]

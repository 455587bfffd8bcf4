"""The backward pass of dense and grouped convolutions as one sweep over the batch.

A *block* is ``rows`` consecutive patch rows, counted through the batch (patch row q = n * ph + i), so that small maps of
several images and a strip of a large map are the same thing. For every block, while its data are in the caches: grad_y
is pooled into panels of g~, grad_x~ is computed a tile of channels at a time and spread over grad_x at once, and
the block's part of grad_W is added to sums that each *part* of the batch keeps for itself. A last small loop adds the parts up.
Nothing of the size of a map is kept: a part needs the panels of one block and one matrix of weight sums.

Written in TVM's IR, not as TE stages: the loads, picks and stores of whole registers are the point of it, and TE has no
words for them. :mod:`gf_tvm.kernels.definitions` says the same in TE, as plainly as possible.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from ..geometry import Geometry, ceil_div, pad
from ..workload import Workload
from . import emit, simd
from .stages import ACC
from .strips import pooling, power_of_two, spreading
#: Threads that share a sweep at most.
MOST_PARTS = 32


@dataclass(frozen=True)
class Tiles:
    """Sizes of a sweep, in elements; those along vectors are multiples of the register's lanes.

    Attributes:
        rows: patch rows in a block; divides n * ph.
        m: patches in a tile of grad_x~ (its vector axis); panels of g~ are as wide.
        ci: input channels in that tile.
        co: output channels in a tile of grad_W.
        cv: input channels in that tile (its vector axis).
        together: input channels whose products with one piece of g~'s panel follow each other; a multiple of ``ci``.
        depth: output channels in such a piece, at most: it should fit into L1.
        stream: grad_x is written past the caches, where its rows are aligned well enough.
        ahead: the first product prefetches the next block's grad_y.
        near: while a channel is pooled, the one that many channels further on is prefetched; 0: none is.
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
    ahead: bool = False
    near: int = 0
    by_channels: bool = False


def backward(workload: Workload, tiles: Tiles, lanes: int) -> Any:
    """IRModule of ``backward``, ``backward_input`` or ``backward_weight``; not for dilated or depthwise ones."""
    with IRBuilder() as builder, T.prim_func():
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        (ByChannels if tiles.by_channels else Sweep)(workload, tiles, lanes).emit()
    return tvm.IRModule({"main": builder.get()})


class Sweep:
    """By patches: every thread takes a part of the batch through all products."""

    def __init__(self, workload: Workload, tiles: Tiles, lanes: int) -> None:
        self.workload = workload
        self.geometry: Geometry = workload.geometry
        self.dtype, self.lanes = workload.dtype, lanes
        self.tiles = replace(
            tiles, ci=min(tiles.ci, self.geometry.ci_group), co=min(tiles.co, self.geometry.co_group)
        )
        self.needs_x = workload.kernel != "backward_weight"
        self.needs_w = workload.kernel != "backward_input"
        ph, pw = self.geometry.grid
        self.patches = tiles.rows * pw
        self.padded = pad(self.patches, tiles.m)
        self.blocks = self.geometry.n * ph // tiles.rows
        self.together = min(tiles.together // self.tiles.ci * self.tiles.ci or self.tiles.ci, self.geometry.ci_group)
        # Tiles of grad_W are as wide as the group has channels, where that is less than a tile.
        cig = self.geometry.ci_group
        self.wide = min(tiles.cv, power_of_two(cig, up=True))
        self.wide_lanes = min(lanes, self.wide)
        self.wide_tiles = ceil_div(cig, self.wide)

    def emit(self) -> None:
        self.tensors = emit.arguments(self.workload)
        geometry, lanes = self.geometry, self.lanes
        # Room for as many as there can be; memory that no part uses is never touched, so it is only addresses.
        most = min(self.blocks, MOST_PARTS)
        self.bias_parts = T.alloc_buffer((most * geometry.co * lanes,), ACC)
        if self.needs_w:
            self.weight_sums = geometry.co * self.wide_tiles * self.wide
            self.weight_parts = T.alloc_buffer((most * self.weight_sums,), ACC)
        # As many parts of the batch as there are threads to take them.
        self.parts = T.bind(tirx.min(emit.threads(), most))
        if self.needs_x:
            self._sum_taps()
        self.scales = emit.patch_scales(geometry, self.padded)
        self.stream = emit.can_stream_rows(self.tiles.stream and self.needs_x, geometry.w, self.dtype, lanes)
        if self.stream:
            with simd.streaming(self.dtype):
                self._sweep()
        else:
            self._sweep()
        self._add_up()

    # --- before the sweep ------------------------------------------------------------------------------------------

    def _sum_taps(self) -> None:
        """W~ in panels (group, tile of ci, co, ci)."""
        geometry, lanes, tile = self.geometry, self.lanes, self.tiles.ci
        cig, cog = geometry.ci_group, geometry.co_group
        taps = geometry.kernel[0] * geometry.kernel[1]
        self.taps = T.alloc_buffer((geometry.co * cig,), ACC)
        plan = pooling([range(c * taps, (c + 1) * taps) for c in range(cig)], cig * taps, lanes)
        work = geometry.co * cig * taps
        with emit.loop(geometry.co, parallel=work >= emit.PARALLEL_WORK) as o:
            line = T.alloc_buffer((cig + lanes,), ACC, scope="local")

            def pixels(at: Any, width: int) -> Any:
                return simd.load(self.tensors["weight"], o * (cig * taps) + at, width)

            emit.pool(plan, pixels, lambda patch, _, sums: simd.store(line, patch, sums))
            group, inner = o // cog, o % cog
            for rows, first, count in split(cig, tile):
                with emit.loop(count) as t:
                    start = first + t * rows
                    emit.copy(self.taps, group * (cog * cig) + start * cog + inner * rows, line, start, rows, lanes)

    # --- the sweep -------------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        geometry, tiles, lanes = self.geometry, self.tiles, self.lanes
        with T.parallel(0, self.parts) as part:
            self.panel = T.alloc_buffer((geometry.co * self.padded,), ACC)
            self.line = T.alloc_buffer((self.padded + lanes,), ACC)
            if self.needs_x:
                self.tile = T.alloc_buffer((self.together * self.padded + lanes,), ACC)
            if self.needs_w:
                self.panel_x = T.alloc_buffer((self.patches * self.wide,), ACC)
            with emit.loop(geometry.co) as o:
                simd.store(self.bias_parts, (part * geometry.co + o) * lanes, simd.splat(0.0, lanes))
            first, end = part * self.blocks // self.parts, (part + 1) * self.blocks // self.parts
            with T.serial(first, end) as block:
                self._pool(part, block)
                if self.needs_x:
                    self._input_grad(block, tirx.min(block + 1, end - 1))
                if self.needs_w:
                    self._weight_grad(part, block, block == first)
            if self.stream:
                simd.fence()

    def _row(self, block: Any, q: Any) -> tuple[Any, Any]:
        """Image and patch row of row ``q`` of a block."""
        ph = self.geometry.grid[0]
        row = T.bind(block * self.tiles.rows + q)
        return row // ph, row % ph

    def _pool(self, part: Any, block: Any) -> None:
        """grad_y into panels of g~ (tile of patches, co, patches), and into sums for grad_b."""
        with emit.loop(self.geometry.co) as o:
            at = (part * self.geometry.co + o) * self.lanes
            sums = self._pool_channel(block, o)
            simd.store(self.bias_parts, at, simd.load(self.bias_parts, at, self.lanes) + sums)

    def _pool_channel(self, block: Any, o: Any) -> Any:
        """One output channel's part of the panels; returns the sums of its pixels, lane by lane."""
        geometry, lanes, m = self.geometry, self.lanes, self.tiles.m
        ph, pw = geometry.grid
        height, width = geometry.y_shape[2:]
        plan = pooling(emit.out_ranges(geometry.cols), width, lanes)
        ahead = self.tiles.near * height * width
        with emit.loop(self.tiles.rows) as q:
            n, i = self._row(block, q)

            def pooled(start: Any, count: int) -> None:
                base = T.bind(((n * geometry.co + o) * height + start) * width)
                pixels = emit.pixel_rows(self.tensors["grad_y"], base, width, count, ahead)
                emit.pool(plan, pixels, lambda patch, _, sums: simd.store(self.line, q * pw + patch, sums))

            emit.by_row(emit.out_ranges(geometry.rows), i, pooled)
        first = T.bind((block * self.tiles.rows) % ph * pw)
        bias = T.alloc_buffer((lanes,), ACC, scope="local")
        simd.store(bias, 0, simd.splat(0.0, lanes))

        def pack(tile: Any, inner: int) -> None:
            at = tile * m + inner
            sums = simd.load(self.line, at, lanes)
            if isinstance(at, int) and at + lanes > self.patches:
                valid = self.patches - at
                sums = simd.pick([sums], [lane if lane < valid else None for lane in range(lanes)])
            sums = T.bind(sums)
            simd.store(bias, 0, simd.load(bias, 0, lanes) + sums)
            means = sums * emit.mean_scale(geometry, self.scales, first + at, lanes)
            simd.store(self.panel, tile * (geometry.co * m) + o * m + inner, means)

        whole = self.patches // m
        if whole:
            with emit.loop(whole) as tile:
                for inner in range(0, m, lanes):
                    pack(tile, inner)
        if self.patches % m:
            for inner in range(0, m, lanes):
                pack(whole, inner)
        return simd.load(bias, 0, lanes)

    def _input_grad(self, block: Any, following: Any) -> None:
        geometry = self.geometry
        cig, cog = geometry.ci_group, geometry.co_group
        with emit.loop(geometry.groups) as group:
            for channels, first, count in split(cig, self.together):
                with emit.loop(count) as k:
                    start = first + k * channels
                    self._input_channels(block, following, group, start, channels, (group * cig + start) * cog)

    def _input_channels(
        self, block: Any, following: Any, group: Any, start: Any, channels: int, taps: Any
    ) -> None:
        """grad_x~ of some input channels, and their pixels of grad_x. ``taps``: where their W~ (tile, co, ci) begin.

        A tile of g~'s panel that fits into L1 meets all of the channels before the next one does.
        """
        geometry, tiles, lanes = self.geometry, self.tiles, self.lanes
        cig, cog, m = geometry.ci_group, geometry.co_group, tiles.m
        steps = ceil_div(cog, ceil_div(cog, tiles.depth))
        m_tiles = self.padded // m
        if steps < cog:
            with emit.loop(channels * self.padded // lanes) as v:
                simd.store(self.tile, v * lanes, simd.splat(0.0, lanes))

        def tile_of(mt: Any, t: Any, rows: int, k_start: Any, k_count: int) -> None:
            at = t * tiles.ci * self.padded + mt * m
            panel = mt * (geometry.co * m) + (group * cog + k_start) * m
            own_taps = taps + t * (tiles.ci * cog) + k_start * rows

            def place(c: int, v: int) -> Any:
                return at + (c * self.padded + v * lanes)

            def before(c: int, v: int) -> Any:
                return simd.load(self.tile, place(c, v), lanes)

            products = emit.Products(rows, m // lanes, lanes, before if steps < cog else None)
            aside, spacing = self._prefetcher(following, ((start // tiles.ci) + t) * m_tiles + mt, k_start)

            def scalars(k: Any, c: int) -> Any:
                return simd.load(self.taps, own_taps + k * rows + c, 1)

            def registers(k: Any, v: int) -> Any:
                return simd.load(self.panel, panel + k * m + v * lanes, lanes)

            products.add(k_count, scalars, registers, aside, spacing)
            for c, v, sums in products.sums():
                simd.store(self.tile, place(c, v), sums)

        with emit.loop(m_tiles) as mt:
            for k_count, k_first, k_times in split(cog, steps):
                with emit.loop(k_times) as kb:
                    for rows, first, count in split(channels, tiles.ci):
                        with emit.loop(count) as t:
                            tile_of(mt, first // tiles.ci + t, rows, k_first + kb * k_count, k_count)
        pw = geometry.grid[1]
        with emit.loop(channels) as c, emit.loop(tiles.rows) as q:
            n, i = self._row(block, q)

            def rows(first: Any, count: int) -> None:
                base = T.bind(((n * geometry.ci + group * cig + start + c) * geometry.h + first) * geometry.w)
                at = c * self.padded + q * pw
                emit.spread_rows(geometry, lanes, self.tile, at, self.tensors["grad_x"], base, count, self.stream)

            emit.by_row(emit.in_ranges(geometry.rows), i, rows)

    def _prefetcher(self, following: Any, tile: Any, first: Any) -> tuple[Callable[[Any], None] | None, int]:
        """What asks for the next block's grad_y during a product, and each how many of its steps it should.

        Step o of a tile asks for a line of channel o, so that addresses are cheap to compute; which line of that channel
        the number of the tile says. Where there are more tiles than lines, several share the channels of a line.
        """
        geometry, tiles = self.geometry, self.tiles
        if not tiles.ahead or geometry.groups > 1:
            return None, 1
        (ph, _), axis = geometry.grid, geometry.rows
        height, width = geometry.y_shape[2:]
        per_line = simd.LINE // simd.item_bytes(self.dtype)
        per_row = ceil_div(axis.patch * width, per_line)
        lines = tiles.rows * per_row
        spacing = min(4, power_of_two(max(1, ceil_div(geometry.ci, tiles.ci) * (self.padded // tiles.m) // lines)))
        line = T.bind(tile // spacing % lines)
        row = T.bind(following * tiles.rows + line // per_row)
        top = tirx.max(row % ph * axis.patch - axis.out_offset, 0)
        channel = row // ph * geometry.co + first + tile % spacing
        at = T.bind((channel * height + top) * width + line % per_row * per_line)

        def prefetch(k: Any) -> None:
            simd.prefetch(self.tensors["grad_y"], at + k * (height * width))

        return prefetch, spacing

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

    def _pack_x(self, block: Any, group: Any, column: Any, channels: int) -> None:
        """x~ of some channels, patch by patch, filled up with zeros to the tile's width."""
        geometry = self.geometry
        source = block * (self.patches * geometry.ci) + group * geometry.ci_group + column * self.wide
        with emit.loop(self.patches) as p:
            emit.copy(self.panel_x, p * self.wide, self.tensors["saved"], source + p * geometry.ci, channels, self.lanes)
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

    def _weight_products(self, group: Any, start: Any, channels: int) -> emit.Products:
        """A block's sums over patches of g~ of some output channels of a group times the panel of x~."""
        geometry, lanes, m = self.geometry, self.wide_lanes, self.tiles.m
        products = emit.Products(channels, self.wide // lanes, lanes)

        def steps(tile: Any, count: int) -> None:
            panel = tile * (geometry.co * m) + (group * geometry.co_group + start) * m
            products.add(
                count,
                lambda k, o: simd.load(self.panel, panel + o * m + k, 1),
                lambda k, v: simd.load(self.panel_x, (tile * m + k) * self.wide + v * lanes, lanes),
            )

        whole, rest = divmod(self.patches, m)
        if whole:
            with emit.loop(whole) as tile:
                steps(tile, m)
        if rest:
            steps(whole, rest)
        return products

    # --- after the sweep -------------------------------------------------------------------------------------------

    def _add_up(self) -> None:
        """grad_b, and grad_W with every sum at all of its taps."""
        geometry, lanes = self.geometry, self.lanes
        cig, cog = geometry.ci_group, geometry.co_group
        taps = geometry.kernel[0] * geometry.kernel[1]
        plan = spreading([range(c * taps, (c + 1) * taps) for c in range(cig)], lanes)
        work = geometry.co * (1 + taps) * (cig if self.needs_w else lanes)
        with emit.loop(geometry.co, parallel=work >= emit.PARALLEL_WORK) as o:
            bias = self._over_parts(lanes, lambda part: simd.load(self.bias_parts, (part * geometry.co + o) * lanes, lanes))
            simd.store(self.tensors["grad_b"], o, emit.total(bias))
            if self.needs_w:
                line = T.alloc_buffer((self.wide_tiles * self.wide + lanes,), ACC, scope="local")
                group, inner = o // cog, o % cog
                with emit.loop(self.wide_tiles) as column:
                    row = ((group * self.wide_tiles + column) * cog + inner) * self.wide
                    for v in range(0, self.wide, self.wide_lanes):
                        sums = self._over_parts(
                            self.wide_lanes,
                            lambda part: simd.load(
                                self.weight_parts, part * self.weight_sums + row + v, self.wide_lanes
                            ),
                        )
                        simd.store(line, column * self.wide + v, sums)
                emit.spread(
                    plan,
                    lambda at, width: simd.load(line, at, width),
                    1,
                    lambda _, pixel, value: simd.store(self.tensors["grad_w"], o * (cig * taps) + pixel, value),
                )

    def _over_parts(self, lanes: int, value: Callable[[Any], Any]) -> Any:
        """Sum of vectors, one of each part."""
        sums = T.alloc_buffer((lanes,), ACC, scope="local")
        simd.store(sums, 0, value(0))
        with T.serial(1, self.parts) as part:
            simd.store(sums, 0, simd.load(sums, 0, lanes) + value(part))
        return simd.load(sums, 0, lanes)


class ByChannels(Sweep):
    """By channels: for few patches and many weights. One block; threads share output, then input channels.

    W is read, and grad_W written, exactly once, without sums of several parts; g~ of the whole batch is kept meanwhile.
    """

    def emit(self) -> None:
        assert self.blocks == 1
        self.tensors = emit.arguments(self.workload)
        geometry, tiles = self.geometry, self.tiles
        self.scales = emit.patch_scales(geometry, self.padded)
        self.stream = emit.can_stream_rows(tiles.stream and self.needs_x, geometry.w, self.dtype, self.lanes)
        self.panel = T.alloc_buffer((geometry.co * self.padded,), ACC)
        pixels = geometry.n * geometry.rows.out * geometry.cols.out
        with emit.loop(geometry.co, parallel=pixels * geometry.co >= emit.PARALLEL_WORK) as o:
            self.line = T.alloc_buffer((self.padded + self.lanes,), ACC)
            simd.store(self.tensors["grad_b"], o, emit.total(self._pool_channel(0, o)))
        if self.needs_x:
            if self.stream:
                with simd.streaming(self.dtype):
                    self._share_input_channels()
            else:
                self._share_input_channels()
        if self.needs_w:
            self._share_weights()

    def _share_input_channels(self) -> None:
        geometry = self.geometry
        for channels, first, count in split(geometry.ci_group, self.together):
            work = geometry.groups * count * channels * geometry.co_group * self.padded
            with emit.loop(geometry.groups * count, parallel=work >= emit.PARALLEL_WORK) as t:
                self.taps = T.alloc_buffer((geometry.co_group * channels,), ACC)
                self.tile = T.alloc_buffer((channels * self.padded + self.lanes,), ACC)
                group, start = t // count, first + t % count * channels
                self._sum_taps_of(group, start, channels)
                self._input_channels(0, 0, group, start, channels, 0)
                if self.stream:
                    simd.fence()

    def _sum_taps_of(self, group: Any, start: Any, channels: int) -> None:
        """W~ in panels (tile of ci, co, ci) of some input channels of a group."""
        geometry, tile = self.geometry, self.tiles.ci
        cig, cog, taps = geometry.ci_group, geometry.co_group, geometry.kernel[0] * geometry.kernel[1]
        plan = pooling([range(c * taps, (c + 1) * taps) for c in range(channels)], channels * taps, self.lanes)
        line = T.alloc_buffer((channels + self.lanes,), ACC, scope="local")
        with emit.loop(cog) as o:
            base = T.bind(((group * cog + o) * cig + start) * taps)
            pixels = emit.pixel_rows(self.tensors["weight"], base, 0, 1)
            emit.pool(plan, pixels, lambda patch, _, sums: simd.store(line, patch, sums))
            for rows, first, count in split(channels, tile):
                with emit.loop(count) as t:
                    own = first + t * rows
                    emit.copy(self.taps, own * cog + o * rows, line, own, rows, self.lanes)

    def _share_weights(self) -> None:
        geometry = self.geometry
        cog = geometry.co_group
        for channels, first, count in split(geometry.ci_group, self.wide):
            work = geometry.groups * count * self.wide * cog * self.patches
            with emit.loop(geometry.groups * count, parallel=work >= emit.PARALLEL_WORK) as t:
                self.panel_x = T.alloc_buffer((self.patches * self.wide,), ACC)
                group, column = t // count, first // self.wide + t % count
                self._pack_x(0, group, column, channels)
                for rows, first_o, count_o in split(cog, self.tiles.co):
                    with emit.loop(count_o) as k:
                        self._write_weights(group, column, channels, first_o + k * rows, rows)

    def _write_weights(self, group: Any, column: Any, channels: int, start: Any, count: int) -> None:
        """grad_W of ``count`` output channels from ``start`` on and ``channels`` input channels, at all taps."""
        geometry = self.geometry
        cig, cog, taps = geometry.ci_group, geometry.co_group, geometry.kernel[0] * geometry.kernel[1]
        plan = spreading([range(c * taps, (c + 1) * taps) for c in range(channels)], self.lanes)
        lines = T.alloc_buffer((count * self.wide + self.lanes,), ACC, scope="local")
        for o, v, sums in self._weight_products(group, start, count).sums():
            simd.store(lines, o * self.wide + v * self.wide_lanes, sums)
        with emit.loop(count) as o:
            base = T.bind(((group * cog + start + o) * cig + column * self.wide) * taps)
            emit.spread(
                plan,
                lambda at, width: simd.load(lines, o * self.wide + at, width),
                1,
                lambda _, pixel, value: simd.store(self.tensors["grad_w"], base + pixel, value),
            )


def split(size: int, piece: int) -> list[tuple[int, int, int]]:
    """(size, first, number) of the pieces that cover ``size``: those of full size, and what is left."""
    whole, rest = divmod(size, piece)
    found = [(piece, 0, whole)] if whole else []
    return [*found, (rest, whole * piece, 1)] if rest else found

"""The backward pass of dense and grouped convolutions: by patches (:mod:`.sweep`) or, written here, by channels."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from ...core.workload import Workload
from ..stages import ACC
from . import emit, maps, simd
from .strips import alignment
from .sweep import Sweep, Tiles, split


def backward(workload: Workload, tiles: Tiles, lanes: int) -> Any:
    """IRModule of ``backward``, ``backward_input`` or ``backward_weight``; not for dilated or depthwise ones."""
    with emit.function() as module:
        (ByChannels if tiles.by_channels else Sweep)(workload, tiles, lanes).emit()
    return module()


class ByChannels(Sweep):
    """By channels: for few patches and many weights. One block; threads share output, then input channels.

    W is read, and grad_W written, exactly once, without sums of several parts; g~ of the whole batch is kept meanwhile.
    """

    def emit(self, tensors: dict[str, Any] | None = None) -> None:
        assert self.blocks == 1
        self.tensors = emit.arguments(self.workload) if tensors is None else tensors
        geometry, tiles = self.geometry, self.tiles
        self.scales = maps.patch_scales(geometry, self.padded)
        self.stream = tiles.stream
        self.panel = T.alloc_buffer((geometry.co * self.padded,), ACC)
        pixels = geometry.n * geometry.rows.out * geometry.cols.out
        with emit.loop(geometry.co, parallel=pixels * geometry.co >= emit.PARALLEL_WORK) as o:
            self.line = T.alloc_buffer((self.padded + self.lanes,), ACC)
            sums = self._pool_channel(0, o, self.tiles.near)
            if sums is not None:
                simd.store(self.tensors["grad_b"], o, emit.total(sums))
        with simd.streaming(self.dtype, self.stream and tensors is None):
            if self.needs_x:
                self._share_input_channels()
            if self.needs_w:
                self._share_weights()

    def _share_input_channels(self) -> None:
        geometry = self.geometry
        for channels, first, count in split(geometry.ci_group, self.together):
            work = geometry.groups * count * channels * geometry.co_group * self.padded
            with emit.loop(geometry.groups * count, parallel=work >= emit.PARALLEL_WORK) as t:
                self._input_share(channels, first, count, t)

    def _input_share(self, channels: int, first: int, count: int, t: Any) -> None:
        """Number ``t`` of the shares, ``count`` in a group, that have ``channels`` input channels from ``first`` on."""
        self.taps = T.alloc_buffer((self.geometry.co_group * channels,), ACC)
        self.tile = T.alloc_buffer((channels * self.padded + self.lanes,), ACC)
        group, start = t // count, first + t % count * channels
        self._sum_taps_of(group, start, channels)
        self._input_channels(0, group, start, channels, 0)
        if self.stream:
            simd.fence()

    def _sum_taps_of(self, group: Any, start: Any, channels: int) -> None:
        """W~ in panels (tile of ci, co, ci) of some input channels of a group."""
        geometry = self.geometry
        cig, cog, taps = geometry.ci_group, geometry.co_group, geometry.kernel[0] * geometry.kernel[1]
        line = T.alloc_buffer((channels + self.lanes,), ACC)
        with emit.loop(cog) as o:
            base = T.bind(((group * cog + o) * cig + start) * taps)
            # The next output channel's windows of the same input channels.
            self._pack_taps(base, channels, line, 0, o, cig * taps)

    def _share_weights(self) -> None:
        geometry = self.geometry
        for channels, first, count in split(geometry.ci_group, self.wide):
            work = geometry.groups * count * self.wide * geometry.co_group * self.patches
            with emit.loop(geometry.groups * count, parallel=work >= emit.PARALLEL_WORK) as t:
                self._weight_share(channels, first, count, t)

    def _weight_share(self, channels: int, first: int, count: int, t: Any) -> None:
        """As :meth:`_input_share`, for a column of grad_W."""
        self.panel_x = T.alloc_buffer((self.patches * self.wide,), ACC)
        group, column = t // count, first // self.wide + t % count
        self._pack_x(0, group, column, channels)
        for rows, first_o, count_o in split(self.geometry.co_group, self.tiles.co):
            with emit.loop(count_o) as k:
                self._write_weights(group, column, channels, first_o + k * rows, rows)
        if self.stream:
            simd.fence()

    def _write_weights(self, group: Any, column: Any, channels: int, start: Any, count: int) -> None:
        """grad_W of ``count`` output channels from ``start`` on and ``channels`` input channels, at all taps."""
        geometry = self.geometry
        cig, cog, taps = geometry.ci_group, geometry.co_group, geometry.kernel[0] * geometry.kernel[1]
        lines = T.alloc_buffer((count * self.wide + self.lanes,), ACC, scope="local")
        # Tiles of grad_W begin at multiples of the tile's width in a row, if the channels are such a multiple.
        size = self.wide * taps
        aligned = alignment(size) if self.stream and cig % self.wide == 0 else None
        for o, v, sums in self._weight_products(group, start, count).sums():
            simd.store(lines, o * self.wide + v * self.wide_lanes, sums)
        with emit.loop(count) as o:
            base = T.bind(((group * cog + start + o) * cig + column * self.wide) * taps)
            at = o * self.wide
            maps.spread_windows(lines, at, channels, taps, self.lanes, self.tensors["grad_w"], base, aligned)

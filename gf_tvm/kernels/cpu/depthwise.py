"""Depthwise convolutions: no products over channels, so everything is done plane by plane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from ...core.workload import Workload
from ..stages import ACC
from . import emit, maps, simd


@dataclass(frozen=True)
class Tiles:
    """Choices.

    Attributes:
        stream: grad_x is written past the caches, where its rows are aligned well enough.
        near: while a plane is pooled, the one that many images further on is prefetched; 0: none is.
    """

    stream: bool = False
    near: int = 0


def backward(workload: Workload, tiles: Tiles, lanes: int) -> Any:
    """IRModule of ``backward``, ``backward_input`` or ``backward_weight`` for depthwise ones that are not dilated.

    Threads share the channels; one goes through the planes of its channel in all images.
    """
    with emit.function() as module:
        _Depthwise(workload, tiles, lanes).emit()
    return module()


def filter_input(workload: Workload, tiles: Tiles, lanes: int) -> Any:
    """IRModule of ``filter_input`` for depthwise convolutions: x~ has the order of x."""
    geometry = workload.geometry
    (ph, pw), plane = geometry.grid, geometry.h * geometry.w
    axes, size = maps.in_axes(geometry), (geometry.h, geometry.w)
    planes = geometry.n * geometry.ci
    with emit.function() as module:
        tensors = emit.arguments(workload)
        with emit.loop(planes, parallel=planes * plane >= emit.PARALLEL_WORK) as k:
            line = T.alloc_buffer((ph * pw + lanes,), ACC)
            with emit.loop(ph) as i:
                maps.pool_row(axes, tensors["x"], k, size, i, line, i * pw, lanes, tiles.near * plane)
            # Vectors of a row's last patches reach beyond them; x~ has no room for that.
            whole = ph * pw // lanes
            if whole:
                with emit.loop(whole) as v:
                    emit.copy(tensors["filtered_x"], k * (ph * pw) + v * lanes, line, v * lanes, lanes, lanes)
            rest = ph * pw - whole * lanes
            emit.copy(tensors["filtered_x"], k * (ph * pw) + whole * lanes, line, whole * lanes, rest, lanes)
    return module()


class _Depthwise:
    def __init__(self, workload: Workload, tiles: Tiles, lanes: int) -> None:
        self.workload = workload
        self.geometry, self.dtype, self.tiles, self.lanes = workload.geometry, workload.dtype, tiles, lanes
        self.needs_x, self.needs_w = workload.gives_x, workload.gives_w

    def emit(self) -> None:
        geometry, dtype = self.geometry, self.dtype
        self.tensors = emit.arguments(self.workload)
        self.scales = maps.patch_scales(geometry, 0)
        self.stream = maps.can_stream_rows(self.tiles.stream and self.needs_x, geometry.w, dtype, self.lanes)
        with simd.streaming(dtype, self.stream):
            self._channels()

    def _channels(self) -> None:
        geometry, lanes = self.geometry, self.lanes
        ph, pw = geometry.grid
        taps = geometry.kernel[0] * geometry.kernel[1]
        work = geometry.n * geometry.ci * geometry.rows.out * geometry.cols.out
        with emit.loop(geometry.ci, parallel=work >= emit.PARALLEL_WORK) as c:
            self.line = T.alloc_buffer((ph * pw + lanes,), ACC)
            # Sums of a whole register, and of the patches that do not fill one.
            sums = {name: T.alloc_buffer((lanes + 1,), ACC, scope="local") for name in ("bias", "weight")}
            for buffer in sums.values():
                simd.store(buffer, 0, simd.splat(0.0, lanes))
                simd.store(buffer, lanes, simd.splat(0.0, 1))
            if self.needs_x:
                self.tap = T.alloc_buffer((1,), ACC, scope="local")
                simd.store(self.tap, 0, simd.splat(0.0, 1))
                with emit.loop(taps) as k:
                    simd.store(
                        self.tap, 0, simd.load(self.tap, 0, 1) + simd.load(self.tensors["weight"], c * taps + k, 1)
                    )
            with emit.loop(geometry.n) as n:
                plane = T.bind(n * geometry.ci + c)
                self._pool(plane)
                self._products(plane, sums)
                if self.needs_x:
                    self._spread(plane)
            result = {name: emit.total(simd.load(s, 0, lanes)) + simd.load(s, lanes, 1) for name, s in sums.items()}
            simd.store(self.tensors["grad_b"], c, result["bias"])
            if self.needs_w:
                value = T.bind(result["weight"])
                with emit.loop(taps) as k:
                    simd.store(self.tensors["grad_w"], c * taps + k, value)
            if self.stream:
                simd.fence()

    def _pool(self, plane: Any) -> None:
        geometry = self.geometry
        ph, pw = geometry.grid
        height, width = geometry.y_shape[2:]
        ahead = self.tiles.near * geometry.co * height * width
        axes, grad_y = maps.out_axes(geometry), self.tensors["grad_y"]
        with emit.loop(ph) as i:
            maps.pool_row(axes, grad_y, plane, (height, width), i, self.line, i * pw, self.lanes, ahead)

    def _products(self, plane: Any, sums: dict[str, Any]) -> None:
        """From sums of grad_y to grad_x~ in place; sums for grad_b and grad_W on the way."""
        geometry, lanes = self.geometry, self.lanes
        patches = geometry.grid[0] * geometry.grid[1]

        def step(at: Any, width: int) -> None:
            pixels = T.bind(simd.load(self.line, at, width))
            means = T.bind(pixels * maps.mean_scale(geometry, self.scales, at, width))
            parts = {"bias": pixels}
            if self.needs_w:
                parts["weight"] = means * simd.load(self.tensors["saved"], plane * patches + at, width)
            for name, value in parts.items():
                if width == lanes:
                    simd.store(sums[name], 0, simd.load(sums[name], 0, lanes) + value)
                else:
                    simd.store(sums[name], lanes, simd.load(sums[name], lanes, 1) + emit.total(value))
            if self.needs_x:
                simd.store(self.line, at, means * simd.splat(simd.load(self.tap, 0, 1), width))

        whole = patches // lanes
        if whole:
            emit.unrolled(whole, 2, lambda v: step(v * lanes, lanes))
        for at, width in emit.pieces(patches - whole * lanes, lanes // 2 or 1):
            step(whole * lanes + at, width)

    def _spread(self, plane: Any) -> None:
        geometry = self.geometry
        ph, pw = geometry.grid
        with emit.loop(ph) as i:
            maps.spread_row(geometry, self.lanes, self.line, i * pw, self.tensors["grad_x"], plane, i, self.stream)

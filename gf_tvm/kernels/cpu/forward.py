"""The forward pass' pooling, x to x~, as one sweep: rows are pooled as they lie, then turned to channels last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from ...core.workload import Workload
from ..stages import ACC
from . import emit, maps
from .strips import alignment


@dataclass(frozen=True)
class Tiles:
    """Sizes of the sweep.

    Attributes:
        rows: patch rows that are pooled together, of one channel after the other: a divisor of n * ph.
        near: while a channel is pooled, the one that many channels further on is prefetched; 0: none is.
    """

    rows: int
    near: int = 0


def filter_input(workload: Workload, tiles: Tiles, lanes: int) -> Any:
    """IRModule of ``filter_input`` for convolutions that are not depthwise."""
    geometry = workload.geometry
    (ph, pw), ci, rows = geometry.grid, geometry.ci, tiles.rows
    # A square of that many channels and patches is transposed in registers.
    square = min(lanes, alignment(ci))
    patches, plane = rows * pw, geometry.h * geometry.w
    stride = patches + lanes
    axes, size = maps.in_axes(geometry), (geometry.h, geometry.w)
    with emit.function() as module:
        tensors = emit.arguments(workload)
        x, saved = tensors["x"], tensors["filtered_x"]
        work = geometry.n * ci * plane
        with emit.loop(geometry.n * ph // rows, parallel=work >= emit.PARALLEL_WORK) as block:
            sums = T.alloc_buffer((square * stride,), ACC)
            with emit.loop(ci // square) as tile:
                with emit.loop(square) as c, emit.loop(rows) as q:
                    row = T.bind(block * rows + q)
                    channel, at = row // ph * ci + tile * square + c, c * stride + q * pw
                    maps.pool_row(axes, x, channel, size, row % ph, sums, at, lanes, tiles.near * plane)

                maps.to_channels_last(sums, 0, stride, square, patches, saved, block * patches, ci, tile * square)
    return module()

"""The function of one stage of a chain's backward pass: a loop or two over what lies in the caches.

Products are the sweeps of :mod:`gf_tvm.kernels.cpu.on_grid`, with the schedules that the logs have for them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from ...core.geometry import Geometry
from ...core.workload import Workload
from ...kernels.cpu import emit, maps, on_grid, simd
from ...kernels.cpu.strips import alignment, spreading
from ...kernels.cpu.sweep import Tiles
from ...kernels.stages import ACC
from ...machine.profiles import DeviceProfile
from ...schedules.cpu import STREAM_BYTES, tiles_of
from ..plan.grids import Cuts
from ..plan.steps import ConvInput, ConvWeight, Expand, Filter, Gather, MapSum, Part
from .compiled import Tables
from .emit_together import Sums, Together
from .stage import Stage, StageCode
from .traversal import indices, scratch_of, space

#: Planes that a plane which is being pooled asks for, counted from itself.
_NEAR = 4


class StageEmitter(StageCode):
    """Emits one stage's function."""

    def __init__(
        self,
        stage: Stage,
        tables: Tables,
        profile: DeviceProfile,
        config_of: Callable[[Workload], dict[str, Any]],
    ) -> None:
        super().__init__(stage, tables, profile.lanes)
        self.profile, self.config_of = profile, config_of

    def function(self, name: str) -> Any:
        """The PrimFunc: takes pointers to the operands."""
        sizes = self.stage.sizes
        kinds = {key: "int32" if key[0] == "integers" else ACC for key in sizes}
        with IRBuilder() as builder, T.prim_func(is_private=True):
            T.func_name(name)
            T.func_attr({"tirx.noalias": True})
            # Where a parallel loop fails TVM's code returns a number. At the end there is no return of our own: memory
            # is given back after the last statement, and would not be.
            T.func_ret(tvm.ir.PrimType("int32"))
            pointers = {key: T.arg("".join(map(str, key)), T.handle(kinds[key])) for key in sizes}
            buffers = {key: T.decl_buffer((size,), kinds[key], data=pointers[key]) for key, size in sizes.items()}
            self.register = {k: buffer for (kind, k), buffer in buffers.items() if kind == "register"}
            self.given = {key: buffer for key, buffer in buffers.items() if key[0] != "register"}
            with simd.streaming(ACC, shared=True):
                self._emit()
        return builder.get()

    def _emit(self) -> None:
        first = self.stage.steps[0]
        if isinstance(first, Filter):
            self._filter(first)
        elif isinstance(first, MapSum):
            self._map_sum(first)
        elif isinstance(first, Expand):
            self._expand(first)
        elif space(first, self.stage.registers) is not None:
            Together(self).emit()
        elif isinstance(first, ConvInput) and first.geometry.dilated:
            self._dilated(first)
        elif isinstance(first, ConvInput | ConvWeight):
            self._products()
        else:
            assert isinstance(first, Gather)
            self._gather(first)

    # Products

    def _products(self) -> None:
        """The products of one convolution: in one sweep where they are cut in the same way."""
        tensors: dict[str, Any] = {}
        tiles: dict[str, Tiles] = {}
        steps = [step for step in self.stage.steps if isinstance(step, ConvInput | ConvWeight)]
        geometry = steps[0].geometry
        for step in steps:
            tensors["g"] = self.register[step.src]
            if isinstance(step, ConvInput):
                tensors |= {"weight": self.given["slot", step.weight], "grad_x_grid": self.register[step.dst]}
                tiles["input_grad"] = self._tiles("input_grad", geometry)
            else:
                tensors |= {"saved": self.given["slot", step.filtered], "grad_w": self.given["tensor", step.tensor]}
                tiles["weight_grad"] = self._tiles("weight_grad", geometry)
        if len(tiles) == 2:
            of_x, of_w = tiles["input_grad"], tiles["weight_grad"]
            both = replace(of_x, co=of_w.co, cv=of_w.cv, stream=of_w.stream)
            if (of_x.rows, of_x.m, of_x.by_channels) == (of_w.rows, of_w.m, of_w.by_channels):
                on_grid.emit_both(geometry, both, self.lanes, tensors)
                return
        for kernel, own in tiles.items():
            on_grid.emit_products(Workload(kernel, geometry), own, self.lanes, tensors)

    def _tiles(self, kernel: str, geometry: Geometry) -> Tiles:
        """Of the schedule that the logs have for a product."""
        workload = Workload(kernel, geometry)
        tiles = tiles_of(self.config_of(workload), geometry, self.profile)
        # The spaces of products on the grid have no such choice; large weights are like large maps.
        large = 4 * math.prod(geometry.weight_shape) > STREAM_BYTES
        return replace(tiles, stream=workload.gives_w and large and self.profile.arch == "x86_64")

    def _dilated(self, step: ConvInput) -> None:
        """A convolution on the grid: g~ once for every tap, moved by it, as channels of their own, times W."""
        geometry = step.geometry
        (ph, pw), (kh, kw), lanes = geometry.grid, geometry.kernel, self.lanes
        patches, taps = ph * pw, kh * kw
        source, weight = self.register[step.src], self.given["slot", step.weight]
        sizes = scratch_of(geometry)
        scratch = self.given["workspace", 0]
        moved, by_tap = (
            T.decl_buffer((size,), ACC, data=scratch.data, elem_offset=at)
            for size, at in zip(sizes, (0, sizes[0]), strict=True)
        )
        planes = geometry.n * geometry.co
        with emit.loop(planes, parallel=planes * patches * taps >= emit.PARALLEL_WORK) as plane:
            for tap, (u, v) in enumerate(itertools.product(range(kh), range(kw))):
                base = (plane * taps + tap) * patches
                emit.clear(moved, base, patches, lanes)
                down, right = (
                    k * d - before
                    for k, d, before in zip((u, v), geometry.grid_dilation, geometry.grid_padding, strict=True)
                )
                top, left = max(0, -down), max(0, -right)
                height, width = ph - abs(down), pw - abs(right)
                if height > 0 and width > 0:
                    with emit.loop(height) as i:
                        to = base + (top + i) * pw + left
                        start = plane * patches + (top + i + down) * pw + left + right
                        emit.copy(moved, to, source, start, width, lanes)
        # (o, tap, c): the taps in the other direction.
        channels = geometry.ci_group
        work = geometry.co * taps * channels
        with emit.loop(geometry.co, parallel=work >= emit.PARALLEL_WORK) as o, emit.loop(channels) as c:
            for tap in range(taps):
                value = simd.load(weight, (o * channels + c) * taps + taps - 1 - tap, 1)
                simd.store(by_tap, (o * taps + tap) * channels + c, value)
        pointwise = Geometry(
            geometry.n, geometry.ci, geometry.co * taps, ph, pw, (1, 1), (1, 1), groups=geometry.groups
        )
        tensors = {"g": moved, "weight": by_tap, "grad_x_grid": self.register[step.dst]}
        tiles = self._tiles("input_grad", pointwise)
        on_grid.emit_products(Workload("input_grad", pointwise), tiles, self.lanes, tensors)

    # Full-size gradients that come in and go out

    def _filter(self, step: Filter) -> None:
        geometry, lanes = step.geometry, self.lanes
        (ph, pw), (height, width) = geometry.grid, geometry.y_shape[2:]
        axes, patches = maps.out_axes(geometry), ph * pw
        scales = maps.patch_scales(geometry, 0)
        planes, source, target = self.batch * geometry.co, self.given["grad", step.value], self.register[step.dst]
        with emit.loop(planes, parallel=planes * height * width >= emit.PARALLEL_WORK) as plane:
            line = T.alloc_buffer((patches + lanes,), ACC)
            with emit.loop(ph) as i:
                maps.pool_row(axes, source, plane, (height, width), i, line, i * pw, lanes, _NEAR * height * width)

            def scaled(at: Any, count: int) -> None:
                means = simd.load(line, at, count) * maps.mean_scale(geometry, scales, at, count)
                simd.store(target, plane * patches + at, means)

            emit.each_vector(patches, lanes, scaled)

    def _expand(self, step: Expand) -> None:
        lanes, grid = self.lanes, step.grid
        _, channels, height, width = self.stage.values[step.value]
        (ph, pw), patches = grid.shape, grid.shape[0] * grid.shape[1]
        (adds,) = self.stage.adds
        source, target = self.register[step.src], self.given["entry", step.value]
        size = self.batch * step.width * height * width
        streams = not adds and 4 * size > STREAM_BYTES and self.profile.arch == "x86_64"
        streams = maps.can_stream_rows(streams, width, ACC, lanes)
        # Where values are added no two vectors may overlap.
        aligned = alignment(width) if streams else lanes if adds else None
        vectors = spreading(_ranges(grid.cols), lanes, aligned)
        with emit.loop(self.batch * step.width, parallel=size >= emit.PARALLEL_WORK) as k:
            line = T.alloc_buffer((patches + lanes,), ACC)
            # Vectors of a row's last patches reach beyond them.
            emit.each_vector(
                patches, lanes, lambda at, count: simd.store(line, at, simd.load(source, k * patches + at, count))
            )
            plane = T.bind((k // step.width * channels + step.start + k % step.width) * (height * width))

            def rows(first: Any, count: int) -> None:
                def sink(row: int, pixel: Any, value: Any) -> None:
                    at = plane + (first + row) * width + pixel
                    if adds:
                        value = value + simd.load(target, at, simd.lanes_of(value))
                    simd.write(target, at, value, streams)

                maps.spread(vectors, lambda patch, some: simd.load(line, self._patch + patch, some), count, sink)

            with emit.loop(ph) as i:
                self._patch = i * pw
                maps.by_row(_ranges(grid.rows), i, rows)
            if streams:
                simd.fence()

    # Sums and grids that differ

    def _map_sum(self, step: MapSum) -> None:
        lanes, patches = self.lanes, math.prod(step.grid.shape)
        channels = self.stage.registers[step.src][0]
        source, mean, target = self.register[step.src], self.given["slot", step.mean], self.register[step.dst]
        work = self.batch * channels * patches
        with emit.loop(channels, parallel=work >= emit.PARALLEL_WORK) as c:
            sums = Sums(self, 1)
            with emit.loop(self.batch) as image:
                if not step.batch:
                    sums.clear()
                plane = T.bind((image * channels + c) * patches)

                def some(at: Any, count: int) -> None:
                    value = simd.load(source, plane + at, count) * simd.load(mean, plane + at, count)
                    sums.add(0, value, step.grid, at)

                emit.each_vector(patches, lanes, some)
                if not step.batch:
                    simd.store(target, image * channels + c, sums.total(0, step.grid))
            if step.batch:
                simd.store(target, c, sums.total(0, step.grid))

    def _gather(self, step: Gather) -> None:
        patches, channels = math.prod(step.grid.shape), step.channels
        target = self.register[step.dst]
        work = self.batch * channels * patches
        with emit.loop(self.batch * channels, parallel=work >= emit.PARALLEL_WORK) as plane:
            emit.clear(target, plane * patches, patches, self.lanes)
        for part in step.parts:
            with emit.loop(self.batch * part.width, parallel=work >= emit.PARALLEL_WORK) as k:
                plane = k // part.width * channels + part.start + k % part.width
                self._add_cells(part, k, target, T.bind(plane * patches), step.grid.shape[1])

    def _add_cells(self, part: Part, k: Any, target: Any, base: Any, columns: int) -> None:
        """Add one plane of a part, cell by cell. ``k``: the plane's number in the part."""
        floats, integers = self.given["floats", 0], self.given["integers", 0]
        at = [self.tables.place(values) for values in indices(part)]
        _, sh, sw = self.stage.registers[part.src]
        height, width = part.rows.cells.patches, part.cols.cells.patches
        source = self.register[part.src]

        def index(table: int, i: Any) -> Any:
            return tirx.BufferLoad(integers, [at[table] + i])

        with emit.loop(height) as i, emit.loop(width) as j:
            value = simd.load(source, k * (sh * sw) + index(1, i) * sw + index(4, j), 1)
            if part.mean is not None:
                value = value * simd.load(self.given["slot", part.mean], (k * height + i) * width + j, 1)
            value = value * (simd.load(floats, at[2] + i, 1) * simd.load(floats, at[5] + j, 1))
            to = T.bind(base + index(0, i) * columns + index(3, j))
            simd.store(target, to, simd.load(target, to, 1) + value)


def _ranges(cuts: Cuts) -> list[range]:
    """Pixels of each patch."""
    return [range(a, b) for a, b in zip(cuts.points, cuts.points[1:], strict=False)]

"""A chain's backward pass in TVM's IR: one function, every step of which is a loop or two over what lies in the caches.

Steps that work element by element and follow each other share one loop over channels: a derivative's means are read
once for all that is multiplied with them, and what only the next step reads stays in registers. Products are the
sweeps of :mod:`gf_tvm.kernels.on_grid`, with the schedules that the logs have for them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from ..devices import DeviceProfile
from ..geometry import Geometry
from ..kernels import emit, maps, on_grid, simd
from ..kernels.stages import ACC
from ..kernels.strips import alignment, spreading
from ..schedules.cpu import STREAM_BYTES, tiles_of
from ..workload import Workload
from .compiled import Backward, indices, pixels, scratch_of, space, uniform
from .grids import Cuts, Grid
from .steps import (
    Channels,
    ConvInput,
    ConvWeight,
    Expand,
    Filter,
    Gather,
    MapSum,
    Part,
    PatchSum,
    Plus,
    Step,
    Take,
    Times,
    TimesSaved,
)

#: Planes that a plane which is being pooled asks for, counted from itself.
_NEAR = 4


def emit_backward(program: Backward, profile: DeviceProfile, config_of: Callable[[Workload], dict[str, Any]]) -> Any:
    """The IRModule of ``program``."""
    with emit.function() as module:
        _Backward(program, profile, config_of).emit()
    return module()


class _Backward:
    def __init__(
        self, program: Backward, profile: DeviceProfile, config_of: Callable[[Workload], dict[str, Any]]
    ) -> None:
        self.program, self.profile, self.config_of = program, profile, config_of
        self.lanes: int = profile.lanes
        self.batch = program.batch
        self.written: set[tuple[str, int]] = set()

    def emit(self) -> None:
        program = self.program
        # All parameters first: TVM takes none after anything else.
        parameters = [
            T.arg(
                f"{a.kind}{a.number}" if a.kind not in ("workspace", "floats", "integers") else a.kind,
                T.buffer(a.shape, "int32" if a.kind == "integers" else ACC),
            )
            for a in program.arguments
        ]
        keys = [(argument.kind, argument.number) for argument in program.arguments]
        self.given = {key: simd.flat(tensor) for key, tensor in zip(keys, parameters, strict=True)}
        places, _ = program.places
        workspace = self.given["workspace", 0]
        self.register = {
            number: T.decl_buffer((self.count(number),), ACC, data=workspace.data, elem_offset=at)
            for number, at in places.items()
        }
        with simd.streaming(ACC):
            for stage in program.stages:
                self._stage(stage)

    def count(self, register: int) -> int:
        """Elements of a register."""
        return self.batch * math.prod(self.program.registers[register])

    def _stage(self, stage: Sequence[Step]) -> None:
        first = stage[0]
        if isinstance(first, Take):
            self.register[first.dst] = self.given["grad", first.value]
        elif isinstance(first, Filter):
            self._filter(first)
        elif isinstance(first, MapSum):
            self._map_sum(first)
        elif isinstance(first, Expand):
            self._expand(first)
        elif space(first, self.program.registers) is not None:
            _Together(self, stage).emit()
        elif isinstance(first, ConvInput) and first.geometry.dilated:
            self._dilated(first)
        elif isinstance(first, ConvInput | ConvWeight):
            self._product(first)
        else:
            assert isinstance(first, Gather)
            self._gather(first)

    # Products

    def _product(self, step: ConvInput | ConvWeight) -> None:
        g = self.register[step.src]
        if isinstance(step, ConvInput):
            self._input_grad(step.geometry, g, self.given["slot", step.weight], self.register[step.dst])
        else:
            workload = Workload("weight_grad", step.geometry)
            saved, grad = self.given["slot", step.filtered], self.given["tensor", step.tensor]
            self._sweep(workload, {"g": g, "saved": saved, "grad_w": grad})

    def _input_grad(self, geometry: Geometry, g: Any, weight: Any, target: Any) -> None:
        self._sweep(Workload("input_grad", geometry), {"g": g, "weight": weight, "grad_x_grid": target})

    def _sweep(self, workload: Workload, tensors: dict[str, Any]) -> None:
        tiles = tiles_of(self.config_of(workload), workload.geometry, self.profile)
        # The spaces of products on the grid have no such choice; large weights are like large maps.
        large = 4 * math.prod(workload.geometry.weight_shape) > STREAM_BYTES
        tiles = replace(tiles, stream=workload.gives_w and large and self.profile.arch == "x86_64")
        on_grid.emit_products(workload, tiles, self.lanes, tensors)

    def _dilated(self, step: ConvInput) -> None:
        """A convolution on the grid: g~ once for every tap, moved by it, as channels of their own, times W."""
        geometry = step.geometry
        (ph, pw), (kh, kw), lanes = geometry.grid, geometry.kernel, self.lanes
        patches, taps = ph * pw, kh * kw
        source, weight = self.register[step.src], self.given["slot", step.weight]
        sizes = scratch_of(geometry)
        moved, by_tap = (
            T.decl_buffer((size,), ACC, data=self.given["workspace", 0].data, elem_offset=at)
            for size, at in zip(sizes, (self.program.scratch, self.program.scratch + sizes[0]), strict=True)
        )
        planes = geometry.n * geometry.co
        with emit.loop(planes, parallel=planes * patches * taps >= emit.PARALLEL_WORK) as plane:
            for tap, (u, v) in enumerate(itertools.product(range(kh), range(kw))):
                base = (plane * taps + tap) * patches
                _clear(moved, base, patches, lanes)
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
        self._input_grad(pointwise, moved, by_tap, self.register[step.dst])

    # Full-size gradients that come in and go out

    def _filter(self, step: Filter) -> None:
        geometry, lanes = step.geometry, self.lanes
        (ph, pw), (height, width) = geometry.grid, geometry.y_shape[2:]
        axes, patches = maps.out_axes(geometry), ph * pw
        scales = maps.patch_scales(geometry, 0)
        planes, source, target = self.batch * geometry.co, self.given["grad", step.value], self.register[step.dst]
        with emit.loop(planes, parallel=planes * height * width >= emit.PARALLEL_WORK) as plane:
            line = T.alloc_buffer((patches + lanes,), ACC)

            def row(i: Any) -> None:
                at = i * pw
                maps.pool_row(axes, source, plane, (height, width), i, line, at, lanes, _NEAR * height * width)

            with emit.loop(ph) as i:
                row(i)

            def scaled(at: Any, count: int) -> None:
                means = simd.load(line, at, count) * maps.mean_scale(geometry, scales, at, count)
                simd.store(target, plane * patches + at, means)

            _each_vector(patches, lanes, scaled)

    def _expand(self, step: Expand) -> None:
        lanes, grid = self.lanes, step.grid
        _, channels, height, width = self.program.values[step.value]
        (ph, pw), patches = grid.shape, grid.shape[0] * grid.shape[1]
        key = ("entry", step.value)
        adds = key in self.written or key in self.program.zeroed
        self.written.add(key)
        source, target = self.register[step.src], self.given[key]
        size = self.batch * step.width * height * width
        streams = not adds and 4 * size > STREAM_BYTES and self.profile.arch == "x86_64"
        streams = maps.can_stream_rows(streams, width, ACC, lanes)
        # Where values are added no two vectors may overlap.
        aligned = alignment(width) if streams else lanes if adds else None
        vectors = spreading(_ranges(grid.cols), lanes, aligned)
        with emit.loop(self.batch * step.width, parallel=size >= emit.PARALLEL_WORK) as k:
            line = T.alloc_buffer((patches + lanes,), ACC)
            # Vectors of a row's last patches reach beyond them.
            _each_vector(
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
        channels = self.program.registers[step.src][0]
        source, mean, target = self.register[step.src], self.given["slot", step.mean], self.register[step.dst]
        work = self.batch * channels * patches
        with emit.loop(channels, parallel=work >= emit.PARALLEL_WORK) as c:
            sums = _Sums(self, 1)
            with emit.loop(self.batch) as image:
                if not step.batch:
                    sums.clear()
                plane = T.bind((image * channels + c) * patches)

                def some(at: Any, count: int) -> None:
                    value = simd.load(source, plane + at, count) * simd.load(mean, plane + at, count)
                    sums.add(0, value, step.grid, at)

                _each_vector(patches, lanes, some)
                if not step.batch:
                    simd.store(target, image * channels + c, sums.total(0, step.grid))
            if step.batch:
                simd.store(target, c, sums.total(0, step.grid))

    def _gather(self, step: Gather) -> None:
        patches, channels = math.prod(step.grid.shape), step.channels
        target = self.register[step.dst]
        work = self.batch * channels * patches
        with emit.loop(self.batch * channels, parallel=work >= emit.PARALLEL_WORK) as plane:
            _clear(target, plane * patches, patches, self.lanes)
        for part in step.parts:
            with emit.loop(self.batch * part.width, parallel=work >= emit.PARALLEL_WORK) as k:
                plane = k // part.width * channels + part.start + k % part.width
                self._add_cells(part, k, target, T.bind(plane * patches), step.grid.shape[1])

    def _add_cells(self, part: Part, k: Any, target: Any, base: Any, columns: int) -> None:
        """Add one plane of a part, cell by cell. ``k``: the plane's number in the part."""
        floats, integers = self.given["floats", 0], self.given["integers", 0]
        at = [self.program.tables.place(values) for values in indices(part)]
        _, sh, sw = self.program.registers[part.src]
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


class _Together:
    """Steps that work element by element, in one loop over channels; a thread goes through a channel of all images."""

    def __init__(self, whole: _Backward, stage: Sequence[Step]) -> None:
        self.whole, self.stage = whole, stage
        self.program, self.batch, self.lanes = whole.program, whole.batch, whole.lanes
        found = space(stage[0], self.program.registers)
        assert found is not None
        self.channels, ph, pw = found
        self.patches = ph * pw
        # Steps that end in one number a channel.
        self.summed = [step for step in stage if isinstance(step, PatchSum | ConvWeight)]

    def emit(self) -> None:
        work = self.batch * self.channels * self.patches * len(self.stage)
        with emit.loop(self.channels, parallel=work >= emit.PARALLEL_WORK) as c:
            self.sums = _Sums(self.whole, len(self.summed))
            self.taps = {step: self._taps(step, c) for step in self.stage if isinstance(step, ConvInput)}
            with emit.loop(self.batch) as image:
                self.image, self.channel = image, c
                _each_vector(self.patches, self.lanes, self._vector)
            for k, step in enumerate(self.summed):
                self._finish(k, step, c)

    def _taps(self, step: ConvInput, c: Any) -> Any:
        """Sum over a depthwise convolution's window."""
        taps = math.prod(step.geometry.kernel)
        weight = self.whole.given["slot", step.weight]
        total = simd.load(weight, c * taps, 1)
        for k in range(1, taps):
            total = total + simd.load(weight, c * taps + k, 1)
        return T.bind(total)

    def _vector(self, at: Any, count: int) -> None:
        """All steps on ``count`` patches of one plane."""
        values: dict[tuple[str, int], Any] = {}

        def load(kind: str, number: int, buffer: Any, offset: Any) -> Any:
            if (kind, number) not in values:
                values[kind, number] = T.bind(simd.load(buffer, offset, count))
            return values[kind, number]

        plane = (self.image * self.channels + self.channel) * self.patches + at

        def register(number: int) -> Any:
            channels, ph, pw = self.program.registers[number]
            if ("register", number) not in values and (ph * pw, self.patches) != (1, 1) and ph * pw == 1:
                one = simd.load(self.whole.register[number], self.image * channels + self.channel, 1)
                values["register", number] = T.bind(simd.splat(one, count))
            if ("register", number) in values:
                return values["register", number]
            return load("register", number, self.whole.register[number], plane)

        def slot(number: int) -> Any:
            return load("slot", number, self.whole.given["slot", number], plane)

        def scale(step: TimesSaved) -> Any:
            shape = self.program.slots[step.slot]
            image = self.image * shape[1] if shape[0] > 1 else 0
            at = image + step.start + self.channel
            return simd.splat(simd.load(self.whole.given["slot", step.slot], at, 1), count)

        for step in self.stage:
            if isinstance(step, PatchSum):
                value = register(step.src) if step.mean is None else register(step.src) * slot(step.mean)
                self.sums.add(self.summed.index(step), value, step.grid, at)
                continue
            if isinstance(step, ConvWeight):
                self.sums.add(self.summed.index(step), register(step.src) * slot(step.filtered), None, at)
                continue
            if isinstance(step, Gather):
                value = None
                for part in step.parts:
                    term = register(part.src) if part.mean is None else register(part.src) * slot(part.mean)
                    value = term if value is None else value + term
            elif isinstance(step, Times):
                value = register(step.src) * simd.splat(step.factor, count)
            elif isinstance(step, TimesSaved):
                value = register(step.src) * scale(step)
            elif isinstance(step, Plus):
                value = register(step.a) + register(step.b)
            elif isinstance(step, ConvInput):
                value = register(step.src) * simd.splat(self.taps[step], count)
            else:
                assert isinstance(step, Channels)
                source = self.program.registers[step.src][0]
                plane_of = (self.image * source + step.start + self.channel) * self.patches
                value = simd.load(self.whole.register[step.src], plane_of + at, count)
            value = values["register", step.dst] = T.bind(value)
            if step.dst in self.whole.register:
                simd.store(self.whole.register[step.dst], plane, value)

    def _finish(self, k: int, step: PatchSum | ConvWeight, c: Any) -> None:
        key = ("tensor", step.tensor)
        target = self.whole.given[key]
        if isinstance(step, ConvWeight):
            taps = math.prod(step.geometry.kernel)
            total = T.bind(self.sums.total(k, None))
            for tap in range(taps):
                simd.store(target, c * taps + tap, total)
            return
        total = self.sums.total(k, step.grid)
        if key in self.whole.written or key in self.program.zeroed:
            total = total + simd.load(target, step.start + c, 1)
        self.whole.written.add(key)
        simd.store(target, step.start + c, total)


class _Sums:
    """Sums over patches, each times its number of pixels, in a register for each."""

    def __init__(self, whole: _Backward, count: int) -> None:
        self.whole, self.count, self.lanes = whole, count, whole.lanes
        if count:
            self.buffer = T.alloc_buffer((count * self.lanes,), ACC, scope="local")
            self.clear()

    def clear(self) -> None:
        for k in range(self.count):
            simd.store(self.buffer, k * self.lanes, simd.splat(0.0, self.lanes))

    def add(self, k: int, value: Any, grid: Grid | None, at: Any) -> None:
        """Add a vector of patches, from patch ``at`` of a plane on. ``grid``: None where pixels do not count."""
        count, start = simd.lanes_of(value), k * self.lanes
        if grid is not None and not uniform(grid):
            place = self.whole.program.tables.place(pixels(grid))
            value = value * simd.load(self.whole.given["floats", 0], place + at, count)
        simd.store(self.buffer, start, simd.load(self.buffer, start, count) + value)

    def total(self, k: int, grid: Grid | None) -> Any:
        """The sum of what was added."""
        total = emit.total(simd.load(self.buffer, k * self.lanes, self.lanes))
        if grid is None or not uniform(grid):
            return total
        return total * simd.splat(pixels(grid)[0], 1)


def _each_vector(count: int, lanes: int, visit: Callable[[Any, int], None]) -> None:
    """``visit(first, lanes)`` for vectors that cover ``count`` elements exactly."""
    whole = count // lanes
    if whole:
        with emit.loop(whole) as v:
            visit(v * lanes, lanes)
    for at, width in emit.pieces(count - whole * lanes, lanes):
        visit(whole * lanes + at, width)


def _clear(buffer: Any, base: Any, count: int, lanes: int) -> None:
    _each_vector(count, lanes, lambda at, width: simd.store(buffer, base + at, simd.splat(0.0, width)))


def _ranges(cuts: Cuts) -> list[range]:
    """Pixels of each patch."""
    return [range(a, b) for a, b in zip(cuts.points, cuts.points[1:], strict=False)]

"""A chain's backward pass in TVM's IR: one function, every step of which is a loop or two over what lies in the caches.

Steps that work element by element and follow each other share one loop over channels: a derivative's means are read
once for all that is multiplied with them, and what only the next step reads stays in registers. Products are the
sweeps of :mod:`gf_tvm.kernels.on_grid`, with the schedules that the logs have for them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from ..devices import DeviceProfile
from ..geometry import Geometry, ceil_div
from ..kernels import emit, maps, on_grid, simd
from ..kernels.stages import ACC
from ..kernels.strips import alignment, spreading
from ..schedules.cpu import STREAM_BYTES, tiles_of
from ..workload import Workload
from .compiled import Backward, Numbers, Tables, indices, pixels, scratch_of, space, uniform
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

#: Neighbouring channels that a thread takes through all images.
_CHANNELS = 8
#: Planes that a plane which is being pooled asks for, counted from itself.
_NEAR = 4


def emit_backward(program: Backward, profile: DeviceProfile, config_of: Callable[[Workload], dict[str, Any]]) -> Any:
    """The IRModule of ``program``: ``main``, which calls a function for each stage.

    Stages that do the same to other tensors share a function. In training every one of them runs once a step, its code
    long gone from the caches: fetching it takes as long as running it.
    """
    functions: dict[Any, tuple[tvm.ir.GlobalVar, Any]] = {}
    calls: list[tuple[tvm.ir.GlobalVar, list[Operand]]] = []
    written: set[tuple[str, int]] = set(program.zeroed)
    taken: dict[int, Operand] = {}  # registers that are gradients which came in
    for steps in program.stages:
        first = steps[0]
        if isinstance(first, Take):
            taken[first.dst] = ("grad", first.value)
            continue
        adds = []
        for step in steps:
            target = _target(step)
            adds.append(target in written)
            if target is not None:
                written.add(target)
        stage, operands = _stage_of(program, steps, tuple(adds))
        if stage not in functions:
            name = f"{program.key}_{len(functions)}"
            emitter = _Stage(stage, program.tables, profile, config_of)
            functions[stage] = tvm.ir.GlobalVar(name), emitter.function(name)
        variable, _ = functions[stage]
        calls.append((variable, [taken.get(k, (kind, k)) if kind == "register" else (kind, k) for kind, k in operands]))
    return tvm.IRModule({"main": _main(program, calls), **dict(functions.values())})


#: A tensor that a stage works on, (kind, number): a "register", or of the kinds of :class:`.compiled.Argument`.
Operand = tuple[str, int]


@dataclass(frozen=True)
class Stage:
    """Steps with numbers of their own: all that the code of a stage depends on.

    Attributes:
        steps: numbered anew, see :class:`.compiled.Numbers`.
        adds: by step, whether it adds to a gradient of a parameter or entry that holds something already.
        registers, values, slots: shapes. tensors: of parameters' gradients.
        stored: registers that are in memory, not known to this stage alone.
        floats, integers: lengths of the program's tables, if they are used.
    """

    batch: int
    steps: tuple[Step, ...]
    adds: tuple[bool, ...]
    registers: tuple[tuple[int, int, int], ...]
    values: tuple[tuple[int, ...], ...]
    slots: tuple[tuple[int, ...], ...]
    tensors: tuple[tuple[int, ...], ...]
    stored: frozenset[int]
    floats: int
    integers: int

    @property
    def sizes(self) -> dict[Operand, int]:
        """Elements of the tensors that the stage's function takes, in its order."""
        found = {("register", k): self.batch * math.prod(self.registers[k]) for k in sorted(self.stored)}
        incoming = [step.value for step in self.steps if isinstance(step, Filter)]
        found |= {("grad" if k in incoming else "entry", k): math.prod(shape) for k, shape in enumerate(self.values)}
        found |= {("slot", k): math.prod(shape) for k, shape in enumerate(self.slots)}
        found |= {("tensor", k): math.prod(shape) for k, shape in enumerate(self.tensors)}
        scratch = [
            sum(scratch_of(step.geometry))
            for step in self.steps
            if isinstance(step, ConvInput) and step.geometry.dilated
        ]
        found |= {("workspace", k): size for k, size in enumerate(scratch)}
        tables = {("floats", 0): self.floats, ("integers", 0): self.integers}
        return found | {key: size for key, size in tables.items() if size}


def _target(step: Step) -> Operand | None:
    """The gradient of a parameter or an entry that a step may add to."""
    if isinstance(step, PatchSum):
        return "tensor", step.tensor
    return ("entry", step.value) if isinstance(step, Expand) else None


def _stage_of(program: Backward, steps: Sequence[Step], adds: tuple[bool, ...]) -> tuple[Stage, list[Operand]]:
    """A stage, and the program's tensors that its function takes there."""
    numbers = Numbers("value", "slot", "tensor", "register")
    own = tuple(map(numbers.of, steps))
    old = {kind: tuple(known) for kind, known in numbers.known.items()}
    places, _ = program.places
    incoming = {step.dst for step in program.steps if isinstance(step, Take)}
    shapes = {argument.number: argument.shape for argument in program.arguments if argument.kind == "tensor"}
    uses_tables = any(isinstance(step, PatchSum | MapSum | Gather) for step in steps)
    stage = Stage(
        batch=program.batch,
        steps=own,
        adds=adds,
        registers=tuple(program.registers[k] for k in old["register"]),
        values=tuple(program.values[k] for k in old["value"]),
        slots=tuple(program.slots[k] for k in old["slot"]),
        tensors=tuple(shapes[k] for k in old["tensor"]),
        stored=frozenset(new for new, k in enumerate(old["register"]) if k in places or k in incoming),
        floats=len(program.tables.floats) if uses_tables else 0,
        integers=len(program.tables.integers) if uses_tables else 0,
    )
    kinds = {"grad": "value", "entry": "value"}
    return stage, [
        (kind, old[kinds.get(kind, kind)][k] if kinds.get(kind, kind) in old else 0) for kind, k in stage.sizes
    ]


def _main(program: Backward, calls: Sequence[tuple[tvm.ir.GlobalVar, list[Operand]]]) -> Any:
    """The function that takes the program's arguments and calls those of its stages."""
    with IRBuilder() as builder, T.prim_func():
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        # All parameters first: TVM takes none after anything else.
        parameters = [
            T.arg(
                f"{a.kind}{a.number}" if a.kind not in ("workspace", "floats", "integers") else a.kind,
                T.buffer(a.shape, "int32" if a.kind == "integers" else ACC),
            )
            for a in program.arguments
        ]
        keys = [(argument.kind, argument.number) for argument in program.arguments]
        given = {key: simd.flat(tensor) for key, tensor in zip(keys, parameters, strict=True)}
        places, _ = program.places

        def address(operand: Operand) -> Any:
            kind, number = operand
            at = 0
            if kind in ("register", "workspace"):
                at = places[number] if kind == "register" else program.scratch
                operand = "workspace", 0
            return tirx.address_of(tirx.BufferLoad(given[operand], [at]))

        with simd.streaming(ACC, shared=True):
            for variable, operands in calls:
                T.evaluate(variable(*map(address, operands)))
                # TVM tells LLVM that pointers of different names never meet, which holds within a stage only. What LLVM
                # inlines here must not read a register before the stage that writes it, by another name, has done so.
                simd.fence()
    return builder.get()


class _Stage:
    """Emits one stage's function."""

    def __init__(
        self,
        stage: Stage,
        tables: Tables,
        profile: DeviceProfile,
        config_of: Callable[[Workload], dict[str, Any]],
    ) -> None:
        self.stage, self.tables, self.profile, self.config_of = stage, tables, profile, config_of
        self.lanes: int = profile.lanes
        self.batch = stage.batch

    def function(self, name: str) -> Any:
        """The PrimFunc: takes pointers to the operands."""
        sizes = self.stage.sizes
        kinds = {key: "int32" if key[0] == "integers" else ACC for key in sizes}
        with IRBuilder() as builder, T.prim_func(is_private=True):
            T.func_name(name)
            T.func_attr({"tirx.noalias": True})
            T.func_ret(tvm.ir.PrimType("int32"))
            pointers = {key: T.arg("".join(map(str, key)), T.handle(kinds[key])) for key in sizes}
            buffers = {key: T.decl_buffer((size,), kinds[key], data=pointers[key]) for key, size in sizes.items()}
            self.register = {k: buffer for (kind, k), buffer in buffers.items() if kind == "register"}
            self.given = {key: buffer for key, buffer in buffers.items() if key[0] != "register"}
            with simd.streaming(ACC, shared=True):
                self._emit()
            # Where a parallel loop fails TVM's code returns, and that it does with a number.
            T.add_to_parent(tirx.Return(tirx.IntImm("int32", 0)))
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
            _Together(self).emit()
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
        scratch = self.given["workspace", 0]
        moved, by_tap = (
            T.decl_buffer((size,), ACC, data=scratch.data, elem_offset=at)
            for size, at in zip(sizes, (0, sizes[0]), strict=True)
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
        channels = self.stage.registers[step.src][0]
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


class _Together:
    """Steps that work element by element, in one loop.

    Planes that follow each other in memory follow each other in time, for what the forward pass kept comes from far
    away. Where steps end in a sum for each channel, a thread takes some neighbouring channels of all images.
    """

    def __init__(self, whole: _Stage) -> None:
        self.whole, self.stage = whole, whole.stage
        self.batch, self.lanes = whole.batch, whole.lanes
        found = space(self.stage.steps[0], self.stage.registers)
        assert found is not None
        self.channels, ph, pw = found
        self.patches = ph * pw
        # Steps that end in one number a channel, and whether they add to what is there.
        self.summed: dict[PatchSum | ConvWeight, bool] = {}
        for step, adds in zip(self.stage.steps, self.stage.adds, strict=True):
            if isinstance(step, PatchSum | ConvWeight):
                self.summed.setdefault(step, adds)

    def emit(self) -> None:
        parallel = self.batch * self.channels * self.patches * len(self.stage.steps) >= emit.PARALLEL_WORK
        if not self.summed:
            with emit.loop(self.batch * self.channels, parallel=parallel) as k:
                self._plane(k // self.channels, k % self.channels)
            return
        together = min(_CHANNELS, self.channels)
        with emit.loop(ceil_div(self.channels, together), parallel=parallel) as block:
            first = block * together
            count = together if self.channels % together == 0 else tirx.min(self.channels - first, together)
            self.sums = _Sums(self.whole, len(self.summed) * together)
            with emit.loop(self.batch) as image, T.serial(0, count) as c:
                self.place = c * len(self.summed)
                self._plane(image, first + c)
            with T.serial(0, count) as c:
                for k, (step, adds) in enumerate(self.summed.items()):
                    self._finish(c * len(self.summed) + k, step, adds, first + c)

    def _plane(self, image: Any, channel: Any) -> None:
        self.image, self.channel = image, channel
        self.taps = {step: self._taps(step, channel) for step in self.stage.steps if isinstance(step, ConvInput)}
        _each_vector(self.patches, self.lanes, self._vector)

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
            channels, ph, pw = self.stage.registers[number]
            if ("register", number) not in values and (ph * pw, self.patches) != (1, 1) and ph * pw == 1:
                one = simd.load(self.whole.register[number], self.image * channels + self.channel, 1)
                values["register", number] = T.bind(simd.splat(one, count))
            if ("register", number) in values:
                return values["register", number]
            return load("register", number, self.whole.register[number], plane)

        def slot(number: int) -> Any:
            return load("slot", number, self.whole.given["slot", number], plane)

        def scale(step: TimesSaved) -> Any:
            shape = self.stage.slots[step.slot]
            image = self.image * shape[1] if shape[0] > 1 else 0
            at = image + step.start + self.channel
            return simd.splat(simd.load(self.whole.given["slot", step.slot], at, 1), count)

        order = {step: k for k, step in enumerate(self.summed)}
        for step in self.stage.steps:
            if isinstance(step, PatchSum):
                value = register(step.src) if step.mean is None else register(step.src) * slot(step.mean)
                self.sums.add(self.place + order[step], value, step.grid, at)
                continue
            if isinstance(step, ConvWeight):
                self.sums.add(self.place + order[step], register(step.src) * slot(step.filtered), None, at)
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
                source = self.stage.registers[step.src][0]
                plane_of = (self.image * source + step.start + self.channel) * self.patches
                value = simd.load(self.whole.register[step.src], plane_of + at, count)
            value = values["register", step.dst] = T.bind(value)
            if step.dst in self.whole.register:
                simd.store(self.whole.register[step.dst], plane, value)

    def _finish(self, k: Any, step: PatchSum | ConvWeight, adds: bool, c: Any) -> None:
        target = self.whole.given["tensor", step.tensor]
        if isinstance(step, ConvWeight):
            taps = math.prod(step.geometry.kernel)
            total = T.bind(self.sums.total(k, None))
            for tap in range(taps):
                simd.store(target, c * taps + tap, total)
            return
        total = self.sums.total(k, step.grid)
        if adds:
            total = total + simd.load(target, step.start + c, 1)
        simd.store(target, step.start + c, total)


class _Sums:
    """Sums over patches, each times its number of pixels, in a register for each."""

    def __init__(self, whole: _Stage, count: int) -> None:
        self.whole, self.count, self.lanes = whole, count, whole.lanes
        if count:
            self.buffer = T.alloc_buffer((count * self.lanes,), ACC, scope="local")
            self.clear()

    def clear(self) -> None:
        with emit.loop(self.count) as k:
            simd.store(self.buffer, k * self.lanes, simd.splat(0.0, self.lanes))

    def add(self, k: Any, value: Any, grid: Grid | None, at: Any) -> None:
        """Add a vector of patches, from patch ``at`` of a plane on. ``grid``: None where pixels do not count."""
        count, start = simd.lanes_of(value), k * self.lanes
        if grid is not None and not uniform(grid):
            place = self.whole.tables.place(pixels(grid))
            value = value * simd.load(self.whole.given["floats", 0], place + at, count)
        simd.store(self.buffer, start, simd.load(self.buffer, start, count) + value)

    def total(self, k: Any, grid: Grid | None) -> Any:
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

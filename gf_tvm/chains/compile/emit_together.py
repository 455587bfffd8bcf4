"""Steps that work element by element and follow each other, in one loop.

A derivative's means are read once for all that is multiplied with them, and what only the next step reads stays in
registers.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from ...core.geometry import ceil_div
from ...kernels.cpu import emit, simd
from ...kernels.stages import ACC
from ..plan.grids import Grid, pixels, uniform
from ..plan.steps import Channels, ConvInput, ConvWeight, Gather, PatchSum, Plus, Times, TimesSaved
from .stage import StageCode
from .traversal import space

#: Neighbouring channels that a thread takes through all images.
_CHANNELS = 8


class Together:
    """Steps that work element by element, in one loop.

    Planes that follow each other in memory follow each other in time, for what the forward pass kept comes from far
    away. Where steps end in a sum for each channel, a thread takes some neighbouring channels of all images.
    """

    def __init__(self, whole: StageCode) -> None:
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
            self.sums = Sums(self.whole, len(self.summed) * together)
            with emit.loop(self.batch) as image, T.serial(0, count) as c:
                self.place = c * len(self.summed)
                self._plane(image, first + c)
            with T.serial(0, count) as c:
                for k, (step, adds) in enumerate(self.summed.items()):
                    self._finish(c * len(self.summed) + k, step, adds, first + c)

    def _plane(self, image: Any, channel: Any) -> None:
        self.image, self.channel = image, channel
        self.taps = {step: self._taps(step, channel) for step in self.stage.steps if isinstance(step, ConvInput)}
        emit.each_vector(self.patches, self.lanes, self._vector)

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


class Sums:
    """Sums over patches, each times its number of pixels, in a register for each."""

    def __init__(self, whole: StageCode, count: int) -> None:
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

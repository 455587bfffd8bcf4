"""The code of a convolution whose weights are packed in every call. Needs TVM; imported when a program is built."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from ..core.geometry import Geometry
from ..kernels.cpu import emit, simd
from ..kernels.stages import ACC
from .emit_steps import Products, combined, private_function, step_function
from .steps import Convolution, Enter, Leave, Winograd
from .tiling import Cut, cuts
from .winograd import TAPS, matrices


def emit_convolution(geometry: Geometry, bias: bool, steps: tuple[Enter, Convolution, Leave], name: str) -> Any:
    """The IRModule of a convolution by these steps, whose functions are called ``name`` and what they do."""
    enter, step, leave = steps
    lanes = step.dst.block

    together = packs_by_tiles(step)
    names = [f"{name}_{what}" for what in ("enter", "multiply", "leave", *([] if together else ["pack"]))]
    functions = [
        step_function(enter, names[0], lanes, _no_function),
        _own_weights_function(step, names[1], bias) if together else step_function(step, names[1], lanes, _no_function),
        step_function(leave, names[2], lanes, _no_function),
        *([] if together else [_pack_function(step, names[3], bias)]),
    ]
    variables = [tvm.ir.GlobalVar(name) for name in names]
    g = geometry
    with IRBuilder() as builder, T.prim_func():
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        shapes = [("x", g.x_shape), ("weight", g.weight_shape), *([("bias", (g.co,))] if bias else [])]
        parameters = [T.arg(name, T.buffer(shape, ACC)) for name, shape in (*shapes, ("y", g.y_shape))]
        x, weight, *biases, y = map(simd.flat, parameters)

        def call(variable: tvm.ir.GlobalVar, *buffers: Any) -> None:
            T.evaluate(variable(*(tirx.address_of(tirx.BufferLoad(buffer, [0])) for buffer in buffers)))
            # See chains.compile.emit_backward: pointers of different names never meet within a step only.
            simd.fence()

        with simd.streaming(ACC, shared=True):
            read = T.alloc_buffer((g.n * enter.dst.image,), ACC)
            made = T.alloc_buffer((g.n * step.dst.image,), ACC)
            call(variables[0], x, read)
            if together:
                call(variables[1], read, weight, *biases, made)
            else:
                packed = T.alloc_buffer((step.weights,), ACC)
                call(variables[3], weight, *biases, packed)
                call(variables[1], read, packed, made)
            call(variables[2], made, y)
    return tvm.IRModule({"main": builder.get(), **dict(zip(variables, functions, strict=True))})


def packs_by_tiles(step: Convolution) -> bool:
    """Whether tasks pack the weights of their own tile of output channels, which then need not leave their caches."""
    return step.tile.by_channels and not isinstance(step, Winograd) and not step.depthwise


def _own_weights_function(step: Convolution, name: str, bias: bool) -> Any:
    """The PrimFunc of a convolution that packs its weights: takes pointers to map, weight, bias and result."""
    taps = step.kernel[0] * step.kernel[1]
    sizes = {"src0": step.images * step.srcs[0].image, "weights": step.dst.channels * step.depth * taps}
    sizes |= {"bias": step.dst.channels} if bias else {}
    sizes["dst"] = step.images * step.dst.image
    return private_function(
        name, sizes, lambda buffers: _OwnWeights(step, buffers, step.dst.block, _no_function).emit()
    )


def _no_function(kind: str, *_: Any) -> Any:
    raise AssertionError(f"no {kind} comes after it")


class _OwnWeights(Products):
    """Products, by channels, whose tasks pack the weights of their tile."""

    def packed(self, family: Cut, weights: int, k: Any) -> Any:
        step, lanes, wide = self.step, self.dst.block, family.size * self.dst.block
        panel = T.alloc_buffer((wide * step.depth * step.taps,), ACC)
        packing = _Packing(step, step.taps, {"weight": self.buffers["weights"], "packed": panel})
        for v in range(family.size):
            packing.ordered(T.bind(family.start + k * family.size + v), v * lanes, wide)
        self.weights = panel
        return 0

    def bias(self, block: Any, vectors: int) -> list[Any]:
        lanes, channels = self.dst.block, self.dst.channels
        if "bias" not in self.buffers:
            return [simd.splat(0.0, lanes)] * vectors
        if channels % lanes == 0:
            return [T.bind(simd.load(self.buffers["bias"], (block + v) * lanes, lanes)) for v in range(vectors)]
        # The last block is not full, and what is beyond the bias is not ours to read.
        found = []
        for v in range(vectors):
            values = T.alloc_buffer((lanes,), ACC, scope="local")
            for lane in range(lanes):
                channel = tirx.min((block + v) * lanes + lane, channels - 1)
                simd.store(values, lane, simd.load(self.buffers["bias"], channel, 1))
            found.append(simd.load(values, 0, lanes))
        return found


def _pack_function(step: Convolution, name: str, bias: bool) -> Any:
    """The PrimFunc that packs parameters as :func:`.packing.pack` does: takes pointers to weight, bias and result."""
    taps = step.kernel[0] * step.kernel[1]
    sizes = {"weight": step.dst.channels * step.depth * taps, **({"bias": step.dst.channels} if bias else {})}
    sizes["packed"] = step.weights
    return private_function(name, sizes, lambda buffers: _Packing(step, taps, buffers).emit())


class _Packing:
    def __init__(self, step: Convolution, taps: int, buffers: dict[str, Any]) -> None:
        self.step, self.taps, self.buffers = step, taps, buffers
        self.lanes = step.dst.block
        #: Weights of an output channel: input channels, and of each its taps.
        self.columns = step.depth * taps

    def emit(self) -> None:
        """Emit it whole."""
        step, lanes = self.step, self.lanes
        with emit.loop(step.dst.blocks) as block, emit.loop(lanes) as lane:
            value: Any = tirx.const(0.0, ACC)
            if "bias" in self.buffers:
                value = simd.load(self.buffers["bias"], self._channel(block * lanes + lane), 1)
            simd.store(self.buffers["packed"], step.bias_at + block * lanes + lane, value)
        if step.depthwise:
            with emit.loop(step.dst.blocks, parallel=True) as block:
                for tap in range(self.taps):
                    self._gather(block, tap, self.step.taps * block * lanes + tap * lanes)
            return
        at = 0
        for family in cuts(step.dst.blocks, step.tile.vectors):
            with emit.loop(family.count * family.size, parallel=True) as number:
                block = T.bind(family.start + number)
                tile, v = T.bind(number // family.size), T.bind(number % family.size)
                if isinstance(step, Winograd):
                    self._transformed(family, block, at, tile, v)
                else:
                    first = at + tile * (family.size * lanes * self.columns) + v * lanes
                    self.ordered(block, first, family.size * lanes)
            at += family.count * family.size * lanes * (step.depth if isinstance(step, Winograd) else self.columns)

    def _channel(self, channel: Any) -> Any:
        """An output channel; what fills up the last block is as the last one."""
        channels = self.step.dst.channels
        return channel if channels % self.lanes == 0 else tirx.min(channel, channels - 1)

    def _gather(self, block: Any, column: Any, to: Any) -> None:
        """One column of a block's rows, element by element."""
        for lane in range(self.lanes):
            row = self._channel(block * self.lanes + lane)
            value = simd.load(self.buffers["weight"], row * self.columns + column, 1)
            simd.store(self.buffers["packed"], to + lane, value)

    def _square(self, block: Any, column: Any) -> list[Any]:
        """As many neighbouring columns of a block's rows as there are lanes, each in a register."""
        rows = [T.bind(self._channel(block * self.lanes + lane) * self.columns + column) for lane in range(self.lanes)]
        return emit.transposed([T.bind(simd.load(self.buffers["weight"], row, self.lanes)) for row in rows])

    def ordered(self, block: Any, first: Any, wide: int) -> None:
        """By blocks of input channels, taps and channels; ``wide``: from one input channel to the next."""
        step, lanes, taps = self.step, self.lanes, self.taps
        inner = step.srcs[0].block
        whole = step.depth // inner * inner

        def place(column: Any) -> Any:
            channel, tap = column // taps, column % taps
            among = (channel // inner * taps + tap) * inner + channel % inner
            if whole == step.depth:
                return first + among * wide
            rest = whole * taps + tap * (step.depth - whole) + channel - whole
            return first + tirx.Select(tirx.LT(channel, whole), among, rest) * wide

        if self.columns < lanes:
            for column in range(self.columns):
                self._gather(block, column, place(tirx.IntImm("int32", column)))
            return

        def square(column: Any) -> None:
            for k, value in enumerate(self._square(block, column)):
                simd.store(self.buffers["packed"], place(column + k), value)

        with emit.loop(self.columns // lanes) as k:
            square(T.bind(k * lanes))
        if self.columns % lanes:
            square(tirx.IntImm("int32", self.columns - lanes))

    def _transformed(self, family: Cut, block: Any, at: int, tile: Any, v: Any) -> None:
        """G g G^T of every input channel, as many channels at a time as there are lanes."""
        step, lanes = self.step, self.lanes
        assert isinstance(step, Winograd)
        g, n, wide = matrices(step.outputs)[1], step.points, family.size * lanes
        stride = step.bias_at // step.taps
        local = T.alloc_buffer((self.taps * lanes * lanes,), ACC)

        def some(channel: Any) -> None:
            with emit.loop(self.taps) as k:
                for i, value in enumerate(self._square(block, T.bind(channel * self.taps + k * lanes))):
                    simd.store(local, (k * lanes + i) * lanes, value)
            with emit.loop(lanes) as c:
                start = T.bind(c * (self.taps * lanes))
                tap = [
                    [simd.load(local, start + (y * TAPS + x) * lanes, lanes) for x in range(TAPS)] for y in range(TAPS)
                ]
                columns = [combined(g, [tap[y][x] for y in range(TAPS)]) for x in range(TAPS)]
                to = T.bind(at + tile * (wide * step.depth) + (channel + c) * wide + v * lanes)
                for y in range(n):
                    for x, value in enumerate(combined(g, [columns[k][y] for k in range(TAPS)])):
                        simd.store(self.buffers["packed"], to + (y * n + x) * stride, value)

        with emit.loop(step.depth // lanes) as k:
            some(T.bind(k * lanes))
        if step.depth % lanes:
            some(tirx.IntImm("int32", step.depth - lanes))

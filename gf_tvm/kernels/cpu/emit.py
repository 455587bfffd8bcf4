"""What the CPU kernels are written with besides vectors: the frame of a function, its loops, small pieces of code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from ...core.workload import Workload
from ...errors import BuildError
from ..stages import ACC
from . import simd
from .strips import power_of_two

#: Work (multiplications, or elements moved) below which a loop is done before a sleeping thread has woken up to help.
PARALLEL_WORK = 16384


@contextmanager
def function() -> Iterator[Callable[[], Any]]:
    """Everything emitted inside is the function ``main``; afterwards what is yielded gives its IRModule."""
    with IRBuilder() as builder, T.prim_func():
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        yield lambda: tvm.IRModule({"main": builder.get()})


def arguments(workload: Workload) -> dict[str, Any]:
    """The function's parameters, in the order in which kernels take them, as flat memory."""
    geometry, dtype, kernel = workload.geometry, workload.dtype, workload.kernel
    found: list[tuple[str, tuple[int, ...], str]] = []
    g, grad_x_grid = (geometry.n, geometry.co, *geometry.grid), (geometry.n, geometry.ci, *geometry.grid)
    if kernel == "filter_input":
        found += [("x", geometry.x_shape, dtype), ("filtered_x", geometry.saved_shape, ACC)]
    elif kernel == "input_grad":
        found += [("g", g, ACC), ("weight", geometry.weight_shape, dtype), ("grad_x_grid", grad_x_grid, ACC)]
    elif kernel == "weight_grad":
        found += [("g", g, ACC), ("saved", geometry.saved_shape, ACC), ("grad_w", geometry.weight_shape, dtype)]
    elif workload.pools_grad:
        with_x, with_w = workload.gives_x, workload.gives_w
        found += [("grad_y", geometry.y_shape, dtype)]
        found += [("saved", geometry.saved_shape, ACC)] if with_w else []
        found += [("weight", geometry.weight_shape, dtype)] if with_x else []
        found += [("grad_x", geometry.x_shape, dtype)] if with_x else []
        found += [("grad_w", geometry.weight_shape, dtype)] if with_w else []
        found += [("grad_b", (geometry.co,), dtype)]
    else:
        raise BuildError(f"CPUs have no code for the kernel {kernel!r}")
    # All of them first: TVM takes no parameters after anything else.
    tensors = {name: T.arg(name, T.buffer(shape, kind)) for name, shape, kind in found}
    return {name: simd.flat(tensor) for name, tensor in tensors.items()}


def threads() -> Any:
    """How many threads a parallel loop has when the kernel runs."""
    return tirx.call_packed("runtime.NumThreads")


@contextmanager
def loop(extent: int, parallel: bool = False) -> Iterator[Any]:
    """A loop, or no loop where it would run once."""
    if extent == 1 and not parallel:
        yield 0
    else:
        with (T.parallel if parallel else T.serial)(0, extent) as variable:
            yield variable


def unrolled(extent: int, times: int, emit: Callable[[Any], None]) -> None:
    """A loop whose body is written out ``times`` times; what does not divide comes after it."""
    times = min(times, extent)
    if extent // times:
        with loop(extent // times) as outer:
            for place in range(times):
                emit(outer * times + place)
    for k in range(extent // times * times, extent):
        emit(k)


def pieces(count: int, lanes: int) -> list[tuple[int, int]]:
    """(start, lanes) of vectors, powers of two, that cover ``count`` elements exactly."""
    found, at = [], 0
    while at < count:
        width = min(lanes, power_of_two(count - at))
        found.append((at, width))
        at += width
    return found


def each_vector(count: int, lanes: int, visit: Callable[[Any, int], None]) -> None:
    """``visit(first, lanes)`` for vectors, powers of two, that cover ``count`` elements exactly."""
    whole = count // lanes
    if whole:
        with loop(whole) as v:
            visit(v * lanes, lanes)
    for at, width in pieces(count - whole * lanes, lanes):
        visit(whole * lanes + at, width)


def clear(target: Any, to: Any, count: int, lanes: int) -> None:
    """Set neighbouring elements to zero."""
    each_vector(count, lanes, lambda at, width: simd.store(target, to + at, simd.splat(0.0, width)))


def copy(target: Any, to: Any, source: Any, start: Any, count: int, lanes: int) -> None:
    """Copy ``count`` neighbouring elements."""
    for at, width in pieces(count, lanes):
        simd.store(target, to + at, simd.load(source, start + at, width))


def total(value: Any) -> Any:
    """Sum of a vector's lanes, halving it."""
    lanes = simd.lanes_of(value)
    while lanes > 1:
        lanes //= 2
        value = T.bind(value)
        value = simd.pick([value], range(lanes)) + simd.pick([value], range(lanes, 2 * lanes))
    return value


def transposed(columns: Sequence[Any]) -> list[Any]:
    """Rows of a square of as many vectors as they have lanes, by exchanging ever smaller squares."""
    rows, size = list(columns), len(columns)
    half = size // 2
    while half:
        for i in range(size):
            if not i & half:
                a, b = rows[i], rows[i + half]
                swap = [lane if not lane & half else size + lane - half for lane in range(size)]
                back = [lane + half if not lane & half else size + lane for lane in range(size)]
                rows[i], rows[i + half] = T.bind(simd.pick([a, b], swap)), T.bind(simd.pick([a, b], back))
        half //= 2
    return rows

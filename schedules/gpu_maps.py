"""What all GPU schedules are made of: maps with a thread for each patch, and sums.

Neighbouring threads are at neighbouring addresses; a row of a patch is one load or store; a sum is a register.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir

from gf_tvm.core.geometry import Geometry
from gf_tvm.kernels.gpu.unfused import SUM_THREADS

#: Threads of a block where there is nothing to choose.
THREADS = 256


def new_schedule(func: Any) -> s_tir.Schedule:
    return s_tir.Schedule(tvm.IRModule({"main": func}))


def compute_at(sch: s_tir.Schedule, block: Any, loop: Any, scope: str) -> None:
    """Compute a stage in ``loop`` into memory of ``scope``: first the scope, which says for how many threads."""
    sch.set_scope(block, 0, scope)
    sch.compute_at(block, loop, preserve_unit_loops=True)


def _bind(sch: s_tir.Schedule, loop: Any, threads: int) -> Any:
    """Spread a loop over blocks of threads; returns the loop of threads."""
    block, thread = sch.split(loop, [None, min(threads, THREADS)])
    sch.bind(block, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    return thread


def map_blocks(sch: s_tir.Schedule, block: Any, axes: int, threads: int = THREADS) -> Any:
    """Bind a stage's first ``axes`` loops; returns the loop of threads."""
    return _bind(sch, sch.fuse(*sch.get_loops(block)[:axes]), threads)


def map_of_sums(sch: s_tir.Schedule, block: Any, axes: int, threads: int = THREADS) -> Any:
    """As :func:`_map` for a stage that sums: in a register, which is stored at the end."""
    local = sch.cache_write(block, 0, "local")
    thread = map_blocks(sch, local, axes, threads)
    sch.compute_at(block, thread, preserve_unit_loops=True)
    return thread


def bind_threads(sch: s_tir.Schedule, loop: Any, threads: int) -> Any:
    """Share a loop of a block among its threads."""
    _, thread = sch.split(loop, [None, threads])
    sch.bind(thread, "threadIdx.x")
    return thread


def vector_width(exact: bool, width: int) -> int:
    """Pixels of one load or store of a patch's row (``width`` pixels); 1 where its address or its edge forbids more."""
    if not exact:
        return 1
    return next(v for v in (4, 2, 1) if width % v == 0)


def mean_vector(geometry: Geometry) -> int:
    cols = geometry.cols
    return vector_width(cols.out_exact, cols.patch)


def pool(sch: s_tir.Schedule, pixels: Any, pooled: Any, vector: int) -> None:
    """Sum the pixels of a patch in one thread, row by row, each row in vector loads."""
    a, b = sch.get_loops(pooled)[-2:]
    sch.unroll(b)
    if vector == 1:
        sch.compute_inline(pixels)
        sch.unroll(a)
        return
    compute_at(sch, pixels, a, "local")
    row = sch.get_loops(pixels)[-1]
    outer, inner = sch.split(row, [None, vector])
    sch.unroll(outer)
    sch.vectorize(inner)
    sch.unroll(a)


def store_patch(sch: s_tir.Schedule, grad_x: Any, geometry: Geometry) -> None:
    """Write one value to all pixels of its patch, a row in vector stores."""
    a, b = sch.get_loops(grad_x)[-2:]
    cols = geometry.cols
    vector = vector_width(cols.in_exact, cols.window)
    outer, inner = sch.split(b, [None, vector])
    if vector > 1:
        sch.vectorize(inner)
    else:
        sch.unroll(inner)
    sch.unroll(outer)
    sch.unroll(a)


def channel_sum(sch: s_tir.Schedule, name: str, last: str, maps: int) -> None:
    """Schedule the steps of :mod:`gf_tvm.kernels.gpu`'s sums over channels; ``last`` stores ``NAME_sum``'s result."""
    at = None
    for step in ("block", "last", "threads"):
        block = sch.get_sblock(f"{name}_{step}")
        copy = sch.cache_write(block, 0, "local")
        if at is None:
            at = sch.fuse(*sch.get_loops(copy)[:2])
            sch.bind(at, "blockIdx.x")
            loop = sch.add_unit_loop(copy)  # it stores a single value
        else:
            compute_at(sch, copy, at, "shared")
            loop = sch.get_loops(copy)[-1]
        sch.compute_at(block, bind_threads(sch, loop, SUM_THREADS), preserve_unit_loops=True)
    total = sch.get_sblock(f"{name}_sum")
    compute_at(sch, total, map_blocks(sch, sch.get_sblock(last), maps), "local")

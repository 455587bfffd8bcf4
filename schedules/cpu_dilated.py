"""Schedules of dilated convolutions' backward pass on CPUs, for the stages of :mod:`gf_tvm.kernels.cpu.dilated`."""

from __future__ import annotations

import math
from typing import Any

import tvm
from tvm import s_tir

from gf_tvm.core.geometry import Geometry, ceil_div
from gf_tvm.core.workload import Workload
from gf_tvm.kernels.cpu import dilated
from gf_tvm.kernels.cpu.emit import PARALLEL_WORK
from gf_tvm.machine.profiles import DeviceProfile

from .space import Config, Space

#: Loops over at most this many pixels are unrolled: conditions at the edge of a map then vanish at compile time.
UNROLLED_PIXELS = 64


def divisors(number: int, most: int) -> tuple[int, ...]:
    """Divisors of ``number`` up to ``most``, ascending."""
    return tuple(d for d in range(1, min(number, most) + 1) if number % d == 0)


def _largest(values: tuple[int, ...], most: int) -> int:
    """The largest value up to ``most``, else the smallest there is."""
    return max((v for v in values if v <= most), default=min(values))


def _schedule(func: Any) -> s_tir.Schedule:
    return s_tir.Schedule(tvm.IRModule({"main": func}))


def _vectorize_inner(sch: s_tir.Schedule, loop: Any, extent: int, lanes: int) -> None:
    """Split a loop whose extent is a multiple of ``lanes`` into registers, unrolled, and vectorise it.

    Never wider than one register: TVM scalarises vectors whose length is no power of two.
    """
    outer, inner = sch.split(loop, [extent // lanes, lanes])
    sch.unroll(outer)
    sch.vectorize(inner)


def _pool(sch: s_tir.Schedule, block: Any, window: tuple[int, int], exact_columns: bool) -> None:
    """Unroll the window of a pooling stage; the row is left to LLVM, which turns strided loads into shuffles."""
    *_, j, a, b = sch.get_loops(block)
    if window[0] * window[1] <= UNROLLED_PIXELS:
        sch.unroll(a)
        sch.unroll(b)
        if not exact_columns and int(sch.get(j).extent) * window[1] <= UNROLLED_PIXELS:
            sch.unroll(j)


def _expand(sch: s_tir.Schedule, j: Any, b: Any, geometry: Geometry) -> None:
    """Unroll the copies of one value along the row, and the row itself where its edges need conditions."""
    columns = geometry.cols
    if columns.window <= UNROLLED_PIXELS:
        sch.unroll(b)
        if not columns.in_exact and columns.patches * columns.window <= UNROLLED_PIXELS:
            sch.unroll(j)


def _parallel_outer(sch: s_tir.Schedule, block: Any, count: int) -> None:
    """Share the ``count`` outer loops of a stage between the threads, if it is long enough for that."""
    loops = sch.get_loops(block)
    if math.prod(int(sch.get(loop).extent) for loop in loops) >= PARALLEL_WORK:
        sch.parallel(sch.fuse(*loops[:count]))


def backward(workload: Workload, profile: DeviceProfile) -> Space:
    """``backward`` and ``backward_input``; knobs: :class:`gf_tvm.kernels.cpu.dilated.Tiles`, chunks, unrolling."""
    geometry, lanes = workload.geometry, profile.lanes
    if geometry.depthwise:
        return Space({}, {}, lambda _: _depthwise_schedule(workload))
    cig, cog = geometry.ci_group, geometry.co_group
    patches = math.prod(geometry.grid)
    knobs: dict[str, tuple[int, ...]] = {"ci": divisors(cig, 64)}
    if workload.kernel == "backward":
        widest = max(ceil_div(cig, lanes), 1) * lanes
        knobs["cv"] = tuple(v for v in (lanes, 2 * lanes, 3 * lanes, 4 * lanes) if v <= widest)
        knobs["co"] = divisors(cog, 16)
        knobs["unroll_m"] = tuple(u for u in (1, 2, 4) if patches % u == 0)
        knobs["chunks"] = divisors(cog, 16)

    def rule(config: Config) -> bool:
        if workload.kernel == "backward_input":
            return True
        wide = config["cv"] // lanes
        if wide * config["co"] + wide + 1 > profile.registers:
            return False
        return (cog // config["co"]) % config["chunks"] == 0

    def build(config: Config) -> s_tir.Schedule:
        return _schedule_of(workload, profile, config)

    default = {"ci": _largest(knobs["ci"], 64)}
    if workload.kernel == "backward":
        default["cv"] = _largest(knobs["cv"], 2 * lanes)
        # As many rows of sums as the registers hold, but tiles for every thread.
        high = [co for co in knobs["co"] if co <= (profile.registers - 4) // 2]
        threads = profile.threads or 1
        default["co"] = min(high, key=lambda co: (_unbalanced(geometry.groups * (cog // co), threads), -co))
        default["unroll_m"] = max(knobs["unroll_m"])
        chunks = tuple(c for c in knobs["chunks"] if (cog // default["co"]) % c == 0)
        default["chunks"] = min(chunks, key=lambda c: (_unbalanced(geometry.groups * c, max(threads, 4)), c))
    assert rule(default), default
    return Space(knobs, default, build, rule)


def _unbalanced(pieces: int, threads: int) -> float:
    """How much longer the thread with the most pieces takes than if all had the same."""
    return ceil_div(pieces, threads) * threads / pieces


def _schedule_of(workload: Workload, profile: DeviceProfile, config: Config) -> s_tir.Schedule:
    geometry, lanes = workload.geometry, profile.lanes
    tiles = dilated.Tiles(ci=config["ci"], co=config.get("co", 1), cv=config.get("cv", lanes))
    sch = _schedule(dilated.backward(workload, tiles))
    pooled = sch.get_sblock("g")
    # First of all: once a reduction is split into its parts, TVM can no longer prove the loop parallel.
    sch.parallel(sch.get_loops(pooled)[0])
    _pool(sch, pooled, geometry.patch, geometry.cols.out_exact)
    _input_grad(sch, geometry, tiles, lanes)
    part = sch.get_sblock("bias_part")
    _, o, j, q = sch.get_loops(part)
    sch.reorder(o, q, j)
    if workload.kernel == "backward":
        _weight_grad(sch, geometry, tiles, lanes, config["unroll_m"], config["chunks"])
    columns = sch.get_sblock("bias_columns")
    o, j, b = sch.get_loops(columns)
    sch.reorder(o, b, j)
    _parallel_outer(sch, columns, 1)
    return sch


def _input_grad(sch: s_tir.Schedule, geometry: Geometry, tiles: dilated.Tiles, lanes: int) -> None:
    """The product is a small convolution: sums of one patch for a tile of channels stay in registers."""
    taps, product, out = (sch.get_sblock(n) for n in ("taps", "grad_x_grid", "grad_x"))
    _parallel_outer(sch, taps, 5)
    _, q, c, a, j, b = sch.get_loops(out)
    tile, c = sch.split(c, [None, tiles.ci])
    sch.reorder(tile, c, q, a, j, b)
    _expand(sch, j, b, geometry)
    sch.compute_at(product, tile, preserve_unit_loops=True)
    *_, c, m, ka, kb, o = sch.get_loops(product)
    sch.reorder(m, ka, kb, o, c)
    sums = sch.cache_write(product, 0, "global")
    sch.reverse_compute_at(sums, m, preserve_unit_loops=True)
    if tiles.ci % lanes == 0:
        _vectorize_inner(sch, c, tiles.ci, lanes)
    sch.decompose_reduction(product, ka)


def _weight_grad(
    sch: s_tir.Schedule, geometry: Geometry, tiles: dilated.Tiles, lanes: int, unroll: int, chunks: int
) -> None:
    """Threads share the output channels; each goes through all blocks, a packed panel of x~ at a time."""
    panel, part, total = (sch.get_sblock(n) for n in ("panel_x", "weight_part", "weight_sum"))
    p, t, tv, o, v, b = sch.get_loops(total)
    chunk, t = sch.split(t, [chunks, None])
    v_outer, v_inner = sch.split(v, [None, lanes])
    sch.reorder(p, chunk, b, tv, t, o, v_outer, v_inner)
    outer = sch.fuse(p, chunk)
    sch.parallel(outer)
    sch.compute_at(part, t, preserve_unit_loops=True)
    sch.compute_at(panel, tv, preserve_unit_loops=True)
    if geometry.ci_group % tiles.cv == 0:
        _vectorize_inner(sch, sch.get_loops(panel)[-1], tiles.cv, lanes)
    *_, po, pv, m = sch.get_loops(part)
    m, m_inner = sch.split(m, [None, unroll])
    sch.reorder(m, m_inner, po, pv)
    _vectorize_inner(sch, pv, tiles.cv, lanes)
    sch.unroll(po)
    sch.unroll(m_inner)
    sch.decompose_reduction(part, m)
    sch.vectorize(v_inner)
    sch.unroll(v_outer)
    sch.unroll(o)
    sch.decompose_reduction(total, b)
    out = sch.get_sblock("grad_w")
    *_, ka, kb = sch.get_loops(out)
    if geometry.kernel[0] * geometry.kernel[1] <= UNROLLED_PIXELS:
        sch.unroll(ka)
        sch.unroll(kb)
    _parallel_outer(sch, out, 1)


def _depthwise_schedule(workload: Workload) -> s_tir.Schedule:
    """Plane by plane, everything of a plane while it is in cache."""
    geometry = workload.geometry
    sch = _schedule(dilated.depthwise_backward(workload))
    pooled = sch.get_sblock("g")
    sch.parallel(sch.get_loops(pooled)[0])
    _pool(sch, pooled, geometry.patch, geometry.cols.out_exact)
    *_, j, b = sch.get_loops(sch.get_sblock("grad_x"))
    _expand(sch, j, b, geometry)
    weights = workload.kernel == "backward"
    for name in ["bias_part"] + (["weight_part"] if weights else []):
        _, j, i = sch.get_loops(sch.get_sblock(name))
        sch.reorder(i, j)
    for name in ["bias_sum"] + (["weight_sum"] if weights else []):
        _parallel_outer(sch, sch.get_sblock(name), 1)
    return sch

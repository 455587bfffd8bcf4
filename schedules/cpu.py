"""Spaces for CPUs with vector registers: AVX2, AVX-512, NEON; the profile says how wide and how many."""

from __future__ import annotations

import math
from typing import Any

import tvm
from tvm import s_tir

from gf_tvm.devices import DeviceProfile
from gf_tvm.geometry import Geometry, ceil_div
from gf_tvm.kernels import definition, fused
from gf_tvm.workload import Workload

from .space import Config, Space

#: A stage of fewer steps is done before a sleeping thread has woken up to help.
PARALLEL_STEPS = 16384
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
    if math.prod(int(sch.get(loop).extent) for loop in loops) >= PARALLEL_STEPS:
        sch.parallel(sch.fuse(*loops[:count]))


# --- kernels without choices -----------------------------------------------------------------------------------------


def plain(workload: Workload, profile: DeviceProfile) -> Space:
    """The plain definition, outer loops parallel: for kernels that are a sweep over memory or not worth a space."""

    def build(_: Config) -> s_tir.Schedule:
        sch = s_tir.Schedule(definition(workload))
        for block in sch.get_child_blocks(sch.get_sblock("root")):
            loops = sch.get_loops(block)
            spatial = sum(1 for axis in sch.get(block).iter_vars if int(axis.iter_type) == 0)
            _parallel_outer(sch, block, max(1, min(spatial, len(loops) - 1)))
        return sch

    return Space({}, {}, build)


# --- the forward pass' pooling ---------------------------------------------------------------------------------------


def filter_input(workload: Workload, profile: DeviceProfile) -> Space:
    """x -> x~ with channels last. ``channels``: pooled together before they are transposed."""
    geometry = workload.geometry
    tiles = tuple(c for c in divisors(geometry.ci, 512) if c >= min(8, geometry.ci)) or (geometry.ci,)

    def build(config: Config) -> s_tir.Schedule:
        sch = _schedule(fused.filter_input(workload))
        pooled, out = sch.get_sblock("pooled"), sch.get_sblock("filtered_x")
        _pool(sch, pooled, (geometry.rows.window, geometry.cols.window), geometry.cols.in_exact)
        q, j, c = sch.get_loops(out)
        outer, c = sch.split(c, [None, config["channels"]])
        sch.reorder(outer, j, c)
        sch.compute_at(pooled, outer, preserve_unit_loops=True)
        if config["by_column"]:
            sch.reorder(c, j)
        sch.parallel(q)
        return sch

    knobs = {"channels": tiles, "by_column": (0, 1)}
    return Space(knobs, {"channels": _largest(tiles, 64), "by_column": 0}, build)


# --- backward, dense and grouped -------------------------------------------------------------------------------------


def backward(workload: Workload, profile: DeviceProfile) -> Space:
    """The fused backward pass. Knobs: the tiles of :class:`gf_tvm.kernels.fused.Tiles`, unrolling, parallel chunks."""
    geometry, lanes = workload.geometry, profile.lanes
    ph, pw = geometry.grid
    cig, cog = geometry.ci_group, geometry.co_group
    needs_x, needs_w = workload.kernel != "backward_weight", workload.kernel != "backward_input"
    dilated = geometry.dilated and needs_x
    patch_rows = geometry.n * ph

    # A block large enough for full tiles, small enough that its g~ and panels stay in L2.
    if dilated:
        rows: tuple[int, ...] = (ph,)
    else:
        # Where cores share the cache their blocks compete for it already: then g~ and its panels are counted alone.
        copies = 4 if profile.l2_cores == 1 else 2
        most = max(profile.l2_share // (copies * 4 * geometry.co * pw), ceil_div(2 * lanes, pw), 1)
        found = [d for d in range(1, patch_rows + 1) if patch_rows % d == 0 and d <= most]
        wanted = [d for d in found if d * pw >= 2 * lanes]
        rows = tuple((wanted or found[-1:])[:12])
    vectors = tuple(lanes * k for k in (1, 2, 3, 4))
    widest = ceil_div(cig, lanes) * lanes
    knobs: dict[str, tuple[int, ...]] = {"rows": rows}
    if needs_x:
        knobs["m"] = (lanes,) if dilated else vectors
        knobs["ci"] = divisors(cig, 64 if dilated else 24)
        knobs["unroll_o"] = (1,) if dilated else divisors(cog, 4)
    if needs_w:
        knobs["cv"] = tuple(v for v in vectors if v <= max(widest, lanes))
        knobs["co"] = divisors(cog, 16)
        knobs["unroll_m"] = (1, 2, 4)
        knobs["chunks"] = tuple(c for c in divisors(cog, 16))

    def rule(config: Config) -> bool:
        if needs_x and not dilated:
            wide = config["m"] // lanes
            if wide * config["ci"] + wide + 1 > profile.registers:
                return False
        if needs_w:
            wide = config["cv"] // lanes
            if wide * config["co"] + wide + 1 > profile.registers:
                return False
            if config["rows"] * pw % config["unroll_m"] or (cog // config["co"]) % config["chunks"]:
                return False
        return True

    def build(config: Config) -> s_tir.Schedule:
        return _backward_schedule(workload, profile, config)

    default = _backward_default(knobs, geometry, profile, rule)
    if profile.threads is not None:
        default = _share_between_threads(default, knobs, geometry, profile, profile.threads)
        assert rule(default), default
    return Space(knobs, default, build, rule)


def _share_between_threads(
    default: Config, knobs: dict[str, tuple[int, ...]], geometry: Geometry, profile: DeviceProfile, threads: int
) -> Config:
    """The default where the number of threads is known: blocks and tiles that leave none of them without work.

    What a choice costs is estimated in multiplications for each pair of channels: one for each patch, or for each
    lane that is filled up, and for reading W~, or reading and writing the sums of grad_W, once a block as many as the
    cores could do in that time.
    """
    config, (_, pw) = dict(default), geometry.grid
    weight_bytes = 4 * geometry.ci * geometry.co_group
    # From memory by the board's figures; from the cache four bytes a cycle.
    byte = profile.lanes / 4
    if weight_bytes > profile.l2_bytes // 2 and profile.peak_gflops and profile.bandwidth_gbs:
        byte = profile.peak_gflops / 2 / profile.bandwidth_gbs

    def unbalanced(parts: int) -> float:
        return ceil_div(parts, threads) * threads / parts

    def cost_of_rows(rows: int) -> float:
        patches, cost = rows * pw, 0.0
        if "m" in config:
            padded = ceil_div(patches, config["m"]) * config["m"]
            cost += (padded + 4 * byte) * unbalanced(geometry.n * geometry.grid[0] // rows)
        if "cv" in config:
            cost += patches + 8 * byte
        return cost / patches

    if not (geometry.dilated and "m" in config):
        config["rows"] = min(knobs["rows"], key=cost_of_rows)
    if "cv" in config:

        def chunks_of(co: int) -> int:
            tiles = geometry.co_group // co
            usable = [c for c in knobs["chunks"] if tiles % c == 0]
            return min(usable, key=lambda c: (unbalanced(geometry.groups * c), c))

        def cost_of_tile(co: int) -> tuple[float, int]:
            # Fewer sums than that wait for each other: an FMA takes several cycles, and one can start in each.
            independent = min(1.0, co * config["cv"] / profile.lanes / 8)
            return unbalanced(geometry.groups * chunks_of(co)) / independent, -co

        config["co"] = min((co for co in knobs["co"] if co <= default["co"]), key=cost_of_tile)
        config["chunks"] = chunks_of(config["co"])
        config["unroll_m"] = _largest(tuple(u for u in knobs["unroll_m"] if config["rows"] * pw % u == 0), 4)
    return config


def _backward_default(
    knobs: dict[str, tuple[int, ...]], geometry: Geometry, profile: DeviceProfile, rule: Any
) -> Config:
    """Two registers wide, as many rows as the register file holds; blocks near 128 patches that waste few lanes."""
    lanes, pw = profile.lanes, geometry.grid[1]
    high = (profile.registers - 4) // 2
    wide = 2 * lanes

    def waste(rows: int) -> tuple[float, float]:
        patches = rows * pw
        padded = ceil_div(patches, wide) * wide
        return round(padded / patches, 2), abs(patches - 128)

    config = {"rows": min(knobs["rows"], key=waste)}
    if "m" in knobs:
        config["m"] = wide if wide in knobs["m"] else knobs["m"][0]
        config["ci"] = _largest(knobs["ci"], 64 if geometry.dilated else high)
        config["unroll_o"] = _largest(knobs["unroll_o"], 4)
    if "cv" in knobs:
        config["cv"] = _largest(knobs["cv"], wide)
        config["co"] = _largest(knobs["co"], high)
        config["unroll_m"] = _largest(tuple(u for u in knobs["unroll_m"] if config["rows"] * pw % u == 0), 4)
        tiles = geometry.co_group // config["co"]
        config["chunks"] = _largest(tuple(c for c in knobs["chunks"] if tiles % c == 0), 4)
    assert rule(config), config
    return config


def _backward_schedule(workload: Workload, profile: DeviceProfile, config: Config) -> s_tir.Schedule:
    geometry, lanes = workload.geometry, profile.lanes
    tiles = fused.Tiles(
        rows=config["rows"],
        m=config.get("m", lanes),
        ci=config.get("ci", 1),
        co=config.get("co", 1),
        cv=config.get("cv", lanes),
        # Elsewhere it would change what the logs of earlier versions belong to.
        whole=profile.threads is not None,
    )
    sch = _schedule(fused.backward(workload, tiles))
    pooled = sch.get_sblock("g")
    # First of all: once a reduction is split into its parts, TVM can no longer prove the loop parallel.
    sch.parallel(sch.get_loops(pooled)[0])
    _pool(sch, pooled, geometry.patch, geometry.cols.out_exact)
    if workload.kernel != "backward_weight":
        if geometry.dilated:
            _dilated_input_grad(sch, geometry, tiles, lanes)
        else:
            _input_grad(sch, geometry, tiles, lanes, config["unroll_o"])
    part = sch.get_sblock("bias_part")
    b, o, j, q = sch.get_loops(part)
    sch.reorder(o, q, j)
    if workload.kernel != "backward_input":
        _weight_grad(sch, geometry, tiles, lanes, config["unroll_m"], config["chunks"])
    columns = sch.get_sblock("bias_columns")
    o, j, b = sch.get_loops(columns)
    sch.reorder(o, b, j)
    _parallel_outer(sch, columns, 1)
    return sch


def _input_grad(sch: s_tir.Schedule, geometry: Geometry, tiles: fused.Tiles, lanes: int, unroll: int) -> None:
    """Per block and tile of channels: the product in registers, then its expansion while it is in cache."""
    taps, panel, product, out = (sch.get_sblock(n) for n in ("taps", "panel", "grad_x_grid", "grad_x"))
    *_, ka, kb = sch.get_loops(taps)
    if geometry.kernel[0] * geometry.kernel[1] <= UNROLLED_PIXELS:
        sch.unroll(ka)
        sch.unroll(kb)
    _parallel_outer(sch, taps, 3)

    if tiles.rows * geometry.grid[1] % tiles.m == 0:
        _vectorize_inner(sch, sch.get_loops(panel)[-1], tiles.m, lanes)

    _, q, c, a, j, b = sch.get_loops(out)
    tile, c = sch.split(c, [None, tiles.ci])
    sch.reorder(tile, c, q, a, j, b)
    _expand(sch, j, b, geometry)
    sch.compute_at(product, tile, preserve_unit_loops=True)
    *_, c, m, o = sch.get_loops(product)
    m_outer, m = sch.split(m, [None, tiles.m])
    o, o_inner = sch.split(o, [None, unroll])
    sch.reorder(m_outer, o, o_inner, c, m)
    sums = sch.cache_write(product, 0, "global")
    sch.reverse_compute_at(sums, m_outer, preserve_unit_loops=True)
    *_, c_store, m_store = sch.get_loops(sums)
    _vectorize_inner(sch, m_store, tiles.m, lanes)
    sch.unroll(c_store)
    _vectorize_inner(sch, m, tiles.m, lanes)
    sch.unroll(c)
    sch.unroll(o_inner)
    sch.decompose_reduction(product, o)


def _dilated_input_grad(sch: s_tir.Schedule, geometry: Geometry, tiles: fused.Tiles, lanes: int) -> None:
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
    sch: s_tir.Schedule, geometry: Geometry, tiles: fused.Tiles, lanes: int, unroll: int, chunks: int
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


# --- backward, depthwise ---------------------------------------------------------------------------------------------


def depthwise_backward(workload: Workload, profile: DeviceProfile) -> Space:
    """Plane by plane, everything of a plane while it is in cache; no choices yet."""
    geometry = workload.geometry

    def build(_: Config) -> s_tir.Schedule:
        sch = _schedule(fused.depthwise_backward(workload))
        pooled = sch.get_sblock("g")
        sch.parallel(sch.get_loops(pooled)[0])
        _pool(sch, pooled, geometry.patch, geometry.cols.out_exact)
        if workload.kernel != "backward_weight":
            *_, j, b = sch.get_loops(sch.get_sblock("grad_x"))
            _expand(sch, j, b, geometry)
        parts = ["bias_part"] + (["weight_part"] if workload.kernel != "backward_input" else [])
        for name in parts:
            _, j, i = sch.get_loops(sch.get_sblock(name))
            sch.reorder(i, j)
        for name in ["bias_sum"] + (["weight_sum"] if workload.kernel != "backward_input" else []):
            _parallel_outer(sch, sch.get_sblock(name), 1)
        return sch

    return Space({}, {}, build)

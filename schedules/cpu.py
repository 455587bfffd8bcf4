"""Spaces for CPUs with vector registers: AVX2, AVX-512, NEON; the profile says how wide and how many."""

from __future__ import annotations

import math
from typing import Any

from tvm import s_tir

from gf_tvm.core.geometry import Geometry, ceil_div, pad
from gf_tvm.core.workload import Workload
from gf_tvm.kernels import definition
from gf_tvm.kernels.cpu import dense, depthwise, forward, on_grid
from gf_tvm.kernels.cpu.emit import PARALLEL_WORK
from gf_tvm.kernels.cpu.simd import item_bytes
from gf_tvm.kernels.cpu.sweep import Tiles, split
from gf_tvm.machine.profiles import DeviceProfile

from .space import Config, Space

#: Larger maps are written past the caches unless the tuner finds otherwise.
STREAM_BYTES = 4 << 20
#: Cycles between two lines that are fetched ahead; 0: none are. Faster than that, and the products wait for them.
AHEAD = (0, 12, 24)
#: Maps in shorter pieces than this are not worth fetching ahead: of each piece, the last line is a part.
FETCHED_BYTES = 1024
#: Distances, in channels, at which pooling may prefetch.
NEAR = (0, 2, 4, 8)


def divisors(number: int) -> tuple[int, ...]:
    """Divisors of ``number``, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))


def plain(workload: Workload, profile: DeviceProfile) -> Space:
    """The plain definition, outer loops parallel: for kernels that are not worth a space."""

    def build(_: Config) -> s_tir.Schedule:
        sch = s_tir.Schedule(definition(workload))
        for block in sch.get_child_blocks(sch.get_sblock("root")):
            loops = sch.get_loops(block)
            spatial = sum(1 for axis in sch.get(block).iter_vars if int(axis.iter_type) == 0)
            if math.prod(int(sch.get(loop).extent) for loop in loops) >= PARALLEL_WORK:
                sch.parallel(sch.fuse(*loops[: max(1, min(spatial, len(loops) - 1))]))
        return sch

    return Space({}, {}, build)


# --- sweeps over memory ----------------------------------------------------------------------------------------------


def filter_input(workload: Workload, profile: DeviceProfile) -> Space:
    """x -> x~ with channels last. ``rows``: patch rows pooled together; ``near``: how far ahead is prefetched."""
    geometry = workload.geometry
    rows = _rows(geometry, 16, 256)

    def build(config: Config) -> Any:
        return forward.filter_input(workload, forward.Tiles(config["rows"], config["near"]), profile.lanes)

    default = {"rows": min(rows, key=lambda r: abs(r * geometry.grid[1] - 32)), "near": 4}
    return Space({"rows": rows, "near": NEAR}, default, build)


def depthwise_filter_input(workload: Workload, profile: DeviceProfile) -> Space:
    """Plane by plane. ``near``: how many planes ahead is prefetched."""

    def build(config: Config) -> Any:
        return depthwise.filter_input(workload, depthwise.Tiles(near=config["near"]), profile.lanes)

    return Space({"near": NEAR}, {"near": 4}, build)


def depthwise_backward(workload: Workload, profile: DeviceProfile) -> Space:
    """Plane by plane. ``stream``: grad_x goes past the caches; ``near``: how many images ahead is prefetched."""

    def build(config: Config) -> Any:
        tiles = depthwise.Tiles(bool(config.get("stream")), config["near"])
        return depthwise.backward(workload, tiles, profile.lanes)

    knobs: dict[str, tuple[int, ...]] = {"near": (0, 1)}
    default = {"near": 1}
    if workload.kernel != "backward_weight":
        knobs["stream"], default["stream"] = (0, 1), _streams(workload, profile)
    return Space(knobs, default, build)


def _streams(workload: Workload, profile: DeviceProfile) -> int:
    # Arm's cores notice by themselves that whole lines are written, and do not read them first.
    if profile.arch != "x86_64":
        return 0
    size = math.prod(workload.geometry.x_shape) * (4 if workload.dtype == "float32" else 2)
    return int(size > STREAM_BYTES)


def _rows(geometry: Geometry, least: int, most: int) -> tuple[int, ...]:
    """Patch rows of a block: parts of an image, or whole images, with about ``least`` to ``most`` patches."""
    ph, pw = geometry.grid
    found = [*divisors(ph), *(ph * images for images in divisors(max(1, geometry.n))[1:])]
    usable = [rows for rows in found if least <= rows * pw <= most]
    middle = math.sqrt(least * most)
    return tuple(usable or [min(found, key=lambda rows: abs(math.log(rows * pw / middle)))])


# --- backward, dense and grouped -------------------------------------------------------------------------------------


def backward(workload: Workload, profile: DeviceProfile) -> Space:
    """The backward pass, or one of its products on the patch grid, as a sweep.

    Knobs are those of :class:`gf_tvm.kernels.cpu.sweep.Tiles`, vectors in registers. ``rows`` 0: the work is shared by
    channels, and the whole batch is one block.
    """
    geometry, lanes = workload.geometry, profile.lanes
    cig, cog = geometry.ci_group, geometry.co_group
    needs_x, needs_w, pools = workload.gives_x, workload.gives_w, workload.pools_grad
    # Panels of a block should stay in L2; where all of the batch's do, threads may share channels instead.
    most = max(profile.l2_share // (4 * geometry.co), 4 * lanes)
    by_channels = geometry.n * math.prod(geometry.grid) * geometry.co * 4 <= 2 * profile.l2_bytes
    rows = _rows(geometry, 2 * lanes, most)
    knobs: dict[str, tuple[int, ...]] = {"rows": (0, *rows) if by_channels else rows, "near": (0, 4), "ahead": AHEAD}
    if not pools:
        knobs["near"] = knobs["ahead"] = (0,)
    knobs["stream"], knobs["m"] = (0, 1) if pools else (0,), (1, 2, 3, 4)
    if needs_x:
        knobs["ci"] = _heights(cig)
        knobs["together"] = tuple(t for t in (32, 64, 128) if t < cig) + ((cig,) if cig <= 128 else ())
    if needs_w:
        knobs["cv"] = tuple(v for v in (1, 2, 3, 4) if v <= ceil_div(cig, lanes))
        knobs["co"] = _heights(cog)

    def rule(config: Config) -> bool:
        for wide, high in (("m", "ci"), ("cv", "co")):
            if high in config and not _fits(config[wide], config[high], profile.registers, max(knobs[high])):
                return False
        # A single block has no next one.
        if config["ahead"] and config["rows"] in (0, geometry.n * geometry.grid[0]):
            return False
        return "together" not in config or config["together"] >= config["ci"]

    def build(config: Config) -> Any:
        tiles = tiles_of(config, geometry, profile)
        return dense.backward(workload, tiles, lanes) if pools else on_grid.products(workload, tiles, lanes)

    default = _default(workload, profile, knobs)
    assert rule(default), default
    return Space(knobs, default, build, rule)


def _heights(channels: int) -> tuple[int, ...]:
    """Channels in a tile of sums."""
    return tuple(sorted({min(high, channels) for high in (2, 4, 6, 8, 10, 12)}))


def _fits(wide: int, high: int, registers: int, highest: int) -> bool:
    """Whether a tile of sums and what it is made of fit into the register file.

    Fewer than eight sums wait for each other: an FMA takes four cycles, and two can start in each. So tiles are no
    smaller, unless the highest one is. Where registers are plenty LLVM loads several scalars at once.
    """
    scalars = 3 if registers > 16 else 1
    return wide * high + wide + scalars <= registers and (wide * high >= 8 or high == highest)


def tiles_of(config: Config, geometry: Geometry, profile: DeviceProfile) -> Tiles:
    """What a point of the space of :func:`backward` stands for."""
    lanes, all_rows = profile.lanes, geometry.n * geometry.grid[0]
    m = config["m"] * lanes
    # Half of L1 for a piece of g~'s panel; the rest is for the weights that pass by.
    depth = max(32, profile.l1_bytes // 2 // (4 * m))
    return Tiles(
        rows=config["rows"] or all_rows,
        m=m,
        ci=config.get("ci", 1),
        co=config.get("co", 1),
        cv=config.get("cv", 1) * lanes,
        together=config.get("together", 1),
        depth=depth,
        stream=bool(config.get("stream")),
        near=config["near"],
        ahead=config["ahead"],
        by_channels=not config["rows"],
    )


def _default(workload: Workload, profile: DeviceProfile, knobs: dict[str, tuple[int, ...]]) -> Config:
    """Two registers wide and as high as the register file allows; blocks that waste little, for every thread some."""
    geometry, lanes = workload.geometry, profile.lanes
    cig, cog, pw = geometry.ci_group, geometry.co_group, geometry.grid[1]
    patch_rows = geometry.n * geometry.grid[0]
    pools = workload.pools_grad
    config = {
        "stream": _streams(workload, profile) if pools else 0,
        "m": 2 if patch_rows * pw > lanes else 1,
    }

    def high(wide: int, values: tuple[int, ...], channels: int) -> int:
        """The tile that wastes least: time in the last, smaller one, then what is loaded for a product."""
        usable = [v for v in values if _fits(wide, v, profile.registers, max(values))]

        def cost(v: int) -> float:
            # A tile of few sums waits for them: an FMA takes four cycles, and two can start in each.
            return sum(max(wide * rows, 8) * count for rows, _, count in split(channels, v)) / channels + 1 / v

        return min(usable, key=cost)

    if "ci" in knobs:
        config["ci"] = high(config["m"], knobs["ci"], cig)
        config["together"] = min(knobs["together"], key=lambda t: abs(t - 64))
    if "co" in knobs:
        config["cv"] = min(2, max(knobs["cv"]))
        config["co"] = high(config["cv"], knobs["co"], cog)
    threads = profile.threads or 4
    height, width = geometry.y_shape[2:]

    def fetches_ahead(rows: int) -> bool:
        """There is a next block, and pieces of its channels are long enough. On Arm it is left to the tuner."""
        piece = min(rows * geometry.rows.patch, height) * width * item_bytes(workload.dtype)
        can = pools and profile.arch == "x86_64" and rows not in (0, patch_rows)
        return can and piece >= FETCHED_BYTES

    def cost_of(rows: int) -> float:
        if not rows:
            # Every thread reads all of g~ for each of its channels, but nothing of the weights twice.
            return 1.35
        patches, blocks = rows * pw, patch_rows // rows
        padded = pad(patches, lanes) / patches if "ci" in knobs else 1.0
        busy = ceil_div(blocks, threads) * threads / blocks
        # Weights are read, and their sums read and written, once a block; each part's sums once more at the end.
        weights = 8.0 / patches + threads * 8.0 / (patch_rows * pw)
        ahead = fetches_ahead(rows)
        panels = geometry.co * (1 + ahead) + config.get("together", 0) + config.get("cv", 0) * lanes
        # What is fetched ahead needs room, too.
        overflow = max(0.0, patches * panels * 4 / profile.l2_share - (0.3 if ahead else 0.7))
        return padded * busy * (1 + weights) + 0.2 * overflow - 0.15 * ahead

    config["rows"] = min(knobs["rows"], key=lambda rows: (round(cost_of(rows), 2), rows))
    config["ahead"] = AHEAD[-1] if fetches_ahead(config["rows"]) else 0
    config["near"] = 4 if pools else 0
    if not config["rows"] and "together" in knobs:
        # Threads share the groups of channels: W~ of a small one is still near when it is multiplied.
        config["together"] = min(t for t in knobs["together"] if t >= config["ci"])
        if not pools:
            # Weights are all the work there is: tiles and groups that leave no thread waiting.

            def share(ci: int) -> float:
                size = config["together"] // ci * ci
                return pad(ceil_div(cig, size), threads) * size * (1 + 0.5 / ci)

            fitting = (c for c in knobs["ci"] if _fits(config["m"], c, profile.registers, max(knobs["ci"])))
            config["ci"] = min((c for c in fitting if c <= config["together"]), key=share)
    return config

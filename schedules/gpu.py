"""Spaces for NVIDIA GPUs: tiles in shared memory, sums in registers, neighbouring threads at neighbouring addresses.

Every kernel is a few launches: pooling, the sums of W's taps, one product for grad_x (which expands as it stores), one
for grad_W in parts, and sums. Only the products and the pooling of x have choices; the rest moves each byte once.
"""

from __future__ import annotations

import itertools
from typing import Any

import tvm
from tvm import s_tir, tirx

from gf_tvm.devices import DeviceProfile
from gf_tvm.geometry import Geometry, ceil_div
from gf_tvm.kernels import gpu
from gf_tvm.kernels.gpu import SUM_THREADS, Tiles
from gf_tvm.workload import Workload

from .space import Config, Space

#: Threads of a block where there is nothing to choose.
THREADS = 256


def get_space(workload: Workload, profile: DeviceProfile) -> Space:
    """The space of ``workload`` on a GPU."""
    geometry, kernel = workload.geometry, workload.kernel
    if kernel.startswith("backward"):
        return _depthwise(workload) if geometry.depthwise else _products(workload, profile, gpu.backward)
    if kernel in ("input_grad", "weight_grad"):
        return _products(workload, profile, gpu.input_grad if kernel == "input_grad" else gpu.weight_grad)
    if kernel == "filter_input":
        return _filter_input(workload)
    if kernel == "filter_grad":
        return _map_space(workload, gpu.filter_grad)
    return _map_space(workload, gpu.expand)


def _schedule(func: Any) -> s_tir.Schedule:
    return s_tir.Schedule(tvm.IRModule({"main": func}))


def _compute_at(sch: s_tir.Schedule, block: Any, loop: Any, scope: str) -> None:
    """Compute a stage in ``loop`` into memory of ``scope``: first the scope, which says for how many threads."""
    sch.set_scope(block, 0, scope)
    sch.compute_at(block, loop, preserve_unit_loops=True)


# --- maps and sums ---------------------------------------------------------------------------------------------------


def _bind(sch: s_tir.Schedule, loop: Any, threads: int) -> Any:
    """Spread a loop over blocks of threads; returns the loop of threads."""
    block, thread = sch.split(loop, [None, min(threads, THREADS)])
    sch.bind(block, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    return thread


def _map(sch: s_tir.Schedule, block: Any, axes: int, threads: int = THREADS) -> Any:
    """Bind a stage's first ``axes`` loops; returns the loop of threads."""
    return _bind(sch, sch.fuse(*sch.get_loops(block)[:axes]), threads)


def _map_of_sums(sch: s_tir.Schedule, block: Any, axes: int, threads: int = THREADS) -> Any:
    """As :func:`_map` for a stage that sums: in a register, which is stored at the end."""
    local = sch.cache_write(block, 0, "local")
    thread = _map(sch, local, axes, threads)
    sch.compute_at(block, thread, preserve_unit_loops=True)
    return thread


def _vector(exact: bool, width: int) -> int:
    """Pixels of one load or store of a patch's row (``width`` pixels); 1 where its address or its edge forbids more."""
    if not exact:
        return 1
    return next(v for v in (4, 2, 1) if width % v == 0)


def _pool(sch: s_tir.Schedule, pixels: Any, pooled: Any, vector: int) -> None:
    """Sum the pixels of a patch in one thread, row by row, each row in vector loads."""
    a, b = sch.get_loops(pooled)[-2:]
    sch.unroll(b)
    if vector == 1:
        sch.compute_inline(pixels)
        sch.unroll(a)
        return
    _compute_at(sch, pixels, a, "local")
    row = sch.get_loops(pixels)[-1]
    outer, inner = sch.split(row, [None, vector])
    sch.unroll(outer)
    sch.vectorize(inner)
    sch.unroll(a)


def _store_patch(sch: s_tir.Schedule, grad_x: Any, geometry: Geometry) -> None:
    """Write one value to all pixels of its patch, a row in vector stores."""
    a, b = sch.get_loops(grad_x)[-2:]
    cols = geometry.cols
    vector = _vector(cols.in_exact, cols.window)
    outer, inner = sch.split(b, [None, vector])
    if vector > 1:
        sch.vectorize(inner)
    else:
        sch.unroll(inner)
    sch.unroll(outer)
    sch.unroll(a)


def _channel_sum(sch: s_tir.Schedule, name: str, last: str, maps: int) -> None:
    """Schedule the steps of gf_tvm.kernels.gpu's sums over channels; ``last`` stores what ``NAME_sum`` has summed."""
    at = None
    for step in ("block", "last", "threads"):
        block = sch.get_sblock(f"{name}_{step}")
        copy = sch.cache_write(block, 0, "local")
        if at is None:
            at = sch.fuse(*sch.get_loops(copy)[:2])
            sch.bind(at, "blockIdx.x")
            loop = sch.add_unit_loop(copy)  # it stores a single value
        else:
            _compute_at(sch, copy, at, "shared")
            loop = sch.get_loops(copy)[-1]
        sch.compute_at(block, _threads(sch, loop, SUM_THREADS), preserve_unit_loops=True)
    total = sch.get_sblock(f"{name}_sum")
    _compute_at(sch, total, _map(sch, sch.get_sblock(last), maps), "local")


def _mean_vector(geometry: Geometry) -> int:
    cols = geometry.cols
    return _vector(cols.out_exact, cols.patch)


def _map_space(workload: Workload, define: Any) -> Space:
    """Pooling of grad_y, or expansion: one thread a patch."""
    geometry = workload.geometry

    def build(config: Config) -> s_tir.Schedule:
        sch = _schedule(define(workload))
        if workload.kernel == "filter_grad":
            g = sch.get_sblock("g")
            _map_of_sums(sch, g, 4, config["threads"])
            _pool(sch, sch.get_sblock("pixels"), g, _mean_vector(geometry))
            _channel_sum(sch, "bias", "grad_b", 1)
        else:
            grad_x = sch.get_sblock("grad_x")
            _map(sch, grad_x, 4, config["threads"])
            _store_patch(sch, grad_x, geometry)
        return sch

    return Space({"threads": (64, 128, 256)}, {"threads": 256}, build)


def _depthwise(workload: Workload) -> Space:
    """A depthwise convolution's backward pass: maps and sums."""
    geometry = workload.geometry

    def build(config: Config) -> s_tir.Schedule:
        sch = _schedule(gpu.depthwise_backward(workload))
        g = sch.get_sblock("g")
        _map_of_sums(sch, g, 4, config["threads"])
        _pool(sch, sch.get_sblock("pixels"), g, _mean_vector(geometry))
        if workload.kernel != "backward_weight":
            if not geometry.dilated:
                _map_of_sums(sch, sch.get_sblock("taps"), 1)
            grad_x, grid = sch.get_sblock("grad_x"), sch.get_sblock("grid")
            thread = _map(sch, grad_x, 4, config["threads"])
            _compute_at(sch, grid, thread, "local")
            _store_patch(sch, grad_x, geometry)
        if workload.kernel != "backward_input":
            _channel_sum(sch, "weight", "grad_w", 4)
        _channel_sum(sch, "bias", "grad_b", 1)
        return sch

    return Space({"threads": (64, 128, 256)}, {"threads": 256}, build)


def _filter_input(workload: Workload) -> Space:
    """Pooling of x. Channels last: a tile of patches and channels is turned in shared memory."""
    geometry = workload.geometry
    vector = _vector(geometry.cols.in_exact, geometry.cols.window)
    patches = geometry.n * geometry.grid[0] * geometry.grid[1]
    sizes = tuple(size for size in (8, 16, 32, 64) if size < 2 * max(geometry.ci, 8))
    lengths = tuple(size for size in (16, 32, 64) if size < 2 * max(patches, 16))

    def build(config: Config) -> s_tir.Schedule:
        sch = _schedule(gpu.filter_input(workload))
        out, pixels = sch.get_sblock("filtered_x"), sch.get_sblock("pixels")
        if geometry.depthwise:
            _map_of_sums(sch, out, 4, config["threads"])
            _pool(sch, pixels, out, vector)
            return sch
        tile = sch.get_sblock("tile")
        turned = sch.cache_write(tile, 0, "local")
        m, c = sch.get_loops(out)
        mo, mi = sch.split(m, [None, config["m"]])
        co, ci = sch.split(c, [None, config["c"]])
        sch.reorder(mo, co, mi, ci)
        sch.bind(mo, "blockIdx.x")
        sch.bind(co, "blockIdx.y")
        _compute_at(sch, turned, co, "shared")
        sch.storage_align(turned, 0, 0, 32, 1)  # neither rows nor columns of the tile meet in one bank
        _threads(sch, sch.fuse(mi, ci), config["threads"])
        thread = _threads(sch, sch.fuse(*sch.get_loops(turned)[-2:]), config["threads"])
        sch.compute_at(tile, thread, preserve_unit_loops=True)
        _pool(sch, pixels, tile, vector)
        return sch

    if geometry.depthwise:
        return Space({"threads": (64, 128, 256)}, {"threads": 256}, build)
    knobs = {"m": lengths, "c": sizes, "threads": (64, 128, 256)}
    return Space(knobs, {"m": min(32, lengths[-1]), "c": min(32, sizes[-1]), "threads": 256}, build)


def _threads(sch: s_tir.Schedule, loop: Any, threads: int) -> Any:
    """Share a loop of a block among its threads."""
    _, thread = sch.split(loop, [None, threads])
    sch.bind(thread, "threadIdx.x")
    return thread


# --- products --------------------------------------------------------------------------------------------------------


def _powers(least: int, most: int) -> tuple[int, ...]:
    return tuple(1 << k for k in range(12) if least <= 1 << k <= most)


def _covering(size: int, least: int, most: int) -> tuple[int, ...]:
    """Tiles worth a try for an axis: powers of two, none twice as large as needed."""
    return tuple(t for t in _powers(least, most) if t < 2 * size or t == least)


def _products(workload: Workload, profile: DeviceProfile, define: Any) -> Space:
    """Kernels with matrix products.

    Knobs, for the product of grad_x: tile of patches ``m`` and of channels ``ci``, step ``k`` of its sum, patches
    ``tm`` and channels ``tc`` of one thread, of which ``vm`` patches side by side. For grad_W: tiles ``wo`` and ``wi``,
    step ``wk``, ``to`` and ``ti`` of one thread, ``splits`` of its sum over patches.
    """
    geometry = workload.geometry
    assert profile.gpu is not None
    gpu_limits = profile.gpu
    needs_x = workload.kernel not in ("backward_weight", "weight_grad")
    needs_w = workload.kernel not in ("backward_input", "input_grad")
    patches = geometry.n * geometry.grid[0] * geometry.grid[1]
    cig, cog = geometry.ci_group, geometry.co_group
    knobs: dict[str, tuple[int, ...]] = {}
    if needs_x:
        knobs |= {
            "m": _covering(patches, 16, 128),
            "ci": _covering(cig, 8, 128),
            "k": (8, 16) if cog > 4 else (4, 8),
            "tm": (1, 2, 4, 8),
            "tc": (1, 2, 4, 8),
            "vm": (1, 2, 4),
        }
    if needs_w:
        knobs |= {
            "wo": _covering(cog, 8, 128),
            "wi": _covering(cig, 8, 128),
            "wk": (8, 16),
            "to": (1, 2, 4, 8),
            "ti": (1, 2, 4, 8),
            "splits": tuple(s for s in (1, 2, 4, 8, 16, 32, 64) if s == 1 or s * 32 <= patches),
        }

    def fits(rows: int, columns: int, row: int, column: int, step: int) -> bool:
        """One product: threads whole warps where possible, sums and operands in registers, tiles in shared memory."""
        if rows % row or columns % column:
            return False
        threads = (rows // row) * (columns // column)
        least = min(64, rows * columns // 4)
        return (
            least <= threads <= gpu_limits.threads
            and (row * column + 2 * (row + column) + 32) * threads <= gpu_limits.registers
            and 4 * step * (rows + columns + 8) <= gpu_limits.shared_bytes
        )

    def rule(config: Config) -> bool:
        # Of one product alone where only its knobs are given.
        if "m" in config:
            if config["vm"] > config["tm"]:
                return False
            if not fits(config["ci"], config["m"], config["tc"], config["tm"], config["k"]):
                return False
        return "wo" not in config or fits(config["wo"], config["wi"], config["to"], config["ti"], config["wk"])

    def build(config: Config) -> s_tir.Schedule:
        return _build_products(workload, define, config, (needs_x, needs_w))

    return Space(knobs, _default(knobs, rule, geometry, profile), build, rule)


def _default(knobs: dict[str, tuple[int, ...]], rule: Any, geometry: Geometry, profile: DeviceProfile) -> Config:
    """The valid point of least estimated cost, product by product; see :func:`_cost`."""
    patches = geometry.n * geometry.grid[0] * geometry.grid[1]
    config = {name: values[0] for name, values in knobs.items()}
    names = (
        ("ci", "m", "tc", "tm", "k", "vm"),
        ("wo", "wi", "to", "ti", "wk", "splits"),
    )
    sizes = ((geometry.ci_group, patches), (geometry.co_group, geometry.ci_group))
    lengths = (geometry.co_group * (geometry.kernel[0] * geometry.kernel[1] if geometry.dilated else 1), patches)
    # One product at a time: the rule checks both, so the other one stays at a point that is valid on its own.
    for own, size, length in zip(names, sizes, lengths, strict=True):
        if own[0] not in knobs:
            continue
        best: tuple[float, Config] | None = None
        for values in itertools.product(*(knobs[name] for name in own)):
            part = dict(zip(own, values, strict=True))
            if not rule(part):
                continue
            cost = _cost(part, own, (*size, length), geometry.groups, profile)
            if best is None or cost < best[0]:
                best = (cost, part)
        assert best is not None
        config |= best[1]
    return config


def _cost(
    part: Config, names: tuple[str, ...], sizes: tuple[int, int, int], groups: int, profile: DeviceProfile
) -> float:
    """Rough cost of one product, in instructions of a multiprocessor.

    A step of a thread multiplies tc x tm values, for which it reads tc + tm words of shared memory, four at a time
    where they lie side by side; padded tiles do work for nothing, and a grid that does not fill the multiprocessors
    leaves some idle. A tile of operands is read from memory once per block.
    """
    x, y, tx, ty, step, last = (part[name] for name in names)
    rows, columns, length = sizes
    assert profile.gpu is not None
    splits = last if names[-1] == "splits" else 1
    side = min(ty, 4) if names[-1] == "splits" else last
    blocks = ceil_div(rows, x) * ceil_div(columns, y) * groups * splits
    threads = (x // tx) * (y // ty)
    # A multiprocessor hides latency with a few hundred threads, of several blocks if they are small.
    resident = max(1, min(4, 512 // threads))
    at_once = (profile.gpu.multiprocessors or 64) * resident
    rounds = ceil_div(blocks, at_once)
    reads = ceil_div(tx, min(tx, 4)) + ty / side
    per_step = tx * ty + 2 * reads + 8 * (x + y) / threads + 8 / step
    # Fewer than 128 threads leave some of the multiprocessor's cores without work.
    idle = max(1.0, 128 / (threads * min(resident, ceil_div(blocks, profile.gpu.multiprocessors or 64))))
    steps = _padded(ceil_div(length, splits), step)
    partial = 4.0 * rows * columns * groups * splits / (profile.gpu.multiprocessors or 64) if splits > 1 else 0.0
    return rounds * resident * threads * steps * per_step * idle + partial


def _padded(size: int, tile: int) -> int:
    return ceil_div(size, tile) * tile


def _build_products(workload: Workload, define: Any, config: Config, needs: tuple[bool, bool]) -> s_tir.Schedule:
    geometry = workload.geometry
    fields = ("m", "ci", "k", "wo", "wi", "wk", "splits")
    sch = _schedule(define(workload, Tiles(**{name: config[name] for name in fields if name in config})))
    pools = workload.kernel.startswith("backward")
    if pools:
        g = sch.get_sblock("g")
        _map_of_sums(sch, g, 3)
        _pool(sch, sch.get_sblock("pixels"), g, _mean_vector(geometry))
    if needs[0]:
        taps = sch.get_sblock("taps")
        _ = _map(sch, taps, 4) if geometry.dilated else _map_of_sums(sch, taps, 4)
        out = sch.get_sblock("grad_x" if pools else "grad_x_grid")
        _product(
            *(sch, sch.get_sblock("grid"), out, sch.get_loops(out)[:3]),
            tiles=(config["ci"], config["m"]),
            thread=(config["tc"], config["tm"]),
            inner=(min(config["tc"], 4), config["vm"]),
            step=config["k"],
            # Shifted patches may lie in another row, and an argument's rows at any address.
            operands=(("taps_tile", 4, False), ("g_tile", 1 if geometry.dilated or not pools else 4, False)),
        )
        if pools:
            _store_patch(sch, out, geometry)
    if needs[1]:
        out = sch.get_sblock("weight_parts")
        s, p, o, c = sch.get_loops(out)
        whole = geometry.ci_group % config["wi"] == 0 and geometry.ci_group % 4 == 0
        _product(
            *(sch, sch.get_sblock("weight_part"), out, (sch.fuse(s, p), o, c)),
            tiles=(config["wo"], config["wi"]),
            thread=(config["to"], config["ti"]),
            inner=(min(config["to"], 4), min(config["ti"], 4)),
            step=config["wk"],
            operands=(("o_tile", 1, True), ("c_tile", 4 if whole else 1, False)),
        )
        _sum_parts(sch)
    if pools:
        _channel_sum(sch, "bias", "grad_b", 1)
    return sch


def _product(
    sch: s_tir.Schedule,
    product: Any,
    out: Any,
    loops: Any,
    tiles: tuple[int, int],
    thread: tuple[int, int],
    inner: tuple[int, int],
    step: int,
    operands: tuple[tuple[str, int, bool], tuple[str, int, bool]],
) -> None:
    """Schedule ``product[.., x, y] = sum over k``, the stage that stores it and those that bring its operands.

    Args:
        product, out: the product and what stores it.
        loops: of the latter: batch, x, y.
        tiles, thread, inner: of x and y: for a block, for a thread, and of these side by side.
        step: of k; the operands' tiles of one step are in shared memory at a time.
        operands: of x and of y: the stage, the width of its loads, and whether k runs along memory.
    """
    batch, x, y = loops
    xb, xv, xt, xi = sch.split(x, [None, thread[0] // inner[0], tiles[0] // thread[0], inner[0]])
    yb, yv, yt, yi = sch.split(y, [None, thread[1] // inner[1], tiles[1] // thread[1], inner[1]])
    # A thread finds the place of a patch once, and stores all of its channels there.
    sch.reorder(batch, xb, yb, xv, yv, xt, yt, yi, xi)
    for loop, name in (
        *((batch, "blockIdx.z"), (xb, "blockIdx.y"), (yb, "blockIdx.x")),
        *((xv, "vthread.y"), (yv, "vthread.x"), (xt, "threadIdx.y"), (yt, "threadIdx.x")),
    ):
        sch.bind(loop, name)
    for loop in (xi, yi):
        sch.unroll(loop)
    _compute_at(sch, product, yt, "local")
    reductions = [axis for axis in sch.get(product).iter_vars if axis.iter_type == _REDUCE]
    *_, px, py = sch.get_loops(product)[: -len(reductions)]
    *taps, k = sch.get_loops(product)[-len(reductions) :]
    ko, ki = sch.split(k, [None, step])
    sch.reorder(*taps, ko, ki, px, py)
    for loop in (ki, px, py):
        sch.unroll(loop)
    threads = (tiles[0] // thread[0], tiles[1] // thread[1])
    for (name, vector, along_k), tile in zip(operands, tiles, strict=True):
        _load_tile(sch, sch.get_sblock(name), ko, (step, tile), threads, vector, along_k)
    sch.decompose_reduction(product, [*taps, ko][0])


_REDUCE = tirx.IterVar.CommReduce


def _load_tile(
    sch: s_tir.Schedule,
    block: Any,
    at: Any,
    shape: tuple[int, int],
    threads: tuple[int, int],
    vector: int,
    along_k: bool,
) -> None:
    """Let all threads of a block bring a tile (k, x) to shared memory."""
    _compute_at(sch, block, at, "shared")
    k, x = sch.get_loops(block)[-2:]
    if along_k:
        # Threads that are neighbours read along k and write down a column: rows are shifted by four banks each, so
        # that eight of them and four columns fill the 32 banks, and rows still begin at 16 bytes.
        sch.storage_align(block, 0, -2, 32, 4)
        sch.reorder(x, k)
        loop = sch.fuse(x, k)
    else:
        loop = sch.fuse(k, x)
    total = shape[0] * shape[1]
    while vector > 1 and (shape[1] % vector or total % (vector * threads[0] * threads[1])):
        vector //= 2
    _, ty, tx, inner = sch.split(loop, [None, *threads, vector])
    sch.bind(ty, "threadIdx.y")
    sch.bind(tx, "threadIdx.x")
    if vector > 1:
        sch.vectorize(inner)


def _sum_parts(sch: s_tir.Schedule) -> None:
    """grad_W from the sums of its parts: one output channel and some input channels a block."""
    total, out = sch.get_sblock("weight_sum"), sch.get_sblock("grad_w")
    o, c, a, b = sch.get_loops(out)
    outer, inner = sch.split(c, [None, min(int(sch.get(c).extent), THREADS // 4)])
    sch.reorder(o, outer, inner, a, b)
    sch.bind(o, "blockIdx.y")
    sch.bind(outer, "blockIdx.x")
    stored = sch.cache_write(total, 0, "local")
    _compute_at(sch, stored, outer, "shared")
    _threads(sch, sch.fuse(inner, a, b), THREADS)
    sch.compute_at(total, _threads(sch, sch.get_loops(stored)[-1], THREADS), preserve_unit_loops=True)

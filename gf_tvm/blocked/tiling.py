"""Which tiles convolutions get by default: as many products as registers and loads allow, and little left over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..core.geometry import ceil_div
from ..machine.profiles import DeviceProfile
from .steps import Convolution, Tile, Winograd

#: Sums that have to be under way so that one does not wait for another: four cycles of two products.
_IN_FLIGHT = 8
#: Registers of output channels in a tile, at most.
_MOST_VECTORS = 4
#: Tasks of a loop, at least, so that any number of cores of a board gets equal shares.
_TASKS = 16
#: Products in one turn of the innermost loop, about: its code should stay in the cache of decoded instructions.
_TURN = 128


@dataclass(frozen=True)
class Cut:
    """``count`` pieces of ``size`` elements, one after the other, from ``start`` on."""

    start: int
    count: int
    size: int


def cuts(extent: int, most: int) -> list[Cut]:
    """An extent in as few pieces of at most ``most`` as can be, of nearly equal sizes."""
    count = ceil_div(extent, most)
    size, larger = divmod(extent, count)
    found = [Cut(0, larger, size + 1), Cut(larger * (size + 1), count - larger, size)]
    return [cut for cut in found if cut.count]


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [k for k in range(1, number + 1) if number % k == 0]


def suits_winograd(step: Convolution) -> bool:
    """Whether a convolution is one for Winograd's algorithm, F(4): enough channels, and not too much beside the map."""
    plain = (step.kernel, step.stride, step.dilation, step.groups) == ((3, 3), (1, 1), (1, 1), 1)
    height, width, lanes = step.dst.height, step.dst.width, step.dst.block
    covered = (height + -height % 4) * (width + -width % 4)
    return plain and step.srcs[0].channels >= 2 * lanes and step.dst.channels >= lanes and covered <= 2 * height * width


def tile_of(step: Convolution, profile: DeviceProfile) -> Tile:
    """The default."""
    if step.depthwise:
        columns = cuts(step.dst.width, max(1, min(8, profile.registers // 3)))[0].size
        return Tile(columns=columns, chunk=_chunk(step, profile, step.dst.height))
    if isinstance(step, Winograd):
        return _winograd_tile(step, profile)
    rows, columns, vectors = min(_candidates(step, profile), key=lambda c: _cost(step, *c))
    source = step.srcs[0]
    block = source.block * (step.kernel[1] if source.blocks == 1 and step.dilation[1] == 1 else 1)
    turns = max(k for k in divisors(block) if k == 1 or k * rows * columns * vectors <= _TURN)
    heavy = 4 * step.weights > profile.l2_share // 2
    by_channels = heavy and step.dst.height * step.dst.width <= 400 and step.dst.blocks // vectors >= 4
    return Tile(rows, columns, vectors, _chunk(step, profile, rows), by_channels, turns)


def _winograd_tile(step: Winograd, profile: DeviceProfile) -> Tile:
    """Rows of tiles of which both transforms fit into the second-level cache, or, where all weights do not, any."""
    down, across = step.grid
    room = profile.l2_share // 2 if not step.shared else 8 * 2**20
    row = 4 * across * step.taps * (step.srcs[0].channels + step.dst.channels)
    rows = max(k for k in divisors(down * step.images) if k == 1 or k * row <= room)

    def cost(vectors: int) -> float:
        pixels = cuts(rows * across, _pixels(profile, vectors))
        return sum(
            v.count * p.count * max(p.size * v.size, p.size + v.size, _IN_FLIGHT) * (1 + 1 / (64 * p.size))
            for v in cuts(step.dst.blocks, vectors)
            for p in pixels
        )

    vectors = min(range(1, min(_MOST_VECTORS, step.dst.blocks) + 1), key=cost)
    columns = cuts(rows * across, _pixels(profile, vectors))[0].size
    turns = max(k for k in divisors(step.srcs[0].block) if k == 1 or k * columns * vectors <= _TURN)
    return Tile(rows, columns, vectors, 1, False, turns)


def _pixels(profile: DeviceProfile, vectors: int) -> int:
    """Pixels whose sums fit into registers, with those of the weights, and of what they are multiplied with.

    That is a register for one pixel after the other, but on Arm one for each: LLVM loads the neighbouring channels of a
    pixel once and multiplies with lanes.
    """
    if profile.arch == "aarch64":
        return (profile.registers - vectors) // (vectors + 1)
    return (profile.registers - 1 - vectors) // vectors


def _candidates(step: Convolution, profile: DeviceProfile) -> Iterator[tuple[int, int, int]]:
    height, width = step.dst.height, step.dst.width
    most = _MOST_VECTORS if step.groups == 1 else 1
    for vectors in range(1, min(most, step.dst.blocks) + 1):
        pixels = _pixels(profile, vectors)
        if pixels >= 1:
            yield 1, cuts(width, pixels)[0].size, vectors
        if pixels >= 2 * width and height > 1:
            yield min(height, pixels // width), width, vectors


def _cost(step: Convolution, rows: int, columns: int, vectors: int) -> float:
    """Time for one input channel and tap, in products of one register."""
    total = 0.0
    for v in cuts(step.dst.blocks, vectors):
        for r in cuts(step.dst.height, rows):
            for c in cuts(step.dst.width, columns):
                pixels = r.size * c.size
                total += v.count * r.count * c.count * max(pixels * v.size, pixels + v.size, _IN_FLIGHT)
    # Of equal tiles that with the fewer loads.
    return total * (1 + (rows * columns + vectors) / (64 * rows * columns * vectors))


def _chunk(step: Convolution, profile: DeviceProfile, rows: int) -> int:
    """Rows of a task: few enough that what they read stays in the first-level cache's neighbour, and all cores work."""
    height = step.dst.height
    wanted = ceil_div(_TASKS, step.images)
    source = step.srcs[0]
    row = 4 * source.row * source.blocks * step.stride[0]
    fits = max(1, profile.l2_share // 4 // row)
    good = [k for k in divisors(height) if height // k >= min(wanted, height) and k <= max(fits, rows)]
    return max(good, default=1)

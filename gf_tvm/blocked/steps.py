"""The steps of a compiled forward pass: plain data, without TVM, as programs' keys are made of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..core.geometry import Pair, ceil_div
from .maps import MapLayout

#: What is done to a result before it is stored: (kind, settings). "add" takes the step's other map, times a factor;
#: "gate" multiplies with it, one value per image and channel; "scale" multiplies with a number; the rest are functions
#: of ``gf_tvm.chains.plan.elementwise.FUNCTIONS``.
After = tuple[tuple[str, tuple[Any, ...]], ...]


@dataclass(frozen=True)
class Step:
    """One step, for ``images`` at a time.

    Attributes:
        dst: the result's layout.
        srcs: of the maps that it reads; the second is what ``after`` adds or multiplies with.
        shared: whether threads share it; else it runs on one.
    """

    images: int
    dst: MapLayout
    srcs: tuple[MapLayout, ...]
    after: After = ()
    shared: bool = True

    @property
    def weights(self) -> int:
        """Elements of its packed parameters; 0: it has none."""
        return 0

    @property
    def flops(self) -> int:
        """Multiplications and additions, of ``images``."""
        return 0


@dataclass(frozen=True)
class Tile:
    """How a convolution is cut, see :mod:`.tiling`.

    Attributes:
        rows, columns: pixels of the result whose sums are in registers together.
        vectors: registers of output channels with them.
        chunk: rows of the result that one task does; a divisor of the height.
        by_channels: tasks share output channels instead: for small maps and many weights.
        turns: input channels that are written out in one turn of the innermost loop.
    """

    rows: int = 1
    columns: int = 1
    vectors: int = 1
    chunk: int = 1
    by_channels: bool = False
    turns: int = 1


@dataclass(frozen=True)
class Convolution(Step):
    """A convolution, with everything frozen after it folded into its weights.

    Attributes:
        kernel, stride, dilation, groups: as of torch.nn.Conv2d.
        before: pixels of padding above and to the left; what is to the right and below follows from ``dst``.
        tile: how it is cut.
    """

    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    groups: int = 1
    before: Pair = (0, 0)
    tile: Tile = field(default_factory=Tile)

    @property
    def taps(self) -> int:
        """Weights by which every input channel is multiplied for an output channel."""
        return self.kernel[0] * self.kernel[1]

    @property
    def depthwise(self) -> bool:
        """Whether every channel has a kernel of its own."""
        return self.groups == self.srcs[0].channels == self.dst.channels

    @property
    def depth(self) -> int:
        """Input channels that one output channel reads, those among them whose weights are zero included.

        Of grouped convolutions blocks of output channels read the blocks of their groups, or, where blocks and groups
        do not fit each other, everything.
        """
        if self.depthwise:
            return 1
        inputs, outputs = self._group
        return max(inputs, self.dst.block // outputs * inputs) if self._blockwise else self.srcs[0].channels

    @property
    def _group(self) -> Pair:
        """(input channels, output channels) of a group."""
        return self.srcs[0].channels // self.groups, self.dst.channels // self.groups

    @property
    def _blockwise(self) -> bool:
        block, (inputs, outputs) = self.dst.block, self._group
        if self.groups == 1 or self.srcs[0].block != block or self.dst.channels % block:
            return False
        if outputs % block == 0:
            return inputs % block == 0
        return block % outputs == 0 and block // outputs * inputs % block == 0

    def first_block(self, block: Any) -> Any:
        """The first block of input channels that a block of output channels reads.

        ``block``: a number, or an expression of TVM's.
        """
        if not self._blockwise:
            return 0
        inputs, outputs = self._group
        if outputs >= self.dst.block:
            return block // (outputs // self.dst.block) * (inputs // self.dst.block)
        return block * (inputs // outputs)

    @property
    def bias_at(self) -> int:
        """Where in the packed parameters the bias begins, after the weights."""
        return self.dst.blocks * self.dst.block * self.depth * self.taps

    @property
    def weights(self) -> int:
        return self.bias_at + self.dst.blocks * self.dst.block

    @property
    def flops(self) -> int:
        depth, taps = self.srcs[0].channels // self.groups, self.kernel[0] * self.kernel[1]
        return 2 * self.images * self.dst.channels * self.dst.height * self.dst.width * depth * taps


@dataclass(frozen=True)
class Winograd(Convolution):
    """A 3x3 convolution by Winograd's algorithm, see :mod:`.winograd`; not grouped, of stride and dilation 1.

    Tiles are counted through the rows of tiles of all images. ``tile.rows`` of these rows are done at a time,
    ``tile.columns`` is the number of tiles whose sums are in registers together.

    Attributes:
        outputs: pixels of a tile's result, along an axis.
    """

    outputs: int = 4

    @property
    def points(self) -> int:
        """Pixels of a tile that is read, and products of a tile, along an axis."""
        return self.outputs + 2

    @property
    def grid(self) -> Pair:
        """Tiles of an image."""
        return ceil_div(self.dst.height, self.outputs), ceil_div(self.dst.width, self.outputs)

    @property
    def taps(self) -> int:
        return self.points**2


@dataclass(frozen=True)
class Window(Step):
    """The maximum or mean over windows; the border of the map that it reads holds what padding stands for."""

    kind: str = "max"
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    before: Pair = (0, 0)


@dataclass(frozen=True)
class Mean(Step):
    """The mean over the whole map."""


@dataclass(frozen=True)
class Each(Step):
    """Nothing but ``after``."""


@dataclass(frozen=True)
class Enter(Step):
    """From a contiguous tensor of PyTorch, whose layout ``srcs`` has."""


@dataclass(frozen=True)
class Leave(Step):
    """To a contiguous tensor of PyTorch, whose layout is ``dst``."""

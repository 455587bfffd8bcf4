"""Shapes and index arithmetic of one filtered convolution.

Everything that says *where* a patch lies is computed here and nowhere else: the reference, the TE kernels, the
PyTorch operators and the benchmarks all ask a :class:`Geometry`.

Source: Yang, Li, Marculescu, "Efficient On-device Training via Gradient Filtering", CVPR 2023, section 3, and the
authors' ``Conv2dAvgOp``/``Conv2dDilatedOp``; generalised to non-square patches, any groups and negative offsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import GeometryError

Pair = tuple[int, int]

#: What stands for a patch: its side, or (height, width); :func:`as_pair` makes a pair of it.
Patch = int | Sequence[int]


def as_pair(value: int | Sequence[int], name: str, minimum: int) -> Pair:
    """Return ``value`` as (height, width); one integer stands for both. Raises GeometryError."""
    items: Sequence[Any] = value if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    if len(items) != 2 or any(isinstance(item, bool) or not hasattr(item, "__index__") for item in items):
        raise GeometryError(f"{name} must be one integer or a pair of integers, got {value!r}")
    pair = (int(items[0]), int(items[1]))
    if min(pair) < minimum:
        raise GeometryError(f"{name} must be at least {minimum}, got {value!r}")
    return pair


def ceil_div(a: int, b: int) -> int:
    """ceil(a / b) for b > 0, exact for negative a."""
    return -(-a // b)


def pad(size: int, piece: int) -> int:
    """The smallest multiple of ``piece`` that is at least ``size``."""
    return ceil_div(size, piece) * piece


@dataclass(frozen=True)
class Axis:
    """Rows (or columns) of one filtered convolution: sizes in pixels, offsets in pixels, patches counted."""

    size: int
    kernel: int
    stride: int
    padding: int
    dilation: int
    patch: int

    @cached_property
    def out(self) -> int:
        """Size of the convolution's output."""
        return (self.size + 2 * self.padding - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    @cached_property
    def patches(self) -> int:
        """Number of patches, P = ceil(out / patch)."""
        return ceil_div(self.out, self.patch)

    @cached_property
    def out_offset(self) -> int:
        """Patch i covers outputs [i * patch - out_offset, (i + 1) * patch - out_offset), clipped to the map."""
        return ceil_div(self.patches * self.patch - self.out, 2)

    @cached_property
    def window(self) -> int:
        """Size of a patch on the input."""
        return self.patch * self.stride

    @cached_property
    def in_offset(self) -> int:
        """Patch i covers inputs [i * window - in_offset, (i + 1) * window - in_offset), clipped; may be negative."""
        return ceil_div(self.patches * self.window - self.size, 2)

    def out_range(self, i: int) -> range:
        """Outputs in patch ``i``; never empty."""
        start = i * self.patch - self.out_offset
        return range(max(start, 0), min(start + self.patch, self.out))

    def in_range(self, i: int) -> range:
        """Inputs in patch ``i``; empty where the patch lies in the padding."""
        start = i * self.window - self.in_offset
        return range(max(start, 0), min(start + self.window, self.size))

    @cached_property
    def out_counts(self) -> tuple[int, ...]:
        """Number of outputs in each patch."""
        return tuple(len(self.out_range(i)) for i in range(self.patches))

    @cached_property
    def out_exact(self) -> bool:
        """Whether the output grid tiles the output map without clipping."""
        return self.patches * self.patch == self.out

    @cached_property
    def in_exact(self) -> bool:
        """Whether the input grid tiles the input map without clipping and without rows left over."""
        return self.patches * self.window == self.size

    @cached_property
    def covers_input(self) -> bool:
        """Whether every input row belongs to a patch."""
        return -self.in_offset <= 0 and self.patches * self.window - self.in_offset >= self.size


@dataclass(frozen=True)
class Geometry:
    """Shapes of one filtered convolution ``y = conv2d(x, weight)`` and its patch.

    Args:
        n, ci, co: batch size (may be 0), input channels, output channels.
        h, w: size of the input map in pixels.
        kernel, stride, padding, dilation, patch: an integer or a pair (height, width).
        groups: divides ``ci`` and ``co``.

    Raises:
        GeometryError: a value is out of range, or the convolution would have no output.
    """

    n: int
    ci: int
    co: int
    h: int
    w: int
    kernel: Pair
    patch: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        for name, minimum in (("kernel", 1), ("patch", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            object.__setattr__(self, name, as_pair(getattr(self, name), name, minimum))
        for name, minimum in (("n", 0), ("ci", 1), ("co", 1), ("h", 1), ("w", 1), ("groups", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__") or int(value) < minimum:
                raise GeometryError(f"{name} must be an integer of at least {minimum}, got {value!r}")
            object.__setattr__(self, name, int(value))
        for name in ("ci", "co"):
            if getattr(self, name) % self.groups:
                raise GeometryError(f"groups={self.groups} must divide {name}={getattr(self, name)}")
        if self.rows.out < 1 or self.cols.out < 1:
            raise GeometryError(
                f"a {self.kernel[0]}x{self.kernel[1]} kernel (dilation {self.dilation}) does not fit into the "
                f"{self.h}x{self.w} input with padding {self.padding}"
            )

    def _axis(self, d: int) -> Axis:
        return Axis(
            (self.h, self.w)[d], self.kernel[d], self.stride[d], self.padding[d], self.dilation[d], self.patch[d]
        )

    @cached_property
    def rows(self) -> Axis:
        """The vertical axis."""
        return self._axis(0)

    @cached_property
    def cols(self) -> Axis:
        """The horizontal axis."""
        return self._axis(1)

    @property
    def ci_group(self) -> int:
        """Input channels of one group."""
        return self.ci // self.groups

    @property
    def co_group(self) -> int:
        """Output channels of one group."""
        return self.co // self.groups

    @property
    def depthwise(self) -> bool:
        """One input and one output channel per group."""
        return self.groups == self.ci == self.co

    @property
    def dilated(self) -> bool:
        """Whether grad_x follows the dilated case: a convolution on the patch grid (``Conv2dDilatedOp``)."""
        return all(d >= r and d > 1 for d, r in zip(self.dilation, self.patch, strict=True))

    @property
    def grid_dilation(self) -> Pair:
        """Dilation in patches, d // r; only meaningful in the dilated case."""
        return (self.dilation[0] // self.patch[0], self.dilation[1] // self.patch[1])

    @property
    def grid_padding(self) -> Pair:
        """Zero patches before the grid in the dilated case; as torch's ``padding="same"``, the larger half is after."""
        return (
            self.grid_dilation[0] * (self.kernel[0] - 1) // 2,
            self.grid_dilation[1] * (self.kernel[1] - 1) // 2,
        )

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        """Shape of x and grad_x."""
        return (self.n, self.ci, self.h, self.w)

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        """Shape of y and grad_y."""
        return (self.n, self.co, self.rows.out, self.cols.out)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Shape of W and grad_W."""
        return (self.co, self.ci_group, *self.kernel)

    @property
    def grid(self) -> Pair:
        """Patches (vertically, horizontally)."""
        return (self.rows.patches, self.cols.patches)

    @property
    def saved_shape(self) -> tuple[int, int, int, int]:
        """Shape in which x~ is kept for the backward pass.

        Channels last, (n, ph, pw, ci), because both matrix products then read it along the channels; a depthwise
        convolution has no product over channels and keeps (n, ci, ph, pw).
        """
        ph, pw = self.grid
        return (self.n, self.ci, ph, pw) if self.depthwise else (self.n, ph, pw, self.ci)

    @property
    def covers_input(self) -> bool:
        """Whether every input pixel belongs to a patch (otherwise grad_x has rows or columns that stay zero)."""
        return self.rows.covers_input and self.cols.covers_input

    @property
    def key(self) -> str:
        """Readable and stable: equal exactly for equal geometries."""
        pairs = (("k", self.kernel), ("s", self.stride), ("p", self.padding), ("d", self.dilation))
        middle = "_".join(f"{letter}{a}x{b}" for letter, (a, b) in pairs)
        return (
            f"n{self.n}_ci{self.ci}_co{self.co}_{self.h}x{self.w}_{middle}_g{self.groups}"
            f"_r{self.patch[0]}x{self.patch[1]}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; ``Geometry(**d)`` gives an equal geometry."""
        return {name: list(v) if isinstance(v := getattr(self, name), tuple) else v for name in self.__match_args__}

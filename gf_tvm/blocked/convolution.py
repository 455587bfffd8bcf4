"""One convolution of PyTorch's tensors, whose weights change in every step, as a program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..core.geometry import Geometry
from ..core.workload import Workload, convolution_key
from ..machine.profiles import DeviceProfile
from .maps import MapLayout
from .steps import Convolution, Enter, Leave, Winograd
from .tiling import suits_winograd, tile_of

#: Pixels of the result, in the whole batch, from which on it is worth transforming changing weights: 36 numbers are
#: written for nine.
_PIXELS = 1024


@dataclass(frozen=True)
class ConvolutionProgram:
    """See :class:`gf_tvm.building.Program`. The function takes x, weight, bias (if there is one) and y, contiguous."""

    geometry: Geometry
    bias: bool

    @staticmethod
    def exists(geometry: Geometry) -> bool:
        """Whether there is one: not for groups of several channels."""
        return geometry.n > 0 and (geometry.groups == 1 or geometry.groups == geometry.ci == geometry.co)

    @property
    def key(self) -> str:
        """Equal for equal convolutions."""
        return convolution_key(self.geometry, self.bias)

    def module(self, profile: DeviceProfile, config_of: Callable[[Workload], dict[str, Any]]) -> Any:
        """The IRModule of the function ``main``; needs the compiler."""
        from .emit_packing import emit_convolution

        return emit_convolution(self, profile)

    def steps(self, profile: DeviceProfile) -> tuple[Enter, Convolution, Leave]:
        """From x to blocks, the convolution, from blocks to y."""
        g, lanes = self.geometry, profile.lanes
        _, _, height, width = g.y_shape
        made = MapLayout(g.co, height, width, lanes)
        settings = {
            "kernel": g.kernel,
            "stride": g.stride,
            "dilation": g.dilation,
            "groups": g.groups,
            "before": g.padding,
        }
        step = Convolution(g.n, made, (MapLayout(g.ci, g.h, g.w, lanes),), **settings)
        m = 1
        if suits_winograd(step) and g.n * height * width >= _PIXELS:
            m = 4
            step = Winograd(step.images, step.dst, step.srcs, outputs=m, **settings)
        sizes = [size + -size % m for size in (height, width)]
        below, right = (
            max(0, (out - 1) * s + (k - 1) * d + 1 - p - size)
            for out, s, k, d, p, size in zip(sizes, g.stride, g.kernel, g.dilation, g.padding, (g.h, g.w), strict=True)
        )
        block = g.ci if g.ci <= 4 and g.groups == 1 else lanes
        read = MapLayout(g.ci, g.h, g.w, block, *g.padding, below, right)
        step = replace(step, srcs=(read,))
        step = replace(step, tile=tile_of(step, profile))
        planes = MapLayout(g.ci, g.h, g.w, 1), MapLayout(g.co, height, width, 1)
        return Enter(g.n, read, (planes[0],)), step, Leave(g.n, planes[1], (made,))

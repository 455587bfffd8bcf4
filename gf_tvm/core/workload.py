"""Names of things to tune and compile: kernel x geometry x dtype x layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..errors import GeometryError
from .geometry import Geometry

#: What each kernel computes; its arguments are in :func:`gf_tvm.core.verify.argument_specs`.
KERNELS: dict[str, str] = {
    "filter_input": "x -> x~",
    "filter_grad": "grad_y -> g~, grad_b",
    "input_grad": "g~, W -> grad_x~",
    "weight_grad": "g~, x~ -> grad_W",
    "expand": "grad_x~ -> grad_x",
    "backward": "grad_y, x~, W -> grad_x, grad_W, grad_b",
    "backward_input": "grad_y, W -> grad_x, grad_b",
    "backward_weight": "grad_y, x~ -> grad_W, grad_b",
}

#: Storage dtypes; sums are always made in float32, and tensors on the patch grid are always float32 (a sum over a
#: patch overflows float16 and loses bits in bfloat16).
DTYPES = ("float32", "float16", "bfloat16")
LAYOUTS = ("nchw",)

#: Bytes: compiled kernels use aligned vector loads (torch's own allocations are aligned so, slices need not be).
ALIGNMENT = 64


@dataclass(frozen=True)
class Workload:
    """One thing to tune and compile. ``dtype`` is that of x, y, W and their gradients in memory."""

    kernel: str
    geometry: Geometry
    dtype: str = "float32"
    layout: str = "nchw"

    def __post_init__(self) -> None:
        for value, known, what in (
            (self.kernel, KERNELS, "kernel"),
            (self.dtype, DTYPES, "dtype"),
            (self.layout, LAYOUTS, "layout"),
        ):
            if value not in known:
                raise GeometryError(f"unknown {what} {value!r}; known: {', '.join(known)}")
        if self.geometry.n < 1:
            raise GeometryError("a kernel needs a batch of at least 1; an empty batch has nothing to compute")

    @property
    def gives_x(self) -> bool:
        """Of kernels with products: whether it computes the gradient of x, of full size or on the grid."""
        return self.kernel in ("backward", "backward_input", "input_grad")

    @property
    def gives_w(self) -> bool:
        """Of kernels with products: whether it computes grad_W."""
        return self.kernel in ("backward", "backward_weight", "weight_grad")

    @property
    def pools_grad(self) -> bool:
        """Of kernels with products: whether it takes grad_y, which it pools, and not g~."""
        return self.kernel in ("backward", "backward_input", "backward_weight")

    @property
    def key(self) -> str:
        """Readable and stable, usable as a file name and as a C symbol after ``gf_``."""
        return f"{self.kernel}_{self.geometry.key}_{self.dtype}_{self.layout}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "kernel": self.kernel,
            "geometry": self.geometry.to_dict(),
            "dtype": self.dtype,
            "layout": self.layout,
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Workload:
        """Inverse of :meth:`to_dict`. Raises GeometryError, also for missing or unknown fields."""
        try:
            return cls(value["kernel"], Geometry(**value["geometry"]), value["dtype"], value["layout"])
        except (KeyError, TypeError) as error:
            raise GeometryError(f"not a workload: {error}") from None


def convolution_key(geometry: Geometry, bias: bool) -> str:
    """The key of the program that computes a convolution's exact result, for libraries' programs; patches do not
    matter."""
    return f"convolution_{replace(geometry, patch=(1, 1)).key}{'_bias' if bias else ''}"

"""A convolution with a filtered backward pass, as a module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.geometry import Pair, Patch, as_pair
from ..errors import ModelError
from .functional import conv2d

if TYPE_CHECKING:
    from ..bundle.library import Library


class FilteredConv2d(nn.Conv2d):
    """``torch.nn.Conv2d`` with a filtered backward pass; see :func:`gf_tvm.functional.conv2d`.

    The arguments up to ``dtype`` are those of ``torch.nn.Conv2d``. With a ``padding_mode`` other than "zeros" the
    padding belongs to the map that is filtered.

    Args:
        patch: pixels of the output that share one gradient; an integer or a pair (height, width). It has no default:
            code that makes another layer of a layer's type, as adapters do, would change the patch unnoticed.
        library: what :func:`gf_tvm.load` returned, or None for plain PyTorch operators.

    Raises:
        TypeError: no ``patch``, or arguments that ``torch.nn.Conv2d`` does not have.
        GeometryError: ``patch`` is not one or two positive integers.
    """

    # Where users find it, whatever file it lies in: pickles name it so, and load after files have moved.
    __module__ = "gf_tvm.nn"

    # TorchScript gets the exact convolution, which needs neither.
    __jit_ignored_attributes__ = ("patch", "library")

    patch: Pair
    library: Library | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        patch: Patch,
        library: Library | None = None,
    ) -> None:
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode),
            device=device,
            dtype=dtype,
        )
        self.patch, self.library = as_pair(patch, "patch", 1), check_library(library)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, patch: Patch, library: Library | None = None) -> FilteredConv2d:
        """A new module with the same settings and the same Parameter objects as ``conv``, which stays as it is.

        Hooks stay with ``conv``. Raises ModelError for anything but a plain Conv2d or FilteredConv2d.
        """
        if type(conv) not in (nn.Conv2d, FilteredConv2d) or "weight" not in conv._parameters:
            raise ModelError(f"from_conv takes a plain Conv2d with its own weight, got {conv}")
        same = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        arguments: dict[str, Any] = {name: getattr(conv, name) for name in same}
        # On "meta", so that parameters which are replaced at once take no memory and no random numbers.
        new = cls(**arguments, bias=conv.bias is not None, device="meta", patch=patch, library=library)
        new.weight, new.bias = conv.weight, conv.bias
        return new.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        """x (n, ci, h, w) or (ci, h, w) -> y, as ``torch.nn.Conv2d``."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._conv_forward(input, self.weight, self.bias)  # type: ignore[no-any-return]
        padding: str | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        return conv2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            patch=self.patch,
            library=self.library,
        )

    def extra_repr(self) -> str:
        library = "" if self.library is None else f", library={self.library!r}"
        return f"{super().extra_repr()}, patch={self.patch}{library}"  # type: ignore[no-untyped-call]


def check_library(library: Library | None) -> Library | None:
    """``library``, if it is one. Raises ModelError."""
    if library is not None and not isinstance(getattr(library, "device_type", None), str):
        raise ModelError(f"library must be what gf_tvm.load(FILE) returned, or None; got {library!r}")
    return library

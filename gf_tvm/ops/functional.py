"""A filtered convolution as a function, in the manner of ``torch.nn.functional``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.geometry import Pair, as_pair
from ..errors import GeometryError
from . import flops as _flops  # noqa: F401  (registers what PyTorch counts of the operators)
from .derivatives import convolution, is_transformed

if TYPE_CHECKING:
    from ..bundle.library import Library


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    patch: int | Sequence[int] = 2,
    library: Library | None = None,
) -> Tensor:
    """``torch.nn.functional.conv2d`` with a filtered backward pass.

    The result is that of ``torch.nn.functional.conv2d``. For the backward pass only x's sum over each patch is kept;
    the gradients of x and weight are those of gradient filtering, the gradient of bias is exact. Without a library,
    or where it lacks what is needed (also float64, and tensors on another device than its kernels'), the same
    mathematics runs as plain PyTorch operators, and a :class:`gf_tvm.FallbackWarning` says so once.

    On a GPU, kernels run on the current stream of x's device, and nothing waits for them. A kernel's code is loaded
    at its first use, which a CUDA graph's capture does not allow: warm-up steps before the capture, which PyTorch asks
    for in any case, load it, or ``library.prepare(device)`` does.

    Contiguous tensors reach the kernels uncopied, unless they are slices at an address that vector loads cannot take.
    Channels-last and other tensors are made contiguous where a kernel reads them; the result then is channels last as
    torch's is, gradients are contiguous. Under autocast tensors are cast as torch casts them for its conv2d.

    Transforms of ``torch.func`` give filtered gradients; tangents (``jvp``, ``torch.autograd.forward_ad``) are exact.
    Second derivatives are not defined: asking for one raises DerivativeError. While ``torch.jit.trace``,
    ``torch.export`` or ``torch.onnx`` record a program, and where no gradient is recorded, this is torch's conv2d.

    Args:
        x: (n, ci, h, w) or (ci, h, w); a real floating dtype. n may be 0.
        weight: (co, ci/groups, kh, kw), of the same dtype.
        bias: (co), or None.
        stride, padding, dilation: an integer or a pair (height, width); padding also "valid" or "same". Where "same"
            needs one more row or column after the map than before it, it belongs to the map that is filtered.
        groups: divides ci and co.
        patch: pixels of the result that share one gradient; an integer or a pair (height, width).
        library: what :func:`gf_tvm.load` returned, or None.

    Returns:
        (n, co, hy, wy) or (co, hy, wy).

    Raises:
        GeometryError: shapes, dtypes or settings that do not describe a filtered convolution; torch's own error where
            a program is recorded, or compiled without gradients.
    """
    batched = x.dim() == 4
    if not batched and x.dim() != 3:
        raise GeometryError(f"x must be (n, c, h, w) or (c, h, w), got shape {tuple(x.shape)}")
    if weight.dim() != 4:
        raise GeometryError(f"weight must have 4 dimensions, got shape {tuple(weight.shape)}")
    stride, dilation = as_pair(stride, "stride", 1), as_pair(dilation, "dilation", 1)
    patch = as_pair(patch, "patch", 1)
    exported = torch.jit.is_tracing() or torch.compiler.is_exporting()  # type: ignore[attr-defined, no-untyped-call]
    if exported and not is_transformed():
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)  # what is exported runs without gf_tvm
    if not batched:
        x = x.unsqueeze(0)
    if isinstance(padding, str):
        x, padding = _pad(x, padding, weight, stride, dilation)
    else:
        padding = as_pair(padding, "padding", 0)
    x, weight, bias = cast_for_convolution(x, weight, bias)
    digest = "" if library is None else library.digest
    y = convolution(x, weight, bias, stride, padding, dilation, groups, patch, digest)
    return y if batched else y.squeeze(0)


def cast_for_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors in the dtype that autocast, where it is on, gives torch's conv2d."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = _cast(x, dtype), _cast(weight, dtype)
        bias = None if bias is None else _cast(bias, dtype)
    return x, weight, bias


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast does for torch's conv2d, which leaves float64 (and what is not floating) alone."""
    if tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.to(dtype)
    return tensor


def _pad(x: Tensor, padding: str, weight: Tensor, stride: Pair, dilation: Pair) -> tuple[Tensor, Pair]:
    """Resolve "valid" and "same" -> the map, one row or column longer where "same" is uneven, and the padding."""
    if padding == "valid":
        return x, (0, 0)
    if padding != "same":
        raise GeometryError(f'padding must be numbers, "valid" or "same", got {padding!r}')
    if stride != (1, 1):
        raise GeometryError(f'padding="same" needs stride 1, got {stride}')
    total = (dilation[0] * (weight.shape[2] - 1), dilation[1] * (weight.shape[3] - 1))
    if total[0] % 2 or total[1] % 2:
        x = F.pad(x, (0, total[1] % 2, 0, total[0] % 2))
    return x, (total[0] // 2, total[1] // 2)

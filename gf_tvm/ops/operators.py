"""The PyTorch operators of a filtered convolution: an exact forward pass and a filtered backward pass.

``gf_tvm::conv2d`` computes y and, where the weight is trained, x~; ``gf_tvm::conv2d_backward`` computes the
gradients. Both are opaque to ``torch.compile``. A library's kernels run where it has them
(:mod:`gf_tvm.ops.dispatch`); the PyTorch implementation of :mod:`gf_tvm.core.reference` runs everywhere else.

Operators take plain values only, so a library travels as its digest ("" stands for none).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bundle.kernel import Kernel
from ..bundle.library import get_library
from ..core import reference
from ..core.geometry import Axis, Geometry, Pair
from ..core.verify import from_saved, to_saved
from ..core.workload import ALIGNMENT, convolution_key
from ..errors import GeometryError
from .dispatch import AWAITED, as_kernel_takes, find_kernel, without_autocast

_SETTINGS = "int[] stride, int[] padding, int[] dilation, int groups, int[] patch, str library"


@lru_cache(maxsize=4096)  # building and checking one takes longer than launching a kernel
def make_geometry(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], *rest: Any) -> Geometry:
    (n, ci, h, w), (co, ci_group, kh, kw) = x_shape, weight_shape
    stride, padding, dilation, groups, patch = rest
    geometry = Geometry(n, ci, co, h, w, (kh, kw), patch, stride, padding, dilation, groups)
    if geometry.ci_group != ci_group:
        raise GeometryError(
            f"x has {ci} channels, but a weight of shape {weight_shape} with groups={groups} wants {ci_group * groups}"
        )
    return geometry


def check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise GeometryError for tensors that are not those of a convolution; leaves sizes to :class:`Geometry`."""
    for name, tensor, rank in (("x", x, 4), ("weight", weight, 4), ("bias", bias, 1)):
        if tensor is None:
            continue
        if tensor.dim() != rank:
            raise GeometryError(f"{name} must have {rank} dimensions, got shape {tuple(tensor.shape)}")
        if not tensor.dtype.is_floating_point:
            raise GeometryError(f"{name} must have a real floating dtype, got {tensor.dtype}")
        if tensor.dtype != x.dtype:
            raise GeometryError(f"{name} is {tensor.dtype}, but x is {x.dtype}: they must have one dtype")
    if bias is not None and bias.shape[0] != weight.shape[0]:
        raise GeometryError(f"bias has {bias.shape[0]} values for {weight.shape[0]} output channels")


def _format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """The memory format of y: channels last where one of them is in that format only, as torch's conv2d has it."""
    for tensor in (x, weight):
        if tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format


@torch.library.custom_op(
    "gf_tvm::conv2d",
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor? bias, {_SETTINGS}, bool save) -> (Tensor, Tensor)",
)
def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    patch: Sequence[int],
    library: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """A convolution's forward pass, and what its filtered backward pass keeps of x.

    Args:
        x, weight, bias: (n, ci, h, w), (co, ci/groups, kh, kw) and (co) or None; one real floating dtype, any strides.
        stride, padding, dilation, patch: pairs (height, width); patch in pixels of y.
        library: a loaded library's digest, or "".
        save: whether to compute x~; without it the weight gets no gradient.

    Returns:
        y (n, co, hy, wy), and x~ in ``geometry.saved_shape``, or an empty tensor where ``save`` is false.

    Raises:
        GeometryError: shapes, dtypes or settings that do not describe a filtered convolution.
    """
    check_tensors(x, weight, bias)
    geometry = make_geometry(
        tuple(x.shape), tuple(weight.shape), tuple(stride), tuple(padding), tuple(dilation), groups, tuple(patch)
    )
    with without_autocast(x.device.type):
        y = _compiled_convolution(x, weight, bias, geometry, library)
        if y is None:
            y = F.conv2d(x, weight, bias, geometry.stride, geometry.padding, geometry.dilation, groups)
            y = y.contiguous(memory_format=_format(x, weight))
        return y, _filter_input(x, geometry, library) if save else x.new_empty(0)


def _compiled_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, library: str
) -> Tensor | None:
    """A convolution's result by the library's program; None where it has none, or not for such tensors."""
    if library in ("", AWAITED) or geometry.n == 0:
        return None
    given = [x, weight] if bias is None else [x, weight, bias]
    if any(not t.is_cpu or t.dtype is not torch.float32 or not t.is_contiguous() for t in given):
        return None
    function = get_library(library).program(convolution_key(geometry, bias is not None))
    if function is None:
        return None
    y = x.new_empty(geometry.y_shape)
    function(*(t if t.data_ptr() % ALIGNMENT == 0 else t.clone() for t in given), y)
    return y


def _filter_input(x: Tensor, geometry: Geometry, library: str) -> Tensor:
    found = find_kernel(("filter_input",), geometry, x, library)
    if found is None:
        return to_saved(reference.filter_input(x, geometry), geometry)
    sums = x.new_empty(geometry.saved_shape, dtype=reference.sum_dtype(x.dtype))
    _, kernel = found
    kernel(as_kernel_takes(x, kernel), sums)
    return sums


@torch.library.custom_op(
    "gf_tvm::conv2d_backward",
    mutates_args=(),
    schema=f"(Tensor grad_y, Tensor saved, Tensor weight, SymInt[] x_shape, {_SETTINGS}, "
    "bool needs_x, bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor)",
)
def conv2d_backward(
    grad_y: Tensor,
    saved: Tensor,
    weight: Tensor,
    x_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    patch: Sequence[int],
    library: str,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """A convolution's filtered backward pass.

    Args:
        grad_y: (n, co, hy, wy), any strides.
        saved: x~ as ``gf_tvm::conv2d`` returned it; may be empty where grad_W is not needed.
        needs_x, needs_weight, needs_bias: the gradients to compute; the others are returned as empty tensors.

    Returns:
        grad_x (n, ci, h, w), grad_W (co, ci/groups, kh, kw), grad_b (co); contiguous, of grad_y's dtype.

    Raises:
        GeometryError: shapes that do not belong together, or grad_W without x~.
    """
    geometry = make_geometry(
        tuple(x_shape), tuple(weight.shape), tuple(stride), tuple(padding), tuple(dilation), groups, tuple(patch)
    )
    if tuple(grad_y.shape) != geometry.y_shape:
        raise GeometryError(f"grad_y must have shape {geometry.y_shape}, got {tuple(grad_y.shape)}")
    has_saved = tuple(saved.shape) == geometry.saved_shape
    if needs_weight and not has_saved:
        raise GeometryError(f"grad_W needs x~ of shape {geometry.saved_shape}, got {tuple(saved.shape)}")
    needs = (needs_x, needs_weight, needs_bias)
    with without_autocast(grad_y.device.type):
        if needs_x or needs_weight:
            exact = {(True, True): "backward", (True, False): "backward_input", (False, True): "backward_weight"}
            names = [exact[needs_x, needs_weight]]
            if has_saved and names != ["backward"]:
                names.append("backward")
            found = find_kernel(names, geometry, grad_y, library)
            if found is not None:
                name, kernel = found
                grad_y, saved, weight = (as_kernel_takes(tensor, kernel) for tensor in (grad_y, saved, weight))
                grads = _run_backward(name, kernel, grad_y, saved, weight, geometry)
                return _tuple(grad_y, *(grad if need else None for grad, need in zip(grads, needs, strict=True)))
        if has_saved:
            saved = from_saved(saved, geometry)
        return _tuple(grad_y, *reference.backward(grad_y, saved, weight, geometry, needs))


def _run_backward(
    name: str, kernel: Kernel, grad_y: Tensor, saved: Tensor, weight: Tensor, geometry: Geometry
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Call a backward kernel on contiguous tensors -> grad_x, grad_W, grad_b; None for what it does not compute."""
    grad_b = grad_y.new_empty(geometry.co)
    if name == "backward_weight":
        grad_w = grad_y.new_empty(geometry.weight_shape)
        kernel(grad_y, saved, grad_w, grad_b)
        return None, grad_w, grad_b
    # Kernels write patches only, so pixels outside of every patch have to be zero before.
    grad_x = (grad_y.new_empty if geometry.covers_input else grad_y.new_zeros)(geometry.x_shape)
    if name == "backward_input":
        kernel(grad_y, weight, grad_x, grad_b)
        return grad_x, None, grad_b
    grad_w = grad_y.new_empty(geometry.weight_shape)
    kernel(grad_y, saved, weight, grad_x, grad_w, grad_b)
    return grad_x, grad_w, grad_b


def _tuple(like: Tensor, *grads: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, an empty tensor for each None: an operator's outputs must be tensors, and distinct ones."""
    a, b, c = (like.new_empty(0) if grad is None else grad for grad in grads)
    return a, b, c


# Fake kernels: shapes only. A size may be symbolic, so they ask Axis, which computes with any kind of integer, where
# Geometry would pin every size to the number it has at the moment.


def _axes(
    x_shape: Sequence[int], weight: Tensor, stride: Any, padding: Any, dilation: Any, patch: Any
) -> tuple[Axis, Axis]:
    rows, cols = (
        Axis(x_shape[2 + d], weight.shape[2 + d], stride[d], padding[d], dilation[d], patch[d]) for d in (0, 1)
    )
    return rows, cols


@conv2d.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    patch: Pair,
    library: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    check_tensors(x, weight, bias)
    sizes = (*x.shape, *weight.shape)
    if all(isinstance(size, int) for size in sizes):
        make_geometry(
            tuple(x.shape), tuple(weight.shape), tuple(stride), tuple(padding), tuple(dilation), groups, tuple(patch)
        )
    (n, ci), co = x.shape[:2], weight.shape[0]
    rows, cols = _axes(x.shape, weight, stride, padding, dilation, patch)
    y = x.new_empty((n, co, rows.out, cols.out)).contiguous(memory_format=_format(x, weight))
    if not save:
        return y, x.new_empty(0)
    grid = (rows.patches, cols.patches)
    shape = (n, ci, *grid) if groups == ci == co else (n, *grid, ci)  # Geometry.saved_shape
    return y, x.new_empty(shape, dtype=reference.sum_dtype(x.dtype))


@conv2d_backward.register_fake
def _(
    grad_y: Tensor,
    saved: Tensor,
    weight: Tensor,
    x_shape: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    patch: Pair,
    library: str,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (x_shape, weight.shape, weight.shape[:1])
    needs = (needs_x, needs_weight, needs_bias)
    return _tuple(
        grad_y, *(grad_y.new_empty(shape) if need else None for shape, need in zip(shapes, needs, strict=True))
    )

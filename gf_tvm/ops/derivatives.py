"""What PyTorch may ask of a filtered convolution's derivatives, and which answers there are.

==========================================  ===========================================================
backward pass, ``vjp``, ``grad``            the filtered gradients
``jvp``, ``torch.autograd.forward_ad``      exact: the forward pass is an exact convolution, so its
                                            tangent is a convolution's; tangents of tangents too
``vmap`` of all these                       the mapped dimension joins the batch or the channels
second derivatives, by whichever way:       DerivativeError
backward through a backward pass, a
tangent of one, backward through a tangent
==========================================  ===========================================================

The formulas that are registered with the operators serve plain autograd and ``torch.compile``. ``torch.func`` and
``forward_ad`` do not ask for these; there the autograd functions of this module run the operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import Function, forward_ad

from ..core import reference
from ..core.geometry import Geometry
from ..core.verify import from_saved, to_saved
from ..errors import DerivativeError
from . import operators

_Grads = tuple[Tensor | None, ...]


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
    """y of a filtered convolution.

    Args:
        x, weight, bias, settings: what ``gf_tvm::conv2d`` takes before ``save``.
    """
    y: Tensor
    if is_transformed():
        # A tensor tells of one level of transforms only, so whatever any level may need is kept.
        y, _ = _apply(Convolution, x, weight, bias, *settings, True)
    elif not records(x, weight, bias):
        if not torch.compiler.is_compiling():  # where sizes may be symbols
            operators.check_tensors(x, weight, bias)
            operators.make_geometry(tuple(x.shape), tuple(weight.shape), *settings[:-1])
        return exact(x, weight, bias, *settings)
    elif _has_dual_level():
        y, _ = _apply(Convolution, x, weight, bias, *settings, weight.requires_grad)
    else:
        y, _ = operators.conv2d(x, weight, bias, *settings, weight.requires_grad)
    return y


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work."""
    return torch._C._are_functorch_transforms_active()


@_disable_dynamo  # which cannot trace autograd functions that have a formula for tangents
def _apply(function: type[Function], *arguments: Any) -> Any:
    return function.apply(*arguments)  # type: ignore[no-untyped-call]


def records(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is done with the tensors. Tells nothing under transforms of ``torch.func``."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def exact(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    patch: Sequence[int] = (),
    library: str = "",
) -> Tensor:
    """torch's own convolution: what a filtered one is where nobody differentiates it."""
    return F.conv2d(x, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)


def _has_dual_level() -> bool:
    """Whether tensors may have tangents of ``torch.autograd.forward_ad``."""
    return forward_ad._current_level >= 0


# First derivatives. The operator's formula and the autograd function share them.


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, *settings, _ = inputs
    _, saved = output
    # x~ is differentiable, so that whoever differentiates grad_W gets an error instead of zero.
    ctx.set_materialize_grads(False)  # else zeros of x~'s size would be made in every backward pass
    ctx.save_for_backward(saved, weight)
    ctx.x_shape, ctx.settings = x.shape, settings


def _gradients(ctx: Any, grad_y: Tensor | None, grad_saved: Tensor | None) -> _Grads:
    grads: list[Tensor | None] = [None, None, None]
    needs = ctx.needs_input_grad[:3]
    if grad_y is not None and any(needs):
        saved, weight = ctx.saved_tensors
        transformed = is_transformed() or _has_dual_level()
        arguments = (grad_y, saved, weight, ctx.x_shape, *ctx.settings, *needs)
        results = _apply(ConvolutionBackward, *arguments) if transformed else operators.conv2d_backward(*arguments)
        grads = [grad if need else None for grad, need in zip(results, needs, strict=True)]
    if grad_saved is not None and needs[0]:
        saved, weight = ctx.saved_tensors
        geometry = _geometry(ctx.x_shape, weight, ctx.settings)
        through_sums = reference.expand(from_saved(grad_saved, geometry), geometry).to(weight.dtype)
        grads[0] = through_sums if grads[0] is None else grads[0] + through_sums
    return (*grads, *(None,) * 7)


def _geometry(x_shape: Sequence[int], weight: Tensor, settings: Sequence[Any]) -> Geometry:
    """The geometry of a call that has succeeded."""
    sizes, weight_shape = (tuple(int(size) for size in shape) for shape in (x_shape, weight.shape))
    *pairs, groups, patch, _ = settings
    return operators.make_geometry(sizes, weight_shape, *(tuple(pair) for pair in pairs), groups, tuple(patch))


# Second derivatives

NO_SECOND = (
    "a filtered convolution has no second derivative, only its first gradients are defined; "
    "gf_tvm.unfilter_model(model) makes convolutions exact again"
)


def _refuse_backward(ctx: Any, *grads: Tensor | None) -> _Grads:
    if all(grad is None for grad in grads):
        return (None,) * len(ctx.needs_input_grad)
    raise DerivativeError(NO_SECOND)


operators.conv2d.register_autograd(_gradients, setup_context=_keep)
operators.conv2d_backward.register_autograd(_refuse_backward)


# Under transforms and in dual levels


class Convolution(Function):
    """``gf_tvm::conv2d`` with all derivatives; takes and returns what the operator does."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        y: Tensor
        y, saved = operators.conv2d(*arguments)
        return y, saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _keep(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:2])
        ctx.save = inputs[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> _Grads:
        return _gradients(ctx, *grads)

    @staticmethod
    def jvp(
        ctx: Any, x_tangent: Tensor | None, weight_tangent: Tensor | None, bias_tangent: Tensor | None, *_: None
    ) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        y_tangent = _tangent(x, weight, x_tangent, weight_tangent, bias_tangent, ctx.settings)
        if not ctx.save:
            return y_tangent, x.new_zeros(0)
        geometry = _geometry(x.shape, weight, ctx.settings)
        if x_tangent is None:  # PyTorch does not take None for a tangent of zero
            x_tangent = torch.zeros_like(x)
        return y_tangent, to_saved(reference.filter_input(x_tangent, geometry), geometry)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        size, (*leaves_and_settings, save) = info.batch_size, arguments
        arguments, at = _fold(size, in_dims, *leaves_and_settings)
        y, saved = _apply(Convolution, *arguments, save)
        if not save:
            return (_part(y, size, at), saved), (at, None)
        x, weight, _, *settings = arguments
        saved_at = 0 if at == 0 else _saved_channels(x.shape[1], weight, settings)
        return (_part(y, size, at), _part(saved, size, saved_at)), (at, saved_at)


class ConvolutionBackward(Function):
    """``gf_tvm::conv2d_backward``, which cannot be differentiated; takes and returns what the operator does."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        grad_x: Tensor
        grad_x, grad_w, grad_b = operators.conv2d_backward(*arguments)
        return grad_x, grad_w, grad_b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> _Grads:
        return _refuse_backward(ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> _Grads:
        raise DerivativeError(NO_SECOND)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        grad_y, saved, weight, x_shape, *settings, needs_x, needs_weight, needs_bias = arguments
        (grad_dim, saved_dim, weight_dim), size = in_dims[:3], info.batch_size
        n, ci, *map_size = x_shape
        empty = grad_y.new_empty(0)
        if weight_dim is None and not needs_weight and not needs_bias:  # one convolution of a larger batch
            grad_y, shape = _join(grad_y, grad_dim, size, 0), (size * n, ci, *map_size)
            grads = _apply(ConvolutionBackward, grad_y, empty, weight, shape, *settings, needs_x, False, False)
            return (_part(grads[0], size, 0), *grads[1:]), (0, None, None)
        grad_y, weight = _join(grad_y, grad_dim, size, 1), _join(weight, weight_dim, size, 0)
        settings = _with_groups(settings, size)
        shape = (n, size * ci, *map_size)
        if needs_weight:
            saved = _join(saved, saved_dim, size, _saved_channels(size * ci, weight, settings))
        needs = (needs_x, needs_weight, needs_bias)
        grads = _apply(ConvolutionBackward, grad_y, saved if needs_weight else empty, weight, shape, *settings, *needs)
        dims = tuple(at if need else None for at, need in zip((1, 0, 0), needs, strict=True))
        grads = tuple(grad if at is None else _part(grad, size, at) for grad, at in zip(grads, dims, strict=True))
        return grads, dims


class Exact(Function):
    """torch's convolution as the tangent of a filtered one: its tangents are exact, backward it is refused."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
        return exact(x, weight, bias, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_forward(*inputs[:2])
        ctx.settings = inputs[3:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> _Grads:
        return _refuse_backward(ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (x, weight), (x_tangent, weight_tangent, bias_tangent, *_) = ctx.saved_tensors, tangents
        return _tangent(x, weight, x_tangent, weight_tangent, bias_tangent, ctx.settings)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
        arguments, at = _fold(info.batch_size, in_dims, *arguments)
        return _part(_apply(Exact, *arguments), info.batch_size, at), at


def _tangent(
    x: Tensor,
    weight: Tensor,
    x_tangent: Tensor | None,
    weight_tangent: Tensor | None,
    bias_tangent: Tensor | None,
    settings: Sequence[Any],
) -> Tensor:
    """The tangent of a convolution's result."""
    # PyTorch turns forward mode off in here, which would make tangents of this tangent zero.
    with forward_ad._set_fwd_grad_enabled(True):
        x, weight = (forward_ad.unpack_dual(tensor).primal for tensor in (x, weight))  # type: ignore[no-untyped-call]
        return _product_rule(x, weight, x_tangent, weight_tangent, bias_tangent, settings)


def _product_rule(
    x: Tensor,
    weight: Tensor,
    x_tangent: Tensor | None,
    weight_tangent: Tensor | None,
    bias_tangent: Tensor | None,
    settings: Sequence[Any],
) -> Tensor:
    if x_tangent is None and weight_tangent is None:
        x_tangent = torch.zeros_like(x)
    total: Tensor | None = None
    for a, b in ((x_tangent, weight), (x, weight_tangent)):
        if a is not None and b is not None:
            part: Tensor = _apply(Exact, a, b, bias_tangent if total is None else None, *settings)
            total = part if total is None else total + part
    assert total is not None
    return total


# A mapped dimension becomes a part of the batch or, where there is a weight for each index, of the channels: as many
# times more groups.

_GROUPS = 3  # its place among the settings


def _fold(
    size: int, in_dims: Sequence[int | None], x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any
) -> tuple[tuple[Any, ...], int]:
    """``size`` mapped convolutions as one: its arguments, and the dimension of y that :func:`_part` takes apart."""
    x_dim, weight_dim, bias_dim = in_dims[:3]
    if weight_dim is None and bias_dim is None:
        return (_join(x, x_dim, size, 0), weight, bias, *settings), 0
    x, weight = _join(x, x_dim, size, 1), _join(weight, weight_dim, size, 0)
    bias = None if bias is None else _join(bias, bias_dim, size, 0)
    return (x, weight, bias, *_with_groups(settings, size)), 1


def _with_groups(settings: Sequence[Any], times: int) -> list[Any]:
    return [value * times if at == _GROUPS else value for at, value in enumerate(settings)]


def _join(tensor: Tensor, dim: int | None, size: int, at: int) -> Tensor:
    """``tensor`` with its mapped dimension ``dim``, or ``size`` times itself, as the outer part of dimension ``at``."""
    tensor = tensor.unsqueeze(at).repeat_interleave(size, at) if dim is None else tensor.movedim(dim, at)
    return tensor.flatten(at, at + 1)


def _part(tensor: Tensor, size: int, at: int) -> Tensor:
    """What :func:`_join` joined, apart; the mapped dimension is ``at``."""
    return torch.unflatten(tensor, at, (size, tensor.shape[at] // size))


def _saved_channels(ci: int, weight: Tensor, settings: Sequence[Any]) -> int:
    """Which dimension of x~ has the channels (``Geometry.saved_shape``)."""
    return 1 if settings[_GROUPS] == ci == weight.shape[0] else 3

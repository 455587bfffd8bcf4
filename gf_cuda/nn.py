"""Gradient filtering for PyTorch modules on a board: convolutions whose backward pass is a bundle's kernels.

For PyTorch 1.10 (Python 3.6) to 2.x. It computes what ``gf_tvm.nn`` computes, but has no plain PyTorch to fall back
to: a convolution that the bundle lacks is an error of the forward pass of its first training step.
"""

import logging
from functools import lru_cache
from typing import Any, Dict, Iterable, List, NamedTuple, NoReturn, Optional, Sequence, Tuple, TypeVar, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .bundle import Bundle, Convolution, Kernel
from .errors import GfCudaError, MissingKernelError
from .tensors import TensorKernel, as_argument, cuda, tensor_kernel

logger = logging.getLogger("gf_cuda")

M = TypeVar("M", bound=nn.Module)
Pair = Tuple[int, int]
Patch = Union[int, Sequence[int]]


#: Storage dtypes that kernels exist for.
_DTYPES = ("float32", "float16")


class ModelError(GfCudaError, ValueError):
    """A model, tensor, selection of layers, patch or library that cannot be used as asked."""


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    stride: Union[int, Sequence[int]] = 1,
    padding: Union[int, Sequence[int], str] = 0,
    dilation: Union[int, Sequence[int]] = 1,
    groups: int = 1,
    patch: Patch = 2,
    library: Optional[Bundle] = None,
) -> Tensor:
    """``torch.nn.functional.conv2d`` with a filtered backward pass.

    Where no gradient is asked for (``torch.no_grad``, nothing that requires one) it is torch's own conv2d, on any
    device and of any shape, and needs no kernel. Else x's sum over each patch is all that is kept of x, and only if
    weight requires a gradient; the gradients of x and weight are those of gradient filtering, that of bias is exact.
    Kernels run on the current stream, nothing waits for the GPU, and contiguous tensors are not copied. A kernel's code
    is loaded at its first use, so run warm-up steps before a CUDA graph's capture, as PyTorch asks for in any case.
    Under CUDA autocast tensors are cast as torch casts them for its conv2d. There are no second derivatives.

    Args:
        x: (n, ci, h, w) or (ci, h, w), float32 or float16, on a GPU.
        weight, bias: (co, ci/groups, kh, kw) and (co) or None, of the same dtype.
        stride, padding, dilation: an integer or a pair (height, width); padding also "valid" or "same".
        patch: pixels of the result that share one gradient; an integer or a pair (height, width).
        library: what :func:`gf_cuda.load` returned.

    Returns:
        (n, co, hy, wy) or (co, hy, wy).

    Raises:
        MissingKernelError: the library has no kernel for this convolution.
        ModelError: no library, a tensor that is not on a GPU, or settings that are none.
        GfCudaError: a kernel cannot be launched.
    """
    if x.dim() == 3:
        return conv2d(x.unsqueeze(0), weight, bias, stride, padding, dilation, groups, patch, library).squeeze(0)
    if x.dim() != 4 or weight.dim() != 4:
        raise ModelError(f"x and weight must have 4 dimensions, got {tuple(x.shape)} and {tuple(weight.shape)}")
    strides, dilations = _pair(stride, "stride", 1), _pair(dilation, "dilation", 1)
    if isinstance(padding, str):
        x, paddings = _pad(x, padding, weight, strides, dilations)
    else:
        paddings = _pair(padding, "padding", 0)
    x, weight, bias = _autocast(x, weight, bias)
    trained = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias)]
    if not any(trained) or x.shape[0] == 0:  # of an empty batch, the exact gradients are the filtered ones: zero
        return F.conv2d(x, weight, bias, strides, paddings, dilations, groups)
    if library is None:
        raise ModelError("no library was given: training needs library=gf_cuda.load(FILE)")
    if x.device.type != cuda.device_type:
        raise ModelError(f"x is on {x.device}: the kernels train on {cuda.device_type} tensors only")
    (n, ci, h, w), (co, _, kh, kw) = x.shape, weight.shape
    at = Convolution(n, ci, co, h, w, (kh, kw), _pair(patch, "patch", 1), strides, paddings, dilations, groups)
    kernels = _kernels(library, at, str(x.dtype).replace("torch.", ""), trained[0], trained[1])
    y: Tensor = _FilteredConv2d.apply(x, weight, bias, at, kernels)  # type: ignore[no-untyped-call]
    return y


class _Kernels(NamedTuple):
    """What one convolution's training step runs."""

    pooling: Optional[TensorKernel]  # where the weight is trained
    backward: Optional[TensorKernel]  # None where only the bias is trained

    @property
    def covers_input(self) -> bool:
        return self.backward is None or self.backward.kernel.covers_input


@lru_cache(maxsize=None)
def _kernels(library: Bundle, at: Convolution, dtype: str, needs_x: bool, needs_weight: bool) -> _Kernels:
    """Raises MissingKernelError."""
    pooling: Optional[Kernel] = None
    backward: Optional[Kernel] = None
    if needs_weight:
        pooling = library.find("filter_input", at, dtype) or _missing(library, "filter_input", at, dtype)
    if needs_x or needs_weight:
        name = "backward" if needs_x and needs_weight else "backward_input" if needs_x else "backward_weight"
        backward = library.find(name, at, dtype)
        if backward is None and needs_weight:
            backward = library.find("backward", at, dtype)  # computes grad_x as well, which nobody asked for
        if backward is None:
            _missing(library, name, at, dtype)
    return _Kernels(
        None if pooling is None else tensor_kernel(pooling), None if backward is None else tensor_kernel(backward)
    )


def _missing(library: Bundle, name: str, at: Convolution, dtype: str) -> NoReturn:
    has = []
    for kernel in library.kernels:
        if kernel.name == name:
            other = kernel.convolution
            if other._replace(n=at.n) == at and kernel.dtype == dtype:
                has.append(f"batch size {other.n}")
            elif other._replace(patch=at.patch) == at and kernel.dtype == dtype:
                has.append("patch {}x{}".format(*other.patch))
            elif other == at:
                has.append(kernel.dtype)
    only = f" (of this convolution it has {', '.join(sorted(set(has)))} only)" if has else ""
    lacks = f"{library!r} lacks {name} {at.key} {dtype}{only}"
    if dtype not in _DTYPES:
        raise MissingKernelError(f"{lacks}; kernels for GPUs exist for {' and '.join(_DTYPES)}")
    raise MissingKernelError(
        f"{lacks}; build a bundle that has it: gf-tvm build --device {library.device} --model MODEL "
        f"--input {at.n}xCxHxW --last K --patch {at.patch[0]}x{at.patch[1]} --dtype {dtype} --out FILE.gfb"
    )


class _FilteredConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Optional[Tensor], at: Convolution, kernels: _Kernels) -> Any:
        saved = None
        if kernels.pooling is not None:
            _, shape, dtype = kernels.pooling.arguments[1]
            saved = x.new_empty(shape, dtype=dtype)
            kernels.pooling(as_argument(x), saved)
        ctx.save_for_backward(saved, weight)
        ctx.kernels = kernels
        return F.conv2d(x, weight, bias, at.stride, at.padding, at.dilation, at.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Tuple[Optional[Tensor], ...]:
        saved, weight = ctx.saved_tensors
        kernels = ctx.kernels
        made: Dict[str, Tensor] = {}
        if kernels.backward is None:
            made["grad_b"] = grad_y.sum(dim=(0, 2, 3), dtype=torch.float32).to(grad_y.dtype)
        else:
            inputs = {"grad_y": grad_y, "filtered_x": saved, "weight": weight}
            arguments: List[Tensor] = []
            for name, shape, dtype in kernels.backward.arguments:
                if name in inputs:
                    arguments.append(as_argument(inputs[name]))
                    continue
                # The kernel writes patches only: pixels of x outside of every patch have to be zero before.
                make = grad_y.new_zeros if name == "grad_x" and not kernels.covers_input else grad_y.new_empty
                made[name] = make(shape, dtype=dtype)
                arguments.append(made[name])
            kernels.backward(*arguments)
        wanted = zip(("grad_x", "grad_w", "grad_b"), ctx.needs_input_grad)
        return tuple([made.get(name) if needed else None for name, needed in wanted] + [None, None])


def _autocast(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
    """What autocast does for torch's conv2d, which leaves float64 alone."""
    dtype = cuda.autocast_dtype(x)
    if dtype is None:
        return x, weight, bias
    a, b, c = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, weight, bias))
    assert a is not None
    assert b is not None
    return a, b, c


def _pad(x: Tensor, padding: str, weight: Tensor, stride: Pair, dilation: Pair) -> Tuple[Tensor, Pair]:
    """Resolve "valid" and "same" -> the map, one row or column longer where "same" is uneven, and the padding."""
    if padding == "valid":
        return x, (0, 0)
    if padding != "same" or stride != (1, 1):
        raise ModelError(f'padding must be numbers, "valid", or with stride 1 "same"; got {padding!r}, stride {stride}')
    rows, cols = dilation[0] * (weight.shape[2] - 1), dilation[1] * (weight.shape[3] - 1)
    if rows % 2 or cols % 2:
        x = F.pad(x, (0, cols % 2, 0, rows % 2))
    return x, (rows // 2, cols // 2)


def _pair(value: Union[int, Sequence[int]], name: str, minimum: int) -> Pair:
    try:
        a, b = (value, value) if isinstance(value, int) else (int(v) for v in value)
    except (TypeError, ValueError):
        raise ModelError(f"{name} must be one integer or a pair of integers, got {value!r}") from None
    if isinstance(value, bool) or min(a, b) < minimum:
        raise ModelError(f"{name} must be integers of at least {minimum}, got {value!r}")
    return a, b


class FilteredConv2d(nn.Conv2d):
    """``torch.nn.Conv2d`` with a filtered backward pass; see :func:`conv2d`.

    The arguments up to ``dtype`` are those of ``torch.nn.Conv2d``. With a ``padding_mode`` other than "zeros" the
    padding belongs to the map that is filtered.

    Args:
        patch: pixels of the output that share one gradient; an integer or a pair (height, width). It has no default:
            code that makes another layer of a layer's type, as adapters do, would change the patch unnoticed.
        library: what :func:`gf_cuda.load` returned; needed only for training.
    """

    patch: Pair
    library: Optional[Bundle]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        patch: Patch,
        library: Optional[Bundle] = None,
    ) -> None:
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode),
            device=device,
            dtype=dtype,
        )
        self.patch, self.library = _pair(patch, "patch", 1), _checked(library)

    def forward(self, input: Tensor) -> Tensor:
        """x (n, ci, h, w) or (ci, h, w) -> y, as ``torch.nn.Conv2d``."""
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return conv2d(
            *(input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups),
            patch=self.patch,
            library=self.library,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, patch={self.patch}, library={self.library!r}"  # type: ignore[no-untyped-call]


def filter_model(
    model: M,
    patch: Patch,
    last: Optional[int] = None,
    layers: Optional[Iterable[str]] = None,
    library: Optional[Bundle] = None,
) -> M:
    """Give convolutions of ``model`` a filtered backward pass, in place.

    Modules stay the same objects and only change their class: parameters, hooks, ``state_dict`` keys stay. Filtering a
    filtered convolution changes its patch and library; :func:`unfilter_model` undoes it.

    Args:
        model: any module, also a Conv2d itself.
        patch: pixels of an output that share one gradient: an integer or a pair (height, width).
        last: that many of the last Conv2d modules, in the order in which the model prints them. One that cannot be
            filtered (a subclass with a forward pass of its own, say) is left alone, with a warning of the logger.
        layers: or fully qualified names of Conv2d modules.
        library: what :func:`gf_cuda.load` returned.

    Returns:
        ``model``.

    Raises:
        ModelError: a selection that does not fit the model; nothing has been changed then.
    """
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    if (last is None) == (layers is None):
        raise ModelError("say which convolutions: either last=K or layers=[names]")
    pair, library = _pair(patch, "patch", 1), _checked(library)
    if last is not None:
        if isinstance(last, bool) or not isinstance(last, int) or not 1 <= last <= len(convs):
            raise ModelError(f"last must be between 1 and {len(convs)}, the number of convolutions; got {last!r}")
        names = list(convs)[-last:]
    else:
        assert layers is not None
        names = [layers] if isinstance(layers, str) else list(layers)
        for name in names:
            if name not in convs:
                raise ModelError(f"there is no convolution {name!r}; there are {', '.join(convs) or 'none'}")
    obstacles = {name: reason for name, reason in ((name, _obstacle(convs[name])) for name in names) if reason}
    if not names or (obstacles and (last is None or len(obstacles) == len(names))):
        shown = ["{} {}".format(name or "the model itself", reason) for name, reason in obstacles.items()]
        raise ModelError("; ".join(shown) or "layers is empty: name at least one convolution")
    for name in names:
        if name in obstacles:
            logger.warning("%s left alone: %s", name, obstacles[name])
            continue
        module: Any = convs[name]
        module.__class__ = FilteredConv2d
        module.patch, module.library = pair, library
    return model


def unfilter_model(model: M) -> M:
    """Turn every FilteredConv2d of ``model`` back into a Conv2d, in place; returns ``model``."""
    for module in model.modules():
        if type(module) is FilteredConv2d:
            del module.patch, module.library
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
    return model


def _obstacle(module: nn.Module) -> str:
    """Why ``module`` cannot become a FilteredConv2d; "" if it can."""
    if type(module) not in (nn.Conv2d, FilteredConv2d):
        return f"is a {type(module).__name__}, not a plain Conv2d"
    replaced = [name for name in ("forward", "_conv_forward") if name in vars(module)]
    return f"has a {replaced[0]} of its own" if replaced else ""


def _checked(library: Optional[Bundle]) -> Optional[Bundle]:
    if library is not None and not isinstance(library, Bundle):
        raise ModelError(f"library must be what gf_cuda.load(FILE) returned, got {library!r}")
    return library

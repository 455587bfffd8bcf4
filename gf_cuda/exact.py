"""The exact backward pass of a convolution on a GPU, in every form that a user of PyTorch can choose."""

import math
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .bundle import Convolution
from .errors import GfCudaError
from .timing import GpuTiming

#: Relative errors of cuDNN that are not those of a sum in float32: its Winograd algorithms lose digits, TF32 has ten
#: bits of mantissa.
WINOGRAD_ERROR, TF32_ERROR = 2e-4, 2.0**-9


class Way(NamedTuple):
    """Memory format of all tensors, and whether products are rounded to TF32."""

    name: str
    channels_last: bool
    tf32: bool

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def rounding(self) -> float:
        """Relative error that its arithmetic may have beside that of float32 sums."""
        return TF32_ERROR if self.tf32 else WINOGRAD_ERROR


#: All of them, in the order of columns.
WAYS = (
    Way("contiguous", False, False),
    Way("contiguous tf32", False, True),
    Way("channels_last", True, False),
    Way("channels_last tf32", True, True),
)

NO_TF32 = "no TF32 for this dtype or GPU"


class WrongResult(GfCudaError):
    """A result that rounding does not explain; nothing of that convolution was timed."""


def ways(dtype: str, capability: Tuple[int, int]) -> List[Way]:
    """Those that differ: float16 has no use for TF32, nor has a GPU before Ampere."""
    has_tf32 = dtype == "float32" and capability >= (8, 0)
    return [way for way in WAYS if has_tf32 or not way.tf32]


def out_of_memory(error: RuntimeError) -> bool:
    """PyTorch 1.13 and later have a class for it, and older ones the words."""
    return "out of memory" in str(error)


def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, at: Convolution, tf32: bool
) -> Callable[[], Tuple[Tensor, Tensor]]:
    """A call that computes grad_x and grad_W, in the tensors' memory format.

    PyTorch 1.10 has no operator for it: there, the forward pass is run once, and autograd runs its backward pass.
    """
    call = (_operator if _has_operator() else _autograd)(grad_y, x, weight, at)

    def run() -> Tuple[Tensor, Tensor]:
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = tf32
        try:
            grad_x, grad_w = call()[:2]
        finally:
            torch.backends.cudnn.allow_tf32 = before
        return grad_x, grad_w

    return run


def implementation(x: Tensor, weight: Tensor, at: Convolution) -> str:
    """Whose loops PyTorch chooses: "cudnn", or "torch" for its own (depthwise convolutions, mostly)."""
    settings = (at.stride, at.padding, at.dilation, False, (0, 0), at.groups)
    try:
        backend = str(torch._C._select_conv_backend(x, weight, None, *settings))
    except (AttributeError, TypeError):  # not a public function; PyTorch 1.10 has none
        own = at.groups == at.ci == at.co and x.dtype == torch.float32
        return "torch" if own else "cudnn"
    return "cudnn" if "Cudnn" in backend else "torch"


def _has_operator() -> bool:
    try:
        return bool(torch.ops.aten.convolution_backward)
    except (AttributeError, RuntimeError):
        return False


def _operator(grad_y: Tensor, x: Tensor, weight: Tensor, at: Convolution) -> Callable[[], Any]:
    settings = (at.stride, at.padding, at.dilation, False, (0, 0), at.groups, (True, True, False))
    return lambda: torch.ops.aten.convolution_backward(grad_y, x, weight, None, *settings)


def _autograd(grad_y: Tensor, x: Tensor, weight: Tensor, at: Convolution) -> Callable[[], Any]:
    with torch.enable_grad():
        inputs = (x.detach().requires_grad_(), weight.detach().requires_grad_())
        y = F.conv2d(inputs[0], inputs[1], None, at.stride, at.padding, at.dilation, at.groups)
    return lambda: torch.autograd.grad(y, inputs, grad_y, retain_graph=True)


def check(tensors: List[Tensor], at: Convolution, way: Way, key: str) -> None:
    """Compare one image's gradients with float64 on the CPU.

    Args:
        tensors: grad_y, x and W in the way's memory format.
        at: the whole batch's convolution; ``key`` names it.

    Raises:
        WrongResult: an error is larger than rounding explains.
    """
    grad_y, x, weight = tensors[0][:1], tensors[1][:1], tensors[2]
    one = at._replace(n=1)
    found = backward(grad_y, x, weight, one, way.tf32)()
    expected = backward(grad_y.cpu().double(), x.cpu().double(), weight.cpu().double(), one, False)()
    length = max(at.co // at.groups * at.kernel[0] * at.kernel[1], grad_y.shape[2] * grad_y.shape[3])
    allowed = way.rounding + torch.finfo(torch.float32).eps * (16 + 4 * math.sqrt(length))
    if weight.dtype != torch.float32:  # the framework may add in the storage dtype
        allowed += torch.finfo(weight.dtype).eps * math.sqrt(length)
    for name, a, b in zip(("grad_x", "grad_W"), found, expected):
        error = float((a.cpu().double() - b).abs().max() / b.abs().max())
        if not error <= allowed:
            raise WrongResult(
                f"{key}: {name} of the exact backward pass ({way.name}) is wrong, so it was not timed: relative error "
                f"{error:.3g} against float64, rounding explains {allowed:.3g}"
            )


def columns(times: Dict[str, GpuTiming], failures: Dict[str, str]) -> Dict[str, Dict[str, Any]]:
    """Times, or the reason why there are none, of every exact backward pass, for JSON."""
    found: Dict[str, Dict[str, Any]] = {}
    for way in WAYS:
        if way.name in times:
            t = times[way.name]
            found[way.name] = {"ms": t.median, "ms_quartiles": t.quartiles, "repeats": t.repeats}
        else:
            found[way.name] = {"ms": None, "reason": failures[way.name]}
    return found

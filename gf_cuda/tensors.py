"""Kernels on PyTorch's tensors: called by pointer, on PyTorch's current stream, with scratch memory of PyTorch.

PyTorch 1.10 to 2.x. The scratch memory is allocated while the launch's stream is current and given back at once:
PyTorch's allocator lets only later work of the same stream have it, and keeps it for a CUDA graph that is being
captured. Nothing here waits for the GPU or copies a tensor.
"""

from contextlib import AbstractContextManager
from typing import Dict, Iterable, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from .bundle import Kernel
from .errors import ProgramError
from .program import ALIGNMENT


class TorchCuda:
    """What kernels ask PyTorch about GPUs. ``cuda`` is the one that is used; tests put one for their emulated GPU."""

    device_type = "cuda"

    def ordinal(self, device: torch.device) -> int:
        """The number of the GPU that a tensor lies on, or, for plain "cuda", of the current one."""
        return torch.cuda.current_device() if device.index is None else device.index

    def stream(self, device: torch.device) -> int:
        """The driver's handle of the current stream."""
        handle: int = torch.cuda.current_stream(device).cuda_stream
        return handle

    def guard(self, device: torch.device) -> "AbstractContextManager[None]":
        """Within it the device is the current one."""
        return torch.cuda.device(device)

    def capturing(self) -> bool:
        """Whether the current stream is being captured into a CUDA graph; False where PyTorch cannot tell."""
        ask = getattr(torch.cuda, "is_current_stream_capturing", None)
        return ask is not None and bool(ask())

    def autocast_dtype(self, x: Tensor) -> Optional[torch.dtype]:
        """What autocast casts tensors on a GPU to; None where it is off, and for ``x`` elsewhere."""
        if not x.is_cuda or not torch.is_autocast_enabled():
            return None
        if hasattr(torch, "get_autocast_dtype"):  # PyTorch 2.4
            return torch.get_autocast_dtype("cuda")
        return torch.get_autocast_gpu_dtype()

    def scratch(self, nbytes: int, device: torch.device) -> Tuple[Optional[Tensor], int]:
        """Memory and its address, aligned to 256 bytes."""
        if not nbytes:
            return None, 0
        memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return memory, memory.data_ptr()  # PyTorch aligns what it allocates on a GPU to 512 bytes


cuda = TorchCuda()


class TensorKernel:
    """A bundle's kernel that takes tensors: inputs, then outputs, which it writes in place.

    Attributes:
        kernel: the bundle's.
        arguments: (name, shape, dtype) of each.
    """

    alignment = ALIGNMENT

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.arguments = tuple(
            (argument.name, tuple(argument.shape), getattr(torch, argument.dtype))
            for argument in kernel.program.arguments
        )
        self._expected = tuple((shape, dtype) for _, shape, dtype in self.arguments)
        self._scratch_bytes = kernel.program.scratch_bytes
        self._ordinals: Dict[torch.device, int] = {}  # devices that have the code

    def __call__(self, *tensors: Tensor) -> None:
        """Launch on the current stream of the tensors' GPU; returns before the GPU is done.

        Raises:
            ProgramError: a tensor of another shape or dtype, not contiguous, not on the first one's GPU, or at an
                address that is no multiple of 16 (a slice, say); or this would load code during a graph's capture.
            BundleError: the code does not run on this GPU.
            DriverError: the launch, or something before it, failed.
        """
        if len(tensors) != len(self._expected):
            raise self._refusal(tensors)
        device, index = tensors[0].device, tensors[0].get_device()
        pointers = []
        for tensor, (shape, dtype) in zip(tensors, self._expected):
            pointer = tensor.data_ptr()
            if (
                tensor.shape != shape
                or tensor.dtype is not dtype
                or tensor.get_device() != index
                or pointer % ALIGNMENT
                or not tensor.is_contiguous()
            ):
                raise self._refusal(tensors)
            pointers.append(pointer)
        ordinal = self._ordinals.get(device)
        if ordinal is None:
            ordinal = self._load(device, tensors)
        memory, scratch = cuda.scratch(self._scratch_bytes, device)
        self.kernel(pointers, scratch, cuda.stream(device), ordinal)
        del memory  # given back only after the launch

    def _load(self, device: torch.device, tensors: Sequence[Tensor]) -> int:
        """Make the code ready on ``device``, whose number is returned."""
        if device.type != cuda.device_type:
            raise self._refusal(tensors)
        ordinal = cuda.ordinal(device)
        with cuda.guard(device):
            if not self.kernel.is_loaded(ordinal) and cuda.capturing():
                raise ProgramError(
                    f"{self.kernel.key}: its code is not on the GPU yet, and cannot be loaded while a CUDA graph is "
                    "captured; run a warm-up step before (as PyTorch asks for), or library.prepare(device)"
                )
            self.kernel.prepare(ordinal)
        self._ordinals[device] = ordinal
        return ordinal

    def _refusal(self, tensors: Sequence[Tensor]) -> ProgramError:
        """Why these tensors are not those of this kernel."""
        key = self.kernel.key
        if len(tensors) != len(self.arguments):
            names = ", ".join(name for name, _, _ in self.arguments)
            return ProgramError(f"{key}: takes {len(self.arguments)} tensors ({names}), got {len(tensors)}")
        device = tensors[0].device
        for tensor, (name, shape, dtype) in zip(tensors, self.arguments):
            if tensor.device.type != cuda.device_type or tensor.device != device:
                return ProgramError(
                    f"{key}: {name} is on {tensor.device}; all must be on one {cuda.device_type} device"
                )
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                return ProgramError(
                    f"{key}: {name} must be {dtype} of shape {shape}, got {tensor.dtype} of {tuple(tensor.shape)}"
                )
            if not tensor.is_contiguous():
                return ProgramError(f"{key}: {name} must be contiguous")
            if tensor.data_ptr() % ALIGNMENT:
                return ProgramError(f"{key}: {name} must be aligned to {ALIGNMENT} bytes; clone this slice first")
        raise AssertionError("these tensors fit")


def as_argument(tensor: Tensor) -> Tensor:
    """``tensor`` as kernels take it: itself where it is contiguous and aligned, else a copy."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def prepare(kernels: Iterable[Kernel], device: Union[int, str, torch.device, None] = None) -> None:
    """Load kernels onto a GPU now, by default the current one, so that the first launches load nothing.

    Raises GfCudaError.
    """
    if device is None or isinstance(device, int):
        device = cuda.device_type if device is None else f"{cuda.device_type}:{device}"
    where = torch.device(device)
    if where.type != cuda.device_type:
        raise ProgramError(f"kernels of a GPU bundle cannot be loaded onto {where}; name a {cuda.device_type} device")
    with cuda.guard(where):
        ordinal = cuda.ordinal(where)
        for kernel in kernels:
            kernel.prepare(ordinal)


_tensor_kernels: Dict[Kernel, TensorKernel] = {}


def tensor_kernel(kernel: Kernel) -> TensorKernel:
    """The TensorKernel of a bundle's kernel, made once."""
    made = _tensor_kernels.get(kernel)
    if made is None:
        made = _tensor_kernels.setdefault(kernel, TensorKernel(kernel))
    return made

"""The CUDA side of :mod:`gf_tvm.bundle.library`: a GPU bundle's kernels, called with tensors on the GPU.

:mod:`gf_cuda` reads the bundle and launches through the CUDA driver API; TVM's runtime has no part in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gf_cuda
import gf_cuda.bundle
import gf_cuda.tensors

from ..core import verify
from ..core.workload import Workload
from ..errors import BundleError, DeviceError, GeometryError, GfTvmError
from .kernel import Kernel


@dataclass(frozen=True)
class CudaKernel(Kernel):
    """One compiled kernel of a GPU bundle."""

    function: gf_cuda.tensors.TensorKernel
    alignment: int = gf_cuda.tensors.TensorKernel.alignment

    def __call__(self, *tensors: Tensor) -> None:
        """Launch on contiguous CUDA tensors, inputs then outputs, written in place; no tensor is copied.

        It runs on PyTorch's current stream of the tensors' GPU, and the call returns before it is done. The first
        call on a GPU loads the kernel's code, which a CUDA graph's capture does not allow: run warm-up steps before,
        as PyTorch asks for in any case, or call :meth:`gf_tvm.Library.prepare`.

        Raises:
            GeometryError: tensors of other shapes, dtypes or devices, not contiguous, or at an address that the
                kernels' vector loads cannot take (a slice, say); or code would be loaded during a capture.
            BundleError: the kernel cannot run on this GPU.
            DeviceError: the launch, or what the GPU did before it, failed.
        """
        try:
            self.function(*tensors)
        except gf_cuda.GfCudaError as error:
            raise translated(error) from error

    def prepare(self, device: str | int | torch.device | None) -> None:
        """See :meth:`gf_tvm.Library.prepare`."""
        try:
            gf_cuda.tensors.prepare([self.function.kernel], device)
        except gf_cuda.GfCudaError as error:
            raise translated(error) from error


def device_type() -> str:
    """Of the tensors that the kernels take."""
    return gf_cuda.tensors.cuda.device_type


def translated(error: gf_cuda.GfCudaError) -> GfTvmError:
    """The same error among those of gf_tvm, which the command line prints as one line."""
    if isinstance(error, gf_cuda.BundleError):
        return BundleError(str(error))
    if isinstance(error, gf_cuda.ProgramError):
        return GeometryError(str(error))
    return DeviceError(str(error))


def open_bundle(path: Path, data: bytes) -> tuple[dict[str, Any], list[CudaKernel]]:
    """Check a GPU bundle's bytes, and that a GPU of this machine can run it -> its manifest and kernels.

    Raises:
        BundleError: it is damaged, altered, or made for another GPU; or no GPU can be used here.
    """
    try:
        bundle = gf_cuda.bundle.read_bytes(str(path), data)
        gf_cuda.bundle.check_machine(bundle)
    except gf_cuda.BundleError as error:
        raise BundleError(str(error)) from None
    except gf_cuda.GfCudaError as error:
        raise BundleError(f"{path.name}: was built for GPUs of {bundle.arch}, but none can be used: {error}") from None
    kernels = []
    for kernel in bundle.kernels:
        try:
            workload = Workload.from_dict(kernel.entry["workload"])
        except GeometryError as error:
            raise BundleError(f"{path.name}: the manifest does not fit its kernels ({error})") from None
        function = gf_cuda.tensors.tensor_kernel(kernel)
        # A compiled CPU kernel checks its tensors itself; on a GPU wrong sizes would overwrite whatever is beside.
        wanted = tuple((spec.name, spec.shape, spec.dtype) for spec in verify.argument_specs(workload))
        if function.arguments != wanted:
            raise BundleError(f"{path.name}: the program of {workload.key} does not have that kernel's arguments")
        kernels.append(CudaKernel(workload, kernel.schedule, function))
    return bundle.manifest, kernels

"""Errors of this package. Each message is one line that names the value and, where there is one, the way out."""

from typing import Tuple

# The context is lost with these: every later call of the process fails with the same code, whatever it asks for
# (NVIDIA, "CUDA Driver API", CUresult: "the process must be terminated and relaunched").
_STICKY = frozenset(
    (
        214,  # CUDA_ERROR_ECC_UNCORRECTABLE
        220,  # CUDA_ERROR_NVLINK_UNCORRECTABLE
        226,  # CUDA_ERROR_CONTAINED
        700,  # CUDA_ERROR_ILLEGAL_ADDRESS
        702,  # CUDA_ERROR_LAUNCH_TIMEOUT
        709,  # CUDA_ERROR_CONTEXT_IS_DESTROYED
        710,  # CUDA_ERROR_ASSERT
        714,  # CUDA_ERROR_HARDWARE_STACK_ERROR
        715,  # CUDA_ERROR_ILLEGAL_INSTRUCTION
        716,  # CUDA_ERROR_MISALIGNED_ADDRESS
        717,  # CUDA_ERROR_INVALID_ADDRESS_SPACE
        718,  # CUDA_ERROR_INVALID_PC
        719,  # CUDA_ERROR_LAUNCH_FAILED
        721,  # CUDA_ERROR_TENSOR_MEMORY_LEAK
        810,  # CUDA_ERROR_MPS_CLIENT_TERMINATED
        911,  # CUDA_ERROR_EXTERNAL_DEVICE
    )
)


class GfCudaError(RuntimeError):
    """Base of all errors that this package raises."""


class DriverError(GfCudaError):
    """A call of the CUDA driver API failed.

    A kernel that fails does so after its launch has returned: the next call that waits for it, or any other, reports
    it, and ``call`` is the one that did.

    Attributes:
        call: function of the API ("cuLaunchKernel").
        code: CUresult.
        name: of the code ("CUDA_ERROR_LAUNCH_FAILED").
    """

    def __init__(self, call: str, code: int, name: str, description: str) -> None:
        super().__init__(f"{call}: {name} ({code}): {description}")
        self.call = call
        self.code = code
        self.name = name
        self.description = description

    def __reduce__(self) -> Tuple[type, Tuple[str, int, str, str]]:
        # Errors travel between processes; an exception is otherwise made again from its message alone.
        return type(self), (self.call, self.code, self.name, self.description)

    @property
    def sticky(self) -> bool:
        """Whether the context is lost: no later call of this process can succeed."""
        return self.code in _STICKY


class NoDriverError(GfCudaError):
    """There is no CUDA driver, it is too old or cannot be initialised, or there is no such GPU."""


class NoCompilerError(GfCudaError):
    """Neither NVRTC nor nvcc was found."""


class CompileError(GfCudaError):
    """Source (or PTX) that does not compile, or not for this architecture.

    Attributes:
        log: all that the compiler said; "" if it was not asked.
    """

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log

    def __reduce__(self) -> Tuple[type, Tuple[str, str]]:
        return type(self), (str(self), self.log)


class ProgramError(GfCudaError):
    """A program, image or argument that does not fit what it is used for."""


class BundleError(GfCudaError):
    """A bundle that is damaged, or made for another device or version."""


class MissingKernelError(GfCudaError):
    """The bundle has no kernel for this shape."""

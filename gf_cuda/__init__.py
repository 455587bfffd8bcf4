"""What a machine with an NVIDIA GPU needs to run kernels that gf_tvm has compiled: the driver's API, and no TVM.

It runs with the Python (3.6) and the PyTorch of a Jetson Nano as well as with today's.
"""

from .driver import Device, Driver, get_driver
from .errors import (
    BundleError,
    CompileError,
    DriverError,
    GfCudaError,
    MissingKernelError,
    NoCompilerError,
    NoDriverError,
    ProgramError,
)

__all__ = [
    "BundleError",
    "CompileError",
    "Device",
    "Driver",
    "DriverError",
    "GfCudaError",
    "MissingKernelError",
    "NoCompilerError",
    "NoDriverError",
    "ProgramError",
    "get_driver",
]

"""What a machine with an NVIDIA GPU needs to run kernels that gf_tvm has compiled: the driver's API, and no TVM.

It runs with the Python (3.6) and the PyTorch of a Jetson Nano as well as with today's.
"""

from .bundle import Bundle, load
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
from .nvrtc import compile_source
from .program import Executable, Program

__all__ = [
    "Bundle",
    "BundleError",
    "CompileError",
    "Device",
    "Driver",
    "DriverError",
    "Executable",
    "GfCudaError",
    "MissingKernelError",
    "NoCompilerError",
    "NoDriverError",
    "Program",
    "ProgramError",
    "compile_source",
    "get_driver",
    "load",
]

"""The CUDA driver API through ctypes: calls by name, each checked, and a device's context.

Only symbols that CUDA 10.2 (JetPack 4) has and CUDA 13 still has; none of the CUDA runtime.
"""

import ctypes
import os
import threading
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from typing import Any, Dict, Tuple

from .errors import DriverError, NoDriverError

# c_void_p stands for the opaque handles, c_uint64 for CUdeviceptr, c_int for CUdevice and the enumerations.
_PROTOTYPES: Dict[str, Tuple[Any, ...]] = {
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxGetCurrent": (POINTER(c_void_p),),
    "cuCtxSetCurrent": (c_void_p,),
    "cuCtxSynchronize": (),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemcpyHtoD_v2": (c_uint64, c_void_p, c_size_t),
    "cuMemcpyDtoH_v2": (c_void_p, c_uint64, c_size_t),
    "cuMemsetD8Async": (c_uint64, c_ubyte, c_size_t, c_void_p),
    "cuModuleLoadDataEx": (POINTER(c_void_p), c_char_p, c_uint, POINTER(c_int), POINTER(c_void_p)),
    "cuModuleUnload": (c_void_p,),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuFuncGetAttribute": (POINTER(c_int), c_int, c_void_p),
    "cuLaunchKernel": (c_void_p,) + (c_uint,) * 7 + (c_void_p, c_void_p, c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventSynchronize": (c_void_p,),
    "cuEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
    "cuEventDestroy_v2": (c_void_p,),
}


class Api:
    """The functions of the driver library, which is initialised. Safe to use from several threads.

    Raises:
        NoDriverError: the library or one of its symbols is missing, or it cannot be initialised (no GPU).
    """

    def __init__(self, library: str = "libcuda.so.1") -> None:
        self.library = library
        self.process = os.getpid()
        try:
            loaded = ctypes.CDLL(library)
        except OSError as error:
            raise NoDriverError(f"no CUDA driver: {error}") from None
        self._functions: Dict[str, Any] = {}
        for name, types in _PROTOTYPES.items():
            try:
                function = getattr(loaded, name)
            except AttributeError:
                raise NoDriverError(
                    f"the CUDA driver {library} has no {name}: it must be of CUDA 10.2 or newer"
                ) from None
            function.argtypes = types
            function.restype = c_int
            self._functions[name] = function
        self.emulated = hasattr(loaded, "gf_cuda_emulated")
        self.launch_function = self._functions["cuLaunchKernel"]
        self._current_context = self._functions["cuCtxGetCurrent"]
        try:
            self.call("cuInit", 0)
        except DriverError as error:
            raise NoDriverError(f"the CUDA driver {library} cannot be used: {error}") from None

    def call(self, name: str, *arguments: Any) -> None:
        """Calls a function of the API. Raises DriverError."""
        code = self._functions[name](*arguments)
        if code:
            raise self.error(name, code)

    def error(self, call: str, code: int) -> DriverError:
        """The exception for what ``call`` returned."""
        words = []
        for function in ("cuGetErrorName", "cuGetErrorString"):
            text = c_char_p()
            # Fails for codes that this driver does not know.
            self._functions[function](code, byref(text))
            words.append(text.value.decode(errors="replace") if text.value else "unknown error")
        return DriverError(call, code, words[0], words[1])

    def current_context(self) -> int:
        """Handle of the context that is current in the calling thread; 0 if none is."""
        context = c_void_p()
        code = self._current_context(byref(context))
        if code:
            raise self.error("cuCtxGetCurrent", code)
        return context.value or 0


class Context:
    """A device's primary context, which PyTorch uses as well; the base of Device.

    Attributes:
        driver: the functions to call.
    """

    def __init__(self, driver: Api, handle: int) -> None:
        self.driver = driver
        self._handle = handle
        self._context = 0
        self._lock = threading.Lock()

    def activate(self) -> int:
        """Makes the primary context current in the calling thread.

        Returns the handle of the context that was current before if it is another one (for Driver.call
        ``cuCtxSetCurrent``), else 0.
        """
        if not self._context:
            with self._lock:
                if not self._context:
                    context = c_void_p()
                    self.driver.call("cuDevicePrimaryCtxRetain", byref(context), self._handle)
                    # Kept until the process ends, as PyTorch does.
                    self._context = context.value or 0
        before = self.driver.current_context()
        if before == self._context:
            return 0
        self.driver.call("cuCtxSetCurrent", self._context)
        return before

"""The CUDA driver: its devices, and what is made on them: memory, modules, streams, events.

The context is each device's primary one, which PyTorch uses as well: a tensor's ``data_ptr()`` and a stream's
``cuda_stream`` are valid here.
"""

import ctypes
import os
import threading
from ctypes import byref, c_int, c_size_t, c_ubyte, c_uint64, c_void_p
from typing import Any, Dict, Optional, Tuple

from .api import Api, Context
from .errors import CompileError, DriverError, NoDriverError, ProgramError
from .handles import Event, Memory, Module

# CUdevice_attribute
_MAX_THREADS, _MAX_BLOCK, _MAX_GRID, _SHARED, _REGISTERS, _CLOCK, _MULTIPROCESSORS, _L2 = 1, 2, 5, 8, 12, 13, 16, 38
_MAJOR, _MINOR = 75, 76
# CUjit_option
_JIT_LOG, _JIT_LOG_SIZE = 5, 6
_JIT_LOG_BYTES = 16384
# CUresult of cuModuleLoadDataEx: the image is not one, or of another architecture; PTX that the driver cannot compile.
_WRONG_IMAGE = (200, 209)
_WRONG_PTX = (218, 222)


class Driver(Api):
    """The driver library, initialised, and its devices. Safe to use from several threads.

    Raises:
        NoDriverError: the library or one of its symbols is missing, or it cannot be initialised (no GPU).
    """

    def __init__(self, library: str = "libcuda.so.1") -> None:
        super().__init__(library)
        self._devices: Dict[int, Device] = {}
        self._lock = threading.Lock()

    @property
    def version(self) -> int:
        """The newest CUDA that the driver knows: 10020 is 10.2."""
        value = c_int()
        self.call("cuDriverGetVersion", byref(value))
        return value.value

    def device_count(self) -> int:
        """GPUs that this process may use (CUDA_VISIBLE_DEVICES limits them, as for PyTorch)."""
        value = c_int()
        self.call("cuDeviceGetCount", byref(value))
        return value.value

    def device(self, ordinal: int = 0) -> "Device":
        """The GPU that PyTorch calls ``cuda:ordinal``. Raises NoDriverError if there is none."""
        with self._lock:
            if ordinal not in self._devices:
                count = self.device_count()
                if not 0 <= ordinal < count:
                    raise NoDriverError(f"no CUDA device {ordinal}: this machine has {count}")
                self._devices[ordinal] = Device(self, ordinal)
            return self._devices[ordinal]


class Device(Context):
    """One GPU; made by Driver.device.

    Methods that need a context make this device's primary context current in the calling thread, and leave it so.

    Attributes:
        arch: "sm_53".
        capability: (5, 3).
        max_block, max_grid: (x, y, z).
        registers_per_block: 32-bit.
        shared_bytes_per_block, total_memory, l2_bytes: bytes.
        clock_khz: highest clock of the multiprocessors.
    """

    def __init__(self, driver: Driver, ordinal: int) -> None:
        handle = c_int()
        driver.call("cuDeviceGet", byref(handle), ordinal)
        super().__init__(driver, handle.value)
        self.driver: Driver = driver
        self.ordinal = ordinal
        name = ctypes.create_string_buffer(256)
        driver.call("cuDeviceGetName", name, len(name), self._handle)
        self.name = name.value.decode(errors="replace")
        self.capability = (self._attribute(_MAJOR), self._attribute(_MINOR))
        self.arch = f"sm_{self.capability[0]}{self.capability[1]}"
        self.multiprocessors = self._attribute(_MULTIPROCESSORS)
        self.max_threads_per_block = self._attribute(_MAX_THREADS)
        self.max_block = (self._attribute(_MAX_BLOCK), self._attribute(_MAX_BLOCK + 1), self._attribute(_MAX_BLOCK + 2))
        self.max_grid = (self._attribute(_MAX_GRID), self._attribute(_MAX_GRID + 1), self._attribute(_MAX_GRID + 2))
        self.registers_per_block = self._attribute(_REGISTERS)
        self.shared_bytes_per_block = self._attribute(_SHARED)
        self.clock_khz = self._attribute(_CLOCK)
        self.l2_bytes = self._attribute(_L2)
        total = c_size_t()
        driver.call("cuDeviceTotalMem_v2", byref(total), self._handle)
        self.total_memory = total.value

    def __repr__(self) -> str:
        return f"Device({self.ordinal}, {self.name!r}, {self.arch})"

    def _attribute(self, number: int) -> int:
        value = c_int()
        self.driver.call("cuDeviceGetAttribute", byref(value), number, self._handle)
        return value.value

    def free_memory(self) -> Tuple[int, int]:
        """Bytes: (free, total). On a Jetson the CPU's memory is the GPU's."""
        self.activate()
        free, total = c_size_t(), c_size_t()
        self.driver.call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value, total.value

    def alloc(self, nbytes: int) -> Memory:
        """Memory of the device, aligned to 256 bytes, contents undefined. Raises DriverError (out of memory)."""
        if nbytes < 0:
            raise ProgramError(f"cannot allocate {nbytes} bytes")
        self.activate()
        pointer = c_uint64()
        # The driver refuses to allocate nothing; a program without scratch memory is nothing special to its caller.
        self.driver.call("cuMemAlloc_v2", byref(pointer), max(nbytes, 1))
        return Memory(self, pointer.value, nbytes)

    def upload(self, pointer: int, buffer: Any) -> None:
        """Copies a C-contiguous buffer (bytes, memoryview, NumPy array) to the device; waits for it."""
        view = memoryview(buffer)
        if view.nbytes:
            self.activate()
            view = view.cast("B")
            host = bytes(view) if view.readonly else (c_ubyte * view.nbytes).from_buffer(view)
            self.driver.call("cuMemcpyHtoD_v2", pointer, host, view.nbytes)

    def download(self, pointer: int, nbytes: int) -> bytearray:
        """A copy of ``nbytes`` bytes of the device's memory; waits for what the default stream does before."""
        result = bytearray(nbytes)
        self.download_into(pointer, result)
        return result

    def download_into(self, pointer: int, buffer: Any) -> None:
        """As download, into a writable C-contiguous buffer, which it fills."""
        view = memoryview(buffer)
        if view.readonly:
            raise ProgramError("cannot download into a read-only buffer")
        if view.nbytes:
            self.activate()
            host = (c_ubyte * view.nbytes).from_buffer(view.cast("B"))
            self.driver.call("cuMemcpyDtoH_v2", host, pointer, view.nbytes)

    def fill(self, pointer: int, byte: int, nbytes: int, stream: int = 0) -> None:
        """Sets each of ``nbytes`` bytes to ``byte``, asynchronously."""
        if nbytes:
            self.activate()
            self.driver.call("cuMemsetD8Async", pointer, byte, nbytes, stream)

    def synchronize(self, stream: int = 0) -> None:
        """Waits for a stream. Raises DriverError if a kernel failed."""
        self.activate()
        self.driver.call("cuStreamSynchronize", stream)

    def synchronize_context(self) -> None:
        """Waits for everything. Raises DriverError if a kernel failed."""
        self.activate()
        self.driver.call("cuCtxSynchronize")

    def new_stream(self) -> int:
        """Handle of a new stream, which waits for the default stream and lets it wait."""
        self.activate()
        stream = c_void_p()
        self.driver.call("cuStreamCreate", byref(stream), 0)
        return stream.value or 0

    def destroy_stream(self, stream: int) -> None:
        """Frees a stream of new_stream once its work is done; does not wait."""
        self.activate()
        self.driver.call("cuStreamDestroy_v2", stream)

    def event(self) -> Event:
        """A new event, with which time is measured."""
        return Event(self)

    def load_module(self, image: bytes) -> Module:
        """Loads a cubin or PTX, which the driver compiles.

        Raises:
            ProgramError: no image, or one for another architecture.
            CompileError: the driver cannot compile the PTX; ``log`` has its words.
            DriverError: else.
        """
        self.activate()
        # PTX is text that ends with a NUL; a cubin knows its length.
        data = image if image.startswith(b"\x7fELF") or image.endswith(b"\0") else image + b"\0"
        log = ctypes.create_string_buffer(_JIT_LOG_BYTES)
        options = (c_int * 2)(_JIT_LOG, _JIT_LOG_SIZE)
        values = (c_void_p * 2)(ctypes.addressof(log), _JIT_LOG_BYTES)
        handle = c_void_p()
        try:
            self.driver.call("cuModuleLoadDataEx", byref(handle), data, 2, options, values)
        except DriverError as error:
            text = log.value.decode(errors="replace").strip()
            if error.code in _WRONG_PTX:
                message = text.splitlines()[0] if text else error.description
                raise CompileError(
                    f"the driver cannot compile this PTX for {self.arch}: {message} ({error.name})", text
                ) from error
            if error.code in _WRONG_IMAGE:
                raise ProgramError(f"this image does not fit {self.name} ({self.arch}): {error}") from error
            raise
        return Module(self, handle.value or 0)


_drivers: Dict[str, Driver] = {}
_drivers_lock = threading.Lock()


def get_driver(library: Optional[str] = None) -> Driver:
    """The CUDA driver of this process; made at the first call.

    Args:
        library: another library than the environment's GF_CUDA_DRIVER, or else libcuda.so.1.

    Raises:
        NoDriverError: there is none that can be used.
    """
    name = library or os.environ.get("GF_CUDA_DRIVER") or "libcuda.so.1"
    with _drivers_lock:
        driver = _drivers.get(name)
        if driver is None:
            driver = _drivers[name] = Driver(name)
    if driver.process != os.getpid():
        raise NoDriverError(
            "this process was forked from one that used CUDA, which does not survive that: start it with 'spawn'"
        )
    return driver

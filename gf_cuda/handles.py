"""What lives on a device: memory, events, modules and their functions. Made by the methods of Device."""

import ctypes
from ctypes import byref, c_float, c_int, c_uint64, c_void_p
from typing import Dict, List, Sequence

from .api import Api, Context
from .errors import DriverError, ProgramError

# CUfunction_attribute
_FUNCTION_THREADS, _FUNCTION_SHARED, _FUNCTION_LOCAL, _FUNCTION_REGISTERS = 0, 1, 3, 4
_NOT_FOUND = 500


class Memory:
    """Memory of a device, made by Device.alloc; a context manager that frees it.

    Attributes:
        pointer: address on the device.
        nbytes: size in bytes.
    """

    def __init__(self, device: Context, pointer: int, nbytes: int) -> None:
        self._device = device
        self.pointer = pointer
        self.nbytes = nbytes

    def free(self) -> None:
        """Waits for the device and gives the memory back; does nothing the second time."""
        pointer, self.pointer = self.pointer, 0
        if pointer:
            self._device.activate()
            self._device.driver.call("cuMemFree_v2", pointer)

    def __enter__(self) -> "Memory":
        return self

    def __exit__(self, *_: object) -> None:
        self.free()


class Event:
    """A point in a stream's work, made by Device.event; a context manager that destroys it."""

    def __init__(self, device: Context) -> None:
        self._device = device
        device.activate()
        handle = c_void_p()
        device.driver.call("cuEventCreate", byref(handle), 0)
        self._handle = handle.value or 0

    def record(self, stream: int = 0) -> None:
        """The event happens when what the stream has been given so far is done."""
        self._device.activate()
        self._device.driver.call("cuEventRecord", self._handle, stream)

    def synchronize(self) -> None:
        """Waits for the event. Raises DriverError if a kernel before it failed."""
        self._device.driver.call("cuEventSynchronize", self._handle)

    def elapsed_ms(self, earlier: "Event") -> float:
        """Milliseconds between two events that have happened, to about half a microsecond."""
        value = c_float()
        self._device.driver.call("cuEventElapsedTime", byref(value), earlier._handle, self._handle)
        return value.value

    def destroy(self) -> None:
        """Frees the event; does nothing the second time."""
        handle, self._handle = self._handle, 0
        if handle:
            self._device.driver.call("cuEventDestroy_v2", handle)

    def __enter__(self) -> "Event":
        return self

    def __exit__(self, *_: object) -> None:
        self.destroy()


class Module:
    """Code on a device, made by Device.load_module."""

    def __init__(self, device: Context, handle: int) -> None:
        self._device = device
        self._handle = handle

    def function(self, name: str) -> "Function":
        """The kernel called ``name``. Raises ProgramError if there is none."""
        handle = c_void_p()
        try:
            self._device.driver.call("cuModuleGetFunction", byref(handle), self._handle, name.encode())
        except DriverError as error:
            if error.code != _NOT_FOUND:
                raise
            raise ProgramError(f"the image has no kernel {name!r}") from error
        return Function(self._device.driver, name, handle.value or 0)

    def unload(self) -> None:
        """Frees the code, whose functions must not be launched any more; does nothing the second time."""
        handle, self._handle = self._handle, 0
        if handle:
            self._device.activate()
            self._device.driver.call("cuModuleUnload", handle)


class _Arguments:
    """What cuLaunchKernel wants: values, and an array of the addresses of the values."""

    __slots__ = ("addresses", "values")

    def __init__(self, count: int) -> None:
        self.values = (c_uint64 * count)()
        base = ctypes.addressof(self.values)
        self.addresses = (c_void_p * count)(*(base + 8 * i for i in range(count)))


class Function:
    """A kernel whose parameters are all pointers, made by Module.function.

    Attributes:
        registers: 32-bit registers of a thread.
        shared_bytes: static shared memory of a block.
        local_bytes: memory of a thread for what found no register.
        max_threads: of a block, with the registers that the kernel needs.
    """

    def __init__(self, driver: Api, name: str, handle: int) -> None:
        self.name = name
        self._driver = driver
        self._handle = c_void_p(handle)
        self._launch = driver.launch_function
        # Argument blocks that no launch uses at present, by length: a launch takes one and gives it back, so that two
        # threads never share one. The operations on the lists are atomic.
        self._idle: Dict[int, List[_Arguments]] = {}
        self.registers = self._attribute(_FUNCTION_REGISTERS)
        self.shared_bytes = self._attribute(_FUNCTION_SHARED)
        self.local_bytes = self._attribute(_FUNCTION_LOCAL)
        self.max_threads = self._attribute(_FUNCTION_THREADS)

    def _attribute(self, number: int) -> int:
        value = c_int()
        self._driver.call("cuFuncGetAttribute", byref(value), number, self._handle)
        return value.value

    def launch(
        self, grid: Sequence[int], block: Sequence[int], shared: int, stream: int, arguments: Sequence[int]
    ) -> None:
        """Launches the kernel and returns; its device must be active in this thread.

        Args:
            grid, block: (x, y, z): blocks of the grid, threads of a block.
            shared: bytes of dynamic shared memory.
            stream: handle; 0 is the default stream.
            arguments: addresses on the device, one for each of the kernel's parameters. Neither their number nor
                what they point to can be checked here.

        Raises:
            DriverError: the launch was refused, or an earlier kernel failed.
        """
        count = len(arguments)
        idle = self._idle.get(count)
        if idle is None:
            idle = self._idle.setdefault(count, [])
        try:
            block_of_arguments = idle.pop()
        except IndexError:
            block_of_arguments = _Arguments(count)
        block_of_arguments.values[:] = arguments  # type: ignore[call-overload]  # any sequence
        code = self._launch(
            self._handle, grid[0], grid[1], grid[2], block[0], block[1], block[2], shared, stream,
            block_of_arguments.addresses, None,
        )  # fmt: skip
        idle.append(block_of_arguments)  # The driver has copied the arguments.
        if code:
            raise self._driver.error("cuLaunchKernel", code)

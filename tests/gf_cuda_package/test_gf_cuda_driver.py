"""gf_cuda's driver against the emulated one: what it does, and every way in which it can fail."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import emulated_cuda
import numpy as np
import pytest

import gf_cuda
from gf_cuda import api
from gf_cuda.driver import Device, Driver

_ADD = """
extern "C" __global__ void add(float* x, float* y) { y[threadIdx.x] = y[threadIdx.x] + x[threadIdx.x]; }
extern "C" __global__ void slowly(float* x, float* y) {
  for (volatile int i = 0; i < 20000; ++i) {}
  y[0] = y[0] + x[0];
}
extern "C" __global__ void one(float* x) { x[threadIdx.x] = 1.0f; }
"""


@pytest.fixture(autouse=True)
def gpu() -> Iterator[emulated_cuda.Emulated]:
    with emulated_cuda.environment() as emulated:
        yield emulated


@pytest.fixture
def device(gpu: emulated_cuda.Emulated) -> Device:
    return gf_cuda.get_driver().device()


def _image(kind: str = "cubin") -> bytes:
    return gf_cuda.compile_source(_ADD, "sm_53", kind=kind)[0]


# ---- Devices ---------------------------------------------------------------------------------------------------------


def test_what_is_said_of_the_device(device: Device) -> None:
    driver = gf_cuda.get_driver()
    assert (driver.version, driver.emulated, driver.device_count()) == (10020, True, 1)
    assert driver.device(0) is device
    assert gf_cuda.get_driver() is driver
    assert (device.ordinal, device.name, device.arch, device.capability) == (0, "Emulated Maxwell", "sm_53", (5, 3))
    assert (device.multiprocessors, device.max_threads_per_block, device.clock_khz) == (1, 1024, 921600)
    assert (device.registers_per_block, device.shared_bytes_per_block, device.l2_bytes) == (32768, 49152, 262144)
    assert (device.max_block, device.max_grid) == ((1024, 1024, 64), (2**31 - 1, 65535, 65535))
    assert device.total_memory == 4 << 30


def test_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GF_CUDA_DRIVER", "libno_such_driver.so")
    with pytest.raises(gf_cuda.NoDriverError, match=r"^no CUDA driver: libno_such_driver\.so: .*No such file"):
        gf_cuda.get_driver()


@pytest.mark.parametrize("symbol", api._PROTOTYPES)
def test_every_missing_symbol_is_named(symbol: str) -> None:
    with pytest.raises(gf_cuda.NoDriverError, match=f"has no {symbol}: it must be of CUDA 10.2 or newer"):
        Driver(str(emulated_cuda.without(symbol)))


@pytest.mark.parametrize("symbol", api._PROTOTYPES)
def test_no_symbol_that_cuda_has_retired(symbol: str) -> None:
    """The first versions of these were dropped or are of another meaning; only their successors are in 10.2 and 13."""
    retired = ("MemAlloc", "MemFree", "MemcpyHtoD", "MemcpyDtoH", "EventDestroy", "StreamDestroy", "DeviceTotalMem")
    assert symbol not in {f"cu{name}" for name in (*retired, "MemGetInfo", "CtxCreate", "CtxDestroy", "CtxPopCurrent")}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (100, r"CUDA_ERROR_NO_DEVICE \(100\): no CUDA-capable device is detected"),
        (803, r"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH \(803\)"),
    ],
)
def test_driver_that_cannot_be_initialised(gpu: emulated_cuda.Emulated, code: int, words: str) -> None:
    gpu.fault(f"cuInit:1:{code}")
    with pytest.raises(gf_cuda.NoDriverError, match=rf"cannot be used: cuInit: {words}"):
        Driver(str(gpu.path))


@pytest.mark.parametrize(("devices", "ordinal"), [(0, 0), (1, 1), (2, -1)])
def test_no_such_device(devices: int, ordinal: int) -> None:
    message = f"no CUDA device {ordinal}: this machine has {devices}"
    with emulated_cuda.environment(devices=devices) as gpu, pytest.raises(gf_cuda.NoDriverError, match=message):
        Driver(str(gpu.path)).device(ordinal)


def test_a_forked_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    gf_cuda.get_driver()
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(gf_cuda.NoDriverError, match=r"was forked .* start it with 'spawn'"):
        gf_cuda.get_driver()


# ---- Every call, failing ---------------------------------------------------------------------------------------------


def _with_module(use: Callable[[Any], object]) -> Callable[[Device], None]:
    def action(device: Device) -> None:
        module = device.load_module(_image())
        try:
            use(module)
        finally:
            module.unload()

    return action


def _with_event(use: Callable[[Any], object]) -> Callable[[Device], None]:
    def action(device: Device) -> None:
        with device.event() as event:
            event.record()
            use(event)

    return action


def _with_memory(use: Callable[[Device, int], object]) -> Callable[[Device], None]:
    def action(device: Device) -> None:
        with device.alloc(4) as memory:
            use(device, memory.pointer)

    return action


_ACTIONS: dict[str, Callable[[Device], object]] = {
    "cuDriverGetVersion": lambda device: device.driver.version,
    "cuDeviceGetCount": lambda device: device.driver.device_count(),
    "cuDeviceGet": lambda device: Device(device.driver, 0),
    "cuDeviceGetName": lambda device: Device(device.driver, 0),
    "cuDeviceGetAttribute": lambda device: Device(device.driver, 0),
    "cuDeviceTotalMem_v2": lambda device: Device(device.driver, 0),
    "cuDevicePrimaryCtxRetain": lambda device: Device(device.driver, 0).activate(),
    "cuCtxGetCurrent": lambda device: device.activate(),
    "cuCtxSetCurrent": lambda device: device.driver.call("cuCtxSetCurrent", 0) or device.activate(),
    "cuCtxSynchronize": lambda device: device.synchronize_context(),
    "cuMemGetInfo_v2": lambda device: device.free_memory(),
    "cuMemAlloc_v2": lambda device: device.alloc(4),
    "cuMemFree_v2": lambda device: device.alloc(4).free(),
    "cuMemcpyHtoD_v2": _with_memory(lambda device, pointer: device.upload(pointer, b"1234")),
    "cuMemcpyDtoH_v2": _with_memory(lambda device, pointer: device.download(pointer, 4)),
    "cuMemsetD8Async": _with_memory(lambda device, pointer: device.fill(pointer, 0, 4)),
    "cuModuleLoadDataEx": lambda device: device.load_module(_image()),
    "cuModuleUnload": lambda device: device.load_module(_image()).unload(),
    "cuModuleGetFunction": _with_module(lambda module: module.function("add")),
    "cuFuncGetAttribute": _with_module(lambda module: module.function("add")),
    "cuLaunchKernel": _with_module(lambda module: module.function("one").launch((1, 1, 1), (1, 1, 1), 0, 0, [0])),
    "cuStreamCreate": lambda device: device.new_stream(),
    "cuStreamSynchronize": lambda device: device.synchronize(),
    "cuStreamDestroy_v2": lambda device: device.destroy_stream(device.new_stream()),
    "cuEventCreate": lambda device: device.event(),
    "cuEventRecord": _with_event(lambda event: event.record()),
    "cuEventSynchronize": _with_event(lambda event: event.synchronize()),
    "cuEventElapsedTime": _with_event(lambda event: event.elapsed_ms(event)),
    "cuEventDestroy_v2": _with_event(lambda event: event.destroy()),
}


def test_every_function_has_its_failure() -> None:
    assert {*_ACTIONS, "cuInit", "cuGetErrorName", "cuGetErrorString"} == set(api._PROTOTYPES)


@pytest.mark.parametrize("call", _ACTIONS)
def test_every_failing_call_is_named(call: str, device: Device, gpu: emulated_cuda.Emulated) -> None:
    gpu.fault(f"{call}:1:702")
    with pytest.raises(gf_cuda.DriverError) as caught:
        _ACTIONS[call](device)
    # Sticky: what is tidied up after it fails in the same way, and must not hide it.
    first = caught.value
    while isinstance(first.__context__, gf_cuda.DriverError):
        first = first.__context__
    assert str(first) == f"{call}: CUDA_ERROR_LAUNCH_TIMEOUT (702): the launch timed out and was terminated"
    assert (first.call, first.code, first.name, first.sticky) == (call, 702, "CUDA_ERROR_LAUNCH_TIMEOUT", True)


def test_a_code_that_the_driver_does_not_know(device: Device, gpu: emulated_cuda.Emulated) -> None:
    gpu.fault("cuCtxSynchronize:1:4321")
    with pytest.raises(gf_cuda.DriverError, match=r"^cuCtxSynchronize: unknown error \(4321\)") as caught:
        device.synchronize_context()
    assert not caught.value.sticky


def test_a_failed_kernel_loses_the_context(device: Device, gpu: emulated_cuda.Emulated) -> None:
    """Its launch succeeds; the next call that waits reports it, and from then on all do."""
    gpu.fault("cuStreamSynchronize:2:700")
    device.synchronize()
    with pytest.raises(gf_cuda.DriverError, match="cuStreamSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS") as caught:
        device.synchronize()
    assert caught.value.sticky
    for action in (lambda: device.alloc(4), device.synchronize, device.new_stream):
        with pytest.raises(gf_cuda.DriverError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
            action()


def test_an_error_that_loses_nothing(device: Device, gpu: emulated_cuda.Emulated) -> None:
    with pytest.raises(gf_cuda.DriverError, match=r"cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY \(2\)") as caught:
        device.alloc(1 << 40)
    assert not caught.value.sticky
    device.alloc(4).free()


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(gf_cuda.DriverError("cuInit", 719, "NAME", "words")))
    assert (str(error), error.code, error.sticky) == ("cuInit: NAME (719): words", 719, True)
    compile_error = pickle.loads(pickle.dumps(gf_cuda.CompileError("first", "all")))
    assert (str(compile_error), compile_error.log) == ("first", "all")


# ---- Memory, streams, events -----------------------------------------------------------------------------------------


def test_memory_there_and_back(device: Device, gpu: emulated_cuda.Emulated) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    before = gpu.memory_used()
    with device.alloc(24) as memory:
        assert (memory.nbytes, memory.pointer % 256) == (24, 0)
        assert gpu.memory_used() - before == 24
        assert device.free_memory() == ((4 << 30) - before - 24, 4 << 30)
        for buffer in (values, values.tobytes(), bytearray(values.tobytes()), memoryview(values.tobytes())):
            device.fill(memory.pointer, 0xAB, 24)
            assert device.download(memory.pointer, 24) == b"\xab" * 24
            device.upload(memory.pointer, buffer)
            assert device.download(memory.pointer, 24) == values.tobytes()
        read = np.zeros_like(values)
        device.download_into(memory.pointer, read)
        assert (read == values).all()
    memory.free()
    assert (memory.pointer, gpu.memory_used()) == (0, before)


def test_nothing_to_copy(device: Device, gpu: emulated_cuda.Emulated) -> None:
    with device.alloc(0) as memory:
        gpu.forget_calls()
        device.upload(memory.pointer, b"")
        device.upload(memory.pointer, np.zeros((0, 3)))
        device.fill(memory.pointer, 0, 0)
        assert (device.download(memory.pointer, 0), gpu.calls()) == (bytearray(), [])


def test_buffers_that_cannot_be_copied(device: Device) -> None:
    with device.alloc(64) as memory:
        with pytest.raises(gf_cuda.ProgramError, match="read-only"):
            device.download_into(memory.pointer, b"1234")
        with pytest.raises(TypeError, match="contiguous"):
            device.upload(memory.pointer, np.zeros((4, 4), np.float32).T[:2])
        with pytest.raises(gf_cuda.ProgramError, match="-1 bytes"):
            device.alloc(-1)


def test_streams_and_events_measure_time(device: Device, gpu: emulated_cuda.Emulated) -> None:
    before = gpu.handles()
    stream = device.new_stream()
    with device.event() as begin, device.event() as end:
        begin.record(stream)
        with device.alloc(1 << 22) as memory:
            device.fill(memory.pointer, 0, memory.nbytes, stream)
        end.record(stream)
        end.synchronize()
        assert 0 < end.elapsed_ms(begin) < 10_000
        assert begin.elapsed_ms(end) < 0
    device.synchronize(stream)
    device.destroy_stream(stream)
    with pytest.raises(gf_cuda.DriverError, match="CUDA_ERROR_INVALID_HANDLE"):
        device.synchronize(stream)
    assert gpu.handles() == before


def test_the_context_is_made_current_once_in_each_thread(gpu: emulated_cuda.Emulated) -> None:
    device = gf_cuda.get_driver().device()
    device.activate()
    calls: list[list[str]] = []

    def use() -> None:
        gpu.forget_calls()
        device.alloc(4).free()
        device.synchronize()
        calls.append(gpu.calls())

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert [call for call in calls[0] if call.startswith("cuCtx")] == [
        "cuCtxGetCurrent", "cuCtxSetCurrent", "cuCtxGetCurrent", "cuCtxGetCurrent"
    ]  # fmt: skip


def test_two_devices_have_two_contexts() -> None:
    with emulated_cuda.environment(devices=2) as gpu:
        driver = Driver(str(gpu.path))
        first, second = driver.device(0), driver.device(1)
        first.activate()
        context = driver.current_context()
        assert first.activate() == 0
        assert second.activate() == context
        assert driver.current_context() != context
        driver.call("cuCtxSetCurrent", context)


# ---- Modules and launches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cubin", "ptx"])
def test_a_module_and_its_functions(kind: str, device: Device, gpu: emulated_cuda.Emulated) -> None:
    before = gpu.handles()
    module = device.load_module(_image(kind))
    function = module.function("add")
    assert (function.registers, function.shared_bytes, function.local_bytes, function.max_threads) == (32, 0, 0, 1024)
    x, y = np.arange(4, dtype=np.float32), np.ones(4, np.float32)
    function.launch((1, 1, 1), (4, 1, 1), 0, 0, (x.ctypes.data, y.ctypes.data))
    function.launch([1, 1, 1], [2, 1, 1], 0, device.new_stream(), [x.ctypes.data, y.ctypes.data])
    assert y.tolist() == [1, 3, 3, 4]
    with pytest.raises(gf_cuda.ProgramError, match="no kernel 'main'"):
        module.function("main")
    module.unload()
    module.unload()
    assert gpu.handles() == before + 1  # the stream


def test_images_that_do_not_fit(device: Device) -> None:
    for arch in ("sm_52", "sm_53"):
        device.load_module(gf_cuda.compile_source(_ADD, arch)[0]).unload()
    with pytest.raises(gf_cuda.ProgramError, match=r"does not fit Emulated Maxwell \(sm_53\): .*NO_BINARY_FOR_GPU"):
        device.load_module(gf_cuda.compile_source(_ADD, "sm_60")[0])
    with pytest.raises(gf_cuda.ProgramError, match=r"does not fit .*CUDA_ERROR_INVALID_IMAGE"):
        device.load_module(b"\x7fELF" + bytes(100))


def test_ptx_that_the_driver_cannot_compile(device: Device) -> None:
    with pytest.raises(gf_cuda.CompileError, match=r"for sm_53: ptxas .*Missing .version .*INVALID_PTX") as caught:
        device.load_module(b"no PTX")
    assert "fatal" in caught.value.log
    assert isinstance(caught.value.__cause__, gf_cuda.DriverError)
    broken = _image("ptx").replace(b"x[threadIdx.x] = 1.0f", b"x[] = 1.0f")
    with pytest.raises(gf_cuda.CompileError) as caught:
        device.load_module(broken)
    assert "kernels.ptx:7" in caught.value.log


def test_launches_that_are_refused() -> None:
    with emulated_cuda.environment(registers=96):
        device = gf_cuda.get_driver().device()
        module = device.load_module(_image())
        function = module.function("one")
        x = np.zeros(320, np.float32)
        assert (function.registers, function.max_threads) == (96, 320)
        function.launch((1, 1, 1), (320, 1, 1), 0, 0, [x.ctypes.data])
        assert x.all()
        with pytest.raises(gf_cuda.DriverError) as caught:
            function.launch((1, 1, 1), (352, 1, 1), 0, 0, [x.ctypes.data])
        assert str(caught.value) == (
            "cuLaunchKernel: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES (701): too many resources requested for launch"
        )
        assert not caught.value.sticky
        for grid, block, shared, stream, name in (
            ((1, 1, 1), (1025, 1, 1), 0, 0, "INVALID_VALUE"),
            ((1, 65536, 1), (1, 1, 1), 0, 0, "INVALID_VALUE"),
            ((1, 1, 1), (1, 1, 1), 49153, 0, "INVALID_VALUE"),
            ((1, 1, 1), (1, 1, 1), 0, 12345, "INVALID_HANDLE"),
        ):
            with pytest.raises(gf_cuda.DriverError, match=f"cuLaunchKernel: CUDA_ERROR_{name}"):
                function.launch(grid, block, shared, stream, [x.ctypes.data])
        module.unload()


def test_several_threads_launch_the_same_function(device: Device) -> None:
    """Each with its own arguments, of which the others wait to be read while one launch runs."""
    module = device.load_module(_image())
    function = module.function("slowly")
    totals = [np.zeros(1, np.float32) for _ in range(4)]
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            device.activate()
            step = np.full(1, index + 1, np.float32)
            pointers = [step.ctypes.data, totals[index].ctypes.data]
            for _ in range(100):
                function.launch((1, 1, 1), (1, 1, 1), 0, 0, pointers)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [total[0] for total in totals] == [100, 200, 300, 400]
    module.unload()

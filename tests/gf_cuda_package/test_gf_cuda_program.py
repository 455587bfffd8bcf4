"""gf_cuda's programs and executables: what they accept, refuse and launch, on the emulated GPU."""

from __future__ import annotations

import copy
import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import emulated_cuda
import numpy as np
import pytest

import gf_cuda
from gf_cuda import Executable, Program, ProgramError
from gf_cuda.driver import Device, Driver
from gf_cuda.program import load_file

# y = sqrt(sum of x**2): the partial sums, and twice their value, lie in scratch memory between the launches.
_NORM = """
extern "C" __global__ void squares(float* __restrict__ x, float* __restrict__ part, float* __restrict__ twice) {
  __shared__ float red[4];
  int i = (int)blockIdx.x * 4 + (int)threadIdx.x;
  red[(int)threadIdx.x] = x[i] * x[i];
  __syncthreads();
  if ((int)threadIdx.x == 0) {
    part[(int)blockIdx.x] = red[0] + red[1] + red[2] + red[3];
    twice[(int)blockIdx.x] = 2.0f * (red[0] + red[1] + red[2] + red[3]);
  }
}
extern "C" __global__ void root(float* __restrict__ twice, float* __restrict__ part, float* __restrict__ y) {
  y[0] = sqrtf(twice[0] + twice[1] + twice[2] - part[0] - part[1] - part[2]);
}
"""
_PROGRAM: dict[str, Any] = {
    "schema": 1,
    "arch": "sm_53",
    "arguments": [
        {"name": "x", "dtype": "float32", "shape": [3, 4], "output": False},
        {"name": "y", "dtype": "float32", "shape": [1], "output": True},
    ],
    "scratch_bytes": 512 + 12,
    "launches": [
        {
            "function": "squares",
            "grid": [3, 1, 1],
            "block": [4, 1, 1],
            "shared": 0,
            "arguments": [["argument", 0], ["scratch", 512], ["scratch", 0]],
        },
        {
            "function": "root",
            "grid": [1, 1, 1],
            "block": [1, 1, 1],
            "shared": 0,
            "arguments": [["scratch", 0], ["scratch", 512], ["argument", 1]],
        },
    ],
}


@pytest.fixture(autouse=True)
def gpu() -> Iterator[emulated_cuda.Emulated]:
    with emulated_cuda.environment() as emulated:
        yield emulated


@pytest.fixture
def device(gpu: emulated_cuda.Emulated) -> Device:
    return gf_cuda.get_driver().device()


def _changed(*path: Any, to: Any) -> dict[str, Any]:
    """The program with one value replaced."""
    value = copy.deepcopy(_PROGRAM)
    place: Any = value
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return value


def _executable(device: Device, value: Any = _PROGRAM, arch: str = "sm_53", kind: str | None = None) -> Executable:
    return Executable(device, Program.from_dict(value), gf_cuda.compile_source(_NORM, arch, kind=kind)[0])


def _aligned(count: int) -> np.ndarray:
    """float32 values at an address that a kernel may read in fours."""
    memory = np.full(count + 4, np.nan, np.float32)
    start = -memory.ctypes.data // 4 % 4
    return memory[start : start + count]


# ---- Programs as values ----------------------------------------------------------------------------------------------


def test_a_program_is_its_json() -> None:
    program = Program.from_dict(json.loads(json.dumps(_PROGRAM)))
    assert program.to_dict() == _PROGRAM
    assert program == Program.from_dict(program.to_dict())
    assert program != Program.from_dict(_changed("scratch_bytes", to=4096))
    assert (program.arch, program.capability, program.scratch_bytes) == ("sm_53", (5, 3), 524)
    x, y = program.arguments
    assert (x.name, x.dtype, x.shape, x.output, x.nbytes) == ("x", "float32", (3, 4), False, 48)
    assert (y.output, y._replace(dtype="float16", shape=()).nbytes) == (True, 2)
    assert [(launch.function, launch.threads) for launch in program.launches] == [("squares", 4), ("root", 1)]
    assert program.launches[0].arguments == (("argument", 0), ("scratch", 512), ("scratch", 0))


_LAUNCH = ("launches", 0)
_WRONG: list[tuple[Any, str]] = [
    ([], "a program: .*a JSON object"),
    (_changed("schema", to=2), r"schema 2; this gf_cuda reads 1"),
    ({}, r"schema None; this gf_cuda reads 1"),
    (_changed("more", to=1), "program: keys: "),
    (_changed("arch", to="sm53"), "arch: 'sm53'; expected sm_NN"),
    (_changed("arch", to="sm_53\n"), "arch: .*expected sm_NN"),
    (_changed("arch", to=53), "arch: 53; expected sm_NN"),
    (_changed("scratch_bytes", to=-1), "scratch_bytes: -1; expected an integer from 0"),
    (_changed("scratch_bytes", to=2.5), "scratch_bytes: 2.5"),
    (_changed("scratch_bytes", to=2**63), "scratch_bytes: 9223372036854775808"),
    (_changed("arguments", to={}), "arguments: {}; expected a list"),
    (_changed("arguments", 0, to="x"), "argument 0: 'x'; expected a JSON object"),
    (_changed("arguments", 0, "name", to=""), "argument 0: name: ''"),
    (_changed("arguments", 0, "name", to="y"), "names of the arguments: .*all different"),
    (_changed("arguments", 1, "dtype", to="bfloat16"), "argument 1: dtype: 'bfloat16'; expected float32 or float16"),
    (_changed("arguments", 1, "dtype", to=["float32"]), "argument 1: dtype: "),
    (_changed("arguments", 1, "shape", to=[3, 0]), "argument 1: shape: 0; expected an integer from 1"),
    (_changed("arguments", 1, "shape", to=7), "argument 1: shape: 7; expected a list"),
    (_changed("arguments", 1, "output", to=1), "argument 1: output: 1; expected true or false"),
    (_changed("launches", to=[]), "launches: .*at least one"),
    (_changed(*_LAUNCH, to={"function": "f"}), "launch 0: keys: "),
    (_changed(*_LAUNCH, "function", to="a b"), "launch 0: function: 'a b'"),
    (_changed(*_LAUNCH, "function", to=None), "launch 0: function: None"),
    (_changed(*_LAUNCH, "grid", to=[1, 1]), r"launch 0: grid: \[1, 1\]; expected \[x, y, z\]"),
    (_changed(*_LAUNCH, "grid", to=[1, 1, 0]), "launch 0: grid: 0; expected an integer from 1"),
    (_changed(*_LAUNCH, "block", to=[1, True, 1]), "launch 0: block: True; expected an integer from 1"),
    (_changed(*_LAUNCH, "shared", to="0"), "launch 0: shared: '0'; expected an integer from 0"),
    (_changed(*_LAUNCH, "arguments", 0, to=["argument"]), r"launch 0: argument 0: \['argument'\]"),
    (_changed(*_LAUNCH, "arguments", 0, to=["memory", 0]), 'argument 0: \'memory\'; expected "argument" or "scratch"'),
    (_changed(*_LAUNCH, "arguments", 0, to=["argument", 2]), "argument 0: 2; expected less than 2"),
    (_changed(*_LAUNCH, "arguments", 0, to=["argument", -1]), "argument 0: -1; expected an integer from 0"),
    (_changed(*_LAUNCH, "arguments", 1, to=["scratch", 528]), "argument 1: 528; expected an offset into 524 bytes"),
    (_changed(*_LAUNCH, "arguments", 1, to=["scratch", 8]), "argument 1: 8; expected a multiple of 16 bytes"),
    (_changed("scratch_bytes", to=0), "offset into 0 bytes"),
]


@pytest.mark.parametrize(("value", "message"), _WRONG, ids=[message[:40] for _, message in _WRONG])
def test_a_wrong_program_says_where(value: Any, message: str) -> None:
    with pytest.raises(ProgramError, match=message) as caught:
        Program.from_dict(value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


# ---- Files -----------------------------------------------------------------------------------------------------------


def test_a_program_as_a_file(tmp_path: Path) -> None:
    program = Program.from_dict(_PROGRAM)
    for kind in ("cubin", "ptx"):
        path = tmp_path / f"candidate.{kind}"
        program.save(str(path), "// Ω\n", b"\x7fELF" + bytes(range(256)), kind)
        read, source, image, read_kind = load_file(str(path))
        assert (read, source, image, read_kind) == (program, "// Ω\n", b"\x7fELF" + bytes(range(256)), kind)
    again = tmp_path / "again"
    program.save(str(again), "// Ω\n", b"\x7fELF" + bytes(range(256)), "ptx")
    assert again.read_bytes() == path.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again", "candidate.cubin", "candidate.ptx"]
    with pytest.raises(ProgramError, match="kind of the image: 'exe'; expected cubin or ptx"):
        program.save(str(again), "", b"", "exe")


def _rewrite(change: Callable[[dict[str, bytes]], None]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        change(entries)
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in entries.items():
                archive.writestr(name, data)

    return rewrite


def _other_schema(entries: dict[str, bytes]) -> None:
    entries["program.json"] = json.dumps({**json.loads(entries["program.json"]), "schema": 9}).encode()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(b""), "is no file of a compiled program"),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "is no file of a compiled program"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"image.cubin", b"image.cubix")), "expected .* image"),
        (_rewrite(lambda entries: entries.update({"image.cubin": b"other"})), "damaged: .* checksums"),
        (_rewrite(lambda entries: entries.update({"kernels.cu": b"other"})), "damaged: .* checksums"),
        (_rewrite(lambda entries: entries.update({"image.ptx": b""})), "expected program.json, kernels.cu and one"),
        (_rewrite(lambda entries: entries.update({"more": b""})), "expected program.json, kernels.cu and one"),
        (_rewrite(lambda entries: entries.pop("image.cubin")), "expected program.json, kernels.cu and one"),
        (_rewrite(lambda entries: entries.pop("program.json")), "wrong program.json"),
        (_rewrite(lambda entries: entries.update({"program.json": b"{"})), "wrong program.json"),
        (_rewrite(lambda entries: entries.update({"kernels.cu": b"\xff"})), "wrong program.json or source"),
        (_rewrite(lambda entries: entries.update({"program.json": b"[]"})), "a JSON object"),
        (_rewrite(_other_schema), "schema 9; this gf_cuda reads 1"),
    ],
)
def test_a_damaged_file(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "candidate"
    Program.from_dict(_PROGRAM).save(str(path), "//", b"image", "cubin")
    damage(path)
    with pytest.raises(ProgramError, match=message):
        load_file(str(path))


# ---- Executables -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cubin", "ptx"])
def test_an_executable_runs_its_launches(kind: str, device: Device, gpu: emulated_cuda.Emulated) -> None:
    handles, memory = gpu.handles(), gpu.memory_used()
    executable = _executable(device, kind=kind)
    assert {name: function.shared_bytes for name, function in executable.functions.items()} == {
        "squares": 16,
        "root": 0,
    }
    x, y = _aligned(12), _aligned(1)
    x[:] = np.arange(12)
    stream = device.new_stream()
    with device.alloc(executable.program.scratch_bytes) as scratch:
        gpu.forget_calls()
        executable([x.ctypes.data, y.ctypes.data], scratch.pointer, stream)
        # Nothing waits, nothing is allocated.
        assert gpu.calls() == ["cuCtxGetCurrent", "cuLaunchKernel", "cuLaunchKernel"]
        device.synchronize(stream)
    assert y[0] == np.sqrt(np.float32((x * x).sum()))
    executable.unload()
    executable.unload()
    device.destroy_stream(stream)
    assert (gpu.handles(), gpu.memory_used()) == (handles, memory)
    with pytest.raises(ProgramError, match="unloaded"):
        executable([x.ctypes.data, y.ctypes.data], 256, 0)


def test_calls_that_do_not_fit(device: Device, gpu: emulated_cuda.Emulated) -> None:
    executable = _executable(device)
    gpu.forget_calls()
    for pointers, scratch, message in (
        ([4096], 4096, "1 pointers; the program has 2 arguments"),
        ([4096, 0], 4096, "y: address 0x0 is no multiple of 16 bytes above 0"),
        ([4100, 4096], 4096, "x: address 0x1004 is no multiple"),
        ([4096, 4096], 0, "scratch: address 0x0 is no multiple"),
        ([4096, 4096], 4104, "scratch: address 0x1008 is no multiple"),
    ):
        with pytest.raises(ProgramError, match=message):
            executable(pointers, scratch, 0)
    assert gpu.calls() == []
    executable.unload()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (_changed(*_LAUNCH, "function", to="cubes"), "no kernel 'cubes'"),
        (
            _changed(*_LAUNCH, "block", to=[1025, 1, 1]),
            "uses 1025 threads of a block; Emulated Maxwell: at most 1024",
        ),
        (_changed(*_LAUNCH, "block", to=[1, 1, 65]), "squares: 65 along z of the block; .* at most 64"),
        (
            _changed(*_LAUNCH, "block", to=[288, 1, 1]),
            "288 threads of a block; its 120 registers .* most 256",
        ),
        (_changed(*_LAUNCH, "grid", to=[1, 65536, 1]), "squares: 65536 along y of the grid; .* at most 65535"),
        (_changed(*_LAUNCH, "shared", to=49152 - 15), "squares uses 49153 bytes of shared memory; .* at most 49152"),
    ],
)
def test_limits_are_checked_before_anything_runs(value: Any, message: str) -> None:
    with emulated_cuda.environment(registers=120) as gpu:
        before = gpu.handles()
        with pytest.raises(ProgramError, match=message):
            _executable(gf_cuda.get_driver().device(), value)
        assert gpu.handles() == before, "the module is still loaded"


@pytest.mark.parametrize(
    ("here", "arch", "kind", "runs"),
    [
        ("sm_53", "sm_53", "cubin", True),
        ("sm_53", "sm_52", "cubin", True),
        ("sm_60", "sm_53", "ptx", True),
        ("sm_60", "sm_53", "cubin", False),
        ("sm_52", "sm_53", "cubin", False),
        ("sm_52", "sm_53", "ptx", False),
    ],
)
def test_where_an_image_runs(here: str, arch: str, kind: str, runs: bool) -> None:
    with emulated_cuda.environment(arch=here) as gpu:
        device = Driver(str(gpu.path)).device()
        value = _changed("arch", to=arch)
        if runs:
            _executable(device, value, arch, kind).unload()
        else:
            with pytest.raises(ProgramError, match=rf"for {arch} does not run on Emulated Maxwell \({here}\)"):
                _executable(device, value, arch, kind)


def test_a_launch_that_fails(device: Device, gpu: emulated_cuda.Emulated) -> None:
    executable = _executable(device)
    x, y = _aligned(12), _aligned(1)
    with device.alloc(1024) as scratch:
        gpu.fault("cuLaunchKernel:2:701")
        with pytest.raises(gf_cuda.DriverError, match="LAUNCH_OUT_OF_RESOURCES"):
            executable([x.ctypes.data, y.ctypes.data], scratch.pointer, 0)
        gpu.fault()
        with pytest.raises(gf_cuda.DriverError, match="CUDA_ERROR_INVALID_HANDLE"):
            executable([x.ctypes.data, y.ctypes.data], scratch.pointer, 99)
    executable.unload()


def test_the_callers_device_stays_current() -> None:
    with emulated_cuda.environment(devices=2) as gpu:
        driver = Driver(str(gpu.path))
        executable = _executable(driver.device(1))
        driver.device(0).activate()
        before = driver.current_context()
        x, y = _aligned(12), _aligned(1)
        x[:] = 0
        with driver.device(1).alloc(1024) as scratch:
            driver.device(0).activate()
            executable([x.ctypes.data, y.ctypes.data], scratch.pointer, 0)
            assert (driver.current_context(), y[0]) == (before, 0)
            gpu.fault("cuLaunchKernel:1:701")
            with pytest.raises(gf_cuda.DriverError):
                executable([x.ctypes.data, y.ctypes.data], scratch.pointer, 0)
            assert driver.current_context() == before
        executable.unload()
        driver.call("cuCtxSetCurrent", 0)


def test_threads_share_an_executable(device: Device) -> None:
    executable = _executable(device)
    results: dict[int, bool] = {}

    def work(index: int) -> None:
        x, y = _aligned(12), _aligned(1)
        x[:] = index
        with device.alloc(executable.program.scratch_bytes) as scratch:
            right = True
            for _ in range(100):
                y[0] = np.nan
                executable([x.ctypes.data, y.ctypes.data], scratch.pointer, 0)
                right = right and y[0] == np.sqrt(np.float32(12 * index * index))
        results[index] = right

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(4), True)
    executable.unload()

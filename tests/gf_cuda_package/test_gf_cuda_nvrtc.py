"""gf_cuda's compilers: the emulated NVRTC (old and new), the real one where it is installed, and nvcc as a command."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import emulated_cuda
import pytest

import gf_cuda
from gf_cuda import CompileError, NoCompilerError, nvrtc

_COPY = 'extern "C" __global__ void copy(float* __restrict__ x, float* __restrict__ y) { y[threadIdx.x] = x[0]; }\n'


@pytest.fixture(autouse=True)
def gpu() -> Iterator[emulated_cuda.Emulated]:
    with emulated_cuda.environment() as emulated:
        yield emulated


@pytest.fixture
def old_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of CUDA 10.2."""
    monkeypatch.setenv("GF_CUDA_NVRTC", str(emulated_cuda.without(*emulated_cuda.SINCE_CUDA_11)))
    monkeypatch.setenv("GF_CUDA_EMULATED_NVRTC", "10")


def test_what_it_makes() -> None:
    assert nvrtc.version() == (11, 8)
    assert nvrtc.archs() == (35, 50, 52, 53, 60, 70, 80, 90)
    for kind, expected in ((None, "cubin"), ("cubin", "cubin"), ("ptx", "ptx")):
        image, made, log = gf_cuda.compile_source(_COPY, "sm_53", kind=kind)
        assert (made, log) == (expected, "")
        assert image.startswith(b"\x7fELF") == (expected == "cubin")
    assert b".target sm_53" in image


def test_a_gpu_newer_than_the_compiler_gets_ptx() -> None:
    image, kind, log = gf_cuda.compile_source(_COPY, "sm_120")
    assert (kind, b".target sm_90" in image) == ("ptx", True)
    assert "NVRTC 11.8" in log
    assert "does not know sm_120: PTX for compute_90" in log
    with pytest.raises(CompileError, match="makes no code for sm_120, only for sm_35, sm_50"):
        gf_cuda.compile_source(_COPY, "sm_120", kind="cubin")


def test_a_gpu_older_than_the_compiler_knows() -> None:
    with pytest.raises(CompileError, match=r"makes no code for sm_30, .*; pip install nvidia-cuda-nvrtc-cu11==11.8.89"):
        gf_cuda.compile_source(_COPY, "sm_30")


@pytest.mark.usefixtures("old_nvrtc")
def test_an_old_nvrtc_makes_ptx() -> None:
    assert nvrtc.version() == (10, 2)
    image, kind, log = gf_cuda.compile_source(_COPY, "sm_53")
    assert (kind, log, b".target sm_53" in image) == ("ptx", "", True)
    assert nvrtc.archs() == (35, 50, 52, 53, 60, 70)
    with pytest.raises(CompileError, match=r"NVRTC 10.2 .* makes PTX only; cubins need CUDA 11.1"):
        gf_cuda.compile_source(_COPY, "sm_53", kind="cubin")
    assert "PTX for compute_70" in gf_cuda.compile_source(_COPY, "sm_86")[2]


def test_arguments_that_name_nothing() -> None:
    for arch in ("53", "sm_", "compute_53", "sm_53x", "sm_53\n"):
        with pytest.raises(CompileError, match="expected sm_NN"):
            gf_cuda.compile_source(_COPY, arch)
    with pytest.raises(CompileError, match="kind 'exe': expected 'cubin', 'ptx' or None"):
        gf_cuda.compile_source(_COPY, "sm_53", kind="exe")


def test_the_first_error_and_the_whole_log() -> None:
    broken = _COPY + "\nint f() { return undefined_name; }\nint g() { return another_one; }\n"
    with pytest.raises(CompileError) as caught:
        gf_cuda.compile_source(broken, "sm_53", "mine.cu")
    assert str(caught.value).startswith("CUDA C does not compile: mine.cu:3:18: error: ")
    assert "undefined_name" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "another_one" in caught.value.log


def test_newer_language_than_cpp14_is_refused() -> None:
    """As CUDA 10.2 would: TVM prints floats as hexadecimal literals of C++17."""
    with pytest.raises(CompileError):
        gf_cuda.compile_source("__device__ float f() { return 0x1p+0f; }", "sm_53")


@pytest.mark.parametrize("call", ["nvrtcCreateProgram", "nvrtcCompileProgram"])
def test_calls_that_fail(call: str, gpu: emulated_cuda.Emulated) -> None:
    nvrtc.find()
    gpu.fault(f"{call}:1:1")
    with pytest.raises(CompileError, match=rf"{call}: NVRTC_ERROR_OUT_OF_MEMORY \(1\)"):
        gf_cuda.compile_source(_COPY, "sm_53")


def test_programs_are_given_back(gpu: emulated_cuda.Emulated) -> None:
    gpu.forget_calls()
    gf_cuda.compile_source(_COPY, "sm_53")
    with pytest.raises(CompileError):
        gf_cuda.compile_source("?", "sm_53")
    assert gpu.calls().count("nvrtcCreateProgram") == gpu.calls().count("nvrtcDestroyProgram") == 2


def test_threads_compile_at_once() -> None:
    sources = [_COPY.replace("x[0]", f"x[{index}]") for index in range(3)]
    images: dict[int, bytes] = {}

    def work(index: int) -> None:
        images[index] = gf_cuda.compile_source(sources[index], "sm_53", kind="ptx")[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(f"x[{index}]".encode() in images[index] for index in range(3))


# ---- Which compiler --------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No NVRTC, and an empty PATH, which is returned."""
    monkeypatch.delenv("GF_CUDA_NVRTC")
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(["libno_such_nvrtc.so.13"]))
    monkeypatch.setattr(nvrtc, "_found", {})
    monkeypatch.setenv("PATH", str(tmp_path))
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: not str(path).startswith("/usr/local/cuda") and exists(path))
    return tmp_path


@pytest.mark.usefixtures("nothing_there")
def test_no_compiler() -> None:
    with pytest.raises(NoCompilerError, match=r"neither NVRTC nor nvcc; pip install .*GF_CUDA_NVRTC"):
        gf_cuda.compile_source(_COPY, "sm_53")


@pytest.mark.parametrize(
    ("library", "words"), [("libno_such_nvrtc.so", "No such file"), ("libm.so.6", "undefined symbol: nvrtc")]
)
def test_a_named_compiler_is_used_or_refused(library: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GF_CUDA_NVRTC", library)
    with pytest.raises(NoCompilerError, match=rf"^NVRTC {library} cannot be used: .*{words}"):
        nvrtc.find()


def test_a_broken_compiler_is_not_passed_over(
    nothing_there: Path, monkeypatch: pytest.MonkeyPatch, gpu: emulated_cuda.Emulated
) -> None:
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(["libno_such_nvrtc.so.13", str(gpu.path)]))
    gpu.fault("nvrtcVersion:1:11")
    with pytest.raises(NoCompilerError, match="cannot be used: nvrtcVersion: NVRTC_ERROR"):
        nvrtc.find()
    assert nvrtc.version() == (11, 8)


def test_the_pinned_package_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("cuda_nvrtc/lib/libnvrtc.so.12", "cuda_nvrtc/lib/libnvrtc.so.11.2", "cu13/lib/libnvrtc.so.13"):
        (tmp_path / "nvidia" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nvidia" / name).touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    found = [path.replace(str(tmp_path), "") for path in nvrtc._candidates()]
    assert found[:2] == ["/nvidia/cuda_nvrtc/lib/libnvrtc.so.11.2", "libnvrtc.so.13"]
    assert {"/nvidia/cu13/lib/libnvrtc.so.13", "/nvidia/cuda_nvrtc/lib/libnvrtc.so.12"} < set(found[-3:])


_NVCC = """#!/bin/sh
case "$*" in
  --version) echo "Cuda compilation tools, release 10.2, V10.2.300" ;;
  --help) echo "Allowed values for this option: 'compute_30','compute_53','compute_62','sm_30','sm_53','sm_62'." ;;
  *) while read -r line; do
       case "$line" in *broken*) echo "$6(1): error: identifier is undefined" >&2; exit 1 ;; esac
     done < "$6"
     echo "$@" > image; echo "a warning" >&2 ;;
esac
"""


def test_nvcc_where_that_is_all_there_is(nothing_there: Path) -> None:
    nvcc = nothing_there / "nvcc"
    nvcc.write_text(_NVCC)
    nvcc.chmod(0o755)
    assert str(nvrtc.find()) == f"nvcc 10.2 ({nvcc})"
    assert (nvrtc.version(), nvrtc.archs()) == ((10, 2), (30, 53, 62))
    image, kind, log = gf_cuda.compile_source(_COPY, "sm_53", "mine.cu")
    assert image.split() == b"-cubin -arch=sm_53 --std=c++14 -o image mine.cu".split()
    assert (kind, log) == ("cubin", "a warning")
    image, kind, _ = gf_cuda.compile_source(_COPY, "sm_72")
    assert (image.split()[:2], kind) == ([b"-ptx", b"-arch=compute_62"], "ptx")
    with pytest.raises(CompileError) as caught:
        gf_cuda.compile_source("broken\n", "sm_53")
    assert str(caught.value) == "CUDA C does not compile: kernels.cu(1): error: identifier is undefined"


def test_nvcc_that_does_not_run(nothing_there: Path) -> None:
    nvcc = nothing_there / "nvcc"
    nvcc.write_text("#!/no/such/interpreter\n")
    nvcc.chmod(0o755)
    with pytest.raises(NoCompilerError, match="nvcc cannot be used"):
        nvrtc.find()


# ---- The real one ----------------------------------------------------------------------------------------------------

#: GF_CUDA_NVRTC_OLD names the library of CUDA 10.2 where somebody has one.
_REAL = [path for path in ("", os.environ.get("GF_CUDA_NVRTC_OLD")) if path is not None]


@pytest.mark.parametrize("library", _REAL)
def test_the_real_nvrtc(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty name is the package's, which the ``cuda`` extra installs."""
    if not library and importlib.util.find_spec("nvidia.cuda_nvrtc") is None:
        pytest.skip("pip install nvidia-cuda-nvrtc-cu11==11.8.89")
    if library:
        monkeypatch.setenv("GF_CUDA_NVRTC", library)
    else:
        monkeypatch.delenv("GF_CUDA_NVRTC")
    monkeypatch.setattr(nvrtc, "_found", {})
    arch = "sm_53" if nvrtc.version() >= (11, 1) else "sm_52"  # a PC's 10.2 does not know the Jetson's
    image, kind, _ = gf_cuda.compile_source(_COPY, arch)
    if nvrtc.version() >= (11, 1):
        em_cuda = 190
        assert (kind, image[:4], int.from_bytes(image[18:20], "little")) == ("cubin", b"\x7fELF", em_cuda)
    else:
        assert (kind, f".target {arch}".encode() in image) == ("ptx", True)
    assert f".target {arch}".encode() in gf_cuda.compile_source(_COPY, arch, kind="ptx")[0]
    with pytest.raises(CompileError, match=r"kernels.cu\(1\): error: identifier \"nothing\" is undefined"):
        gf_cuda.compile_source('extern "C" __global__ void f(float* x) { x[0] = nothing; }', arch)
    # A real image is none for the emulated GPU.
    if kind == "cubin":
        with pytest.raises(gf_cuda.ProgramError, match="NO_BINARY_FOR_GPU"):
            gf_cuda.get_driver().device().load_module(image)

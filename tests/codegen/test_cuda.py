"""From schedules to programs for GPUs: the launches that are read off, the source, what the code needs, its limits."""

from __future__ import annotations

import ctypes
import locale
import os
import random
import re
import struct
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gf_cuda import compile_source, nvrtc
from gf_tvm.codegen import cuda
from gf_tvm.codegen.cubin import Resources, read_resources
from gf_tvm.core.geometry import Geometry
from gf_tvm.core.workload import KERNELS, Workload
from gf_tvm.errors import BuildError
from gf_tvm.machine.profiles import DeviceProfile, get_profile
from gf_tvm.schedules import get_space
from gf_tvm.shapes import paper_cases

NANO = get_profile("jetson-nano")
SMALL = Geometry(2, 16, 16, 16, 16, (3, 3), (2, 2), (1, 1), (1, 1))
#: One of each form that has a space of its own.
FORMS = {
    "dense": SMALL,
    "dilated": replace(SMALL, dilation=(4, 4), padding=(4, 4)),
    "depthwise": replace(SMALL, groups=16),
}


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    """NVRTC of CUDA 11.8, which knows the board's GPU."""
    pytest.importorskip("nvidia.cuda_nvrtc", reason="compiles with nvidia-cuda-nvrtc-cu11")


def default(workload: Workload, profile: DeviceProfile = NANO) -> Any:
    space = get_space(workload, profile)
    return space.schedule(space.default)


def compiled(workload: Workload, profile: DeviceProfile = NANO) -> cuda.Compiled:
    return cuda.compile_program(default(workload, profile), profile, "gf")


# --- every kernel fits the board -------------------------------------------------------------------------------------


def points(kernel: str, wanted: int) -> Iterator[tuple[Workload, dict[str, int]]]:
    """The default of each form of a kernel, then so many random points of their spaces, or all if there are fewer."""
    rng = random.Random(kernel)
    workloads = [Workload(kernel, geometry, rng.choice(("float32", "float16"))) for geometry in FORMS.values()]
    spaces = [get_space(workload, NANO) for workload in workloads]
    met = set()
    for index in range(20 * wanted):
        form = index % len(FORMS)
        point = spaces[form].sample(rng) if index >= len(FORMS) else spaces[form].default
        key = (form, *point.items())
        if key not in met:
            met.add(key)
            yield workloads[form], point
        if len(met) == wanted + len(FORMS):
            return


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kernel", KERNELS)
def test_fifty_points_of_every_space_fit_the_board(kernel: str) -> None:
    """In threads, registers and shared memory of a block; several in one compilation, since NVRTC starts slowly.

    Most knobs belong to one function of several: those that points share are compiled once.
    """
    programs, names, sources = [], {}, []
    for workload, point in points(kernel, 50):
        program, source = cuda.generate(get_space(workload, NANO).schedule(point), NANO, "gf")
        known = {}
        for function, text in functions(source.removeprefix(cuda.PRELUDE)).items():
            if text not in names:
                names[text] = f"gf{len(names)}"
                sources.append(text.replace(NAME, names[text]))
            known[function] = names[text]
        programs.append((program, known))
    resources = {}
    for batch in batched(iter(sources), 36):
        image, kind, _ = compile_source(cuda.PRELUDE + "".join(batch), "sm_53")
        assert kind == "cubin"
        resources |= read_resources(image)
    assert set(resources) == set(names.values())
    for program, known in programs:
        assert set(known) == {launch.function for launch in program.launches}
        cuda.check_launches(program, NANO, kernel)
        cuda.check_resources(program, {function: resources[name] for function, name in known.items()}, NANO, kernel)


NAME = "<name>"


def functions(code: str) -> dict[str, str]:
    """Declaration and definition of each function of a program, with NAME in place of its name."""
    found: dict[str, str] = {}
    for part in re.split(r'(?=extern "C" __global__)', code)[1:]:
        head = re.match(r'extern "C" __global__ void __launch_bounds__\(\d+\) (\w+)\(', part)
        assert head is not None, part[:200]
        found[head[1]] = found.get(head[1], "") + re.sub(rf"\b{head[1]}\b", NAME, part)
    return found


def batched(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(islice(items, size)):
        yield batch


@pytest.mark.parametrize(
    "case", [case for case in paper_cases() if case.geometry.patch == (4, 4)], ids=lambda c: c.name
)
def test_defaults_of_the_papers_cases_fit_the_board(case: Any) -> None:
    for kernel in ("filter_input", "backward"):
        made = compiled(Workload(kernel, case.geometry))
        assert made.resources


# --- the source ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_source_is_what_cuda_10_takes(kernel: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """C++14 without headers: TVM's own prelude includes those of CUDA 11 and later.

    GF_CUDA_NVRTC_OLD names the NVRTC of CUDA 10.2 where somebody has it; its build for PCs knows sm_52.
    """
    old = os.environ.get("GF_CUDA_NVRTC_OLD")
    for geometry in (SMALL, replace(SMALL, h=15, w=13, patch=(4, 4))):
        _, source = cuda.generate(default(Workload(kernel, geometry, dtype)), NANO, "gf")
        assert "#include" not in source
        assert not re.search(r"\b0x[0-9a-fA-F.]+p", source)
        assert "std::" not in source
        code = source.removeprefix(cuda.PRELUDE)
        assert code.startswith('extern "C" __global__')
        if old:
            monkeypatch.setenv("GF_CUDA_NVRTC", old)
            assert ".target sm_52" in compile_source(source, "sm_52")[0].decode()


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=0.0))
def test_literals_keep_their_value(value: float) -> None:
    text = cuda._as_cpp14(f"x = {value.hex()}f/*{value:e}*/;")
    literal = re.fullmatch(r"x = ([0-9.e+-]+)f;", text)
    assert literal is not None, text
    assert struct.pack("<f", float(literal[1])) == struct.pack("<f", value)
    assert set(literal[1]) & set(".e"), "an integer with a suffix is no float"


def test_a_type_that_gpus_lack_is_an_error() -> None:
    with pytest.raises(BuildError, match=r"has no kernels for cuda|does not compile"):
        cuda.generate(get_space(Workload("expand", SMALL), get_profile("x86-64-v3")).schedule({}), NANO, "gf")


# --- the launches ----------------------------------------------------------------------------------------------------


def test_launches_of_a_backward_pass() -> None:
    workload = Workload("backward", SMALL)
    program, source = cuda.generate(default(workload), NANO, "gf")
    assert [(a.name, a.dtype, tuple(a.shape), a.output) for a in program.arguments] == [
        ("grad_y", "float32", SMALL.y_shape, False),
        ("saved", "float32", SMALL.saved_shape, False),
        ("weight", "float32", SMALL.weight_shape, False),
        ("grad_x", "float32", SMALL.x_shape, True),
        ("grad_w", "float32", SMALL.weight_shape, True),
        ("grad_b", "float32", (SMALL.co,), True),
    ]
    assert program.scratch_bytes % 256 == 0
    for launch in program.launches:
        header = re.search(rf"void __launch_bounds__\((\d+)\) {launch.function}\(([^)]*)\) {{", source)
        assert header is not None
        assert int(header[1]) == launch.block[0] * launch.block[1] * launch.block[2] <= 256
        assert len(header[2].split(",")) == len(launch.arguments)
    # Nothing is launched that is not there, and the other way round.
    assert len({launch.function for launch in program.launches}) == source.count("__global__ void __launch") // 2


def test_scratch_memory_is_shared_by_what_does_not_live_at_once() -> None:
    """g~ is needed to the end; the sums of taps are not, once grad_x is made."""
    geometry = replace(SMALL, n=8)
    program, _ = cuda.generate(default(Workload("backward", geometry)), NANO, "gf")
    offsets = {number for launch in program.launches for where, number in launch.arguments if where == "scratch"}
    assert len(offsets) < 5


# --- what the code needs ---------------------------------------------------------------------------------------------


def said_by_ptxas(source: str) -> dict[str, Resources]:
    """Compile once more and read what the assembler prints."""
    library = ctypes.CDLL(str(next(iter((Path(nvidia_folder()) / "lib").glob("libnvrtc.so*")))))
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"gf.cu", 0, None, None)
    words = [b"--gpu-architecture=sm_53", b"--std=c++14", b"--ptxas-options=-v"]
    with nvrtc._own_locale():
        assert library.nvrtcCompileProgram(program, len(words), (ctypes.c_char_p * len(words))(*words)) == 0
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    found = {}
    for part in log.value.decode().split("Compiling entry function '")[1:]:
        used, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        frame = re.search(r"(\d+) bytes stack frame", part)
        assert used is not None
        found[part.split("'")[0]] = Resources(
            int(used[1]), int(shared[1]) if shared else 0, int(frame[1]) if frame else 0
        )
    return found


def nvidia_folder() -> str:
    import nvidia.cuda_nvrtc

    return next(iter(nvidia.cuda_nvrtc.__path__))


def test_resources_are_those_that_the_assembler_tells() -> None:
    workload = Workload("backward", Geometry(8, 128, 128, 28, 28, (3, 3), (4, 4), (1, 1), (1, 1)))
    made = compiled(workload)
    assert made.resources == said_by_ptxas(made.source)
    assert max(needs.shared_bytes for needs in made.resources.values()) > 8192


@pytest.mark.parametrize("data", [b"", b"\x7fELF\x01", b"\x7fELF\x02" + b"\0" * 20, b"\x7fELF\x02" + b"\xff" * 200])
def test_what_is_no_cubin(data: bytes) -> None:
    with pytest.raises(BuildError, match="not a cubin"):
        read_resources(data)


def test_a_damaged_cubin_is_an_error_and_no_crash() -> None:
    image = compiled(Workload("expand", SMALL)).image
    for cut in range(0, len(image), 97):
        try:
            read_resources(image[:cut])
        except BuildError:
            continue


@pytest.mark.parametrize(
    ("limit", "match"),
    [
        ({"threads": 128}, "256 threads a block, jetson-nano takes 128"),
        ({"shared_bytes": 1024}, r"bytes of shared memory a block, jetson-nano has 1024"),
        ({"registers": 2048}, r"registers a block, jetson-nano has 2048"),
    ],
)
def test_limits(limit: dict[str, int], match: str) -> None:
    """The board's limits are looked at in the code, whatever the space has promised."""
    assert NANO.gpu is not None
    schedule = default(Workload("backward", Geometry(8, 64, 64, 28, 28, (3, 3), (2, 2), (1, 1), (1, 1))))
    with pytest.raises(BuildError, match=match):
        cuda.compile_program(schedule, replace(NANO, gpu=replace(NANO.gpu, **limit)), "gf")


def test_source_that_does_not_compile_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "PRELUDE", "this is no C++;\n")
    with pytest.raises(BuildError, match=r"jetson-nano: CUDA C does not compile: .*error"):
        compiled(Workload("expand", SMALL))


@pytest.mark.parametrize("arch", ["sm_61", "sm_75", "sm_86", "sm_90"])
def test_other_gpus(arch: str) -> None:
    """The same schedules for any GPU that NVRTC knows, and as PTX for those that came later."""
    made = compiled(Workload("backward", SMALL), get_profile(arch))
    assert (made.kind, made.program.arch) == ("cubin", arch)


def test_a_gpu_newer_than_the_compiler_gets_ptx() -> None:
    made = compiled(Workload("backward", SMALL), get_profile("sm_120"))
    assert made.kind == "ptx"
    assert b".target sm_" in made.image
    assert made.resources == {}


def test_compiling_leaves_the_locale_alone() -> None:
    """NVRTC does not, and files would be opened as ASCII ever after."""
    before = locale.nl_langinfo(locale.CODESET)
    assert before.upper() == "UTF-8"
    compile_source(cuda.PRELUDE, "sm_53")
    assert locale.nl_langinfo(locale.CODESET) == before


def test_nvrtc_at_hand_is_the_pinned_one() -> None:
    image, kind, _ = compile_source(cuda.PRELUDE, "sm_53")
    assert (kind, image[:4]) == ("cubin", b"\x7fELF")
    assert "NVRTC 11.8" in str(nvrtc.find())

"""From a scheduled module to a program for an NVIDIA GPU that runs without TVM.

TVM's pipeline splits a function into kernels and the host code that launches them. All shapes are constants, so the
host code says nothing but which kernels run in which order, on which pieces of memory and with how many threads. That
is read off it and kept as a :class:`gf_cuda.Program`; what remains of the host code is not needed. The kernels' source
is completed by a prelude of our own, so that it includes no header and compiles as C++14 with every NVRTC since CUDA
10.2 (and with nvcc), and becomes a binary here if it is for a GPU that the compiler at hand knows.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from math import prod
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.ir.instrument import pass_instrument
from tvm.tirx.build import split_host_device_mods

from gf_cuda import GfCudaError, Program, compile_source
from gf_cuda.program import PROGRAM_SCHEMA

from ..core.geometry import ceil_div, pad
from ..errors import BuildError
from ..machine.profiles import DeviceProfile
from .compile import buffer_bytes
from .cubin import Resources, read_resources

#: Offsets into the scratch memory: enough for every vector load, and for the DMA units' preferred alignment.
_SCRATCH_ALIGNMENT = 256
# Registers are given to warps in pieces of this many (CUDA's occupancy calculator, compute capability 5.0 and later).
_WARP, _REGISTER_PIECE = 32, 256

#: Stands before the kernels. TVM's own prelude includes headers of CUDA 11 and later; all that our kernels take from
#: them is half, which is only ever loaded and stored: sums are float. The conversions are those of cuda_fp16.h:
#: to the nearest, ties to even.
PRELUDE = """\
typedef unsigned int uint;
typedef unsigned char uchar;
typedef unsigned short ushort;
struct __align__(2) half {
  ushort bits;
  __device__ half() {}
  __device__ explicit half(float value) {
#ifdef GF_CUDA_EMULATED
    bits = gf_cuda_half_bits(value);
#else
    asm("{cvt.rn.f16.f32 %0, %1;}" : "=h"(bits) : "f"(value));
#endif
  }
  __device__ operator float() const {
#ifdef GF_CUDA_EMULATED
    return gf_cuda_half_value(bits);
#else
    float value;
    asm("{cvt.f32.f16 %0, %1;}" : "=f"(value) : "h"(bits));
    return value;
#endif
  }
};
struct __align__(4) half2 { half x, y; };
struct __align__(8) half4 { half x, y, z, w; };
__device__ inline half2 make_half2(half x, half y) {
  half2 v;
  v.x = x; v.y = y;
  return v;
}
__device__ inline half4 make_half4(half x, half y, half z, half w) {
  half4 v;
  v.x = x; v.y = y; v.z = z; v.w = w;
  return v;
}
"""

# C++14 has no hexadecimal floating-point literals. TVM repeats the value in a comment, in fewer digits.
_HEX_FLOAT = re.compile(r"(0x[0-9a-f]+(?:\.[0-9a-f]*)?p[+-]?[0-9]+)(f?)(?:/\*.*?\*/)?", re.IGNORECASE)


# Loops to be unrolled stay loops with a pragma: the same code, from a source that compiles several times as fast.
_CONFIG = {"tirx.UnrollLoop": {"explicit_unroll": False}}


@dataclass(frozen=True)
class Compiled:
    """A program and its code.

    Attributes:
        program: arguments, scratch memory and launches.
        source: CUDA C++ (C++14, no includes).
        image: the code for the driver.
        kind: of the image: "cubin" for one architecture, or "ptx", which the driver translates.
        resources: of each kernel; empty for PTX, for which only the driver knows.
    """

    program: Program
    source: str
    image: bytes
    kind: str
    resources: dict[str, Resources]


def compile_program(module: Any, profile: DeviceProfile, symbol: str = "main") -> Compiled:
    """Compile an IRModule (or a Schedule) whose function is ``main`` for the GPU of ``profile``.

    Args:
        symbol: prefix of the kernels' names.

    Raises:
        BuildError: TVM or NVRTC could not compile it, no NVRTC is at hand, or it needs more threads, registers or
            shared memory than a block of that GPU has.
    """
    assert profile.gpu is not None
    program, source = generate(module, profile, symbol)
    check_launches(program, profile, symbol)
    try:
        image, kind, _ = compile_source(source, profile.gpu.arch, f"{symbol}.cu")
    except GfCudaError as error:
        raise BuildError(f"{symbol} does not compile for {profile.name}: {error}") from error
    # An emulated driver's code is no cubin, and has no registers.
    is_cubin = kind == "cubin" and image[:4] == b"\x7fELF" and image[18:20] == _EM_CUDA
    resources = read_resources(image) if is_cubin else {}
    check_resources(program, resources, profile, symbol)
    return Compiled(program, source, image, kind, resources)


_EM_CUDA = (190).to_bytes(2, "little")  # e_machine


def generate(module: Any, profile: DeviceProfile, symbol: str = "main") -> tuple[Program, str]:
    """The program and its source, not compiled. Raises BuildError."""
    assert profile.gpu is not None
    launches, source = lower(module, json.loads(profile.target), symbol)
    values = {"schema": PROGRAM_SCHEMA, "arch": profile.gpu.arch, **launches}
    return Program.from_dict(values), PRELUDE + _as_cpp14(_kernels_of(source))


def lower(module: Any, target: dict[str, Any], symbol: str) -> tuple[dict[str, Any], str]:
    """TVM's part: the launches as plain values, and the device code as TVM prints it, for any GPU target of TVM.

    Returns:
        ({"arguments", "scratch_bytes", "launches"} as :class:`gf_cuda.Program` takes them, source)

    Raises:
        BuildError: TVM could not lower it, or the host code does more than launch kernels.
    """
    if isinstance(module, s_tir.Schedule):
        module = module.mod
    split: list[Any] = []

    @pass_instrument
    class _KeepSplit:
        """Keeps the module of the moment when host and device are apart and the host's arguments still buffers."""

        def run_after_pass(self, mod: Any, info: Any) -> None:
            if info.name == "tirx.SplitHostDevice":
                split.append(mod)

    try:
        gpu = tvm.target.Target(target).with_host(tvm.target.Target({"kind": "c"}))
        func = module["main"].with_attr("global_symbol", symbol)
        outputs = {str(buffer.name) for buffer in _stored(func)}
        module = tirx.transform.BindTarget(gpu)(tvm.IRModule({symbol: func}))
        pipeline, _, finalize_device = s_tir.pipeline.default_s_tir_pipeline()
        with tvm.transform.PassContext(instruments=[_KeepSplit()], config=_CONFIG):
            lowered = pipeline(module)
        _, device = split_host_device_mods(lowered)
        if len(device) != 1:
            raise BuildError(f"{symbol} has no kernels for {target['kind']}; is every stage bound to threads?")
        ((device_target, kernels),) = device.items()
        build = tvm.get_global_func(f"target.build.{target['kind']}")
        source = str(build(finalize_device()(kernels), device_target).inspect_source())
        launches = _read_host(split[-1], symbol, outputs)
    except BuildError:
        raise
    except Exception as error:  # TVM maps its errors to a dozen Python types
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise BuildError(f"{symbol} does not compile for {target['kind']}: {reason}") from error
    return launches, source


def _read_host(module: Any, symbol: str, outputs: set[str]) -> dict[str, Any]:
    """The launches of the host function ``symbol`` of a module after SplitHostDevice, as plain values."""
    host = module[symbol]
    places: dict[Any, tuple[str, int]] = {param: ("argument", i) for i, param in enumerate(host.params)}
    scratch = 0
    found: list[dict[str, Any]] = []

    def buffer_of(data: Any) -> Any:
        """The buffer that ``buffer.data`` is of."""
        return data.args[0] if isinstance(data, tvm.ir.Call) else data

    def visit(stmt: Any) -> None:
        nonlocal scratch
        if isinstance(stmt, tirx.SeqStmt):
            for child in stmt.seq:
                visit(child)
        elif isinstance(stmt, tirx.AllocBuffer):
            places[stmt.buffer] = ("scratch", scratch)
            scratch += pad(buffer_bytes(stmt.buffer), _SCRATCH_ALIGNMENT)
        elif isinstance(stmt, tirx.DeclBuffer):
            places[stmt.buffer] = places[buffer_of(stmt.data)]
        elif isinstance(stmt, tirx.AttrStmt):
            visit(stmt.body)
        elif isinstance(stmt, tirx.Evaluate) and isinstance(stmt.value, tvm.ir.Call):
            found.append(_read_launch(module, stmt.value, lambda data: places[buffer_of(data)]))
        else:
            raise BuildError(f"{symbol}: the host code does more than launch kernels ({type(stmt).__name__})")

    visit(host.body)
    arguments = [{"name": str(param.name), **_shape(param), "output": param.name in outputs} for param in host.params]
    return {"arguments": arguments, "scratch_bytes": scratch, "launches": found}


def _read_launch(module: Any, call: Any, place: Any) -> dict[str, Any]:
    if getattr(call.op, "name", "") != "tirx.call_ffi_kernel":
        raise BuildError(f"the host code calls {getattr(call.op, 'name', call.op)}, which is no kernel")
    name = str(call.args[0].value)
    tags = [str(tag) for tag in module[name].attrs["tirx.kernel_launch_params"]]
    data, extents = call.args[1 : len(call.args) - len(tags)], call.args[len(call.args) - len(tags) :]
    sizes = dict(zip(tags, (int(extent) for extent in extents), strict=True))
    return {
        "function": name,
        "grid": [sizes.get(f"blockIdx.{axis}", 1) for axis in "xyz"],
        "block": [sizes.get(f"threadIdx.{axis}", 1) for axis in "xyz"],
        "shared": sizes.get("tirx.use_dyn_shared_memory", 0),
        "arguments": [list(place(value)) for value in data],
    }


def _stored(func: Any) -> set[Any]:
    """The parameters of a scheduled PrimFunc that some block writes."""
    found: set[Any] = set()

    def visit(stmt: Any) -> None:
        if isinstance(stmt, tirx.SeqStmt):
            for child in stmt.seq:
                visit(child)
        elif isinstance(stmt, s_tir.SBlockRealize):
            found.update(region.source for region in stmt.block.writes if region.source in set(func.params))
            visit(stmt.block.body)
        elif isinstance(stmt, (tirx.For, tirx.AttrStmt)):
            visit(stmt.body)
        elif isinstance(stmt, tirx.IfThenElse):
            visit(stmt.then_case)

    visit(func.body)
    return found


def _shape(buffer: Any) -> dict[str, Any]:
    return {"dtype": str(buffer.ty.dtype), "shape": [int(extent) for extent in buffer.ty.shape]}


def _kernels_of(source: str) -> str:
    """The kernels alone, without TVM's prelude."""
    return source[source.index('extern "C" __global__') :]


def _as_cpp14(source: str) -> str:
    """Hexadecimal literals as decimal ones of the same value."""

    def decimal(match: re.Match[str]) -> str:
        value, suffix = float.fromhex(match[1]), match[2]
        text = f"{value:.9g}" if suffix else repr(value)
        return f"{text}{'' if set(text) & set('.e') else '.0'}{suffix}"

    return _HEX_FLOAT.sub(decimal, source)


def check_launches(program: Program, profile: DeviceProfile, symbol: str) -> None:
    """Raise BuildError if a launch has more threads than a block of ``profile``'s GPU may have."""
    assert profile.gpu is not None
    for launch in program.launches:
        threads = prod(launch.block)
        if threads > profile.gpu.threads:
            raise BuildError(
                f"{symbol}: {launch.function} has {threads} threads a block, {profile.name} takes {profile.gpu.threads}"
            )


def check_resources(program: Program, resources: dict[str, Resources], profile: DeviceProfile, symbol: str) -> None:
    """Raise BuildError if a block needs more registers or shared memory than ``profile``'s GPU has for one."""
    gpu = profile.gpu
    assert gpu is not None
    for launch in program.launches:
        needs = resources.get(launch.function)
        if needs is None:
            continue
        registers = ceil_div(prod(launch.block), _WARP) * pad(needs.registers * _WARP, _REGISTER_PIECE)
        shared = needs.shared_bytes + launch.shared
        for what, wanted, there in (
            ("registers", registers, gpu.registers),
            ("bytes of shared memory", shared, gpu.shared_bytes),
        ):
            if wanted > there:
                raise BuildError(
                    f"{symbol}: {launch.function} needs {wanted} {what} a block, {profile.name} has {there}"
                )

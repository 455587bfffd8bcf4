"""From a scheduled module to a shared library. Everything of TVM's build pipeline that moves is used here only."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from math import prod
from pathlib import Path
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.tirx.build import split_host_device_mods, tir_to_runtime

from ..errors import BuildError
from ..machine.profiles import DeviceProfile
from .linker import find_linker

# For kernels whose loops are written out. LLVM's level 3 differs from 2 by what is meant for loops that nobody has
# looked at (it makes variants of a loop for each outcome of its conditions), and TVM's pass shrinks buffers to the part
# that stages of a schedule use. Both find nothing here: kernels are as fast without, and take half as long to compile.
_WRITTEN_OUT = {"opt-level": 2}
_NEEDLESS_PASSES = ("s_tir.CompactBufferAllocation",)

#: Local tensors up to this size stay on the stack, where LLVM turns them into registers. TVM itself allows less than
#: 1024 bytes, one byte short of the 8 x 32 accumulators of an AVX-512 micro-kernel.
STACK_BYTES = 8192

#: What every library of kernels has besides: loops on PyTorch's threads, and fingerprints of parameters.
SOURCES = tuple(str(Path(__file__).with_name(name)) for name in ("openmp.c", "fingerprint.c"))


def buffer_bytes(buffer: Any) -> int:
    """Size of a TIR buffer whose shape is constant."""
    return int(tvm.DataType(str(buffer.ty.dtype)).itemsize) * prod(int(extent) for extent in buffer.ty.shape)


def _keep_small_on_stack(stmt: Any) -> Any:
    visit = _keep_small_on_stack
    if isinstance(stmt, tirx.SeqStmt):
        return tirx.SeqStmt([visit(child) for child in stmt.seq])
    if isinstance(stmt, tirx.For):
        return tirx.For(
            stmt.loop_var, stmt.min, stmt.extent, stmt.kind, visit(stmt.body), stmt.thread_binding, stmt.annotations
        )
    if isinstance(stmt, tirx.AttrStmt):
        return tirx.AttrStmt(stmt.node, stmt.attr_key, stmt.value, visit(stmt.body))
    if isinstance(stmt, tirx.IfThenElse):
        otherwise = None if stmt.else_case is None else visit(stmt.else_case)
        return tirx.IfThenElse(stmt.condition, visit(stmt.then_case), otherwise)
    if isinstance(stmt, tirx.AllocBuffer) and buffer_bytes(stmt.buffer) <= STACK_BYTES:
        return tirx.AllocBuffer(stmt.buffer, {"disable_lower_builtin": tirx.IntImm("int32", 1)})
    return stmt


def _body(body: Any, internal: bool) -> Any:
    """The body of a function. ``internal``: it is called by others, and takes no tensors."""
    if not internal:
        return body
    # On whose memory it works; functions that take tensors get it from them.
    for key, value in (("device_type", 1), ("device_id", 0)):
        body = tirx.AttrStmt(tvm.ir.StringImm("default"), key, tirx.IntImm("int32", value), body)
    return body


def compile_module(module: Any, profile: DeviceProfile, symbol: str = "main") -> Any:
    """Compile an IRModule (or a Schedule); its function ``main`` is called ``symbol`` in the result.

    Other functions in it are called by ``main`` alone.

    Raises:
        BuildError: TVM could not lower it or LLVM could not compile it.
    """
    if isinstance(module, s_tir.Schedule):
        module = module.mod
    try:
        func = module["main"].with_attr("global_symbol", symbol)
        # What comes from TE, scheduled or not, is a block with blocks in it.
        written_out = not isinstance(func.body, s_tir.SBlockRealize)
        target = tvm.target.Target({**json.loads(profile.target), **(_WRITTEN_OUT if written_out else {})})
        target = target.with_host(target)
        others = {name: other for name, other in module.functions.items() if name.name_hint != "main"}
        module = tirx.transform.BindTarget(target)(tvm.IRModule({symbol: func, **others}))
        pipeline, finalize_host, _ = s_tir.pipeline.default_s_tir_pipeline()
        with tvm.transform.PassContext(disabled_pass=list(_NEEDLESS_PASSES) if written_out else []):
            module = pipeline(module)
        host, _ = split_host_device_mods(module)
        host = tvm.IRModule(
            {
                name: function.with_body(_body(_keep_small_on_stack(function.body), name.name_hint != symbol))
                for name, function in host.functions.items()
            },
            attrs=host.attrs,
        )
        return tir_to_runtime(finalize_host()(host), {}, target)
    except Exception as error:  # TVM maps its errors to a dozen Python types, LLVM to RuntimeError
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise BuildError(f"{symbol} does not compile for {profile.name}: {reason}") from error


def _last_line(text: str) -> str:
    """The last line that says something: collect2 only repeats that ld, in the line before, gave up."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("collect2:")]
    return lines[-1] if lines else ""


def export(modules: list[Any], path: Path, profile: DeviceProfile) -> None:
    """Link compiled modules into the shared library ``path``.

    Not by TVM's ``export_library``: it lets LLVM write the object files, which ends the process where a disk is full,
    and knows a compiler by its name alone, without options of its own.

    Raises:
        BuildError: nothing to link with, or the linker failed.
        OSError: no room, say, for the object files, which lie beside ``path`` for the time.
    """
    linker = find_linker(profile)
    libraries = ("-Wl,--as-needed", "-lm")
    first, *others = modules
    for other in others:
        first.import_module(other)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        objects = _write_objects(first, Path(folder))
        # Before each: g++ takes a .c file for C++.
        source = (*(word for path in SOURCES for word in ("-x", "c", path)), "-x", "none")
        done = subprocess.run(
            [*linker, "-shared", "-fPIC", "-O2", "-o", str(path), *source, *objects, *libraries],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": folder},
            text=True,
            errors="replace",
            check=False,
        )
    if done.returncode:
        raise BuildError(f"linking {path.name} failed: {_last_line(done.stdout) or f'exit code {done.returncode}'}")


def _write_objects(module: Any, folder: Path) -> list[str]:
    """The object files of a module and all that it imports. Raises OSError."""
    parts = list(module._collect_dso_modules())
    if module.imports:
        pack = tvm.get_global_func("runtime.ModulePackImportsToLLVM")
        parts.append(pack(module, False, module.get_function("_get_target_string")(), ""))
    objects = [str(folder / f"{number}.o") for number in range(len(parts))]
    # LLVM writes to memory only.
    with open(os.memfd_create("gf_tvm"), "rb") as memory:
        for part, name in zip(parts, objects, strict=True):
            part.write_to_file(f"/proc/self/fd/{memory.fileno()}", "o")
            memory.seek(0)
            Path(name).write_bytes(memory.read())
    return objects

"""From a scheduled module to a shared library. Everything of TVM's build pipeline that moves is used here only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.tirx.build import split_host_device_mods, tir_to_runtime

from .devices import DeviceProfile
from .errors import BuildError

#: Local tensors up to this size stay on the stack, where LLVM turns them into registers. TVM itself allows less than
#: 1024 bytes, one byte short of the 8 x 32 accumulators of an AVX-512 micro-kernel.
STACK_BYTES = 8192


def _bytes(buffer: Any) -> int:
    size = tvm.DataType(str(buffer.ty.dtype)).itemsize if hasattr(buffer, "ty") else 4
    for extent in buffer.ty.shape:
        size *= int(extent)
    return int(size)


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
    if isinstance(stmt, tirx.AllocBuffer) and _bytes(stmt.buffer) <= STACK_BYTES:
        return tirx.AllocBuffer(stmt.buffer, {"disable_lower_builtin": tirx.IntImm("int32", 1)})
    return stmt


def compile_module(module: Any, profile: DeviceProfile, symbol: str = "main") -> Any:
    """Compile an IRModule (or a Schedule) whose function is ``main``; in the result it is called ``symbol``.

    Raises:
        BuildError: TVM could not lower it or LLVM could not compile it.
    """
    if isinstance(module, s_tir.Schedule):
        module = module.mod
    try:
        target = tvm.target.Target(json.loads(profile.target))
        target = target.with_host(target)
        func = module["main"].with_attr("global_symbol", symbol)
        module = tirx.transform.BindTarget(target)(tvm.IRModule({symbol: func}))
        pipeline, finalize_host, _ = s_tir.pipeline.default_s_tir_pipeline()
        host, _ = split_host_device_mods(pipeline(module))
        host = tvm.IRModule(
            {
                name: function.with_body(_keep_small_on_stack(function.body))
                for name, function in host.functions.items()
            },
            attrs=host.attrs,
        )
        return tir_to_runtime(finalize_host()(host), {}, target)
    except Exception as error:  # TVM maps its errors to a dozen Python types, LLVM to RuntimeError
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise BuildError(f"{symbol} does not compile for {profile.name}: {reason}") from error


def find_linker(profile: DeviceProfile) -> str:
    """The C++ compiler that links for ``profile``. Raises BuildError that says what to install."""
    import platform

    if platform.machine() != profile.arch:
        raise BuildError(f"cannot link for {profile.arch} on {platform.machine()}: cross-linking is not supported yet")
    for name in ("g++", "c++", "clang++"):
        if path := shutil.which(name):
            return path
    raise BuildError("no C++ compiler found to link with; install g++ (Debian: apt-get install g++)")


def export(modules: list[Any], path: Path, profile: DeviceProfile) -> None:
    """Link compiled modules into the shared library ``path``. Raises BuildError."""
    linker = find_linker(profile)
    first, *others = modules
    for other in others:
        first.import_module(other)
    try:
        first.export_library(str(path), cc=linker)
    except RuntimeError as error:
        raise BuildError(f"linking {path.name} failed: {str(error).strip().splitlines()[-1]}") from error

"""Building a bundle: logs' winners (or default schedules) -> compiled kernels -> one file to deploy."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bundle import signing
from .bundle.format import CUDA_SCHEMA, LIBRARY, SCHEMA, checksums, write
from .bundle.program import Program
from .core.workload import Workload
from .errors import BuildError
from .machine.profiles import DeviceProfile, get_profile

if TYPE_CHECKING:
    from gf_cuda import Program as CudaProgram

#: :attr:`BuiltKernel.note` of a kernel whose log comes from virtual boards.
EMULATED = "chosen by times measured under emulation, which say nothing about a board"


@dataclass(frozen=True)
class BuiltKernel:
    """One kernel of a bundle.

    Attributes:
        schedule: "tuned" or "default".
        log: name of the log that a tuned one comes from.
        reason: why it is not tuned.
        note: what to keep in mind about a tuned one.
    """

    workload: Workload
    schedule: str
    config: dict[str, Any] | None
    log: str | None
    reason: str
    note: str = ""


@dataclass(frozen=True)
class BuildReport:
    """What :func:`build` made; ``programs`` are keys."""

    path: Path
    kernels: tuple[BuiltKernel, ...]
    programs: tuple[str, ...] = ()


def build(
    workloads: Iterable[Workload],
    profile: DeviceProfile | str = "host",
    logs: Sequence[str | os.PathLike[str]] = (),
    out: str | os.PathLike[str] = "host.gfb",
    progress: Callable[[int, int, BuiltKernel | Program], None] | None = None,
    shipped: bool = True,
    programs: Iterable[Program] = (),
    sign: str | os.PathLike[str] | None = None,
) -> BuildReport:
    """Compile ``workloads`` for a device and write the bundle ``out``, whole or not at all.

    Args:
        workloads: duplicates are built once.
        profile: a device profile or its name.
        logs: folders of tuning logs, searched before the logs that are shipped with gf_tvm.
        out: the file; replaced if it exists.
        progress: called after each kernel or program with (done, of, what).
        shipped: whether the logs that are shipped with gf_tvm count. Without them and without ``logs`` every kernel
            gets its default schedule.
        programs: functions to compile besides, equal keys once. Their parts have the schedules that the logs say.

        sign: PEM file of an Ed25519 private key to sign the bundle with, for ``gf_tvm.load(..., trusted=)``. Needs
            cryptography (the extra ``sign``).

    Raises:
        BuildError: a key that cannot be used, nothing to build, a dtype that the device has no kernels of, programs for
            a GPU, a kernel that does not compile, nothing to link (or, for a GPU, to compile CUDA) with, or ``out``
            cannot be written.
        LogError: a tuning log is damaged.
    """
    from .tuning.log import shipped_logs

    if isinstance(profile, str):
        profile = get_profile(profile)
    key = None if sign is None else signing.private_key(sign)
    workloads = list(dict.fromkeys(workloads))
    programs = list({program.key: program for program in programs}.values())
    if not workloads and not programs:
        raise BuildError("nothing to build: no workloads and no programs given")
    for workload in workloads:
        if workload.dtype not in profile.dtypes:
            known = " and ".join(profile.dtypes)
            raise BuildError(f"{profile.name} has no kernels of {workload.dtype}, only of {known}")
    if programs and profile.gpu:
        raise BuildError(f"{profile.name} is a GPU: chains are compiled as a whole for CPUs only")
    out = Path(out)
    if out.exists() and not out.is_file():
        raise BuildError(f"{out} is not a regular file; a bundle would replace it")
    kernels: list[BuiltKernel] = []
    folders = [Path(log) for log in logs]
    if shipped and (own := shipped_logs()) is not None:
        folders.append(own)

    def scheduled() -> Iterator[tuple[BuiltKernel, Any]]:
        for workload in workloads:
            yield _schedule(workload, profile, folders)

    count = itertools.count(1)

    def done(built: BuiltKernel | Program) -> None:
        if isinstance(built, BuiltKernel):
            kernels.append(built)
        if progress is not None:
            progress(next(count), len(workloads) + len(programs), built)

    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
            if profile.gpu:
                manifest, files = _make_cuda(scheduled(), profile, Path(folder), done)
            else:
                config_of = _config_of(profile, folders)
                manifest, files = _make_cpu(scheduled(), profile, Path(folder), done, programs, config_of)
            if key is not None:
                manifest = signing.signed(manifest, key)
            staged = Path(folder) / "bundle"
            write(staged, manifest, files)
            os.replace(staged, out)
    except OSError as error:
        if error.errno is None:  # not one of the system
            raise
        raise BuildError(f"cannot write {str(out)!r}: {error.strerror}") from error
    return BuildReport(out, tuple(kernels), tuple(program.key for program in programs))


#: What goes into the archive: the manifest, and the other entries by name.
_Contents = tuple[dict[str, Any], dict[str, bytes]]


def _make_cpu(
    scheduled: Iterator[tuple[BuiltKernel, Any]],
    profile: DeviceProfile,
    folder: Path,
    done: Callable[[BuiltKernel | Program], None],
    programs: Sequence[Program],
    config_of: Callable[[Workload], dict[str, Any]],
) -> _Contents:
    from .codegen.compile import compile_module, export
    from .codegen.linker import find_linker

    find_linker(profile)
    modules, entries = [], []
    for built, schedule in scheduled:
        entry = _entry(built)
        modules.append(compile_module(schedule, profile, entry["symbol"]))
        entries.append(entry)
        done(built)
    compiled = [{"key": program.key, "symbol": _symbol(program.key)} for program in programs]
    for program, entry in zip(programs, compiled, strict=True):
        modules.append(compile_module(program.module(profile, config_of), profile, entry["symbol"]))
        done(program)
    export(modules, folder / LIBRARY, profile)
    files = {LIBRARY: (folder / LIBRARY).read_bytes()}
    manifest = {
        "schema": SCHEMA,
        "device": profile.name,
        "arch": profile.arch,
        "target": profile.target,
        "cpu_flags": list(profile.cpu_flags),
        "versions": versions(),
        "programs": compiled,
    }
    return _complete(manifest, files, entries), files


def _make_cuda(
    scheduled: Iterator[tuple[BuiltKernel, Any]],
    profile: DeviceProfile,
    folder: Path,
    done: Callable[[BuiltKernel | Program], None],
) -> _Contents:
    from gf_cuda import GfCudaError, nvrtc

    from .codegen.cuda import compile_program

    assert profile.gpu is not None
    try:
        compiler = str(nvrtc.find())
    except GfCudaError as error:
        raise BuildError(str(error)) from None
    entries, files = [], {}
    for built, schedule in scheduled:
        entry = _entry(built)
        symbol = entry["symbol"]
        compiled = compile_program(schedule, profile, symbol)
        files[f"{symbol}.cu"] = compiled.source.encode()
        files[f"{symbol}.{compiled.kind}"] = compiled.image
        settings = {"covers_input": built.workload.geometry.covers_input}
        entries.append({**entry, "program": _named(compiled.program, built.workload), "settings": settings})
        done(built)
    manifest = {
        "schema": CUDA_SCHEMA,
        "kind": "cuda",
        "device": profile.name,
        "arch": profile.gpu.arch,
        "target": profile.target,
        "versions": {**versions(), "compiler": compiler.partition(" (")[0]},
    }
    return _complete(manifest, files, entries), files


def _named(program: CudaProgram, workload: Workload) -> dict[str, Any]:
    """The program's values, its arguments called as :mod:`gf_tvm.core.verify` calls them; TVM's names may be any."""
    from .core.verify import argument_specs

    values = program.to_dict()
    specs = argument_specs(workload)
    given = [(argument.shape, argument.dtype, argument.output) for argument in program.arguments]
    wanted = [(spec.shape, str(spec.dtype).removeprefix("torch."), spec.output) for spec in specs]
    if given != wanted:
        raise BuildError(f"the compiled program of {workload.key} has the arguments {given}, not {wanted}")
    for argument, spec in zip(values["arguments"], specs, strict=True):
        argument["name"] = spec.name
    return values


def _entry(built: BuiltKernel) -> dict[str, Any]:
    workload = built.workload
    return {
        "key": workload.key,
        "workload": workload.to_dict(),
        "symbol": _symbol(workload.key),
        "schedule": built.schedule,
        "config": built.config,
        "log": built.log,
    }


def _symbol(key: str) -> str:
    return f"gf_{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def versions() -> dict[str, str]:
    """Of what makes and runs kernels, as manifests have them. Raises importlib.metadata.PackageNotFoundError."""
    names = {"gf_tvm": "gf-tvm", "tvm": "apache-tvm", "tvm_ffi": "apache-tvm-ffi"}
    return {name: importlib.metadata.version(package) for name, package in names.items()}


def _complete(manifest: dict[str, Any], files: dict[str, bytes], entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {**manifest, "sha256": checksums(files), "kernels": entries}


def _schedule(workload: Workload, profile: DeviceProfile, logs: list[Path]) -> tuple[BuiltKernel, Any]:
    from .tuning.log import find_best
    from .tuning.task import Candidate, WorkloadTask

    task = WorkloadTask(workload, profile.name)
    record, reasons = find_best(workload, profile, logs)
    if record is None:
        reason = "; ".join(reasons) or "no log has this workload"
        default = dict(task.space.default)
        return BuiltKernel(workload, "default", default, None, reason), task.space.schedule(default)
    log = record.source.name if record.source else None
    note = EMULATED if record.emulated else ""
    return BuiltKernel(workload, "tuned", record.config, log, "", note), task.schedule(Candidate.of_record(record))


def _config_of(profile: DeviceProfile, folders: list[Path]) -> Callable[[Workload], dict[str, Any]]:
    """Finds the logs' winner for a workload, or the default point of its space."""
    from .schedules import registry
    from .tuning.log import find_best

    def config_of(workload: Workload) -> dict[str, Any]:
        record, _ = find_best(workload, profile, folders)
        if record is not None and record.config is not None:
            return record.config
        return dict(registry.get_space(workload, profile).default)

    return config_of

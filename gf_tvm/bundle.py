"""Building a bundle: logs' winners (or default schedules) -> compiled kernels -> one file to deploy."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .devices import DeviceProfile, get_profile
from .errors import BuildError
from .library import LIBRARY, MANIFEST, SCHEMA
from .workload import Workload

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
    """What :func:`build` made."""

    path: Path
    kernels: tuple[BuiltKernel, ...]


def build(
    workloads: Iterable[Workload],
    profile: DeviceProfile | str = "host",
    logs: Sequence[str | os.PathLike[str]] = (),
    out: str | os.PathLike[str] = "host.gfb",
    progress: Callable[[int, int, BuiltKernel], None] | None = None,
) -> BuildReport:
    """Compile ``workloads`` for a device and write the bundle ``out``, whole or not at all.

    Args:
        workloads: duplicates are built once.
        profile: a device profile or its name.
        logs: folders of tuning logs, searched before the logs that are shipped with gf_tvm.
        out: the file; replaced if it exists.
        progress: called after each kernel with (done, of, kernel).

    Raises:
        BuildError: nothing to build, a kernel does not compile, or nothing to link with.
        LogError: a tuning log is damaged.
        OSError: ``out`` cannot be written.
    """
    from .compile import compile_module, export, find_linker

    if isinstance(profile, str):
        profile = get_profile(profile)
    workloads = list(dict.fromkeys(workloads))
    if not workloads:
        raise BuildError("nothing to build: no workloads given")
    out = Path(out)
    if out.exists() and not out.is_file():
        raise BuildError(f"{out} is not a regular file; a bundle would replace it")
    find_linker(profile)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        kernels, modules, entries = [], [], []
        for workload in workloads:
            built, schedule = _schedule(workload, profile, [Path(log) for log in logs])
            symbol = f"gf_{hashlib.sha256(workload.key.encode()).hexdigest()[:16]}"
            modules.append(compile_module(schedule, profile, symbol))
            kernels.append(built)
            entries.append(
                {
                    "key": workload.key,
                    "workload": workload.to_dict(),
                    "symbol": symbol,
                    "schedule": built.schedule,
                    "config": built.config,
                    "log": built.log,
                }
            )
            if progress is not None:
                progress(len(kernels), len(workloads), built)
        library = Path(folder) / LIBRARY
        export(modules, library, profile)
        staged = Path(folder) / "bundle"
        _write(staged, library.read_bytes(), entries, profile)
        os.replace(staged, out)
    return BuildReport(out, tuple(kernels))


def _schedule(workload: Workload, profile: DeviceProfile, logs: list[Path]) -> tuple[BuiltKernel, Any]:
    from .tuning.log import find_best, shipped_logs
    from .tuning.task import Candidate, WorkloadTask

    task = WorkloadTask(workload, profile.name)
    shipped = shipped_logs()
    record, reasons = find_best(workload, profile, [*logs, *([shipped] if shipped else [])])
    if record is None:
        reason = "; ".join(reasons) or "no log has this workload"
        default = dict(task.space.default)
        return BuiltKernel(workload, "default", default, None, reason), task.space.schedule(default)
    log = record.source.name if record.source else None
    note = EMULATED if record.emulated else ""
    return BuiltKernel(workload, "tuned", record.config, log, "", note), task.schedule(Candidate.of_record(record))


def _write(path: Path, library: bytes, entries: list[dict[str, Any]], profile: DeviceProfile) -> None:
    """Write the archive and flush it to the disk; no time stamps, so equal kernels give equal bytes."""
    manifest = {
        "schema": SCHEMA,
        "device": profile.name,
        "arch": profile.arch,
        "target": profile.target,
        "cpu_flags": list(profile.cpu_flags),
        "versions": {
            "gf_tvm": importlib.metadata.version("gf-tvm"),
            "tvm": importlib.metadata.version("apache-tvm"),
            "tvm_ffi": importlib.metadata.version("apache-tvm-ffi"),
        },
        "sha256": {LIBRARY: hashlib.sha256(library).hexdigest()},
        "kernels": entries,
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in ((MANIFEST, json.dumps(manifest, indent=1).encode()), (LIBRARY, library)):
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    with path.open("wb") as file:
        file.write(buffer.getvalue())
        file.flush()
        os.fsync(file.fileno())

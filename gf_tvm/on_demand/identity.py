"""What is wanted, and its key: equal keys, equal machine code. Nothing here imports TVM or PyTorch."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..building import Program, versions
from ..core.workload import Workload
from ..errors import BuildError
from ..farm.wheel import code_of
from ..machine.profiles import DeviceProfile
from ..tuning.log import SUFFIX as LOG_SUFFIX
from ..tuning.log import shipped_logs

#: Changes with what an entry is; entries of another format are not found.
FORMAT = "gf_tvm.kernels/1"

#: The packages, and the one module, whose code decides what a workload or program becomes: all that a build imports, as
#: a test has a build show. More would have everything built again after a change that has nothing to do with it.
CODE = ("blocked", "bundle", "chains", "codegen", "core", "forward", "kernels", "machine", "ops", "schedules", "tuning")
CODE_MODULE = "building.py"


@dataclass(frozen=True)
class Wanted:
    """What is to be compiled for this machine's CPU. Order and repetition make no difference to what is built.

    Attributes:
        programs: pickled on their way to the process that builds, so their classes must be of an importable module.

    Raises:
        BuildError: it is empty.
    """

    workloads: tuple[Workload, ...] = ()
    programs: tuple[Program, ...] = ()

    def __post_init__(self) -> None:
        if not self.workloads and not self.programs:
            raise BuildError("nothing is wanted: no workloads and no programs")

    @property
    def keys(self) -> tuple[list[str], list[str]]:
        """Of the workloads and of the programs, sorted, each once."""
        return sorted({workload.key for workload in self.workloads}), sorted({program.key for program in self.programs})


def key_of(wanted: Wanted, profile: DeviceProfile, logs: Sequence[Path] = ()) -> str:
    """The name of an entry: what is wanted, for which machine, and everything that decides how it is compiled.

    A kernel's definition hash would need TVM's compiler. The code that makes definition and schedule stands for it, and
    the tuning logs that choose the schedule; both are read once in a process.

    Args:
        logs: folders of tuning logs besides those that are shipped, in the order in which they are searched.

    Raises:
        importlib.metadata.PackageNotFoundError: TVM is not installed.
        OSError: gf_tvm's code or the logs cannot be read.
    """
    text = json.dumps(ingredients(wanted, profile, logs), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def ingredients(wanted: Wanted, profile: DeviceProfile, logs: Sequence[Path] = ()) -> dict[str, Any]:
    """What goes into :func:`key_of`."""
    shipped = shipped_logs()
    workloads, programs = wanted.keys
    return {
        "format": FORMAT,
        "workloads": workloads,
        "programs": programs,
        "profile": asdict(profile),
        "versions": _versions(),
        "code": code_digest(),
        "logs": [logs_digest(folder, profile.name) for folder in (*logs, *([] if shipped is None else [shipped]))],
    }


@functools.cache
def _versions() -> dict[str, str]:
    return versions()


@functools.cache
def code_digest() -> str:
    """Of the code as it lies on disk when this is called first, the code that a process started now would run."""
    files = code_of(f"gf_tvm.{name}" for name in CODE)
    files[CODE_MODULE] = resources.files("gf_tvm").joinpath(CODE_MODULE).read_bytes()
    return _digest(files)


@functools.cache
def logs_digest(folder: Path, device: str) -> str:
    """Of a device's tuning logs in a folder."""
    return _digest({path.name: path.read_bytes() for path in (folder / device).glob(f"*{LOG_SUFFIX}")})


def _digest(files: dict[str, bytes]) -> str:
    parts = [(name, hashlib.sha256(data).hexdigest()) for name, data in sorted(files.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

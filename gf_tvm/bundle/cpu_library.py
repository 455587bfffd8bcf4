"""The CPU side of :mod:`gf_tvm.bundle.library`: a CPU bundle's kernels, mapped into the process.

Of TVM only the small runtime library is loaded, because the compiled kernels take their threads and scratch memory
from it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.workload import ALIGNMENT, Workload
from ..errors import BundleError, GeometryError
from ..machine.profiles import cpu_flags
from .format import LIBRARY
from .kernel import Kernel
from .runtime import fingerprints_of, load_library, start_runtime

_thread = threading.local()


@dataclass(frozen=True)
class CpuKernel(Kernel):
    """One compiled kernel of a CPU bundle."""

    def __call__(self, *tensors: Tensor) -> None:
        _launch(self.function, *tensors)

    def prepare(self, device: str | int | torch.device | None) -> None:
        """Nothing to do: a CPU's code is there since the bundle was loaded."""


#: See :func:`.runtime.fingerprints_of`.
Fingerprints = Callable[[Sequence[int], Sequence[int]], bytes]


@dataclass(frozen=True)
class Contents:
    """What a CPU bundle has.

    Attributes:
        programs: by key.
        fingerprints: None in bundles of older versions.
    """

    kernels: list[CpuKernel]
    programs: dict[str, Callable[..., None]]
    fingerprints: Fingerprints | None


def open_bundle(path: Path, manifest: dict[str, Any], library: bytes) -> Contents:
    """Check that this machine runs a bundle -> what it has.

    Raises:
        BundleError: it was made for another architecture, CPU or TVM version, or does not load.
    """
    _check_machine(path, manifest)
    return _map_kernels(path, manifest, library)


def _check_machine(path: Path, manifest: dict[str, Any]) -> None:
    try:
        arch, flags, made_with = manifest["arch"], manifest["cpu_flags"], manifest["versions"]["tvm"]
    except (KeyError, TypeError) as error:
        raise BundleError(f"{path.name}: the manifest lacks {error}") from None
    if arch != platform.machine():
        raise BundleError(f"{path.name}: was built for {arch}, this machine is {platform.machine()}")
    if missing := [flag for flag in flags if flag not in cpu_flags()]:
        raise BundleError(f"{path.name}: needs CPU instructions that this machine lacks: {', '.join(missing)}")
    installed = importlib.metadata.version("apache-tvm")
    if _minor(made_with) != _minor(installed):
        raise BundleError(
            f"{path.name}: was built with TVM {made_with}, installed is {installed}; "
            f"install apache-tvm {_minor(made_with)}.* or build it again"
        )


def _minor(version: str) -> str:
    """Compiled code and runtime must agree on TVM's minor version: its calling convention moves between those."""
    return ".".join(str(version).split(".")[:2])


def _map_kernels(path: Path, manifest: dict[str, Any], library: bytes) -> Contents:
    start_runtime()
    place = ""
    try:
        place = f" ({tempfile.gettempdir()})"
        with tempfile.TemporaryDirectory(prefix="gf_tvm-") as folder:
            file = Path(folder) / LIBRARY
            file.write_bytes(library)
            module = _load(path, file)
            fingerprints = fingerprints_of(file)
    except OSError as error:
        raise BundleError(
            f"{path.name}: cannot unpack the kernels into a temporary folder: {error.strerror or error}{place}; "
            "set TMPDIR to a folder that has room"
        ) from None
    # The folder may go: the code is mapped.
    try:
        kernels = [
            CpuKernel(Workload.from_dict(entry["workload"]), entry["schedule"], module[entry["symbol"]])
            for entry in manifest["kernels"]
        ]
        programs: dict[str, Callable[..., None]] = {
            entry["key"]: partial(_launch, module[entry["symbol"]]) for entry in manifest.get("programs", ())
        }
        return Contents(kernels, programs, fingerprints)
    except (KeyError, TypeError, AttributeError, GeometryError) as error:
        raise BundleError(f"{path.name}: the manifest does not fit its kernels ({error})") from None


def _load(path: Path, file: Path) -> Any:
    try:
        return load_library(file)
    except (RuntimeError, OSError, ValueError) as error:
        if os.statvfs(file.parent).f_flag & os.ST_NOEXEC:
            raise BundleError(
                f"{path.name}: the kernels cannot be mapped from {file.parent.parent}, which is mounted noexec; set "
                "TMPDIR to a folder that is not"
            ) from None
        raise BundleError(f"{path.name}: the kernels do not load: {str(error).strip().splitlines()[-1]}") from None


def _launch(function: Callable[..., None], *tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.data_ptr() % ALIGNMENT:
            raise GeometryError(f"a kernel's tensors must be aligned to {ALIGNMENT} bytes; clone this slice first")
    _use_torch_threads()
    function(*(tensor.detach() if tensor.requires_grad else tensor for tensor in tensors))


def _use_torch_threads() -> None:
    """Let kernels count as many threads as PyTorch has.

    They ask TVM's pool for the number, of which there is one a calling thread.
    """
    wanted = torch.get_num_threads()
    if getattr(_thread, "count", None) != wanted:
        import tvm_ffi

        tvm_ffi.get_global_func("runtime.config_threadpool")(1, wanted)
        _thread.count = wanted

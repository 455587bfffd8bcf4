"""Loading a bundle: what a board needs at run time. No compiler, no MetaSchedule, no xgboost, not even ``import tvm``.

A CPU bundle is a zip file of a manifest and a shared library; :mod:`gf_tvm.building` writes it. Of TVM only the small
runtime library is loaded, because the compiled kernels take their threads and scratch memory from it. Bundles for
GPUs are read by :mod:`gf_tvm.bundle.cuda_library`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import platform
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.geometry import Geometry
from ..core.workload import ALIGNMENT, Workload
from ..errors import BundleError, GeometryError
from ..machine.profiles import cpu_flags
from .runtime import load_library, start_runtime

#: Of bundles for CPUs and for GPUs.
SCHEMA, CUDA_SCHEMA = 1, 2
MANIFEST = "manifest.json"
LIBRARY = "kernels.so"

_loaded: dict[str, Library] = {}
_lock = threading.Lock()
_thread = threading.local()


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel.

    Attributes:
        workload: what it computes.
        schedule: "tuned" or "default".
        alignment: of its tensors' addresses, in bytes.
    """

    workload: Workload
    schedule: str
    function: Callable[..., None]
    alignment: int = ALIGNMENT

    def __call__(self, *tensors: Tensor) -> None:
        """Run on contiguous CPU tensors, inputs then outputs, written in place; no tensor is copied.

        Raises:
            GeometryError: a tensor begins at an address that the kernels' vector loads cannot take (a slice, say).
        """
        _launch(self.function, *tensors)

    def prepare(self, device: str | int | torch.device | None) -> None:
        """See :meth:`Library.prepare`; a CPU's code is there since the bundle was loaded."""


class Library:
    """The kernels of one bundle, found by kernel name, geometry and dtype. Made by :func:`load`.

    Attributes:
        device: name of the profile that it was built for.
        device_type: of the tensors that its kernels take, "cpu" or "cuda".
        workloads: what it has kernels for.
    """

    def __init__(
        self,
        path: Path,
        digest: str,
        manifest: dict[str, Any],
        kernels: Sequence[Kernel],
        device_type: str = "cpu",
        programs: Mapping[str, Callable[..., None]] | None = None,
    ) -> None:
        self.path = path
        self.digest = digest
        self.device: str = manifest["device"]
        self.device_type = device_type
        self.manifest = manifest
        self.workloads = tuple(kernel.workload for kernel in kernels)
        self._programs = dict(programs or {})
        self._kernels = {(k.workload.kernel, k.workload.geometry, k.workload.dtype): k for k in kernels}

    def find(self, kernel: str, geometry: Geometry, dtype: str) -> Kernel | None:
        """The kernel for exactly this workload, or None."""
        return self._kernels.get((kernel, geometry, dtype))

    @property
    def programs(self) -> tuple[str, ...]:
        """Keys of its programs."""
        return tuple(self._programs)

    def program(self, key: str) -> Callable[..., None] | None:
        """The function that a program of :func:`gf_tvm.build` became, or None. It takes tensors as kernels do."""
        return self._programs.get(key)

    def prepare(self, device: str | int | torch.device | None = None) -> None:
        """Make all kernels ready to be launched on a GPU: their code is loaded there now, not at their first calls.

        Nothing can be loaded while a CUDA graph is captured; warm-up steps before it do as well. Does nothing for a
        CPU bundle, whose kernels are ready.

        Args:
            device: a CUDA device; None is the current one.

        Raises:
            BundleError: the kernels cannot run on this GPU.
            DeviceError: there is no such GPU, or it fails.
            GeometryError: the device is none of CUDA.
        """
        for kernel in self._kernels.values():
            kernel.prepare(device)

    def __repr__(self) -> str:
        return f"Library({self.path.name!r}, device={self.device!r}, {len(self.workloads)} kernels)"

    # A library is code mapped into the process: copies of a model share it, a pickled model loads it again.
    def __copy__(self) -> Library:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Library:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _reload, (str(self.path), self.digest)


def _reload(path: str, digest: str) -> Library:
    """Unpickle: the library if it is loaded already, else from its file, which must be the same one."""
    if digest in _loaded:
        return _loaded[digest]
    library = load(path)
    if library.digest != digest:
        raise BundleError(f"{path} is not the bundle that was in use when this was pickled; load the right one first")
    return library


def get(digest: str) -> Library:
    """A library loaded in this process, by its digest. Raises BundleError if there is none."""
    try:
        return _loaded[digest]
    except KeyError:
        raise BundleError(f"no bundle with digest {digest[:12]}… is loaded in this process") from None


def load(path: str | os.PathLike[str]) -> Library:
    """Load a bundle that ``gf-tvm build`` made.

    Raises:
        BundleError: the file is missing, truncated or altered, has entries it should not have, or was made for
            another architecture, CPU, GPU, schema or TVM version; or it is for GPUs, and none can be used here.
    """
    path = Path(path).absolute()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"cannot read bundle {path}: {error.strerror}") from None
    digest = hashlib.sha256(data).hexdigest()
    with _lock:
        if digest not in _loaded:
            _loaded[digest] = _open(path, data, digest)
        return _loaded[digest]


def _open(path: Path, data: bytes, digest: str) -> Library:
    manifest, library = _unpack(path, data)
    if library is None:
        from . import cuda_library

        manifest, for_gpu = cuda_library.open_bundle(path, data)
        return Library(path, digest, manifest, for_gpu, cuda_library.device_type())
    _check_machine(path, manifest)
    kernels, programs = _map_kernels(path, manifest, library)
    return Library(path, digest, manifest, kernels, programs=programs)


def _unpack(path: Path, data: bytes) -> tuple[dict[str, Any], bytes | None]:
    """The manifest and the shared library; None for that if it is a bundle for GPUs, which is not checked here."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            for name in names:
                if "/" in name or "\\" in name or ".." in name:
                    raise BundleError(f"{path.name}: entry {name!r} would leave the archive; not a gf_tvm bundle")
            manifest = json.loads(archive.read(MANIFEST)) if MANIFEST in names else None
            if isinstance(manifest, dict) and manifest.get("schema") == CUDA_SCHEMA:
                return manifest, None
            if sorted(names) != sorted({MANIFEST, LIBRARY}):
                raise BundleError(f"{path.name}: has entries {names}, a bundle has {MANIFEST} and {LIBRARY}")
            library = archive.read(LIBRARY)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError, OSError) as error:
        raise BundleError(f"{path.name}: truncated, damaged or not a gf_tvm bundle ({error})") from None
    if not isinstance(manifest, dict):
        raise BundleError(f"{path.name}: the manifest is not a JSON object")
    if manifest.get("schema") != SCHEMA:
        raise BundleError(
            f"{path.name}: has schema {manifest.get('schema')!r}, this gf_tvm reads {SCHEMA} (CPUs) and "
            f"{CUDA_SCHEMA} (GPUs); build it again"
        )
    checksum = hashlib.sha256(library).hexdigest()
    if manifest.get("sha256") != {LIBRARY: checksum}:
        raise BundleError(f"{path.name}: wrong checksum of {LIBRARY}; the file is damaged, copy or build it again")
    return manifest, library


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


def _map_kernels(
    path: Path, manifest: dict[str, Any], library: bytes
) -> tuple[list[Kernel], dict[str, Callable[..., None]]]:
    start_runtime()
    with tempfile.TemporaryDirectory(prefix="gf_tvm-") as folder:
        file = Path(folder) / LIBRARY
        file.write_bytes(library)
        try:
            module = load_library(file)
        except (RuntimeError, OSError, ValueError) as error:
            raise BundleError(f"{path.name}: the kernels do not load: {str(error).strip().splitlines()[-1]}") from None
    # The folder may go: the code is mapped.
    try:
        kernels = [
            Kernel(Workload.from_dict(entry["workload"]), entry["schedule"], module[entry["symbol"]])
            for entry in manifest["kernels"]
        ]
        programs: dict[str, Callable[..., None]] = {
            entry["key"]: partial(_launch, module[entry["symbol"]]) for entry in manifest.get("programs", ())
        }
        return kernels, programs
    except (KeyError, TypeError, AttributeError, GeometryError) as error:
        raise BundleError(f"{path.name}: the manifest does not fit its kernels ({error})") from None


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

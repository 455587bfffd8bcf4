"""Loading a bundle: what a board needs at run time, without a compiler, xgboost or even ``import tvm``."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.geometry import Geometry
from ..errors import BundleError
from ..files import read_limited
from . import cpu_library, signing
from .format import MAX_BYTES, unpack
from .kernel import Kernel

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

_loaded: dict[str, Library] = {}
_lock = threading.Lock()


class Library:
    """The kernels of one bundle, found by kernel name, geometry and dtype. Made by :func:`load`.

    Attributes:
        device: name of the profile that it was built for.
        device_type: of the tensors that its kernels take, "cpu" or "cuda".
        workloads: what it has kernels for.
        fingerprints: see :func:`.runtime.fingerprints_of`; None where it has no such function.
    """

    def __init__(
        self,
        path: Path,
        digest: str,
        manifest: dict[str, Any],
        kernels: Sequence[Kernel],
        device_type: str = "cpu",
        programs: Mapping[str, Callable[..., None]] | None = None,
        fingerprints: Callable[[Sequence[int], Sequence[int]], bytes] | None = None,
    ) -> None:
        self.path = path
        self.digest = digest
        self.device: str = manifest["device"]
        self.device_type = device_type
        self.manifest = manifest
        self.workloads = tuple(kernel.workload for kernel in kernels)
        self._programs = dict(programs or {})
        self.fingerprints = fingerprints
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


def get_library(digest: str) -> Library:
    """A library loaded in this process, by its digest. Raises BundleError if there is none."""
    try:
        return _loaded[digest]
    except KeyError:
        raise BundleError(f"no bundle with digest {digest[:12]}… is loaded in this process") from None


def load(path: str | os.PathLike[str], trusted: Iterable[str | os.PathLike[str]] | None = None) -> Library:
    """Load a bundle that ``gf-tvm build`` made. It is native code, which may do whatever this process may.

    Args:
        path: the file.
        trusted: PEM files of public keys: the bundle must be signed with one of them (``gf-tvm build --sign``), which
            is checked before any of its code is loaded. None: whoever made it is trusted. Needs cryptography (the
            extra ``sign``).

    Raises:
        BundleError: it is not signed with a trusted key; the file is missing, truncated or altered, has entries it
            should not have, or was made for another architecture, CPU, GPU, schema or TVM version; or it is for GPUs,
            and none can be used here.
    """
    path = Path(path).absolute()
    try:
        data = read_limited(path, MAX_BYTES)
    except OSError as error:
        raise BundleError(f"cannot read bundle {path}: {error.strerror}") from None
    keys = None if trusted is None else signing.public_keys(trusted)
    digest = hashlib.sha256(data).hexdigest()
    with _lock:
        if digest not in _loaded:
            _loaded[digest] = _open(path, data, digest, keys)
        elif keys is not None:
            signing.check(path.name, _loaded[digest].manifest, keys)
        return _loaded[digest]


def _open(path: Path, data: bytes, digest: str, keys: list[Ed25519PublicKey] | None) -> Library:
    manifest, library = unpack(path, data)
    if keys is not None:
        signing.check(path.name, manifest, keys)
    if library is None:
        from . import cuda_library  # here, because CPUs do without it

        manifest, for_gpu = cuda_library.open_bundle(path, data)
        return Library(path, digest, manifest, for_gpu, cuda_library.device_type())
    contents = cpu_library.open_bundle(path, manifest, library)
    return Library(
        path, digest, manifest, contents.kernels, programs=contents.programs, fingerprints=contents.fingerprints
    )

"""Bundles of kernels for NVIDIA GPUs: read, checked, and loaded onto a GPU kernel by kernel, when first needed.

A bundle is a zip file of a manifest and, for each kernel, its CUDA source and the machine code made of it.
``gf-tvm build --device jetson-nano`` writes it (``gf_tvm.building``); nothing of gf_tvm is needed to use it.
"""

import hashlib
import io
import json
import logging
import os
import re
import threading
import zipfile
import zlib
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple, Union

from . import archives, nvrtc
from .driver import Device, get_driver
from .errors import BundleError, CompileError, DriverError, NoCompilerError, ProgramError
from .program import Executable, Program

logger = logging.getLogger("gf_cuda")

SCHEMA = 2
KIND = "cuda"
MANIFEST = "manifest.json"

_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
#: CUDA_ERROR_JIT_COMPILER_NOT_FOUND, CUDA_ERROR_JIT_COMPILATION_DISABLED: PTX is of no use to this driver.
_NO_JIT = (221, 223)
#: Integrated GPUs load machine code of exactly their own architecture (CUDA C++ Programming Guide, "Binary
#: Compatibility"); others load that of an older minor version, too.
_INTEGRATED = frozenset(((5, 3), (6, 2), (7, 2), (8, 7)))

_loaded: Dict[str, "Bundle"] = {}
_lock = threading.Lock()


class Convolution(NamedTuple):
    """Settings of a filtered convolution, as in ``gf_tvm.Geometry``: sizes in pixels, pairs are (height, width)."""

    n: int
    ci: int
    co: int
    h: int
    w: int
    kernel: Tuple[int, int]
    patch: Tuple[int, int]
    stride: Tuple[int, int]
    padding: Tuple[int, int]
    dilation: Tuple[int, int]
    groups: int

    @classmethod
    def from_dict(cls, value: Dict[str, Any]) -> "Convolution":
        """Of a manifest's JSON. Raises KeyError, TypeError or ValueError for anything else."""
        read: Dict[str, Any] = {}
        for name in cls._fields:
            item = value[name]
            if name in _PAIRS:
                a, b = item
                read[name] = (_integer(a), _integer(b))
            else:
                read[name] = _integer(item)
        return cls(**read)

    @property
    def key(self) -> str:
        """Readable, and equal exactly for equal settings; the same words as in gf_tvm's logs."""
        pairs = (("k", self.kernel), ("s", self.stride), ("p", self.padding), ("d", self.dilation))
        middle = "_".join(f"{letter}{a}x{b}" for letter, (a, b) in pairs)
        return (
            f"n{self.n}_ci{self.ci}_co{self.co}_{self.h}x{self.w}_{middle}_g{self.groups}"
            f"_r{self.patch[0]}x{self.patch[1]}"
        )


_PAIRS = frozenset(("kernel", "patch", "stride", "padding", "dilation"))


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value


class Kernel:
    """One kernel of a bundle.

    Attributes:
        name: what it computes ("backward").
        convolution, dtype: of which convolution, and in which storage dtype ("float32", "float16").
        schedule: "tuned" or "default".
        covers_input: whether it writes every pixel of grad_x; else the caller sets the others to zero before.
        program: its arguments, scratch memory and launches.
        entry: all that the manifest says of it.
    """

    def __init__(self, entry: Dict[str, Any], read: Callable[[str], bytes], names: Sequence[str], label: str) -> None:
        workload = entry["workload"]
        self.name = str(workload["kernel"])
        self.convolution = Convolution.from_dict(workload["geometry"])
        self.dtype = str(workload["dtype"])
        self.schedule = str(entry["schedule"])
        self.covers_input = entry["settings"]["covers_input"]
        self.entry = entry
        self.program = Program.from_dict(entry["program"])
        self.symbol = entry["symbol"]
        if not isinstance(self.symbol, str) or not _SYMBOL.fullmatch(self.symbol):
            raise ValueError(f"the symbol {self.symbol!r} is no name")
        kinds = [kind for kind in ("cubin", "ptx") if f"{self.symbol}.{kind}" in names]
        if len(kinds) != 1 or f"{self.symbol}.cu" not in names:
            raise ValueError(f"{self.symbol} has no source, or not one image")
        if not isinstance(self.covers_input, bool):
            raise ValueError(f"covers_input is {self.covers_input!r}")
        self.image_kind = kinds[0]
        self._read = read
        self._label = label
        self._executables: Dict[int, Executable] = {}
        self._lock = threading.Lock()

    @property
    def key(self) -> str:
        """Readable, and different for every kernel of a bundle."""
        return f"{self.name} {self.convolution.key} {self.dtype}"

    def source(self) -> str:
        """Its CUDA C++ source."""
        return self._read(f"{self.symbol}.cu").decode("utf-8")

    def image(self) -> bytes:
        """Its machine code or PTX, see ``image_kind``."""
        return self._read(f"{self.symbol}.{self.image_kind}")

    def is_loaded(self, ordinal: int = 0) -> bool:
        """Whether its code is on that GPU already, so that a launch does nothing but launch."""
        return ordinal in self._executables

    def prepare(self, ordinal: int = 0) -> Executable:
        """Load its code onto a GPU, once; from any thread.

        Raises:
            BundleError: neither the image nor its source, compiled here, runs on this GPU.
            GfCudaError: no such GPU, or the driver fails.
        """
        with self._lock:
            executable = self._executables.get(ordinal)
            if executable is None:
                device = get_driver().device(ordinal)
                before = device.activate()
                try:
                    executable = self._executables[ordinal] = self._load(device)
                finally:
                    if before:  # PyTorch believes that the device which it chose for this thread is current
                        device.driver.call("cuCtxSetCurrent", before)
            return executable

    def __call__(self, pointers: Sequence[int], scratch: int, stream: int = 0, ordinal: int = 0) -> None:
        """Launch; returns before the GPU is done.

        Args:
            pointers: addresses on that GPU of ``program.arguments``, contiguous, aligned to 16 bytes.
            scratch: address of ``program.scratch_bytes`` bytes there, aligned to 256 bytes; free for others once what
                is launched here is done.
            stream: the driver's handle of a stream.
            ordinal: the GPU's number.
        """
        executable = self._executables.get(ordinal)
        if executable is None:
            executable = self.prepare(ordinal)
        executable(pointers, scratch, stream)

    def misfit(self, device: Device) -> Optional[str]:
        """Why its image cannot run on ``device``; None if it should."""
        built, present = self.program.capability, device.capability
        if self.image_kind == "ptx":
            return None if built <= present else f"PTX for {self.program.arch} or newer, the GPU is {device.arch}"
        exact = built in _INTEGRATED or present in _INTEGRATED
        if built == present or (not exact and built[0] == present[0] and built[1] < present[1]):
            return None
        return f"machine code of {self.program.arch}, the GPU is {device.arch}"

    def _load(self, device: Device) -> Executable:
        why = self.misfit(device)
        if why is None:
            try:
                return Executable(device, self.program, self.image())
            except CompileError as error:
                why = str(error)
            except ProgramError as error:
                if not isinstance(error.__cause__, DriverError):
                    raise
                why = str(error)
            except DriverError as error:
                if error.code not in _NO_JIT:
                    raise
                why = str(error)
        try:
            image, _, _ = nvrtc.compile_source(self.source(), device.arch, f"{self.symbol}.cu")
        except NoCompilerError as error:
            raise BundleError(_refusal(self._label, self.program.arch, device, why, str(error))) from None
        except CompileError as error:
            raise BundleError(
                f"{self._label}: {self.key} was built for {self.program.arch} ({why}), and its source does not compile "
                f"for {device.name} ({device.arch}): {error}"
            ) from None
        _say_compiled(self._label, self.program.arch, device, why)
        return Executable(device, Program.from_dict(dict(self.program.to_dict(), arch=device.arch)), image)

    def __repr__(self) -> str:
        return f"Kernel({self.key!r}, {self.schedule})"


_said: Set[Tuple[str, int]] = set()


def _say_compiled(label: str, arch: str, device: Device, why: str) -> None:
    """Once per bundle and GPU: each kernel is compiled when it is first used, which takes a second or so."""
    if (label, device.ordinal) not in _said:
        _said.add((label, device.ordinal))
        logger.warning(
            "%s was built for %s (%s): its kernels are compiled here for %s (%s), each at its first use; they are "
            "scheduled for %s, so a bundle built for this GPU will be faster",
            *(label, arch, why, device.name, device.arch, arch),
        )


def _refusal(label: str, arch: str, device: Device, why: str, no_compiler: str) -> str:
    return (
        f"{label}: was built for {arch} ({why}) and cannot run on {device.name} ({device.arch}); its source could be "
        f"compiled here, but {no_compiler}; build it for this GPU: gf-tvm build --device {device.arch}"
    )


class Bundle:
    """The kernels of one bundle, found by name, convolution and dtype. Made by :func:`load` or :func:`read`."""

    def __init__(self, path: str, digest: str, manifest: Dict[str, Any], kernels: List[Kernel]) -> None:
        self.path = path
        self.digest = digest
        self.manifest = manifest
        self.device = str(manifest["device"])  # the profile's name
        self.arch = str(manifest["arch"])
        self.kernels = tuple(kernels)
        self._kernels = {(kernel.name, kernel.convolution, kernel.dtype): kernel for kernel in kernels}

    def find(self, name: str, convolution: Convolution, dtype: str) -> Optional[Kernel]:
        """The kernel for exactly this, or None."""
        return self._kernels.get((name, convolution, dtype))

    def prepare(self, ordinal: int = 0) -> None:
        """Load every kernel onto a GPU now, not at its first use: a CUDA graph's capture, say, must load nothing.

        Raises GfCudaError.
        """
        for kernel in self.kernels:
            kernel.prepare(ordinal)

    def check_device(self, ordinal: int = 0) -> Device:
        """The GPU with that number. Loads nothing.

        Raises:
            BundleError: the kernels were built for another GPU, and there is no compiler to make them fit.
            GfCudaError: there is no such GPU.
        """
        device = get_driver().device(ordinal)
        for kernel in self.kernels:
            why = kernel.misfit(device)
            if why is not None:
                try:
                    nvrtc.version()
                except NoCompilerError as error:
                    raise BundleError(_refusal(kernel._label, self.arch, device, why, str(error))) from None
                break
        return device

    def __repr__(self) -> str:
        return f"Bundle({os.path.basename(self.path)!r}, device={self.device!r}, {len(self.kernels)} kernels)"

    # It stands for code on a GPU: copies of a model share it, a pickled model loads it again.
    def __copy__(self) -> "Bundle":
        return self

    def __deepcopy__(self, memo: Dict[int, Any]) -> "Bundle":
        return self

    def __reduce__(self) -> Tuple[Any, ...]:
        return _reload, (self.path, self.digest)


def _reload(path: str, digest: str) -> Bundle:
    """Unpickle: the bundle if it is loaded already, else from its file, which must be the same one."""
    if digest in _loaded:
        return _loaded[digest]
    bundle = load(path)
    if bundle.digest != digest:
        raise BundleError(f"{path} is not the bundle that was in use when this was pickled; load the right one first")
    return bundle


def load(path: Union[str, "os.PathLike[str]"]) -> Bundle:
    """Read and check a bundle, and check that a GPU of this machine can run it. Its code is loaded when first used.

    Raises:
        BundleError: the file is missing, truncated or altered, has entries it should not have, is of another schema,
            or was built for another GPU and there is no compiler (NVRTC, nvcc) to make its source fit.
        GfCudaError: no GPU can be used.
    """
    bundle = read(path)
    with _lock:
        if bundle.digest in _loaded:
            return _loaded[bundle.digest]
    check_machine(bundle)
    with _lock:
        return _loaded.setdefault(bundle.digest, bundle)


def check_machine(bundle: Bundle) -> None:
    """Raise what :meth:`Bundle.check_device` says of the first GPU, unless another one of this machine fits."""
    refusal: Optional[BundleError] = None
    for ordinal in range(max(1, get_driver().device_count())):
        try:
            bundle.check_device(ordinal)
            return
        except BundleError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def read(path: Union[str, "os.PathLike[str]"]) -> Bundle:
    """Read and check a bundle; needs no GPU and no driver, and so says nothing about whether one can run it.

    Raises:
        BundleError: as :func:`load`.
    """
    path = os.path.abspath(os.fspath(path))
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise BundleError(f"cannot read bundle {path}: {error.strerror}") from None
    return read_bytes(path, data)


def read_bytes(path: str, data: bytes) -> Bundle:
    """As :func:`read`, of a file's contents that are at hand already; ``path`` is its absolute path."""
    label = os.path.basename(path)
    manifest, names = _unpack(label, data)

    def read_entry(name: str) -> bytes:
        # Only the compressed file stays in memory: a kernel's code is needed once, most of them never.
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archives.read_entry(archive, name)

    try:
        kernels = [Kernel(entry, read_entry, names, label) for entry in manifest["kernels"]]
        bundle = Bundle(path, hashlib.sha256(data).hexdigest(), manifest, kernels)
    except (KeyError, TypeError, AttributeError, ValueError, ProgramError) as error:
        raise BundleError(f"{label}: the manifest does not fit its kernels ({_short(error)})") from None
    used = {f"{kernel.symbol}.{suffix}" for kernel in kernels for suffix in ("cu", kernel.image_kind)}
    if used != set(names):
        raise BundleError(f"{label}: has entries that belong to no kernel: {', '.join(sorted(set(names) - used))}")
    if len(bundle._kernels) != len(kernels):
        raise BundleError(f"{label}: has a kernel twice")
    if any(kernel.program.arch != bundle.arch for kernel in kernels):
        raise BundleError(f"{label}: has kernels of other architectures than {bundle.arch}")
    return bundle


def _unpack(label: str, data: bytes) -> Tuple[Dict[str, Any], List[str]]:
    """The manifest and the names of the other entries, checksums compared."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            for name in names:
                if "/" in name or "\\" in name or ".." in name:
                    raise BundleError(f"{label}: entry {name!r} would leave the archive; not a gf_tvm bundle")
            if MANIFEST not in names or len(set(names)) != len(names):
                raise BundleError(f"{label}: has entries {names}, a bundle has one {MANIFEST} and each other once")
            archives.check_sizes(archive, len(data))
            manifest = json.loads(archives.read_entry(archive, MANIFEST, archives.MANIFEST_BYTES).decode("utf-8"))
            _check_schema(label, manifest)
            names.remove(MANIFEST)
            sums = manifest.get("sha256")
            if not isinstance(sums, dict) or set(sums) != set(names):
                raise BundleError(f"{label}: its entries are not those that the manifest lists; copy or build it again")
            for name in names:
                entry = archives.read_entry(archive, name)
                if hashlib.sha256(entry).hexdigest() != sums[name]:
                    raise BundleError(f"{label}: wrong checksum of {name}; the file is damaged, copy or build it again")
    except BundleError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError, OSError) as error:
        raise BundleError(f"{label}: truncated, damaged or not a gf_tvm bundle ({_short(error)})") from None
    return manifest, names


def _check_schema(label: str, manifest: Any) -> None:
    if not isinstance(manifest, dict):
        raise BundleError(f"{label}: the manifest is not a JSON object")
    schema, kind = manifest.get("schema"), manifest.get("kind")
    if schema == 1 and kind is None:
        raise BundleError(f"{label}: was built for CPUs ({manifest.get('device')}); load it with gf_tvm.load")
    if schema != SCHEMA or kind != KIND:
        raise BundleError(
            f"{label}: has schema {schema!r} of kind {kind!r}, this gf_cuda reads {SCHEMA} of {KIND!r}; build it again"
        )


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (f"lacks {lines[0]}" if isinstance(error, KeyError) else lines[0]) if lines else type(error).__name__

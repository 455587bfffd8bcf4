"""A CUDA driver and NVRTC that run kernels on the CPU, for machines without a GPU; see emulated.cpp.

    with emulated_cuda.environment() as gpu:
        device = gf_cuda.get_driver().device()
        gpu.fault("cuLaunchKernel:1:719")

Device memory is the process's own: the ``data_ptr()`` of a CPU tensor is an address on the device.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_SOURCES = Path(__file__).parent
#: The environment variables of emulated.cpp.
SETTINGS = ("DEVICES", "ARCH", "REGISTERS", "NAME", "NVRTC")
#: What the NVRTC of CUDA 10.2 lacks.
SINCE_CUDA_11 = ("nvrtcGetCUBIN", "nvrtcGetCUBINSize", "nvrtcGetNumSupportedArchs", "nvrtcGetSupportedArchs")


def build() -> Path:
    """The library; compiled by g++ where the system's temporary folder has none of these sources."""
    sources = {name: (_SOURCES / name).read_bytes() for name in ("emulated.cpp", "shim.hpp")}
    digest = hashlib.sha256(b"\0".join(sources.values())).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"gf_cuda_emulated_{os.getuid()}" / digest[:20]
    library = folder / "libemulated_cuda.so"
    if library.exists():
        return library
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    # Several processes may build at once; the first to finish is right for all.
    with tempfile.TemporaryDirectory(dir=folder.parent) as staged:
        for name, text in sources.items():
            Path(staged, name).write_bytes(text)
        command = ["g++", "-std=c++14", "-O1", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall"]
        command += ["-o", library.name, "emulated.cpp", "-ldl", "-pthread"]
        subprocess.run(command, cwd=staged, check=True, stdin=subprocess.DEVNULL)
        folder.mkdir(exist_ok=True)
        shutil.copy(Path(staged, "shim.hpp"), folder)
        os.replace(Path(staged, library.name), library)
    return library


def without(*symbols: str) -> Path:
    """The library as it is, but for these exported symbols, whose names are spoilt."""
    library = build()
    text = library.read_bytes()
    for symbol in symbols:
        name = b"\0" + symbol.encode() + b"\0"
        assert name in text, symbol
        text = text.replace(name, name[:-2] + b"?\0")
    other = library.with_name(f"without_{hashlib.sha256(text).hexdigest()[:20]}.so")
    if not other.exists():
        staged = other.with_suffix(f".{os.getpid()}")
        staged.write_bytes(text)
        os.replace(staged, other)
    return other


class Emulated:
    """The library as the tests see it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.gf_cuda_calls.restype = ctypes.c_char_p
        self._library.gf_cuda_memory_used.restype = ctypes.c_size_t
        self._library.gf_cuda_handles.restype = ctypes.c_size_t

    def fault(self, text: str = "") -> None:
        """ "call:n:code": the n-th call from now on of this function fails; sticky codes lose the context.

        Several are separated by commas. What was set before, and a lost context, are forgotten.
        """
        self._library.gf_cuda_fault(text.encode())

    def calls(self) -> list[str]:
        """The functions called since forget_calls(), in order."""
        return self._library.gf_cuda_calls().decode().split()

    def forget_calls(self) -> None:
        self._library.gf_cuda_forget_calls()

    def memory_used(self) -> int:
        """Bytes of device memory that were not given back."""
        return int(self._library.gf_cuda_memory_used())

    def handles(self) -> int:
        """Modules, streams and events that were not given back."""
        return int(self._library.gf_cuda_handles())


@functools.cache
def emulated() -> Emulated:
    """The library, loaded into this process."""
    return Emulated(build())


def variables(**settings: object) -> dict[str, str]:
    """The environment of a process that uses the emulated GPU; settings: see SETTINGS, in lower case."""
    path = str(build())
    named = {f"GF_CUDA_EMULATED_{name.upper()}": str(value) for name, value in settings.items()}
    assert all(name.upper() in SETTINGS for name in settings), settings
    return {"GF_CUDA_DRIVER": path, "GF_CUDA_NVRTC": path, **named}


@contextlib.contextmanager
def environment(**settings: object) -> Iterator[Emulated]:
    """This process uses the emulated GPU, without faults and calls of earlier tests."""
    gpu = emulated()
    with pytest.MonkeyPatch.context() as patch:
        for name in SETTINGS:
            patch.delenv(f"GF_CUDA_EMULATED_{name}", raising=False)
        for name, value in variables(**settings).items():
            patch.setenv(name, value)
        gpu.fault()
        gpu.forget_calls()
        try:
            yield gpu
        finally:
            gpu.fault()

"""Which allocator this process takes its memory from, and which others there are.

glibc maps every large tensor anew, and the system clears its pages, which costs a network's forward pass more than
its arithmetic (docs/performance.md). Another allocator has to be there when a process starts, by ``LD_PRELOAD``; the
commands see to that (``gf_tvm.runners._allocator``). Only the standard library is imported, and nothing here is newer
than Python 3.7: the doctor takes this file to boards.
"""

from __future__ import annotations

import ctypes
import os
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import GfTvmError

PRELOAD = "LD_PRELOAD"


class AllocatorError(GfTvmError):
    """An allocator that was asked for and cannot be used."""


@dataclass(frozen=True)
class Allocator:
    """One that can be asked for.

    Attributes:
        library: name of the shared library; None for the system's own.
        settings: variables of the environment that it reads when the process starts; those of the user's come first.
        install: how to get it.
    """

    name: str
    library: str | None = None
    settings: Mapping[str, str] | None = None
    install: str = ""


#: By name, the one that is taken where it is installed first.
#: Nothing is given back to the system: by default jemalloc returns blocks of 8 MB and more at once, as glibc does.
#: MobileNetV2's forward pass (batch 8, 224 x 224) has 100,000 page faults a call under glibc, 165,000 under jemalloc
#: as it comes, and none like this, where the process's peak is no higher than under glibc.
ALLOCATORS = {
    allocator.name: allocator
    for allocator in (
        Allocator(
            "jemalloc",
            "libjemalloc.so.2",
            {"MALLOC_CONF": "oversize_threshold:0,dirty_decay_ms:-1,muzzy_decay_ms:-1"},
            "apt install libjemalloc2",
        ),
        Allocator("system"),
    )
}

#: What a child needs to run under this process's allocator, where it was started anew for it.
_for_children: dict[str, str] = {}


def in_use() -> dict[str, Any]:
    """What serves this process's ``malloc``, found out by looking: plain values for JSON.

    ``name`` is "jemalloc", "system" (the C library's), or the file of any other; ``version`` is jemalloc's, else None;
    ``settings`` are the variables of the environment that it was started with.
    """
    settings = {name: os.environ[name] for name in ("MALLOC_CONF", "GLIBC_TUNABLES") if name in os.environ}
    settings.update((name, value) for name, value in _for_children.items() if name != PRELOAD)
    version = _jemalloc_version()
    if version is not None:
        return {"name": "jemalloc", "version": version, "settings": settings}
    file = _home_of("malloc")
    name = "system"
    # musl's loader is its C library; a Python that is linked to fixed addresses has an entry of its own for malloc.
    if file is not None and file != os.path.realpath("/proc/self/exe"):
        name = Path(file).name
        name = "system" if name.startswith(("libc.", "libc-", "ld-")) else name
    return {"name": name, "version": None, "settings": settings}


def label_of(machine: Mapping[str, Any]) -> str:
    """The ``allocator`` in a description of a machine, for tables: ``jemalloc 5.3.0``, ``system``, ``unknown``."""
    found = machine.get("allocator")
    if not isinstance(found, Mapping) or not isinstance(found.get("name"), str):
        return "unknown"
    return " ".join(filter(None, (found["name"], str(found.get("version") or "").partition("-")[0])))


def installed(allocator: Allocator) -> Path | None:
    """Its library for this process's architecture; None where there is none."""
    if allocator.library is None or not sys.platform.startswith("linux"):
        return None
    named = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    triple = sysconfig.get_config_var("MULTIARCH")
    usual = [f"/usr/lib/{triple}", f"/lib/{triple}"] if triple else []
    for folder in (*filter(None, named), f"{sys.prefix}/lib", *usual, "/usr/lib64", "/usr/lib", "/usr/local/lib"):
        path = Path(folder, allocator.library)
        if _architecture(path) is not None and _architecture(path) == _architecture(Path("/proc/self/exe")):
            return path
    return None


def give_to_children(environment: Mapping[str, str]) -> None:
    """What :func:`environment_of_children` answers from now on."""
    _for_children.clear()
    _for_children.update(environment)


def environment_of_children() -> dict[str, str]:
    """What a child process that measures beside this one needs in its environment to have the same allocator.

    Other children do not get it: they may be of another architecture, as virtual boards are.
    """
    return dict(_for_children)


def _architecture(path: Path) -> tuple[int, bytes] | None:
    """Word size and machine of an ELF file; None where it is none."""
    try:
        with open(path, "rb") as file:
            head = file.read(20)
    except OSError:
        return None
    return (head[4], head[18:20]) if len(head) == 20 and head.startswith(b"\x7fELF") else None


def _jemalloc_version() -> str | None:
    """jemalloc's version if ``malloc`` is its: what it counts for this thread rises. None if not."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallctl"):
        return None
    library.malloc.restype = ctypes.c_void_p
    library.malloc.argtypes = (ctypes.c_size_t,)
    library.free.argtypes = (ctypes.c_void_p,)

    def allocated() -> int | None:
        value, size = ctypes.c_uint64(), ctypes.c_size_t(8)
        code = library.mallctl(b"thread.allocated", ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
        return None if code else value.value

    before = allocated()
    block = library.malloc(1 << 20)
    after = allocated()
    library.free(block)
    # A jemalloc that was built without statistics counts nothing; then its having the symbol has to do.
    if before is not None and after is not None and after - before < 1 << 20:
        return None
    text, size = ctypes.c_char_p(), ctypes.c_size_t(ctypes.sizeof(ctypes.c_char_p))
    code = library.mallctl(b"version", ctypes.byref(text), ctypes.byref(size), None, ctypes.c_size_t(0))
    return "unknown" if code or text.value is None else text.value.decode("ascii", "replace")


class _Info(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _home_of(symbol: str) -> str | None:
    """The file that has this process's function of that name; None where the system does not tell."""
    library, info = ctypes.CDLL(None), _Info()
    if not hasattr(library, "dladdr") or not hasattr(library, symbol):
        return None
    address = ctypes.cast(getattr(library, symbol), ctypes.c_void_p)
    library.dladdr.argtypes = (ctypes.c_void_p, ctypes.POINTER(_Info))
    if not library.dladdr(address, ctypes.byref(info)) or info.file is None:
        return None
    return os.path.realpath(os.fsdecode(info.file))

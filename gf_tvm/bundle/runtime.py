"""TVM's runtime without its Python package: a board has no use for the compiler, nor seconds to import it."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import BundleError


def start_runtime() -> None:
    """Load TVM's runtime library, and set up its threads. Harmless when repeated.

    TVM reads these variables when it starts a pool: it may use every core (it would take half of them on x86), its
    workers sleep at once instead of spinning (they would fight PyTorch's own threads for the cores in a training
    step), and they are not pinned (PyTorch's are not either). A value that the user has set stays.

    Raises:
        BundleError: apache-tvm is not installed.
    """
    os.environ.setdefault("TVM_NUM_THREADS", str(os.cpu_count() or 1))
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "0")
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    from tvm_ffi.libinfo import load_lib_ctypes

    load_lib_ctypes("tvm", "tvm_runtime", "RTLD_GLOBAL", extra_lib_paths=[_libraries()])


def load_library(path: Path) -> Any:
    """Load a library of kernels (a ``tvm_ffi.Module``) whose loops run on OpenMP's threads, see openmp.c.

    On TVM's where the process has no OpenMP, and those of libraries that were linked before there was openmp.c.
    The runtime must have been started.

    Raises:
        RuntimeError, OSError: it does not load.
    """
    import tvm_ffi

    module = tvm_ffi.load_module(str(path))
    with suppress(AttributeError):
        ctypes.CDLL(str(path)).gf_tvm_use_openmp()
    return module


def fingerprints_of(path: Path) -> Callable[[Sequence[int], Sequence[int]], bytes] | None:
    """A library's function of (addresses, bytes) of pieces of memory that gives what tells their contents from others.

    None where the library was linked before there was fingerprint.c. It must be loaded.
    """
    function = getattr(ctypes.CDLL(str(path)), "gf_tvm_fingerprints", None)
    if function is None:
        return None

    def fingerprints(addresses: Sequence[int], sizes: Sequence[int]) -> bytes:
        count = len(addresses)
        results = (ctypes.c_uint64 * count)()
        given = (ctypes.c_void_p * count)(*addresses), (ctypes.c_int64 * count)(*sizes)
        function(*given, ctypes.c_int64(count), results)
        return bytes(results)

    return fingerprints


def start_extras() -> None:
    """Load what TVM's own RPC clients call on a board besides: it fills tensors, flushes caches. Not an error without.

    Raises:
        BundleError: apache-tvm is not installed.
    """
    start_runtime()
    from tvm_ffi.libinfo import load_lib_ctypes

    with suppress(RuntimeError, OSError):
        load_lib_ctypes("tvm", "tvm_runtime_extra", "RTLD_LOCAL", extra_lib_paths=[_libraries()])


def _libraries() -> Path:
    spec = importlib.util.find_spec("tvm")
    if spec is None or not spec.submodule_search_locations:
        raise BundleError("apache-tvm is not installed; a bundle needs its runtime (pip install apache-tvm)")
    return Path(spec.submodule_search_locations[0]) / "lib"


def has_compiler() -> bool:
    """Whether TVM's compiler is installed beside its runtime. Raises BundleError if apache-tvm is not at all."""
    return any(_libraries().glob("libtvm_compiler.*"))


def die_at_once() -> None:
    """Put back what the system does with a process that crashes.

    tvm_ffi catches these signals to print a traceback, for which it reads all debug information of PyTorch: a
    crashing kernel would take seconds to end, and count as one that hangs.
    """
    for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT):
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def without_torch() -> Iterator[None]:
    """Within it, tvm_ffi can be imported without PyTorch, which it imports if it is there.

    That takes three seconds and 200 MB in processes that never see a tensor of it: those that build, the connections
    to boards, the tracker. Imported in this way, tvm_ffi knows no tensors of PyTorch.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]

"""What the machine is, and the two limits that no kernel on it beats: copy bandwidth and single-precision sgemm."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..errors import DeviceError
from . import allocator

_PACKAGES = ("gf-tvm", "torch", "apache-tvm", "apache-tvm-ffi", "numpy")

#: Rows of the largest matrices whose product is timed: larger ones are no faster.
SGEMM_SIZE = 2048

_CPU_FOLDER = Path("/sys/devices/system/cpu")


def describe() -> dict[str, Any]:
    """CPU, cores that this process may use, memory (bytes) and operating system, as plain values for JSON.

    And what decides as much of a time as they do: the ``allocator`` that this process really uses
    (:func:`gf_tvm.machine.allocator.in_use`).
    """
    return {
        "cpu": cpu_model(),
        "arch": platform.machine(),
        "cores": usable_cores(),
        "memory_bytes": _meminfo("MemTotal"),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "allocator": allocator.in_use(),
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide a time; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    onednn = re.search(r"MKL-DNN v([\w.]+)", torch.__config__.show())
    found["onednn"] = onednn[1] if onednn and has_onednn() else None
    return found


def has_onednn() -> bool:
    """Whether this PyTorch was built with oneDNN, which then computes its convolutions on CPUs."""
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def cpu_model() -> str:
    """The CPU's name as its maker or the board's firmware gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    # ARM kernels give no "model name"; "Model" is the board.
    return fields.get("model name") or fields.get("Model") or platform.processor() or "unknown"


def usable_cores() -> int:
    """Number of CPUs that this process may run on (taskset and containers' CPU sets considered)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_bytes() -> int | None:
    """Memory that can be allocated without swapping; None where the system does not say."""
    return _meminfo("MemAvailable")


def peak_bytes() -> int | None:
    """Largest resident memory that this process has had since it began (Linux; None elsewhere).

    Not ``resource.getrusage``: its figure is inherited from the process that started this one.
    """
    try:
        match = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text("ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) << 10 if match else None


def last_level_cache_bytes() -> int | None:
    """Size of the largest data cache that the first CPU sees; None where the system does not say."""
    sizes = []
    for file in _CPU_FOLDER.glob("cpu0/cache/index*/size"):
        match = re.fullmatch(r"(\d+)([KMG]?)", _read(file))
        if match:
            sizes.append(int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]])
    return max(sizes, default=None)


def _meminfo(field: str) -> int | None:
    match = re.search(rf"^{field}:\s+(\d+) kB$", _read(Path("/proc/meminfo")), flags=re.MULTILINE)
    return int(match[1]) << 10 if match else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


class OtherLoad:
    """How many cores other programs, or other virtual machines, keep busy while this process measures (Linux)."""

    def __init__(self) -> None:
        self._wall, self._busy, self._own = self._now()

    def cores(self) -> float | None:
        """Their average since this object was made; None where the system does not say."""
        wall, busy, own = self._now()
        if busy is None or self._busy is None or wall <= self._wall:
            return None
        return max(0.0, ((busy - self._busy) - (own - self._own)) / (wall - self._wall))

    @staticmethod
    def _now() -> tuple[float, float | None, float]:
        """Seconds: wall clock; all CPUs' busy time, stolen time included; this process's part of that."""
        own = time.process_time()
        fields = _read(Path("/proc/stat")).partition("\n")[0].split()
        if len(fields) < 9 or fields[0] != "cpu":
            return time.monotonic(), None, own
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[1:9])
        return time.monotonic(), (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"), own


@contextmanager
def torch_threads(threads: int | None) -> Iterator[int]:
    """Run PyTorch with that many threads (None: as many as now), put the old number back, yield the number in use.

    Raises:
        DeviceError: fewer than 1 thread.
    """
    before = torch.get_num_threads()
    if threads is not None and threads < 1:
        raise DeviceError(f"threads must be at least 1, got {threads}")
    torch.set_num_threads(threads or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def copy_bandwidth(seconds: float = 0.5) -> float:
    """GB/s (1e9 bytes) that ``torch.copy_`` reads and writes together, between buffers far larger than the cache.

    The best of the copies made in ``seconds``, with PyTorch's present number of threads: a limit is the best that
    was seen, not the usual.
    """
    copy, gigabytes = copy_call()
    return gigabytes / _best_seconds(copy, seconds)


def copy_call() -> tuple[Callable[[], Any], float]:
    """A copy between buffers far larger than the cache, and how many GB (1e9 bytes) it reads and writes together."""
    cache = last_level_cache_bytes() or 32 << 20
    size = min(max(4 * cache, 64 << 20), 512 << 20)
    available = available_bytes()
    if available is not None:
        size = min(size, available // 8)
    source = torch.ones(max(size // 4, 1 << 18), dtype=torch.float32)
    target = torch.zeros_like(source)  # written, so that its pages exist before the first copy
    return lambda: target.copy_(source), 2 * source.numel() * source.element_size() / 1e9


def sgemm_peak(seconds: float = 1.0) -> float:
    """GFLOP/s of the fastest product of square float32 matrices made in ``seconds``, see :func:`sgemm_rates`."""
    return max(sgemm_rates(seconds).values())


def sgemm_rates(seconds: float = 1.0) -> dict[str, float]:
    """GFLOP/s of the fastest product of square float32 matrices, by the name of what makes it (:func:`products`).

    The matrices grow to 2048 x 2048, on slow machines to what one call can do in a part of ``seconds``.
    """
    peaks: dict[str, float] = {}
    size, names = 256, list(products(1))
    share = seconds / len(names)
    while True:
        best = 0.0
        for name, product in products(size).items():
            one = _best_seconds(product, share / 4)
            peaks[name] = max(peaks.get(name, 0.0), sgemm_gflop(size) / one)
            best = max(best, one)
        if size == SGEMM_SIZE or 8 * best > share:
            return peaks
        size *= 2


def sgemm_gflop(size: int) -> float:
    """Billions of floating-point operations of a product of square matrices."""
    return 2 * size**3 / 1e9


def products(size: int) -> dict[str, Callable[[], Any]]:
    """Products of square float32 matrices, by what makes them.

    ``torch.mm`` is not the fastest everywhere: MKL takes AVX2 code on AMD's processors, where oneDNN, which computes
    PyTorch's convolutions, runs more than twice as fast. oneDNN's product takes matrices in its own layout.
    """
    generator = torch.Generator().manual_seed(0)  # not zeros or ones: some CPUs run those at a higher clock
    a, b, c = (torch.rand(size, size, generator=generator) for _ in range(3))
    found: dict[str, Callable[[], Any]] = {"torch.mm": partial(torch.mm, a, b, out=c)}
    if has_onednn():
        found["oneDNN"] = partial(torch.ops.aten.mkldnn_linear, a.to_mkldnn(), b.to_mkldnn(), None)
    return found


def _best_seconds(call: Callable[[], Any], seconds: float) -> float:
    """Shortest time of one call, over at least 3 calls after a warm-up and at least ``seconds``."""
    call()
    best, calls, start = float("inf"), 0, time.perf_counter()
    while calls < 3 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - before)
        calls += 1
    return best

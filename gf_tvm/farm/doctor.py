"""Is this machine, or a board, fit for tuning and training? Every probe is guarded and becomes one line.

To look at a board on which nothing is installed, :mod:`gf_tvm.farm.deploy` sends the text of this file there and runs
it with whatever Python it finds. So only the standard library is imported at the top, and nothing here is newer than
Python 3.7. What loads native libraries, and may crash or hang, runs in a child process.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import FarmError, GfTvmError
from ..machine import allocator
from ..machine.sensors import Sensors
from . import jetson

OK, WARNING, FAILED, UNKNOWN = STATUSES = ("ok", "warning", "failed", "unknown")

MIN_PYTHON = (3, 10)
#: TVM's wheel is made for glibc 2.27 (a Jetson Nano's), those of PyTorch since 2.6 for 2.28.
MIN_GLIBC = (2, 27)
TORCH_GLIBC = (2, 28)
#: What a board must have, and what tuning needs besides.
PACKAGES = ("gf-tvm", "torch", "numpy", "apache-tvm", "apache-tvm-ffi")
TUNING_PACKAGES = ("psutil", "cloudpickle", "tornado")

PROBE_SECONDS = 10.0
#: For a child that imports PyTorch: tens of seconds from a cold SD card, or under emulation and load.
IMPORT_SECONDS = 180.0
#: For one kernel of a bundle: loading everything, and the reference in float64 under emulation.
KERNEL_SECONDS = 300.0
#: A Pi lowers its clock from 80 C on; measurements of the minutes before that differ from those after it.
WARM_CELSIUS, HOT_CELSIUS = 70.0, 80.0
_GIB = float(1 << 30)
#: Children start where no file can be taken for a module: Python looks into the present folder first.
_AWAY = "/"

_ADVICE = {
    "undervoltage": "use the board's own power supply and a short cable",
    "frequency capped": "use the board's own power supply, and cool the board",
    "throttled": "use the board's own power supply, and cool the board",
    "soft temperature limit": "cool the board (a fan, more room)",
}


@dataclass(frozen=True)
class Check:
    """One line of the doctor's.

    Attributes:
        name: what was looked at.
        status: "ok", "warning" (works, but measures badly or may fail), "failed" (does not work), "unknown".
        detail: what was found.
        advice: what to do about it; "" if nothing is to be done.
    """

    name: str
    status: str
    detail: str
    advice: str = ""

    def __str__(self) -> str:
        text = f"{self.status:<7} {self.name}" + (f" {self.detail}" if self.detail else "")
        return f"{text}; {self.advice}" if self.advice else text


class ProbeError(FarmError):
    """A probe that crashed, raised or hung."""


def failed(checks: Iterable[Check]) -> bool:
    """Whether something does not work."""
    return any(check.status == FAILED for check in checks)


def guarded(name: str, probe: Callable[[], Check | Iterable[Check]], seconds: float = PROBE_SECONDS) -> list[Check]:
    """Run a probe; whatever goes wrong in it, or a hang of ``seconds``, becomes a line."""
    found: list[Check] = []

    def work() -> None:
        try:
            result = probe()
            found.extend([result] if isinstance(result, Check) else result)
        except ProbeError as error:
            found.append(Check(name, FAILED, _one_line(error)))
        except GfTvmError as error:
            found.append(Check(name, FAILED, _one_line(error)))
        except Exception as error:
            found.append(Check(name, UNKNOWN, f"cannot be told: {type(error).__name__}: {_one_line(error)}"))

    # A thread, because waiting for a dead network drive cannot be interrupted; it dies with the process.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return [Check(name, UNKNOWN, f"cannot be told: no answer in {seconds:g} s")]
    return found


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def in_child(code: str, seconds: float = IMPORT_SECONDS) -> Any:
    """Run Python code in a process of its own; its last line of output is JSON, and is returned.

    Raises:
        ProbeError: it died, raised, hung, or printed something else.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=_AWAY,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ProbeError(f"no answer in {seconds:g} s") from None
    except OSError as error:
        raise ProbeError(f"cannot start {sys.executable}: {error.strerror}") from None
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    if done.returncode:
        raise ProbeError(_end_of(done.returncode, done.stderr))
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError):
        raise ProbeError("the probe printed nothing of use") from None


def _end_of(code: int, stderr: bytes) -> str:
    if code < 0:
        try:
            return f"died of {signal.Signals(-code).name}"
        except ValueError:
            return f"died of signal {-code}"
    lines = [line for line in stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"ended with exit code {code}"


# --------------------------------------------------------------------------------------------------- host or board


def board_checks(sensors: Sensors | None = None, folder: Path | None = None) -> Iterator[Check]:
    """Look at this machine as a board that measures and trains.

    Args:
        sensors: to read; by default this machine's.
        folder: on the disk whose free space matters; by default the home folder.
    """
    for name, probe, seconds in (
        ("python", _python, PROBE_SECONDS),
        ("system", _system, PROBE_SECONDS),
        ("packages", _packages, PROBE_SECONDS),
        # Before PyTorch is imported, which is load and takes memory.
        ("cores", _cores, PROBE_SECONDS),
        ("memory", _memory, PROBE_SECONDS),
        ("torch", _torch, IMPORT_SECONDS + 5),
        ("tvm", _runtime, IMPORT_SECONDS + 5),
        ("allocator", _allocator, PROBE_SECONDS),
        ("disk", lambda: _disk(folder), PROBE_SECONDS),
        ("clock", lambda: _sensors(sensors), PROBE_SECONDS),
        ("time", _time, PROBE_SECONDS),
        ("user", _user, PROBE_SECONDS),
    ):
        yield from guarded(name, probe, seconds)
    yield from _jetson()


def _allocator() -> Check:
    """Whether the commands find one that keeps the memory of large tensors."""
    wanted = allocator.ALLOCATORS["jemalloc"]
    path = allocator.installed(wanted)
    if path is None:
        return Check("allocator", WARNING, "jemalloc is not installed, so forward passes take longer", wanted.install)
    return Check("allocator", OK, f"jemalloc: {path}")


def host_checks(
    device: str = "host", tracker: tuple[str, int] | None = None, key: str | None = None, tunes: bool = True
) -> Iterator[Check]:
    """Look at this machine as the host that compiles and tunes for ``device``.

    Args:
        device: profile to compile for.
        tracker: to be asked for its boards.
        key: of the boards that should be there; None takes any.
        tunes: whether tuning is wanted here; if not, a missing extra is no failure.
    """
    yield from guarded("tuning", lambda: _tuning(tunes), IMPORT_SECONDS + 5)
    yield from guarded("compiler", lambda: _compiler(device, tunes), IMPORT_SECONDS + 5)
    if tracker is not None:
        yield from guarded("tracker", lambda: _tracker(tracker, key), 3 * PROBE_SECONDS)


def compare_versions(host: dict[str, Any], board: dict[str, Any], name: str = "board") -> Iterator[Check]:
    """Whether what runs on both sides fits together; the arguments are those of :func:`versions`."""
    for package in ("apache-tvm", "apache-tvm-ffi", "gf-tvm"):
        here, there = host.get(package), board.get(package)
        label = f"{package} on {name}"
        if not there:
            yield Check(label, FAILED, "is not installed", "install it with gf-tvm farm deploy")
        elif here == there:
            yield Check(label, OK, f"{there}, as here")
        else:
            # Compiled code and TVM's runtime must agree on the minor version.
            minor = [str(version).split(".")[:2] for version in (here, there)]
            status = FAILED if package == "apache-tvm" and minor[0] != minor[1] else WARNING
            detail = f"{there}, here {here or 'not installed'}"
            yield Check(label, status, detail, "make them equal with gf-tvm farm deploy")


def libc() -> tuple[str, str]:
    """Name and version of the C library, "" if unknown; Python 3.7's libc_ver() tells what Python was built for."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (AttributeError, OSError, ValueError):
        return "", ""
    return name, version


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        found[package] = _version(package)
    return found


def _version(package: str) -> str | None:
    from importlib import metadata  # not at the top: Python 3.7 lacks it

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def report(checks: Iterable[Check]) -> dict[str, Any]:
    """The checks, and what else a host wants to know of a board, as plain values for JSON."""
    listed = [asdict(check) for check in checks]
    try:
        known = versions()
    except ImportError:
        known = {"python": platform.python_version()}
    return {
        "schema": 1,
        "machine": {"node": platform.node(), "arch": platform.machine(), "system": platform.system()},
        "versions": known,
        "time": time.time(),
        "checks": listed,
    }


# ----------------------------------------------------------------------------------------------------------- probes


def _python() -> Check:
    version = platform.python_version()
    if sys.version_info[:2] < MIN_PYTHON:
        return Check("python", FAILED, version, "install Python 3.10 or newer (a newer OS image)")
    return Check("python", OK, version)


def _system() -> Check:
    machine = platform.machine()
    text = f"{platform.system()} {platform.release()} {machine}"
    if sys.maxsize <= 1 << 32 or machine not in ("aarch64", "x86_64"):
        return Check("system", FAILED, f"{text} with {sys.maxsize.bit_length() + 1}-bit Python", "install a 64-bit OS")
    library, version = libc()
    if library != "glibc":
        return Check("system", FAILED, f"{text} without glibc", "install an OS with glibc: TVM's wheels need it")
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    text = f"{text}, glibc {version}"
    if numbers < MIN_GLIBC:
        return Check("system", FAILED, text, "install a newer OS image: TVM's wheel needs glibc 2.27")
    if numbers < TORCH_GLIBC:
        return Check("system", WARNING, text, "PyTorch 2.5 is the last that runs here; newer ones need glibc 2.28")
    return Check("system", OK, text)


def _packages() -> Iterator[Check]:
    if sys.version_info[:2] < MIN_PYTHON:
        return  # nothing can be installed for it, and the oldest cannot even tell
    found = {package: _version(package) for package in PACKAGES}
    for package, version in found.items():
        if version is not None:
            yield Check(package, OK, version)
    missing = [package for package, version in found.items() if version is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        yield Check("packages", FAILED, f"{', '.join(missing)} {verb} not installed", "gf-tvm farm deploy, or pip")


def _torch() -> Iterator[Check]:
    if not _have("torch"):
        return  # said by _packages
    code = "import json, torch; torch.ones(2) + 1; print(json.dumps(torch.get_num_threads()))"
    start = time.monotonic()
    threads = in_child(code)
    seconds = time.monotonic() - start
    yield Check("torch", OK, f"imports in {seconds:.1f} s")
    cores = _usable_cores()
    if threads < cores:
        yield Check("threads", WARNING, f"PyTorch uses {threads} of {cores} cores", "unset OMP_NUM_THREADS")


def _runtime() -> Iterator[Check]:
    if not _have("apache-tvm", "apache-tvm-ffi", "torch", "gf-tvm"):
        return
    code = """
import json, warnings
warnings.simplefilter("ignore")
from gf_tvm.bundle.runtime import start_runtime
start_runtime()
import torch, tvm_ffi
threads = tvm_ffi.get_global_func("runtime.NumThreads")()
print(json.dumps([threads, hasattr(torch.Tensor, "__dlpack_c_exchange_api__")]))
"""
    threads, exchange = in_child(code)
    cores = _usable_cores()
    if threads < cores:
        advice = "unset TVM_NUM_THREADS and OMP_NUM_THREADS"
        yield Check("tvm runtime", WARNING, f"uses {threads} of {cores} cores", advice)
    else:
        yield Check("tvm runtime", OK, f"loads, {threads} threads")
    if not exchange:
        detail = "are passed to kernels the slow way"
        yield Check("tensors", WARNING, detail, "pip install torch-c-dlpack-ext")


def _have(*packages: str) -> bool:
    return sys.version_info[:2] >= MIN_PYTHON and all(_version(package) is not None for package in packages)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cores() -> Check:
    usable, present = _usable_cores(), os.cpu_count() or 1
    load = os.getloadavg()[0]
    if load > 0.5 * usable:
        detail = f"{usable}, but other programs keep {load:.1f} of them busy"
        return Check("cores", WARNING, detail, "end them before measuring")
    if usable < present:
        return Check("cores", WARNING, f"{usable} of {present} may be used", "end the restriction (taskset, cgroup)")
    return Check("cores", OK, str(usable))


def _memory() -> Check:
    text = Path("/proc/meminfo").read_text(encoding="ascii", errors="replace")
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB$", text, flags=re.MULTILINE))
    total, free = (int(fields[name]) * 1024 / _GIB for name in ("MemTotal", "MemAvailable"))
    detail = f"{total:.1f} GiB, {free:.1f} free"
    if free < 0.5:
        return Check("memory", WARNING, detail, "end other programs: importing PyTorch alone takes 0.3 GiB")
    return Check("memory", OK, detail)


def _disk(folder: Path | None) -> Check:
    place = Path.home() if folder is None else Path(folder)
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(str(place)).free / _GIB
    detail = f"{free:.1f} GiB free for {place}"
    if free < 0.2:
        return Check("disk", FAILED, detail, "make room")
    if free < 2:
        return Check("disk", WARNING, detail, "make room: an installation takes 1.5 GiB")
    return Check("disk", OK, detail)


def _sensors(sensors: Sensors | None) -> Iterator[Check]:
    reading = (sensors or Sensors()).read()
    if reading.governor is None:
        yield Check("governor", UNKNOWN, "cannot be read (normal in a virtual machine)")
    elif reading.governor == "performance":
        yield Check("governor", OK, reading.governor)
    else:
        advice = "set performance, else the first runs of a kernel are timed at a lower clock"
        yield Check("governor", WARNING, reading.governor, advice)
    if reading.mhz is None:
        yield Check("clock", UNKNOWN, "cannot be read (normal in a virtual machine)")
    elif reading.max_mhz is None:
        yield Check("clock", OK, f"{reading.mhz:.0f} MHz")
    else:
        detail = f"{reading.mhz:.0f} of {reading.max_mhz:.0f} MHz"
        # With any other governor an idle machine's clock is low, and says nothing.
        slow = reading.governor == "performance" and reading.mhz < 0.95 * reading.max_mhz
        yield Check("clock", WARNING, detail, "something limits it") if slow else Check("clock", OK, detail)
    if reading.celsius is None:
        yield Check("temperature", UNKNOWN, "cannot be read (normal in a virtual machine)")
    elif reading.hot(WARM_CELSIUS):
        detail = f"{reading.celsius:.0f} C" + (", the clock is lowered" if reading.hot(HOT_CELSIUS) else "")
        yield Check("temperature", WARNING, detail, "cool the board: its clock is lowered from 80 C on")
    else:
        yield Check("temperature", OK, f"{reading.celsius:.0f} C")
    yield _throttling(reading.known, reading.throttled, reading.throttled_before)


def _throttling(known: bool, now: tuple[str, ...], before: tuple[str, ...]) -> Check:
    if not known:
        return Check("throttling", UNKNOWN, "cannot be read (a Raspberry Pi's firmware and a Jetson's kernel tell)")
    causes = now or before
    advice = "; ".join(dict.fromkeys(_ADVICE[cause] for cause in causes))
    if now:
        return Check("throttling", FAILED, f"now: {', '.join(now)}; what is measured now is wrong", advice)
    if before:
        return Check("throttling", WARNING, f"not now, but since the start: {', '.join(before)}", advice)
    return Check("throttling", OK, "none since the start")


def _jetson(root: Path = Path("/")) -> Iterator[Check]:
    """What only a Jetson has; nothing elsewhere."""
    if not jetson.is_jetson(root):
        return
    for name, probe in (
        ("L4T", lambda: jetson.system(root)),
        ("nvpmodel", lambda: jetson.power_mode(root, jetson.ask_nvpmodel)),
        ("GPU clock", lambda: jetson.gpu_clock(root)),
        ("CUDA driver", lambda: jetson.driver(in_child(jetson.LOOK_AT_DRIVER, PROBE_SECONDS))),
        ("CUDA compiler", lambda: jetson.compiler(root)),
        ("swap", lambda: jetson.swap(root)),
    ):
        yield from guarded(name, lambda probe=probe: Check(*probe()), 2 * PROBE_SECONDS)  # type: ignore[misc]


def _time() -> Check:
    text = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    # A Pi has no clock of its own, and begins in the past until it has found a time server.
    if time.gmtime().tm_year < 2025:
        return Check("time", FAILED, text, "set the clock (timedatectl set-ntp true): secure downloads fail without")
    return Check("time", OK, text)


def _user() -> Check:
    if os.geteuid() == 0:
        return Check("user", WARNING, "root", "use another: whoever reaches a server runs code as its user")
    return Check("user", OK, f"uid {os.geteuid()}, not root")


def _tuning(wanted: bool) -> Check:
    missing = [name for name in TUNING_PACKAGES if not _have(name)]
    if not (_have("xgboost") or _have("xgboost-cpu")):
        missing.append("xgboost")
    if missing:
        detail = f"lacks {', '.join(missing)}"
        if not wanted:
            return Check("tuning", OK, f"{detail}: this machine measures and trains, it does not tune")
        return Check("tuning", FAILED, detail, "pip install 'gf-tvm[tune-cpu]'")
    in_child("import cloudpickle, psutil, tornado, xgboost; print(1)")
    return Check("tuning", OK, "xgboost and what else tuning needs import")


def _compiler(device: str, wanted: bool) -> Check:
    if not _have("apache-tvm", "gf-tvm"):
        return Check("compiler", UNKNOWN, "not looked for: TVM or gf_tvm is not installed")
    code = f"""
import json
from gf_tvm.errors import GfTvmError
try:
    from gf_cuda import NoCompilerError
    from gf_tvm.machine.profiles import get_profile
    profile = get_profile({device!r})
    if profile.gpu is not None:
        from gf_cuda import nvrtc
        compiler, number = nvrtc.find(), int(profile.gpu.arch[3:])
        # What is newer than the compiler gets its code from the driver.
        knows = number in compiler.archs or number > max(compiler.archs)
        result = [knows, str(compiler) if knows else f"{{compiler}} makes no code for {{profile.gpu.arch}}"]
    else:
        from gf_tvm.codegen.linker import find_linker
        found = find_linker(profile)
        result = [True, found if isinstance(found, str) else " ".join(map(str, found))]
except (GfTvmError, NoCompilerError) as error:
    result = [False, str(error)]
print(json.dumps(result))
"""
    found, text = in_child(code)
    if found:
        return Check("compiler", OK, f"{text} (for {device})")
    if wanted:
        return Check("compiler", FAILED, text)
    return Check("compiler", OK, f"none: this machine runs kernels, it does not build them ({text})")


def _tracker(address: tuple[str, int], key: str | None) -> Iterator[Check]:
    from .protocol import show
    from .tracker import boards

    found = boards(address)
    yield Check("tracker", OK, f"at {show(address)}, boards: {len(found)}")
    keys = sorted({board.key for board in found})
    if key is not None and key not in keys:
        known = f"known keys: {', '.join(keys)}" if keys else "no board is registered"
        yield Check("boards", FAILED, f"none with key {key!r}; {known}", "start one with gf-tvm farm deploy or serve")
    here = versions()
    for board in found:
        if key is not None and board.key != key:
            continue
        if board.info:
            yield from compare_versions(here, board.info.get("versions") or {}, board.name)
        else:
            detail = "does not run gf-tvm farm serve"
            yield Check(f"board {board.name}", WARNING, detail, "a crashing kernel ends TVM's own server")


# ------------------------------------------------------------------------------------------------ kernels of a bundle


def verify_library(
    path: Path,
    progress: Callable[[int, int], None] | None = None,
    seed: int | None = None,
    seconds: float = KERNEL_SECONDS,
) -> Iterator[Check]:
    """Run every kernel of a bundle on this machine, with random inputs and poisoned outputs, against float64.

    The kernels run in a child process: one that crashes or hangs is a line, and the others still run.

    Args:
        path: of the bundle.
        progress: called with the number of kernels done and of all.
        seed: of the inputs; by default a new one each time, and it is named with every failure.
        seconds: that one kernel may take.
    """
    path = Path(path).absolute()
    if _is_for_gpu(path):
        yield _verify_on_gpu(path, seconds)
        return
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    first, total, wrong = 0, 0, 0
    while True:
        child = _Child(f"from gf_tvm.farm.doctor import verify_kernels; verify_kernels({str(path)!r}, {first}, {seed})")
        running = None
        reason = ""
        try:
            for message in child.messages(seconds):
                if message["kind"] == "start":
                    running, total = (message["index"], message["kernel"]), message["total"]
                elif message["kind"] == "done":
                    running, first = None, message["index"] + 1
                    if message["excess"] is None or message["excess"] > 1:
                        wrong += 1
                        yield Check(message["kernel"], FAILED, _wrong(message["excess"], seed))
                    if progress is not None:
                        progress(first, total)
                elif message["kind"] == "error":
                    yield Check(path.name, FAILED, message["reason"].replace(f"{path.name}: ", "", 1))
                    return
                elif message["kind"] == "end":
                    count = f"{total - wrong} of {total}" if wrong else f"{total}"
                    detail = f"{count} kernels equal the float64 reference"
                    yield Check(path.name, FAILED if wrong else OK, detail)
                    return
        except ProbeError as error:
            reason = str(error)
        finally:
            child.close()
        if running is None:
            yield Check(path.name, FAILED, f"its kernels cannot be run: {reason or child.end()}")
            return
        index, kernel = running
        wrong += 1
        first = index + 1
        yield Check(kernel, FAILED, f"{reason or child.end()} (seed {seed})")
        if progress is not None:
            progress(first, total)


def _is_for_gpu(path: Path) -> bool:
    """Whether it is a bundle for NVIDIA GPUs; what cannot be read is left to who reads it."""
    from gf_cuda.archives import MANIFEST_BYTES, read_entry

    try:
        with zipfile.ZipFile(path) as archive:
            manifest = json.loads(read_entry(archive, "manifest.json", MANIFEST_BYTES).decode("utf-8"))
        return isinstance(manifest, dict) and manifest.get("kind") == "cuda"
    except Exception:  # whatever a damaged archive makes zipfile raise
        return False


def _verify_on_gpu(path: Path, seconds: float) -> Check:
    """gf_cuda's own check of a bundle, in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "gf_cuda", "check", str(path)],
            cwd=_AWAY,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=10 * seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Check(path.name, FAILED, f"its kernels did not return in {10 * seconds:g} s")
    lines = [line for line in done.stdout.decode("utf-8", "replace").splitlines() if line.strip()]
    if done.returncode == 0 and lines:
        return Check(path.name, OK, f"{lines[-1]} (float64)")
    if done.returncode == 1 and lines and not done.stderr:
        return Check(path.name, FAILED, lines[-1], f"python -m gf_cuda check {path.name} names them")
    return Check(path.name, FAILED, _end_of(done.returncode, done.stderr))


def _wrong(excess: float | None, seed: int) -> str:
    if excess is None:
        return f"left a value unwritten or not a number (seed {seed})"
    return f"is wrong: the error is {excess:.3g} times what is allowed (seed {seed})"


class _Child:
    """A process that prints messages as lines of JSON; other lines (of native libraries) are passed over."""

    _MARK = "gf_tvm-doctor "

    def __init__(self, code: str) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self._errors = b""
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=_AWAY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
        )

    def messages(self, seconds: float) -> Iterator[dict[str, Any]]:
        """The messages. Raises ProbeError after ``seconds`` without one; before the first it may import PyTorch."""
        assert self._process.stdout is not None
        seconds, afterwards = IMPORT_SECONDS + seconds, seconds
        hung = threading.Event()

        def give_up() -> None:
            hung.set()
            self._process.kill()

        while True:
            timer = threading.Timer(seconds, give_up)
            timer.daemon = True
            timer.start()
            try:
                line = self._process.stdout.readline().decode("utf-8", "replace")
            finally:
                timer.cancel()
            if hung.is_set():
                raise ProbeError(f"did not return in {seconds:g} s")
            if not line:
                self._process.wait()
                return
            if line.startswith(self._MARK):
                seconds = afterwards
                yield json.loads(line[len(self._MARK) :])

    @classmethod
    def send(cls, **message: Any) -> None:
        """Called in the child."""
        print(cls._MARK + json.dumps(message), flush=True)

    def end(self) -> str:
        """How it ended; after close()."""
        return _end_of(self._process.wait(), self._errors)

    def close(self) -> None:
        """End it, if it still runs."""
        self._process.kill()
        self._process.wait()
        self._stderr.seek(0)
        self._errors = self._stderr.read()
        self._stderr.close()
        if self._process.stdout is not None:
            self._process.stdout.close()


def verify_kernels(path: str, first: int, seed: int) -> None:
    """Run the kernels of a bundle from number ``first`` on and send a message before and after each."""
    import math
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a kernel that crashes should not fill the SD card
    try:
        from ..bundle.library import load
        from ..core.verify import excess, expected, poisoned_outputs, random_inputs

        library = load(path)
    except (GfTvmError, ImportError) as error:
        _Child.send(kind="error", reason=_one_line(error))
        return
    workloads = library.workloads
    for index in range(first, len(workloads)):
        workload = workloads[index]
        _Child.send(kind="start", index=index, kernel=workload.key, total=len(workloads))
        kernel = library.find(workload.kernel, workload.geometry, workload.dtype)
        assert kernel is not None
        inputs, outputs = random_inputs(workload, seed + index), poisoned_outputs(workload)
        kernel(*inputs, *outputs)
        ratio = excess(outputs, expected(workload, inputs))
        # JSON has no infinity.
        _Child.send(kind="done", index=index, kernel=workload.key, excess=ratio if math.isfinite(ratio) else None)
    _Child.send(kind="end")

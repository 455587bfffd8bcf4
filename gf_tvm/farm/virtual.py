"""Virtual Pis: a board's own software under qemu, for trying and testing everything but speed.

A *root* is a folder with what a Raspberry Pi's 64-bit system has of Python, from Debian, and the aarch64 wheels of
PyTorch and TVM, from the package index. Nothing in it is emulated while it is made: packages are unpacked, not
installed. qemu then runs its Python as an ordinary process of this machine, which sees the root's files where there
are some and the host's elsewhere. So that this is of no consequence:

* the processor is described by a file in the root (``/proc/cpuinfo``), and sensors are read where ``GF_TVM_SENSORS``
  says, by default in an empty folder;
* the host's library cache, which lists libraries for another architecture, is hidden by an empty one;
* environment variables of the host's Python are not passed on;
* ``sys.executable`` is a script that starts qemu, because this machine's kernel cannot start the Python itself.
"""

from __future__ import annotations

import compileall
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import FarmError
from ..files import user_cache
from .wheel import build_wheel

CPU = "cortex-a72"

# A Raspberry Pi's system of the same Debian: glibc 2.36 and Python 3.11.
_SUITE = "bookworm"
_DEBIAN = ("python3", "libstdc++6", "libgomp1", "zlib1g")
_PYTHON = "3.11"
#: What begins a .pyc file of that Python.
_MAGIC = "a70d0d0a"
#: 2.28: what PyTorch's wheels ask for; pip takes the older kinds only if they are named, too.
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
# The versions of constraints.txt, but for torch: 2.13 for aarch64 wants CUDA, 2.7.1 is a build for CPUs.
_WHEELS = (
    "apache-tvm==0.27.0.post1",
    "apache-tvm-ffi==0.1.14.post1",
    "ml-dtypes==0.6.0",
    "numpy==2.4.6",
    "torch==2.7.1",
    "sympy==1.14.0",
    "mpmath==1.3.0",
    "networkx==3.6.1",
    "jinja2==3.1.6",
    "MarkupSafe==3.0.4",
    "filelock==4.2.11",
    "fsspec==2026.9.0",
    "typing_extensions==4.16.0",
    # Without it TVM tries to compile the exchange of tensors with this PyTorch; a board has no compiler.
    "torch-c-dlpack-ext==0.1.5",
    "packaging==26.3",
    "tqdm==4.70.1",
    "tabulate==0.10.0",
    "pillow==13.0.0",
)
#: What a root can have besides; "torch" is always there.
EXTRAS: dict[str, tuple[str, ...]] = {
    "torch": (),
    "train": (
        "scikit-learn==1.9.1",
        "scipy==1.17.1",
        "joblib==1.6.0",
        "threadpoolctl==3.8.0",
        "narwhals==2.28.0",
    ),
    # TVM's own server and its clients' processes.
    "rpc": ("psutil==7.2.2", "cloudpickle==3.1.2", "tornado==6.6.1"),
}
#: Raise it when a root is made differently from the same packages.
_FORMAT = 1

_SITE = f"usr/local/lib/python{_PYTHON}/dist-packages"
_EXECUTABLE = "usr/bin/python3-qemu"
_STAMP = "virtual-pi.json"
_CPUINFO = """\
processor\t: {number}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

"""
#: The guest's Python is found by what it runs, whatever the root is called by then.
_SITE_CODE = f"""\
import os, sys
_root = os.path.abspath(os.path.join(os.path.dirname(__file__), *[os.pardir] * 5))
sys.executable = os.path.join(_root, {_EXECUTABLE!r})
"""
_WRAPPER = """\
#!/bin/sh
root=$(CDPATH= cd -- "$(dirname -- "$0")/../.." && pwd) || exit 1
exec '{qemu}' -cpu {cpu} -L "$root" "$root/usr/bin/python3" "$@"
"""
#: Of the host's environment. A list of what must not get through (PYTHONPATH, VIRTUAL_ENV, LD_LIBRARY_PATH, OMP_...)
#: would never be complete.
_PASSED = ("USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TERM")

#: Called with the number of the step that begins, how many there are, and what it does.
ProgressCallback = Callable[[int, int, str], None]


# ----------------------------------------------------------------------------------------------------------- the root


def default_folder() -> Path:
    """Where roots are kept: ``$XDG_CACHE_HOME/gf_tvm/virtual-pi``."""
    return user_cache() / "virtual-pi"


def missing_packages() -> list[str]:
    """The Debian packages that virtual Pis need and that are not installed here."""
    missing = []
    if _find_qemu() is None:
        missing.append("qemu-user-static")
    if shutil.which("mmdebstrap") is None:
        missing.append("mmdebstrap")
    return missing


def prepare_root(
    folder: Path | None = None, extras: Sequence[str] = (), progress: ProgressCallback | None = None
) -> Path:
    """Make a root in ``folder``, unless there is one, put the present code of gf_tvm into it, and return its path.

    The first time takes a minute and 1.2 GB. A root of other versions is replaced, though not removed while it is
    in use; one that is being made by another process is waited for.

    Args:
        folder: where roots are kept; :func:`default_folder` if None.
        extras: names of :data:`EXTRAS`.
        progress: is told of each step.

    Raises:
        FarmError: Debian packages are missing, or a step failed.
    """
    unknown = [name for name in extras if name not in EXTRAS]
    if unknown:
        raise FarmError(f"virtual Pis have no extra {unknown[0]!r}; there are {', '.join(EXTRAS)}")
    if missing := missing_packages():
        raise FarmError(
            f"virtual Pis need the Debian package{'s'[: len(missing) > 1]} {' and '.join(missing)}; "
            f"install with: apt-get install {' '.join(missing)}"
        )
    folder = (default_folder() if folder is None else folder).absolute()
    wheels = set(_WHEELS).union(*(EXTRAS[name] for name in extras))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder, progress):
            root = _find_root(folder, wheels)
            if root is None:
                root = _make_root(folder, wheels, progress)
            _write_executable(root)
            _install_gf_tvm(root)
    except OSError as error:
        raise FarmError(f"cannot make a virtual Pi in {folder}: {error.strerror or error}") from None
    return root


def _stamp(wheels: set[str]) -> dict[str, Any]:
    return {"format": _FORMAT, "suite": _SUITE, "debian": sorted(_DEBIAN), "wheels": sorted(wheels)}


def _read_stamp(root: Path) -> dict[str, Any]:
    try:
        stamp = json.loads((root / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) and isinstance(stamp.get("wheels"), list) else {}


def _find_root(folder: Path, wheels: set[str]) -> Path | None:
    """A root that has all of ``wheels``, and perhaps extras that somebody else asked for."""
    for root in sorted(folder.glob("root-*")):
        stamp = _read_stamp(root)
        if stamp and wheels <= set(stamp["wheels"]) and stamp == _stamp(_known(stamp["wheels"])):
            return root
    return None


def _known(wheels: list[str]) -> set[str]:
    """Those of ``wheels`` that are what would be installed now."""
    return set(wheels) & set(_WHEELS).union(*EXTRAS.values())


def _make_root(folder: Path, wheels: set[str], progress: ProgressCallback | None) -> Path:
    """Make a root beside what is there, rename it into place, and remove what is there."""
    texts = ("Debian's packages", "wheels of PyTorch and TVM", "bytecode", "first start")

    def step(number: int) -> None:
        if progress is not None:
            progress(number, len(texts), texts[number])

    before = list(folder.glob("root-*"))
    # Extras that were asked for once are kept, so that two users with different ones do not undo each other's work.
    for root in before:
        for extra in EXTRAS.values():
            if extra and set(extra) <= set(_read_stamp(root).get("wheels", ())):
                wheels = wheels | set(extra)
    stamp = json.dumps(_stamp(wheels), indent=1)
    stage = folder / ".making"
    shutil.rmtree(stage, ignore_errors=True)  # of a process that was ended
    root = stage / "root"
    root.mkdir(parents=True)
    try:
        step(0)
        _unpack_debian(stage, root)
        step(1)
        _unpack_wheels(stage, root, sorted(wheels))
        step(2)
        _add_own_files(root)
        _compile(root)
        step(3)
        _try(root)
        (root / _STAMP).write_text(stamp + "\n", encoding="utf-8")
        target = folder / f"root-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}"
        shutil.rmtree(target, ignore_errors=True)  # there only if somebody has damaged its stamp
        root.rename(target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    for old in before:
        if old != target and not _in_use(old):
            shutil.rmtree(old, ignore_errors=True)
    if progress is not None:
        progress(len(texts), len(texts), "ready")
    return target


def _in_use(root: Path) -> bool:
    """Whether a Python of this root runs: it would fail at its next import."""
    name = os.fsencode(root / "usr/bin/python3")
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if name in command.read_bytes().split(b"\0"):
                return True
    return False


def _unpack_debian(stage: Path, root: Path) -> None:
    archive = stage / "debian.tar"
    # By way of a tar file, because without root's rights mmdebstrap may make folders that belong to others.
    command = ["mmdebstrap", "--quiet", "--variant=extract", "--architectures=arm64", "--format=tar"]
    if os.geteuid() != 0:
        command.append("--mode=chrootless")  # nothing of it is run, so nothing has to be set up for that
    _run([*command, f"--include={','.join(_DEBIAN)}", _SUITE, archive], "unpacking Debian's packages for arm64")
    # What is in the root hides the host's; those are needed as they are.
    shown = ("dev", "proc", "sys", "tmp", "run", "var", "home", "root", "etc/apt", "etc/hostname", "etc/resolv.conf")
    excluded = [f"--exclude=./{name}" for name in shown]
    command = ["tar", "--extract", "--no-same-owner", "--file", str(archive), "--directory", str(root)]
    _run([*command, "--anchored", *excluded], "unpacking Debian's packages for arm64")
    archive.unlink()


def _unpack_wheels(stage: Path, root: Path, wheels: list[str]) -> None:
    if importlib.util.find_spec("pip") is None:
        raise FarmError(f"virtual Pis need pip in {sys.executable}; install with: {sys.executable} -m ensurepip")
    # pip adds its folder for other Pythons' packages to none of the root's: it goes by the path alone.
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--no-compile", "--only-binary=:all:", "--implementation", "cp"]
    command += ["--python-version", _PYTHON, "--abi", "cp311", "--abi", "abi3", "--abi", "none"]
    command += [f"--platform={name}" for name in _PLATFORMS]
    environment = {**os.environ, "PIP_ROOT_USER_ACTION": "ignore"}
    _run([*command, "--target", root / _SITE, *wheels], "unpacking wheels for aarch64", environment)


def _add_own_files(root: Path) -> None:
    (root / _SITE / "_virtual_pi.py").write_text(_SITE_CODE, encoding="utf-8")
    # Debian's Python has a sitecustomize of its own, which comes first.
    (root / _SITE / "_virtual_pi.pth").write_text("import _virtual_pi\n", encoding="utf-8")
    _write_executable(root)
    (root / "etc/ld.so.cache").write_bytes(b"")
    (root / "opt/sensors").mkdir(parents=True)
    (root / "proc/device-tree").mkdir(parents=True)
    (root / "proc/device-tree/model").write_text("Virtual Pi (qemu)\0", encoding="utf-8")
    (root / "proc/cpuinfo").write_text("".join(_CPUINFO.format(number=n) for n in range(4)), encoding="utf-8")


def _write_executable(root: Path) -> None:
    _replace(root / _EXECUTABLE, _WRAPPER.format(qemu=_qemu(), cpu=CPU), mode=0o755)


def _compile(root: Path) -> None:
    """Make the bytecode that a first import would make, but not under emulation if it can be helped."""
    folders = [str(root / f"usr/lib/python{_PYTHON}"), str(root / _SITE)]
    for python in (sys.executable, shutil.which(f"python{_PYTHON}")):
        if python and _magic(python) == _MAGIC:
            # Some packages have files that are not meant to compile; then the exit code is 1.
            subprocess.run(
                [python, "-m", "compileall", "-q", "-j", "0", *folders],
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            return
    _run(python_command(root, "-c", "import tvm.runtime, torch"), "starting Python under qemu", environment(root))


def _magic(python: str) -> str:
    code = "import importlib.util; print(importlib.util.MAGIC_NUMBER.hex())"
    return subprocess.run([python, "-c", code], check=False, capture_output=True, text=True).stdout.strip()


def _try(root: Path) -> None:
    """Whether qemu can run this at all, with libraries of Debian's and of a wheel, and a child process."""
    code = "import numpy, subprocess, sys; subprocess.run([sys.executable, '-c', 'import ctypes'], check=True)"
    _run(python_command(root, "-c", code), "starting Python under qemu", environment(root))


def _install_gf_tvm(root: Path) -> None:
    """Unpack the running gf_tvm. Processes that run in this root already keep the code they were started with."""
    code = root / "opt/gf_tvm"
    code.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=code, prefix=".new-") as stage:
        wheel = build_wheel(Path(stage))
        target = code / hashlib.sha256(wheel.read_bytes()).hexdigest()[:12]
        if not target.exists():
            new = Path(stage) / "code"
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(new)
            if importlib.util.MAGIC_NUMBER.hex() == _MAGIC:
                compileall.compile_dir(new, quiet=2)
            new.rename(target)
    os.utime(target)
    up = "/".join([".."] * len(Path(_SITE).parts))
    _replace(root / _SITE / "gf_tvm.pth", f"{up}/opt/gf_tvm/{target.name}\n")
    for old in sorted((path for path in code.iterdir()), key=lambda path: path.stat().st_mtime)[:-4]:
        shutil.rmtree(old, ignore_errors=True)


def _replace(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file that others may be reading."""
    stage = path.with_name(f".{path.name}.new")
    stage.write_text(text, encoding="utf-8")
    stage.chmod(mode)
    stage.replace(path)


@contextlib.contextmanager
def _locked(folder: Path, progress: ProgressCallback | None) -> Iterator[None]:
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress is not None:
                progress(0, 0, "another process is at it; waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(command: Sequence[str | Path], what: str, environment: dict[str, str] | None = None) -> None:
    """Run a command, silently. Raises FarmError with its last line if it fails."""
    try:
        done = subprocess.run(
            command,
            check=False,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise FarmError(f"{what} failed: {command[0]}: {error.strerror}") from None
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        # apt, mmdebstrap and pip end with advice or with what failed because something else did.
        errors = [line for line in lines if line.startswith(("E:", "ERROR:"))]
        reason = (errors or lines or [f"exit code {done.returncode}"])[0 if errors else -1]
        raise FarmError(f"{what} failed: {reason}")


# -------------------------------------------------------------------------------------------------------- running in it


def _find_qemu() -> str | None:
    return shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


def _qemu() -> str:
    qemu = _find_qemu()
    if qemu is None:
        raise FarmError("virtual Pis need the Debian package qemu-user-static; apt-get install qemu-user-static")
    return qemu


def python_command(root: Path, *args: str) -> list[str]:
    """The command that runs the root's Python with ``args``; to be used with :func:`environment`. Raises FarmError."""
    root = root.absolute()
    return [_qemu(), "-cpu", CPU, "-L", str(root), str(root / "usr/bin/python3"), *args]


def environment(root: Path, **extra: str) -> dict[str, str]:
    """The environment for :func:`python_command`: little of the host's, and what a virtual Pi is to know."""
    passed = {name: os.environ[name] for name in _PASSED if name in os.environ}
    return {
        "LANG": "C.UTF-8",
        "HOME": str(root.absolute()),
        **passed,
        # The host's shell and the like; a virtual environment's folder is not among them.
        "PATH": "/usr/bin:/bin",
        # Packages in the host's home folder are for another machine.
        "PYTHONNOUSERSITE": "1",
        "GF_TVM_EMULATED": "qemu",
        # An empty folder: the host's clock and temperature are not this board's.
        "GF_TVM_SENSORS": str(root.absolute() / "opt/sensors"),
        **extra,
    }


class VirtualPi:
    """One virtual board that serves a tracker, as a context manager or with :meth:`start` and :meth:`stop`.

    It ends with the process that started it, even if that is killed: it reads from a pipe that only that process
    holds open.

    Args:
        root: from :func:`prepare_root`.
        name: of the board.
        tracker: address of the tracker.
        key: the kind of board.
        folder: for its home and temporary files and its output, ``<name>.log``; made if it is not there.
        environment: variables besides, such as ``GF_TVM_SENSORS``.
    """

    def __init__(
        self, root: Path, name: str, tracker: tuple[str, int], key: str, folder: Path, **environment: str
    ) -> None:
        self.root, self.name, self.tracker, self.key = root, name, tracker, key
        self.folder = folder.absolute()
        self.log = self.folder / f"{name}.log"
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._from = 0

    @property
    def arguments(self) -> list[str]:
        """What its Python is called with."""
        host, port = self.tracker
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        command = ["-m", "gf_tvm.runners.cli", "farm", "serve", "--tracker", address, "--key", self.key]
        # A virtual Pi has the user of who runs it, which in a container is root.
        return [*command, "--name", self.name, "--port", "0", "--until-stdin-closes", "--allow-root"]

    def start(self) -> None:
        """Start it, also again after its end. Does not wait. Raises FarmError."""
        if self.alive:
            raise FarmError(f"the virtual Pi {self.name} runs already")
        self._close_stdin()
        try:
            for name in ("home", "tmp"):
                (self.folder / self.name / name).mkdir(parents=True, exist_ok=True)
            own = {"HOME": str(self.folder / self.name / "home"), "TMPDIR": str(self.folder / self.name / "tmp")}
            with open(self.log, "ab") as log:
                self._from = log.tell()
                self._process = subprocess.Popen(
                    python_command(self.root, "-u", *self.arguments),
                    env=environment(self.root, **{**own, **self._environment}),
                    cwd=self.folder / self.name,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise FarmError(f"cannot start the virtual Pi {self.name}: {error.strerror or error}") from None

    @property
    def pid(self) -> int:
        """Process id, which is also that of its process group. Raises FarmError before :meth:`start`."""
        if self._process is None:
            raise FarmError(f"the virtual Pi {self.name} was never started")
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs (or is stopped by SIGSTOP)."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Its exit code, minus a signal's number if that ended it; None while it runs or before the first start."""
        return None if self._process is None else self._process.poll()

    @property
    def output(self) -> str:
        """What it has printed since it was started the last time."""
        try:
            with open(self.log, "rb") as log:
                log.seek(self._from)
                return log.read().decode(errors="replace")
        except FileNotFoundError:
            return ""

    def wait_for(self, text: str, seconds: float = 120.0) -> str:
        """Wait until it prints a line with ``text``, and return the line.

        Raises:
            FarmError: it has ended, or took longer.
        """
        end = time.monotonic() + seconds
        while True:
            alive = self.alive  # before its last words are read
            output = self.output
            for line in output.splitlines(keepends=True):
                if text in line and line.endswith("\n"):
                    return line.rstrip("\n")
            last = (output.strip().splitlines() or ["it printed nothing"])[-1]
            if not alive:
                raise FarmError(f"the virtual Pi {self.name} ended with code {self.exit_code}: {last}")
            if time.monotonic() > end:
                raise FarmError(f"the virtual Pi {self.name} said nothing of {text!r} in {seconds:.0f} s: {last}")
            time.sleep(0.1)

    def signal(self, number: int) -> None:
        """Send a signal (SIGSTOP, SIGCONT, SIGTERM) to it and all it has started; not an error if it has ended."""
        for pid in _tree(self.pid) if self.alive else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """End it at once, as a power cut would, with all it has started."""
        if self.alive:
            # Stopped first, so that it starts nothing while the list is made.
            os.kill(self.pid, signal.SIGSTOP)
            self.signal(signal.SIGKILL)
        self._reap()

    def stop(self, seconds: float = 10.0) -> None:
        """End it as a user would; kill it if it takes longer than ``seconds``."""
        if self._process is not None and self.alive:
            os.kill(self.pid, signal.SIGTERM)
            os.kill(self.pid, signal.SIGCONT)
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.kill()
        self._reap()

    def _reap(self) -> None:
        if self._process is not None:
            self._process.wait()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._close_stdin()

    def _close_stdin(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def __enter__(self) -> VirtualPi:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _tree(pid: int) -> list[int]:
    """``pid`` and the processes that descend from it: a server's sessions are in groups of their own."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                # The name, in brackets, may contain anything.
                text = Path(f"/proc/{entry}/stat").read_text(encoding="utf-8", errors="replace")
                parents[int(entry)] = int(text.rpartition(")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue
    tree = [pid]
    for parent in tree:  # grows while it is read
        tree += [child for child, its in parents.items() if its == parent]
    return tree

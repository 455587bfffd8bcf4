"""CUDA C to code for a GPU: by NVRTC, or by nvcc where that is all there is. No GPU is needed.

The language is C++14, the newest that CUDA 10.2 knows. CUDA up to 12 makes code for a Jetson Nano (sm_53).
"""

import ctypes
import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

from .errors import CompileError, NoCompilerError

_PROTOTYPES: Dict[str, Tuple[Any, ...]] = {
    "nvrtcVersion": (POINTER(c_int), POINTER(c_int)),
    "nvrtcCreateProgram": (POINTER(c_void_p), c_char_p, c_char_p, c_int, c_void_p, c_void_p),
    "nvrtcDestroyProgram": (POINTER(c_void_p),),
    "nvrtcCompileProgram": (c_void_p, c_int, POINTER(c_char_p)),
    "nvrtcGetPTXSize": (c_void_p, POINTER(c_size_t)),
    "nvrtcGetPTX": (c_void_p, c_char_p),
    "nvrtcGetProgramLogSize": (c_void_p, POINTER(c_size_t)),
    "nvrtcGetProgramLog": (c_void_p, c_char_p),
}
_CUBIN_PROTOTYPES: Dict[str, Tuple[Any, ...]] = {  # since CUDA 11.1
    "nvrtcGetCUBINSize": (c_void_p, POINTER(c_size_t)),
    "nvrtcGetCUBIN": (c_void_p, c_char_p),
}
_ARCHS_PROTOTYPES: Dict[str, Tuple[Any, ...]] = {  # since CUDA 11.2
    "nvrtcGetNumSupportedArchs": (POINTER(c_int),),
    "nvrtcGetSupportedArchs": (POINTER(c_int),),
}
# All that an NVRTC without nvrtcGetSupportedArchs can know.
_ARCHS_BEFORE_11_2 = (30, 32, 35, 37, 50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86)
_COMPILATION_FAILED = 6
_LIBRARIES = (
    "libnvrtc.so.13",
    "libnvrtc.so.12",
    "libnvrtc.so.11.2",
    "libnvrtc.so.11.0",
    "libnvrtc.so.10.2",
    "libnvrtc.so",
)


@contextmanager
def _own_locale() -> Iterator[None]:
    """NVRTC 11.8 leaves the thread that called it with the locale "C"; then Python would open files as ASCII."""
    use = getattr(ctypes.CDLL(None), "uselocale", None)
    if use is None:
        yield
        return
    use.argtypes, use.restype = [c_void_p], c_void_p
    before = use(None)
    try:
        yield
    finally:
        use(before)


class Nvrtc:
    """NVRTC as a library.

    Attributes:
        version: (11, 8).
        makes_cubin: whether it makes finished code, or else only PTX.
    """

    def __init__(self, library: str) -> None:
        self.path = library
        if os.sep in library:
            # NVRTC opens its second library by name, and finds it only in the system's folders.
            for builtins in glob.glob(os.path.join(glob.escape(os.path.dirname(library)), "libnvrtc-builtins.so*")):
                ctypes.CDLL(builtins, mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(library)
        self._library.nvrtcGetErrorString.restype = c_char_p
        self._declare(_PROTOTYPES)
        self.makes_cubin = all(hasattr(self._library, name) for name in _CUBIN_PROTOTYPES)
        if self.makes_cubin:
            self._declare(_CUBIN_PROTOTYPES)
        major, minor = c_int(), c_int()
        self._call("nvrtcVersion", byref(major), byref(minor))
        self.version = (major.value, minor.value)
        self._archs: Optional[Tuple[int, ...]] = None
        if all(hasattr(self._library, name) for name in _ARCHS_PROTOTYPES):
            self._declare(_ARCHS_PROTOTYPES)
            count = c_int()
            self._call("nvrtcGetNumSupportedArchs", byref(count))
            numbers = (c_int * count.value)()
            self._call("nvrtcGetSupportedArchs", numbers)
            self._archs = tuple(sorted(numbers))

    def __str__(self) -> str:
        return f"NVRTC {self.version[0]}.{self.version[1]} ({self.path})"

    def translate(self, source: str, number: int, name: str, kind: str) -> Tuple[bytes, str]:
        """Image and log. Raises CompileError."""
        with _own_locale():
            return self._translate(source, number, name, kind)

    def _translate(self, source: str, number: int, name: str, kind: str) -> Tuple[bytes, str]:
        program = c_void_p()
        self._call("nvrtcCreateProgram", byref(program), source.encode(), name.encode(), 0, None, None)
        try:
            code_name = "sm" if kind == "cubin" else "compute"
            words = [f"--gpu-architecture={code_name}_{number}", "--std=c++14"]
            options = (c_char_p * len(words))(*(word.encode() for word in words))
            code = self._library.nvrtcCompileProgram(program, len(words), options)
            log = self._text(program, "nvrtcGetProgramLog").decode(errors="replace").rstrip("\0").strip()
            if code == _COMPILATION_FAILED:
                raise _compile_error(log)
            if code:
                raise CompileError(f"{self._error('nvrtcCompileProgram', code)}: {_first_error(log)}", log)
            return self._text(program, "nvrtcGetCUBIN" if kind == "cubin" else "nvrtcGetPTX"), log
        finally:
            self._library.nvrtcDestroyProgram(byref(program))

    @property
    def archs(self) -> Tuple[int, ...]:
        """The GPU architectures that it makes code for, ascending: (35, ..., 53, ...)."""
        if self._archs is None:
            self._archs = tuple(number for number in _ARCHS_BEFORE_11_2 if self._compiles_for(number))
        return self._archs

    def knows(self, number: int) -> bool:
        """Whether it makes code for this architecture."""
        return self._compiles_for(number) if self._archs is None else number in self._archs

    def _compiles_for(self, number: int) -> bool:
        # Tried, because a table by version would be wrong: a PC's NVRTC 10.2 lacks the architectures of Jetsons.
        try:
            self.translate("", number, "empty.cu", "ptx")
        except CompileError:
            return False
        return True

    def _declare(self, prototypes: Dict[str, Tuple[Any, ...]]) -> None:
        for name, types in prototypes.items():
            function = getattr(self._library, name)
            function.argtypes = types
            function.restype = c_int

    def _error(self, call: str, code: int) -> str:
        text = self._library.nvrtcGetErrorString(code) or b"unknown error"
        return f"{call}: {text.decode(errors='replace')} ({code})"

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise CompileError(self._error(name, code))

    def _text(self, program: c_void_p, name: str) -> bytes:
        size = c_size_t()
        self._call(name + "Size", program, byref(size))
        text = ctypes.create_string_buffer(max(size.value, 1))
        self._call(name, program, text)
        return text.raw[: size.value]


class Nvcc:
    """The compiler of a CUDA toolkit, as a command. Attributes as of Nvrtc."""

    makes_cubin = True

    def __init__(self, command: str) -> None:
        self.path = command
        release = re.search(r"release (\d+)\.(\d+)", self._run("--version")[1])
        if release is None:
            raise OSError(f"{command} --version names no release")
        self.version = (int(release.group(1)), int(release.group(2)))
        numbers = re.findall(r"\bcompute_(\d+)\b", self._run("--help")[1])
        self.archs = tuple(sorted({int(number) for number in numbers}))

    def __str__(self) -> str:
        return f"nvcc {self.version[0]}.{self.version[1]} ({self.path})"

    def knows(self, number: int) -> bool:
        """Whether it makes code for this architecture."""
        return number in self.archs

    def translate(self, source: str, number: int, name: str, kind: str) -> Tuple[bytes, str]:
        """Image and log. Raises CompileError."""
        with tempfile.TemporaryDirectory(prefix="gf_cuda_") as folder:
            with open(os.path.join(folder, name), "w", encoding="utf-8") as opened:
                opened.write(source)
            arch = f"{'sm' if kind == 'cubin' else 'compute'}_{number}"
            code, log = self._run(f"-{kind}", f"-arch={arch}", "--std=c++14", "-o", "image", name, folder=folder)
            log = log.strip()
            if code:
                raise _compile_error(log)
            with open(os.path.join(folder, "image"), "rb") as image:
                return image.read(), log

    def _run(self, *arguments: str, folder: Optional[str] = None) -> Tuple[int, str]:
        done = subprocess.run(
            (self.path, *arguments),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        return done.returncode, done.stdout.decode(errors="replace")


Compiler = Union[Nvrtc, Nvcc]

_found: Dict[Optional[str], Compiler] = {}
_found_lock = threading.Lock()


def find() -> Compiler:
    """The compiler of this process: the first that works of

    1. the library that the environment's GF_CUDA_NVRTC names (and then no other);
    2. that of the Python package nvidia-cuda-nvrtc-cu11;
    3. the system's libnvrtc.so, the newest first; /usr/local/cuda*/lib64; that of other Python packages;
    4. the command nvcc, in PATH or /usr/local/cuda/bin.

    Raises:
        NoCompilerError: none works.
    """
    wanted = os.environ.get("GF_CUDA_NVRTC") or None
    with _found_lock:
        if wanted not in _found:
            _found[wanted] = _load(wanted) if wanted else _search()
        return _found[wanted]


def version() -> Tuple[int, int]:
    """Of CUDA, as find() finds it: (11, 8). Raises NoCompilerError."""
    return find().version


def archs() -> Tuple[int, ...]:
    """The GPU architectures that find() makes code for, ascending: (35, ..., 53, ...). Raises NoCompilerError."""
    return find().archs


def compile_source(
    source: str, arch: str, name: str = "kernels.cu", kind: Optional[str] = None
) -> Tuple[bytes, str, str]:
    """Compiles CUDA C (C++14).

    Where the compiler does not know ``arch``, it makes PTX for the newest older architecture that it knows, which the
    GPU's driver compiles when it loads it; the log says so.

    Args:
        source: its text. NVRTC finds no header files.
        arch: "sm_53".
        name: of the source in messages.
        kind: "cubin" (finished code), "ptx", or None: a cubin where the compiler can.

    Returns:
        The image, its kind ("cubin" or "ptx") and the compiler's log.

    Raises:
        CompileError: the source does not compile, or not for this architecture; ``log`` has all that was said.
        NoCompilerError: there is no NVRTC and no nvcc.
    """
    match = re.fullmatch(r"sm_([1-9]\d+)", arch)
    if match is None:
        raise CompileError(f"architecture {arch!r}: expected sm_NN, as sm_53")
    if kind not in ("cubin", "ptx", None):
        raise CompileError(f"kind {kind!r}: expected 'cubin', 'ptx' or None")
    compiler = find()
    number = int(match.group(1))
    note = ""
    if not compiler.knows(number):
        older = [known for known in compiler.archs if known < number]
        if not older or kind == "cubin":
            raise CompileError(
                f"{compiler} makes no code for {arch}, only for "
                + ", ".join(f"sm_{known}" for known in compiler.archs)
                + ("; pip install nvidia-cuda-nvrtc-cu11==11.8.89 does from sm_35 to sm_90" if not older else "")
            )
        kind = "ptx"
        note = f"{compiler} does not know {arch}: PTX for compute_{older[-1]}, which the driver compiles for the GPU\n"
        number = older[-1]
    if kind is None:
        kind = "cubin" if compiler.makes_cubin else "ptx"
    elif kind == "cubin" and not compiler.makes_cubin:
        raise CompileError(f"{compiler} makes PTX only; cubins need CUDA 11.1")
    image, log = compiler.translate(source, number, name, kind)
    return image, kind, note + log


def _load(library: str) -> Nvrtc:
    try:
        return Nvrtc(library)
    except (OSError, AttributeError, CompileError) as error:
        raise NoCompilerError(f"NVRTC {library} cannot be used: {error}") from error


def _search() -> Compiler:
    for library in _candidates():
        try:
            return _load(library)
        except NoCompilerError as error:
            # One that is there and does not work would otherwise be passed over without a word.
            if os.sep in library or not isinstance(error.__cause__, OSError):
                raise
    for command in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if command and os.path.exists(command):
            try:
                return Nvcc(command)
            except OSError as error:
                raise NoCompilerError(f"nvcc cannot be used: {error}") from error
    raise NoCompilerError(
        "no compiler for CUDA: neither NVRTC nor nvcc; pip install nvidia-cuda-nvrtc-cu11==11.8.89, or on a Jetson "
        "apt install cuda-nvrtc-10-2, or name the library in GF_CUDA_NVRTC"
    )


def _candidates() -> Iterator[str]:
    yield from _packages("cuda_nvrtc", "libnvrtc.so.11*")
    yield from _LIBRARIES
    yield from sorted(glob.glob("/usr/local/cuda*/lib64/libnvrtc.so"))
    yield from _packages("cu*", "libnvrtc.so.[0-9]*")


def _packages(package: str, library: str) -> List[str]:
    found: List[str] = []
    for folder in sys.path:
        found += sorted(glob.glob(os.path.join(glob.escape(folder), "nvidia", package, "lib", library)))
    return found


def _first_error(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in lines if re.search(r"\berror\b", line)), lines[0] if lines else "it said nothing")


def _compile_error(log: str) -> CompileError:
    return CompileError(f"CUDA C does not compile: {_first_error(log)}", log)

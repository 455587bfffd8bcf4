"""Programs: one kernel of gf_tvm as what a GPU's driver needs to run it, in plain JSON values and an image.

A kernel is one or more launches, one after the other; what one leaves for the next lies in scratch memory.
"""

import hashlib
import io
import json
import os
import re
import zipfile
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

from . import archives
from .driver import Device
from .errors import ProgramError
from .handles import Function

PROGRAM_SCHEMA = 1

ALIGNMENT = 16  # bytes; kernels read four float32 at a time
_ITEM_BYTES = {"float32": 4, "float16": 2}
_KINDS = ("cubin", "ptx")
_ELF = b"\x7fELF"


class Argument(NamedTuple):
    """A tensor that the caller passes: C-contiguous, its address a multiple of 16 bytes."""

    name: str
    dtype: str
    """ "float32" or "float16"."""
    shape: Tuple[int, ...]
    output: bool

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        count = _ITEM_BYTES[self.dtype]
        for extent in self.shape:
            count *= extent
        return count


class Launch(NamedTuple):
    """One launch of a function of the image."""

    function: str
    grid: Tuple[int, int, int]
    block: Tuple[int, int, int]
    shared: int
    """Bytes of dynamic shared memory."""
    arguments: Tuple[Tuple[str, int], ...]
    """The function's parameters: ("argument", index) or ("scratch", offset in bytes)."""

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.block[0] * self.block[1] * self.block[2]


class Program:
    """What runs when a kernel is called. Made by from_dict, which checks it.

    Attributes:
        arch: "sm_53", the oldest GPU that its image may be for.
        arguments: tensors of the caller, in the order in which their addresses are passed.
        scratch_bytes: memory that the launches share, undefined before and after; aligned to 256 bytes.
        launches: in order.
    """

    def __init__(
        self, arch: str, arguments: Sequence[Argument], scratch_bytes: int, launches: Sequence[Launch]
    ) -> None:
        self.arch = arch
        self.arguments = tuple(arguments)
        self.scratch_bytes = scratch_bytes
        self.launches = tuple(launches)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Program({self.arch}, {len(self.arguments)} arguments, {len(self.launches)} launches)"

    @property
    def capability(self) -> Tuple[int, int]:
        """(5, 3) of sm_53."""
        number = int(self.arch[3:])
        return number // 10, number % 10

    @classmethod
    def from_dict(cls, value: Any) -> "Program":
        """From the values of to_dict, as JSON gives them. Raises ProgramError, which says what is wrong where."""
        _check(isinstance(value, dict), "a program", value, "a JSON object")
        if value.get("schema") != PROGRAM_SCHEMA:
            raise ProgramError(f"program of schema {value.get('schema')!r}; this gf_cuda reads {PROGRAM_SCHEMA}")
        _keys(value, "program", ("schema", "arch", "arguments", "scratch_bytes", "launches"))
        arch = value["arch"]
        _check(_is_text(arch, r"sm_[1-9][0-9]+"), "program: arch", arch, "sm_NN, as sm_53")
        scratch_bytes = _integer(value["scratch_bytes"], "program: scratch_bytes", 0)
        arguments = []
        for index, item in enumerate(_list(value["arguments"], "program: arguments")):
            where = f"program: argument {index}"
            _keys(item, where, ("name", "dtype", "shape", "output"))
            _check(_is_text(item["name"], r".+"), where + ": name", item["name"], "a name")
            dtype = item["dtype"]
            _check(isinstance(dtype, str) and dtype in _ITEM_BYTES, where + ": dtype", dtype, "float32 or float16")
            shape = tuple(_integer(n, where + ": shape", 1) for n in _list(item["shape"], where + ": shape"))
            _check(isinstance(item["output"], bool), where + ": output", item["output"], "true or false")
            arguments.append(Argument(item["name"], dtype, shape, item["output"]))
        names = [argument.name for argument in arguments]
        _check(len(set(names)) == len(names), "program: names of the arguments", names, "all different")
        launches = []
        for index, item in enumerate(_list(value["launches"], "program: launches")):
            launches.append(_launch(item, f"program: launch {index}", len(arguments), scratch_bytes))
        _check(launches, "program: launches", value["launches"], "at least one")
        return cls(arch, arguments, scratch_bytes, launches)

    def to_dict(self) -> Dict[str, Any]:
        """Plain JSON values."""
        return {
            "schema": PROGRAM_SCHEMA,
            "arch": self.arch,
            "arguments": [
                {"name": a.name, "dtype": a.dtype, "shape": list(a.shape), "output": a.output} for a in self.arguments
            ],
            "scratch_bytes": self.scratch_bytes,
            "launches": [
                {
                    "function": launch.function,
                    "grid": list(launch.grid),
                    "block": list(launch.block),
                    "shared": launch.shared,
                    "arguments": [list(argument) for argument in launch.arguments],
                }
                for launch in self.launches
            ],
        }

    def save(self, path: str, source: str, image: bytes, kind: str) -> None:
        """Writes one file with the program, its source and its image (a zip), in one step.

        Args:
            source: CUDA C, for people.
            image: of ``source``.
            kind: of the image: "cubin" or "ptx".
        """
        _check(kind in _KINDS, "kind of the image", kind, "cubin or ptx")
        entries = {"kernels.cu": source.encode(), "image." + kind: image}
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in entries.items()}
        text = json.dumps(dict(self.to_dict(), sha256=digests), indent=1)
        entries["program.json"] = text.encode()
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in sorted(entries):
                # A fixed date: the same program is the same file.
                archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), entries[name], zipfile.ZIP_DEFLATED)
        staged = f"{os.fspath(path)}.{os.getpid()}"
        try:
            if os.path.lexists(staged):
                os.remove(staged)
            with open(staged, "xb") as opened:  # never through a link
                opened.write(packed.getvalue())
            os.replace(staged, path)
        finally:
            if os.path.exists(staged):
                os.remove(staged)


def load_file(path: str) -> Tuple[Program, str, bytes, str]:
    """Reads a file of Program.save: program, source, image and kind.

    Raises:
        ProgramError: it cannot be read, is damaged, or of another schema.
    """
    try:
        with zipfile.ZipFile(os.fspath(path)) as archive:
            archives.check_sizes(archive, os.path.getsize(path))
            entries = {name: archives.read_entry(archive, name) for name in archive.namelist()}
    # An encrypted entry is a RuntimeError, an unknown compression a NotImplementedError, a broken one zlib's error.
    except Exception as error:
        raise ProgramError(f"{path} is no file of a compiled program: {error}") from error
    try:
        value = json.loads(str(entries.pop("program.json"), "utf-8"))
        source = str(entries["kernels.cu"], "utf-8") if "kernels.cu" in entries else ""
    except (KeyError, ValueError) as error:
        raise ProgramError(f"{path} is no file of a compiled program: wrong program.json or source: {error}") from error
    digests = value.pop("sha256", None) if isinstance(value, dict) else None
    program = Program.from_dict(value)
    kinds = [kind for kind in _KINDS if "image." + kind in entries]
    if len(kinds) != 1 or set(entries) != {"kernels.cu", "image." + kinds[0]}:
        raise ProgramError(f"{path}: expected program.json, kernels.cu and one image, found {sorted(entries)}")
    if digests != {name: hashlib.sha256(data).hexdigest() for name, data in entries.items()}:
        raise ProgramError(f"{path} is damaged: its contents do not match their checksums")
    return program, source, entries["image." + kinds[0]], kinds[0]


class Executable:
    """A program on a device, ready to be called from any thread.

    Args:
        image: cubin or PTX, as compile_source gives it.

    Raises:
        ProgramError: the image is for other GPUs or lacks a function, or a launch exceeds a limit of the device.
        CompileError: the driver cannot compile the PTX.
        DriverError: else.
    """

    def __init__(self, device: Device, program: Program, image: bytes) -> None:
        self.device = device
        self.program = program
        needed, present = program.capability, device.capability
        # Finished code runs on GPUs of the same generation that are not older; PTX on all that are not older.
        if present < needed or (image.startswith(_ELF) and present[0] != needed[0]):
            raise ProgramError(f"a program for {program.arch} does not run on {device.name} ({device.arch})")
        self._count = len(program.arguments)
        self._set_context = device.driver.call
        self._module = device.load_module(image)
        try:
            functions = {}
            for launch in program.launches:
                if launch.function not in functions:
                    functions[launch.function] = self._module.function(launch.function)
                _check_limits(device, launch, functions[launch.function])
        except Exception:
            self._module.unload()
            raise
        self.functions = functions
        self._steps = [
            (
                functions[launch.function].launch,
                launch.grid,
                launch.block,
                launch.shared,
                [(where == "scratch", number) for where, number in launch.arguments],
            )
            for launch in program.launches
        ]

    def __call__(self, pointers: Sequence[int], scratch: int, stream: int) -> None:
        """Launches all, in order, and returns before they have run.

        Args:
            pointers: one address on the device for each of the program's arguments; their memory, as the scratch
                memory, must stay until the work is done, and nothing else may use it meanwhile.
            scratch: address of ``program.scratch_bytes`` bytes; 0 if the program needs none.
            stream: handle; 0 is the default stream.

        Raises:
            ProgramError: pointers or scratch do not fit, or the executable was unloaded.
            DriverError: the driver refused a launch, or reports that an earlier kernel failed.
        """
        self._check_pointers(pointers, scratch)
        before = self.device.activate()
        try:
            for launch, grid, block, shared, arguments in self._steps:
                launch(
                    grid,
                    block,
                    shared,
                    stream,
                    [scratch + number if is_scratch else pointers[number] for is_scratch, number in arguments],
                )
        finally:
            if before:
                # PyTorch believes that the device which it chose for this thread is current.
                self._set_context("cuCtxSetCurrent", before)

    def _check_pointers(self, pointers: Sequence[int], scratch: int) -> None:
        if not self._steps:
            raise ProgramError("this executable was unloaded")
        if len(pointers) != self._count:
            raise ProgramError(f"{len(pointers)} pointers; the program has {self._count} arguments")
        # A kernel that reads a wrong address takes the whole process's CUDA context with it.
        for argument, pointer in zip(self.program.arguments, pointers):
            if pointer <= 0 or pointer % ALIGNMENT:
                raise ProgramError(f"{argument.name}: address {pointer:#x} is no multiple of {ALIGNMENT} bytes above 0")
        if self.program.scratch_bytes and (scratch <= 0 or scratch % ALIGNMENT):
            raise ProgramError(f"scratch: address {scratch:#x} is no multiple of {ALIGNMENT} bytes above 0")

    def unload(self) -> None:
        """Frees the code. Wait for what was launched first."""
        self._steps = []
        self._module.unload()


def _check_limits(device: Device, launch: Launch, function: Function) -> None:
    limits = (
        (launch.threads, device.max_threads_per_block, "threads of a block", device.name),
        (launch.threads, function.max_threads, "threads of a block", f"its {function.registers} registers a thread"),
        (launch.shared + function.shared_bytes, device.shared_bytes_per_block, "bytes of shared memory", device.name),
    )
    for value, limit, what, reason in limits:
        if value > limit:
            raise ProgramError(f"{launch.function} uses {value} {what}; {reason}: at most {limit}")
    for axis in range(3):
        for what, value, limit in (
            ("block", launch.block[axis], device.max_block[axis]),
            ("grid", launch.grid[axis], device.max_grid[axis]),
        ):
            if value > limit:
                raise ProgramError(
                    f"{launch.function}: {value} along {'xyz'[axis]} of the {what}; {device.name}: at most {limit}"
                )


def _launch(item: Any, where: str, arguments: int, scratch_bytes: int) -> Launch:
    _keys(item, where, ("function", "grid", "block", "shared", "arguments"))
    name = item["function"]
    _check(_is_text(name, r"[A-Za-z_][A-Za-z0-9_]*"), where + ": function", name, "a name")
    references = []
    for number, reference in enumerate(_list(item["arguments"], where + ": arguments")):
        at = f"{where}: argument {number}"
        _check(isinstance(reference, (list, tuple)) and len(reference) == 2, at, reference, "[kind, number]")
        kind, index = reference
        _check(kind in ("argument", "scratch"), at, kind, '"argument" or "scratch"')
        _integer(index, at, 0)
        if kind == "argument":
            _check(index < arguments, at, index, f"less than {arguments}, the number of the program's arguments")
        else:
            _check(index < scratch_bytes, at, index, f"an offset into {scratch_bytes} bytes of scratch memory")
            _check(index % ALIGNMENT == 0, at, index, f"a multiple of {ALIGNMENT} bytes")
        references.append((kind, index))
    grid, block = _extents(item["grid"], where + ": grid"), _extents(item["block"], where + ": block")
    shared = _integer(item["shared"], where + ": shared", 0)
    return Launch(name, grid, block, shared, tuple(references))


def _extents(value: Any, where: str) -> Tuple[int, int, int]:
    _check(isinstance(value, (list, tuple)) and len(value) == 3, where, value, "[x, y, z]")
    x, y, z = (_integer(extent, where, 1) for extent in value)
    return x, y, z


def _keys(value: Any, where: str, names: Sequence[str]) -> None:
    _check(isinstance(value, dict), where, value, "a JSON object")
    _check(set(value) == set(names), where + ": keys", sorted(map(str, value)), ", ".join(names))


def _list(value: Any, where: str) -> List[Any]:
    _check(isinstance(value, (list, tuple)), where, value, "a list")
    return list(value)


def _is_text(value: Any, pattern: str) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _integer(value: Any, where: str, least: int) -> int:
    # No 64-bit address or size is larger; True is an int to Python.
    _check(type(value) is int and least <= value < 2**63, where, value, f"an integer from {least}")
    return int(value)


def _check(holds: Any, where: str, value: Any, expected: str) -> None:
    if not holds:
        raise ProgramError(f"{where}: {_short(value)}; expected {expected}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

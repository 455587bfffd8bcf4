"""What a compiled GPU module needs of the hardware, read from the binary itself.

A cubin is an ELF file: the code of function ``f`` is section ``.text.f``, whose header keeps the registers of a thread
in the top byte of ``sh_info``; ``.nv.shared.f`` is as large as its static shared memory; ``.nv.info`` lists stack
frames. That holds for the 64-bit format of CUDA 8 to 13. NVIDIA documents the tool that prints it (cuobjdump), not the
format; tests/codegen/test_cuda.py compares with what ptxas says.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import BuildError

_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_FRAME_SIZE = 0x11  # EIATTR_FRAME_SIZE: (symbol, bytes) pairs in .nv.info
_HAS_PAYLOAD = 4  # EIFMT_SVAL: the 16 bits after the attribute are the length of what follows


@dataclass(frozen=True)
class Resources:
    """What one kernel takes.

    Attributes:
        registers: 32-bit registers of a thread.
        shared_bytes: static shared memory of a block.
        local_bytes: of a thread: arrays that the compiler could not keep in registers, and spilled registers.
    """

    registers: int
    shared_bytes: int
    local_bytes: int


def read_resources(cubin: bytes) -> dict[str, Resources]:
    """Resources of each kernel of a cubin, by its name. Raises BuildError for anything that is not one."""
    try:
        return _read(cubin)
    except (struct.error, IndexError, ValueError, OverflowError) as error:
        raise BuildError(f"not a cubin that can be read: {error}") from None


def _read(cubin: bytes) -> dict[str, Resources]:
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError("it is no 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", cubin, 40)
    entry, count, names_at = struct.unpack_from("<HHH", cubin, 58)
    headers = [_SECTION.unpack_from(cubin, table + index * entry) for index in range(count)]

    def text(start: int) -> str:
        return cubin[start : cubin.index(b"\0", start)].decode()

    names = [text(headers[names_at][4] + header[0]) for header in headers]
    sections = dict(zip(names, headers, strict=True))
    functions = [name.removeprefix(".text.") for name in names if name.startswith(".text.")]
    frames = _frames(cubin, sections, text)
    found = {}
    for name in functions:
        shared = sections.get(f".nv.shared.{name}")
        found[name] = Resources(
            registers=sections[f".text.{name}"][7] >> 24,
            shared_bytes=shared[5] if shared else 0,
            local_bytes=frames.get(name, 0),
        )
    return found


def _frames(cubin: bytes, sections: dict[str, tuple[int, ...]], text: Callable[[int], str]) -> dict[str, int]:
    """Bytes of stack frame of each function."""
    info, symbols, strings = (sections.get(name) for name in (".nv.info", ".symtab", ".strtab"))
    if info is None or symbols is None or strings is None:
        return {}
    found: dict[str, int] = {}
    at, end = info[4], info[4] + info[5]
    while at + 4 <= end:
        kind, attribute, size = struct.unpack_from("<BBH", cubin, at)
        at += 4
        if kind != _HAS_PAYLOAD:
            continue
        if attribute == _FRAME_SIZE:
            symbol, frame = struct.unpack_from("<II", cubin, at)
            name = _SYMBOL.unpack_from(cubin, symbols[4] + symbol * _SYMBOL.size)[0]
            found[text(strings[4] + name)] = frame
        at += size
    return found

"""As much of the ELF format as tells for which machine a library is and what it needs there."""

from __future__ import annotations

import struct
from dataclasses import dataclass

AARCH64, X86_64 = 183, 62


@dataclass(frozen=True)
class Elf:
    """Machine number, needed libraries, and needed versions of symbols by library."""

    machine: int
    needed: tuple[str, ...]
    versions: dict[str, tuple[str, ...]]


def read_elf(data: bytes) -> Elf:
    """Read a 64-bit little-endian shared library."""
    assert data[:6] == b"\x7fELF\x02\x01", "not a 64-bit little-endian ELF file"
    (machine,) = struct.unpack_from("<H", data, 18)
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<HH", data, 58)
    # Of each section: type, offset, size, link (the section of its strings), info (here: the number of entries).
    sections = [struct.unpack_from("<4xI16xQQII", data, table + size * index) for index in range(count)]
    needed: list[str] = []
    versions: dict[str, tuple[str, ...]] = {}

    def text(link: int, place: int) -> str:
        start = sections[link][1] + place
        return data[start : data.index(b"\0", start)].decode()

    for kind, offset, length, link, info in sections:
        if kind == 6:  # dynamic
            entries = struct.iter_unpack("<qQ", data[offset : offset + length])
            needed += [text(link, value) for tag, value in entries if tag == 1]
        if kind == 0x6FFFFFFE:  # needed versions
            for _ in range(info):
                _, names, file, first, following = struct.unpack_from("<HHIII", data, offset)
                place, found = offset + first, []
                for _ in range(names):
                    _, _, _, name, step = struct.unpack_from("<IHHII", data, place)
                    found.append(text(link, name))
                    place += step
                versions[text(link, file)] = tuple(found)
                offset += following
    return Elf(machine, tuple(needed), versions)

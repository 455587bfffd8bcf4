"""Reading zip archives that anyone may have written: what they unpack to is bounded before it takes memory."""

import zipfile
from typing import Optional

#: Bytes that any archive may unpack to, and what a larger one may be of its own size: compiled kernels and their
#: sources are 3 to 10 times as large as packed, while deflate can pack zeros a thousand times.
FREE_BYTES = 64 << 20
MAX_RATIO = 20
#: Of a bundle's manifest; one kernel takes 1 to 5 kB.
MANIFEST_BYTES = 16 << 20

_CHUNK = 1 << 20


def check_sizes(archive: zipfile.ZipFile, packed: int, free: int = FREE_BYTES, ratio: int = MAX_RATIO) -> None:
    """Check how much an archive says that it unpacks to, and that :func:`read_entry` can hold it to that.

    Args:
        packed: size of the archive in bytes.
        free, ratio: all entries together may have ``free`` bytes, or ``ratio`` times ``packed`` if that is more.

    Raises:
        ValueError: they have more, or are packed by another method than deflate.
    """
    total = 0
    for entry in archive.infolist():
        # Python's zipfile unpacks the other methods in one go, whatever comes out.
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"entry {entry.filename!r} is packed by another method than deflate")
        total += entry.file_size
    allowed = max(free, ratio * packed)
    if total > allowed:
        raise ValueError(
            f"its {packed / 1e6:.3g} MB would unpack to {total / 1e6:.3g} MB, "
            f"more than the {allowed / 1e6:.3g} MB allowed"
        )


def read_entry(archive: zipfile.ZipFile, name: str, most: Optional[int] = None) -> bytes:
    """An entry of an archive that :func:`check_sizes` has passed, of at most ``most`` bytes (None: of any size).

    Raises:
        KeyError: there is no such entry.
        ValueError: it is larger. And what zipfile raises for a damaged one.
    """
    entry = archive.getinfo(name)
    if most is not None and entry.file_size > most:
        raise ValueError(f"its {name} has {entry.file_size / 1e6:.3g} MB, more than the {most / 1e6:.3g} MB allowed")
    parts = []
    with archive.open(entry) as file:
        # In parts: one read of all would unpack what is packed, whatever size the entry gives.
        part = file.read(_CHUNK)
        while part:
            parts.append(part)
            part = file.read(_CHUNK)
    return b"".join(parts)

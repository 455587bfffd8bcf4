"""Files: written so that a crash at any moment leaves what was there before, or all of what is new; read with a limit,
before their contents take memory; places, sizes."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

#: Units of a size: powers of 1000, or with an i of 1024.
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}

#: Bytes of a JSON file that people write or a command has written. Parsed it takes up to 25 times as much memory.
MAX_JSON = 32 << 20


def create(path: Path) -> BinaryIO:
    """A new file under a name that this package chose, open for writing and reading. Raises OSError.

    What lies there, left by a process that was killed or put there by someone else, is removed; where it is a link,
    that to which it leads stays as it is.
    """
    path.unlink(missing_ok=True)
    return open(path, "x+b")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, open for writing and reading, that takes the place of ``path`` when the context ends without error.

    It is staged beside ``path`` as ``.NAME.PID.tmp`` and flushed to the disk first. Raises OSError.
    """
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with create(staged) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def read_limited(path: str | os.PathLike[str], most: int) -> bytes:
    """The bytes of a file or pipe that should have no more than ``most``, which are then all that is read of it.

    Raises:
        OSError: it cannot be read; EFBIG if it has more.
    """
    with open(path, "rb") as file:
        # Memory is taken for what is asked for, so not for more than is there, nor for what is refused.
        status = os.fstat(file.fileno())
        size = status.st_size if stat.S_ISREG(status.st_mode) else most
        data = file.read(size + 1) if size <= most else b""
    if max(size, len(data)) > most:
        raise OSError(errno.EFBIG, f"it has more than {most / 1e6:.3g} MB")
    return data


def make_folder(folder: Path) -> None:
    """Create ``folder`` if it is missing, and make sure that files can be written into it. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe.{os.getpid()}.tmp"
    create(probe).close()
    probe.unlink()


def sha256_of(file: BinaryIO) -> str:
    """The sha256 of an open file from its beginning, in hexadecimal digits. Raises OSError."""
    file.seek(0)
    h = hashlib.sha256()
    while chunk := file.read(1 << 20):
        h.update(chunk)
    return h.hexdigest()


def check_archive(file: BinaryIO) -> None:
    """Raise ValueError or BadZipFile unless a file is an archive as torch.save writes it: nothing in it is packed."""
    file.seek(0)
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("its entries are compressed, which torch.save does not do")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError(f"its entries have more than its own {size} bytes")
    file.seek(0)


def same_file(handle: int, path: Path) -> bool:
    """Whether the open file ``handle`` is (still) the one that ``path`` names. Raises OSError."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def user_cache() -> Path:
    """The folder for what can be made again: ``$XDG_CACHE_HOME/gf_tvm``, by default ``~/.cache/gf_tvm``.

    Raises:
        RuntimeError: the user has no home folder.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "gf_tvm"


def size_in_bytes(text: str) -> int | None:
    """``"64MB"`` -> 64000000, ``"1.5 GiB"`` -> 1610612736; a number alone is bytes. None if it is no size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower(), re.ASCII)
    if match is not None and (match[2] or "b") in _UNITS:
        size = float(match[1]) * _UNITS[match[2] or "b"]
        if math.isfinite(size) and size >= 1:
            return int(size)
    return None

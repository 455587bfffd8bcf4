"""Writing files so that a crash at any moment leaves what was there before, or all of what is new."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, open for writing and reading, that takes the place of ``path`` when the context ends without error.

    It is staged beside ``path`` as ``.NAME.PID.tmp`` and flushed to the disk first. Raises OSError.
    """
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(staged, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Create ``folder`` if it is missing, and make sure that files can be written into it. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe.{os.getpid()}.tmp"
    probe.write_bytes(b"")
    probe.unlink()

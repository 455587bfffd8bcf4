"""The folder of a kernel cache: a bundle for each entry, and a lock that the one process that builds holds.

Locks are ``flock``'s, which fall with the process that holds them however it ends, so none is ever stale and no lock
file is ever deleted. A process that has loaded an entry holds a shared lock on the entry's file for the rest of its
life; whoever deletes an entry needs an exclusive one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bundle.format import unpack
from ..errors import BundleError
from ..files import same_file
from .identity import Wanted

SUFFIX = ".gfb"
_LOCK = ".building"
#: Seconds between two tries to get the right to build.
_TICK = 0.1

#: The files, by path, that this process holds shared locks on.
_held: dict[Path, int] = {}


@dataclass(frozen=True)
class Entry:
    """What the cache has.

    Attributes:
        size: bytes.
        used: when it was last loaded, or built, in seconds since 1970.
        in_use: by a process that has loaded it.
        damaged: why it will not be loaded but built again; "" if it is sound. What follows is empty otherwise.
        device: the profile that it was built for.
        workloads: the kernels' keys.
        tuned: how many of them have tuned schedules.
        programs: keys.
        versions: of gf_tvm and TVM, by name.
    """

    path: Path
    size: int
    used: float
    in_use: bool
    damaged: str = ""
    device: str = ""
    workloads: tuple[str, ...] = ()
    tuned: int = 0
    programs: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)


class Store:
    """Entries by their keys, see :func:`.identity.key_of`. Making one neither reads nor writes.

    Args:
        limit: bytes that :meth:`trim` leaves.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def path(self, key: str) -> Path:
        """Where an entry lies, or would."""
        return self.folder / f"{key}{SUFFIX}"

    def hold(self, key: str) -> bool:
        """Keep others from deleting an entry as long as this process runs, and note that it is used now.

        Returns:
            Whether there is one.
        """
        path = self.path(key)
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            ours = _shared(handle) and same_file(handle, path)
        except OSError:  # a file system without locks: nothing is deleted there either
            ours = True
        if not ours:
            os.close(handle)
            return False
        with contextlib.suppress(OSError):  # of a folder that may only be read
            os.utime(handle)
        self.release(key)
        _held[path] = handle
        return True

    def release(self, key: str) -> None:
        """Undo :meth:`hold`; harmless without."""
        handle = _held.pop(self.path(key), None)
        if handle is not None:
            os.close(handle)

    def check(self, key: str, wanted: Wanted) -> None:
        """Raise BundleError if an entry is damaged or is not what is wanted, FileNotFoundError if there is none.

        Raises:
            OSError: it cannot be read.
        """
        path = self.path(key)
        manifest = _manifest(path)
        found = sorted(_keys(manifest, "kernels")), sorted(_keys(manifest, "programs"))
        if found != wanted.keys:
            raise BundleError(f"{path.name}: has other kernels than its name says")

    def remove(self, path: Path) -> bool:
        """Delete an entry. Returns False if it is in use or cannot be deleted."""
        try:
            with _opened(path) as handle:
                if not _try_lock(handle, fcntl.LOCK_EX):
                    return False
                path.unlink()
                return True
        except FileNotFoundError:
            return True
        except OSError:
            return False

    def entries(self) -> list[Entry]:
        """All entries, the last used first; those that cannot be read are left out. Raises OSError for the folder."""
        found = []
        for path in self._paths():
            with contextlib.suppress(OSError):
                found.append(_entry(path))
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def size(self) -> int:
        """Bytes that the entries take. Raises OSError."""
        return sum(status.st_size for status in self._sizes().values())

    def trim(self, keep: str) -> None:
        """Delete entries, the one that was not used for the longest time first, until the limit is met.

        The entry with the key ``keep`` and those in use stay, whatever their size.
        """
        sizes = self._sizes()
        total = sum(status.st_size for status in sizes.values())
        for path, status in sorted(sizes.items(), key=lambda item: item[1].st_mtime_ns):
            if total <= self.limit:
                break
            if path != self.path(keep) and self.remove(path):
                total -= status.st_size

    @contextlib.contextmanager
    def building(self, go_on: Callable[[], bool] = lambda: True) -> Iterator[bool]:
        """Wait for the right to build, which one process has at a time. The folder must exist.

        What builders have left that were killed is deleted.

        Args:
            go_on: asked while it is waited for; False ends the waiting.

        Yields:
            Whether this process has the right.

        Raises:
            OSError: the folder cannot be written, or its file system has no locks.
        """
        with _opened(self.folder / _LOCK, os.O_RDWR | os.O_CREAT) as handle:
            while not (ours := _try_lock(handle, fcntl.LOCK_EX)) and go_on():
                time.sleep(_TICK)
            if ours:
                for stale in self.folder.glob(f".*{SUFFIX}-*"):  # as gf_tvm.build names them
                    shutil.rmtree(stale, ignore_errors=True)
            yield ours

    def _sizes(self) -> dict[Path, os.stat_result]:
        found = {}
        for path in self._paths():
            with contextlib.suppress(OSError):
                found[path] = path.stat()
        return found

    def _paths(self) -> list[Path]:
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        return [self.folder / name for name in names if name.endswith(SUFFIX) and not name.startswith(".")]


@contextlib.contextmanager
def _opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    handle = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield handle
    finally:
        os.close(handle)


def _try_lock(handle: int, kind: int) -> bool:
    """Take a lock if nobody else's is in the way. Raises OSError where there are none."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _shared(handle: int) -> bool:
    """Take a shared lock; the exclusive ones of others end in a moment, so that 50 ms are enough. Raises OSError."""
    for _ in range(50):
        if _try_lock(handle, fcntl.LOCK_SH):
            return True
        time.sleep(0.001)
    return False


def _entry(path: Path) -> Entry:
    with _opened(path) as handle:
        try:
            in_use = not _try_lock(handle, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            in_use = False
        status = os.fstat(handle)
    try:
        manifest = _manifest(path)
        return Entry(
            path,
            status.st_size,
            status.st_mtime,
            in_use,
            device=str(manifest.get("device")),
            workloads=tuple(_keys(manifest, "kernels")),
            tuned=sum(kernel.get("schedule") == "tuned" for kernel in manifest["kernels"]),
            programs=tuple(_keys(manifest, "programs")),
            versions={str(name): str(version) for name, version in manifest["versions"].items()},
        )
    except (BundleError, KeyError, AttributeError) as error:
        reason = str(error) if isinstance(error, BundleError) else f"{path.name}: not the manifest of a bundle"
        return Entry(path, status.st_size, status.st_mtime, in_use, damaged=reason)


def _manifest(path: Path) -> dict[str, Any]:
    """A bundle's manifest; its code is checked. Raises BundleError and OSError."""
    manifest, code = unpack(path, path.read_bytes())
    if code is None:
        raise BundleError(f"{path.name}: is a bundle for GPUs")
    return manifest


def _keys(manifest: dict[str, Any], name: str) -> list[str]:
    try:
        return [str(part["key"]) for part in manifest[name]]
    except (KeyError, TypeError) as error:
        raise BundleError(f"the manifest has no list of {name} ({error})") from None

"""The kernel cache as users of it see it: a folder on disk, and a thread that has built what it lacks."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle.runtime import has_compiler
from ..codegen.linker import find_linker
from ..errors import BuildError, BundleError, CacheError, DeviceError, GfTvmError
from ..files import make_folder, size_in_bytes, user_cache
from ..machine.profiles import get_profile
from . import builder
from .identity import Wanted, key_of
from .store import Entry, Store

if TYPE_CHECKING:
    from ..bundle.library import Library

logger = logging.getLogger("gf_tvm")

#: Of the environment.
FOLDER, SIZE, LOGS = "GF_TVM_CACHE_DIR", "GF_TVM_CACHE_SIZE", "GF_TVM_LOGS"
DEFAULT_SIZE = 2 << 30

#: Without a key: no profile fits this machine, gf_tvm or TVM is not installed, or their files cannot be read.
_NO_KEY = (GfTvmError, PackageNotFoundError, OSError)

_said: set[str] = set()
_caches: weakref.WeakSet[KernelCache] = weakref.WeakSet()


def obstacle() -> str | None:
    """Why kernels cannot be built on this machine, and how to get them otherwise; None if they can."""
    try:
        profile = get_profile("host")
    except DeviceError as error:
        return str(error)
    reason = None
    try:
        if not has_compiler():
            reason = "TVM's compiler is not installed (pip install apache-tvm)"
        elif not sys.executable:
            reason = "this program is not run by a Python that can be started again"
        else:
            find_linker(profile)
    except (BuildError, BundleError) as error:
        reason = str(error)
    if reason is None:
        return None
    return (
        f"{reason}; or build on a machine that can (gf-tvm build --device {profile.name} --model M --input NxCxHxW "
        "--last K --patch R --out FILE.gfb) and give library=gf_tvm.load('FILE.gfb')"
    )


def default_folder() -> Path:
    """``$GF_TVM_CACHE_DIR``, by default ``kernels`` in :func:`gf_tvm.files.user_cache`. Raises CacheError."""
    if given := os.environ.get(FOLDER):
        return Path(given)
    try:
        return user_cache() / "kernels"
    except RuntimeError:
        raise CacheError(f"there is no home folder to keep a cache of kernels in; set {FOLDER}") from None


def default_limit() -> int:
    """``$GF_TVM_CACHE_SIZE`` in bytes, by default 2 GiB. Raises CacheError."""
    if not (given := os.environ.get(SIZE)):
        return DEFAULT_SIZE
    size = size_in_bytes(given)
    if size is None:
        raise CacheError(f"{SIZE} is written as 500MB, 2GiB or a number of bytes, got {given!r}")
    return size


def default_logs() -> tuple[Path, ...]:
    """The folders of ``$GF_TVM_LOGS``, separated as in ``$PATH``. Raises CacheError."""
    folders = tuple(Path(name) for name in os.environ.get(LOGS, "").split(os.pathsep) if name)
    for folder in folders:
        if not folder.is_dir():
            raise CacheError(f"there is no folder of tuning logs {str(folder)!r} ({LOGS})")
    return folders


@dataclass(frozen=True)
class Cleared:
    """What :meth:`KernelCache.clear` did.

    Attributes:
        removed: deleted entries.
        kept: entries that were to be deleted but are in use, or cannot be deleted.
    """

    removed: tuple[Entry, ...]
    kept: tuple[Entry, ...]


class KernelCache:
    """Compiled kernels for this machine's CPU, found by everything that decides how they are compiled.

    Any number of processes may use one folder. Making an object of this class touches no file.

    Args:
        folder: of the entries; made, for this user alone, when the first is built. Whoever can write there has code
            run by the processes that load it. None: :func:`default_folder`.
        limit: bytes that the entries may take; the least recently used are deleted after a build, but none that a
            process has loaded. None: :func:`default_limit`.
        logs: folders of tuning logs, searched before those that are shipped with gf_tvm. None: :func:`default_logs`.

    Raises:
        CacheError: a variable of the environment says nothing sensible, or there is no home folder.
    """

    def __init__(
        self, folder: Path | None = None, limit: int | None = None, logs: Sequence[Path] | None = None
    ) -> None:
        chosen = default_folder() if folder is None else folder
        self._store = Store(chosen.absolute(), default_limit() if limit is None else limit)
        self._logs = tuple(path.absolute() for path in (default_logs() if logs is None else logs))
        self._reset()
        _caches.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._libraries: dict[str, Library] = {}
        self._failed: set[str] = set()
        self._jobs: dict[str, tuple[Wanted, list[Callable[[Library], None]]]] = {}
        self._working = False

    @property
    def folder(self) -> Path:
        """Where the entries lie."""
        return self._store.folder

    @property
    def limit(self) -> int:
        """Bytes that they may take."""
        return self._store.limit

    def find(self, wanted: Wanted) -> Library | None:
        """The library of exactly what is wanted, if it is in the cache. Takes milliseconds, and no compiler.

        An entry that is damaged is deleted.
        """
        try:
            return self._find(self._key(wanted), wanted)
        except _NO_KEY:
            return None

    def request(self, wanted: Wanted, ready: Callable[[Library], None]) -> None:
        """Have what is wanted built in the background. Returns at once.

        What cannot be built is logged as a warning, each reason once in a process, and not tried again in this process.

        Args:
            ready: called once with the library: before this returns if it is in the cache, else in another thread. It
                is not called if nothing can be built.
        """
        try:
            key = self._key(wanted)
        except _NO_KEY as error:
            say_once(obstacle() or str(error))
            return
        library = self._find(key, wanted)
        if library is not None:
            ready(library)
            return
        with self._lock:
            if key in self._failed:
                return
            self._jobs.setdefault(key, (wanted, []))[1].append(ready)
            if not self._working:
                self._working = True
                # Python does not wait for it at its exit; see .builder for what becomes of a build then.
                threading.Thread(target=self._work, name="gf_tvm-kernels", daemon=True).start()

    def entries(self) -> list[Entry]:
        """What the cache has, the last used first; nothing where there is no folder yet. Raises OSError."""
        return self._store.entries()

    def size(self) -> int:
        """Bytes that the entries take. Raises OSError."""
        return self._store.size()

    def clear(self, older_than: float = 0.0) -> Cleared:
        """Delete entries that no process has loaded.

        Args:
            older_than: seconds; only those that have not been used for so long.

        Raises:
            OSError: the folder cannot be read.
        """
        with contextlib.suppress(OSError), self._store.building(go_on=lambda: False):
            pass  # deletes what builders have left that were killed
        removed: list[Entry] = []
        kept: list[Entry] = []
        now = time.time()
        for entry in self.entries():
            if older_than <= 0 or now - entry.used >= older_than:
                (removed if self._store.remove(entry.path) else kept).append(entry)
        return Cleared(tuple(removed), tuple(kept))

    def _key(self, wanted: Wanted) -> str:
        return key_of(wanted, get_profile("host"), self._logs)

    def _find(self, key: str, wanted: Wanted) -> Library | None:
        from ..bundle.library import load  # here, because it needs PyTorch, and whoever shows the cache does not

        with self._lock:
            if key in self._libraries or key in self._failed:
                return self._libraries.get(key)
        if not self._store.hold(key):
            return None
        try:
            self._store.check(key, wanted)
        except (BundleError, OSError) as error:
            self._store.release(key)
            if isinstance(error, BundleError):
                logger.warning("cache of kernels: %s; it is deleted", error)
                self._store.remove(self._store.path(key))
            return None
        try:
            library = load(self._store.path(key))
        except BundleError as error:  # sound, but this machine does not take it: building again would not help
            self._store.release(key)
            self._fail(key, str(error))
            return None
        with self._lock:
            return self._libraries.setdefault(key, library)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            key, wanted = job
            library = None
            try:
                library = self._made(key, wanted)
            except GfTvmError as error:
                self._fail(key, str(error))
            except Exception as error:
                self._fail(key, f"{type(error).__name__}: {error}")
            with self._lock:
                _, waiting = self._jobs.pop(key)
            if library is None:
                continue
            for ready in waiting:
                try:
                    ready(library)
                except BaseException:  # sys.exit() as well, which would end this thread alone
                    logger.exception("what was to use new kernels failed")

    def _next(self) -> tuple[str, Wanted] | None:
        """The job that has waited longest; it stays in the list until it is done. None ends the thread."""
        with self._lock:
            for key, (wanted, _) in self._jobs.items():
                return key, wanted
            self._working = False
            return None

    def _made(self, key: str, wanted: Wanted) -> Library | None:
        """The library, built if it is not there; None if it does not load, which has been said then."""
        if (library := self._find(key, wanted)) is not None:
            return library
        if (reason := obstacle()) is not None:
            raise BuildError(reason)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            make_folder(self.folder)
        except OSError as error:
            reason = f"cannot write to the cache of kernels {str(self.folder)!r}: {error.strerror or error}"
            raise CacheError(f"{reason}; {FOLDER} names another folder") from None
        builder.run(wanted, key, self._store, self._logs)
        library = self._find(key, wanted)
        if library is None and key not in self._failed:
            raise CacheError(f"{self._store.path(key).name} was built but cannot be read from {str(self.folder)!r}")
        return library

    def _fail(self, key: str, reason: str) -> None:
        with self._lock:
            self._failed.add(key)
        say_once(reason)


def say_once(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        logger.warning("no kernels are built, plain PyTorch operators run instead: %s", " ".join(reason.split()))


def _after_fork() -> None:
    """A copy of this process has none of its threads, and locks that they held stay closed there."""
    for cache in _caches:
        cache._reset()


os.register_at_fork(after_in_child=_after_fork)

"""What the tests of the kernel cache share: small things to want, waiting for them, and watching the folder."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from gf_tvm.bundle.library import Library
from gf_tvm.core.geometry import Geometry
from gf_tvm.core.workload import Workload
from gf_tvm.on_demand import KernelCache, Wanted


def small(number: int = 0) -> Wanted:
    """One kernel that takes half a second to build; another one for each number, from 0 to 30."""
    return Wanted((Workload("filter_input", Geometry(1, 1 + number % 6, 2, 6 + number // 6, 6, 3, 2)),))


class Ready:
    """What :meth:`KernelCache.request` is to call."""

    def __init__(self) -> None:
        self.calls: list[tuple[Library, str]] = []
        self._event = threading.Event()

    def __call__(self, library: Library) -> None:
        self.calls.append((library, threading.current_thread().name))
        self._event.set()

    def wait(self, seconds: float = 120) -> Library:
        """The library; it must not be given twice."""
        assert self._event.wait(seconds), "no library came"
        ((library, _),) = self.calls
        return library


def built(cache: KernelCache, wanted: Wanted) -> Library:
    """The library, from the cache or built."""
    ready = Ready()
    cache.request(wanted, ready)
    return ready.wait()


def idle(cache: KernelCache) -> bool:
    """Whether nothing is being built for this object."""
    return not cache._working


def staged(folder: Path) -> list[str]:
    """Names of the folders in which bundles are being made."""
    return sorted(path.name for path in folder.glob(".*.gfb-*"))


class Watcher:
    """Notes, until its context ends, every bundle that is being made in a folder, and how many there were at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: set[str] = set()
        self.most = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._end.wait(0.002):
            now = staged(self.folder)
            self.seen.update(now)
            self.most = max(self.most, len(now))

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._end.set()
        self._thread.join()

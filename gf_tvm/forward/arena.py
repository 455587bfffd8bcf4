"""Memory for the maps between the steps of compiled forward passes, used again in every step."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

#: Arenas kept while nobody uses them: of the models that train in one process at a time.
_KEPT = 4
#: Bytes from which on huge pages are asked for: below, a few pages more or less do not matter.
_HUGE = 4 * 2**20
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)


class Arenas:
    """Pieces of memory that are lent and come back. One is taken again where it is at most twice as large as wanted."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._lock = threading.Lock()

    @contextmanager
    def borrowed(self, elements: int) -> Iterator[Tensor]:
        """A tensor of float32 that holds anything, of exactly so many elements."""
        whole = self._take(elements)
        try:
            yield whole[:elements]
        finally:
            with self._lock:
                self._free.append(whole)
                del self._free[:-_KEPT]

    def _take(self, elements: int) -> Tensor:
        with self._lock:
            fitting = [k for k, t in enumerate(self._free) if elements <= t.numel() <= 2 * elements]
            if fitting:
                return self._free.pop(min(fitting, key=lambda k: self._free[k].numel()))
        made = torch.empty(elements)
        _use_huge_pages(made)
        return made

    @property
    def free_bytes(self) -> int:
        """Of the arenas that nobody uses at present; what was never touched counts, too."""
        with self._lock:
            return sum(4 * t.numel() for t in self._free)

    def clear(self) -> None:
        """Give what nobody uses back to the system."""
        with self._lock:
            self._free.clear()


ARENAS = Arenas()


def _use_huge_pages(memory: Tensor) -> None:
    """Ask for them: large maps otherwise need a page table entry every 4 KiB. A system without says no, and may."""
    size = 4 * memory.numel()
    if _ADVICE is None or size < _HUGE:
        return
    start = memory.data_ptr() + -memory.data_ptr() % mmap.PAGESIZE
    length = (memory.data_ptr() + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _ADVICE)

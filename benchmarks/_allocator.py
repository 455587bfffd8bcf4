"""The C library's allocator, whose defaults do not suit gradients that are as large as maps."""

from __future__ import annotations

import ctypes
import platform

from gf_tvm.machine.allocator import in_use

# Of malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let this process keep the memory of tensors that are freed, for the next ones.

    glibc returns blocks of more than 32 MB to the system at once. The next tensor of that size then consists of pages
    that the system has to clear, one fault each: for gradients of large maps that costs more than the kernels that
    write them (docs/performance.md). To be called before the large tensors are made; it cannot be undone.

    Good for a benchmark, which makes the same few tensors again and again. Not offered to users: an aligned block is
    found again only where nothing was allocated right behind it, and else the heap grows with every tensor (seen with
    glibc 2.36).

    Returns:
        Whether the allocator could be told: only glibc's can, where no other was preloaded.
    """
    if platform.libc_ver()[0] != "glibc" or in_use()["name"] != "system":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # No block is mapped by itself, and the heap is never given back.
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))

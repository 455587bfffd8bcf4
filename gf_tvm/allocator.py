"""The C library's allocator, whose defaults do not suit gradients that are as large as maps."""

from __future__ import annotations

import ctypes
import platform

# Of malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let this process keep the memory of tensors that are freed, for the next ones.

    glibc returns blocks of more than 32 MB to the system at once. The next tensor of that size then consists of pages
    that the system has to clear, one fault each: for gradients of large maps that costs more than the kernels that
    write them (docs/performance.md). The price: memory that other programs do not get back, and a heap that can be
    fragmented. To be called before the large tensors are made; it cannot be undone.

    Returns:
        Whether the allocator could be told: only glibc's can.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # No block is mapped by itself, and the heap is never given back.
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))

"""Kernels built where they are wanted, in the background, and kept in a cache on disk.

Names are imported on first use: the command that shows the cache needs neither PyTorch nor TVM. Modules, each using
only those before it:

==========  ===========================================================================================
identity    what is wanted, and the key that it has in the cache
store       the folder: entries, locks, the limit of its size
builder     the process that builds one entry; ``__main__`` starts it
cache       :class:`KernelCache`: finding what is there, having built what is not
models      what a captured model can use
==========  ===========================================================================================
"""

from typing import TYPE_CHECKING

from .._lazy import attach

if TYPE_CHECKING:
    from .cache import Cleared as Cleared
    from .cache import KernelCache as KernelCache
    from .cache import obstacle as obstacle
    from .identity import Wanted as Wanted
    from .store import Entry as Entry

_HOMES = {"Cleared": "cache", "Entry": "store", "KernelCache": "cache", "Wanted": "identity", "obstacle": "cache"}

__all__ = ["Cleared", "Entry", "KernelCache", "Wanted", "obstacle"]

__getattr__, __dir__ = attach(__name__, _HOMES)

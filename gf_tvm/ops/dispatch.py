"""Which compiled kernel computes an operator's part: the library's, or none, which is said once.

A library travels as its digest ("" stands for none), since operators take plain values only.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..bundle.kernel import Kernel
from ..bundle.library import get_library
from ..core.geometry import Geometry

#: Storage dtypes that kernels exist for, as :mod:`gf_tvm.core.workload` names them.
_DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class FallbackWarning(UserWarning):
    """The PyTorch implementation runs in place of a compiled kernel: same results, slower.

    Given once per process where no library was given, and once per workload that a library lacks.
    ``warnings.simplefilter("error", gf_tvm.FallbackWarning)`` turns a fallback into an error.
    """


#: In place of a library's digest: kernels are being built, so that plain operators are not worth a warning.
AWAITED = "awaited"

_said: set[object] = set()
_said_lock = threading.Lock()


def warn_fallback_once(topic: object, message: str) -> None:
    with _said_lock:
        if topic in _said:
            return
        _said.add(topic)
    try:
        warnings.warn(message, FallbackWarning, stacklevel=2)
    except FallbackWarning:  # turned into an error: it must be one the next time as well
        _said.discard(topic)
        raise


def find_kernel(
    names: Sequence[str],
    geometry: Geometry,
    like: Tensor,
    library: str,
    dtypes: Sequence[torch.dtype] | None = None,
) -> tuple[str, Kernel] | None:
    """The first of the kernels ``names`` that the library has for ``like``'s device, or None, said once.

    ``dtypes``: storage dtypes that will do, the best first; None: ``like``'s.
    """
    if geometry.n == 0 or like.device.type == "meta":
        return None  # nothing to compute, so nothing is missing
    if library == AWAITED:
        return None
    if not library:
        warn_fallback_once(
            "no library",
            "no library was given, so gradient filtering runs as plain PyTorch operators: same results, slower "
            "(library=gf_tvm.load(FILE) runs compiled kernels)",
        )
        return None
    loaded = get_library(library)
    dtypes = dtypes or (like.dtype,)
    if like.device.type == loaded.device_type:
        for name in names:
            for dtype in dtypes:
                kernel = loaded.find(name, geometry, _DTYPE_NAMES.get(dtype, ""))
                if kernel is not None:
                    return name, kernel
    what = (names[0], geometry.key, str(dtypes[0]).removeprefix("torch."), like.device.type)
    warn_fallback_once((library, *what), f"{loaded} lacks {' '.join(what)}: plain PyTorch operators run instead")
    return None


def as_kernel_takes(tensor: Tensor, kernel: Kernel) -> Tensor:
    """``tensor`` as the kernel takes it: itself where it is contiguous and aligned, else a copy."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % kernel.alignment == 0 else tensor.clone()


def without_autocast(device: str) -> AbstractContextManager[None]:
    """Inside an operator dtypes are settled: autocast would lower the sums' dtype behind the reference's back."""
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()

"""The products of a chain's backward pass: by the kernels of a convolution's library, else by PyTorch operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...bundle.kernel import Kernel
from ...bundle.library import get_library
from ...core import reference
from ...core.geometry import Geometry
from ...core.workload import ALIGNMENT
from ...ops.dispatch import as_kernel_takes, find_kernel, warn_fallback_once

#: Dtypes that compiled chains take, and convert to float32. Gradients on the grid are float32 whatever the
#: convolution's dtype is, which only says how grad_W is stored.
STORAGE = (torch.float32, torch.bfloat16, torch.float16)


def input_grad(g: Tensor, weight: Tensor, geometry: Geometry, library: str) -> Tensor:
    """grad_x~ (n, ci, ph, pw) from g~ (n, co, ph, pw), in g~'s dtype."""
    found = _find("input_grad", g, geometry, library, (weight.dtype,))
    if found is None:
        return reference.input_grad(g, weight, geometry)
    grad = g.new_empty((geometry.n, geometry.ci, *geometry.grid))
    found(*(as_kernel_takes(tensor, found) for tensor in (g, weight)), grad)
    return grad


def weight_grad(g: Tensor, saved: Tensor, geometry: Geometry, library: str) -> Tensor:
    """grad_W from g~ (n, co, ph, pw) and x~ as it was kept (:attr:`Geometry.saved_shape`)."""
    found = _find("weight_grad", g, geometry, library, STORAGE)
    if found is None:
        filtered = saved if geometry.depthwise else saved.permute(0, 3, 1, 2)
        return reference.weight_grad(g, filtered.to(g.dtype), geometry)
    grad = g.new_empty(geometry.weight_shape, dtype=getattr(torch, found.workload.dtype))
    found(*(as_kernel_takes(tensor, found) for tensor in (g, saved)), grad)
    return grad


def find_program(key: str, library: str) -> Callable[..., None] | None:
    """The program of that key in the library of that digest; see :func:`find_programs`."""
    found = find_programs([key], library) if library else None
    return None if found is None else found[key]


def find_programs(keys: Sequence[str], library: str) -> dict[str, Callable[..., None]] | None:
    """The programs of these keys in a library; None where there are no keys, or it lacks one.

    That is said once, but not of a library that has no programs at all: its kernels run, which it was built for.
    """
    loaded = get_library(library)
    found = {}
    for key in keys:
        function = loaded.program(key)
        if function is None:
            if loaded.programs:
                warn_fallback_once((library, key), f"{loaded} lacks {key}: what it is made of runs step by step")
            return None
        found[key] = function
    return found or None


def ready(tensor: Tensor) -> Tensor:
    """``tensor`` as compiled functions take it: itself where it is contiguous and aligned, else a copy."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def _find(name: str, g: Tensor, geometry: Geometry, library: str, dtypes: Sequence[torch.dtype]) -> Kernel | None:
    """The library's kernel, for weights of one of ``dtypes``; where it has none, that is said once."""
    found = find_kernel((name,), geometry, g, library, dtypes if g.dtype == torch.float32 else None)
    return None if found is None else found[1]

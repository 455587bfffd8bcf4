"""Storage dtypes by name, as PyTorch has them."""

from __future__ import annotations

import torch


def torch_dtype(name: str) -> torch.dtype:
    """``"float32"`` -> ``torch.float32``."""
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def itemsize(name: str) -> int:
    """Bytes of one value."""
    return torch_dtype(name).itemsize

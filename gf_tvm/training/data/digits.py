"""scikit-learn's digits: 1797 real 8x8 grey images of 10 classes."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ModelError
from .base import Images, check_memory, resize


def read_digits(data: str) -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) float32 in 0..1 and labels (1797) int64. ``data`` is named if that fails (ModelError)."""
    try:
        from sklearn.datasets import load_digits  # 1 s and an optional dependency: only where it is used
    except ImportError as error:
        raise ModelError(f"data {data!r} needs scikit-learn: pip install scikit-learn ({error})") from None
    digits = load_digits()
    x = torch.from_numpy(digits.images).float().div_(16.0).unsqueeze(1)
    return x, torch.from_numpy(digits.target).long()


def load_digits(image_size: int) -> Images:
    """The digits, enlarged to ``image_size``. Raises ModelError."""
    x, y = read_digits("digits")
    check_memory(len(y), image_size, "digits")
    return Images(resize(x, image_size), y, tuple(str(d) for d in range(10)))

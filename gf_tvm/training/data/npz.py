"""Arrays in an ``.npz``."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import ModelError
from .base import CHANNELS, Images, check_memory, resize


def _array(arrays: Any, path: Path, names: tuple[str, str]) -> np.ndarray[Any, Any]:
    """The array called by one of ``names``."""
    for name in names:
        if name in arrays:
            array: np.ndarray[Any, Any] = arrays[name]
            return array
    found = ", ".join(arrays) or "nothing"
    raise ModelError(f"{str(path)!r} must have an array {names[0]!r} or {names[1]!r}, it has: {found}")


def load_npz(path: Path, image_size: int) -> Images:
    """Read an ``.npz`` with images ``x`` (or ``images``) and labels ``y`` (or ``labels``).

    Images: (n, h, w), (n, h, w, c) or (n, c, h, w), c = 1 or 3; uint8 (divided by 255) or floating (as they are).
    Labels: (n) integers; the distinct values are the classes, in ascending order. Pickled objects are not loaded.

    Raises:
        ModelError: the file cannot be read, an array is missing, or shapes, dtypes or values do not fit.
    """
    damage = (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error)
    try:
        with open(path, "rb") as file:
            arrays = np.load(file, allow_pickle=False)
            if isinstance(arrays, np.ndarray):
                raise ModelError(f"{str(path)!r} holds a single array, not named ones as numpy.savez writes")
            x, y = _array(arrays, path, ("x", "images")), _array(arrays, path, ("y", "labels"))
    except ModelError:  # also a ValueError
        raise
    except FileNotFoundError:
        raise ModelError(f"no data file {str(path)!r}") from None
    except damage as error:
        raise ModelError(f"cannot read {str(path)!r}: {' '.join(str(error).split())}") from None
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[3] in (1, CHANNELS):
        x = x.transpose(0, 3, 1, 2)
    elif x.ndim != 4 or x.shape[1] not in (1, CHANNELS):
        raise ModelError(
            f"the images in {str(path)!r} must have shape (n, h, w), (n, h, w, c) or (n, c, h, w) with c = 1 or 3, "
            f"got {x.shape}"
        )
    if y.ndim != 1 or len(y) != len(x):
        raise ModelError(f"{str(path)!r} has {len(x)} images, its labels must have shape ({len(x)},), got {y.shape}")
    if 0 in x.shape:
        raise ModelError(f"the images in {str(path)!r} are empty: {x.shape}")
    if y.dtype.kind not in "iu":
        raise ModelError(f"the labels in {str(path)!r} must be integers, got {y.dtype}")
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise ModelError(f"the images in {str(path)!r} must be uint8 or floating, got {x.dtype}")
    check_memory(len(x), image_size, str(path))
    values, labels = np.unique(y, return_inverse=True)
    tensor = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    if not torch.isfinite(tensor).all():
        raise ModelError(f"the images in {str(path)!r} must be finite, found nan or inf")
    if x.dtype == np.uint8:
        tensor /= 255.0
    return Images(resize(tensor, image_size), torch.from_numpy(labels.astype(np.int64)), tuple(map(str, values)))

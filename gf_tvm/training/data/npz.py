"""Arrays in an ``.npz``."""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gf_cuda.archives import check_sizes

from ...errors import ModelError
from .base import CHANNELS, Images, check_memory, resize

#: Bytes that a file may unpack to, and what a larger one may be of its own size: photographs are at most a few times
#: as large as packed, drawings some dozens of times, while deflate can pack zeros a thousand times.
FREE_BYTES = 1 << 30
MAX_RATIO = 100


@dataclass(frozen=True)
class _Header:
    """What an array says of itself."""

    entry: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _header(archive: zipfile.ZipFile, path: Path, names: tuple[str, str]) -> _Header:
    """The header of the array called by one of ``names``. Raises ModelError, ValueError, or what zipfile raises."""
    entries = archive.namelist()
    for name in names:
        entry = f"{name}.npy"
        if entry not in entries:
            continue
        with archive.open(entry) as file:
            # Later versions are for the names of fields; their headers may have any length.
            if (version := np.lib.format.read_magic(file)) != (1, 0):
                raise ValueError(f"its array {name!r} has version {version} of numpy's format, not (1, 0)")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.hasobject:
            raise ValueError(f"its array {name!r} holds objects, which are not loaded")
        header = _Header(entry, shape, dtype)
        if min(shape, default=0) < 0 or header.bytes > archive.getinfo(entry).file_size:
            raise ValueError(f"its array {name!r} of shape {shape} is not all there")
        return header
    found = ", ".join(entry.removesuffix(".npy") for entry in entries) or "nothing"
    raise ModelError(f"{str(path)!r} must have an array {names[0]!r} or {names[1]!r}, it has: {found}")


def _array(archive: zipfile.ZipFile, header: _Header) -> np.ndarray[Any, Any]:
    with archive.open(header.entry) as file:
        array: np.ndarray[Any, Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array


def load_npz(path: Path, image_size: int) -> Images:
    """Read an ``.npz`` with images ``x`` (or ``images``) and labels ``y`` (or ``labels``).

    Images: (n, h, w), (n, h, w, c) or (n, c, h, w), c = 1 or 3; uint8 (divided by 255) or floating (as they are).
    Labels: (n) integers; the distinct values are the classes, in ascending order. Pickled objects are not loaded.

    Raises:
        ModelError: the file cannot be read, an array is missing, shapes, dtypes or values do not fit, or it unpacks to
            more than images do or than the memory holds. What the arrays' headers say is checked before they are read.
    """
    damage = (
        *(OSError, ValueError, EOFError, KeyError, NotImplementedError, RuntimeError, SyntaxError, MemoryError),
        *(zipfile.BadZipFile, zlib.error),
    )
    magic = np.lib.format.MAGIC_PREFIX
    try:
        with open(path, "rb") as file:
            if file.read(len(magic)) == magic:
                raise ModelError(f"{str(path)!r} holds a single array, not named ones as numpy.savez writes")
            with zipfile.ZipFile(file) as archive:
                check_sizes(archive, os.fstat(file.fileno()).st_size, FREE_BYTES, MAX_RATIO)
                images, labels = (_header(archive, path, names) for names in (("x", "images"), ("y", "labels")))
                _check(images, labels, path)
                floats = 4 * math.prod(images.shape)
                check_memory(images.shape[0], image_size, str(path), images.bytes + floats + labels.bytes)
                x, y = _array(archive, images), _array(archive, labels)
    except ModelError:  # also a ValueError
        raise
    except FileNotFoundError:
        raise ModelError(f"no data file {str(path)!r}") from None
    except damage as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"cannot read {str(path)!r}: {reason}") from None
    if x.ndim == 3:
        x = x[:, None]
    elif x.shape[3] in (1, CHANNELS):
        x = x.transpose(0, 3, 1, 2)
    values, indices = np.unique(y, return_inverse=True)
    tensor = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    if not torch.isfinite(tensor).all():
        raise ModelError(f"the images in {str(path)!r} must be finite, found nan or inf")
    if x.dtype == np.uint8:
        tensor /= 255.0
    return Images(resize(tensor, image_size), torch.from_numpy(indices.astype(np.int64)), tuple(map(str, values)))


def _check(x: _Header, y: _Header, path: Path) -> None:
    """Raise ModelError unless these are images and labels."""
    channels = (1, CHANNELS)
    if len(x.shape) != 3 and not (len(x.shape) == 4 and (x.shape[3] in channels or x.shape[1] in channels)):
        raise ModelError(
            f"the images in {str(path)!r} must have shape (n, h, w), (n, h, w, c) or (n, c, h, w) with c = 1 or 3, "
            f"got {x.shape}"
        )
    if y.shape != (x.shape[0],):
        raise ModelError(
            f"{str(path)!r} has {x.shape[0]} images, its labels must have shape ({x.shape[0]},), got {y.shape}"
        )
    if 0 in x.shape:
        raise ModelError(f"the images in {str(path)!r} are empty: {x.shape}")
    if y.dtype.kind not in "iu":
        raise ModelError(f"the labels in {str(path)!r} must be integers, got {y.dtype}")
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise ModelError(f"the images in {str(path)!r} must be uint8 or floating, got {x.dtype}")

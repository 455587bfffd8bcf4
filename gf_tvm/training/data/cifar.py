"""CIFAR-10 and CIFAR-100: the published "python version" files in a folder.

Format: https://www.cs.toronto.edu/~kriz/cifar.html. The files are pickles of Python 2. A pickle may name any function
to call, so only the three names that occur in these files are known here, and they stand for nothing but the plain
values of an array.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from ...errors import ModelError
from ...files import read_limited
from .base import CHANNELS, Images, check_memory, resize

#: Pixels per side of the published images.
SIDE = 32

#: Of one file; the largest, CIFAR-100's training images, has 155 MB.
MAX_BYTES = 512 << 20

#: By the file that only this data set has: files of training and test images, file and key of the names, labels.
_CIFAR = {
    "batches.meta": (tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", b"label_names", b"labels"),
    "meta": (("train",), "test", b"fine_label_names", b"fine_labels"),
}


def is_cifar(folder: Path) -> bool:
    """Whether ``folder`` has the files of CIFAR-10 or CIFAR-100."""
    return any((folder / meta).is_file() and (folder / files[1]).is_file() for meta, files in _CIFAR.items())


def load_cifar(folder: Path, image_size: int) -> Images:
    """Read the folder ``cifar-10-batches-py`` or ``cifar-100-python`` (fine labels), its test images marked as such.

    Raises:
        ModelError: a file that is missing, cannot be read, or does not hold what the published ones do (named).
    """
    meta = next(name for name, files in _CIFAR.items() if (folder / name).is_file() and (folder / files[1]).is_file())
    train, test, names_key, labels_key = _CIFAR[meta]
    names = _value(folder / meta, names_key, list)
    if not names or not all(isinstance(name, bytes) for name in names):
        raise ModelError(f"{str(folder / meta)!r} is not a file of CIFAR: its class names are no text")
    pixels: list[np.ndarray[Any, Any]] = []
    labels: list[int] = []
    tests: list[bool] = []
    for name in (*train, test):
        path = folder / name
        content = _read(path)
        images, y = _pixels(path, content.get(b"data")), content.get(labels_key)
        if (
            not isinstance(y, list)
            or len(y) != len(images)
            or not all(type(label) is int and 0 <= label < len(names) for label in y)
        ):
            raise ModelError(f"{str(path)!r} must have {len(images)} labels from 0 to {len(names) - 1}")
        pixels.append(images)
        labels += y
        tests += [name == test] * len(y)
    check_memory(len(labels), image_size, str(folder))
    x = torch.from_numpy(np.concatenate(pixels)).float().div_(255.0)
    classes = tuple(name.decode("ascii", "replace") for name in names)
    return Images(resize(x, image_size), torch.tensor(labels), classes, torch.tensor(tests))


class _Array:
    """What remains of a pickled ``numpy.ndarray``: shape, dtype and the bytes."""

    def __init__(self, *_: Any) -> None:
        self.shape: Any = None
        self.dtype: Any = None
        self.content: Any = None

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, _, self.content = state


class _Dtype:
    """What remains of a pickled ``numpy.dtype``: its name."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name

    def __setstate__(self, _: Any) -> None:
        """The byte order; bytes have none."""


class _Unpickler(pickle.Unpickler):
    _KNOWN: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which the published files do not")
        return self._KNOWN[module, name]


def _check_memo(data: bytes) -> None:
    """Raise ValueError if a pickle numbers its values beyond its own length: room is made up to the largest number."""
    for operation, argument, _ in pickletools.genops(data):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument is not None and argument > len(data):
            raise ValueError(f"it numbers a value {argument}, but has {len(data)} bytes")


def _read(path: Path) -> dict[Any, Any]:
    try:
        data = read_limited(path, MAX_BYTES)
        _check_memo(data)
        content = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except FileNotFoundError:
        raise ModelError(f"{str(path.parent)!r} has no {path.name}, a file of CIFAR") from None
    except OSError as error:
        raise ModelError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    except Exception as error:  # a damaged pickle fails in as many ways as there are bytes
        raise ModelError(f"{str(path)!r} is not a file of CIFAR: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{str(path)!r} is not a file of CIFAR: it holds a {type(content).__name__}")
    return content


def _value(path: Path, key: bytes, kind: type) -> Any:
    value = _read(path).get(key)
    if not isinstance(value, kind):
        raise ModelError(f"{str(path)!r} is not a file of CIFAR: it has no {key.decode()}")
    return value


def _pixels(path: Path, array: Any) -> np.ndarray[Any, Any]:
    """(n, 3, 32, 32) uint8."""
    size = CHANNELS * SIDE**2
    if not (
        isinstance(array, _Array)
        and isinstance(array.content, bytes)
        and isinstance(array.dtype, _Dtype)
        and array.dtype.name == b"u1"
        and array.shape == (len(array.content) // size, size)
        and len(array.content) % size == 0
    ):
        raise ModelError(f"{str(path)!r} is not a file of CIFAR: its data must be n x {size} uint8")
    return np.frombuffer(array.content, np.uint8).reshape(-1, CHANNELS, SIDE, SIDE)

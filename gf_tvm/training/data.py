"""Images to train on, all in memory: scikit-learn's digits, a folder of class folders, or an ``.npz``.

Nothing is downloaded. The paper's protocol (CVPR 2023, section 4) pretrains on one part of a data set and fine-tunes on
another with a different distribution, "non-i.i.d." in the sense of federated learning (McMahan et al. 2017); see
:func:`split_parts` for how the parts are drawn here.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ModelError
from ..machine import available_bytes

#: Files read from a class folder.
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

CHANNELS = 3

PARTS = ("pretrain_train", "pretrain_test", "finetune_train", "finetune_test")


@dataclass(frozen=True)
class Images:
    """Labelled images: ``x`` (n, 3, size, size) float32, ``y`` (n) int64 indices into ``classes``."""

    x: Tensor
    y: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Dataset:
    """A data set split for the protocol: part A (``pretrain_*``) and part B (``finetune_*``), each in train and test.

    Images are normalised with ``mean`` and ``std`` per channel of the whole of part A's training images.
    """

    name: str
    pretrain_train: Images
    pretrain_test: Images
    finetune_train: Images
    finetune_test: Images
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the labels."""
        return self.pretrain_train.classes

    @property
    def parts(self) -> dict[str, Images]:
        """The four parts by name."""
        return {name: getattr(self, name) for name in PARTS}

    @property
    def sizes(self) -> dict[str, int]:
        """Images in each part."""
        return {name: len(part) for name, part in self.parts.items()}

    @cached_property
    def digest(self) -> str:
        """sha256 of every image, label and class name in the split: equal exactly for equal training data."""
        h = hashlib.sha256("\0".join(self.classes).encode())
        for part in self.parts.values():
            h.update(str(tuple(part.x.shape)).encode())
            h.update(part.x.contiguous().numpy().data)
            h.update(part.y.contiguous().numpy().data)
        return h.hexdigest()


def load_dataset(
    data: str, image_size: int = 32, seed: int = 0, skew: float = 0.9, test_fraction: float = 0.25
) -> Dataset:
    """Read, resize, split and normalise a data set.

    Args:
        data: ``digits`` (1797 real 8x8 grey images of 10 classes from scikit-learn, enlarged), a folder with one
            folder of images per class, or an ``.npz`` (see :func:`load_npz`).
        image_size: pixels per side after resizing.
        seed, skew, test_fraction: see :func:`split_parts`.

    Raises:
        ModelError: nothing usable at ``data``, or too few images to split.
    """
    images = load_images(data, image_size)
    index = split_parts(images.y, len(images.classes), seed, skew, test_fraction)
    for name, members in zip(PARTS, index, strict=True):
        if len(members) == 0:
            raise ModelError(f"{data!r} has {len(images)} images: too few, its {name} part would be empty")
    known = images.x[index[0]]
    mean = known.mean(dim=(0, 2, 3), keepdim=True)
    std = known.std(dim=(0, 2, 3), keepdim=True).clamp_min(1e-3)  # a constant channel stays finite
    a, a_test, b, b_test = (Images((images.x[i] - mean) / std, images.y[i], images.classes) for i in index)
    return Dataset(data, a, a_test, b, b_test, tuple(mean.flatten().tolist()), tuple(std.flatten().tolist()))


def load_images(data: str, image_size: int = 32) -> Images:
    """Read ``digits``, a folder or an ``.npz`` as :func:`load_dataset` does, values in 0..1, neither split nor
    normalised. Raises ModelError."""
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
        raise ModelError(f"image_size must be a positive integer, got {image_size!r}")
    path = Path(data)
    if data == "digits":
        images = _load_digits(image_size)
    elif path.is_dir():
        images = load_folder(path, image_size)
    elif path.suffix == ".npz":
        images = load_npz(path, image_size)
    elif path.exists():
        raise ModelError(f"data {data!r} is neither a folder of class folders nor an .npz file")
    else:
        raise ModelError(f"no data at {data!r}; give digits, a folder of class folders of images, or an .npz file")
    if len(images.classes) < 2:
        raise ModelError(f"data {data!r} has {len(images.classes)} class ({images.classes[0]}), at least 2 are needed")
    return images


def _check_memory(count: int, image_size: int, data: str) -> None:
    """Raise ModelError if ``count`` images would not fit into memory, before the system kills the process."""
    needed = 3 * count * CHANNELS * image_size**2 * 4  # as read, as split, and what it takes to normalise them
    available = available_bytes()
    if available is not None and needed > available:
        raise ModelError(
            f"{count} images of {image_size}x{image_size} pixels from {data!r} need {needed / 1e9:.3g} GB of memory, "
            f"{available / 1e9:.3g} GB are available; a smaller image size may do"
        )


def _resize(x: Tensor, image_size: int) -> Tensor:
    """(n, c, h, w) -> (n, 3, image_size, image_size); grey images get three equal channels."""
    if x.shape[-2:] != (image_size, image_size):
        size = (image_size, image_size)
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
    return x.expand(-1, CHANNELS, -1, -1).contiguous()


def _load_digits(image_size: int) -> Images:
    try:
        from sklearn.datasets import load_digits  # 1 s and an optional dependency: only where it is used
    except ImportError as error:
        raise ModelError(f"data 'digits' needs scikit-learn: pip install scikit-learn ({error})") from None
    digits = load_digits()
    _check_memory(len(digits.target), image_size, "digits")
    x = torch.from_numpy(digits.images).float().div_(16.0).unsqueeze(1)
    return Images(_resize(x, image_size), torch.from_numpy(digits.target).long(), tuple(str(d) for d in range(10)))


def load_folder(folder: Path, image_size: int) -> Images:
    """Read ``folder/<class>/<image>``: RGB, the centre square resized to ``image_size``.

    Raises:
        ModelError: no class folders, a class folder without images (named), or a file that cannot be read (named).
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ModelError(f"reading images from {str(folder)!r} needs pillow: pip install pillow ({error})") from None
    try:
        classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        files = {
            name: sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
            for name in classes
        }
    except OSError as error:
        raise ModelError(f"cannot read the data folder {str(folder)!r}: {error.strerror}") from None
    if not classes:
        raise ModelError(f"the data folder {str(folder)!r} has no class folders; expected FOLDER/CLASS/IMAGE")
    for name in classes:
        if not files[name]:
            suffixes = " ".join(IMAGE_SUFFIXES)
            raise ModelError(f"the class folder {str(folder / name)!r} has no images ({suffixes})")
    count = sum(map(len, files.values()))
    _check_memory(count, image_size, str(folder))
    x = np.empty((count, image_size, image_size, CHANNELS), np.uint8)
    y: list[int] = []
    for label, name in enumerate(classes):
        for file in files[name]:
            try:
                with Image.open(file) as image:
                    rgb = ImageOps.exif_transpose(image).convert("RGB")
                    x[len(y)] = np.asarray(ImageOps.fit(rgb, (image_size, image_size), Image.Resampling.BILINEAR))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                reason = " ".join(str(error).split())
                raise ModelError(f"cannot read the image {str(file)!r}: {reason}") from None
            y.append(label)
    tensor = torch.from_numpy(x).permute(0, 3, 1, 2).float().div_(255.0)
    return Images(tensor.contiguous(), torch.tensor(y), tuple(classes))


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
    _check_memory(len(x), image_size, str(path))
    values, labels = np.unique(y, return_inverse=True)
    tensor = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    if not torch.isfinite(tensor).all():
        raise ModelError(f"the images in {str(path)!r} must be finite, found nan or inf")
    if x.dtype == np.uint8:
        tensor /= 255.0
    return Images(_resize(tensor, image_size), torch.from_numpy(labels.astype(np.int64)), tuple(map(str, values)))


def split_parts(
    y: Tensor, num_classes: int, seed: int = 0, skew: float = 0.9, test_fraction: float = 0.25
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split into two parts with different class distributions, each in train and test.

    Half of the classes (drawn by ``seed``, rounded up) belong mainly to part A: a share ``skew`` of their images goes
    to A and the rest to B; the other classes the other way round. So every class is known to both parts, the sizes
    are about equal, and ``skew`` sets the distance from 0.5 (same distribution) to 1 (no common class). A share
    ``test_fraction`` of each class in each part is its test set. Shares are rounded to whole images.

    Returns:
        Indices (int64) of A's train, A's test, B's train and B's test images; disjoint, together all of them. Equal
        arguments give equal splits.

    Raises:
        ModelError: ``skew`` not in [0.5, 1] or ``test_fraction`` not in (0, 1).
    """
    if not 0.5 <= skew <= 1.0:
        raise ModelError(f"skew must lie between 0.5 and 1, got {skew!r}")
    if not 0.0 < test_fraction < 1.0:
        raise ModelError(f"test_fraction must lie between 0 and 1 (both excluded), got {test_fraction!r}")
    generator = torch.Generator().manual_seed(seed)
    main_a = torch.randperm(num_classes, generator=generator)[: (num_classes + 1) // 2].tolist()
    parts: list[list[Tensor]] = [[], [], [], []]
    for label in range(num_classes):
        members = (y == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        share_a = round(len(members) * (skew if label in main_a else 1.0 - skew))
        for first, part in ((0, members[:share_a]), (2, members[share_a:])):
            test = round(len(part) * test_fraction)
            parts[first].append(part[test:])
            parts[first + 1].append(part[:test])
    joined = [torch.cat(part) for part in parts]
    return joined[0], joined[1], joined[2], joined[3]


def batches(
    images: Images,
    batch: int,
    generator: torch.Generator | None = None,
    flip: bool = False,
    shift: int = 0,
    drop_last: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over batches (x (batch, 3, size, size), y (batch)).

    Args:
        generator: shuffles the images and draws flips and shifts; None keeps their order.
        flip: mirror each image left-right with probability 1/2; needs ``generator``.
        shift: move each image by up to that many pixels along both axes, zeros (the mean) following; needs
            ``generator``.
        drop_last: leave out a last batch that is not full. Training does: kernels are compiled for one batch size.
    """
    if generator is None and (flip or shift):
        raise ValueError("flip and shift need a generator")
    n = len(images)
    order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
    for start in range(0, n - batch + 1 if drop_last else n, batch):
        index = order[start : start + batch]
        x, y = images.x[index], images.y[index]
        if flip:
            mirrored = torch.rand(len(index), generator=generator) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        if shift:
            corners = torch.randint(0, 2 * shift + 1, (len(index), 2), generator=generator).tolist()
            h, w = x.shape[-2:]
            padded = F.pad(x, (shift, shift, shift, shift))
            x = torch.stack([image[:, i : i + h, j : j + w] for image, (i, j) in zip(padded, corners, strict=True)])
        yield x, y

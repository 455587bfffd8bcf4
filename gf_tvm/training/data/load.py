"""Data sets by name."""

from __future__ import annotations

import warnings
from pathlib import Path

from torch import Tensor

from ...errors import ModelError
from .base import PARTS, Dataset, Images
from .cifar import is_cifar, load_cifar
from .digits import load_digits
from .folders import load_folder
from .npz import load_npz
from .scenes import load_scenes
from .split import split_labels, split_parts
from .voc import is_voc, load_voc

# Classes that a warning names for each part.
_NAMED = 8


def load_dataset(
    data: str,
    image_size: int = 32,
    seed: int = 0,
    skew: float = 0.9,
    test_fraction: float = 0.25,
    strict: bool = False,
) -> Dataset:
    """Read, resize, split and normalise a data set.

    Args:
        data: ``digits`` (1797 real 8x8 grey images of 10 classes from scikit-learn, enlarged), ``scenes`` (made of
            them, with masks; see :func:`~.scenes.load_scenes`), a folder (CIFAR-10 or CIFAR-100 as published; images
            and masks as PASCAL VOC has them; else one folder of images per class), or an ``.npz`` (see
            :func:`~.npz.load_npz`).
        image_size: pixels per side after resizing.
        seed: of the split, and of the scenes.
        skew, test_fraction: see :func:`split_parts`. Where pixels are labelled, the split takes each image for its
            dominant class: see :func:`split_labels`.
        strict: a picture that cannot be read is an error; else it is skipped, with a warning.

    Warns of classes that a part has no images of, because there are too few to share.

    Raises:
        ModelError: nothing usable at ``data``, or too few images to split.
    """
    images = load_images(data, image_size, seed, strict)
    index = split_parts(split_labels(images), len(images.classes), seed, skew, test_fraction, images.test)
    for name, members in zip(PARTS, index, strict=True):
        if len(members) == 0:
            raise ModelError(f"{data!r} has {len(images)} images: too few, its {name} part would be empty")
    _warn_of_missing(data, split_labels(images), images.classes, index, skew)
    known = images.x[index[0]]
    mean = known.mean(dim=(0, 2, 3), keepdim=True)
    std = known.std(dim=(0, 2, 3), keepdim=True).clamp_min(1e-3)  # a constant channel stays finite
    a, a_test, b, b_test = (Images((images.x[i] - mean) / std, images.y[i], images.classes) for i in index)
    return Dataset(data, a, a_test, b, b_test, tuple(mean.flatten().tolist()), tuple(std.flatten().tolist()))


def _warn_of_missing(
    data: str, labels: Tensor, classes: tuple[str, ...], index: tuple[Tensor, ...], skew: float
) -> None:
    """Say which classes a part has no images of, though it should have some of every class."""
    if skew == 1.0:  # no common class: that is what it means
        return
    there = set(labels.tolist())
    said = []
    for name, members in zip(PARTS, index, strict=True):
        if lacking := sorted(there - set(labels[members].tolist())):
            names = ", ".join(repr(classes[label]) for label in lacking[:_NAMED])
            more = f" and {len(lacking) - _NAMED} more" if len(lacking) > _NAMED else ""
            said.append(f"{name} has none of {names}{more}")
    if said:
        warnings.warn(f"{data!r} has too few images of some classes: {'; '.join(said)}", stacklevel=3)


def load_images(data: str, image_size: int = 32, seed: int = 0, strict: bool = False) -> Images:
    """Read what :func:`load_dataset` reads, values in 0..1, neither split nor normalised; ``seed`` is that of scenes.
    ``strict`` as there.

    Raises:
        ModelError: nothing usable at ``data``.
    """
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
        raise ModelError(f"image_size must be a positive integer, got {image_size!r}")
    path = Path(data)
    if data == "digits":
        images = load_digits(image_size)
    elif data == "scenes":
        images = load_scenes(image_size, seed)
    elif path.is_dir():
        if is_cifar(path):
            images = load_cifar(path, image_size)
        else:
            images = (load_voc if is_voc(path) else load_folder)(path, image_size, strict)
    elif path.suffix == ".npz":
        images = load_npz(path, image_size)
    elif path.exists():
        raise ModelError(f"data {data!r} is neither a folder of class folders nor an .npz file")
    else:
        raise ModelError(
            f"no data at {data!r}; give digits, scenes, a folder of class folders of images, of CIFAR or as PASCAL "
            "VOC has them, or an .npz file"
        )
    if len(images.classes) < 2:
        raise ModelError(f"data {data!r} has {len(images.classes)} class ({images.classes[0]}), at least 2 are needed")
    return images

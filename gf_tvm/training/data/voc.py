"""Folders of images and masks as in PASCAL VOC: JPEGImages, SegmentationClass and, if there, ImageSets/Segmentation.

Format: Everingham, Van Gool, Williams, Winn, Zisserman, "The PASCAL Visual Object Classes Challenge 2012 Development
Kit", sections 3.2 and 5: a mask is a PNG of palette indices, 0 for the background, 255 for pixels of no class.
"""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import ModelError
from .base import CHANNELS, IGNORED, Images, check_memory
from .folders import IMAGE_SUFFIXES

IMAGES, MASKS, LISTS = "JPEGImages", "SegmentationClass", "ImageSets/Segmentation"


def is_voc(folder: Path) -> bool:
    """Whether ``folder`` has images and masks as PASCAL VOC has them."""
    return (folder / IMAGES).is_dir() and (folder / MASKS).is_dir()


def load_voc(folder: Path, image_size: int) -> Images:
    """Read ``JPEGImages/NAME.*`` and ``SegmentationClass/NAME.png``: the centre squares, resized to ``image_size``.

    Images are interpolated, masks are not. Which names: those in ``ImageSets/Segmentation/*.txt``, where there are
    such lists (names in ``val.txt`` and not in ``train.txt`` are test images), else those of all masks. Class names
    are the lines of ``classes.txt``, if there is one, else ``background`` and the index.

    Raises:
        ModelError: a file that is missing, cannot be read, or does not fit (named).
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ModelError(f"reading images from {str(folder)!r} needs pillow: pip install pillow ({error})") from None
    try:
        names, tests = _names(folder)
        images = {p.stem: p for p in sorted((folder / IMAGES).iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES}
        classes = _classes(folder)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"cannot read the data folder {str(folder)!r}: {reason}") from None
    if not names:
        raise ModelError(f"the data folder {str(folder)!r} has no masks ({MASKS}/NAME.png)")
    check_memory(len(names), image_size, str(folder))
    x = np.empty((len(names), image_size, image_size, CHANNELS), np.uint8)
    y = np.empty((len(names), image_size, image_size), np.uint8)
    for number, name in enumerate(names):
        if name not in images:
            raise ModelError(f"the data folder {str(folder)!r} has no image {IMAGES}/{name}.jpg")
        rgb = _opened(images[name], Image).convert("RGB")
        path = folder / MASKS / f"{name}.png"
        mask = _opened(path, Image)
        if mask.mode not in ("P", "L"):
            raise ModelError(f"the mask {str(path)!r} must hold palette indices or grey values, not {mask.mode}")
        if mask.size != rgb.size:
            raise ModelError(
                f"the mask {str(path)!r} has {mask.size[0]}x{mask.size[1]} pixels, "
                f"its image {rgb.size[0]}x{rgb.size[1]}"
            )
        x[number] = np.asarray(_fit(rgb, image_size, Image.Resampling.BILINEAR))
        # As grey values: pillow would mix palettes, and resize only those without.
        indices = Image.fromarray(np.asarray(mask))
        y[number] = np.asarray(_fit(indices, image_size, Image.Resampling.NEAREST))
        largest = max((int(value) for value in np.unique(y[number]) if value != IGNORED), default=0)
        if classes is not None and largest >= len(classes):
            raise ModelError(
                f"the mask {str(path)!r} has the class {largest}, {str(folder / 'classes.txt')!r} names 0 to "
                f"{len(classes) - 1}"
            )
    if classes is None:
        count = int(y[y != IGNORED].max(initial=0)) + 1
        classes = ("background", *(str(index) for index in range(1, count)))
    tensor = torch.from_numpy(x).permute(0, 3, 1, 2).float().div_(255.0)
    test = torch.tensor([name in tests for name in names]) if tests else None
    return Images(tensor.contiguous(), torch.from_numpy(y), classes, test)


def _names(folder: Path) -> tuple[list[str], set[str]]:
    """All names, sorted, and those of test images."""
    lists = {path.stem: set(_lines(path)) for path in sorted((folder / LISTS).glob("*.txt"))}
    if not lists:
        return sorted(path.stem for path in (folder / MASKS).glob("*.png")), set()
    return sorted(set().union(*lists.values())), lists.get("val", set()) - lists.get("train", set())


def _classes(folder: Path) -> tuple[str, ...] | None:
    path = folder / "classes.txt"
    if not path.is_file():
        return None
    return tuple(_lines(path))


def _lines(path: Path) -> list[str]:
    """The lines of a text file in UTF-8, with or without a byte-order mark, that hold something. Raises ModelError."""
    lines = []
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        try:
            lines.append(line.decode("utf-8").strip())
        except UnicodeDecodeError:
            raise ModelError(f"{str(path)!r}, line {number}: not UTF-8; save the file as UTF-8 text") from None
    return [line for line in lines if line]


def _opened(path: Path, pillow: Any) -> Any:
    try:
        with pillow.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise ModelError(f"there is no {str(path)!r}") from None
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        raise ModelError(f"cannot read the image {str(path)!r}: {' '.join(str(error).split())}") from None


def _fit(image: Any, size: int, resampling: Any) -> Any:
    from PIL import ImageOps

    return ImageOps.fit(image, (size, size), resampling)

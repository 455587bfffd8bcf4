"""Folders of images and masks as in PASCAL VOC: JPEGImages, SegmentationClass and, if there, ImageSets/Segmentation.

Format: Everingham, Van Gool, Williams, Winn, Zisserman, "The PASCAL Visual Object Classes Challenge 2012 Development
Kit", sections 3.2 and 5: a mask is a PNG of palette indices, 0 for the background, 255 for pixels of no class.
"""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...errors import ModelError, PictureError
from .base import CHANNELS, IGNORED, Images, check_memory
from .pictures import Skipped, check_pillow, is_picture, opened, orientation_of, read_turned, turned

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGES, MASKS, LISTS = "JPEGImages", "SegmentationClass", "ImageSets/Segmentation"


def is_voc(folder: Path) -> bool:
    """Whether ``folder`` has images and masks as PASCAL VOC has them."""
    return (folder / IMAGES).is_dir() and (folder / MASKS).is_dir()


def load_voc(folder: Path, image_size: int, strict: bool = False) -> Images:
    """Read ``JPEGImages/NAME.*`` and ``SegmentationClass/NAME.png``: the centre squares, resized to ``image_size``.

    Images are interpolated, masks are not. A mask lies on the picture as it is seen; where only the stored pixels,
    before they are turned as the picture's EXIF entry says, have the mask's size, the mask is turned with them. Which
    names: those in ``ImageSets/Segmentation/*.txt``, where there are such lists (names in ``val.txt`` and not in
    ``train.txt`` are test images), else those of all masks. Class names are the lines of ``classes.txt``, if there is
    one, else ``background`` and the index.

    Pictures and masks that cannot be decoded are skipped, with a warning each; ``strict``: the first is an error.

    Raises:
        ModelError: a file that is missing or does not fit (named); masks that are not numbers of classes.
    """
    check_pillow(folder)
    try:
        names, tests = _names(folder)
        images = {p.stem: p for p in sorted((folder / IMAGES).iterdir()) if is_picture(p)}
        classes = _classes(folder)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"cannot read the data folder {str(folder)!r}: {reason}") from None
    if not names:
        raise ModelError(f"the data folder {str(folder)!r} has no masks ({MASKS}/NAME.png)")
    check_memory(len(names), image_size, str(folder))
    x = np.empty((len(names), image_size, image_size, CHANNELS), np.uint8)
    y = np.empty((len(names), image_size, image_size), np.uint8)
    taken: list[str] = []
    skipped = Skipped(strict)
    values = np.zeros(256, bool)  # that the masks have
    for name in names:
        if name not in images:
            raise ModelError(f"the data folder {str(folder)!r} has no image {IMAGES}/{name}.jpg")
        path = folder / MASKS / f"{name}.png"
        if not path.is_file():
            raise ModelError(f"there is no {str(path)!r}")
        try:
            rgb, mask = _pair(images[name], path)
        except PictureError as error:
            skipped.add(error)
            continue
        number = len(taken)
        x[number] = np.asarray(_fit(rgb, image_size, "BILINEAR"))
        y[number] = np.asarray(_fit(mask, image_size, "NEAREST"))
        found = np.unique(y[number])
        values[found] = True
        values[np.unique(np.asarray(mask))] = True
        largest = max((int(value) for value in found if value != IGNORED), default=0)
        if classes is not None and largest >= len(classes):
            raise ModelError(
                f"the mask {str(path)!r} has the class {largest}, {str(folder / 'classes.txt')!r} names 0 to "
                f"{len(classes) - 1}"
            )
        taken.append(name)
    skipped.end(len(names), str(folder))
    if not taken:
        raise ModelError(f"no picture of the data folder {str(folder)!r} can be read")
    if values[IGNORED] and not values[1:IGNORED].any():
        raise ModelError(
            f"the masks of {str(folder)!r} have no other values than {'0 and ' if values[0] else ''}255, and 255 means "
            "a pixel of no class, which is neither trained on nor scored: where it means the object, write 1 instead "
            "(classes are numbered from 0, the background)"
        )
    x, y = x[: len(taken)], y[: len(taken)]
    if classes is None:
        count = int(y[y != IGNORED].max(initial=0)) + 1
        classes = ("background", *(str(index) for index in range(1, count)))
    tensor = torch.from_numpy(x).permute(0, 3, 1, 2).float().div_(255.0)
    test = torch.tensor([name in tests for name in taken]) if tests else None
    return Images(tensor.contiguous(), torch.from_numpy(y), classes, test)


def _pair(picture: Path, path: Path) -> tuple[Image, Image]:
    """A picture as it is seen, and its mask of indices in mode L.

    Raises PictureError for what cannot be decoded, and ModelError for a mask that does not fit.
    """
    from PIL import Image

    rgb, orientation = read_turned(picture)
    mask = opened(path)
    try:
        mask.load()
        turn = orientation_of(mask)
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise PictureError(f"cannot read the image {str(path)!r}: {' '.join(str(error).split())}") from None
    if mask.mode not in ("P", "L", "1"):
        raise ModelError(
            f"the mask {str(path)!r} must hold palette indices or grey values, not {mask.mode}: the numbers of classes"
        )
    # As grey values: pillow would mix palettes, and resize only those without.
    indices = Image.fromarray(np.asarray(mask).astype(np.uint8))
    indices = turned(indices, turn)
    if indices.size != rgb.size and turned(indices, orientation).size == rgb.size:
        indices = turned(indices, orientation)
    if indices.size != rgb.size:
        raise ModelError(
            f"the mask {str(path)!r} has {indices.size[0]}x{indices.size[1]} pixels, "
            f"its image {rgb.size[0]}x{rgb.size[1]}"
        )
    return rgb, indices


def _names(folder: Path) -> tuple[list[str], set[str]]:
    """All names, sorted, and those of test images."""
    lists = {path.stem: set(_lines(path)) for path in sorted((folder / LISTS).glob("*.txt"))}
    if not lists:
        return sorted(path.stem for path in (folder / MASKS).glob("*.png") if is_picture(path)), set()
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


def _fit(image: Image, size: int, resampling: str) -> Image:
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (size, size), Image.Resampling[resampling])

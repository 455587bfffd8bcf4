"""Folders with one folder of images per class, read into memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ...errors import ModelError, PictureError
from .base import CHANNELS, Images, check_memory
from .listing import list_folder
from .pictures import Skipped, check_pillow, read_picture


def load_folder(folder: Path, image_size: int, strict: bool = False) -> Images:
    """Read ``folder/<class>/<image>``: as it is seen, the centre square resized to ``image_size``.

    Files that cannot be read are skipped, with a warning each; ``strict``: the first is an error.

    Raises:
        ModelError: no class folders, a class folder without images that can be read (named).
    """
    check_pillow(folder)
    from PIL import Image, ImageOps

    listing = list_folder(folder)
    check_memory(len(listing.files), image_size, str(folder))
    x = np.empty((len(listing.files), image_size, image_size, CHANNELS), np.uint8)
    y: list[int] = []
    skipped = Skipped(strict)
    for path, label in listing.files:
        try:
            rgb = read_picture(path, image_size)
        except PictureError as error:
            skipped.add(error)
            continue
        x[len(y)] = np.asarray(ImageOps.fit(rgb, (image_size, image_size), Image.Resampling.BILINEAR))
        y.append(label)
    skipped.end(len(listing.files), str(folder))
    if lacking := sorted(set(range(len(listing.classes))) - set(y)):
        raise ModelError(f"no image of the class folder {str(folder / listing.classes[lacking[0]])!r} can be read")
    tensor = torch.from_numpy(x[: len(y)]).permute(0, 3, 1, 2).float().div_(255.0)
    return Images(tensor.contiguous(), torch.tensor(y), listing.classes)

"""Folders with one folder of images per class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ...errors import ModelError
from .base import CHANNELS, Images, check_memory

#: Files read from a class folder.
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


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
    check_memory(count, image_size, str(folder))
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

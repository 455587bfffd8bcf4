"""Folders of generated photographs that a tiny network learns, for the tests of jobs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

#: One colour is strongest in each class's pictures.
CLASSES = ("blaue Bären", "grün", "красный")


def photo(label: int, seed: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    """A picture of one class, noise on its colour; ``size``: width, height."""
    rng = np.random.default_rng([seed, label])
    pixels = rng.integers(0, 90, (size[1], size[0], 3))
    pixels[..., 2 - label] += 150
    return Image.fromarray(pixels.astype(np.uint8))


def photos(folder: Path, per_class: int = 10, first: int = 0, size: tuple[int, int] = (12, 10)) -> str:
    """Write ``per_class`` pictures of each class into a folder of its own."""
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            photo(label, first + number, size).save(folder / name / f"{number} ✿.png")
    return str(folder)

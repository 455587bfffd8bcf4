"""Scenes composed of real digit images, with a label for every pixel: segmentation without a download."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import CHANNELS, Images, check_memory
from .digits import read_digits

#: Scenes in the data set; the last quarter is for testing and made of digits that the others do not show.
#: Networks learn the digits from nothing, which takes thousands of scenes.
SCENES, TEST_SHARE = 4800, 0.25

#: Digits in a scene, at least and at most, and how many places are tried for one before it is left out.
DIGITS, PLACES = (2, 4), 8

#: Sides of a digit as shares of the scene's.
SIDES = (0.35, 0.55)

#: A pixel belongs to a digit from this much ink on in the nearest of the digit's own 8x8 pixels and their neighbours:
#: strokes with a rim and filled loops, which the coarse maps of a segmentation network can resolve.
INK = 0.5


def load_scenes(image_size: int, seed: int = 0) -> Images:
    """Make the scenes: classes ``background`` and the ten digits.

    Each has up to ``DIGITS[1]`` of scikit-learn's digits side by side, random in place, size, brightness and tint, on a
    background of random colours and noise. Equal arguments give equal scenes, digits and places; others at every seed.

    Raises:
        ModelError: scikit-learn is missing, or the scenes do not fit into memory.
    """
    digits, labels = read_digits("scenes")
    check_memory(SCENES, image_size, "scenes")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    test_from = round(SCENES * (1 - TEST_SHARE))
    pools = (order[round(len(order) * TEST_SHARE) :], order[: round(len(order) * TEST_SHARE)])
    x = _backgrounds(SCENES, image_size, generator)
    y = torch.zeros(SCENES, image_size, image_size, dtype=torch.uint8)
    for number in range(SCENES):
        pool = pools[number >= test_from]
        count = int(torch.randint(DIGITS[0], DIGITS[1] + 1, (), generator=generator))
        chosen = pool[torch.randint(len(pool), (count,), generator=generator)]
        _compose(x[number], y[number], digits[chosen], labels[chosen] + 1, generator)
    classes = ("background", *(str(d) for d in range(10)))
    return Images(x.clamp_(0, 1), y, classes, torch.arange(SCENES) >= test_from)


def _backgrounds(count: int, size: int, generator: torch.Generator) -> Tensor:
    """(count, 3, size, size) in 0..0.4: colours that change slowly, and noise."""
    coarse = torch.rand(count, CHANNELS, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    return smooth.mul_(0.3).add_(torch.rand(count, CHANNELS, size, size, generator=generator), alpha=0.1)


def _compose(x: Tensor, y: Tensor, digits: Tensor, labels: Tensor, generator: torch.Generator) -> None:
    """Draw ``digits`` (k, 1, 8, 8) into the image ``x`` (3, s, s) and their ``labels`` (k) into the mask ``y``."""
    size = x.shape[-1]
    low, high = (max(round(share * size), 1) for share in SIDES)
    taken: list[tuple[int, int, int]] = []  # top, left and side of the digits drawn
    for digit, label in zip(digits, labels, strict=True):
        side = int(torch.randint(low, high + 1, (), generator=generator))
        light, tint = torch.rand(2, CHANNELS, 1, 1, generator=generator)
        for top, left in torch.randint(size - side + 1, (PLACES, 2), generator=generator).tolist():
            if all(top + side <= t or t + s <= top or left + side <= u or u + s <= left for t, u, s in taken):
                break
        else:
            continue
        taken.append((top, left, side))
        both = torch.cat([digit, F.max_pool2d(digit, 3, stride=1, padding=1)])[None]
        ink, body = F.interpolate(both, size=(side, side), mode="bilinear", align_corners=False)[0]
        place = (..., slice(top, top + side), slice(left, left + side))
        colour = (0.7 + 0.3 * light[:1]) * (0.8 + 0.2 * tint)
        x[place] = torch.lerp(x[place], colour, ink)
        y[place][body >= INK] = int(label)

"""What all loaders give: images with labels or masks, split for the protocol, all in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch.nn.functional as F
from torch import Tensor

from ...errors import ModelError
from ...machine.cpu import available_bytes

CHANNELS = 3

#: Label of pixels that belong to no class: neither trained on nor scored.
IGNORED = 255

PARTS = ("pretrain_train", "pretrain_test", "finetune_train", "finetune_test")


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
        x: (n, 3, size, size) float32.
        y: indices into ``classes``: of the images, (n) int64; or of their pixels, (n, size, size) uint8, where
            ``IGNORED`` stands for no class.
        test: (n) bool, which of the images the data's makers set aside for testing; None if they did not.
    """

    x: Tensor
    y: Tensor
    classes: tuple[str, ...]
    test: Tensor | None = None

    @property
    def has_masks(self) -> bool:
        """Whether pixels are labelled, not images."""
        return self.y.dim() == 3

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


def check_memory(count: int, image_size: int, data: str, raw: int = 0) -> None:
    """Raise ModelError if ``count`` images would not fit into memory, before the system kills the process.

    Args:
        raw: bytes that they take before they are resized.
    """
    resized = count * CHANNELS * image_size**2 * 4
    needed = max(raw + resized, 3 * resized)  # as read, as split, and what it takes to normalise them
    available = available_bytes()
    if available is not None and needed > available:
        raise ModelError(
            f"{count} images of {image_size}x{image_size} pixels from {data!r} need {needed / 1e9:.3g} GB of memory, "
            f"{available / 1e9:.3g} GB are available; a smaller image size may do"
        )


def resize(x: Tensor, image_size: int) -> Tensor:
    """(n, c, h, w) -> (n, 3, image_size, image_size); grey images get three equal channels."""
    if x.shape[-2:] != (image_size, image_size):
        size = (image_size, image_size)
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
    return x.expand(-1, CHANNELS, -1, -1).contiguous()

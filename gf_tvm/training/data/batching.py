"""Batches, shuffled and moved at random."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import IGNORED, Images
from .photos import Photos


def steps(images: Images | Photos, batch: int) -> int:
    """Full batches of an epoch."""
    return images.steps(batch) if isinstance(images, Photos) else len(images) // batch


def batches(
    images: Images | Photos,
    batch: int,
    generator: torch.Generator | None = None,
    flip: bool = False,
    shift: int = 0,
    drop_last: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over batches (x (batch, 3, size, size), y (batch)), or masks y (batch, size, size).

    Args:
        generator: shuffles the images and draws flips and shifts; None keeps their order.
        flip: mirror each image left-right with probability 1/2, and its mask with it; needs ``generator``.
        shift: move each image by up to that many pixels along both axes, zeros (the mean) following, and its mask
            with it, ``IGNORED`` following; needs ``generator``.
        drop_last: leave out a last batch that is not full (:class:`Photos` fill it up). Training does: kernels are
            compiled for one batch size.
    """
    if isinstance(images, Photos):
        if flip or shift:
            raise ValueError("photographs are augmented in their own way")
        yield from images.batches(batch, generator, drop_last)
        return
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
            if images.has_masks:
                y = torch.where(mirrored[:, None, None], y.flip(-1), y)
        if shift:
            corners = torch.randint(0, 2 * shift + 1, (len(index), 2), generator=generator).tolist()
            x = _moved(x, corners, shift, 0)
            if images.has_masks:
                y = _moved(y, corners, shift, IGNORED)
        yield x, y


def _moved(maps: Tensor, corners: list[list[int]], shift: int, fill: int) -> Tensor:
    """Maps (n, ..., h, w) padded by ``shift`` with ``fill`` and cropped to their size at ``corners``."""
    h, w = maps.shape[-2:]
    padded = F.pad(maps, (shift, shift, shift, shift), value=fill)
    return torch.stack([one[..., i : i + h, j : j + w] for one, (i, j) in zip(padded, corners, strict=True)])

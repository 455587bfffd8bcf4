"""The two parts of the protocol, each in train and test."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ModelError
from .base import Images


def split_labels(images: Images) -> Tensor:
    """The class by which the split takes each image, (n) int64: its label, or the foreground class (any but the
    first) of most of its pixels; the first class where there is no foreground."""
    if not images.has_masks:
        return images.y
    counts = torch.stack([(images.y == label).sum(dim=(1, 2)) for label in range(1, len(images.classes))], dim=1)
    most, label = counts.max(dim=1)
    return torch.where(most > 0, label + 1, 0)


def _rounded(count: int, share: float, least: int = 1) -> int:
    """``share`` of ``count`` images as a whole number; where there are enough, ``least`` of them on either side."""
    least = min(least, count // 2)
    return min(max(round(count * share), least), count - least)


def split_parts(
    y: Tensor,
    num_classes: int,
    seed: int = 0,
    skew: float = 0.9,
    test_fraction: float = 0.25,
    test: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split into two parts with different class distributions, each in train and test.

    Half of the classes (drawn by ``seed``, rounded up) belong mainly to part A: a share ``skew`` of their images goes
    to A and the rest to B; the other classes the other way round. So every class is known to both parts, the sizes
    are about equal, and ``skew`` sets the distance from 0.5 (same distribution) to 1 (no common class). A share
    ``test_fraction`` of each class in each part is its test set. Shares are rounded to whole images, but where a class
    has images enough, each part has at least one of it to train on (unless ``skew`` is 1), and one more to test with.

    Where the data's makers have set test images aside (``test``, (n) bool), ``test_fraction`` does not count:
    training and test images are distributed to the parts apart, and each part's test set is its share of the latter.

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
        share = skew if label in main_a else 1.0 - skew
        if test is not None:
            for offset, group in enumerate((members[~test[members]], members[test[members]])):
                share_a = _rounded(len(group), share, int(skew < 1.0))
                parts[offset].append(group[:share_a])
                parts[2 + offset].append(group[share_a:])
            continue
        share_a = _rounded(len(members), share, 2 * int(skew < 1.0))
        for first, part in ((0, members[:share_a]), (2, members[share_a:])):
            tested = _rounded(len(part), test_fraction)
            parts[first].append(part[tested:])
            parts[first + 1].append(part[:tested])
    joined = [torch.cat(part) for part in parts]
    return joined[0], joined[1], joined[2], joined[3]

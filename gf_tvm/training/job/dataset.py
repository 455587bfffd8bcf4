"""Pictures to train on and to look at meanwhile: all that somebody has, each class in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import ModelError
from ...models import Preprocessing
from ..data import Images, Photos, load_images
from ..data.cifar import SIDE, is_cifar
from ..data.listing import Listing, list_folder, split_folders
from ..data.photos import Source, check_headers
from ..data.pictures import Skipped, check_pillow
from ..data.voc import is_voc

#: Pixels per side of digits before they are enlarged.
_DIGITS = 8


@dataclass(frozen=True)
class Pictures:
    """What was found, in two parts.

    Attributes:
        classes: names in the order of the labels.
        train, validation: (picture, label).
        how: one line: which pictures are in which part.
        skipped: takes broken files, those found so far included.
    """

    classes: tuple[str, ...]
    train: Sequence[tuple[Source, int]]
    validation: Sequence[tuple[Source, int]]
    how: str
    skipped: Skipped

    def photos(self, preprocessing: Preprocessing, augment: bool) -> tuple[Photos, Photos]:
        """Both parts as a network's weights want them; the second one is never augmented."""
        parts = []
        for part, random in ((self.train, augment), (self.validation, False)):
            sources, labels = [source for source, _ in part], [label for _, label in part]
            parts.append(Photos(sources, labels, self.classes, preprocessing, augment=random, skipped=self.skipped))
        return parts[0], parts[1]


def find_pictures(data: str, share: float, seed: int, skipped: Skipped, size: int) -> Pictures:
    """Find a data set's pictures and divide them.

    Args:
        data: as in :class:`~.config.JobConfig`.
        share: of each class for validation, where the data do not say; at least one picture, and all but one.
        seed: draws them.
        skipped: takes files that are no pictures.
        size: pixels per side of images from an ``.npz``.

    Raises:
        ModelError: nothing usable there; a class of one picture (named); a class that is only in ``val`` (named).
    """
    path = Path(data)
    if data != "digits" and path.is_dir() and not is_cifar(path):
        if is_voc(path):
            raise ModelError(f"{data!r} has masks, and this job is for labels of images: use --protocol paper")
        return _folder(path, share, seed, skipped)
    if data == "scenes":
        raise ModelError("'scenes' has masks, and this job is for labels of images: use --protocol paper")
    side = _DIGITS if data == "digits" else SIDE if path.is_dir() else size
    images = load_images(data, side, seed)
    found = list(zip(_bytes(images), images.y.tolist(), strict=True))
    if images.test is not None:
        train, validation = ([found[i] for i in mask.nonzero().flatten()] for mask in (~images.test, images.test))
        return Pictures(images.classes, train, validation, _told(train, validation, "as the data say"), skipped)
    return _split(images.classes, found, share, seed, skipped, data)


def _bytes(images: Images) -> list[np.ndarray[Any, Any]]:
    """(h, w, 3) uint8 of each image."""
    pixels = images.x.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return list(pixels.numpy())


def _folder(folder: Path, share: float, seed: int, skipped: Skipped) -> Pictures:
    check_pillow(folder)
    divided = split_folders(folder)
    if divided is None:
        listing = list_folder(folder)
        return _split(listing.classes, _usable(listing, folder, skipped), share, seed, skipped, str(folder))
    train, validation = divided
    listing = list_folder(train)
    files = _usable(listing, train, skipped)
    if validation is None:
        return _split(listing.classes, files, share, seed, skipped, str(train))
    other = list_folder(validation)
    if unknown := sorted(set(other.classes) - set(listing.classes)):
        raise ModelError(f"the class {unknown[0]!r} is in {str(validation)!r}, but not in {str(train)!r}")
    numbers = [listing.classes.index(name) for name in other.classes]
    watched = [(path, numbers[label]) for path, label in _usable(other, validation, skipped)]
    _check_classes(listing.classes, str(folder))
    how = _told(files, watched, f"as the folders {train.name!r} and {validation.name!r} say")
    return Pictures(listing.classes, files, watched, how, skipped)


def _usable(listing: Listing, folder: Path, skipped: Skipped) -> list[tuple[Source, int]]:
    """Files that begin as pictures do. Raises ModelError where a class has none."""
    files = check_headers(listing.files, skipped)
    if lacking := sorted(set(range(len(listing.classes))) - {label for _, label in files}):
        name = listing.classes[lacking[0]]
        raise ModelError(f"no image of the class folder {str(folder / name)!r} can be read")
    return [*files]


def _check_classes(classes: tuple[str, ...], data: str) -> None:
    if len(classes) < 2:
        raise ModelError(f"data {data!r} has {len(classes)} class ({classes[0]}), at least 2 are needed")


def _split(
    classes: tuple[str, ...],
    files: Sequence[tuple[Source, int]],
    share: float,
    seed: int,
    skipped: Skipped,
    data: str,
) -> Pictures:
    """A share of each class for validation, drawn by ``seed``."""
    _check_classes(classes, data)
    generator = torch.Generator().manual_seed(seed)
    chosen: set[int] = set()
    for label, name in enumerate(classes):
        members = [number for number, (_, other) in enumerate(files) if other == label]
        if len(members) < 2:
            raise ModelError(
                f"the class {name!r} of {data!r} has {len(members)} picture, and at least 2 are needed: one to train "
                "on, one for validation"
            )
        count = min(max(round(len(members) * share), 1), len(members) - 1)
        chosen.update(members[i] for i in torch.randperm(len(members), generator=generator)[:count].tolist())
    train = [file for number, file in enumerate(files) if number not in chosen]
    validation = [files[number] for number in sorted(chosen)]
    how = _told(train, validation, f"{100 * share:g} % of each class for validation, drawn by seed {seed}")
    return Pictures(classes, train, validation, how, skipped)


def _told(train: Sequence[object], validation: Sequence[object], how: str) -> str:
    return f"{len(train)} pictures to train on, {len(validation)} for validation ({how})"

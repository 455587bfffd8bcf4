"""Photographs that are decoded when they are wanted: a data set may be larger than memory.

What is kept of a picture is a copy of the size that training needs, while there is room. Decoding runs beside training,
in threads (Pillow decodes outside of Python's lock), a bounded number of pictures ahead.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ModelError, PictureError
from ...machine import cpu
from ...models import Preprocessing
from .pictures import Skipped, read_picture

if TYPE_CHECKING:
    from PIL.Image import Image

#: Decoded pictures may take this share of the memory that is available when training begins.
MEMORY_SHARE = 0.25

#: Of pictures much longer than high, or higher than long, the ends are cut off: the longer side has at most so many
#: times the shorter one's pixels.
LONGEST = 2.0

#: Random crops have these shares of a picture's area, and these ratios of width to height.
AREA, RATIO = (0.35, 1.0), (3 / 4, 4 / 3)

#: Threads that decode.
DECODERS = 4

#: A picture's file, or its pixels: (h, w, 3) uint8.
Source = Path | np.ndarray[Any, Any]


class Kept:
    """Decoded pictures by key, as many as there is room for; the first ones stay."""

    def __init__(self, limit: int | None = None) -> None:
        """``limit``: bytes; by default ``MEMORY_SHARE`` of what is available."""
        if limit is None:
            available = cpu.available_bytes()
            limit = 256 << 20 if available is None else int(MEMORY_SHARE * available)
        self.limit, self.bytes = limit, 0
        self._pictures: dict[int, np.ndarray[Any, Any]] = {}
        self._lock = threading.Lock()

    def get(self, key: int) -> np.ndarray[Any, Any] | None:
        """The picture, if it was kept."""
        return self._pictures.get(key)

    def put(self, key: int, picture: np.ndarray[Any, Any]) -> None:
        """Keep it, if there is room."""
        with self._lock:
            if key not in self._pictures and self.bytes + picture.nbytes <= self.limit:
                self._pictures[key] = picture
                self.bytes += picture.nbytes


class Photos:
    """Labelled photographs, prepared for a network as its weights want it.

    Attributes:
        classes: names in the order of the labels.
        y: indices into ``classes``, (n) int64.
        has_masks: False: images are labelled, not pixels.
    """

    has_masks = False

    def __init__(
        self,
        sources: Sequence[Source],
        y: Sequence[int],
        classes: tuple[str, ...],
        preprocessing: Preprocessing,
        *,
        augment: bool = False,
        kept: Kept | None = None,
        skipped: Skipped | None = None,
    ) -> None:
        """
        Args:
            sources, y: the pictures and their labels.
            augment: where batches are shuffled, show a random part of each picture, mirrored or not.
            kept: takes decoded pictures; with a limit of its own by default.
            skipped: is told of broken files, which are left out from then on.
        """
        self._sources, self.classes, self.preprocessing, self.augment = sources, classes, preprocessing, augment
        self.y = torch.tensor(y, dtype=torch.int64)
        self._kept, self._skipped = kept or Kept(), skipped or Skipped()
        self._broken: set[int] = set()

    def __len__(self) -> int:
        return len(self._sources)

    def steps(self, batch: int) -> int:
        """Batches of an epoch; the last one is filled up, so every picture is in one."""
        return -(-len(self) // batch)

    @property
    def digest(self) -> str:
        """sha256 of names, sizes and labels of all files (of pixels, where they are no files): equal for equal data."""
        h = hashlib.sha256("\0".join(self.classes).encode(errors="surrogateescape"))
        for source, label in zip(self._sources, self.y.tolist(), strict=True):
            if isinstance(source, Path):
                about = f"{source.parent.name}/{source.name} {source.stat().st_size}"
                h.update(f"{about} {label}\0".encode(errors="surrogateescape"))
            else:
                h.update(f"{source.shape} {label}\0".encode())
                h.update(np.ascontiguousarray(source).data)
        return h.hexdigest()

    def batches(
        self, batch: int, generator: torch.Generator | None = None, drop_last: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over batches (x (batch, 3, size, size) float32, y (batch)).

        Args:
            generator: shuffles the pictures and, where they are augmented, draws how; None keeps their order.
            drop_last: all batches are full: the last one is filled up with pictures of the first.

        Raises:
            ModelError: no picture can be read. PictureError: a broken one, where that is wanted.
        """
        n = len(self)
        order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
        if drop_last:
            order = order.repeat(-(-batch // n) + 1)[: self.steps(batch) * batch]
        draws = None
        if generator is not None and self.augment:
            draws = torch.rand(len(order), 5, generator=generator, dtype=torch.float64).tolist()
        wanted = [(int(index), None if draws is None else draws[at]) for at, index in enumerate(order.tolist())]
        full: list[tuple[Any, int]] = []
        spare = iter(order.tolist())
        for index, pixels in self._decoded(wanted, 2 * batch):
            while pixels is None and drop_last:  # a broken file's place goes to another picture
                index = next(spare, None)  # type: ignore[assignment]
                if index is None:
                    raise ModelError("no picture of the data can be read")
                pixels = self._prepared(index, None)
            if pixels is not None:
                full.append((pixels, index))
            if len(full) == batch:
                yield self._batch(full)
                full = []
        if full:
            yield self._batch(full)

    def _batch(self, pictures: list[tuple[Any, int]]) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(np.stack([pixels for pixels, _ in pictures]))
        x = pixels.permute(0, 3, 1, 2).float().div_(255.0).contiguous()
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.preprocessing.mean, self.preprocessing.std))
        return x.sub_(mean).div_(std), self.y[[index for _, index in pictures]]

    def _decoded(
        self, wanted: list[tuple[int, list[float] | None]], ahead: int
    ) -> Iterator[tuple[int, np.ndarray[Any, Any] | None]]:
        """The pictures in their order, None for a broken one; up to ``ahead`` of them are prepared beforehand."""
        running: deque[tuple[int, Future[np.ndarray[Any, Any] | None]]] = deque()
        pool = ThreadPoolExecutor(min(DECODERS, cpu.usable_cores()), "decoder")
        try:
            for index, draw in wanted:
                running.append((index, pool.submit(self._prepared, index, draw)))
                if len(running) > ahead:
                    first, future = running.popleft()
                    yield first, future.result()
            while running:
                first, future = running.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _prepared(self, index: int, draw: list[float] | None) -> np.ndarray[Any, Any] | None:
        """(size, size, 3) uint8: the centre, or the part that ``draw`` says; None if the file is broken."""
        from PIL import Image

        picture = self._kept.get(index)
        if picture is None:
            if index in self._broken:
                return None
            try:
                picture = self._read(index)
            except PictureError as error:
                if index not in self._broken:
                    self._broken.add(index)
                    self._skipped.add(error)
                return None
            self._kept.put(index, picture)
        height, width = picture.shape[:2]
        size, filter_ = self.preprocessing.size, Image.Resampling[self.preprocessing.interpolation.upper()]
        if draw is None:
            # Rounded as torchvision does.
            top, left = round((height - size) / 2), round((width - size) / 2)
            return picture[top : top + size, left : left + size]
        left, top, w, h = crop_box(width, height, draw)
        image = Image.fromarray(picture).resize((size, size), filter_, box=(left, top, left + w, top + h))
        pixels = np.asarray(image)
        return pixels[:, ::-1] if draw[4] < 0.5 else pixels

    def _read(self, index: int) -> np.ndarray[Any, Any]:
        """A picture whose shorter side has ``resize`` pixels."""
        from PIL import Image

        source, side = self._sources[index], self.preprocessing.resize
        image = read_picture(source, side) if isinstance(source, Path) else Image.fromarray(source)
        return np.asarray(fitted(image, side, self.preprocessing.interpolation))


def fitted(image: Image, side: int, interpolation: str) -> Image:
    """``image`` with ``side`` pixels on its shorter side, and at most ``LONGEST`` times as many on the longer one."""
    from PIL import Image

    width, height = image.size
    short = min(width, height)
    if max(width, height) > LONGEST * short:
        w, h = min(width, int(LONGEST * short)), min(height, int(LONGEST * short))
        left, top = (width - w) // 2, (height - h) // 2
        image = image.crop((left, top, left + w, top + h))
        width, height = image.size
    size = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    if image.size == size:
        return image
    return image.resize(size, Image.Resampling[interpolation.upper()])


def crop_box(width: int, height: int, draw: Sequence[float]) -> tuple[float, float, float, float]:
    """Left, top, width and height of a random part of a picture.

    Args:
        width, height: of the picture.
        draw: numbers in 0..1 for area, ratio, and the place along both axes.
    """
    area = width * height * (AREA[0] + (AREA[1] - AREA[0]) * draw[0])
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    ratio = math.exp(low + (high - low) * draw[1])
    w, h = min(math.sqrt(area * ratio), width), min(math.sqrt(area / ratio), height)
    return (width - w) * draw[2], (height - h) * draw[3], w, h


def check_headers(files: Sequence[tuple[Path, int]], skipped: Skipped) -> list[tuple[Path, int]]:
    """Those files that begin as a picture does: the others would only be found out while training."""
    from .pictures import opened

    good = []
    for path, label in files:
        try:
            with opened(path):
                good.append((path, label))
        except PictureError as error:
            skipped.add(error)
    return good

"""Keeps what the frozen layers compute: the same in every epoch, where nothing random precedes the first trained layer.

The values are computed in batches of the configured size (the last one filled up with images that were there already),
so that every kernel sees the shapes it sees without the cache. They equal those of a batch with the same images bit
for bit; in a batch of others the last bits may differ where a kernel adds up in an order that depends on an image's
place. A run with the cache is reproducible in itself: memory or disk, resumed or not, gives the same bits.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..machine import cpu
from . import feature_files as files
from .checkpoint import file_name, state_digest
from .config import TrainConfig
from .cut import CannotSplit, Split, split
from .data import Images

#: The cache may take this share of the memory that is available: training needs some, too.
MEMORY_SHARE = 0.5


@dataclass
class CacheReport:
    """What became of the cache.

    Attributes:
        kind: ``memory``, ``disk`` or ``off``; reason: why off, else None.
        bytes: of all kept values.
        hits: images that were taken from the cache instead of through the frozen layers.
        reused: whether the values were found on disk.
        notes: one line for each file that was refused.
    """

    kind: str = "off"
    reason: str | None = None
    bytes: int = 0
    hits: int = 0
    reused: bool = False
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "notes": list(self.notes)}


class Features:
    """The kept values of one set of images; called with image numbers in place of images, gives the model's output."""

    def __init__(self, parts: Split, images: Images, values: list[Any], report: CacheReport) -> None:
        """``values``: a tensor (n, ...) with one entry per image, or what is the same for all images."""
        self.rest, self._values, self.report = parts.rest, values, report
        #: In place of the images, for :func:`~.data.batches`: their numbers.
        self.numbers = replace(images, x=torch.arange(len(images)))

    def __call__(self, numbers: Tensor) -> Any:
        """Image numbers (batch) -> the model's output for these images."""
        self.report.hits += len(numbers)
        # Copies: a layer of the rest may work in place.
        return self.rest(*(v.tensor[numbers] if isinstance(v, PerImage) else deepcopy(v) for v in self._values))


@dataclass(frozen=True)
class PerImage:
    """Values of all images: (n, ...)."""

    tensor: Tensor


@dataclass(frozen=True)
class FrozenCache:
    """The kept values for training and for testing."""

    train: Features
    test: Features


def build(
    config: TrainConfig,
    model: nn.Module,
    train: Images,
    test: Images,
    *,
    training_mode: Callable[[], object],
    precision: Callable[[], AbstractContextManager[Any]],
    digest: str,
    folder: Path | None,
) -> tuple[FrozenCache | None, CacheReport]:
    """Compute the values for both sets of images, or say why not.

    Args:
        config: whose ``cache`` says what is wanted.
        model: frozen where parameters require no gradient.
        training_mode: puts the model into the mode of a training step.
        precision: the context in which the model runs.
        digest: of the data set; folder: of a disk cache, None where there is none.
    """
    sets, report = plan(config, model, train, test, training_mode, precision, folder)
    if report.kind == "off":
        return None, report
    reused = []
    features = []
    try:
        for entry in sets:
            entry.enter()
            with precision(), torch.no_grad():
                values, found = _values(entry, config, digest, folder if report.kind == "disk" else None, report)
            reused.append(found)
            features.append(Features(entry.parts, entry.images, values, report))
    except OSError as error:
        return None, CacheReport(reason=f"cannot write it: {error.strerror or error}", notes=report.notes)
    report.reused = all(reused)
    return FrozenCache(*features), report


def plan(
    config: TrainConfig,
    model: nn.Module,
    train: Images,
    test: Images,
    training_mode: Callable[[], object],
    precision: Callable[[], AbstractContextManager[Any]],
    folder: Path | None,
) -> tuple[list[_Set], CacheReport]:
    """What :func:`build` would keep and where, or why nothing; arguments as there. Computes a few batches.

    Returns the sets of images, none where the report's kind is ``off``, and the report.
    """
    report = CacheReport()
    if config.cache == "off":
        report.reason = "not wanted"
    elif config.flip or config.shift:
        report.reason = "training images are flipped or shifted at random"
    if report.reason is not None:
        return [], report
    sets: list[_Set] = []
    try:
        with precision():
            for name, images, enter in (("train", train, training_mode), ("test", test, model.eval)):
                parts = split(model, images.x[: min(config.batch, len(images))], enter)
                enter()
                sets.append(_Set(name, images, parts, _layout(parts, images), enter))
    except CannotSplit as error:
        report.reason = f"the frozen part cannot be cut off: {error}"
        return [], report
    size = sum(entry.bytes for entry in sets)
    report.kind, report.reason = _place(config.cache, size, folder)
    if report.kind == "off":
        return [], report
    report.bytes = size
    return sets, report


@dataclass(frozen=True)
class _Set:
    """One set of images: its network in two parts, and what crosses the cut (a ``TensorSpec`` per tensor)."""

    name: str
    images: Images
    parts: Split
    layouts: list[files.TensorSpec | Any]
    enter: Callable[[], object]

    @property
    def tensors(self) -> list[files.TensorSpec]:
        return [layout for layout in self.layouts if isinstance(layout, files.TensorSpec)]

    @property
    def bytes(self) -> int:
        return sum(layout.bytes for layout in self.tensors)


def _layout(parts: Split, images: Images) -> list[files.TensorSpec | Any]:
    """What crosses the cut, found by trying two sizes of batches: a layout for what has a value per image, else the
    value itself. Raises CannotSplit for what is neither."""
    if len(images) < 2:
        raise CannotSplit("there is only one image")
    with torch.no_grad():
        two, one = parts.frozen(images.x[:2].clone()), parts.frozen(images.x[:1].clone())
    layouts: list[files.TensorSpec | Any] = []
    for a, b in zip(two, one, strict=True):
        if isinstance(a, Tensor) and a.dim() and (len(a), len(b)) == (2, 1) and a.shape[1:] == b.shape[1:]:
            layouts.append(files.TensorSpec((len(images), *a.shape[1:]), a.dtype))
        elif type(a) is type(b) and (torch.equal(a, b) if isinstance(a, Tensor) else _plain(a) and a == b):
            layouts.append(a)
        else:
            raise CannotSplit(f"a {type(a).__name__} that depends on the batch crosses the cut")
    return layouts


def _plain(value: Any) -> bool:
    """Whether ``==`` compares all of it."""
    if isinstance(value, tuple | list):
        return all(map(_plain, value))
    return value is None or isinstance(value, int | float | str | torch.dtype | torch.device)


def _place(wanted: str, size: int, folder: Path | None) -> tuple[str, str | None]:
    """Where ``size`` bytes go: the kind of cache, and why it is off."""
    available = cpu.available_bytes()
    fits = available is None or size <= MEMORY_SHARE * available
    short = "" if available is None else f"{size / 1e9:.3g} GB are too much for memory ({available / 1e9:.3g} GB free)"
    if wanted in ("auto", "memory") and fits:
        return "memory", None
    if wanted == "memory":
        return "off", short
    if folder is None:
        return "off", f"{short}, and there is no checkpoint folder"
    free = shutil.disk_usage(folder).free
    if size <= free:
        return "disk", None
    return "off", f"{size / 1e9:.3g} GB are too much for the disk of {str(folder)!r} ({free / 1e9:.3g} GB free)"


def _values(
    entry: _Set, config: TrainConfig, digest: str, folder: Path | None, report: CacheReport
) -> tuple[list[Any], bool]:
    """The values of all images, and whether they were found on disk."""
    if folder is None:
        tensors = [torch.empty(layout.shape, dtype=layout.dtype) for layout in entry.tensors]
        for start, values in _computed(entry, config.batch):
            for tensor, value in zip(tensors, values, strict=True):
                tensor[start : start + len(value)] = value
        return _joined(entry, tensors), False
    identity = _identity(entry, config, digest)
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / file_name(f"features-{config.model}-{entry.name}-{key}.bin")
    found = None
    try:
        found = files.read(path, identity, entry.tensors)
        if found is not None and not _agrees(entry, found, config.batch):
            raise files.Refused("its values are not those that the model computes")
    except files.Refused as error:
        report.notes += (f"the features in {str(path)!r} were refused ({error}) and made anew",)
        found = None
    if found is not None:
        return _joined(entry, found), True
    files.write(path, identity, entry.tensors, _computed(entry, config.batch))
    found = files.read(path, identity, entry.tensors)
    if found is None:
        raise OSError(f"{str(path)!r} disappeared")
    return _joined(entry, found), False


def _joined(entry: _Set, tensors: list[Tensor]) -> list[Any]:
    """What crosses the cut, in its order."""
    rest = iter(tensors)
    return [PerImage(next(rest)) if isinstance(layout, files.TensorSpec) else layout for layout in entry.layouts]


def _identity(entry: _Set, config: TrainConfig, digest: str) -> dict[str, Any]:
    """What decides the values."""
    frozen = entry.parts.frozen
    return {
        "weights": state_digest(frozen.state_dict()),
        # Settings such as strides are in the modules' printed form, not in the weights.
        "network": hashlib.sha256(f"{config.model}\n{frozen.code}\n{nn.Module.__repr__(frozen)}".encode()).hexdigest(),
        "dataset": digest,
        "images": f"{entry.name} {tuple(entry.images.x.shape)} {entry.images.x.dtype}",
        "amp": config.amp,
        "batch": config.batch,
        "torch": torch.__version__,
    }


def _computed(entry: _Set, batch: int, first: int | None = None) -> Any:
    """Iterate over (number of the first image, one tensor per layout) for all images, or for ``first`` batches."""
    count = len(entry.images)
    starts = range(0, count, batch)
    for start in starts if first is None else starts[:first]:
        # The last batch is filled up from the beginning: kernels are chosen by shape.
        numbers = torch.arange(start, start + batch) % count
        results = entry.parts.frozen(entry.images.x[numbers])
        kept = min(batch, count - start)
        yield (
            start,
            [
                value[:kept]
                for value, layout in zip(results, entry.layouts, strict=True)
                if isinstance(layout, files.TensorSpec)
            ],
        )


def _agrees(entry: _Set, tensors: list[Tensor], batch: int) -> bool:
    """Whether the first batch gives what was kept, up to rounding: code may have changed behind equal weights."""
    _, values = next(_computed(entry, batch, first=1))
    for tensor, value in zip(tensors, values, strict=True):
        kept, got = tensor[: len(value)].double(), value.double()
        bound = 8 * torch.finfo(value.dtype).eps ** 0.75 if value.is_floating_point() else 0.0
        if not torch.allclose(kept, got, rtol=bound, atol=bound * float(got.abs().max()), equal_nan=True):
            return False
    return True

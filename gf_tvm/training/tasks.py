"""What a network is trained for: its loss and its score. Chosen by the data: labels of images, or of pixels."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import logits_of
from .data import IGNORED, Images, Photos


class Score(Protocol):
    """The metric of a task, counted over batches."""

    def add(self, logits: Tensor, y: Tensor) -> None:
        """Count a batch."""

    def value(self) -> float:
        """The metric of all batches so far, 0 to 1."""


class Objective(Protocol):
    """Loss and metric of one kind of labels."""

    #: As results name them.
    name: str
    metric: str

    def logits(self, output: Any) -> Tensor:
        """The logits in a model's output. Raises ModelError."""

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """The mean loss (a scalar) of a batch."""

    def score(self) -> Score:
        """A new count."""


class Accuracy:
    """Share of the images whose largest logit is their class."""

    def __init__(self) -> None:
        self.correct = self.images = 0

    def add(self, logits: Tensor, y: Tensor) -> None:
        """Logits (n, classes), labels (n)."""
        self.correct += int((logits.argmax(dim=1) == y).sum())
        self.images += len(y)

    def value(self) -> float:
        """The share; 0 of no images."""
        return self.correct / max(self.images, 1)


class MeanIoU:
    """Mean over classes of intersection over union: of the pixels of that class and of those taken for it.

    Pixels are counted over all batches before anything is divided. Classes that no pixel has are left out of the mean;
    pixels labelled ``IGNORED`` count nowhere.
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None  # (3, classes): intersection, labelled, predicted

    def add(self, logits: Tensor, y: Tensor) -> None:
        """Logits (n, classes, h, w), enlarged where the masks (n, h, w) are larger."""
        classes, logits = logits.shape[1], _enlarged(logits, y)
        known = y != IGNORED
        label, predicted = y[known].long(), logits.argmax(dim=1)[known]
        both = (label[label == predicted], label, predicted)
        counts = torch.stack([torch.bincount(pixels, minlength=classes) for pixels in both])
        self._counts = counts if self._counts is None else self._counts + counts

    def value(self) -> float:
        """The mean; 0 of no pixels."""
        if self._counts is None or not bool(self._counts[1].any()):
            return 0.0
        intersection, labelled, predicted = self._counts[:, self._counts[1] > 0].double()
        return float((intersection / (labelled + predicted - intersection)).mean())


class Classification:
    """One class per image: cross entropy, accuracy."""

    name, metric = "classification", "accuracy"

    def logits(self, output: Any) -> Tensor:
        """(n, classes)."""
        return logits_of(output)

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Logits (n, classes), labels (n) int64."""
        return F.cross_entropy(logits, y)

    def score(self) -> Score:
        """Accuracy."""
        return Accuracy()


class Segmentation:
    """One class per pixel: cross entropy over the pixels that have one, mean IoU.

    Logits on a coarser map than the masks, as some networks give them, are enlarged first (bilinear).
    """

    name, metric = "segmentation", "mIoU"

    def logits(self, output: Any) -> Tensor:
        """(n, classes, h, w)."""
        return logits_of(output, dims=4)

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Logits (n, classes, h, w), masks (n, h, w); 0 if no pixel has a class."""
        total = F.cross_entropy(_enlarged(logits, y), y.long(), ignore_index=IGNORED, reduction="sum")
        return total / (y != IGNORED).sum().clamp_min(1)

    def score(self) -> Score:
        """Mean IoU."""
        return MeanIoU()


def _enlarged(logits: Tensor, y: Tensor) -> Tensor:
    if logits.shape[-2:] == y.shape[-2:]:
        return logits
    return F.interpolate(logits, size=y.shape[-2:], mode="bilinear", align_corners=False)


def objective_of(images: Images | Photos) -> Objective:
    """Loss and metric for the labels of ``images``."""
    return _objective(images.has_masks)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean loss of ``model`` on a batch, by the kind of its labels. Raises ModelError."""
    objective = _objective(y.dim() == 3)
    return objective.loss(objective.logits(model(x)), y)


def _objective(masks: bool) -> Objective:
    return Segmentation() if masks else Classification()

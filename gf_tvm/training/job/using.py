"""Using a model that a job left: predictions, and the model as ONNX."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError, PictureError
from ...files import replacing
from ...models import logits_of
from ..data import CHANNELS, Photos
from ..data.photos import Kept
from ..data.pictures import Skipped
from .saved import SavedModel


@dataclass(frozen=True)
class Prediction:
    """What a model says of a picture.

    Attributes:
        picture: the file.
        classes: (name, probability) of the most probable classes, the first one first.
    """

    picture: Path
    classes: tuple[tuple[str, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "picture": str(self.picture),
            "classes": [{"class": name, "probability": share} for name, share in self.classes],
        }


def predict(saved: SavedModel, pictures: Sequence[str | Path], top: int = 5) -> Iterator[Prediction | PictureError]:
    """What the model says of each picture, in their order; of one that cannot be read, the error.

    Args:
        top: so many classes of each, if there are as many.

    Raises:
        ModelError: ``top`` is not positive.
    """
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise ModelError(f"top must be a positive integer, got {top!r}")
    for path in map(Path, pictures):
        photos = Photos([path], [0], saved.classes, saved.preprocessing, kept=Kept(0), skipped=Skipped(strict=True))
        try:
            (x, _) = next(photos.batches(1))
        except PictureError as error:
            yield error
            continue
        with torch.no_grad():
            shares = logits_of(saved.model(x))[0].softmax(0)
        best = shares.topk(min(top, len(saved.classes)))
        names = ((saved.classes[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True))
        yield Prediction(path, tuple(names))


class _Logits(nn.Module):
    """A model whose output is the logits and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return logits_of(self.model(image))


def export_onnx(saved: SavedModel, path: str | Path) -> None:
    """Write the model as ONNX: ``image`` (n, 3, size, size) float32, prepared as the model's configuration says, gives
    ``logits`` (n, classes), for any n. Classes and preprocessing are in the file's metadata.

    Raises:
        ModelError: the packages that write ONNX are missing, the model cannot be exported, or the file not written.
    """
    path = Path(path)
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ModelError(f"ONNX needs two packages: pip install onnx onnxscript ({error})") from None
    size = saved.preprocessing.size
    x = torch.zeros(2, CHANNELS, size, size)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    try:
        # It tells of packages that this does not need, and of its own old names.
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", category)
            program = torch.onnx.export(
                _Logits(saved.model).eval(),
                (x,),
                dynamo=True,
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("n")},),
                verbose=False,
            )
        assert program is not None
        content = program.model_proto
    except Exception as error:  # the model may be the user's code
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{saved.name!r} cannot be exported to ONNX: {reason}") from None
    finally:
        logger.setLevel(level)
    about = {"classes": list(saved.classes), "preprocessing": saved.preprocessing.to_dict()}
    onnx.helper.set_model_props(content, {key: json.dumps(value) for key, value in about.items()})
    try:
        with replacing(path) as file:
            file.write(content.SerializeToString())
    except OSError as error:
        raise ModelError(f"cannot write {str(path)!r}: {error.strerror or error}") from None

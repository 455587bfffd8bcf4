"""What photographs go through before a network sees them; every set of weights was trained behind one such."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..files import MAX_JSON, read_limited

#: Names of Pillow's resampling filters, and its numbers for them, which Hugging Face's files have.
INTERPOLATIONS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


@dataclass(frozen=True)
class Preprocessing:
    """Resize, cut out the centre, scale to 0..1, normalise by channel.

    Attributes:
        size: pixels per side of what the network sees.
        resize: pixels of the shorter side before the centre is cut out; at least ``size``.
        interpolation: of resizing, a key of ``INTERPOLATIONS``.
        mean, std: by channel (red, green, blue), of values in 0..1.

    Raises:
        ModelError: a value out of range.
    """

    size: int = 224
    resize: int = 256
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name in ("size", "resize"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 14:
                raise ModelError(f"preprocessing: {name} must be an integer of 1 to {1 << 14} pixels, got {value!r}")
        if self.resize < self.size:
            raise ModelError(f"preprocessing: resize ({self.resize}) must be at least size ({self.size})")
        if self.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise ModelError(f"preprocessing: unknown interpolation {self.interpolation!r}; known: {known}")
        for name, least in (("mean", -math.inf), ("std", 0.0)):
            values = getattr(self, name)
            if (
                not isinstance(values, list | tuple)
                or len(values) != 3
                or any(isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v) for v in values)
                or min(values) <= least
            ):
                above = " above 0" if name == "std" else ""
                raise ModelError(f"preprocessing: {name} must be three numbers{above}, got {values!r}")
            object.__setattr__(self, name, tuple(map(float, values)))

    def at(self, size: int) -> Preprocessing:
        """The same for images of ``size`` pixels: the same share of the picture is cut out."""
        resize = max(round(self.resize * size / self.size), size)
        return Preprocessing(size, resize, self.interpolation, self.mean, self.std)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Any) -> Preprocessing:
        """What :meth:`to_dict` gave. Raises ModelError."""
        if not isinstance(values, Mapping) or set(values) - set(cls.__dataclass_fields__):
            raise ModelError(f"preprocessing must have {', '.join(cls.__dataclass_fields__)}, got {values!r}")
        return cls(**values)


def of_model(model: object) -> Preprocessing | None:
    """What a model says of itself in ``pretrained_cfg``, as those of timm do; None if it says nothing.

    Raises:
        ModelError: it says something that cannot be done here.
    """
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or not {"mean", "std", "input_size"} <= set(config):
        return None
    size = config["input_size"][-1]
    resize = max(math.floor(size / config.get("crop_pct", 0.875)), size)
    return Preprocessing(size, resize, config.get("interpolation", "bilinear"), config["mean"], config["std"])


def of_folder(folder: Path) -> Preprocessing | None:
    """What ``preprocessor_config.json`` of a model that Hugging Face's ``save_pretrained`` wrote says; None without it.

    Raises:
        ModelError: the file cannot be read, or says something that cannot be done here.
    """
    path = folder / "preprocessor_config.json"
    try:
        config = json.loads(read_limited(path, MAX_JSON))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {str(path)!r}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{str(path)!r} must hold an object, got {type(config).__name__}")
    resize = _side(config.get("size"), 224)
    size = _side(config.get("crop_size"), resize) if config.get("do_center_crop") else resize
    if isinstance(share := config.get("crop_pct"), float) and 0 < share <= 1:
        resize = math.floor(size / share)
    names = {number: name for name, number in INTERPOLATIONS.items()}
    plain = Preprocessing()
    normalised = config.get("do_normalize", True)
    try:
        return Preprocessing(
            size,
            max(resize, size),
            names.get(config.get("resample", 2), "bilinear"),
            config.get("image_mean", plain.mean) if normalised else (0.0, 0.0, 0.0),
            config.get("image_std", plain.std) if normalised else (1.0, 1.0, 1.0),
        )
    except ModelError as error:
        raise ModelError(f"{str(path)!r}: {error}") from None


def _side(size: Any, otherwise: int) -> Any:
    """Of Hugging Face's sizes: 224, {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    if isinstance(size, Mapping):
        return size.get("shortest_edge", size.get("height", otherwise))
    return otherwise if size is None else size

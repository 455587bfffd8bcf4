"""What one training run does: a typed, validated, JSON-able configuration."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from ..core.geometry import Pair, as_pair
from ..errors import GfTvmError
from ..shapes.cases import format_patch
from .learning_rate import SCHEDULES as SCHEDULES

if TYPE_CHECKING:
    import torch

#: Dtypes of mixed precision; float16 needs a CUDA device for its gradients' scaling, and training runs on the CPU.
AMP = ("off", "bfloat16")

#: Dtypes in which chains may keep the means of derivatives.
CHAIN_MEANS = ("float16", "bfloat16")

CACHES = ("auto", "memory", "disk", "off")

#: Fields that decide the pretrained weights. The others may differ between runs that start from the same weights.
PRETRAIN_FIELDS = (
    *("model", "data", "image_size", "seed", "skew", "test_fraction", "batch", "pretrain_epochs", "pretrain_lr"),
    *("momentum", "weight_decay", "schedule", "warmup_epochs", "step_epochs", "step_factor"),
    *("clip", "flip", "shift", "amp"),
)


class TrainingError(GfTvmError, ValueError):
    """A training configuration, or a checkpoint, that cannot be used as asked."""


@dataclass(frozen=True)
class TrainConfig:
    """One run: pretrain on part A of a data set, fine-tune on part B.

    Args:
        model: as in :func:`gf_tvm.models.build_model`.
        data: as in :func:`gf_tvm.training.data.load_dataset`.
        patch: None (or ``"exact"``) for the exact backward pass, else the patch, an integer or (height, width).
        last: number of convolutions, counted from the network's end, that are fine-tuned (with the last linear
            layer, the classifier of images or pixels); the rest stays frozen.
        image_size: pixels per side after resizing.
        batch: images per step; a last batch that is not full is left out of training.
        epochs, pretrain_epochs: passes over part B and part A; 0 pretraining epochs keep the model's own weights.
        lr, pretrain_lr: learning rates (peak, where the schedule lowers them).
        momentum, weight_decay: of SGD.
        schedule: ``cosine`` or ``linear`` (from the learning rate to 0 over all steps), ``step`` or ``constant``; see
            :func:`gf_tvm.training.learning_rate.learning_rate`.
        warmup_epochs: epochs, also a fraction of one, in which the learning rate rises from almost 0 (both phases).
        step_epochs, step_factor: of ``step``: the learning rate is multiplied by that factor after so many epochs.
        clip: largest norm of all gradients together, None for no clipping. The paper clips at 2.
        flip: mirror training images at random.
        shift: move training images at random by up to that many pixels along both axes.
        seed: of the split, the weights, the order of the images, flips and shifts.
        skew, test_fraction: see :func:`gf_tvm.training.data.split_parts`.
        train_bn_affine: fine-tune scale and shift of all batch norms, too (their statistics stay frozen).
        amp: mixed precision: ``bfloat16`` runs forward passes, tests included, under ``torch.autocast``; ``off``.
        patience: fine-tuning stops when for that many epochs the test score has not been higher than the best by more
            than ``min_delta`` (a share, 0.01 is a point of accuracy); the weights are then those of the best epoch.
            None trains all epochs and keeps the last weights.
        cache: where the frozen layers' results are kept while fine-tuning: ``memory``, ``disk`` (in the checkpoint
            folder), ``auto`` (memory if they fit, else disk if there is a folder) or ``off``.
        chain: gradients stay on the patch grid between filtered convolutions, see :mod:`gf_tvm.chains`; means nothing
            to the exact backward pass. ``float16`` or ``bfloat16``: with the means of derivatives kept in that dtype.
            False: each convolution is filtered by itself, as in the paper.
        strict: a picture that cannot be read is an error; else it is skipped, with a warning.

    Raises:
        TrainingError: a value is out of range. GeometryError: a patch that is none.
    """

    model: str
    data: str = "digits"
    patch: int | Pair | str | None = None
    last: int = 4
    image_size: int = 32
    batch: int = 32
    epochs: int = 10
    pretrain_epochs: int = 10
    lr: float = 0.05
    pretrain_lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    clip: float | None = 2.0
    flip: bool = False
    shift: int = 2
    seed: int = 0
    skew: float = 0.9
    test_fraction: float = 0.25
    train_bn_affine: bool = False
    warmup_epochs: float = 0.0
    step_epochs: int = 5
    step_factor: float = 0.1
    amp: str = "off"
    patience: int | None = None
    min_delta: float = 0.0
    cache: str = "auto"
    chain: bool | str = True
    strict: bool = False

    def __post_init__(self) -> None:
        patch = None if self.patch in (None, "exact") else self.patch
        if isinstance(patch, str):
            raise TrainingError(f"patch must be 'exact', an integer or a pair of integers, got {patch!r}")
        object.__setattr__(self, "patch", None if patch is None else as_pair(patch, "patch", 1))
        minima = {"last": 1, "image_size": 1, "batch": 1, "epochs": 1, "pretrain_epochs": 0, "shift": 0, "seed": 0}
        minima |= {"step_epochs": 1, **({} if self.patience is None else {"patience": 1})}
        for name, minimum in minima.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise TrainingError(f"{name} must be an integer of at least {minimum}, got {value!r}")
        if self.seed >= 2**63:
            raise TrainingError(f"seed must be below 2**63, got {self.seed}")
        numbers = ("lr", "pretrain_lr", "momentum", "weight_decay", "skew", "test_fraction")
        for name in (*numbers, "warmup_epochs", "step_factor", "min_delta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise TrainingError(f"{name} must be a finite number of at least 0, got {value!r}")
            object.__setattr__(self, name, float(value))
        for name in ("lr", "pretrain_lr", "step_factor"):
            if getattr(self, name) == 0:
                raise TrainingError(f"{name} must be above 0")
        if self.momentum >= 1:
            raise TrainingError(f"momentum must be below 1, got {self.momentum}")
        if self.clip is not None:
            if isinstance(self.clip, bool) or not isinstance(self.clip, int | float) or not self.clip > 0:
                raise TrainingError(f"clip must be above 0, or None, got {self.clip!r}")
            object.__setattr__(self, "clip", float(self.clip))
        if self.schedule not in SCHEDULES:
            raise TrainingError(f"unknown schedule {self.schedule!r}; known: {', '.join(SCHEDULES)}")
        shortest = min(self.epochs, self.pretrain_epochs or self.epochs)
        if self.warmup_epochs >= shortest:
            raise TrainingError(
                f"warmup_epochs must be below the epochs of each phase ({shortest}), got {self.warmup_epochs}"
            )
        if self.amp not in AMP:
            why = " (float16 needs a CUDA device, training runs on the CPU)" if self.amp == "float16" else ""
            raise TrainingError(f"unknown amp {self.amp!r}; known: {', '.join(AMP)}{why}")
        if not isinstance(self.chain, bool) and self.chain not in CHAIN_MEANS:
            raise TrainingError(f"chain must be true, false, {' or '.join(CHAIN_MEANS)}, got {self.chain!r}")
        if self.cache not in CACHES:
            raise TrainingError(f"unknown cache {self.cache!r}; known: {', '.join(CACHES)}")

    @property
    def chained(self) -> bool:
        """Whether there are filtered convolutions, and they are to be chained."""
        return bool(self.chain) and self.patch is not None

    @property
    def chain_means(self) -> torch.dtype | None:
        """The dtype in which chains keep the means of derivatives; None: as they are summed."""
        import torch  # not where only a command line is read

        return getattr(torch, self.chain) if isinstance(self.chain, str) else None

    @property
    def variant(self) -> str:
        """``exact``, or the patch as ``R2`` or ``R2x1``, with `` chained`` (and the means' dtype) where it is."""
        means = f" {self.chain}" if isinstance(self.chain, str) else ""
        return f"{self.patch_name} chained{means}" if self.chained else self.patch_name

    @property
    def patch_name(self) -> str:
        """``exact``, or the patch as ``R2`` or ``R2x1``."""
        return "exact" if self.patch is None else format_patch(as_pair(self.patch, "patch", 1))  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; ``TrainConfig(**d)`` gives an equal configuration."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def pretraining(self) -> dict[str, Any]:
        """The part of :meth:`to_dict` that decides the pretrained weights."""
        return {key: value for key, value in self.to_dict().items() if key in PRETRAIN_FIELDS}


#: Field names in the order of their definition.
CONFIG_FIELDS = tuple(field.name for field in fields(TrainConfig))

"""What a job does: a typed, validated, JSON-able configuration."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ...core.geometry import Pair
from ..config import TrainConfig, TrainingError


@dataclass(frozen=True)
class JobConfig:
    """One job: fine-tune the last convolutions and the classifier of a network on somebody's pictures.

    Args:
        model: a built-in name or ``package.module:factory`` as in :func:`gf_tvm.models.build_model`; a folder that an
            earlier job left, or that Hugging Face's ``save_pretrained`` wrote.
        data: a folder of class folders of pictures, or of ``train`` and ``val`` with those; a folder of CIFAR's files;
            an ``.npz``; or ``digits``.
        weights: ``imagenet`` or a file, see :func:`gf_tvm.models.find_weights`; ``none`` for random ones. None: the
            model's own; a built-in name takes ``imagenet`` where there is a package of them.
        patch: ``exact`` (or None) for the exact backward pass, else the patch, an integer or (height, width).
        last: number of convolutions, counted from the network's end, that are fine-tuned with the classifier.
        image_size: pixels per side that the network sees; None for what its weights were trained with.
        batch: pictures in a step; fewer where there are not as many.
        epochs, lr, momentum, weight_decay, schedule: as in :class:`gf_tvm.training.TrainConfig`, and so are
            ``warmup_epochs``, ``step_epochs``, ``step_factor``, ``clip``, ``train_bn_affine``, ``amp``, ``chain`` and
            ``strict``.
        augment: show random parts of pictures, mirrored or not, while training.
        validation: share of each class's pictures that is not trained on, where the data have no ``val`` folder.
        patience: training stops when the validation accuracy has not risen for so many epochs, by more than
            ``min_delta``. Patience or none, the model left is that of the best epoch.
        seed: of the split, the new classifier, the order of the pictures and their augmentation.

    Raises:
        TrainingError: a value is out of range. GeometryError: a patch that is none.
    """

    model: str
    data: str = "digits"
    weights: str | None = None
    patch: int | Pair | str | None = 2
    last: int = 4
    image_size: int | None = None
    batch: int = 32
    epochs: int = 10
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    step_epochs: int = 5
    step_factor: float = 0.1
    clip: float | None = 2.0
    augment: bool = True
    validation: float = 0.2
    seed: int = 0
    train_bn_affine: bool = False
    amp: str = "off"
    patience: int | None = None
    min_delta: float = 0.0
    chain: bool | str = True
    strict: bool = False

    def __post_init__(self) -> None:
        checked = self.steps(self.image_size or 224)
        for name in ("patch", "lr", "momentum", "weight_decay", "clip", "min_delta", "warmup_epochs", "step_factor"):
            object.__setattr__(self, name, getattr(checked, name))
        share = self.validation
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise TrainingError(f"validation must lie between 0 and 1 (both excluded), got {share!r}")

    def steps(self, image_size: int, batch: int | None = None) -> TrainConfig:
        """The settings of the training loop, which keeps the best epoch's weights."""
        return TrainConfig(
            model=self.model,
            data=self.data,
            patch=self.patch,
            last=self.last,
            image_size=image_size,
            batch=self.batch if batch is None else batch,
            epochs=self.epochs,
            pretrain_epochs=0,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            warmup_epochs=self.warmup_epochs,
            step_epochs=self.step_epochs,
            step_factor=self.step_factor,
            clip=self.clip,
            shift=0,
            seed=self.seed,
            train_bn_affine=self.train_bn_affine,
            amp=self.amp,
            patience=self.epochs if self.patience is None else self.patience,
            min_delta=self.min_delta,
            cache="off",
            chain=self.chain,
            strict=self.strict,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; ``JobConfig(**d)`` gives an equal configuration."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

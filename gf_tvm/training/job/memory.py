"""Whether a training step fits into memory, before the system kills the process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...machine import cpu
from ...models import logits_of
from ...nn import filter_model
from ..config import TrainConfig, TrainingError
from ..data import CHANNELS
from ..loop import precision, training_mode
from ..step_costs import count_kept_bytes

#: The maps of the largest layer are there up to so many times: what it reads and writes, and gradients of both.
MAPS = 2

#: A step may take this share of the memory that is available; PyTorch's allocator and the pictures need some, too.
SHARE = 0.8


def bytes_per_image(model: nn.Module, layers: list[str], config: TrainConfig) -> int:
    """Memory that a training step takes for each image: what is kept for the backward pass, and the largest layer's
    maps. Measured on one image, with a copy of ``model``, frozen as it is to be trained."""
    model = copy.deepcopy(model)
    if config.patch is not None and layers:
        assert isinstance(config.patch, tuple)
        filter_model(model, config.patch, layers=lambda name, _: name in layers, chain=False)
    largest = 0

    def look(_module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal largest
        largest = max(largest, _bytes(inputs) + _bytes(output))

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(look)
    training_mode(model, "finetune")
    x = torch.zeros(1, CHANNELS, config.image_size, config.image_size)
    with count_kept_bytes(model, {}) as kept, precision(config):
        F.cross_entropy(logits_of(model(x)), torch.zeros(1, dtype=torch.int64))
    return kept.total + MAPS * largest


def _bytes(values: Any) -> int:
    if isinstance(values, Tensor):
        return values.numel() * values.element_size()
    return sum(map(_bytes, values)) if isinstance(values, tuple | list) else 0


def check_step(batch: int, per_image: int, available: int | None = None) -> None:
    """Raise TrainingError, with the batch size that would fit, if a step takes more memory than there is.

    Args:
        per_image: as :func:`bytes_per_image` gives it.
        available: bytes; by default what the system says. Nothing is checked where it says nothing.
    """
    available = cpu.available_bytes() if available is None else available
    if available is None or batch * per_image <= SHARE * available:
        return
    fits = int(SHARE * available) // max(per_image, 1)
    advice = f"--batch {fits} fits" if fits else "not even one image fits; a smaller --image-size may do"
    raise TrainingError(
        f"a step of {batch} images needs about {batch * per_image / 1e9:.2g} GB of memory, "
        f"{available / 1e9:.2g} GB are available: {advice}"
    )


def told_if_too_large(run: Callable[[], None], batch: int) -> None:
    """Call ``run``; if PyTorch gets no memory, say so with a batch size that may do (TrainingError)."""
    try:
        run()
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        raise TrainingError(
            f"there is not enough memory for a batch of {batch}: --batch {max(batch // 2, 1)} may fit"
        ) from None

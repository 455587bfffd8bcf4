"""How far filtered gradients point where the exact ones do, layer by layer.

The network is the one that fine-tuning starts with, and the last K convolutions are filtered together, as in training:
what reaches a layer has passed the filtered layers behind it, and the figures contain the errors of them all.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import build_model
from ..nn import filter_model, filter_report
from ..shapes.model import last_to_run
from ..training.config import TrainConfig
from ..training.data import CHANNELS, Dataset, batches
from ..training.loop import derived, seeded, training_mode
from ..training.tasks import loss_of
from .results import Layer

if TYPE_CHECKING:
    from ..bundle.library import Library

#: Gradients of a layer: of the weight, and of the input in each call (none where no call needs one).
Gradients = tuple[Tensor, list[Tensor]]


def cosines(
    config: TrainConfig, dataset: Dataset, state: dict[str, Any], library: Library | None = None, count: int = 4
) -> list[Layer]:
    """Cosines between filtered and exact gradients at the weights ``state``, means over ``count`` batches of part B.

    Args:
        config: of a filtered run; its convolutions are compared.
        count: the batches are of the run's size; fewer where part B has fewer.
    """
    with seeded(config.seed, "weights"):
        model = build_model(config.model, len(dataset.classes), CHANNELS, config.image_size)
    model.load_state_dict(state)
    modules = dict(model.named_modules())
    shape = (1, CHANNELS, config.image_size, config.image_size)
    layers = {name: modules[name] for name in last_to_run(model, config.last, shape)}
    trained = {id(p) for module in layers.values() for p in module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    generator = torch.Generator().manual_seed(derived(config.seed, "cosine images"))
    images = batches(dataset.finetune_train, config.batch, generator, config.flip, config.shift, drop_last=True)
    data = list(islice(images, count))

    def all_gradients() -> list[dict[str, Gradients]]:
        return [_gradients(model, layers, x, y, config.seed) for x, y in data]

    exact = all_gradients()
    filter_model(model, config.patch, layers=lambda name, _: name in layers, library=library, chain=False)  # type: ignore[arg-type]
    filtered = all_gradients()
    found = []
    for name in (name for name in layers if name in filter_report(model).filtered):
        pairs = [(a[name], b[name]) for a, b in zip(exact, filtered, strict=True) if name in a]
        if not pairs:  # a layer that the model does not use
            continue
        weight = fmean(cosine([a[0]], [b[0]]) for a, b in pairs)
        inputs = [cosine(a[1], b[1]) for a, b in pairs if a[1]]
        found.append(Layer(name, config.patch_name, weight, fmean(inputs) if inputs else None))
    return found


def cosine(a: list[Tensor], b: list[Tensor]) -> float:
    """The cosine of the angle between two lists of tensors of equal shapes, each taken as one vector; in float64."""
    first, second = (torch.cat([t.detach().double().flatten() for t in tensors]) for tensors in (a, b))
    return float(F.cosine_similarity(first, second, dim=0))


def _gradients(model: nn.Module, layers: dict[str, nn.Conv2d], x: Tensor, y: Tensor, seed: int) -> dict[str, Gradients]:
    """The gradients of one batch's loss, as in fine-tuning: batch norms frozen, dropout equal for equal seeds."""
    training_mode(model, "finetune")
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}

    def watch(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given: Tensor = args[0] if args else kwargs["input"]
            if not given.requires_grad:
                return None
            # A copy of its own: other layers may read the same tensor, and their gradients are not this layer's.
            own = given.clone()
            own.retain_grad()
            inputs[name].append(own)
            return ((own, *args[1:]), kwargs) if args else (args, {**kwargs, "input": own})

        return hook

    hooks = [module.register_forward_pre_hook(watch(name), with_kwargs=True) for name, module in layers.items()]
    try:
        model.zero_grad(set_to_none=True)
        with seeded(seed, "cosine"):
            loss = loss_of(model, x, y)
        loss.backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in hooks:
            handle.remove()
    found = {}
    for name, module in layers.items():
        if module.weight.grad is not None:
            found[name] = (module.weight.grad.clone(), [t.grad for t in inputs[name] if t.grad is not None])
    model.zero_grad(set_to_none=True)
    return found

"""What a training step keeps for its backward pass, and where its time goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn

from ..chains.capture.backend import watch_steps
from ..chains.model import compiles_itself


@dataclass
class KeptBytes:
    """Bytes of the distinct storages that autograd keeps for the backward pass, parameters and buffers excluded.

    ``total`` is for the whole network. ``layers`` is for single layers: what they keep by themselves, whether or not
    another layer keeps the same storage.
    """

    total: int = 0
    layers: dict[str, int] = field(default_factory=dict)

    @property
    def in_layers(self) -> int:
        """Bytes kept by all measured layers together."""
        return sum(self.layers.values())


@contextmanager
def count_kept_bytes(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[KeptBytes]:
    """Count what a forward pass inside the context keeps; the result is filled in when the context ends.

    Saved tensors are used as they are, so the step's results do not change. Where ``model`` compiles itself, the
    steps of its graphs are told apart in place of modules, and what a chain keeps belongs to none of its layers.

    Args:
        model: that runs.
        layers: of its modules, by any name.
    """
    kept = KeptBytes()
    ignored = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    # The storages themselves are held until the end: an address must not be given away and counted as the same.
    everything: dict[int, torch.UntypedStorage] = {}
    by_layer: dict[str, dict[int, torch.UntypedStorage]] = {name: {} for name in layers}
    active: list[str] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in ignored:
            everything[address] = storage
            for name in active:
                by_layer[name][address] = storage
        return tensor

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: active.append(name)

    def leave(*_: object) -> None:
        active.pop()

    names = {id(module): name for name, module in layers.items()}
    paths = {
        path: names[id(module)] for path, module in model.named_modules(remove_duplicate=False) if id(module) in names
    }

    def watch(path: str | None, _: str | None) -> None:
        above = "" if path is None else path
        while above and above not in paths:  # a parametrized weight is computed by a module inside the layer's
            above = above.rpartition(".")[0]
        active[:] = [paths[above]] if above in paths else []

    with ExitStack() as stack:
        if compiles_itself(model):
            stack.enter_context(watch_steps(watch))
        else:
            for name, module in layers.items():
                stack.callback(module.register_forward_pre_hook(enter(name)).remove)
                stack.callback(module.register_forward_hook(leave).remove)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield kept
    kept.total = sum(storage.nbytes() for storage in everything.values())
    kept.layers = {name: sum(s.nbytes() for s in storages.values()) for name, storages in by_layer.items()}


@dataclass
class StepTimes:
    """Seconds of each step's forward pass (with the loss), backward pass and update (with clipping)."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)

    def add(self, start: float, forward: float, backward: float, update: float) -> None:
        """Record one step by the clock readings at its start and at the end of each phase."""
        self.forward.append(forward - start)
        self.backward.append(backward - forward)
        self.update.append(update - backward)

    def seconds(self) -> dict[str, float]:
        """Sum over the steps, in seconds, by phase."""
        return {f"{name}_seconds": sum(values) for name, values in vars(self).items()}

    def medians(self) -> dict[str, float]:
        """Median of the steps, in milliseconds, by phase."""
        return {f"{name}_ms": 1e3 * median(values) for name, values in vars(self).items()}

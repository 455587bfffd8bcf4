"""The training loop of one phase: epochs, checkpoints, measurements.

Every epoch draws its random numbers (order of the images, flips, shifts, dropout) from the seed, the phase and the
epoch's number alone. So a checkpoint needs no generator state, and a resumed run repeats the uninterrupted one bit for
bit (on the same machine with the same number of threads and the same library).
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import machine
from . import checkpoint as files
from .config import TrainConfig, TrainingError
from .data import Images, batches
from .measure import StepTimes, count_kept_bytes
from .results import Callback, EpochRow, Event
from .tasks import task_of


class Fit:
    """The epochs of one phase."""

    def __init__(
        self,
        *,
        config: TrainConfig,
        phase: str,
        model: nn.Module,
        layers: dict[str, nn.Module],
        train_images: Images,
        test_images: Images,
        epochs: int,
        lr: float,
    ) -> None:
        """Train every parameter of ``model`` that requires a gradient.

        Args:
            phase: ``pretrain``, or ``finetune``: batch norms in evaluation mode.
            layers: what these modules keep for the backward pass is counted.
            epochs, lr: of this phase; the other settings are taken from ``config``.
        """
        self.config, self.phase, self.model, self.layers = config, phase, model, layers
        self.variant = "exact" if phase == "pretrain" else config.variant
        self.train_images, self.test_images = train_images, test_images
        self.task = task_of(train_images)
        self.epochs, self.lr = epochs, lr
        self.steps = len(train_images) // config.batch
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(
            self.parameters, lr=lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.rows: list[EpochRow] = []

    @property
    def finished(self) -> bool:
        """Whether no epoch is left."""
        return len(self.rows) >= self.epochs

    def restore(self, path: Path, identity: dict[str, Any]) -> None:
        """Continue the checkpoint at ``path``, if there is one. Raises TrainingError."""
        content = files.load(path)
        if content is None:
            return
        try:
            files.check_same(path, content["identity"], identity)
            self.rows = [EpochRow(**row) for row in content["rows"]]
            self.optimizer.load_state_dict(content["optimizer"])
            self.model.load_state_dict(content["model"])
        except TrainingError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TrainingError(f"the checkpoint {str(path)!r} does not fit ({reason}); delete it") from None

    def run(self, path: Path | None, identity: dict[str, Any], callback: Callback | None) -> None:
        """Train the epochs that are left; after each one write the checkpoint, then call back with the row."""
        done, started = 0, time.perf_counter()

        def report(epoch: int, step: int, row: EpochRow | None = None) -> None:
            if callback is None:
                return
            left = (self.epochs - epoch + 1) * self.steps - step
            seconds = (time.perf_counter() - started) / done * left if done else None
            where = (self.phase, self.variant, epoch, self.epochs, step, self.steps)
            callback(Event(*where, seconds, row, self.task.metric))

        for epoch in range(len(self.rows) + 1, self.epochs + 1):
            report(epoch, 0)

            def stepped(step: int, epoch: int = epoch) -> None:
                nonlocal done
                done += 1
                report(epoch, step)

            with seeded(self.config.seed, f"{self.phase} {epoch}"):
                row = self._epoch(epoch, stepped)
            self.rows.append(row)
            if path is not None:
                content = {
                    "identity": identity,
                    "rows": [asdict(row) for row in self.rows],
                    "optimizer": self.optimizer.state_dict(),
                    "model": self.model.state_dict(),
                    "versions": machine.versions(),
                }
                files.save(path, content)
            report(epoch, self.steps, row)

    def _rate(self, step: int) -> float:
        """Learning rate of the step with this number, counted from 0 over all epochs."""
        if self.config.schedule == "constant":
            return self.lr
        return self.lr * 0.5 * (1.0 + math.cos(math.pi * step / (self.epochs * self.steps)))

    def _training_mode(self) -> None:
        self.model.train()
        if self.phase == "finetune":
            for module in self.model.modules():
                if is_batch_norm(module):
                    module.eval()

    def _epoch(self, epoch: int, stepped: Callable[[int], None]) -> EpochRow:
        begin = time.perf_counter()
        self._training_mode()
        times, config = StepTimes(), self.config
        losses, score, rate = 0.0, self.task.score(), self.lr
        kept_bytes = kept_in_layers = 0
        generator = torch.Generator().manual_seed(derived(config.seed, f"{self.phase} {epoch} images"))
        images = batches(self.train_images, config.batch, generator, config.flip, config.shift, drop_last=True)
        for step, (x, y) in enumerate(images):
            rate = self._rate((epoch - 1) * self.steps + step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.zero_grad(set_to_none=True)
            start = time.perf_counter()
            if step == 0:
                with count_kept_bytes(self.model, self.layers) as kept:
                    logits, loss = self._forward(x, y)
                kept_bytes, kept_in_layers = kept.total, kept.in_layers
            else:
                logits, loss = self._forward(x, y)
            forward = time.perf_counter()
            loss.backward()  # type: ignore[no-untyped-call]
            backward = time.perf_counter()
            if config.clip is not None:
                nn.utils.clip_grad_norm_(self.parameters, config.clip)
            self.optimizer.step()
            times.add(start, forward, backward, time.perf_counter())
            value = loss.item()
            if not math.isfinite(value):
                raise TrainingError(
                    f"the loss became {value} in step {step + 1} of {self.phase} epoch {epoch}; a lower learning "
                    f"rate than {self.lr} or clipping may help"
                )
            losses += value
            score.add(logits.detach(), y)
            stepped(step + 1)
        accuracy = accuracy_of(self.model, self.test_images, config.batch)
        return EpochRow(
            epoch=epoch,
            train_loss=losses / self.steps,
            train_accuracy=score.value(),
            test_accuracy=accuracy,
            lr=rate,
            steps=self.steps,
            seconds=time.perf_counter() - begin,
            **times.seconds(),
            **times.medians(),
            kept_bytes=kept_bytes,
            kept_bytes_convolutions=kept_in_layers,
        )

    def _forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.task.logits(self.model(x))
        return logits, self.task.loss(logits, y)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a batch norm of any dimension."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def accuracy_of(model: nn.Module, images: Images, batch: int) -> float:
    """The score of ``model`` on ``images`` by their task's metric, in evaluation mode."""
    model.eval()
    task = task_of(images)
    score = task.score()
    with torch.no_grad():
        for x, y in batches(images, batch):
            score.add(task.logits(model(x)), y)
    return score.value()


def derived(seed: int, purpose: str) -> int:
    """A seed of 63 bits for one purpose; different purposes give unrelated ones."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:8], "big") >> 1


@contextmanager
def seeded(seed: int, purpose: str) -> Iterator[None]:
    """Seed the global generators (PyTorch's, Python's, NumPy's) that models draw from; put their states back after."""
    value = derived(seed, purpose)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(value)
        random.seed(value)
        np.random.seed(value % 2**32)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)

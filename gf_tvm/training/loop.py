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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..chains import chains_of
from ..chains.model import compiles_itself
from ..core.geometry import Pair
from ..machine import cpu
from ..nn import filter_report
from . import checkpoint as files
from .config import TrainConfig, TrainingError
from .cut import put_back
from .data import Images, Photos, batches, steps
from .learning_rate import learning_rate
from .results import EpochRow, Event, EventCallback
from .step_costs import StepTimes, count_kept_bytes
from .stopping import best_epoch, stops
from .tasks import objective_of

if TYPE_CHECKING:
    from .frozen import FrozenCache
    from .metrics import Metrics


class Fit:
    """The epochs of one phase."""

    def __init__(
        self,
        *,
        config: TrainConfig,
        phase: str,
        model: nn.Module,
        layers: dict[str, nn.Module],
        train_images: Images | Photos,
        test_images: Images | Photos,
        epochs: int,
        lr: float,
        cache: FrozenCache | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        """Train every parameter of ``model`` that requires a gradient.

        Args:
            phase: ``pretrain``, or ``finetune``: batch norms in evaluation mode.
            layers: what these modules keep for the backward pass is counted.
            epochs, lr: of this phase; the other settings are taken from ``config``.
            cache: what the frozen layers compute, in place of the images.
            metrics: gets the rows.
        """
        self.config, self.phase, self.model, self.layers = config, phase, model, layers
        self.variant = "exact" if phase == "pretrain" else config.variant
        self.train_images: Images | Photos = train_images
        self.test_images: Images | Photos = test_images
        self.objective = objective_of(train_images)
        self.epochs, self.lr = epochs, lr
        self.steps = steps(train_images, config.batch)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(
            self.parameters, lr=lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        # The cache takes image numbers for images, so batches are drawn in the same order with and without it.
        self.train_network: Callable[[Tensor], Any] = model
        self.test_network: Callable[[Tensor], Any] = model
        #: The module that a step runs, and what stands before the model's names in it.
        self.network, self._prefix = (model, "") if cache is None else (cache.train.rest, "model.")
        self.cache = cache
        if cache is not None:
            self.train_network, self.train_images = cache.train, cache.train.numbers
            self.test_network, self.test_images = cache.test, cache.test.numbers
        self.metrics = metrics
        self.patience = config.patience if phase == "finetune" else None
        self.best: dict[str, Tensor] | None = None  # weights of the best epoch so far, where training can stop early
        self.rows: list[EpochRow] = []

    @property
    def finished(self) -> bool:
        """Whether no epoch is left, or the test score has not risen for long enough."""
        return len(self.rows) >= self.epochs or stops(self._scores(), self.patience, self.config.min_delta)

    @property
    def best_epoch(self) -> int | None:
        """The epoch whose weights are kept, where training can stop early; else None."""
        return None if self.patience is None else best_epoch(self._scores(), self.config.min_delta)

    def _scores(self) -> list[float]:
        return [row.test_accuracy for row in self.rows]

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
            self.best = content["best"]
            if (self.best is None) != (self.patience is None or not self.rows):
                raise ValueError("it lacks the best epoch's weights")
        except TrainingError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TrainingError(f"the checkpoint {str(path)!r} does not fit ({reason}); delete it") from None

    def run(self, path: Path | None, identity: dict[str, Any], callback: EventCallback | None) -> None:
        """Train the epochs that are left; after each one write the checkpoint, then call back with the row."""
        if not self.finished:
            self._warm_up()
        done, started = 0, time.perf_counter()

        def report(epoch: int, step: int, row: EpochRow | None = None) -> None:
            if callback is None:
                return
            left = (self.epochs - epoch + 1) * self.steps - step
            seconds = (time.perf_counter() - started) / done * left if done else None
            where = (self.phase, self.variant, epoch, self.epochs, step, self.steps)
            callback(Event(*where, seconds, row, self.objective.metric))

        self._record()
        while not self.finished:
            epoch = len(self.rows) + 1
            report(epoch, 0)

            def stepped(step: int, epoch: int = epoch) -> None:
                nonlocal done
                done += 1
                report(epoch, step)

            with seeded(self.config.seed, f"{self.phase} {epoch}"):
                row = self._epoch(epoch, stepped)
            self.rows.append(row)
            self._keep_best()
            if path is not None:
                content = {
                    "identity": identity,
                    "rows": [asdict(row) for row in self.rows],
                    "optimizer": self.optimizer.state_dict(),
                    "model": self.model.state_dict(),
                    "best": self.best,
                    "versions": cpu.versions(),
                }
                files.save(path, content)
            self._record()
            report(epoch, self.steps, row)

    def _warm_up(self) -> None:
        """Where the network compiles itself, let it do so before anything is timed; nothing else changes."""
        if not compiles_itself(self.network):
            return
        training_mode(self.model, self.phase)
        x, y = next(batches(self.train_images, self.config.batch))
        report = None if self.cache is None else self.cache.train.report
        hits = 0 if report is None else report.hits
        with put_back(self.network):
            _, loss = self._forward(x, y)
            torch.autograd.grad(loss, self.parameters, allow_unused=True)
        if report is not None:
            report.hits = hits

    def _rate(self, step: int) -> float:
        """Learning rate of the step with this number, counted from 0 over all epochs."""
        config = self.config
        return learning_rate(
            config.schedule,
            self.lr,
            step,
            self.epochs * self.steps,
            round(config.warmup_epochs * self.steps),
            config.step_epochs * self.steps,
            config.step_factor,
        )

    def _record(self) -> None:
        if self.metrics is not None:
            self.metrics.rows(self.config, self.phase, self.rows)

    def _keep_best(self) -> None:
        """After an epoch: keep its weights if it is the best; after the last one go back to the best one's."""
        if self.patience is None:
            return
        if self.best_epoch == len(self.rows):
            frozen = {name for name, p in self.model.named_parameters() if not p.requires_grad}
            self.best = {
                name: value.detach().clone()
                for name, value in self.model.state_dict().items()
                if name not in frozen and isinstance(value, Tensor)
            }
        if self.finished and self.best is not None:
            self.model.load_state_dict(self.best, strict=False)

    def test_score(self) -> float:
        """The score on the test images."""
        with precision(self.config):
            return accuracy_of(self.model, self.test_images, self.config.batch, self.test_network)

    def _epoch(self, epoch: int, stepped: Callable[[int], None]) -> EpochRow:
        begin = time.perf_counter()
        training_mode(self.model, self.phase)
        times, config = StepTimes(), self.config
        losses, score, rate = 0.0, self.objective.score(), self.lr
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
                with count_kept_bytes(self.network, self.layers) as kept:
                    logits, loss = self._forward(x, y)
                kept_bytes = kept.total
                kept_in_layers = kept.in_layers + sum(chain.kept_bytes for chain in chains_of(self.network).chains)
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
        accuracy = self.test_score()
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

    @property
    def chains(self) -> tuple[tuple[str, ...], ...]:
        """Names of the convolutions of each chain of the last step."""
        chains = chains_of(self.network).chains
        return tuple(tuple(name.removeprefix(self._prefix) for name in chain.convolutions) for chain in chains)

    @property
    def filtered(self) -> dict[str, Pair]:
        """Names and patches of the filtered convolutions; those of other modules than Conv2d once a step has run."""
        filtered = filter_report(self.network).filtered
        return {name.removeprefix(self._prefix): patch for name, patch in filtered.items()}

    def _forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with precision(self.config):
            logits = self.objective.logits(self.train_network(x))
            return logits, self.objective.loss(logits, y)


def precision(config: TrainConfig) -> AbstractContextManager[Any]:
    """The context in which a configuration's forward passes run."""
    return nullcontext() if config.amp == "off" else torch.autocast("cpu", dtype=getattr(torch, config.amp))


def training_mode(model: nn.Module, phase: str) -> None:
    """Put ``model`` into the mode of a training step: batch norms use their statistics while fine-tuning."""
    model.train()
    if phase == "finetune":
        for module in model.modules():
            if is_batch_norm(module):
                module.eval()


def is_batch_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a batch norm of any dimension."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def accuracy_of(
    model: nn.Module, images: Images | Photos, batch: int, network: Callable[[Tensor], Any] | None = None
) -> float:
    """The score of ``model`` on ``images`` by their task's metric, in evaluation mode.

    ``network`` is called in place of ``model``.
    """
    model.eval()
    network = network or model
    objective = objective_of(images)
    score = objective.score()
    with torch.no_grad():
        for x, y in batches(images, batch):
            score.add(objective.logits(network(x)), y)
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

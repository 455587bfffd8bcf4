"""Runs an evaluation: what is finished is taken from the folder, the rest is trained and measured, part by part.

Parts are the step of a setting (:mod:`.step`), a training run of a setting with one seed, and the cosines of a variant.
Each is written when it is finished and found again by its configuration, data, initial weights, library, versions,
processor and threads, so that an evaluation can be stopped at any moment, and a changed one keeps what still holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from ..machine import cpu
from ..models import build_model
from ..training.checkpoint import state_digest
from ..training.config import TrainConfig
from ..training.data import CHANNELS, Dataset
from ..training.loop import seeded
from ..training.results import Event, Pretrained
from ..training.trainer import check, finetune, load_data, obstacles, pretrain
from .alignment import cosines
from .config import EvaluateConfig
from .flops import count_step
from .recommendation import recommend
from .results import Evaluation, Layer, Obstacles, Progress, ProgressCallback, Setting
from .step import StepCost, measure_apart
from .store import Store, write_json

if TYPE_CHECKING:
    from ..bundle.library import Library

#: Of what ``gf-tvm train --config`` takes.
CONFIG_SCHEMA = "gf_tvm.train_config/1"

PHASES = ("forward", "backward", "update")


def evaluate(
    config: EvaluateConfig, out: str | Path, *, library: Library | None = None, callback: ProgressCallback | None = None
) -> Evaluation:
    """Train and measure every setting, compare the gradients, and recommend a setting.

    Args:
        out: a folder. Finished parts are kept in it and not computed again; at the end it has ``evaluation.json`` and,
            if there is a recommendation, ``train.json``, which ``gf-tvm train --config`` takes.
        library: compiled kernels for the filtered backward pass; without it PyTorch computes the same.
        callback: called with the progress.

    Raises:
        ModelError: a model or data that cannot be used, found before anything is trained.
        TrainingError: a loss that is not finite.
        EvaluationError: a folder that cannot be written, a damaged part, or a step's process that failed.
    """
    return _Work(config, Path(out), library, callback).run()


class _Seed:
    """Data and pretrained weights of one seed; made when they are first needed."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self.config, self._folder = config, folder

    @cached_property
    def dataset(self) -> Dataset:
        return load_data(self.config)

    @cached_property
    def weights(self) -> str:
        """Digest of the initial weights: changes with the architecture behind a user's model name."""
        with seeded(self.config.seed, "weights"):
            model = build_model(self.config.model, len(self.dataset.classes), CHANNELS, self.config.image_size)
        return state_digest(model.state_dict())

    def pretrained(self, callback: Callable[[Event], None] | None) -> Pretrained:
        return pretrain(self.config, self.dataset, checkpoint=self._folder, callback=callback)


class _Work:
    def __init__(
        self, config: EvaluateConfig, out: Path, library: Library | None, callback: ProgressCallback | None
    ) -> None:
        self.config, self.out, self.library, self._callback = config, out, library, callback
        self.pairs = [(name, last) for last in config.last for name in config.variants]
        self.runs = [
            (seed, name, last, config.run(name, last, seed)) for seed in config.seeds for name, last in self.pairs
        ]
        # The gradients of a chain are those of its layers one by one, and so are their cosines: one part for a patch.
        self._filtered = {
            replace(config.train, patch=patch).patch_name: patch for patch in config.patches if patch is not None
        }
        self._done, self._total = 0.0, 0
        self._common = {
            "library": None if library is None else library.digest,
            "threads": torch.get_num_threads(),
            "cpu": cpu.cpu_model(),
            "versions": cpu.versions(),
        }
        self._seed = _Seed(config.pretraining(config.seeds[0]), out / "pretrained")

    def run(self) -> Evaluation:
        self._check()
        self.store = Store(self.out / "parts")
        parts, missing = self._finished()
        train = self.config.train
        pretrained_seeds = {seed for kind, seed, *_ in missing if kind != "step"}
        self._total = len(pretrained_seeds) * train.pretrain_epochs
        self._total += sum(train.epochs if kind == "run" else 1 for kind, *_ in missing)
        weights: dict[int, Pretrained] = {}
        for part in missing:
            kind, seed, name, last = part
            if kind != "step" and seed not in weights:
                weights = {seed: self._pretrain(seed)}
            made = self._make(part, weights.get(seed))
            self.store.put(f"{kind}-{name}-last{last}-seed{seed}", self._key(part), made)
            parts[part] = made
        return self._finish(parts)

    def _check(self) -> None:
        """Find what is wrong with model, data and layers before anything is written or trained."""
        config, seed = self.config, self._seed
        for name in config.variants:
            check(config.run(name, max(config.last), config.seeds[0]), seed.dataset)
        with seeded(seed.config.seed, "weights"):
            model = build_model(seed.config.model, len(seed.dataset.classes), CHANNELS, seed.config.image_size)
        count_step(model.eval(), seed.dataset.pretrain_train.x[:2])
        name = next((name for name, (patch, _) in config.variants.items() if patch), next(iter(config.variants)))
        self._obstacles = obstacles(config.run(name, max(config.last), config.seeds[0]), seed.dataset)

    def _order(self) -> list[tuple[str, int, str, int]]:
        """All parts. Steps first: they take seconds and fail where the training would fail after minutes."""
        first = self.config.seeds[0]
        parts = [("step", first, name, last) for name, last in self.pairs]
        for seed in self.config.seeds:
            parts += [("run", seed, name, last) for name, last in self.pairs]
            if seed == first:
                parts += [("layers", first, name, max(self.config.last)) for name in self._filtered]
        return parts

    def _finished(self) -> tuple[dict[Any, Any], list[tuple[str, int, str, int]]]:
        parts: dict[Any, Any] = {}
        missing = []
        for part in self._order():
            kind, seed, name, last = part
            found = self.store.get(f"{kind}-{name}-last{last}-seed{seed}", self._key(part))
            if found is None:
                missing.append(part)
            else:
                parts[part] = found
        return parts, missing

    def _use(self, seed: int) -> _Seed:
        """The data of ``seed``; only one seed's are held at a time."""
        if self._seed.config.seed != seed:
            self._seed = _Seed(self.config.pretraining(seed), self.out / "pretrained")
        return self._seed

    def _key(self, part: tuple[str, int, str, int]) -> dict[str, Any]:
        kind, seed, _, _ = part
        used = self._use(seed)
        key = {"kind": kind, **self._common, "dataset": used.dataset.digest, "weights": used.weights}
        key["config"] = self._run(part).to_dict()
        if kind == "step":
            key["steps"] = self.config.peak_steps
        elif kind == "layers":
            key["batches"] = self.config.cosine_batches
        return key

    def _run(self, part: tuple[str, int, str, int]) -> TrainConfig:
        kind, seed, name, last = part
        if kind == "layers":
            return replace(self.config.train, patch=self._filtered[name], chain=False, last=last, seed=seed)
        return self.config.run(name, last, seed)

    def _pretrain(self, seed: int) -> Pretrained:
        made = self._use(seed).pretrained(self._follow(f"pretraining, seed {seed}"))
        self._advance(self.config.train.pretrain_epochs)
        return made

    def _make(self, part: tuple[str, int, str, int], weights: Pretrained | None) -> Any:
        kind, seed, name, last = part
        run, dataset = self._run(part), self._use(seed).dataset
        label = f"{name}, last {last}"
        if kind == "step":
            self._report(f"measuring a step of {label}")
            path = None if self.library is None else Path(self.library.path)
            masks = dataset.finetune_train.has_masks
            made: Any = asdict(measure_apart(run, len(dataset.classes), masks, path, self.config.peak_steps))
        elif kind == "layers":
            self._report(f"comparing gradients of {label}")
            assert weights is not None
            found = cosines(run, dataset, weights.state, self.library, self.config.cosine_batches)
            made = [asdict(layer) for layer in found]
        else:
            assert weights is not None
            follow = self._follow(f"{label}, seed {seed}")
            others = cpu.OtherLoad()
            result = finetune(run, dataset, weights, library=self.library, callback=follow)
            made = {
                "task": result.task,
                "metric": result.metric,
                "score": result.test_accuracy,
                "initial_score": result.initial_test_accuracy,
                "step_ms": result.step_ms,
                "other_cores": others.cores(),
                "kernels": result.kernels,
                "test_images": dataset.sizes["finetune_test"],
                "chains": [list(chain) for chain in result.chains],
            }
        self._advance(run.epochs if kind == "run" else 1)
        return made

    def _finish(self, parts: dict[Any, Any]) -> Evaluation:
        config, first = self.config, self.config.seeds[0]
        settings, energy = [], []
        for name, last in self.pairs:
            runs = [parts["run", seed, name, last] for seed in config.seeds]
            cost = StepCost(**parts["step", first, name, last])
            energy.append(cost.energy)
            plain = {key: value for key, value in vars(cost).items() if key != "energy"}
            busy = [run.get("other_cores") for run in runs]  # parts of earlier versions have none
            settings.append(
                Setting(
                    variant=name,
                    last=last,
                    seeds=tuple(config.seeds),
                    scores=tuple(run["score"] for run in runs),
                    initial_scores=tuple(run["initial_score"] for run in runs),
                    step_ms={phase: median(run["step_ms"][phase] for run in runs) for phase in PHASES},
                    other_cores=None if None in busy else median(busy),
                    chains=runs[0].get("chains", []),  # of exact and unchained runs earlier versions wrote none
                    **plain,
                )
            )
        layers = [Layer(**layer) for name in self._filtered for layer in parts["layers", first, name, max(config.last)]]
        best, ruled_out = recommend(settings, config.memory_budget, config.max_score_drop)
        images = [parts["run", seed, name, last]["test_images"] for seed in config.seeds]
        evaluation = Evaluation(
            machine=cpu.describe(),
            threads=torch.get_num_threads(),
            versions=cpu.versions(),
            conditions=self._conditions(images, energy[0]),
            model=config.train.model,
            data=config.train.data,
            settings=tuple(settings),
            layers=tuple(layers),
            limits={"memory_budget": config.memory_budget, "max_score_drop": config.max_score_drop},
            recommendation=best,
            obstacles=Obstacles(ruled_out, *self._obstacles),
            train_config=None if best is None else self._train_config(best.variant, best.last),
            task=runs[0]["task"],
            metric=runs[0]["metric"],
        )
        write_json(self.out / "evaluation.json", evaluation.to_dict())
        if evaluation.train_config is None:
            (self.out / "train.json").unlink(missing_ok=True)  # of an evaluation with other limits
        else:
            write_json(self.out / "train.json", evaluation.train_config)
        return evaluation

    def _conditions(self, test_images: Sequence[int], energy: str) -> dict[str, str]:
        train, first = self.config.train, self.config.seeds[0]
        sizes = self._use(first).dataset.sizes
        kernels = "PyTorch operators" if self.library is None else f"the compiled kernels of {self.library.path.name}"
        off = self._obstacles[1]
        frozen = "kept between epochs" if off is None else f"computed in every step ({off})"
        before = (
            f"{train.pretrain_epochs} epochs of {sizes['pretrain_train']} images" if train.pretrain_epochs else "none"
        )
        return {
            "data": f"images of {train.image_size}x{train.image_size}, batch {train.batch}, seeds "
            f"{', '.join(map(str, self.config.seeds))}",
            "pretraining": f"{before}, learning rate {train.pretrain_lr:g}, {train.schedule}",
            "fine-tuning": f"{train.epochs} epochs of {sizes['finetune_train']} images, learning rate {train.lr:g}, "
            f"{train.schedule}; filtered gradients by {kernels}; the frozen layers' results are {frozen}",
            "scores": f"on {_span(test_images)} test images after the last epoch",
            "step times": "median step of each run, median over the seeds",
            "kept bytes": "tensors saved by autograd in a step, without parameters",
            "peak": "largest resident memory of a fresh process that trains "
            f"{self.config.peak_steps} steps, without the data set",
            "operations": "counted by formula, convolutions and linear layers",
            **self._chained(),
            "cosines": f"with the last {max(self.config.last)} convolutions filtered together, at the pretrained "
            f"weights of seed {first}, means of at most {self.config.cosine_batches} batches",
            "energy": energy,
        }

    def _chained(self) -> dict[str, str]:
        if not any(chain for _, chain in self.config.variants.values()):
            return {}
        return {
            "chains": "what is called chained keeps gradients on the patch grid between filtered convolutions where "
            "that is exact; its gradients, and so its cosines, are those of the same patch layer by layer; what is "
            "compiled before its first step is in no time, but in the peak memory"
        }

    def _train_config(self, variant: str, last: int) -> dict[str, Any]:
        run = self.config.run(variant, last, self.config.seeds[0])
        values = {**run.to_dict(), "patch": run.patch_name.removeprefix("R")}
        if self.library is not None:
            values["library"] = str(self.library.path)
        return {"schema": CONFIG_SCHEMA, "protocol": "paper", **values}

    def _advance(self, parts: int) -> None:
        self._done += parts
        self._report("")

    def _report(self, label: str, extra: float = 0.0) -> None:
        if self._callback is not None:
            self._callback(Progress(label, self._done + extra, self._total))

    def _follow(self, label: str) -> Callable[[Event], None]:
        def follow(event: Event) -> None:
            # The row comes after the last step, whose epoch is then complete.
            self._report(label, event.epoch - 1 + event.step / event.steps)

        return follow


def _span(counts: Sequence[int]) -> str:
    """``220``, or ``220 to 223``."""
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"

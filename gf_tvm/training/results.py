"""What a training run reports: progress, one row per epoch, the outcome as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from torch import nn

from .config import TrainConfig

SCHEMA = "gf_tvm.train/1"


@dataclass(frozen=True)
class EpochRow:
    """One epoch. Times exclude fetching the batches and evaluation, except ``seconds``, which has all.

    Attributes:
        epoch: counted from 1.
        train_loss, train_accuracy: means over the epoch's batches as they were trained.
        test_accuracy: of the part's test images after the epoch. Both hold the metric of the run's task: the mean IoU
            where that is segmentation.
        lr: learning rate of the last step.
        forward_seconds, backward_seconds, update_seconds: sums over the steps (loss counted as forward, clipping as
            update); forward_ms, backward_ms, update_ms: medians of one step.
        kept_bytes: what the epoch's first step kept for the backward pass (see :class:`~.step_costs.KeptBytes`);
        kept_bytes_convolutions: what the fine-tuned convolutions kept of it (0 while pretraining); in a chained run
            what the chains kept, for batch norms and activations, too, and convolutions that are in none.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    test_accuracy: float
    lr: float
    steps: int
    seconds: float
    forward_seconds: float
    backward_seconds: float
    update_seconds: float
    forward_ms: float
    backward_ms: float
    update_ms: float
    kept_bytes: int
    kept_bytes_convolutions: int


@dataclass(frozen=True)
class Event:
    """Progress: sent before the first step, after every step, and after every epoch with its ``row``.

    ``step`` counts finished steps of ``epoch`` (1 to ``epochs``), ``seconds_left`` estimates the time to the end of the
    phase (``pretrain`` or ``finetune``), None before the first step. ``metric`` is what the row's accuracies hold.
    """

    phase: str
    variant: str
    epoch: int
    epochs: int
    step: int
    steps: int
    seconds_left: float | None
    row: EpochRow | None = None
    metric: str = "accuracy"


EventCallback = Callable[[Event], None]


@dataclass(frozen=True)
class Pretrained:
    """Weights after pretraining on part A.

    Attributes:
        state: the model's state dict.
        digest: sha256 of ``state``.
        rows: one per epoch; those of a cached checkpoint are the ones measured when it was made.
        cached: whether nothing had to be trained.
    """

    state: dict[str, Any]
    digest: str
    rows: tuple[EpochRow, ...]
    cached: bool


@dataclass(frozen=True)
class TrainResult:
    """Outcome of one fine-tuning run; :meth:`to_dict` is what ``gf-tvm train --json`` writes per run.

    Attributes:
        task: ``classification`` or ``segmentation``; metric: what all accuracies of the run and its rows hold,
            ``accuracy`` or ``mIoU`` (mean intersection over union, see :class:`~.tasks.MeanIoU`).
        initial_test_accuracy: of part B's test images before fine-tuning; the rows have it after each epoch.
        trained_layers: names of the fine-tuned convolutions; head: name of the classifier, None if there is none.
        parameters, trained_parameters: numbers of scalars.
        kernels: what computed the gradients of each fine-tuned convolution: compiled kernels ("tvm"), gradient
            filtering in PyTorch ("torch"), or PyTorch's exact backward pass ("exact": also for a convolution that
            cannot be filtered).
        missing_workloads: keys of the workloads that the library lacks.
        resumed: number of epochs taken from a checkpoint.
        model: the fine-tuned network; not part of :meth:`to_dict`.
        cache: what became of the frozen layers' results, see :class:`gf_tvm.training.frozen.CacheReport`.
        best_epoch: whose weights the network has, where early stopping was on; None: those of the last one.
        chains: names of the convolutions of each chain, in a chained run.
    """

    config: TrainConfig
    machine: dict[str, Any]
    threads: int
    versions: dict[str, str | None]
    dataset: dict[str, Any]
    task: str
    metric: str
    parameters: int
    trained_parameters: int
    trained_layers: tuple[str, ...]
    head: str | None
    library: dict[str, str] | None
    kernels: dict[str, str]
    missing_workloads: tuple[str, ...]
    pretrain_rows: tuple[EpochRow, ...]
    pretrain_cached: bool
    pretrained_digest: str
    initial_test_accuracy: float
    rows: tuple[EpochRow, ...]
    resumed: int
    model: nn.Module = field(repr=False, compare=False)
    cache: dict[str, Any] = field(default_factory=dict)
    best_epoch: int | None = None
    chains: tuple[tuple[str, ...], ...] = ()

    @property
    def test_accuracy(self) -> float:
        """The metric on part B's test images of the network as it is: after the last epoch, or the best one."""
        return self.rows[(self.best_epoch or len(self.rows)) - 1].test_accuracy

    @property
    def step_ms(self) -> dict[str, float]:
        """Milliseconds of one step's forward and backward pass and update: the median epoch's median step."""
        phases = ("forward", "backward", "update")
        return {phase: median(getattr(row, f"{phase}_ms") for row in self.rows) for phase in phases}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = {name: value for name, value in vars(self).items() if name not in ("model", "config")}
        for name in ("rows", "pretrain_rows"):
            plain[name] = [asdict(row) for row in plain[name]]
        head = {"schema": SCHEMA, "variant": self.config.variant, "config": self.config.to_dict()}
        return {**head, "test_accuracy": self.test_accuracy, "step_ms": self.step_ms, **plain}

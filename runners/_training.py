"""What commands that train show and write while they do."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ._output import ProgressBar

if TYPE_CHECKING:
    from ..training.metrics import Metrics
    from ..training.results import EpochRow, Event


def metrics_of(args: argparse.Namespace) -> Metrics:
    """What --metrics and --tensorboard ask for. Raises GfTvmError."""
    from ..training.metrics import JsonLines, Metrics, Sink, TensorBoard

    sinks: list[Sink] = []
    if args.tensorboard is not None:
        sinks.append(TensorBoard(args.tensorboard))
    if args.metrics is not None:
        sinks.append(JsonLines(args.metrics, args.resume))
    return Metrics(sinks)


class Lines:
    """Shows events: a progress bar per phase and run, and a line per epoch."""

    def __init__(self) -> None:
        self._progress: ProgressBar | None = None
        self._shown: tuple[str, str] | None = None

    def __call__(self, event: Event) -> None:
        done = (event.epoch - 1) * event.steps + event.step
        if self._shown != (event.phase, event.variant):
            self.close()
            label = "pretraining" if event.phase == "pretrain" else f"fine-tuning {event.variant}"
            self._progress = ProgressBar(event.epochs * event.steps, label, initial=done)
            self._shown = (event.phase, event.variant)
        assert self._progress is not None
        if event.row is not None:
            self._progress.write(_epoch_line(event, event.row))
        elif done > self._progress.done:
            self._progress.update(done)

    def say(self, text: str) -> None:
        """Print a line of its own."""
        if self._progress is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._progress.write(text)

    def close(self) -> None:
        """End the bar."""
        if self._progress is not None:
            self._progress.close()
            self._progress = None

    def __enter__(self) -> Lines:
        # Until the first event: data are read, kernels built.
        self._progress = ProgressBar(None, "preparing", leave=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _epoch_line(event: Event, row: EpochRow) -> str:
    name = "pretrain" if event.phase == "pretrain" else event.variant
    kept = f"saved for backward {mb(row.kept_bytes)} MB"
    if event.phase == "finetune":
        kept += f", {mb(row.kept_bytes_convolutions)} by the convolutions"
    return (
        f"{name} {row.epoch}/{event.epochs}: loss {row.train_loss:.3f}, "
        f"{event.metric} train {_percent(row.train_accuracy)} test {_percent(row.test_accuracy)} %, "
        f"a step: forward {row.forward_ms:.1f} backward {row.backward_ms:.1f} update {row.update_ms:.1f} ms, {kept}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def mb(size: int) -> str:
    """Megabytes, 1e6 bytes."""
    return f"{size / 1e6:.2f}"

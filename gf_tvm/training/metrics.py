"""Where the rows of a running training go: a file of JSON lines, TensorBoard."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from .config import TrainConfig, TrainingError
from .results import EpochRow

SCHEMA = "gf_tvm.train.metrics/1"


class Sink(Protocol):
    """Takes the rows of a phase of a run; the same rows may come again, and then change nothing."""

    def rows(self, config: TrainConfig, phase: str, rows: Sequence[EpochRow]) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """Hands rows to all sinks, and closes them at its end."""

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = tuple(sinks)

    def rows(self, config: TrainConfig, phase: str, rows: Sequence[EpochRow]) -> None:
        """Record the rows so far of one phase (``pretrain`` or ``finetune``)."""
        for sink in self._sinks:
            sink.rows(config, phase, rows)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        for sink in self._sinks:
            sink.close()


class JsonLines:
    """One line per epoch and run, on disk as soon as the epoch has ended.

    A line has ``schema``, ``run`` (``exact``, ``R2``; null while pretraining, which all runs share), ``phase``,
    ``model``, ``data``, ``last``, ``seed`` and all fields of :class:`EpochRow`.
    """

    def __init__(self, path: str | Path, resume: bool = False) -> None:
        """``resume`` keeps the lines that are there, except for a last one that a crash left incomplete; else the first
        row replaces the file.

        Raises:
            TrainingError: the file cannot be read, or has lines that are no metrics. Later: it cannot be written.
        """
        self._path, self._mode = Path(path), "ab" if resume else "wb"
        self._file: io.FileIO | None = None
        self._known: set[str] = set()
        try:
            if resume and self._path.exists():
                self._known = self._keep()
        except OSError as error:
            raise self._cannot(error) from None

    def rows(self, config: TrainConfig, phase: str, rows: Sequence[EpochRow]) -> None:
        head: dict[str, Any] = {"schema": SCHEMA, "run": config.variant, "phase": phase, "model": config.model}
        head |= {"data": config.data, "last": config.last, "seed": config.seed}
        if phase == "pretrain":
            head |= {"run": None, "last": None}
        for row in rows:
            line = {**head, **asdict(row)}
            key = _key(line)
            if key not in self._known:
                self._write(json.dumps(line) + "\n")
                self._known.add(key)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, text: str) -> None:
        try:
            if self._file is None:
                # Unbuffered: what could not be written is known at once, and not tried again at the end.
                self._file = io.FileIO(self._path, self._mode)
            data = text.encode()
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self._path.is_file():
                os.fsync(self._file.fileno())
        except OSError as error:
            raise self._cannot(error) from None

    def _keep(self) -> set[str]:
        """Cut off an incomplete last line; return the keys of the others."""
        content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        known = set()
        for number, text in enumerate(content[:whole].splitlines(), 1):
            try:
                line = json.loads(text)
                if line["schema"] != SCHEMA:
                    raise ValueError(line["schema"])
                known.add(_key(line))
            except (ValueError, KeyError, TypeError):
                raise TrainingError(
                    f"line {number} of {str(self._path)!r} is no line of metrics ({SCHEMA}); name another file"
                ) from None
        if whole != len(content):
            os.truncate(self._path, whole)
        return known

    def _cannot(self, error: OSError) -> TrainingError:
        return TrainingError(f"cannot write the metrics to {str(self._path)!r}: {error.strerror or error}")


def _key(line: dict[str, Any]) -> str:
    """What two lines of one epoch have in common."""
    return json.dumps([line[name] for name in ("run", "phase", "model", "data", "last", "seed", "epoch")])


class TensorBoard:
    """Scalars under ``DIR/<run>`` (``DIR/pretrain`` for pretraining), by epoch.

    Every run's rows are written from its first epoch on, and what an earlier or interrupted run wrote there is marked
    as replaced, so nothing is shown twice.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises TrainingError if the package tensorboard is missing or the folder cannot be written."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrainingError(
                f"writing for TensorBoard needs the package tensorboard: pip install tensorboard ({error})"
            ) from None
        self._make, self._folder = SummaryWriter, Path(folder)
        self._writers: dict[str, Any] = {}
        self._written: dict[str, int] = {}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self._folder, os.W_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise TrainingError(f"cannot write for TensorBoard into {str(folder)!r}: {error.strerror}") from None

    def rows(self, config: TrainConfig, phase: str, rows: Sequence[EpochRow]) -> None:
        run = "pretrain" if phase == "pretrain" else config.variant
        if run not in self._writers and rows:
            self._writers[run] = self._make(str(self._folder / run), purge_step=0)
        for row in rows[self._written.get(run, 0) :]:
            for name, value in asdict(row).items():
                if name != "epoch" and value is not None:
                    self._writers[run].add_scalar(name, value, row.epoch)
            self._writers[run].flush()
        self._written[run] = len(rows)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

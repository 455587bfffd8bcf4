"""What the tuner and a board's session say to each other: JSON text, by way of one RPC function.

A request is an object with ``op``, an :class:`Operation`, and that operation's arguments: those of the method of this
name of :class:`~gf_tvm.tuning.measuring.board_service.BoardService`, which also says what is answered. Both sides may
be of different versions, so names stay as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from typing import Any

from ..task import ArgumentsTask, Task, TuningError, WorkloadTask


class Operation(Enum):
    """What a board can be asked to do."""

    HELLO = "hello"
    SENSE = "sense"
    PREPARE = "prepare"
    RUN = "run"
    COMPARE = "compare"
    REST = "rest"


def request_text(operation: Operation, /, **arguments: Any) -> str:
    """A request as it is sent."""
    return json.dumps({"op": operation.value, **arguments})


def checksum(data: bytes) -> str:
    """By which a board finds out whether a file has arrived as it was sent: its bytes and their SHA-256."""
    return f"{len(data)} {hashlib.sha256(data).hexdigest()}"


def task_values(task: Task) -> dict[str, Any]:
    """What a board needs to know of a task. Raises TuningError for one that a board cannot measure."""
    if isinstance(task, ArgumentsTask):
        return {"arguments": task.arguments}
    if not isinstance(task, WorkloadTask):
        raise TuningError(f"{task.identity.key}: only workloads of gf_tvm can be measured on a farm")
    return {"workload": task.workload.to_dict(), "device": task.device}


def task_of(values: Mapping[str, Any]) -> Task:
    """The task that :func:`task_values` has told."""
    if "arguments" in values:
        return ArgumentsTask(tuple((dtype, tuple(shape)) for dtype, shape in values["arguments"]))
    from ...core.workload import Workload

    return WorkloadTask(Workload.from_dict(values["workload"]), values["device"])


def gpu_of(name: str, gpu: Mapping[str, Any] | None, arch: str) -> Mapping[str, Any]:
    """The GPU with which a board measures; see :class:`gf_tvm.machine.gpu.GpuInfo`.

    Args:
        name: of the board.
        gpu: what its server says of its GPU.
        arch: that is needed ("sm_53").

    Raises:
        TuningError: it measures with none, or with another.
    """
    if gpu is None:
        raise TuningError(f"{name} measures with no GPU: start its server with gf-tvm farm serve --device DEVICE")
    if gpu.get("arch") != arch:
        raise TuningError(f"{name} measures with {gpu.get('name')} ({gpu.get('arch')}), what it is sent is for {arch}")
    return gpu

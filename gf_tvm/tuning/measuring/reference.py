"""The reference kernel, by which boards are compared with each other and with what they were."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..task import WorkloadTask


def reference_task(device: str) -> WorkloadTask:
    """What every board measures now and then, to compare boards with each other and with themselves: about 1 ms."""
    from ...core.geometry import Geometry
    from ...core.workload import Workload

    geometry = Geometry(n=2, ci=32, co=32, h=28, w=28, kernel=(3, 3), padding=(1, 1), patch=(2, 2))
    return WorkloadTask(Workload("backward", geometry), device)


@dataclass
class ReferenceKernel:
    """The reference kernel of a run.

    Args:
        task: see :func:`reference_task`.
        path: where it is being built; None before.
        library: where it is, as soon as it is built.
    """

    task: WorkloadTask
    path: Path | None = None
    library: Path | None = None

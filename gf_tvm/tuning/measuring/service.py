"""Which requests a builder or a measuring process answers: those about a CPU's candidates or a GPU's."""

from __future__ import annotations

from ..task import Task
from .worker import Greeter, Worker


def worker_for(task: Task | None) -> Worker | Greeter:
    """Make what answers the requests about a task; see :func:`gf_tvm.tuning.measuring.process.serve`."""
    if task is None:
        return Greeter()
    if task.gpu:
        # It loads PyTorch, which builders do without.
        from .gpu_worker import GpuWorker

        return GpuWorker(task)
    return Worker(task)

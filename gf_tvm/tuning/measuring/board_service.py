"""What a board does for the tuner: the requests of one RPC session.

A session is a process of its own (:mod:`gf_tvm.farm.server`), and it runs candidates in a further one, so a candidate
that crashes or hangs is a result like any other and the session goes on. Requests and answers are JSON text. An answer
is ``{"done": value}``; ``{"broken": line}`` if the board cannot go on (no memory, a full disk); or ``{"failed": line}``
if the request made no sense.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ...farm.server import SessionContext, versions
from ..task import Task, TuningError, WorkloadTask
from .measuring_process import MeasuringProcess
from .messages import Operation, gpu_of, task_of
from .options import MeasureOptions
from .process import describe
from .result import Result


def preload() -> None:
    """Import what sessions need before the server forks them: on a board that takes ten seconds."""
    import torch  # noqa: F401

    from ...core import verify, workload  # noqa: F401


class BoardService:
    """See the module; one instance for each session.

    Args:
        context: of the server.
    """

    def __init__(self, context: SessionContext) -> None:
        self._context = context
        self._measuring: MeasuringProcess | None = None
        # Of its own, so that the other keeps its inputs and their reference result.
        self._reference: MeasuringProcess | None = None
        self._tasks: dict[str, Task] = {}
        self._operations: dict[str, Callable[..., Any]] = {
            Operation.HELLO.value: self.hello,
            Operation.SENSE.value: self.sense,
            Operation.PREPARE.value: self.prepare,
            Operation.RUN.value: self.run,
            Operation.COMPARE.value: self.compare,
            Operation.REST.value: self.rest,
        }

    def handle(self, request: str) -> str:
        """Answer one request: a JSON object with ``op`` and that operation's arguments."""
        counters = self._context.counters
        counters.working = True
        try:
            arguments = json.loads(request)
            name = arguments.pop("op")
            if name not in self._operations:
                raise ValueError(f"unknown operation {name!r}; known: {', '.join(self._operations)}")
            answer = {"done": self._operations[name](**arguments)}
        except (TuningError, MemoryError) as error:
            answer = {"broken": str(error) or "not enough memory"}
        except Exception as error:
            answer = {"failed": describe(error)}
        finally:
            counters.working = False
        return json.dumps(answer)

    def close(self) -> None:
        """End what runs candidates."""
        for process in (self._measuring, self._reference):
            if process is not None:
                process.end()
        self._measuring, self._reference = None, None

    # -------------------------------------------------------------------------------------------------- the operations

    def hello(self, options: dict[str, Any]) -> dict[str, Any]:
        """Take the options of measuring; tell what this board is."""
        self.close()
        cores = len(os.sched_getaffinity(0))
        wanted = MeasureOptions(**options)
        if self._context.emulated:  # whose times mean nothing, and which has the cores of the machine that emulates
            wanted = MeasureOptions(**{**options, "threads": min(wanted.threads, cores)})
        self._measuring, self._reference = self._new_process(wanted), self._new_process(wanted)
        return {
            "name": self._context.name,
            "cores": cores,
            "threads": wanted.threads,
            "versions": versions(),
            "gpu": self._context.gpu,
            "emulated": self._context.emulated,
            "sensors": self.sense(),
        }

    def _new_process(self, options: MeasureOptions) -> MeasuringProcess:
        return MeasuringProcess(options, self._context.folder, fork=True)

    def sense(self) -> dict[str, Any]:
        """Clock, temperature and throttling."""
        return self._context.sensors.read().to_dict()

    def prepare(self, task: dict[str, Any], seed: int) -> float:
        """Make the inputs and the reference; returns the seconds that took."""
        begun = time.monotonic()
        self._measuring_process().prepare(self._task(task), seed)
        return time.monotonic() - begun

    def run(self, task: dict[str, Any], file: str, best: float | None, reference: bool = False) -> dict[str, Any]:
        """Check and time an uploaded library: a candidate, or the ``reference`` kernel."""
        path = self._context.folder / file
        process = self._measuring_process() if self._reference is None or not reference else self._reference
        result = process.run(self._task(task), path, best)
        if not reference:
            self._count(result)
        path.unlink(missing_ok=True)
        return {"result": asdict(result), "sensors": self.sense()}

    def compare(self, task: dict[str, Any], files: dict[str, str], seed: int) -> dict[str, Any]:
        """Check and time uploaded libraries in turns."""
        paths = {name: self._context.folder / file for name, file in files.items()}
        results = self._measuring_process().compare(self._task(task), paths, seed)
        for name, path in paths.items():
            self._count(results[name])
            path.unlink(missing_ok=True)
        return {"results": {name: asdict(result) for name, result in results.items()}, "sensors": self.sense()}

    def rest(self, seconds: float) -> dict[str, Any]:
        """Do nothing for a while, to cool down; returns the sensors after it."""
        time.sleep(min(seconds, 60.0))
        return self.sense()

    # ---------------------------------------------------------------------------------------------------------- helpers

    def _measuring_process(self) -> MeasuringProcess:
        if self._measuring is None:
            raise ValueError("hello must come first")
        return self._measuring

    def _task(self, values: dict[str, Any]) -> Task:
        """The task that a request is about; the same object each time, by which a process keeps its inputs."""
        text = json.dumps(values, sort_keys=True)
        if text not in self._tasks:
            task = task_of(values)
            if isinstance(task, WorkloadTask) and task.profile.gpu is not None:
                gpu_of(self._context.name, self._context.gpu, task.profile.gpu.arch)
            self._tasks[text] = task
        return self._tasks[text]

    def _count(self, result: Result) -> None:
        self._context.counters.count(failed=result.status != "ok")

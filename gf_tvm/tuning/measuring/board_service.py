"""What a board does for the tuner: the requests of one RPC session.

A session is a process of its own (:mod:`gf_tvm.farm.server`), and it runs candidates in a further one, so a candidate
that crashes or hangs is a result like any other and the session goes on. Requests and answers are JSON text. An answer
is ``{"done": value}``; ``{"broken": line}`` if the board cannot go on (no memory, a full disk); or ``{"failed": line}``
if the request made no sense. The last two have the board's ``name`` beside the line: else nobody would know which board
it is that cannot even greet.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...farm.server import SessionContext, versions
from ..task import Task, TuningError, WorkloadTask
from .measuring_process import MeasuringProcess
from .messages import Operation, checksum, gpu_of, task_of
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
            if self._context.trouble:
                raise TuningError(self._context.trouble)
            arguments = json.loads(request)
            name = arguments.pop("op")
            if name not in self._operations:
                raise ValueError(f"unknown operation {name!r}; known: {', '.join(self._operations)}")
            answer = {"done": self._operations[name](**arguments)}
        except (TuningError, MemoryError) as error:
            answer = {"broken": str(error) or "not enough memory", "name": self._context.name}
        except Exception as error:
            answer = {"failed": describe(error), "name": self._context.name}
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
            "checksums": "sha256",  # what run and compare understand
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

    def run(
        self,
        task: dict[str, Any],
        file: str,
        best: float | None,
        reference: bool = False,
        checksums: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        """Check and time an uploaded library: a candidate, or the ``reference`` kernel.

        ``checksums`` of uploaded files, by name, are as :func:`gf_tvm.tuning.measuring.messages.checksum` makes them.
        """
        path = self._uploaded(file, checksums)
        process = self._measuring_process() if self._reference is None or not reference else self._reference
        result = process.run(self._task(task), path, best)
        if not reference:
            self._count(result)
        path.unlink(missing_ok=True)
        return {"result": asdict(result), "sensors": self.sense()}

    def compare(
        self, task: dict[str, Any], files: dict[str, str], seed: int, checksums: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """Check and time uploaded libraries in turns."""
        paths = {name: self._uploaded(file, checksums) for name, file in files.items()}
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

    def _uploaded(self, file: str, checksums: dict[str, str] | None) -> Path:
        """The path of an uploaded file.

        Raises:
            ValueError: it is outside the session's folder.
            TuningError: it is not what was sent. On a full disk TVM writes what it can and says nothing; loading the
                rest would look like the candidate's crash.
        """
        path = self._context.path(file)
        wanted = None if checksums is None else checksums[file]
        if wanted is None:  # by a host that sends none
            return path
        try:
            found = checksum(path.read_bytes())
        except OSError as error:
            raise TuningError(f"an uploaded library cannot be read: {error.strerror or error}") from None
        if found != wanted:
            path.unlink(missing_ok=True)
            (have, _), (want, _) = found.split(), wanted.split()
            reason = "other bytes than were sent" if have == want else f"{have} of {want} bytes; its disk may be full"
            raise TuningError(f"of an uploaded library there are {reason}")
        return path

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

"""A farm's measurer without boards: what they answer is what the test says."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from farm_helpers import small_workload

from gf_tvm.farm.server import versions
from gf_tvm.machine.profiles import get_profile
from gf_tvm.tuning.measuring.board import BoardSession
from gf_tvm.tuning.measuring.board_link import State
from gf_tvm.tuning.measuring.farm_measurer import FarmMeasurer
from gf_tvm.tuning.measuring.jobs import Job
from gf_tvm.tuning.measuring.options import FarmOptions, MeasureOptions
from gf_tvm.tuning.measuring.reference import reference_task
from gf_tvm.tuning.measuring.result import Result
from gf_tvm.tuning.task import Candidate, WorkloadTask

HOST = get_profile("host").name
TASK = WorkloadTask(small_workload(), HOST)
REFERENCE = reference_task(HOST)
COOL = {"throttled": [], "celsius": 50.0, "mhz": 1500.0, "governor": "performance"}
HOT = {**COOL, "celsius": 85.0}


class FakeProcess:
    """A link whose board answers what the test says."""

    alive = True

    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.answers: deque[Any] = deque()
        self.ended = False
        self.connection = SimpleNamespace(poll=lambda seconds: False)

    def send(self, task: object, request: Callable[..., Any], timeout: float, /, **arguments: Any) -> None:
        assert timeout > 0
        name = request.__name__
        self.sent.append((name, json.loads(arguments["request"]) if name == "call" else arguments))

    def receive(self) -> Any:
        answer = self.answers.popleft()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> int:
        self.ended = True
        return 0


class FakeFarm:
    """A measurer that was never entered, and its boards."""

    def __init__(self, clock: list[float], **options: Any) -> None:
        self.clock = clock
        self.measurer = FarmMeasurer(
            MeasureOptions(), FarmOptions(("127.0.0.1", 9), "rpi4", **options), "a board", reference=REFERENCE
        )
        self.run, self.jobs = self.measurer._run, self.measurer._run.jobs
        assert self.run.reference is not None
        self.run.reference.path = self.run.reference.library = Path("reference.so")

    def board(self, name: str, **info: Any) -> BoardSession:
        """A board that the tracker has given."""
        slot = BoardSession(len(self.measurer._sessions), self.run)
        self.measurer._sessions.append(slot)
        return self.greet(slot, name, **info)

    def greet(self, slot: BoardSession, name: str, **info: Any) -> BoardSession:
        slot.process = FakeProcess()  # type: ignore[assignment]
        slot.state = State.CONNECTING
        self.answer(slot, f"{name}:9000", plain=True)
        assert slot.state == State.GREETING
        told = {"name": name, "cores": 4, "threads": 1, "versions": versions(), "emulated": False, "sensors": COOL}
        self.answer(slot, {**told, **info})
        return slot

    def answer(self, slot: BoardSession, value: Any, plain: bool = False) -> None:
        """The board answers the request that it works on."""
        process: Any = slot.process
        process.answers.append(value if plain else json.dumps({"done": value}))
        slot.take_answer()

    def job(self, number: int = 1) -> Job:
        made = Job(TASK, {"candidate": Path(f"/nonexistent/{number}.so")}, Candidate.of_config({"i": number}))
        self.jobs.waiting.append(made)
        return made

    def start(self, slot: BoardSession) -> None:
        """Give the board work, up to the point where it runs."""
        assert slot.state == State.FREE
        slot.give_work()
        if slot.state == State.PREPARING:
            self.answer(slot, 0.5)
        assert slot.state == State.UPLOADING
        self.answer(slot, None, plain=True)
        assert slot.state == State.RUNNING

    def end_run(self, slot: BoardSession, seconds: float | None, sensors: dict[str, Any] = COOL) -> None:
        result = Result("crash") if seconds is None else Result("ok", (seconds,), 0.0)
        self.answer(slot, {"result": asdict(result), "sensors": sensors})

    def refer(self, slot: BoardSession, seconds: float | None) -> None:
        """The board runs the reference kernel."""
        slot.reference_due = 0
        self.start(slot)
        assert slot.job is not None
        assert slot.job.task is REFERENCE
        self.end_run(slot, seconds)

    def work(self, slot: BoardSession, sensors: dict[str, Any] = COOL) -> None:
        """One candidate on a board that is not due for the reference."""
        slot.reference_due = max(slot.reference_due, 1)
        self.job()
        self.start(slot)
        self.end_run(slot, 1e-3, sensors)

    def troubles(self, name: str) -> dict[str, int]:
        return dict(self.run.health.boards[name].troubles)

    def notes(self) -> str:
        found = "\n".join(self.run.notes)
        self.run.notes.clear()
        return found

    def after(self, seconds: float) -> None:
        self.clock[0] += seconds
        for slot in self.measurer._sessions:
            slot.watch(self.measurer._tracker.last_sign(slot.name))

"""Whatever boards do - answer, hang, break off, talk nonsense - a run ends, and neither spins nor tells without end.

The farm's own loop runs on a clock that the test turns.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_farm import COOL, HOT, TASK, FakeFarm
from hypothesis import given, settings
from hypothesis import strategies as st

from gf_tvm.farm.server import versions
from gf_tvm.farm.tracker import Board
from gf_tvm.tuning.measuring import board, board_link, farm_measurer, health
from gf_tvm.tuning.measuring.board_link import State
from gf_tvm.tuning.measuring.jobs import LOSSES
from gf_tvm.tuning.measuring.process import CandidateFailed, Ended
from gf_tvm.tuning.measuring.result import Result
from gf_tvm.tuning.task import Candidate, TuningError

#: What may come of a request, and how likely it is.
FATES = ("answers", "hangs", "breaks off", "talks nonsense", "is broken", "is hot")


VERSIONS = versions()


class World:
    """The clock, the boards' fates and what the loop has done."""

    def __init__(self, seed: int, weights: Sequence[int], names: Sequence[str]) -> None:
        self.rng = random.Random(seed)
        self.weights, self.names = weights, names
        self.clock = [1000.0]
        self.processes: list[Link] = []
        self.requests = self.steps = self.told = 0

    def link(self, role: str, *_: Any) -> Link:
        made = Link(self, int(role.removeprefix("link-")))
        self.processes.append(made)
        return made

    def wait(self, _: Any, seconds: float) -> None:
        """Until something happens, as the loop waits."""
        due = [link.due - self.clock[0] for link in self.processes if link.due is not None and not link.ended]
        self.clock[0] += max(0.0, min([seconds, *due]))


class Link:
    """A link process, and a board behind it that does what its fate is."""

    alive = True

    def __init__(self, world: World, number: int) -> None:
        self._world = world
        self._name = world.names[number % len(world.names)]
        self.ended = False
        self.due: float | None = world.clock[0] + 0.5  # it starts
        self._deadline = world.clock[0] + 300.0
        self._answer: Any = None
        self.connection = SimpleNamespace(poll=lambda seconds: False)

    def start(self) -> None:
        self.due = None

    def send(self, task: object, request: Callable[..., Any], timeout: float, /, **arguments: Any) -> None:
        world = self._world
        world.requests += 1
        name = request.__name__
        operation = json.loads(arguments["request"])["op"] if name == "call" else name
        (fate,) = world.rng.choices(FATES, world.weights)
        self.due = None if fate == "hangs" else world.clock[0] + world.rng.choice([0.0, 0.01, 1.0])
        self._deadline = world.clock[0] + timeout
        result = asdict(Result("ok", (1e-3,), 0.0))
        sensors = HOT if fate == "is hot" else COOL
        greeting = {"name": self._name, "cores": 4, "threads": 1, "versions": VERSIONS, "emulated": False}
        plain = {"connect": "10.0.0.1:9", "upload": "1 x"}
        done = {"hello": greeting, "prepare": 0.5, "run": {"result": result, "sensors": sensors}, "rest": sensors}
        answers: dict[str, Any] = {
            "breaks off": world.rng.choice([Ended(-11), CandidateFailed("failed", "RPCError: x")]),
            "talks nonsense": "{}",
            "is broken": json.dumps({"broken": "a full disk"}),
        }
        good = plain[operation] if operation in plain else json.dumps({"done": done[operation]})
        self._answer = answers.get(fate, good) if operation not in plain or fate == "breaks off" else good

    @property
    def seconds_left(self) -> float:
        return max(self._deadline - self._world.clock[0], 0.0)

    @property
    def overdue(self) -> bool:
        return (self.due is not None and self._world.clock[0] >= self.due) or not self.seconds_left

    def receive(self) -> Any:
        if self.due is None or self._world.clock[0] < self.due:
            self.ended = True
            raise CandidateFailed("timeout", "did not end in time")
        self.due = None
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer

    def end(self) -> int:
        self.ended = True
        return 0


class Builders:
    """Build in no time."""

    seconds_left = 1.0

    def __init__(self) -> None:
        self._built: list[tuple[Any, Any, None]] = []

    def submit(self, key: Any, *_: Any, **__: Any) -> None:
        self._built.append((key, None, None))

    def collect(self) -> list[tuple[Any, Any, None]]:
        built, self._built = self._built, []
        return built

    def connections(self) -> list[Any]:
        return []

    def drop(self) -> None:
        pass


@given(
    seed=st.integers(0, 1 << 32),
    weights=st.lists(st.integers(0, 9), min_size=len(FATES), max_size=len(FATES)).filter(any),
    # Equal names, too: every Raspberry Pi is called raspberrypi until somebody names it.
    names=st.lists(st.sampled_from(["raspberrypi", "pi4a", "pi4b"]), min_size=1, max_size=5),
    ghosts=st.integers(0, 20),
    count=st.integers(1, 12),
)
@settings(deadline=None, max_examples=60)
def test_a_run_ends_and_neither_spins_nor_tells_without_end(
    seed: int, weights: list[int], names: list[str], ghosts: int, count: int
) -> None:
    world = World(seed, weights, names)
    with pytest.MonkeyPatch.context() as patch:
        for module in (board, farm_measurer, health):
            patch.setattr(module, "time", SimpleNamespace(monotonic=lambda: world.clock[0]))
        patch.setattr(board_link, "Process", world.link)
        patch.setattr(farm_measurer, "wait", world.wait)
        farm = FakeFarm(world.clock)
        measurer, tracker = farm.measurer, farm.measurer._tracker
        measurer._builders = Builders()  # type: ignore[assignment]
        measurer._scratch = SimpleNamespace(folder=Path("/nonexistent"), new_path=lambda suffix: Path("/nonexistent/x"))  # type: ignore[assignment]
        tracker.listed = [Board("rpi4", f"b{i}:9000", {}) for i in range(len(names) + ghosts)]
        patch.setattr(tracker, "look", lambda now: None)
        step = measurer._step

        def counted() -> None:
            world.steps += 1
            elapsed = world.clock[0] - 1000.0
            # Each request is some steps; else the loop looks once a second, and for each board that it asks for.
            assert world.steps <= 50 + 8 * world.requests + 8 * elapsed
            step()
            asking = [one for one in measurer._sessions if one.state in (State.STARTING, State.CONNECTING)]
            assert len(asking) <= 4
            assert sum(not link.ended for link in world.processes) <= len(measurer._sessions)

        patch.setattr(measurer, "_step", counted)
        candidates = [Candidate.of_config({"number": number}) for number in range(count)]
        left = list(candidates)

        def source(room: int) -> list[Candidate]:
            taken = left[:room]
            del left[:room]
            return taken

        def say(kind: str, line: str) -> None:
            world.told += 1
            assert len(line) < 1000

        done: list[Candidate] = []
        try:
            for candidate, _ in measurer.measure(TASK, source, lambda: None, lambda: False, say):
                done.append(candidate)
        except TuningError:
            pass  # no board was at work for half an hour
        else:
            assert sorted(one.id for one in done) == sorted(one.id for one in candidates)
        elapsed = world.clock[0] - 1000.0
        assert world.told <= 50 + 4 * world.requests + 3 * elapsed
        # Boards that are of no use are asked later and later, and put aside.
        assert world.requests <= 50 + 8 * LOSSES * count + 2 * len(names) * (1 + elapsed)

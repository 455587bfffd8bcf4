"""Measures on a farm: all free boards of a tracker at once, while this machine builds the next candidates.

One loop watches the builders and, for each board, a :mod:`~gf_tvm.tuning.measuring.link` process that holds its RPC
session. Every step on a board has a deadline. What goes wrong there is one of two things:

* the candidate's doing: the board says so (crash, timeout, wrong, ...), which is the candidate's result;
* the board's, the network's or the tracker's (:data:`TROUBLES`): the candidate is measured again, if possible on
  another board, and neither the log nor the cost model hears of it.

A board that fails again and again, or whose speed drifts, is put aside for a while; one that is hot or throttled
cools down first.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ...errors import FarmError
from ...farm.protocol import TrackerConnection, TrackerLost, show
from ...farm.tracker import Board, boards_of, check_key
from ..task import Candidate, Task, TuningError, WorkloadTask
from .link import Link, new_link
from .measurer import CandidateSource, Measurer, Notify, failed_build
from .measuring_process import COMPARE_SECONDS, PREPARE_SECONDS
from .messages import gpu_of, task_values
from .options import FarmOptions, MeasureOptions
from .process import TICK, CandidateFailed, Ended, Process
from .result import Result
from .worker import Worker

#: Gives libraries that were built elsewhere; see :meth:`FarmMeasurer.measure_built`.
BuiltSource = Callable[[], Sequence[tuple[Task, Candidate, Path]]]

#: What can go wrong that is not the candidate's doing. ``board lost``: its server or the connection ended, or it
#: stopped answering; ``timeout``: a step took longer than it may; ``no board``: the tracker had none to give, or is
#: not there; ``throttled``: hot, or a lower clock; ``drift``: another speed than before, or than its like; ``refused``:
#: other versions than the host's; ``broken``: no memory, a full disk.
TROUBLES = ("board lost", "timeout", "no board", "throttled", "drift", "refused", "broken")

_REQUEST_SECONDS = 30.0  # waiting for the tracker to give a board
_CONNECT_SECONDS = 20.0
_HELLO_SECONDS = 60.0
_UPLOAD_SECONDS = 60.0
_SENSE_SECONDS = 90.0
_SUMMARY_SECONDS = 5.0  # between two looks at the tracker's list
_SILENT_SECONDS = 30.0  # servers report every 5 seconds
_REST_SECONDS = 15.0
_RETRIES = (0.5, 2.0, 5.0, 15.0)
# Troubles in a row after which a board is put aside.
_STRIKES = 3
# Times that a candidate may be lost with a board before it is given up.
_LOSSES = 4
# Trials on a board between two runs of the reference kernel.
_REFERENCE_TRIALS = 24


def reference_task(device: str) -> WorkloadTask:
    """What every board measures now and then, to compare boards with each other and with themselves: about 1 ms."""
    from ...core.geometry import Geometry
    from ...core.workload import Workload

    geometry = Geometry(n=2, ci=32, co=32, h=28, w=28, kernel=(3, 3), padding=(1, 1), patch=(2, 2))
    return WorkloadTask(Workload("backward", geometry), device)


@dataclass
class _Job:
    """Something to do on a board: one candidate, or the final comparison of several."""

    task: Task
    files: dict[str, Path]
    candidate: Candidate | None
    seed: int = 0
    keep: bool = False  # the files are not ours
    lost_on: list[str] = field(default_factory=list)


@dataclass
class _Known:
    """What this run knows of a board, by its name."""

    trials: int = 0
    strikes: int = 0
    aside_until: float = 0.0
    hot_since: float | None = None
    first_reference: float | None = None
    troubles: Counter[str] = field(default_factory=Counter)


class _Slot:
    """A link process and the board behind it. ``state`` names what it does or waits for."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: Process | None = None
        self.state = "closed"
        self.retry_at = 0.0
        self.attempts = 0
        self.heard = 0.0
        self.address = ""
        self.name = ""
        self.job: _Job | None = None
        self.remaining: list[tuple[str, Path]] = []
        self.uploaded: dict[str, str] = {}
        self.prepared: tuple[str, int] | None = None
        self.prepare_seconds = 0.0
        self.reference_due = 0
        self.sent = 0

    @property
    def label(self) -> str:
        return self.name or self.address or "a board"


_BUSY = ("starting", "connecting", "greeting", "preparing", "uploading", "running", "resting")
_SESSION = ("greeting", "preparing", "uploading", "running", "resting", "free", "aside")


class FarmMeasurer(Measurer):
    """Builds on this machine and measures on a farm.

    Args:
        options: how to measure; ``builders`` are this machine's.
        farm: where the boards are.
        description: of the kind of board, for the logs' headers.
        reference: see :func:`reference_task`; None does without.
        arch: of the boards' GPUs, if they are to measure with them ("sm_53").

    Raises:
        FarmError: on entering: no tracker, or no board with the key, or none with such a GPU.
        TuningError: while measuring: no board for too long, or no room for the candidates' libraries.
    """

    def __init__(
        self,
        options: MeasureOptions,
        farm: FarmOptions,
        description: str,
        reference: WorkloadTask | None = None,
        arch: str = "",
    ) -> None:
        super().__init__(options)
        self._farm = farm
        self._description = description
        self._arch = arch
        self._reference = reference
        self._reference_library: Path | None = None
        self._reference_path: Path | None = None  # where it is being built
        self._slots: list[_Slot] = []
        self._known: dict[str, _Known] = {}
        self._jobs: deque[_Job] = deque()
        self._building: dict[int, tuple[Task, Candidate, Path]] = {}
        self._built = 0
        self._done: deque[tuple[Candidate, Result | None]] = deque()
        self._compared: dict[str, Result] | None = None
        self._answers: dict[tuple[str, int], Any] = {}
        self._best: Callable[[], float | None] = lambda: None
        self._listed: list[Board] = []
        self._signs: dict[tuple[str, str], tuple[object, float]] = {}
        self._summary_at = 0.0
        self._tracker_gone = ""
        self._emulated = False
        self._last_work = 0.0
        self._notes: deque[str] = deque()
        self._wakes: list[Connection] = []

    # --------------------------------------------------------------------------------------------------- the outer face

    def __enter__(self) -> FarmMeasurer:
        self._listed = check_key(self._farm.tracker, self._farm.key)
        self._check_gpus()
        self._emulated = any(board.info.get("emulated") for board in self._listed)
        super().__enter__()
        self._last_work = time.monotonic()
        return self

    def _check_gpus(self) -> None:
        """Raise FarmError if no board has the GPU: it would be refused in its turn, and the others waited for."""
        reasons = []
        for board in self._listed:
            try:
                if self._arch and board.info:
                    gpu_of(board.name, board.info.get("gpu"), self._arch)
                return
            except TuningError as error:
                reasons.append(str(error))
        raise FarmError(f"no board with the key {self._farm.key!r} has a GPU of {self._arch}: {reasons[0]}")

    def close(self) -> None:
        """End all sessions and workers; harmless when repeated."""
        for slot in self._slots:
            self._hang_up(slot)
        super().close()

    @property
    def made(self) -> dict[str, Any]:
        """See :meth:`Measurer.made`. The CPU or GPU is the kind of board: each trial names its board."""
        made = {
            "gpu" if self._arch else "cpu": self._description,
            "threads": self.options.threads,
            "measurement": self.options.to_dict(),
            "farm": self._farm.key,
        }
        return {**made, "emulated": True} if self._emulated else made

    @property
    def parallel(self) -> int:
        """Candidates that can be in work at once."""
        return self.options.builders + max(len(self._slots), len(self._listed))

    @property
    def boards(self) -> tuple[int, int]:
        """How many boards are at work, and how many there are."""
        return sum(slot.job is not None for slot in self._slots), max(len(self._listed), self._connected())

    @property
    def report(self) -> dict[str, Any]:
        """By board: trials, and how often each of :data:`TROUBLES` happened; "" is where no board is known."""
        return {
            "key": self._farm.key,
            "tracker": show(self._farm.tracker),
            "emulated": self._emulated,
            "boards": {
                name: {"trials": known.trials, "troubles": dict(known.troubles)} for name, known in self._known.items()
            },
        }

    def _map(
        self, task: Task, request: Callable[..., Any], jobs: Sequence[dict[str, Any]]
    ) -> Generator[tuple[int, Any, CandidateFailed | None], None, None]:
        """See :meth:`Measurer._map`; boards go on meanwhile."""
        asked: dict[tuple[str, int], int] = {}
        for index, job in enumerate(jobs):
            self._built += 1
            key = ("asked", self._built)
            asked[key] = index
            self._builders.submit(key, task, request, self.options.build_timeout, True, **job)
        while asked:
            self._step()
            for key in [key for key in asked if key in self._answers]:
                value, failure = self._answers.pop(key)
                yield asked.pop(key), value, failure

    def measure(
        self,
        task: Task,
        source: CandidateSource,
        best: Callable[[], float | None],
        over: Callable[[], bool],
        say: Notify,
    ) -> Generator[tuple[Candidate, Result | None], None, None]:
        """See :meth:`Measurer.measure`; candidates are yielded as they are done, in any order."""
        task_values(task)
        self._best = best
        self._last_work = time.monotonic()
        try:
            while not over():
                room = self._room()
                if room > 0:
                    for candidate in source(room):
                        self._build(task, candidate)
                if not (self._building or self._jobs or self._done or any(slot.job for slot in self._slots)):
                    return
                self._step()
                while self._notes:
                    say("note", self._notes.popleft())
                say("build", f"{len(self._building)} in building, {len(self._jobs)} waiting for a board")
                while self._done:
                    yield self._done.popleft()
        finally:
            self._abandon()

    def measure_built(
        self, source: BuiltSource, wake: Connection, over: Callable[[], bool], say: Notify
    ) -> Generator[tuple[Candidate, Result | None], None, None]:
        """Measure libraries that were built elsewhere, and which stay.

        Args:
            source: gives those that have come in.
            wake: is ready to be read when there are more, or when it is over.
            over: whether to stop.
            say: see :data:`~gf_tvm.tuning.measuring.measurer.Notify`.

        Yields:
            See :meth:`measure`.
        """
        self._best = lambda: None
        self._last_work = time.monotonic()
        self._wakes = [wake]
        try:
            while not over():
                for task, candidate, path in source():
                    self._jobs.append(_Job(task, {"candidate": path}, candidate, keep=True))
                self._step()
                while self._notes:
                    say("note", self._notes.popleft())
                while self._done:
                    yield self._done.popleft()
        finally:
            self._wakes = []
            self._abandon()

    def run(self, task: Task, library: Path, best: float | None = None) -> Result:
        """Measure one library on some board. Raises TuningError if it was given up."""
        candidate = Candidate.of_config({"library": str(library)})
        self._jobs.append(_Job(task, {"candidate": library}, candidate, keep=True))
        self._best = lambda: best
        self._last_work = time.monotonic()
        while not self._done:
            self._step()
        _, result = self._done.popleft()
        if result is None:
            raise TuningError(f"{library.name}: {_LOSSES} boards were lost with it")
        return result

    def compare(
        self, task: Task, libraries: Mapping[str, Path], seed: int, progress: Callable[[int, int], None] | None = None
    ) -> dict[str, Result]:
        """See :meth:`Measurer.compare`; all of it on one board. Raises TuningError if several are lost over it."""
        if not libraries:
            return {}
        job = _Job(task, dict(libraries), None, seed)
        self._compared = None
        self._last_work = time.monotonic()
        self._jobs.append(job)
        try:
            while self._compared is None:
                if len(job.lost_on) >= _LOSSES:
                    raise TuningError(f"{task.identity.key}: the final comparison failed on {', '.join(job.lost_on)}")
                self._step()
        finally:
            self._abandon()
        if progress is not None:
            progress(self.options.rounds, self.options.rounds)
        return self._compared

    def _abandon(self) -> None:
        """Forget what is not done: a session that works on it is closed, since its answer would come too late."""
        self._builders.drop()
        for _, _, path in self._building.values():
            self.discard(path)
        self._building.clear()
        for job in self._jobs:
            self._discard_files(job)
        self._jobs.clear()
        self._done.clear()
        for slot in self._slots:
            if slot.job is not None:
                self._discard_files(slot.job)
                slot.job = None
                self._hang_up(slot)

    def _discard_files(self, job: _Job) -> None:
        if job.candidate is not None and not job.keep:  # those of a comparison belong to the caller
            for path in job.files.values():
                self.discard(path)

    # -------------------------------------------------------------------------------------------------------- the loop

    def _room(self) -> int:
        """How many more candidates to take, so that neither builders nor boards wait: few, to learn from the last."""
        boards = max(1, self._connected())
        depth = self.options.builders + 2 * boards
        inside = len(self._building) + len(self._jobs) + sum(slot.job is not None for slot in self._slots)
        room = depth - inside
        # In portions: each proposal costs a ranking of many candidates.
        return room if room >= max(1, depth // 3) else 0

    def _connected(self) -> int:
        return sum(slot.state in _SESSION and slot.state != "aside" for slot in self._slots)

    def _build(self, task: Task, candidate: Candidate) -> None:
        self._built += 1
        path = self._scratch.new_path(task.suffix)
        self._building[self._built] = task, candidate, path
        self._builders.submit(
            ("build", self._built), task, Worker.build, self.options.build_timeout, candidate=candidate, path=path
        )

    def _step(self) -> None:
        """Wait until something happens, for a second at most, and deal with it."""
        now = time.monotonic()
        self._look_at_tracker(now)
        self._keep_slots(now)
        waited = [slot for slot in self._slots if slot.process is not None and slot.state in _BUSY]
        connections = [slot.process.connection for slot in waited if slot.process is not None]
        left = [slot.process.seconds_left for slot in waited if slot.process is not None]
        retries = [slot.retry_at - now for slot in self._slots if slot.state == "closed"]
        if not any(slot.state == "free" for slot in self._slots) or not self._jobs:
            wait(
                [*connections, *self._builders.connections(), *self._wakes],
                max(0.0, min(TICK, self._builders.seconds_left, *left, *retries, TICK)),
            )
        for key, value, failure in self._builders.collect():
            self._take_built(key, value, failure)
        for slot in waited:
            if slot.process is not None and slot.state in _BUSY and slot.process.overdue:
                self._take_answer(slot)
        for slot in self._slots:
            self._watch(slot)
            if slot.state == "free":
                self._give_work(slot)
        if self._connected():
            self._last_work = time.monotonic()
        elif time.monotonic() - self._last_work > 60 * self._farm.patience_minutes:
            raise TuningError(
                f"no board with the key {self._farm.key!r} was at work for {self._farm.patience_minutes:g} minutes"
                + (f": {self._tracker_gone}" if self._tracker_gone else "")
            )

    def _take_built(self, key: Any, value: Any, failure: CandidateFailed | None) -> None:
        kind, number = key
        if kind == "build" and number in self._building:
            task, candidate, path = self._building.pop(number)
            if failure is None:
                self._jobs.append(_Job(task, {"candidate": path}, candidate))
            else:
                self._done.append((candidate, failed_build(failure)))
        elif kind == "reference":
            if failure is not None:
                self._note(f"the reference kernel does not build, boards are not watched for drift: {failure}")
                self._reference, self._reference_library = None, None
            else:
                self._reference_library = self._reference_path
        else:
            self._answers[key] = (value, failure)

    # ----------------------------------------------------------------------------------------------------- the tracker

    def _look_at_tracker(self, now: float) -> None:
        """Which boards are there, and which have stopped reporting?"""
        if now < self._summary_at:
            return
        self._summary_at = now + _SUMMARY_SECONDS
        try:
            with TrackerConnection(self._farm.tracker, 2.0) as tracker:
                listed = boards_of(tracker.summary())
        except TrackerLost as lost:
            if not self._tracker_gone:
                self._note(f"{lost}; boards that are at work go on")
                self._trouble("", "no board")
            self._tracker_gone = str(lost)
            self._signs.clear()
            return
        if self._tracker_gone:
            self._note("the tracker is back")
            self._tracker_gone = ""
        self._listed = [board for board in listed if board.key == self._farm.key]
        signs = {}
        for board in self._listed:
            sign = board.info.get("updated")
            before = self._signs.get((board.name, board.address))
            signs[board.name, board.address] = before if before and before[0] == sign else (sign, now)
        self._signs = signs

    def _silent(self, slot: _Slot) -> float:
        """Seconds since the board last answered, or its server reported to the tracker; 0 if that is not known."""
        signs = [seen for (name, _), (sign, seen) in self._signs.items() if name == slot.name and sign is not None]
        return time.monotonic() - max(*signs, slot.heard) if signs else 0.0

    # ----------------------------------------------------------------------------------------------------------- slots

    def _keep_slots(self, now: float) -> None:
        """One slot for each board that is there; those without a session ask the tracker for one."""
        wanted = max(1, len(self._listed))
        if self._farm.boards is not None:
            wanted = min(wanted, self._farm.boards)
        while len(self._slots) < wanted:
            self._slots.append(_Slot(len(self._slots)))
        if self._reference is not None and self._watched and self._reference_path is None:
            self._built += 1
            self._reference_path = self._scratch.new_path(self._reference.suffix)
            candidate = Candidate.of_config(self._reference.space.default)
            self._builders.submit(
                *(("reference", self._built), self._reference, Worker.build, self.options.build_timeout),
                candidate=candidate,
                path=self._reference_path,
            )
        idle = sum(slot.state in ("starting", "connecting") for slot in self._slots)
        held = sum(slot.state in _SESSION for slot in self._slots)
        for slot in self._slots:
            if slot.state == "closed" and now >= slot.retry_at and idle + held < wanted:
                idle += 1
                if slot.process is None or not slot.process.alive:
                    self._hang_up(slot)
                    slot.process = Process(f"link-{slot.number}", 1, self._scratch.folder, serves=new_link)
                    slot.state = "starting"
                else:
                    self._connect(slot)

    @property
    def _watched(self) -> bool:
        return self._farm.drift is not None and not self._emulated

    def _hang_up(self, slot: _Slot) -> None:
        if slot.process is not None:
            slot.process.end()
            slot.process = None
        slot.state = "closed"
        slot.name, slot.address, slot.prepared = "", "", None

    def _connect(self, slot: _Slot) -> None:
        assert slot.process is not None
        slot.state = "connecting"
        slot.process.send(
            *(None, Link.connect, _REQUEST_SECONDS + _CONNECT_SECONDS),
            tracker=self._farm.tracker,
            key=self._farm.key,
            timeout=_REQUEST_SECONDS,
        )

    def _call(self, slot: _Slot, state: str, timeout: float, op: str, /, **arguments: Any) -> None:
        assert slot.process is not None
        slot.state = state
        slot.process.send(None, Link.call, timeout, request=json.dumps({"op": op, **arguments}))

    def _watch(self, slot: _Slot) -> None:
        """Find out about a board that stopped in the midst of something, or while it has nothing to do."""
        if slot.state in _SESSION and slot.state != "greeting" and self._silent(slot) > _SILENT_SECONDS:
            self._lose(slot, "board lost", f"it has not reported to the tracker for {_SILENT_SECONDS:.0f} s")
        elif slot.state == "aside" and slot.process is not None:
            known = self._about(slot)
            if time.monotonic() >= known.aside_until:
                known.strikes = 0
                slot.reference_due = 0
                slot.state = "free"
                self._note(f"{slot.label} is tried again")
        elif slot.state == "free" and slot.process is not None and slot.process.connection.poll(0):
            self._lose(slot, "board lost", "its session ended")

    # --------------------------------------------------------------------------------------------------------- answers

    def _take_answer(self, slot: _Slot) -> None:
        process = slot.process
        assert process is not None
        try:
            if slot.state == "starting":
                process.start()
                self._connect(slot)
                return
            value = process.receive()
        except CandidateFailed as failure:
            if slot.state == "greeting" and "no function" in str(failure):
                self._trouble("", "refused")
                self._note(f"{slot.label} runs another server than gf-tvm farm serve and cannot be used")
                self._hang_up(slot)
                slot.retry_at = time.monotonic() + self._farm.aside_seconds
            elif failure.status == "timeout":
                self._lose(slot, "timeout", f"{slot.state} took too long")
            else:
                kind = "no board" if slot.state == "connecting" and "tracker" in str(failure) else "board lost"
                self._lose(slot, kind, str(failure))
            return
        except Ended as ended:
            self._lose(slot, "board lost", str(ended))
            return
        slot.heard = time.monotonic()
        if slot.state == "connecting":
            self._connected_to(slot, value)
            return
        if slot.state == "uploading":
            self._upload_next(slot)
            return
        answer = json.loads(value)
        if "done" not in answer:
            kind = "broken" if "broken" in answer else "board lost"
            self._put_aside(slot, kind, str(answer.get("broken") or answer.get("failed")))
            return
        getattr(self, f"_after_{slot.state}")(slot, answer["done"])

    def _connected_to(self, slot: _Slot, address: str | None) -> None:
        if address is None:
            slot.state = "closed"
            slot.retry_at = time.monotonic() + _RETRIES[0]
            if not self._connected():
                self._trouble("", "no board")
                self._note(f"no board with the key {self._farm.key!r} is free; still waiting")
            return
        slot.address = address
        self._call(slot, "greeting", _HELLO_SECONDS, "hello", options=asdict(self.options))

    def _after_greeting(self, slot: _Slot, info: dict[str, Any]) -> None:
        slot.name = str(info["name"])
        slot.attempts, slot.reference_due = 0, 0
        known = self._about(slot)
        if complaint := self._complaint(info):
            known.troubles["refused"] += 1
            self._aside(slot, math.inf, complaint)
        elif time.monotonic() < known.aside_until:
            slot.state = "aside"  # held, so that the tracker does not give it again at once
        else:
            slot.state = "free"

    def _complaint(self, info: dict[str, Any]) -> str:
        """Why a board cannot be used; empty if it can."""
        for package in ("gf-tvm", "apache-tvm"):
            here, there = metadata.version(package), info["versions"].get(package)
            if here != there:
                return f"it has {package} {there}, this machine has {here}; run gf-tvm farm deploy again"
        if bool(info["emulated"]) != self._emulated:
            return "emulated boards and real ones cannot share a log"
        if info["threads"] > info["cores"]:
            return f"it has {info['cores']} cores for {info['threads']} threads; use --threads {info['cores']}"
        try:
            if self._arch:
                gpu_of(str(info["name"]), info["gpu"], self._arch)
        except TuningError as error:
            return str(error)
        return ""

    def _after_preparing(self, slot: _Slot, seconds: float) -> None:
        slot.prepare_seconds = seconds
        self._upload_next(slot)

    def _after_resting(self, slot: _Slot, sensors: dict[str, Any]) -> None:
        known = self._about(slot)
        celsius = _celsius(sensors)
        if not sensors.get("throttled") and (celsius is None or celsius < self._farm.hot_celsius - 10):
            known.hot_since = None
            slot.state = "free"
            self._note(f"{slot.label} has cooled down")
        elif known.hot_since is not None and time.monotonic() - known.hot_since > 60 * self._farm.cool_minutes:
            known.hot_since = None
            self._aside(slot, self._farm.aside_seconds, f"it did not cool down: {_state_of(sensors)}")
        else:
            self._rest(slot)

    def _rest(self, slot: _Slot) -> None:
        self._call(slot, "resting", _REST_SECONDS + _SENSE_SECONDS, "rest", seconds=_REST_SECONDS)

    def _after_running(self, slot: _Slot, answer: dict[str, Any]) -> None:
        job, slot.job = slot.job, None
        assert job is not None
        known = self._about(slot)
        sensors = answer["sensors"]
        celsius = _celsius(sensors)
        if sensors.get("throttled") or (celsius is not None and celsius >= self._farm.hot_celsius):
            self._after_throttled(slot, job, sensors)
            return
        known.strikes = 0
        if job.task is self._reference:
            self._after_reference(slot, _result(answer["result"]))
            return
        slot.reference_due -= 1
        slot.state = "free"
        board = {"name": slot.name, **{name: sensors.get(name) for name in ("mhz", "celsius", "governor")}}
        if self._arch:
            board |= {name: sensors.get(name) for name in ("gpu_mhz", "gpu_celsius")}
        if job.candidate is None:
            self._compared = {name: _result(r, board) for name, r in answer["results"].items()}
            return
        known.trials += 1
        self._discard_files(job)
        self._done.append((job.candidate, _result(answer["result"], board)))

    def _after_throttled(self, slot: _Slot, job: _Job, sensors: dict[str, Any]) -> None:
        """Repeat the trial, here or elsewhere, and let the board cool down."""
        known = self._about(slot)
        self._trouble(slot.name, "throttled")
        known.strikes += 1
        if job.task is not self._reference:
            self._jobs.appendleft(job)
        if known.strikes >= _STRIKES:
            self._aside(slot, self._farm.aside_seconds, f"throttled {known.strikes} times: {_state_of(sensors)}")
            return
        known.hot_since = time.monotonic()
        self._note(f"{slot.label} is {_state_of(sensors)}; it cools down and the trial is repeated")
        self._rest(slot)

    def _after_reference(self, slot: _Slot, result: Result) -> None:
        """Compare the board's speed with what it was and with the others'."""
        known = self._about(slot)
        slot.reference_due = _REFERENCE_TRIALS
        slot.state = "free"
        if result.seconds is None:
            self._put_aside(slot, "broken", f"the reference kernel fails there: {result.message}")
            return
        if known.first_reference is None:
            known.first_reference = result.seconds
        others = [k.first_reference for n, k in self._known.items() if n != slot.name and k.first_reference is not None]
        usual = min([known.first_reference, *([statistics.median(others)] if others else [])])
        drift = self._farm.drift
        if drift is not None and result.seconds > (1 + drift) * usual:
            self._trouble(slot.name, "drift")
            percent = 100 * (result.seconds / usual - 1)
            self._aside(slot, self._farm.aside_seconds, f"its reference kernel takes {percent:.0f} % longer than usual")

    # ------------------------------------------------------------------------------------------------------------ work

    def _give_work(self, slot: _Slot) -> None:
        """Give a free board the next job: the reference kernel if it is due, else the first that it has not lost."""
        if self._watched and slot.reference_due <= 0 and self._reference is not None:
            if self._reference_library is None:
                return  # not built yet
            self._begin(slot, _Job(self._reference, {"candidate": self._reference_library}, None))
            return
        others = self._connected() > 1
        for job in self._jobs:
            if slot.name in job.lost_on and others:
                continue
            self._jobs.remove(job)
            self._begin(slot, job)
            return

    def _begin(self, slot: _Slot, job: _Job) -> None:
        slot.job = job
        slot.remaining = list(job.files.items())
        slot.uploaded = {}
        wanted = (job.task.identity.key, job.seed)
        # The reference kernel's small inputs are made when it runs, in a process of its own.
        if slot.prepared == wanted or job.task is self._reference:
            self._upload_next(slot)
            return
        slot.prepared = wanted
        self._call(slot, "preparing", PREPARE_SECONDS, "prepare", task=task_values(job.task), seed=job.seed)

    def _upload_next(self, slot: _Slot) -> None:
        """Upload the next file of the job; when there is none, run it."""
        job = slot.job
        assert job is not None
        assert slot.process is not None
        if slot.remaining:
            name, path = slot.remaining.pop(0)
            slot.sent += 1
            slot.uploaded[name] = f"{slot.sent}{job.task.suffix}"  # never a name twice: loaders know libraries by name
            slot.state = "uploading"
            slot.process.send(None, Link.upload, _UPLOAD_SECONDS, path=path, name=slot.uploaded[name])
            return
        options = self.options
        # The board itself ends a candidate that takes too long and says so; this is for a board that does not.
        once = 2 * slot.prepare_seconds + 4 * options.run_timeout + 4 * options.max_seconds + COMPARE_SECONDS
        if job.candidate is None and job.task is not self._reference:
            rounds = options.rounds * len(job.files) * (options.run_timeout + 2 * options.max_seconds)
            self._call(
                *(slot, "running", len(job.files) * once + rounds, "compare"),
                task=task_values(job.task),
                files=slot.uploaded,
                seed=job.seed,
            )
        else:
            best = None if job.candidate is None else self._best()
            file = slot.uploaded["candidate"]
            reference = job.task is self._reference
            self._call(
                *(slot, "running", once, "run"),
                task=task_values(job.task),
                file=file,
                best=best,
                reference=reference,
            )

    # -------------------------------------------------------------------------------------------------------- troubles

    def _about(self, slot: _Slot) -> _Known:
        return self._known.setdefault(slot.name, _Known())

    def _trouble(self, name: str, kind: str) -> None:
        assert kind in TROUBLES
        self._known.setdefault(name, _Known()).troubles[kind] += 1

    def _note(self, line: str) -> None:
        self._notes.append(line)

    def _take_back(self, slot: _Slot) -> None:
        """The job of a board that is lost goes to another one."""
        job, slot.job = slot.job, None
        if job is None or job.task is self._reference:
            return
        job.lost_on.append(slot.label)
        if job.candidate is not None and len(job.lost_on) >= _LOSSES:
            self._note(f"{job.candidate.id} is given up: lost with {', '.join(job.lost_on)}")
            self._discard_files(job)
            self._done.append((job.candidate, None))
        else:
            self._jobs.appendleft(job)

    def _lose(self, slot: _Slot, kind: str, reason: str) -> None:
        """The session is gone: close it, and ask the tracker again, later each time."""
        name, label = slot.name, slot.label
        self._trouble(name, kind)
        self._note(f"{label}: {kind}: {reason}")
        self._take_back(slot)
        self._hang_up(slot)
        slot.retry_at = time.monotonic() + _RETRIES[min(slot.attempts, len(_RETRIES) - 1)]
        slot.attempts += 1
        if name:
            known = self._known[name]
            known.strikes += 1
            if known.strikes >= _STRIKES:
                known.aside_until = time.monotonic() + self._farm.aside_seconds
                self._note(f"{label} is put aside for {self._farm.aside_seconds:.0f} s: lost {known.strikes} times")

    def _put_aside(self, slot: _Slot, kind: str, reason: str) -> None:
        """The board answers, but cannot work."""
        self._trouble(slot.name, kind)
        self._take_back(slot)
        self._aside(slot, self._farm.aside_seconds, reason)

    def _aside(self, slot: _Slot, seconds: float, reason: str) -> None:
        """Hold the board without work: the tracker would only give it again."""
        known = self._about(slot)
        known.aside_until = time.monotonic() + seconds
        slot.state = "aside"
        slot.prepared = None
        length = f"for {seconds:.0f} s" if math.isfinite(seconds) else "for this run"
        self._note(f"{slot.label} is put aside {length}: {reason}")


def _result(values: dict[str, Any], board: dict[str, Any] | None = None) -> Result:
    return Result(values["status"], tuple(values["runs"]), values["excess"], values["message"], board)


def _state_of(sensors: dict[str, Any]) -> str:
    parts = [*(sensors.get("throttled") or ())]
    if (celsius := _celsius(sensors)) is not None:
        parts.append(f"at {celsius:.0f} °C")
    return ", ".join(parts)


def _celsius(sensors: dict[str, Any]) -> float | None:
    """Of the hotter one of CPU and GPU, which share a heat sink; None if neither is known."""
    known = [sensors[name] for name in ("celsius", "gpu_celsius") if sensors.get(name) is not None]
    return max(known, default=None)

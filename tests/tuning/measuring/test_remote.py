"""What the farm's measurer decides about boards and candidates, without boards; and measuring with cold caches."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_farm import COOL, HOT, REFERENCE, TASK, FakeFarm, FakeProcess
from hypothesis import given
from hypothesis import strategies as st
from toy_task import ToyTask

from gf_tvm.errors import FarmError
from gf_tvm.farm.server import versions
from gf_tvm.farm.tracker import Board
from gf_tvm.tuning.log import LogMismatch, log_path, read_log
from gf_tvm.tuning.loop import tune_tasks
from gf_tvm.tuning.measuring import board, board_link, farm_measurer, health, worker
from gf_tvm.tuning.measuring.board import BoardSession
from gf_tvm.tuning.measuring.board_link import State
from gf_tvm.tuning.measuring.measurer import Measurer
from gf_tvm.tuning.measuring.options import FarmOptions, MeasureOptions
from gf_tvm.tuning.measuring.process import CandidateFailed, Ended
from gf_tvm.tuning.measuring.result import Result
from gf_tvm.tuning.options import SearchOptions
from gf_tvm.tuning.task import Candidate, TuningError


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeFarm]:
    clock = [1000.0]
    for module in (board, farm_measurer, health):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    return lambda **options: FakeFarm(clock, **options)


@pytest.fixture
def farm(make: Callable[..., FakeFarm]) -> FakeFarm:
    return make()


# -------------------------------------------------------------------------------------------------------------- drift


def test_the_reference_is_measured_first_and_now_and_then(farm: FakeFarm) -> None:
    slot = farm.board("a")
    for number in range(60):
        farm.job(number)
    kinds = []
    for _ in range(52):
        farm.start(slot)
        assert slot.job is not None
        kinds.append(slot.job.task is REFERENCE)
        farm.end_run(slot, 1e-3)
    assert [i for i, reference in enumerate(kinds) if reference] == [0, 25, 50]
    assert farm.run.health.boards["a"].trials == 49


def test_a_board_that_became_slower_is_put_aside_and_comes_back(farm: FakeFarm) -> None:
    slot = farm.board("a")
    for seconds in (1e-3, 1.19e-3, 0.5e-3):
        farm.refer(slot, seconds)
        assert slot.state == State.FREE
    farm.refer(slot, 1.3e-3)
    assert slot.state == State.ASIDE
    assert "a is put aside for 300 s: its reference kernel takes 30 % longer than usual" in farm.notes()
    farm.after(299)
    assert slot.state == State.ASIDE
    farm.after(2)
    assert slot.state == State.FREE
    assert farm.notes() == "a is tried again"
    # The reference comes before any candidate; still slow, it goes aside again, and with a good one it is back.
    farm.job()
    farm.start(slot)
    assert slot.job is not None
    assert slot.job.task is REFERENCE
    farm.end_run(slot, 1.3e-3)
    assert slot.state == State.ASIDE
    farm.after(301)
    farm.refer(slot, 1e-3)
    assert slot.state == State.FREE
    assert farm.troubles("a") == {"drift": 2}


def test_a_board_that_is_slower_than_the_others_is_put_aside(farm: FakeFarm) -> None:
    slots = [farm.board(name) for name in "abc"]
    for slot, seconds in zip(slots, (1e-3, 1.1e-3, 1.5e-3), strict=True):
        farm.refer(slot, seconds)
    assert [slot.state for slot in slots] == [State.FREE, State.FREE, State.ASIDE]
    assert "c is put aside for 300 s: its reference kernel takes 43 % longer than usual" in farm.notes()
    # One slow board among three does not make the others look fast, nor itself the usual.
    farm.refer(slots[0], 1.05e-3)
    assert slots[0].state == State.FREE


@pytest.mark.parametrize("options", [{"drift": None}, {"drift": 0.2}])
def test_boards_are_not_watched_for_drift_where_that_says_nothing(
    make: Callable[..., FakeFarm], options: dict[str, Any]
) -> None:
    farm = make(**options)
    farm.run.emulated = options["drift"] is not None
    slot = farm.board("a", emulated=farm.run.emulated)
    farm.job()
    farm.start(slot)
    assert slot.job is not None
    assert slot.job.task is TASK


def test_a_board_on_which_the_reference_fails_is_put_aside(farm: FakeFarm) -> None:
    slot = farm.board("a")
    farm.refer(slot, None)
    assert slot.state == State.ASIDE
    assert farm.troubles("a") == {"broken": 1}
    assert not farm.jobs.done
    assert not farm.jobs.waiting  # the reference is no candidate that another board could take


# -------------------------------------------------------------------------------------------------------------- losses


def test_three_losses_in_a_row_put_a_board_aside(farm: FakeFarm) -> None:
    slot = farm.board("a")
    for number in range(3):
        assert slot.state == State.FREE, number
        process: Any = slot.process
        slot.lose("board lost", "its process ended with SIGSEGV")
        assert process.ended
        assert slot.state == State.CLOSED
        assert slot.retry_at > farm.clock[0]
        farm.greet(slot, "a")
    assert "a is put aside for 300 s: lost 3 times" in farm.notes()
    assert slot.state == State.ASIDE
    assert farm.run.connected == 0
    farm.after(301)
    assert slot.state == State.FREE
    # It starts anew: one more loss is one loss.
    slot.lose("timeout", "running took too long")
    assert farm.greet(slot, "a").state == State.FREE
    assert farm.troubles("a") == {"board lost": 3, "timeout": 1}


def test_a_good_trial_forgives(farm: FakeFarm) -> None:
    slot = farm.board("a")
    for _ in range(4):
        for _ in range(2):
            slot.lose("board lost", "?")
            farm.greet(slot, "a")
        farm.work(slot)
        assert slot.state == State.FREE
    assert farm.troubles("a") == {"board lost": 8}


def test_the_tracker_is_asked_later_each_time(farm: FakeFarm) -> None:
    slot = BoardSession(0, farm.run)
    waits = []
    for _ in range(6):
        slot.process = FakeProcess()  # type: ignore[assignment]
        slot.state = State.CONNECTING
        farm.answer(slot, CandidateFailed("failed", "TrackerLost: the tracker at x cannot be reached"), plain=True)
        waits.append(slot.retry_at - farm.clock[0])
    assert waits == sorted(waits)
    assert waits[0] < waits[-1] <= 15
    assert farm.troubles("") == {"no board": 6}


def test_a_candidate_that_is_lost_with_four_boards_is_given_up(farm: FakeFarm) -> None:
    slots = [farm.board(name) for name in "abcd"]
    job = farm.job()
    for slot, failure in zip(
        slots,
        (Ended(-11), CandidateFailed("timeout", "x"), CandidateFailed("failed", "RPCError: x"), Ended(1)),
        strict=True,
    ):
        assert not farm.jobs.done
        assert list(farm.jobs.waiting) == [job]
        slot.reference_due = 1
        farm.start(slot)
        farm.answer(slot, failure, plain=True)
    assert job.lost_on == ["a", "b", "c", "d"]
    assert list(farm.jobs.done) == [(job.candidate, None)]
    assert not farm.jobs.waiting
    assert f"{job.candidate and job.candidate.id} is given up: lost with a, b, c, d" in farm.notes()
    assert [farm.troubles(name) for name in "abcd"] == [{"board lost": 1}, {"timeout": 1}, *[{"board lost": 1}] * 2]


def test_a_lost_candidate_goes_to_another_board_first(farm: FakeFarm) -> None:
    first, second = farm.board("a"), farm.board("b")
    first.reference_due = second.reference_due = 9
    lost, other = farm.job(1), farm.job(2)
    farm.start(first)
    farm.answer(first, Ended(-9), plain=True)
    farm.greet(first, "a").reference_due = 9
    farm.start(first)
    assert first.job is other
    farm.start(second)
    assert second.job is lost
    farm.answer(second, Ended(-9), plain=True)
    # The only board there is gets it again.
    farm.end_run(first, 1e-3)
    farm.start(first)
    assert first.job is lost
    farm.end_run(first, 2e-3)
    done = [(candidate.config, result and result.seconds) for candidate, result in farm.jobs.done]
    assert done == [({"i": 2}, 1e-3), ({"i": 1}, 2e-3)]


def test_a_board_that_cannot_work_keeps_its_session(farm: FakeFarm) -> None:
    """No memory or a full disk there: aside, held, and the candidate is another board's."""
    slot = farm.board("a")
    slot.reference_due = 1
    job = farm.job()
    farm.start(slot)
    farm.answer(slot, json.dumps({"broken": "not enough memory"}), plain=True)
    assert slot.state == State.ASIDE
    assert "a is put aside for 300 s: not enough memory" in farm.notes()
    assert farm.troubles("a") == {"broken": 1}
    assert list(farm.jobs.waiting) == [job]
    assert not farm.jobs.done


def test_a_silent_board_is_lost(farm: FakeFarm) -> None:
    slot = farm.board("a")
    signs = farm.measurer._tracker._signs
    signs["a", "a:9000"] = (1, farm.clock[0])
    farm.after(29)
    assert slot.state == State.FREE
    farm.after(2)
    assert slot.state == State.CLOSED
    assert farm.troubles("a") == {"board lost": 1}
    # Without a tracker there are no signs, and a board is not blamed for that.
    farm.greet(slot, "a")
    signs.clear()
    farm.after(1000)
    assert slot.state == State.FREE


# ---------------------------------------------------------------------------------------------------- which boards


@pytest.mark.parametrize(
    ("info", "complaint"),
    [
        ({"versions": {**versions(), "gf-tvm": "0.0.1"}}, "it has gf-tvm 0.0.1, this machine has "),
        ({"versions": {**versions(), "apache-tvm": None}}, "it has apache-tvm None, this machine has "),
        ({"emulated": True}, "emulated boards and real ones cannot share a log"),
        ({"threads": 8}, "it has 4 cores for 8 threads; use --threads 4"),
    ],
)
def test_refused(farm: FakeFarm, info: dict[str, Any], complaint: str) -> None:
    slot = farm.board("a", **info)
    assert slot.state == State.ASIDE
    assert f"a is put aside for this run: {complaint}" in farm.notes()
    assert farm.troubles("a") == {"refused": 1}
    farm.after(1e6)
    assert slot.state == State.ASIDE


def test_other_versions_of_what_need_not_agree(farm: FakeFarm) -> None:
    assert farm.board("a", versions={**versions(), "torch": "1.0", "python": "3.10.1"}).state == State.FREE


def test_real_boards_are_refused_among_emulated_ones(farm: FakeFarm) -> None:
    farm.run.emulated = True
    assert farm.board("a", emulated=True).state == State.FREE
    assert farm.board("b", emulated=False).state == State.ASIDE
    assert farm.measurer.made["emulated"] is True


@pytest.mark.parametrize(("limit", "slots"), [(None, 4), (2, 2), (9, 4)])
def test_no_more_boards_than_asked_for(
    make: Callable[..., FakeFarm], monkeypatch: pytest.MonkeyPatch, limit: int | None, slots: int
) -> None:
    farm = make(boards=limit)
    monkeypatch.setattr(board_link, "Process", lambda *_, **__: FakeProcess())
    farm.measurer._scratch = SimpleNamespace(folder=Path("/nonexistent"))  # type: ignore[assignment]
    farm.measurer._tracker.listed = [Board("rpi4", f"b{i}:9000", {}) for i in range(5)]
    for _ in range(2):
        farm.measurer._keep_sessions(farm.clock[0])
    assert [slot.state for slot in farm.measurer._sessions] == [State.STARTING] * slots


@pytest.mark.parametrize(
    "name", ["boards", "hot_celsius", "cool_minutes", "drift", "aside_seconds", "patience_minutes"]
)
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_options_of_a_farm(name: str, value: float) -> None:
    with pytest.raises(FarmError, match=f"^{name} must be more than 0, got {value}$"):
        FarmOptions(("127.0.0.1", 9), "rpi4", **{name: value})  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------------- waits


@given(
    refused=st.lists(st.booleans(), min_size=1, max_size=4),
    listed=st.integers(0, 5),
    asking=st.booleans(),
    limit=st.none() | st.integers(1, 4),
)
def test_a_run_ends_when_it_can_use_no_board_at_all_and_not_before(
    refused: list[bool], listed: int, asking: bool, limit: int | None
) -> None:
    farm = FakeFarm([0.0], boards=limit)
    for number, old in enumerate(refused):
        found = {**versions(), "gf-tvm": "0.0.1"} if old else versions()
        farm.board(f"b{number}", versions=found)
    if asking:
        farm.measurer._sessions.append(BoardSession(9, farm.run))
        farm.measurer._sessions[-1].state = State.CONNECTING
    farm.measurer._tracker.listed = [Board("rpi4", f"b{i}:9000", {}) for i in range(listed)]
    farm.measurer._last_work = time.monotonic()
    if all(refused) and not asking and listed <= len(refused):
        with pytest.raises(TuningError, match=r"^no board with the key 'rpi4' can be used: b0: it has gf-tvm 0.0.1, "):
            farm.measurer._check_patience()
    else:
        farm.measurer._check_patience()


def test_what_happens_in_a_comparison_is_told_when_it_happens_and_the_comparison_ends_in_time(
    farm: FakeFarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = farm.board("a")
    slot.reference_due = 9
    told: list[tuple[float, str, str]] = []

    def step() -> None:
        farm.clock[0] += 1.0
        if slot.state is State.FREE:
            farm.start(slot)
        if farm.clock[0] == 1005.0:
            farm.run.notes.append("something happened")

    monkeypatch.setattr(farm.measurer, "_step", step)
    farm.measurer._builders = SimpleNamespace(drop=lambda: None)  # type: ignore[assignment]
    compared = farm.measurer.compare(
        *(TASK, {"ours": Path("/nonexistent/1.so")}, 7),
        over=lambda: farm.clock[0] > 1060,
        say=lambda kind, line: told.append((farm.clock[0], kind, line)),
    )
    assert compared is None
    assert farm.clock[0] == 1061.0
    assert told == [
        (1001.0, "compare", "comparing, waits for a (running)"),
        (1005.0, "note", "something happened"),
        (1061.0, "note", "no time is left for the final comparison; it waits for a (running)"),
    ]


# --------------------------------------------------------------------------------------------------------------- heat


@pytest.mark.parametrize("sensors", [HOT, {**COOL, "throttled": ["undervoltage"]}])
def test_a_hot_board_rests_until_it_is_cool(farm: FakeFarm, sensors: dict[str, Any]) -> None:
    slot = farm.board("a")
    slot.reference_due = 9
    job = farm.job()
    farm.start(slot)
    farm.end_run(slot, 1e-3, sensors)
    assert slot.state == State.RESTING
    assert not farm.jobs.done
    assert list(farm.jobs.waiting) == [job]
    assert job.lost_on == []  # which is nothing against the candidate
    for celsius in (82.0, 70.0):
        farm.answer(slot, {**sensors, "celsius": celsius})
        assert slot.state == State.RESTING
    process: Any = slot.process
    assert process.sent[-1] == ("call", {"op": "rest", "seconds": board._REST_SECONDS})
    farm.answer(slot, {**COOL, "celsius": 69.9})
    assert slot.state == State.FREE
    assert "a has cooled down" in farm.notes()
    farm.start(slot)
    farm.end_run(slot, 2e-3)
    ((_, result),) = farm.jobs.done
    assert result is not None
    assert result.seconds == 2e-3
    assert result.board == {"name": "a", "mhz": 1500.0, "celsius": 50.0, "governor": "performance"}
    assert farm.troubles("a") == {"throttled": 1}


def test_a_board_that_stays_hot_is_put_aside(farm: FakeFarm) -> None:
    slot = farm.board("a")
    farm.work(slot, HOT)
    farm.after(599)
    farm.answer(slot, HOT)
    assert slot.state == State.RESTING
    farm.after(2)
    farm.answer(slot, HOT)
    assert slot.state == State.ASIDE
    assert "a is put aside for 300 s: it did not cool down: at 85 °C" in farm.notes()
    farm.after(301)
    assert slot.state == State.FREE


def test_a_board_that_is_throttled_again_and_again_is_put_aside(farm: FakeFarm) -> None:
    slot = farm.board("a")
    job = farm.job()
    for number in range(3):
        slot.reference_due = 9
        farm.start(slot)
        farm.end_run(slot, 1e-3, {**COOL, "throttled": ["frequency capped"]})
        if number < 2:
            farm.answer(slot, COOL)
    assert slot.state == State.ASIDE
    assert "a is put aside for 300 s: throttled 3 times: frequency capped, at 50 °C" in farm.notes()
    assert list(farm.jobs.waiting) == [job]


def test_a_reference_on_a_hot_board_says_nothing(farm: FakeFarm) -> None:
    slot = farm.board("a")
    farm.start(slot)
    farm.end_run(slot, 9e-3, HOT)
    farm.answer(slot, COOL)
    assert farm.run.health.boards["a"].first_reference is None
    assert not farm.jobs.waiting
    farm.job()
    farm.start(slot)
    assert slot.job is not None
    assert slot.job.task is REFERENCE


# ---------------------------------------------------------------------------------------------------- what is logged


class FakeMeasurer(Measurer):
    """Gives up what the test says, and measures the rest in no time."""

    def __init__(self, options: MeasureOptions, given_up: int = 0) -> None:
        super().__init__(options)
        self._given_up = given_up

    def __enter__(self) -> FakeMeasurer:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def measure(self, task: Any, source: Any, best: Any, over: Any, say: Any) -> Iterator[Any]:  # type: ignore[override]
        while candidates := source(4):
            for candidate in candidates:
                self._given_up -= 1
                yield candidate, None if self._given_up >= 0 else Result("ok", (1e-3,), 0.0, "", {"name": "a"})

    def build(self, task: Any, candidates: Sequence[Candidate]) -> Iterator[Any]:
        return ((candidate, Path(candidate.id), None) for candidate in candidates)

    def compare(self, task: Any, libraries: dict[str, Path], seed: int, over: Any, say: Any) -> dict[str, Result]:  # type: ignore[override]
        return {name: Result("ok", (1e-3,), 0.0) for name in libraries}

    @staticmethod
    def discard(library: Path) -> None:
        pass


def tune(logs: Path, options: MeasureOptions, given_up: int = 0, trials: int = 6) -> list[str]:
    """Tune the toy; returns the notes."""
    notes: list[str] = []
    tune_tasks(
        [ToyTask()],
        SearchOptions(trials=trials),
        logs=logs,
        options=options,
        measurer=FakeMeasurer(options, given_up),
        progress=lambda event: notes.append(event.message) if event.kind == "note" else None,
    )
    return notes


def test_what_was_given_up_is_not_logged_and_does_not_count(tmp_path: Path) -> None:
    notes = tune(tmp_path, MeasureOptions(), given_up=2)
    assert "2 candidates were given up: boards were lost with them" in notes
    records = [r for r in read_log(log_path(tmp_path, "toy-device", "toy")).records if r.kind == "trial"]
    assert len({record.id for record in records}) == len(records) == 6
    assert {record.status for record in records} == {"ok"}
    assert {str(record.board) for record in records} == {"{'name': 'a'}"}


@pytest.mark.parametrize("first", [True, False])
def test_cold_and_warm_do_not_share_a_log(tmp_path: Path, first: bool) -> None:
    names = ("warm", "cold")
    tune(tmp_path, MeasureOptions(cold=first), trials=2)
    with pytest.raises(LogMismatch, match=f"measured with cache {names[first]}, now {names[not first]}"):
        tune(tmp_path, MeasureOptions(cold=not first), trials=4)
    tune(tmp_path, MeasureOptions(cold=first), trials=4)
    assert MeasureOptions(cold=first).to_dict()["cache"] == names[first]


# -------------------------------------------------------------------------------------------------------- cold caches


def test_cold_timing_flushes_before_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made = worker.Worker(ToyTask())
    acts: list[str] = []
    clock = [0.0]
    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def flush() -> None:
        acts.append("flush")
        clock[0] += 0.005

    def kernel() -> None:
        acts.append("call")
        clock[0] += 0.002

    monkeypatch.setattr(made, "_flush", flush)
    made._kernels["k"] = kernel
    runs = made.time("k", repeats=3, min_seconds=0.006, max_seconds=10, cold=True)
    assert runs == pytest.approx([0.002] * 3)  # the flush is not timed
    assert acts == ["flush", "call"] * (len(acts) // 2)
    assert len(acts) // 2 > 3
    acts.clear()
    assert len(made.time("k", repeats=3, min_seconds=0.006, max_seconds=10)) == 3
    assert "flush" not in acts
    acts.clear()
    assert len(made.time("k", repeats=3, min_seconds=0.0, max_seconds=10, cutoff=1e-9, cold=True)) == 1
    assert acts == ["flush", "call"]


@pytest.mark.parametrize(("cache", "least"), [(1 << 20, 4 << 20), (8 << 20, 8 << 20), (None, 32 << 20)])
def test_a_flush_writes_to_more_than_the_cache(monkeypatch: pytest.MonkeyPatch, cache: int | None, least: int) -> None:
    monkeypatch.setattr("gf_tvm.machine.cpu.last_level_cache_bytes", lambda: cache)
    made = worker.Worker(ToyTask())
    for times in (1, 2):
        made._flush()
        assert made._sweep is not None
        assert made._sweep.nbytes >= 2 * least
        assert (made._sweep == times).all()

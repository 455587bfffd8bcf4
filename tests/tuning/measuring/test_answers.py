"""Whatever a board answers, the run goes on: what makes no sense is that board's trouble, and is not logged."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from fake_farm import COOL, TASK, FakeFarm
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gf_tvm.errors import LogError
from gf_tvm.farm.server import versions
from gf_tvm.tuning.log import LogFolder, Record, read_log
from gf_tvm.tuning.measuring.answers import MAX_ANSWER
from gf_tvm.tuning.measuring.board import BoardSession
from gf_tvm.tuning.measuring.board_link import State
from gf_tvm.tuning.measuring.jobs import Job
from gf_tvm.tuning.measuring.link import Link
from gf_tvm.tuning.measuring.result import Result
from gf_tvm.tuning.task import Candidate

NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 10**400, -(10**400), 1e-300, 1e300, math.nan, math.inf])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
GOOD = asdict(Result("ok", (1e-3, 2e-3), 0.5))
ANSWER = {"result": GOOD, "sensors": COOL}
GREETING = {"name": "b", "cores": 4, "threads": 1, "versions": versions(), "emulated": False, "sensors": COOL}
LIBRARIES = {"ours 1": Path("/nonexistent/1.so"), "ours 2": Path("/nonexistent/2.so")}


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places in a value of JSON, the whole included."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    return [path, *(found for key, item in items for found in paths_of(item, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], other: Any, remove: bool) -> Any:
    """``value`` with something else at one of its places, or without what is there."""
    whole = {"": json.loads(json.dumps(value))}
    place: Any = whole
    for key in ("", *path)[:-1]:
        place = place[key]
    key = ("", *path)[-1]
    if remove and path:
        del place[key]
    else:
        place[key] = other
    return whole[""]


@st.composite
def told(draw: st.DrawFn, good: Any) -> str:
    """An answer that is nearly ``good``, or any text."""
    if draw(st.integers(0, 9), "kind") == 0:
        return draw(
            st.text() | st.sampled_from(["", "[" * 100_000, "{}", '{"done": NaN}', '{"broken": []}', "9" * 5000])
        )
    path = draw(st.sampled_from(paths_of(good)), "place")
    # Numbers that float() makes infinite, and such as JSON does not have, arrive in JSON text as well.
    return json.dumps({"done": replaced(good, path, draw(VALUES, "value"), draw(st.booleans(), "remove"))})


def tell(board: BoardSession, text: str) -> None:
    process: Any = board.process
    process.answers.append(text)
    board.take_answer()


def record_of(candidate: Candidate, result: Result) -> Record:
    values = (result.seconds, result.runs, result.excess, result.message)
    return Record("trial", "ours", candidate.id, result.status, candidate.config, None, *values, board=result.board)


def check_blamed(farm: FakeFarm, board: BoardSession, job: Job | None = None) -> None:
    """The board has a trouble with its name, holds nothing, and the job waits for another one."""
    assert board.state is State.ASIDE
    assert board.job is None
    troubles = farm.troubles("a")
    assert sum(troubles.values()) == 1
    assert set(troubles) <= {"bad answer", "broken", "board lost"}
    assert "a is put aside for 300 s: " in farm.notes()
    if job is not None:
        assert list(farm.jobs.waiting) == [job]
        assert not farm.jobs.done


@given(text=told(ANSWER))
@example(json.dumps({"done": {**ANSWER, "result": {**GOOD, "runs": [10**400]}}}))
@example(json.dumps({"done": {**ANSWER, "result": {**GOOD, "runs": [0.0]}}}))
@example(json.dumps({"done": {**ANSWER, "result": {**GOOD, "runs": []}}}))
@example(json.dumps({"done": {**ANSWER, "result": {**GOOD, "status": "great"}}}))
@example(json.dumps({"done": {**ANSWER, "result": {**GOOD, "status": "crash"}}}))
@example(json.dumps({"done": {**ANSWER, "result": {**GOOD, "message": "x" * 5000}}}))
@example(json.dumps({"done": {**ANSWER, "sensors": []}}))
@example(json.dumps({"done": "x" * (5 << 20)})[: MAX_ANSWER + 1])
def test_a_trial(text: str) -> None:
    farm = FakeFarm([0.0])
    board, other = farm.board("a"), farm.board("b")
    board.reference_due = other.reference_due = 9
    job = farm.job()
    farm.start(board)
    tell(board, text)
    if board.state is State.RESTING:  # hot, or throttled
        assert list(farm.jobs.waiting) == [job]
        return
    if board.state is not State.FREE:
        check_blamed(farm, board, job)
        farm.start(other)
        assert other.job is job
        farm.end_run(other, 1e-3)
    ((candidate, result),) = farm.jobs.done
    assert result is not None
    record = record_of(candidate, result)
    assert Record.from_dict(json.loads(json.dumps(record.to_dict(), allow_nan=False))) == record
    assert result.seconds is None or 1e-9 <= result.seconds <= 86400


@given(text=told({"results": dict.fromkeys(LIBRARIES, GOOD), "sensors": COOL}))
@settings(max_examples=50)
def test_a_comparison(text: str) -> None:
    farm = FakeFarm([0.0])
    board = farm.board("a")
    board.reference_due = 9
    job = Job(TASK, LIBRARIES, None, 7)
    farm.jobs.waiting.append(job)
    board.give_work()
    farm.answer(board, 0.5)
    for _ in LIBRARIES:
        farm.answer(board, None, plain=True)
    assert board.state is State.RUNNING
    tell(board, text)
    if board.state is State.FREE:
        assert farm.jobs.compared is not None
        assert set(farm.jobs.compared) == set(LIBRARIES)
        assert all((result.status == "ok") == bool(result.runs) for result in farm.jobs.compared.values())
    elif board.state is State.ASIDE:
        check_blamed(farm, board, job)


@given(text=told(0.5), state=st.sampled_from([State.PREPARING, State.RESTING]))
@settings(max_examples=50)
def test_a_duration_and_sensors(text: str, state: State) -> None:
    farm = FakeFarm([0.0])
    board = farm.board("a")
    board.reference_due = 9
    farm.job()
    board.give_work()
    assert board.state is State.PREPARING
    board.state = state
    board.health.hot_since = 0.0
    tell(board, text)
    if board.state is State.ASIDE:
        check_blamed(farm, board)
    assert 0 <= board._prepare_seconds <= 900


@given(text=told(GREETING))
@settings(max_examples=50)
def test_a_greeting(text: str) -> None:
    farm = FakeFarm([0.0])
    board = BoardSession(0, farm.run)
    board.process, board.state = farm.board("z").process, State.CONNECTING
    farm.answer(board, "10.0.0.5:9000", plain=True)
    tell(board, text)
    assert board.state in (State.FREE, State.ASIDE)
    assert board.name.isprintable()
    if board.state is State.ASIDE:
        assert sum(farm.troubles(board.name).values()) == 1
        assert board.name in farm.notes()


def test_a_board_that_has_not_introduced_itself_is_asked_again_before_it_gets_work() -> None:
    farm = FakeFarm([0.0])
    board = farm.board("z")
    board.state = State.CONNECTING
    farm.answer(board, "10.0.0.5:9000", plain=True)
    board.name = ""
    farm.answer(board, [])
    assert board.state is State.ASIDE
    assert "10.0.0.5:9000 is put aside for 300 s: bad answer: the greeting must be an object" in farm.notes()
    assert farm.troubles("10.0.0.5:9000") == {"bad answer": 1}
    board.health.aside_until = 0.0
    board.watch(None)
    assert board.state is State.CLOSED
    assert board.retry_at <= farm.clock[0] + 1e9


def test_a_long_answer_is_cut_before_it_is_passed_on() -> None:
    link = Link()
    link._session = {"gf_tvm.request": lambda _: "x" * (5 << 20)}
    assert len(link.call("{}")) == MAX_ANSWER + 1


# ------------------------------------------------------------------------------------------------------------- the log

RECORD = record_of(Candidate.of_config({"i": 1}), Result("ok", (1e-3,), 0.5, "", {"name": "a", "mhz": 1500.0}))


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_the_writer_refuses_what_the_reader_would_refuse(data: st.DataObject, tmp_path_factory: Any) -> None:
    name = data.draw(st.sampled_from(sorted(RECORD.to_dict())), "field")
    values = copy.copy(RECORD.__dict__)
    values[name] = data.draw(VALUES, "value")
    record = Record(**values)
    folder = tmp_path_factory.mktemp("logs")
    with LogFolder(folder, TASK.identity.device) as held, held.open(TASK.identity, {"cpu": "x"}) as log:
        log.append(RECORD)
        try:
            log.append(record)
        except LogError:
            kept = [RECORD]
        else:
            kept = [RECORD, record]
    assert len(read_log(log.path).records) == len(kept)
    assert log.records == kept


@pytest.mark.parametrize("made", [{"cpu": math.nan}, {"cpu": object()}])
def test_the_writer_refuses_a_header_that_the_reader_would_refuse(tmp_path: Path, made: dict[str, Any]) -> None:
    with (
        LogFolder(tmp_path, TASK.identity.device) as held,
        pytest.raises(LogError, match="cannot write a header that no reader would take"),
    ):
        held.open(TASK.identity, made)
    assert not list(tmp_path.rglob("*.jsonl*"))

"""The queue of jobs: whatever is lost on whichever boards, each job ends, and no board that is free waits beside it."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from toy_task import ToyTask

from gf_tvm.tuning.measuring.jobs import LOSSES, Job, JobQueue
from gf_tvm.tuning.measuring.result import Result
from gf_tvm.tuning.task import Candidate

#: Equal ones, too: every Raspberry Pi is called raspberrypi until somebody names it.
NAMES = st.lists(st.sampled_from(["raspberrypi", "pi4a", "pi4b"]), min_size=1, max_size=4)


def job(number: int) -> Job:
    return Job(ToyTask(), {"candidate": Path(f"{number}.so")}, Candidate.of_config({"number": number}), keep=True)


def others(boards: list[str], index: int) -> list[str]:
    return boards[:index] + boards[index + 1 :]


def test_a_job_goes_to_a_board_that_was_not_lost_with_it() -> None:
    queue, first, second = JobQueue(), job(1), job(2)
    queue.waiting.extend([first, second])
    assert queue.take("a", ["b"]) is first
    queue.lost(first, "a")
    assert queue.take("a", ["b"]) is second
    assert queue.take("a", ["b"]) is None  # it is b's
    assert queue.take("b", ["a"]) is first


def test_a_job_that_was_lost_with_every_board_is_tried_again_until_it_is_given_up() -> None:
    """Two boards, or two of one name, and a candidate that ends sessions."""
    for boards in (["a", "b"], ["raspberrypi", "raspberrypi"]):
        queue, bad = JobQueue(), job(1)
        queue.waiting.append(bad)
        for turn in range(LOSSES):
            index = turn % 2
            assert queue.take(boards[index], others(boards, index)) is bad, (boards, turn)
            queue.lost(bad, boards[index])
        assert list(queue.done) == [(bad.candidate, None)]
        assert not queue.waiting


@given(boards=NAMES, count=st.integers(1, 6), data=st.data())
def test_something_happens_while_a_board_is_free(boards: list[str], count: int, data: st.DataObject) -> None:
    queue = JobQueue()
    jobs = [job(number) for number in range(count)]
    queue.waiting.extend(jobs)
    working: dict[int, Job] = {}
    ended = 0
    for _ in range(2 * LOSSES * count + 1):
        for index, name in enumerate(boards):
            if index not in working and (found := queue.take(name, others(boards, index))) is not None:
                working[index] = found
        if not working:
            break
        index = data.draw(st.sampled_from(sorted(working)), "the board that answers or is lost")
        done = working.pop(index)
        if data.draw(st.booleans(), "lost"):
            queue.lost(done, boards[index])
        else:
            queue.finish(done, Result("ok", (1.0,), 0.0, ""))
        ended += 1
    assert not working
    assert not queue.waiting  # none is left that no board takes
    assert ended <= LOSSES * count
    assert sorted(candidate.id for candidate, _ in queue.done) == sorted(
        one.candidate.id for one in jobs if one.candidate is not None
    )

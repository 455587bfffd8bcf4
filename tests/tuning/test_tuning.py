"""Tuning: what candidates do to their workers, what a killed run leaves, when a run ends, what the search proposes."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from checkout import HELPERS
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_task import N, TaskOf, ToySpace, ToyTask, indices, wait_until, workers_of

from gf_tvm.core import verify
from gf_tvm.core.geometry import Geometry
from gf_tvm.core.workload import Workload
from gf_tvm.errors import DeviceError, LogError
from gf_tvm.machine.profiles import get_profile
from gf_tvm.tuning import loop
from gf_tvm.tuning.log import LogFolder, Record, find_best, identity_of, log_path, read_log, shipped_logs
from gf_tvm.tuning.loop import Event, Summary, tune, tune_tasks
from gf_tvm.tuning.measuring import worker
from gf_tvm.tuning.measuring.measurer import Measurer
from gf_tvm.tuning.measuring.options import MeasureOptions
from gf_tvm.tuning.measuring.process import Process, answer
from gf_tvm.tuning.measuring.result import Result
from gf_tvm.tuning.measuring.service import worker_for
from gf_tvm.tuning.options import SearchOptions
from gf_tvm.tuning.search import ConfigSearch, MetaScheduleSearch
from gf_tvm.tuning.task import Candidate, Task, TuningError, WorkloadTask

pytestmark = pytest.mark.early

FAST = MeasureOptions(threads=2, builders=1, repeats=2, min_seconds=1e-4, max_seconds=60.0, rounds=2)


def config(i: int = 1, j: int = 1, act: str = "none") -> Candidate:
    return Candidate.of_config({"i": i, "j": j, "act": act})


def trials_of(path: Path) -> list[Record]:
    return [record for record in read_log(path).records if record.kind == "trial"]


# ------------------------------------------------------------------------------------------------- real workers


def limit(measurer: Measurer, seconds: float) -> None:
    """Set how long a build and a call may take from now on."""
    measurer.options = replace(measurer.options, build_timeout=seconds, run_timeout=seconds)
    measurer._measuring.options = measurer.options


def test_every_way_to_fail_is_told_apart_and_hurts_nobody_else() -> None:
    # A short limit only for what hangs: anything else may take longer on a busy machine.
    short, long = 3.0, 250.0
    acts = ("none", "refuse", "wrong", "crash", "hang", "segfault while building", "hang while building")
    task = ToyTask(acts=acts)
    candidates = [config(act=act) for act in acts]
    with Measurer(FAST) as measurer:
        found: dict[str, Result] = {}
        libraries: dict[str, Path] = {}
        for some, seconds in ((candidates[:-1], long), (candidates[-1:], short)):
            limit(measurer, seconds)
            for candidate, library, failure in measurer.build(task, some):
                assert candidate.config is not None
                assert (library is None) != (failure is None)
                if library is not None:
                    libraries[candidate.config["act"]] = library
                elif failure is not None:
                    found[candidate.config["act"]] = failure
        limit(measurer, long)
        assert set(libraries) == {"none", "wrong", "crash", "hang"}
        found["none"] = measurer.run(task, libraries["none"])
        # Once more with the limit that cuts slow candidates short.
        again = measurer.run(task, libraries["none"], best=1e-12)
        for act in ("crash", "hang", "wrong"):
            limit(measurer, short if act == "hang" else long)
            found[act] = measurer.run(task, libraries[act])
        # A worker that is killed while it has nothing to do is nobody's failure.
        for process in measurer._builders._processes:
            if process.alive:
                os.kill(process._process.pid, signal.SIGKILL)
        ((_, rebuilt, failure),) = measurer.build(task, [config(2, 2)])
        assert rebuilt is not None
        assert failure is None
        pids = workers_of(os.getpid())
        scratch = measurer._scratch.folder
        assert scratch.is_dir()
    wanted = ("ok", "build", "wrong", "crash", "timeout", "crash", "timeout")
    assert {act: result.status for act, result in found.items()} == dict(zip(acts, wanted, strict=True))
    assert len(found["none"].runs) == 2
    assert all(0 < run < 10 for run in found["none"].runs)
    assert found["none"].seconds == pytest.approx(sum(found["none"].runs) / 2)
    assert found["none"].excess is not None
    assert found["none"].excess < 0.1
    assert again.status == "ok"
    assert len(again.runs) == 1
    assert found["refuse"].message == "while building: ValueError: this tile does not divide"
    assert found["wrong"].excess == pytest.approx(100, rel=0.01)
    assert "SIGABRT" in found["crash"].message
    assert "SIGSEGV" in found["segfault while building"].message
    assert not scratch.exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_run_from_start_to_end_and_once_more(tmp_path: Path) -> None:
    # Both of its points do well in the search; the final comparison finds one of them wrong.
    task = ToyTask(acts=("none", "right for trials only"), tiles=(2,))
    events: list[Event] = []
    summary = tune_tasks([task], SearchOptions(trials=20, batch=4), logs=tmp_path, options=FAST, progress=events.append)
    path = log_path(tmp_path, "toy-device", "toy")
    records = read_log(path, task.identity).records
    trials = [r for r in records if r.kind == "trial"]
    assert [r.kind for r in records] == ["trial", "trial", "rejected", "winner"]
    assert [r.config for r in trials] == [task.space.default, {"i": 2, "j": 2, "act": "right for trials only"}]
    assert all(r.status == "ok" for r in trials)
    assert (records[2].id, records[2].status) == (trials[1].id, "wrong")
    winner = records[-1]
    assert winner.config == task.space.default
    assert len(winner.runs) == 2
    (result,) = summary.tasks
    assert (result.stopped, result.measured, result.trials, result.failed) == ("exhausted", 2, 2, 1)
    assert (result.config, result.seconds, result.confirmed) == (winner.config, winner.seconds, True)
    assert result.default_seconds == winner.seconds
    document = json.loads(json.dumps(summary.to_dict()))
    assert document["schema"] == "gf_tvm.tune/1"
    assert document["tasks"][0]["config"] == winner.config
    assert document["tasks"][0]["trial_seconds"] == [trials[0].seconds, None]  # the second was rejected
    made = read_log(path).made
    assert made == summary.made
    assert {"gf_tvm", "tvm", "tvm_ffi", "llvm", "cpu", "threads", "python", "measurement"} <= set(made)
    kinds = [event.kind for event in events]
    assert kinds[0] == "start"
    assert kinds[-1] == "done"
    assert [e.trial for e in events if e.kind == "trial"] == [1, 2]
    assert kinds.count("compare") == 2
    # Nothing is left to do: nothing is measured, no worker is started, the log stays as it is.
    before = path.read_bytes()
    summary = tune_tasks([task], SearchOptions(trials=20, batch=4), logs=tmp_path, options=replace(FAST, builders=0))
    assert summary.tasks[0] == replace(result, measured=0)
    assert path.read_bytes() == before


RUN = """
import sys
sys.path.insert(0, sys.argv[2])
from toy_task import ToyTask
from gf_tvm.tuning.loop import tune_tasks
from gf_tvm.tuning.measuring.options import MeasureOptions
from gf_tvm.tuning.options import SearchOptions
options = MeasureOptions(threads=1, builders=1, repeats=2, min_seconds=1e-4, rounds=2)
tune_tasks([ToyTask()], SearchOptions(trials=14, batch=4), logs=sys.argv[1], options=options)
"""


def test_a_killed_run_loses_no_finished_trial_and_the_next_repeats_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    path, stall = log_path(tmp_path, "toy-device", "toy"), tmp_path / "stall"
    environment = {**os.environ, "TMPDIR": str(scratch), "TOY_STALL": str(stall)}
    with subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path), HELPERS], env=environment) as process:
        try:
            # Some trials are finished, and a worker is deep in a build.
            assert wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") >= 4)
            stall.touch()
            assert wait_until(stall.with_name("stall.reached").exists)
            assert workers_of(process.pid)
        finally:
            process.kill()
    assert wait_until(lambda: not workers_of(process.pid)), "worker processes outlived the run"
    finished = trials_of(path)
    assert 3 <= len(finished) < 14
    assert len(list(scratch.iterdir())) == 1
    before = path.read_bytes()
    before = before[: before.rfind(b"\n") + 1]

    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    options = MeasureOptions(threads=1, builders=1, repeats=2, min_seconds=1e-4, rounds=2)
    summary = tune_tasks([ToyTask()], SearchOptions(trials=14, batch=4), logs=tmp_path, options=options)
    assert path.read_bytes().startswith(before)
    trials = trials_of(path)
    assert trials[: len(finished)] == finished
    assert len(trials) == len({trial.id for trial in trials}) == 14
    assert summary.tasks[0].measured == 14 - len(finished)
    assert summary.tasks[0].confirmed
    assert list(scratch.iterdir()) == [], "the killed run's libraries were not removed"


# ---------------------------------------------------------------------------------------- a worker, without a process


def in_process(task: Task, candidate: Candidate, tmp_path: Path) -> worker.Worker:
    path = tmp_path / "kernel.so"
    made = worker.Worker(task)
    made.build(candidate, path)
    made.prepare(0)
    made.load("k", path)
    made.run("k")
    return made


@pytest.mark.parametrize(
    ("sneaky", "complaint"),
    [
        ("", ""),
        ("writes its input", "wrote to its inputs"),
        ("writes outside", "wrote outside its outputs"),
        ("leaves a hole", "its error is inf times what is allowed"),
    ],
)
def test_what_a_kernel_must_not_do(tmp_path: Path, sneaky: str, complaint: str) -> None:
    made = in_process(ToyTask(sneaky=sneaky), config(4, 4), tmp_path)
    excess, found = made.check()
    assert found == complaint
    assert (excess <= 1) == (not complaint)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_change_anywhere_in_an_input_is_seen(dtype: torch.dtype) -> None:
    for count in range(1, 10):
        tensor = torch.arange(1, count + 1).to(dtype)
        known = worker._checksum(tensor)
        for place in range(count):
            changed = tensor.clone()
            changed[place] *= -1
            assert worker._checksum(changed) != known
        assert worker._checksum(tensor.clone()) == known


@pytest.mark.parametrize("place", [0, verify._PIECE - 1, verify._PIECE, 2 * verify._PIECE + 1])
@pytest.mark.parametrize("value", [1.001, math.nan])
def test_an_error_in_any_piece_of_a_large_output_is_seen(place: int, value: float) -> None:
    exact = torch.ones(1, 2 * verify._PIECE + 2, dtype=torch.float64)
    output = exact.float()
    wanted = [verify.Expected(exact, exact, terms=1)]
    assert verify.excess([output], wanted) == 0
    output[0, place] = value
    assert verify.excess([output], wanted) > 1


def test_poison_of_the_last_candidate_does_not_pass_for_a_result(tmp_path: Path) -> None:
    made = in_process(ToyTask(), config(), tmp_path)
    assert made.check()[1] == ""
    made._kernels["lazy"] = lambda *arguments: None  # leaves the right result of the one before
    made.run("lazy")
    assert made.check()[0] == math.inf


def test_timing_repeats_short_kernels_and_cuts_slow_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    made = worker.Worker(ToyTask())
    clock = [0.0]  # a real one would time the machine's other work, too
    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    calls: list[float] = []

    def kernel() -> None:
        calls.append(clock[0])
        clock[0] += 0.002

    made._kernels["k"] = kernel
    assert made.time("k", repeats=3, min_seconds=0.02, max_seconds=10) == pytest.approx([0.002] * 3)
    assert len(calls) >= 3 * 10
    calls.clear()
    assert len(made.time("k", repeats=3, min_seconds=0.0, max_seconds=10, cutoff=0.001)) == 1
    assert len(calls) == 1
    assert 10 < len(made.time("k", repeats=1000, min_seconds=0.0, max_seconds=0.05)) < 30


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("no"), "failed"),
        (RuntimeError("linking failed: No space left on device"), "broken"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "broken"),
        (OSError(28, "No space left on device"), "broken"),
        (FileNotFoundError(2, "No such file"), "failed"),
        (MemoryError(), "broken"),
    ],
)
def test_the_machine_is_not_mistaken_for_the_candidate(error: Exception, kind: str) -> None:
    def request() -> None:
        raise error

    assert answer(request, {})[0] == kind


def small_workload(name: str = "backward", **changes: Any) -> Workload:
    fields = {"n": 2, "ci": 4, "co": 8, "h": 9, "w": 7, "kernel": 3, "patch": 2, "padding": 1}
    return Workload(name, Geometry(**{**fields, **changes}))


@pytest.mark.parametrize(
    "workload",
    [
        small_workload(),
        # Rows and columns that no patch covers: only the caller's zeros can be right there.
        small_workload(kernel=(5, 4), padding=0),
        small_workload("filter_input", h=8, w=8),
    ],
    ids=lambda workload: workload.key,
)
def test_the_kernels_of_the_package_are_tasks(tmp_path: Path, workload: Workload) -> None:
    task: Task = pickle.loads(pickle.dumps(WorkloadTask(workload, get_profile("host").name)))
    assert task.identity == identity_of(workload, get_profile("host"))
    made = in_process(task, Candidate.of_config(task.space.default), tmp_path)
    excess, complaint = made.check()
    assert complaint == ""
    assert excess <= 1
    assert made.time("k", 2, 0.0, 1.0)
    made._outputs[0].view(-1)[-1] += 1
    assert made.check()[1]


# --------------------------------------------------------------------------------------------------- the loop alone


class FakeMeasurer(Measurer):
    """Stands in for :class:`Measurer`: the time of a candidate is computed, and noted."""

    measured: ClassVar[list[str]]
    cost: ClassVar[Callable[[dict[str, Any]], Result]]
    seconds_per_run: ClassVar[float]
    clock: ClassVar[list[float]]

    def __enter__(self) -> FakeMeasurer:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def build(self, task: Task, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Path | None, Any]]:
        for candidate in candidates:
            result = self.cost(candidate.config or {})
            if "while building" in result.message:
                yield candidate, None, result
            else:
                yield candidate, Path(candidate.id.replace("/", "")), None

    @staticmethod
    def discard(library: Path) -> None:
        pass

    def run(self, task: Task, library: Path, best: float | None = None) -> Result:
        self.clock[0] += self.seconds_per_run
        self.measured.append(str(library))
        return self.cost(json.loads(str(library)))

    def compare(self, task: Task, libraries: dict[str, Path], seed: int, *_: Any) -> dict[str, Result]:
        return {name: self.cost(json.loads(str(library))) for name, library in libraries.items()}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeMeasurer]:
    class Fake(FakeMeasurer):
        measured: ClassVar[list[str]] = []
        cost = staticmethod(lambda config: Result("ok", (1.0 / config["i"],)))
        seconds_per_run = 0.0
        clock: ClassVar[list[float]] = [0.0]

    real = time.monotonic
    monkeypatch.setattr(loop, "Measurer", Fake)
    monkeypatch.setattr(loop.time, "monotonic", lambda: real() + Fake.clock[0])
    return Fake


def run(tmp_path: Path, tasks: Sequence[Task] = (), **arguments: Any) -> Summary:
    names = {field.name for field in fields(SearchOptions)}
    search = SearchOptions(**{"batch": 4, **{name: arguments.pop(name) for name in names & set(arguments)}})
    return tune_tasks(tasks or [ToyTask()], search, **{"logs": tmp_path, "options": FAST, **arguments})


def test_trials_count_over_all_runs(tmp_path: Path, fake: type[FakeMeasurer]) -> None:
    for trials, new in ((3, 3), (3, 0), (2, 0), (8, 5)):
        fake.measured.clear()
        (task,) = run(tmp_path, trials=trials).tasks
        assert (task.measured, task.stopped) == (new, "trials")
        assert len(fake.measured) == new
    records = trials_of(log_path(tmp_path, "toy-device", "toy"))
    assert len(records) == len({record.id for record in records}) == 8


def test_failed_trials_are_not_repeated_either(tmp_path: Path, fake: type[FakeMeasurer]) -> None:
    def cost(config: dict[str, Any]) -> Result:
        if config["i"] == 2:
            return Result("build", message="while building: no")
        return Result("crash", message="gone") if config["j"] == 2 else Result("ok", (1.0 / config["i"],))

    fake.cost = staticmethod(cost)
    run(tmp_path, trials=9)
    first = {record.id for record in trials_of(log_path(tmp_path, "toy-device", "toy"))}
    fake.measured.clear()
    (task,) = run(tmp_path, trials=100).tasks
    assert task.stopped == "exhausted"
    assert task.trials == 15  # 4 x 4 without 8 x 8
    assert task.failed == 4 + 3
    assert task.config is not None
    assert task.config["i"] == 8
    assert not first & set(fake.measured)


def test_early_stopping_counts_trials_without_an_improvement(tmp_path: Path, fake: type[FakeMeasurer]) -> None:
    fake.cost = staticmethod(lambda config: Result("ok", (1.0 - 0.001 * config["i"],)))  # that is noise
    (task,) = run(tmp_path, early_stop=5, batch=1).tasks
    assert (task.stopped, task.trials) == ("early stop", 6)
    (task,) = run(tmp_path, early_stop=5, batch=1).tasks
    assert (task.stopped, task.measured) == ("early stop", 0)


def test_minutes_are_shared_by_the_workloads(tmp_path: Path, fake: type[FakeMeasurer]) -> None:
    fake.seconds_per_run = 6.0
    tasks = [ToyTask(key, tiles=tuple(range(1, 10))) for key in ("a", "b", "c")]
    events: list[Event] = []
    summary = run(tmp_path, tasks, minutes=6, progress=events.append)
    made = [task.measured for task in summary.tasks]
    # 120 s each, some of it for the final comparison.
    assert all(10 <= count <= 24 for count in made), made
    assert {task.stopped for task in summary.tasks} == {"time"}
    assert all(task.confirmed for task in summary.tasks)
    assert summary.seconds <= 360
    left = [event.left for event in events if event.left is not None]
    assert all(0 <= seconds <= 360 for seconds in left)
    assert left[-1] < left[len(left) // 2]


def test_workloads_that_are_done_leave_their_time_to_others(tmp_path: Path, fake: type[FakeMeasurer]) -> None:
    fake.seconds_per_run = 6.0
    tiles = tuple(range(1, 10))
    run(tmp_path, [ToyTask("b", tiles=tiles)], trials=20)
    summary = run(tmp_path, [ToyTask("a", tiles=tiles), ToyTask("b", tiles=tiles)], trials=20, minutes=3)
    assert [task.measured for task in summary.tasks] == [20, 0]


def test_all_logs_are_looked_at_before_the_first_trial(tmp_path: Path, fake: type[FakeMeasurer]) -> None:
    path = log_path(tmp_path, "toy-device", "b")
    path.parent.mkdir()
    path.write_bytes(b"poison\n")
    with pytest.raises(LogError, match=r"b\.jsonl: not a tuning log"):
        run(tmp_path, [ToyTask("a"), ToyTask("b")])
    assert fake.measured == []
    assert sorted(p.name for p in path.parent.iterdir()) == ["b.jsonl"]


def test_logs_that_do_not_fit_are_refused(tmp_path: Path, fake: type[FakeMeasurer]) -> None:
    run(tmp_path, trials=2)
    with pytest.raises(LogError, match=r"toy\.jsonl: does not fit: made for another definition of the kernel"):
        run(tmp_path, [ToyTask(definition_hash="f" * 16)])
    with pytest.raises(LogError, match=r"toy\.jsonl: does not fit: measured with threads 2, now 1"):
        run(tmp_path, options=replace(FAST, threads=1))
    # A configuration that the space does not have, although the definition is said to be the same.
    with pytest.raises(LogError, match=r"toy\.jsonl: cannot be continued: configuration .* is not in the space"):
        run(tmp_path, [ToyTask(acts=("refuse",))])


def test_a_default_that_does_not_build_is_the_machines_fault(tmp_path: Path, fake: type[FakeMeasurer]) -> None:
    fake.cost = staticmethod(lambda config: Result("build", message="while building: BuildError: no compiler"))
    with pytest.raises(TuningError, match="toy: its default schedule fails while building: BuildError: no compiler"):
        run(tmp_path)
    assert read_log(log_path(tmp_path, "toy-device", "toy")).records == []


def test_a_torn_log_is_continued_and_says_so(tmp_path: Path, fake: type[FakeMeasurer]) -> None:
    run(tmp_path, trials=3)
    path = log_path(tmp_path, "toy-device", "toy")
    whole = b"".join(path.read_bytes().splitlines(keepends=True)[:4])
    path.write_bytes(whole + b'{"kind":"trial","sp')
    events: list[Event] = []
    run(tmp_path, trials=5, progress=events.append)
    notes = [event.message for event in events if event.kind == "note"]
    assert any("last line was cut off" in note and str(path) in note for note in notes)
    assert path.read_bytes().startswith(whole)
    assert len(trials_of(path)) == 5


def test_an_interrupt_keeps_what_is_finished(tmp_path: Path, fake: type[FakeMeasurer]) -> None:
    def interrupt(event: Event) -> None:
        if event.kind == "trial" and event.trial == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=interrupt)
    assert len(trials_of(log_path(tmp_path, "toy-device", "toy"))) == 3
    # The folder is free again.
    assert run(tmp_path, trials=4).tasks[0].measured == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"trials": 0}, "trials must be at least 1, got 0"),
        ({"early_stop": -1}, "early_stop must be at least 1, got -1"),
        ({"minutes": 0}, "minutes must be more than 0, got 0"),
        ({"minutes": math.nan}, "minutes must be more than 0, got nan"),
        ({"space": "theirs"}, "unknown space 'theirs'; known: ours, metaschedule"),
        ({"options": replace(FAST, threads=0)}, "threads must be at least 1, got 0"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(TuningError, match=words):
        run(tmp_path / "logs", **arguments)
    assert not (tmp_path / "logs").exists()


def test_nothing_to_tune_and_devices_that_are_not_here(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="nothing to tune"):
        tune([], logs=tmp_path)
    with pytest.raises(DeviceError, match="unknown device 'toaster'; known: host, "):
        tune([small_workload()], "toaster", logs=tmp_path)
    other = "x86-64-v3" if get_profile("host").arch == "aarch64" else "aarch64"
    with pytest.raises(DeviceError, match=f"device '{other}' cannot be measured on this machine"):
        tune([small_workload()], other, logs=tmp_path)


# -------------------------------------------------------------------------------------------------------- the search


class BoxSpace:
    """Knobs with any number of values; points whose sum of indices is a multiple of ``every`` are invalid."""

    def __init__(self, sizes: Sequence[int], every: int) -> None:
        self.knobs = {f"k{n}": tuple(range(10, 10 + size)) for n, size in enumerate(sizes)}
        self.every = every
        self.default = {name: values[0] for name, values in self.knobs.items()}

    def valid(self, config: dict[str, Any]) -> bool:
        total = sum(value - 10 for value in config.values())
        return total == 0 or total % self.every != 0

    def sample(self, rng: random.Random) -> dict[str, Any]:
        while True:
            config = {name: rng.choice(values) for name, values in self.knobs.items()}
            if self.valid(config):
                return config

    def features(self, config: dict[str, Any]) -> list[float]:
        return indices(self.knobs, config)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 4), min_size=0, max_size=4),
    st.integers(2, 3),
    st.integers(1, 9),
    st.integers(0, 5),
    st.randoms(use_true_random=False),
)
def test_every_valid_point_is_proposed_once_and_no_other(
    sizes: list[int], every: int, batch: int, restart: int, rng: random.Random
) -> None:
    space = BoxSpace(sizes, every)
    task = TaskOf(space)
    search = ConfigSearch(task, rng.randrange(1000), model=False)
    wanted = {Candidate.of_config(c).id for c in search._all() if space.valid(c)}
    records: list[Record] = []
    while True:
        if len(records) == restart:
            search = ConfigSearch(task, rng.randrange(1000), model=False)
            search.resume(records)
        candidates = search.propose(batch)
        if not records and candidates:
            assert candidates[0].config == space.default
        if not candidates:
            break
        assert len(candidates) <= batch
        results = [Result("ok", (rng.uniform(1, 2),)) if rng.random() < 0.8 else Result("wrong") for _ in candidates]
        search.learn(candidates, results)
        records += [loop._record("trial", c, r) for c, r in zip(candidates, results, strict=True)]
    found = [record.id for record in records]
    assert len(found) == len(set(found))
    assert set(found) == wanted


def test_what_was_proposed_and_not_measured_is_not_proposed_again() -> None:
    search = ConfigSearch(ToyTask(), seed=1)
    first, second = search.propose(5), search.propose(5)
    assert len({candidate.id for candidate in (*first, *second)}) == 10


def test_good_configurations_are_varied(tmp_path: Path) -> None:
    """With the times of a smooth function the search comes close to its minimum in a space of 10^6 points."""
    space = BoxSpace([10] * 6, every=10**9)
    best = {name: random.Random(3).choice(values) for name, values in space.knobs.items()}

    def seconds(config: dict[str, Any]) -> float:
        return 1.0 + sum((config[name] - best[name]) ** 2 for name in best)

    ends = []
    for guided in (True, False):
        search = ConfigSearch(TaskOf(space), 4, model=False)
        times = []
        for _ in range(20):
            candidates = search.propose(16)
            times += [seconds(c.config or {}) for c in candidates]
            search.learn(candidates, [Result("ok", (seconds(c.config or {}) if guided else 1.0,)) for c in candidates])
        ends.append(min(times))
    assert ends[0] <= 4
    assert ends[0] < ends[1] / 2


def test_metaschedules_own_space_is_searched_logged_and_resumed() -> None:
    task = ToyTask()
    search = MetaScheduleSearch(task, threads=1, seed=3, batch=4)
    records: list[Record] = []
    for count in (4, 2):
        candidates = search.propose(count)
        assert 1 <= len(candidates) <= count
        results = [Result("ok", (1e-3 * (n + 1),)) if n else Result("crash") for n in range(len(candidates))]
        search.learn(candidates, results)
        records += [loop._record("trial", c, r) for c, r in zip(candidates, results, strict=True)]
    # Through JSON, as in a log, and in another process's order of things.
    records = [Record.from_dict(json.loads(json.dumps(record.to_dict()))) for record in records]
    assert len({record.id for record in records}) == len(records)
    resumed = MetaScheduleSearch(task, threads=1, seed=3, batch=4)
    resumed.resume(records)
    assert {c.id for c in resumed.propose(4)}.isdisjoint(record.id for record in records)
    with pytest.raises(ValueError, match="gives another schedule"):
        MetaScheduleSearch(task, batch=4).resume([replace(records[0], id="0x1")])
    with pytest.raises(ValueError, match="cannot be replayed"):
        MetaScheduleSearch(task, batch=4).resume([replace(records[0], trace=[1, 2, 3])])


def test_a_trace_from_the_log_builds(tmp_path: Path) -> None:
    (candidate,) = MetaScheduleSearch(ToyTask(), batch=4).propose(1)
    record = loop._record("trial", candidate, Result("ok", (1.0,)))
    again = Candidate.of_record(Record.from_dict(json.loads(json.dumps(record.to_dict()))))
    made = in_process(ToyTask(), again, tmp_path)
    assert made.check() == (pytest.approx(0, abs=0.1), "")


# ------------------------------------------------------------------------------------------------- finding the best


def test_find_best_takes_the_first_folder_that_fits(tmp_path: Path) -> None:
    workload, profile = small_workload(), get_profile("host")
    identity, space = identity_of(workload, profile), WorkloadTask(workload, "host").space
    made = {"cpu": "c", "threads": 1, "tvm": "0"}
    good = loop._record("trial", Candidate.of_config(dict(space.default)), Result("ok", (1e-3,), 0.1))
    strange = loop._record("trial", Candidate.of_config({"no_such_knob": 1}), Result("ok", (1e-3,), 0.1))
    bad = loop._record("trial", Candidate.of_config(dict(space.default)), Result("crash", message="gone"))

    def folder(name: str, *records: Record, **changes: Any) -> Path:
        with LogFolder(tmp_path / name, profile.name) as held, held.open(replace(identity, **changes), made) as log:
            for record in records:
                log.append(record)
        return tmp_path / name

    one, two = folder("one", good), folder("two", replace(good, seconds=1e-6))
    old, empty = folder("old", good, definition="0" * 16), folder("failed", bad)
    assert find_best(workload, profile, []) == (None, [])
    assert find_best(workload, profile, [tmp_path / "nothing"]) == (None, [])
    record, reasons = find_best(workload, profile, [tmp_path / "nothing", one, two])
    assert (record, reasons) == (good, [])
    assert record is not None
    assert record.source == log_path(one, profile.name, workload.key)
    record, reasons = find_best(workload, profile, [old, empty, two])
    assert record is not None
    assert record.seconds == 1e-6
    assert len(reasons) == 2
    assert str(old) in reasons[0]
    assert "another definition" in reasons[0]
    assert str(empty) in reasons[1]
    assert "no trial ended well" in reasons[1]
    with pytest.raises(LogError, match="is not in the space"):
        find_best(workload, profile, [folder("strange", strange), one])
    path = log_path(two, profile.name, workload.key)
    path.write_bytes(path.read_bytes().replace(b'"seconds":1e-06', b'"seconds":1e-09'))
    with pytest.raises(LogError, match="line 2: damaged"):
        find_best(workload, profile, [two, one])


def test_shipped_logs_are_sound_and_fit() -> None:
    """Every log that comes with the package can be used by this version of it."""
    folder = shipped_logs()
    assert folder is not None
    for path in sorted(folder.glob("*/*.jsonl")):
        log = read_log(path)
        workload = Workload.from_dict(log.identity.workload)
        assert path == log_path(folder, log.identity.device, workload.key)
        profile = get_profile(log.identity.device)
        record, reasons = find_best(workload, profile, [folder])
        assert reasons == []
        assert record is not None
        assert record.confirmed


def test_the_toy_is_right() -> None:
    inputs = ToyTask().inputs(0)
    assert ToyTask().excess([inputs[0] @ inputs[1]], ToyTask().expected(inputs)) < 1
    assert ToyTask().excess([torch.full((N, N), math.nan)], ToyTask().expected(inputs)) == math.inf
    assert ToySpace().valid(ToySpace().default)


@pytest.mark.parametrize("role", ["building", "measuring"])
def test_workers_may_run_on_every_core(tmp_path: Path, role: str) -> None:
    """TVM binds the threads of a process to cores unless told otherwise, and so each of several to the same."""
    process = Process(role, 1, tmp_path, worker_for)
    try:
        process.start()
        assert os.sched_getaffinity(process._process.pid) == os.sched_getaffinity(0)
    finally:
        process.end()

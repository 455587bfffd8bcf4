"""Tuning on a farm while things go wrong: the run ends with all its trials, and the log knows nothing of the trouble.

The boards are servers on this machine; tests/tuning/measuring/test_virtual_farm.py does the same on Cortex-A72 code.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from checkout import HELPERS
from farm_helpers import (
    BABBLE,
    CONT,
    STOP,
    NativeBoard,
    TrackerProcess,
    TreacherousTask,
    babble,
    later,
    native_farm,
    small_workload,
    suggesting,
)
from toy_task import wait_until

from gf_tvm.errors import FarmError, LogError
from gf_tvm.machine.profiles import get_profile
from gf_tvm.tuning import loop
from gf_tvm.tuning.log import Record, log_path, read_log
from gf_tvm.tuning.loop import Event, Summary, tune_tasks
from gf_tvm.tuning.measuring import board, tracker_watch
from gf_tvm.tuning.measuring.farm_measurer import FarmMeasurer
from gf_tvm.tuning.measuring.options import FarmOptions, MeasureOptions
from gf_tvm.tuning.measuring.reference import reference_task
from gf_tvm.tuning.options import SearchOptions
from gf_tvm.tuning.task import TuningError

Farm = tuple[TrackerProcess, list[NativeBoard]]
# A busy machine takes its time, and the tests wait for what must happen.
pytestmark = [pytest.mark.early, pytest.mark.timeout(900)]
HOST = get_profile("host").name
# One candidate hangs, and no other may exceed the limit, however busy the machine is.
QUICK = MeasureOptions(threads=1, builders=2, repeats=2, min_seconds=1e-3, rounds=2, run_timeout=20.0)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    with native_farm(3, tmp_path_factory.mktemp("boards")) as farm:
        yield farm


@pytest.fixture
def farm(shared: Farm) -> Farm:
    """Three boards that are free, whatever the test before has done to them."""
    tracker, _ = shared
    assert wait_until(lambda: all_free(tracker, 3))
    return shared


def all_free(tracker: TrackerProcess, count: int) -> bool:
    found = tracker.boards()
    return len(found) == count and all(board.info["state"] == "free" for board in found)


def farm_of(tracker: TrackerProcess, **options: object) -> FarmOptions:
    return FarmOptions(tracker.address, **{"key": "here", "drift": None, **options})  # type: ignore[arg-type]


def measurer_of(tracker: TrackerProcess, **options: object) -> FarmMeasurer:
    return FarmMeasurer(QUICK, farm_of(tracker, **options), "test board")


def tune_here(
    measurer: FarmMeasurer,
    logs: Path,
    trials: int,
    on_event: Callable[[Event], object] = lambda event: None,
    minutes: float | None = None,
) -> tuple[Summary, list[Record], list[Event]]:
    """Tune the treacherous task and check the log: every trial once, and each with the status that it deserves."""
    task = TreacherousTask(small_workload(), HOST)
    events: list[Event] = []

    def progress(event: Event) -> None:
        events.append(event)
        on_event(event)

    summary = tune_tasks(
        [task],
        SearchOptions(trials=trials, minutes=minutes),
        logs=logs,
        options=QUICK,
        measurer=measurer,
        progress=progress,
    )
    records = read_log(log_path(logs, HOST, task.identity.key), task.identity).records
    check_trials(task, records, trials)
    return summary, records, events


def check_trials(task: TreacherousTask, records: list[Record], trials: int) -> None:
    found = [record for record in records if record.kind == "trial"]
    assert len(found) == len({record.id for record in found}) == trials
    assert {r.id: r.status for r in found} == {r.id: task.act(r.id) for r in found}
    assert all(record.board is not None and record.board["name"] for record in found)


def notes(events: list[Event]) -> str:
    return "\n".join(event.message for event in events if event.kind == "note")


def once(when: Callable[[Event], bool], act: Callable[[], object]) -> Callable[[Event], None]:
    done: list[bool] = []

    def on_event(event: Event) -> None:
        if not done and when(event):
            done.append(True)
            act()

    return on_event


def at_trial(
    number: int, act: Callable[[], object], ready: Callable[[], bool] = lambda: True
) -> Callable[[Event], None]:
    """Do something once, after trial ``number`` and not before ``ready``."""
    return once(lambda event: event.kind == "trial" and event.trial >= number and ready(), act)


def at_note(text: str, act: Callable[[], object]) -> Callable[[Event], None]:
    """Do something once, when a note with ``text`` comes."""
    return once(lambda event: event.kind == "note" and text in event.message, act)


def each(*handlers: Callable[[Event], object]) -> Callable[[Event], None]:
    def on_event(event: Event) -> None:
        for handler in handlers:
            handler(event)

    return on_event


def met(measurer: FarmMeasurer, *names: str) -> Callable[[], bool]:
    """Tells whether a run has had sessions with these boards; what befalls them before, it cannot know."""
    return lambda: set(names) <= set(measurer.report["boards"])


def test_everything_at_once(farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that crash, hang and are wrong; strangers; a server that is killed; a board that freezes and thaws."""
    monkeypatch.setattr(board, "_SILENT_SECONDS", 20.0)
    monkeypatch.setattr(loop, "ConfigSearch", suggesting(TreacherousTask(small_workload(), HOST).examples))
    tracker, (first, second, third) = farm

    def trouble() -> None:
        for data in BABBLE:
            for port in (first.port, third.port, tracker.address[1]):
                babble(("127.0.0.1", port), data, 0.1)
        first.kill()
        later(3.0, first.start)
        second.signal(STOP)

    measurer = measurer_of(tracker)
    begin = at_trial(4, trouble, met(measurer, "board-1", "board-2"))
    thaw = at_note("board-2: board lost", lambda: second.signal(CONT))
    try:
        summary, records, events = tune_here(measurer, tmp_path, 40, each(begin, thaw))
    finally:
        second.signal(CONT)
    assert summary.tasks[0].confirmed
    assert {"crash", "timeout", "wrong", "ok"} == {record.status for record in records if record.kind == "trial"}
    assert summary.farm is not None
    found = summary.farm["boards"]
    assert found["board-1"]["troubles"] == {"board lost": 1}, notes(events)
    assert found["board-2"]["troubles"] == {"board lost": 1}, notes(events)
    assert "board-1: board lost" in notes(events)
    assert "board-2: board lost: it has not reported to the tracker for 20 s" in notes(events)
    # All come back, and are free again when the run is over; the servers have counted what they did.
    assert wait_until(lambda: all_free(tracker, 3))
    assert {b.name: b.info["failed"] for b in tracker.boards()}["board-3"] > 0


RUN = """
import os, sys
from pathlib import Path
sys.path[:0] = sys.argv[1].split(os.pathsep)
from test_farm_faults import HOST, QUICK
from farm_helpers import TreacherousTask, small_workload
from gf_tvm.tuning.loop import tune_tasks
from gf_tvm.tuning.measuring.farm_measurer import FarmMeasurer
from gf_tvm.tuning.measuring.options import FarmOptions
from gf_tvm.tuning.options import SearchOptions
host, port = sys.argv[3].rsplit(":", 1)
farm = FarmOptions((host, int(port)), "here", drift=None)
task = TreacherousTask(small_workload(), HOST)
search = SearchOptions(trials=20)
tune_tasks([task], search, logs=sys.argv[2], options=QUICK, measurer=FarmMeasurer(QUICK, farm, "test board"))
"""


def test_a_killed_tuner_is_resumed(farm: Farm, tmp_path: Path) -> None:
    tracker, _ = farm
    path = log_path(tmp_path, HOST, small_workload().key)
    modules = os.pathsep.join([str(Path(__file__).parent), HELPERS])
    arguments = [sys.executable, "-c", RUN, modules, str(tmp_path), tracker.text]
    with subprocess.Popen(arguments) as process:
        assert wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") >= 5)
        process.kill()
    before = [record for record in read_log(path).records if record.kind == "trial"]
    assert 4 <= len(before) < 20
    # The boards find out that their client is gone.
    assert wait_until(lambda: all_free(tracker, 3))
    summary, records, _ = tune_here(measurer_of(tracker), tmp_path, 20)
    assert [record for record in records if record.kind == "trial"][: len(before)] == before
    assert summary.tasks[0].measured == 20 - len(before)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of a few kilobytes."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode:
        pytest.skip("a small disk to fill needs the right to mount one")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_ends_the_run_and_keeps_the_trials(farm: Farm, tmp_path: Path) -> None:
    tracker, _ = farm
    disk = tmp_path / "disk"
    path = log_path(disk, HOST, small_workload().key)

    def fill() -> None:
        with open(disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(b"x" * 256)

    with small_disk(disk, "48k"):
        with pytest.raises(LogError, match=r"No space left on device; its \d+ earlier records are kept") as failure:
            tune_here(measurer_of(tracker), disk, 20, at_trial(3, fill))
        kept = len(read_log(path).records)
        assert 3 <= kept < 20
        assert f" {kept} earlier" in str(failure.value)
        (disk / "filler").unlink()
        tune_here(measurer_of(tracker), disk, 20)


def tune_alone(
    tracker: TrackerProcess, name: str, logs: Path, boards: Path, prepare: Callable[[], object], tmp: Path
) -> str:
    """Tune with one board, which is of no use and has its temporary files in ``tmp``; returns why the run ended."""
    with NativeBoard(name, tracker.address, name, boards, TMPDIR=str(tmp)):
        tracker.wait_for(4)
        prepare()
        measurer = measurer_of(tracker, key=name, patience_minutes=0.1)
        with pytest.raises(TuningError) as failure:
            tune_here(measurer, logs, 4)
        assert measurer.report["boards"][name] == {"trials": 0, "troubles": {"broken": 1}}
    assert not read_log(log_path(logs, HOST, small_workload().key)).records
    return str(failure.value)


def test_a_full_disk_of_a_board_is_no_fault_of_the_candidates(farm: Farm, tmp_path: Path) -> None:
    """What was cut off in uploading would crash when it is loaded, and be logged as rejected for ever."""
    with small_disk(tmp_path / "disk", "8k") as disk:  # less than any library
        reason = tune_alone(farm[0], "full", tmp_path / "logs", tmp_path / "boards", lambda: None, disk)
    assert "it waited for full (put aside: of an uploaded library there are " in reason
    assert "its disk may be full" in reason


def test_a_board_without_a_temporary_folder_says_so_by_name(farm: Farm, tmp_path: Path) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    reason = tune_alone(farm[0], "bare", tmp_path / "logs", tmp_path / "boards", folder.rmdir, folder)
    assert f"it waited for bare (put aside: no files can be kept in {folder}: No such file" in reason


def test_a_wrong_key_fails_at_once_and_lists_the_known_ones(farm: Farm, tmp_path: Path) -> None:
    with pytest.raises(FarmError, match="knows no board with the key 'rpi5'; known keys: here"):
        tune_here(measurer_of(farm[0], key="rpi5"), tmp_path, 4)
    assert not list(tmp_path.glob("*/*.jsonl"))


def test_a_board_that_is_not_like_the_host_is_refused(farm: Farm, tmp_path: Path) -> None:
    """Another version of gf_tvm there: the run says so, and goes on with the others."""
    stale = tmp_path / "stale"
    stale.mkdir()
    (stale / "sitecustomize.py").write_text(
        "import importlib.metadata as m\nreal = m.version\n"
        "m.version = lambda name: '0.0.9' if name == 'gf-tvm' else real(name)\n"
    )
    tracker, _ = farm
    with NativeBoard("old", tracker.address, "here", tmp_path / "boards", PYTHONPATH=str(stale)):
        tracker.wait_for(4)
        summary, records, events = tune_here(measurer_of(tracker), tmp_path, 12)
    assert "old" not in {record.board["name"] for record in records if record.board}
    assert "old is put aside for this run: it has gf-tvm 0.0.9, this machine has" in notes(events)
    assert summary.farm is not None
    assert summary.farm["boards"]["old"]["troubles"] == {"refused": 1}


def test_boards_of_which_all_are_refused_end_the_run_at_once(farm: Farm, tmp_path: Path) -> None:
    stale = tmp_path / "stale"
    stale.mkdir()
    (stale / "sitecustomize.py").write_text(
        "import importlib.metadata as m\nreal = m.version\n"
        "m.version = lambda name: '0.0.9' if name == 'gf-tvm' else real(name)\n"
    )
    tracker, _ = farm
    with contextlib.ExitStack() as stack:
        for name in ("old-1", "old-2"):
            path = {"PYTHONPATH": str(stale)}
            stack.enter_context(NativeBoard(name, tracker.address, "old", tmp_path / "boards", **path))
        tracker.wait_for(5)
        begun = time.monotonic()
        with pytest.raises(TuningError, match=r"no board with the key 'old' can be used: old-\d: it has gf-tvm 0.0.9"):
            tune_here(measurer_of(tracker, key="old", boards=1), tmp_path / "logs", 4)
        assert time.monotonic() - begun < 60


def test_boards_that_stop_in_the_final_comparison_do_not_outlast_the_minutes(
    farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_LEAST_COMPARE", 3.0)
    tracker, members = farm
    stopped: list[float] = []

    def stop() -> None:
        for member in members:
            member.signal(STOP)
        stopped.append(time.monotonic())

    halt = once(lambda event: event.kind == "compare", stop)
    begun = time.monotonic()
    try:
        summary, _, events = tune_here(measurer_of(tracker), tmp_path, 6, halt, minutes=0.75)
        ended = time.monotonic()
    finally:
        for member in members:
            member.signal(CONT)
    assert not summary.tasks[0].confirmed
    assert ended - max(begun + 45, stopped[0]) < 15
    assert "no time is left for the final comparison; it waits for " in notes(events)
    waits = [event.message for event in events if event.kind == "compare"]
    assert waits[0].startswith("comparing, waits for board-")
    # The same command makes up for it.
    assert wait_until(lambda: all_free(tracker, 3))
    assert tune_here(measurer_of(tracker), tmp_path, 6)[0].tasks[0].confirmed


def test_a_hot_board_cools_down_and_its_trial_is_repeated(
    farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board, "_REST_SECONDS", 0.5)
    zone = tmp_path / "sensors" / "sys" / "class" / "thermal" / "thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "type").write_text("cpu-thermal\n")
    (zone / "temp").write_text("45000\n")

    heat = at_trial(3, lambda: (zone / "temp").write_text("85000\n"))
    cool = at_note("hot is at 85", lambda: (zone / "temp").write_text("60000\n"))

    tracker, _ = farm
    with NativeBoard("hot", tracker.address, "hot", tmp_path, GF_TVM_SENSORS=str(tmp_path / "sensors")):
        tracker.wait_for(4)
        summary, records, events = tune_here(measurer_of(tracker, key="hot"), tmp_path, 8, each(heat, cool))
    assert "hot is at 85 °C; it cools down and the trial is repeated" in notes(events)
    assert "hot has cooled down" in notes(events)
    assert all(r.board is not None and r.board["celsius"] in (45.0, 60.0) for r in records if r.kind == "trial")
    assert summary.farm is not None
    assert summary.farm["boards"]["hot"]["troubles"]["throttled"] >= 1


def test_no_board_for_too_long_ends_the_run(farm: Farm, tmp_path: Path) -> None:
    tracker, members = farm
    measurer = measurer_of(tracker)

    def unplug() -> None:
        for member in members:
            member.kill()
        # Not before, when the run needs patience with a busy machine.
        measurer._farm = replace(measurer._farm, patience_minutes=0.1)

    try:
        with pytest.raises(TuningError, match=r"no board with the key 'here' was at work for 0\.1 minutes"):
            tune_here(measurer, tmp_path, 16, at_trial(3, unplug))
    finally:
        for member in members:
            member.start()
    records = read_log(log_path(tmp_path, HOST, small_workload().key)).records
    assert 3 <= len(records) < 16


def test_the_reference_kernel_is_built_and_measured_beside_the_candidates(farm: Farm, tmp_path: Path) -> None:
    """As a run with the default options does; a machine that is busy with tests needs a generous limit."""
    task = TreacherousTask(small_workload(), HOST)
    measurer = FarmMeasurer(QUICK, farm_of(farm[0], drift=1000.0), "test board", reference_task(HOST))
    tune_tasks([task], SearchOptions(trials=8), logs=tmp_path, options=QUICK, measurer=measurer)
    records = read_log(log_path(tmp_path, HOST, task.identity.key), task.identity).records
    check_trials(task, records, 8)
    measured = {record.board["name"] for record in records if record.board}
    assert measured
    assert all((measurer._run.health.boards[name].first_reference or 0) > 0 for name in measured)


def test_the_tracker_is_away_for_a_while(farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boards at work go on; a server that is killed meanwhile registers when the tracker is back."""
    monkeypatch.setattr(tracker_watch, "_SUMMARY_SECONDS", 1.0)  # so that the run sees both before it ends
    tracker, (first, *_) = farm
    measurer = measurer_of(tracker)
    gone: list[bool] = []

    def away() -> None:
        tracker.kill()
        first.kill()
        first.start()
        gone.append(True)

    leave = at_trial(4, away, met(measurer, "board-1"))
    back = once(lambda event: bool(gone) and "boards that are at work go on" in event.message, tracker.start)
    summary, _, events = tune_here(measurer, tmp_path, 40, each(leave, back))
    assert "boards that are at work go on" in notes(events)
    assert "the tracker is back" in notes(events)
    assert summary.farm is not None
    # Killed at work, or while the host was asking the tracker for it, or between two candidates: then nothing was lost.
    assert set(summary.farm["boards"]["board-1"]["troubles"]) <= {"board lost", "no board"}
    assert wait_until(lambda: all_free(tracker, 3))

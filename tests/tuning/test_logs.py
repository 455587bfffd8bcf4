"""What is asked of tuning logs: the best schedule, seeds for another search, one log made of several, a listing."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gf_tvm.building import EMULATED, build
from gf_tvm.core.geometry import Geometry
from gf_tvm.core.workload import Workload
from gf_tvm.errors import LogError
from gf_tvm.machine.profiles import get_profile
from gf_tvm.runners import cli
from gf_tvm.schedules import get_space
from gf_tvm.tuning.log import (
    Identity,
    LogFolder,
    LogMismatch,
    Record,
    config_id,
    find_best,
    identity_of,
    log_path,
    read_log,
    seeds,
)
from gf_tvm.tuning.merge import merge, summarize

WORKLOAD = Workload("filter_input", Geometry(1, 16, 8, 8, 8, 3, 2, padding=1))
HOST = get_profile("host")
MADE: dict[str, Any] = {"cpu": "c", "threads": 1, "tvm": "0.27", "created": "one"}


@pytest.fixture(scope="module")
def identity() -> Identity:
    return identity_of(WORKLOAD, HOST)


@pytest.fixture(scope="module")
def space() -> Any:
    return get_space(WORKLOAD, HOST)


def record(config: dict[str, Any], seconds: float | None, kind: str = "trial", **changes: Any) -> Record:
    made = Record(kind, "ours", config_id(config), "ok" if seconds else "crash", dict(config), seconds=seconds)
    return replace(made, **changes)


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, identity: Identity) -> Write:
    """Writes a folder of logs; returns it."""

    def write(name: str, *records: Record, identity: Identity = identity, **made: Any) -> Path:
        root = tmp_path / name
        with LogFolder(root, identity.device) as folder, folder.open(identity, {**MADE, **made}) as log:
            for item in records:
                log.append(item)
        return root

    return write


def content(root: Path, identity: Identity) -> list[Record]:
    return read_log(log_path(root, identity.device, identity.key), identity).records


# ------------------------------------------------------------------------------------------- the target is always asked

OTHERS = {
    "target": {"target": '{"kind": "cuda", "arch": "sm_53"}'},
    "definition": {"definition": "0" * 16},
    "workload": {"workload": {"kernel": "expand"}},
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_log_of_something_else_is_never_used(
    write: Write, tmp_path: Path, identity: Identity, space: Any, other: str
) -> None:
    foreign = write("foreign", record(space.default, 1e-9), identity=replace(identity, **OTHERS[other]))
    ours = write("ours", record(space.default, 1e-3))
    best, reasons = find_best(WORKLOAD, HOST, [foreign])
    assert best is None
    assert len(reasons) == 1
    assert "does not fit" in reasons[0]
    best, reasons = find_best(WORKLOAD, HOST, [foreign, ours])
    assert best is not None
    assert best.seconds == 1e-3
    assert len(reasons) == 1
    assert seeds(identity, space, [foreign], 9) == ([], reasons)
    for sources in ([ours, foreign], [foreign, ours]):
        with pytest.raises(LogMismatch, match="does not fit") as error:
            merge(sources, tmp_path / "out", HOST.name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_logs_of_another_target_do_not_merge_even_if_they_agree(
    write: Write, tmp_path: Path, identity: Identity, space: Any
) -> None:
    foreign = write("foreign", record(space.default, 1e-9), identity=replace(identity, **OTHERS["target"]))
    with pytest.raises(LogMismatch, match=r"its target is .*cuda.*, wanted is .*llvm"):
        merge([foreign], tmp_path / "out", HOST.name)


# ------------------------------------------------------------------------------------------------------ under emulation


def test_times_measured_under_emulation_come_last_and_build_says_so(
    write: Write, tmp_path: Path, space: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    virtual = write("virtual", record(space.default, 1e-6), emulated=True)
    real = write("real", record(space.default, 1e-3))
    best, _ = find_best(WORKLOAD, HOST, [virtual, real])
    assert best is not None
    assert (best.seconds, best.emulated) == (1e-3, False)
    best, _ = find_best(WORKLOAD, HOST, [virtual])
    assert best is not None
    assert best.emulated

    monkeypatch.setattr("gf_tvm.tuning.log.shipped_logs", lambda: None)
    (kernel,) = build([WORKLOAD], HOST, [virtual], tmp_path / "virtual.gfb").kernels
    assert (kernel.schedule, kernel.note) == ("tuned", EMULATED)
    (kernel,) = build([WORKLOAD], HOST, [real], tmp_path / "real.gfb").kernels
    assert (kernel.schedule, kernel.note) == ("tuned", "")

    case = {"name": "a", "n": 1, "ci": 16, "co": 8, "h": 8, "w": 8, "kernel": 3, "padding": 1, "patches": [2]}
    shapes = tmp_path / "shapes.json"
    shapes.write_text(json.dumps({"cases": [case]}))
    options = ["--shapes", str(shapes), "--logs", str(virtual), "--out", str(tmp_path / "cli.gfb")]
    assert cli.main(["build", *options, "--json", str(tmp_path / "built.json")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "emulation" in line]
    assert lines == [f"1 kernel {EMULATED}"]
    notes = [kernel["note"] for kernel in json.loads((tmp_path / "built.json").read_text())["kernels"]]
    assert sorted(notes, key=str) == sorted([EMULATED, None], key=str)


# ------------------------------------------------------------------------------------------------------------- seeds


def test_seeds_are_the_fastest_of_each_log_in_turn(write: Write, identity: Identity, space: Any) -> None:
    a, b, c, d = list(space.points())[:4]
    one = write("one", record(a, 3e-3), record(b, 1e-3), record(c, None), record(d, 2e-3))
    # Measured in another way: its times say nothing beside the first log's, its order does.
    two = write("two", record(c, 9.0), record(b, 8.0), record(c, 9.5, "winner"), threads=4, emulated=True)
    found, reasons = seeds(identity, space, [one, two], 9)
    assert found == [b, c, d, a]
    assert reasons == []
    assert seeds(identity, space, [two, one], 9)[0] == [c, b, d, a]
    assert seeds(identity, space, [one, two], 2)[0] == [b, c]
    assert seeds(identity, space, [one], 0)[0] == []
    assert seeds(identity, space, [one / "nothing"], 9) == ([], [])


def test_seeds_are_points_of_the_space_that_were_right(write: Write, identity: Identity, space: Any) -> None:
    a, b = list(space.points())[:2]
    strange = {**a, "by_column": 7}
    trace = Record("trial", "metaschedule", "0x1", "ok", None, [[], []], 1e-9)
    wrong = record(b, None, "rejected", status="wrong")
    logs = write("one", record(strange, 1e-9), trace, record(b, 1e-6), wrong, record(a, 1e-3))
    assert seeds(identity, space, [logs], 9) == ([a], [])
    path = log_path(logs, identity.device, identity.key)
    path.write_bytes(path.read_bytes().replace(b'"seconds":0.001', b'"seconds":0.002'))
    with pytest.raises(LogError, match="line 6: damaged"):
        seeds(identity, space, [logs], 9)


# ------------------------------------------------------------------------------------------------------------- merging


def test_merged_logs_have_every_record_once_and_the_fastest_winner(
    write: Write, tmp_path: Path, identity: Identity, space: Any
) -> None:
    a, b, c = list(space.points())[:3]
    shared, failed = record(a, 3e-3), record(c, None, message="gone")
    # The first farm's search, ended with a winner of 1 ms; the second began with a copy of its first trial.
    first = [shared, failed, failed, record(b, 1e-3), record(b, 1e-3, "winner", default_seconds=3e-3)]
    board = {"name": "pi-7", "mhz": 1500.0, "throttled": False}
    second = [shared, record(c, 2e-3, board=board), record(c, 2e-3, "winner"), failed]
    one, two, out = write("one", *first), write("two", *second, created="two"), tmp_path / "out"

    (made,) = merge([one, two], out, HOST.name)
    merged = content(out, identity)
    # In the order of the sources; of the winners the fastest stands last, where the newest is looked for.
    assert merged == [*first[:4], second[1], second[2], first[4]]
    assert (made.sources, made.records, made.added, made.repeated) == (2, 7, 7, 2)
    best, _ = find_best(WORKLOAD, HOST, [out])
    assert best == first[4]
    header = read_log(made.path).made
    assert header == {**MADE, "merged": [{**MADE, "created": "two"}]}

    # Again, in any order, with itself among the sources: nothing changes.
    data = made.path.read_bytes()
    for sources in ([one, two], [two, one], [out], [one, out, two]):
        assert all(again.added == 0 for again in merge(sources, out, HOST.name))
        assert made.path.read_bytes() == data
    assert [path.name for path in made.path.parent.iterdir()] == [made.path.name]
    # The tuner goes on with it.
    with LogFolder(out, HOST.name) as folder, folder.open(identity, MADE) as log:
        assert log.records == merged


def test_a_winner_that_another_farm_found_wrong_is_none(
    write: Write, tmp_path: Path, identity: Identity, space: Any
) -> None:
    a, b = list(space.points())[:2]
    one = write("one", record(a, 1e-3), record(a, 1e-3, "winner"))
    two = write("two", record(b, 2e-3), record(b, 2e-3, "winner"), record(a, None, "rejected", status="wrong"))
    for sources in ([one, two], [two, one]):
        out = tmp_path / str(sources[0] == one)
        merge(sources, out, HOST.name)
        best, _ = find_best(WORKLOAD, HOST, [out])
        assert best == record(b, 2e-3, "winner")


def test_what_the_output_has_already_is_kept(write: Write, tmp_path: Path, identity: Identity, space: Any) -> None:
    a, b = list(space.points())[:2]
    out, more = write("out", record(a, 1e-3)), write("more", record(b, 2e-3))
    other = replace(identity, key="another_workload")
    write("out", record(a, 5.0), identity=other)
    (made,) = merge([more], out, HOST.name)
    assert content(out, identity) == [record(a, 1e-3), record(b, 2e-3)]
    assert (made.sources, made.added) == (2, 1)
    assert content(out, other) == [record(a, 5.0)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"threads": 4}, "measured with threads 4, .* with 1"),
        ({"cpu": "d"}, "measured with cpu d, .* with c"),
        ({"emulated": True}, "measured with emulated True, .* with False"),
        ({"measurement": {"cache": "cold"}}, "measured with cache cold, .* with warm"),
    ],
)
def test_what_cannot_be_compared_stays_apart(
    write: Write, tmp_path: Path, space: Any, changes: dict[str, Any], words: str
) -> None:
    one, two = write("one", record(space.default, 1e-3)), write("two", record(space.default, 2e-3), **changes)
    with pytest.raises(LogMismatch, match=words) as error:
        merge([one, two], tmp_path / "out", HOST.name)
    assert "\n" not in str(error.value)
    assert str(one) in str(error.value)
    assert str(two) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_while_merging_changes_nothing(
    write: Write, tmp_path: Path, identity: Identity, space: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = list(space.points())[:2]
    out, more = write("out", record(a, 1e-3)), write("more", record(b, 2e-3))
    write("more", record(b, 2e-3), identity=replace(identity, key="z_another"))
    before = log_path(out, identity.device, identity.key).read_bytes()
    synced: list[int] = []

    def fsync(handle: int) -> None:
        synced.append(handle)
        if len(synced) == 3:  # the lock's, the first log's, the second's
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(LogError, match="No space left on device"):
        merge([more], out, HOST.name)
    monkeypatch.undo()
    assert [path.read_bytes() for path in (out / HOST.name).iterdir()] == [before]


def test_damaged_and_missing_sources_are_named(write: Write, tmp_path: Path, space: Any) -> None:
    good, bad = write("good", record(space.default, 1e-3)), write("bad", record(space.default, 1e-3))
    (path,) = bad.glob("*/*.jsonl")
    path.write_bytes(path.read_bytes().replace(b"0.001", b"0.002"))
    (tmp_path / "empty").mkdir()
    for sources, device, words in (
        ([good, bad], HOST.name, "line 2: damaged"),
        ([good, tmp_path / "none"], HOST.name, "there is no folder of tuning logs"),
        ([good, tmp_path / "empty"], HOST.name, "no tuning logs in a folder <device>"),
        ([good / HOST.name], HOST.name, f"give its parent '{good}'"),
        ([good], "rpi4", "no tuning logs of rpi4 in"),
    ):
        with pytest.raises(LogError, match=words):
            merge(sources, tmp_path / "out", device)
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_not_merged_into(write: Write, space: Any, tmp_path: Path) -> None:
    source = write("source", record(space.default, 1e-3))
    with LogFolder(tmp_path / "out", HOST.name), pytest.raises(LogError, match="is being written by"):
        merge([source], tmp_path / "out", HOST.name)


# ------------------------------------------------------------------------------------------------------------- command


def test_logs_show(
    write: Write, tmp_path: Path, identity: Identity, space: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = list(space.points())[:2]
    winner = record(b, 1e-3, "winner", default_seconds=2e-3, board={"name": "pi-1"})
    trials = [record(a, 2e-3, board={"name": "pi-2", "mhz": 1500}), record(b, 1e-3), record(a, None)]
    logs = write("logs", *trials, winner, emulated=True, measurement={"cache": "cold"})
    file = tmp_path / "logs.json"
    assert cli.main(["logs", "show", str(logs), "--json", str(file)]) == 0
    line = capsys.readouterr().out.splitlines()[2]
    for text in (HOST.name, "filter_input", "n1_ci16_co8_8x8", " 3 ", " 1 ", "2.00x", "pi-1, pi-2", "emulated", "cold"):
        assert text in line
    (listed,) = json.loads(file.read_text())["logs"]
    assert (listed["trials"], listed["failed"], listed["seconds"], listed["gain"]) == (3, 1, 1e-3, 2.0)
    assert (listed["boards"], listed["emulated"], listed["key"]) == (["pi-1", "pi-2"], True, identity.key)

    # Damage in one log does not hide the others.
    other = write("logs", record(a, 1.0), identity=replace(identity, key="a_broken")) / HOST.name / "a_broken.jsonl"
    other.write_bytes(other.read_bytes()[:-20] + b"x" * 19 + b"\n")
    assert cli.main(["logs", "show", str(logs)]) == 2
    out, err = capsys.readouterr()
    assert "pi-1, pi-2" in out
    assert err.count("\n") == 1
    assert "a_broken.jsonl, line 2: damaged" in err
    assert cli.main(["logs", "show", str(tmp_path / "none")]) == 2
    assert "there is no folder of tuning logs" in capsys.readouterr().err


def test_a_log_without_any_trial_is_listed(write: Write, identity: Identity) -> None:
    summary = summarize(log_path(write("logs"), identity.device, identity.key))
    assert (summary.trials, summary.seconds, summary.gain, summary.boards) == (0, None, None, ())


def test_logs_merge(
    write: Write, tmp_path: Path, identity: Identity, space: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = list(space.points())[:2]
    one, two, out = write("one", record(a, 1e-3)), write("two", record(b, 2e-3)), tmp_path / "out"
    pi = replace(identity, device="rpi4", target=get_profile("rpi4").target)
    write("two", record(b, 2e-3), identity=pi)
    assert cli.main(["logs", "merge", str(one), str(two), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert f"{out / HOST.name}: 1 logs, 2 new records" in text
    assert f"{out / 'rpi4'}: 1 logs, 1 new records" in text
    assert content(out, identity) == [record(a, 1e-3), record(b, 2e-3)]
    write("two", record(a, 2e-3), identity=replace(pi, key="x"), threads=3)
    write("one", record(a, 2e-3), identity=replace(pi, key="x"))
    assert cli.main(["logs", "merge", str(one), str(two), "--out", str(out), "--device", "rpi4"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "measured with threads 3" in err

"""``gf-tvm tune``: mistakes give one line and exit code 2, an interrupt keeps every finished trial."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from toy_task import wait_until, workers_of

from gf_tvm.core.geometry import Geometry
from gf_tvm.core.workload import Workload
from gf_tvm.machine.profiles import get_profile
from gf_tvm.runners.cli import main
from gf_tvm.tuning import Event, Summary, TaskSummary
from gf_tvm.tuning.log import LogFolder, log_path, read_log

FIELDS = {"n": 1, "ci": 8, "co": 8, "h": 6, "w": 6, "kernel": 3, "padding": 1}
WORKLOAD = Workload("backward", Geometry(**FIELDS, patch=2))  # type: ignore[arg-type]


@pytest.fixture
def shapes(tmp_path: Path) -> str:
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps({"patches": [2], "cases": [FIELDS]}))
    return str(path)


def log_of(logs: Path) -> Path:
    return log_path(logs, get_profile("host").name, WORKLOAD.key)


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["tune", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("gf-tvm")
    return lines[0]


def test_an_interrupted_job_keeps_its_trials_and_the_same_command_continues(
    tmp_path: Path, shapes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    logs, scratch, out = tmp_path / "logs", tmp_path / "tmp", tmp_path / "out.json"
    scratch.mkdir()
    options = ["tune", "--shapes", shapes, "--kernels", "backward", "--logs", str(logs), "--threads", "1"]
    path = log_of(logs)
    with subprocess.Popen(
        [sys.executable, "-m", "gf_tvm.runners.cli", *options, "--trials", "60"],
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") >= 3)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
            stdout, stderr = process.communicate(timeout=250)
        finally:
            process.kill()
    assert process.returncode == 130
    assert stdout == ""
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-2:] == [
        f"all finished trials are kept in {logs}; the same command continues",
        "gf-tvm: interrupted",
    ]
    assert workers_of(process.pid) == []
    assert list(scratch.iterdir()) == []
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]
    finished = read_log(path).records
    assert 2 <= len(finished) < 60

    wanted = len(finished) + 2
    assert main([*options, "--trials", str(wanted), "--json", str(out)]) == 0
    captured = capsys.readouterr()
    records = read_log(path).records
    assert records[: len(finished)] == finished
    trials = [record for record in records if record.kind == "trial"]
    assert len(trials) == len({record.id for record in trials}) == wanted
    assert records[-1].kind == "winner"
    written = json.loads(out.read_text())
    assert written["device"] == get_profile("host").name
    (task,) = written["tasks"]
    assert task["measured"] == 2
    assert task["seconds"] == records[-1].seconds
    assert task["config"] == records[-1].config
    assert "backward" in captured.out
    assert f"continued: {len(finished)} trials are known" in captured.err
    assert "best " in captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trials", "0"], "trials must be at least 1, got 0"),
        (["--trials", "many"], "argument --trials: invalid int value: 'many'"),
        (["--minutes", "-1"], "minutes must be more than 0, got -1.0"),
        (["--early-stop", "0"], "early_stop must be at least 1, got 0"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--device", "toaster"], "unknown device 'toaster'; known: host, "),
        (["--kernels", "backward,forward"], "no kernel 'forward' to tune for these convolutions; kernels: filter_"),
        (["--space", "theirs"], "argument --space: invalid choice: 'theirs'"),
        (["--patch", "0"], "patch must be at least 1, got 0"),
        (["--json", "/no/such/folder/out.json"], "cannot write '/no/such/folder/out.json'"),
        (["--logs", "/dev/null"], "cannot write tuning logs here: Not a directory"),
        (["--whoever-reaches-it-runs-code"], "unrecognized arguments: --whoever-reaches-it-runs-code"),
    ],
)
def test_mistakes(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    shapes: str,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, "--shapes", shapes, *words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shapes.json"]


def test_a_poisoned_log_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path, shapes: str) -> None:
    path = log_of(tmp_path)
    path.parent.mkdir()
    path.write_bytes(b"\x00 poison \xff\n")
    line = fails(capsys, "--shapes", shapes, "--logs", str(tmp_path))
    assert line == f"gf-tvm: error: {path}: not a tuning log: no header in its first line"


def test_a_folder_in_use_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path, shapes: str) -> None:
    with LogFolder(tmp_path, get_profile("host").name) as folder:
        line = fails(capsys, "--shapes", shapes, "--logs", str(tmp_path))
    assert f"{folder.path}: is being written by process {os.getpid()}" in line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_job_that_is_terminated_ends_like_one_that_is_interrupted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shapes: str, number: int
) -> None:
    before = signal.getsignal(number)

    def tune(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), number)
        raise AssertionError("still running")

    monkeypatch.setattr("gf_tvm.tuning.tune", tune)
    assert main(["tune", "--shapes", shapes, "--logs", str(tmp_path)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "gf-tvm: interrupted"
    assert signal.getsignal(number) == before


def test_options_reach_the_library_and_progress_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, shapes: str
) -> None:
    given: dict[str, Any] = {}

    def tune(workloads: list[Workload], device: str, **arguments: Any) -> Summary:
        given.update(arguments, workloads=workloads, device=device)
        monkeypatch.setattr("gf_tvm.runners._output.LINE_INTERVAL", 0.0)
        show = arguments["progress"]
        tasks = []
        for index, workload in enumerate(workloads, start=1):
            place = (workload.key, index, len(workloads))
            show(Event("start", *place, 0, 5, left=100.0))
            show(Event("build", *place, 0, 5, left=100.0, message="built 1 of 4"))
            show(Event("trial", *place, 1, 5, "ok", 2e-3, 2e-3, 2e-3, 90.0))
            show(Event("trial", *place, 2, 5, "crash", None, 2e-3, 2e-3, 75.0, 12.5, (1, 2), "while running: SIGSEGV"))
            show(Event("note", *place, 2, 5, message="the space is exhausted after 2 trials"))
            show(Event("done", *place, 2, 5, best=1.9e-3, default=2e-3, left=0.0))
            tasks.append(TaskSummary(workload.key, "x", 2, 2, 1, "exhausted", "ours", {}, 1e-3, 2e-3, True, (2e-3,)))
        return Summary("some-device", "some-logs", 61.0, {}, tuple(tasks))

    monkeypatch.setattr("gf_tvm.tuning.tune", tune)
    options = ["--trials", "5", "--minutes", "1.5", "--early-stop", "7", "--threads", "3", "--seed", "9"]
    assert main(["tune", "--shapes", shapes, *options, "--space", "metaschedule", "--logs", "L"]) == 0
    given.pop("progress")
    assert [workload.kernel for workload in given.pop("workloads")] == ["filter_input", "backward"]
    wanted = {"device": "host", "logs": Path("L"), "trials": 5, "minutes": 1.5, "early_stop": 7}
    wanted |= {"space": "metaschedule", "threads": 3, "seed": 9, "seed_logs": [], "cold": False, "farm": None}
    assert given == wanted
    captured = capsys.readouterr()
    for text in (
        "[2/2] backward 1x8x6x6 to 8 R2x2: 1/5 trials",
        "best 2 ms, default 2 ms, 1 failed, 1 of 2 boards busy, 12.5 trials/min, all done in 1:15",
        "built 1 of 4",
        "[1/2] filter_input 1x8x6x6 to 8 R2x2: the space is exhausted after 2 trials",
        "[1/2] filter_input 1x8x6x6 to 8 R2x2: best 1.9 ms, default 2 ms",
    ):
        assert text in captured.err
    assert "2.00x" in captured.out
    assert "some-logs/some-device: 4 new trials in 1:01 min" in captured.out

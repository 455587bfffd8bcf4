"""benchmarks/trials.py: a whole run on a tiny convolution, and users' mistakes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import trials

from gf_tvm.machine import cpu
from gf_tvm.tuning import loop
from gf_tvm.tuning.measuring.options import MeasureOptions

pytestmark = [pytest.mark.early, pytest.mark.usefixtures("host")]

SHAPES = {
    "cases": [{"name": "tiny", "n": 2, "ci": 16, "co": 16, "h": 8, "w": 8, "kernel": [3, 3], "padding": [1, 1]}],
    "patches": [2],
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu, "SGEMM_SIZE", 64)
    # With caches that are emptied before each call, a measurement lasts as long as it may.
    monkeypatch.setattr(loop, "MeasureOptions", partial(MeasureOptions, max_seconds=0.1, repeats=2, rounds=2, final=2))
    monkeypatch.setattr(trials, "keep_freed_memory", lambda: True)  # it would hold for all tests that follow
    monkeypatch.chdir(tmp_path)


def test_a_run_and_one_that_finds_its_trials(capsys: pytest.CaptureFixture[str]) -> None:
    Path("shapes.json").write_text(json.dumps(SHAPES))
    command = ["--shapes", "shapes.json", "--few", "2", "--many", "4", "--seconds", "0", "--trial-logs", "kept"]
    assert trials.main([*command, "--json", "trials.json"]) == 0
    (row,) = json.loads(Path("trials.json").read_text())["rows"]
    assert (row["name"], row["patch"], row["trials"]) == ("tiny", [2, 2], 4)
    assert row["points"] > 4
    assert all(row[name] > 0 for name in ("few_ms", "many_ms", "default_ms"))
    assert 1 <= row["trials_until_close"] <= 4
    assert row["search"]["measured"] == 2  # two of the four are those of the short search
    assert "tiny" in capsys.readouterr().out
    assert trials.main([*command, "--json", "again.json"]) == 0
    (again,) = json.loads(Path("again.json").read_text())["rows"]
    assert again["search"]["measured"] == 0


def test_the_first_trial_that_is_close() -> None:
    assert trials.until_close([None, 2.0, 1.04, 1.0]) == 3
    assert trials.until_close([None]) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--few", "4", "--many", "4"], "--few must be at least 1 and less than --many, got 4 and 4"),
        (["--seconds", "-1"], "--seconds must be a number of at least 0, got -1.0"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert trials.main(["--shapes", "paper", *options]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err

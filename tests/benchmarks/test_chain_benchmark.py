"""benchmarks/chains.py: a whole run on a tiny stage, and users' mistakes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import chains
import pytest

from gf_tvm.machine import cpu

pytestmark = pytest.mark.usefixtures("host")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu, "copy_bandwidth", lambda: 30.0)
    monkeypatch.setattr(cpu, "sgemm_peak", lambda: 150.0)
    monkeypatch.setattr(chains, "keep_freed_memory", lambda: True)  # it would hold for all tests that follow
    monkeypatch.chdir(tmp_path)


def test_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--channels", "64", "--size", "24", "--models", "", "--batch", "1", "--patch", "2", "--seconds", "0"]
    assert chains.main([*command, "--json", "chains.json"]) == 0
    document = json.loads(Path("chains.json").read_text())
    rows = document["rows"]
    assert [(row["network"], row["patch"]) for row in rows] == [("stage 64", [2, 2])]
    assert all(set(row["step_peak_bytes"]) == set(chains.VARIANTS) for row in rows)
    if sys.platform == "linux":
        assert all(peak >= 0 for row in rows for peak in row["step_peak_bytes"].values())
    assert all(row["schedule"] == row["filtered_schedule"] == "default" for row in rows)  # nothing fell back
    assert [len(row["convolutions"]) for row in rows] == [4]
    assert [row["expected"] for row in rows] == [1 + 180 / 64]
    # Maps of 64 x 6 x 6 at 35 GB/s: read by 4 convolutions, written by 3, 2 and 3 sweeps for each batch norm and ReLU,
    # 3 for the sum of a block's two gradients. Products of 9 patches at 200 GFLOP/s: 4 for weights, 3 for maps.
    sweeps, products = (4 + 3 + 4 * 2 + 4 * 3 + 3) * 64 * 36 * 4 / 35e9, 7 * 2 * 9 * 64 * 64 / 200e9
    assert [row["expected_of_chain"] for row in rows] == [pytest.approx(1 + sweeps / products)]
    assert document["conditions"]["of_networks"]["stage 64"]["bandwidth_gbs"] == 30.0
    assert "stage 64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--channels", "9"], "--channels must be among 64, 128, 256, 512, got '9'"),
        (["--channels", "64", "--models", "resnet18:0"], "--models takes MODEL:K with K of at least 1"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--logs", "nowhere"], "there is no folder of tuning logs 'nowhere'"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert chains.main(options) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert message in shown.err

"""benchmarks/step.py: a whole run on a tiny model, and users' mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import _forward_baselines
import pytest
import step
import torch
from torch import nn

from gf_tvm.comparison.convolutions import ComparisonError
from gf_tvm.comparison.steps import VARIANTS

pytestmark = pytest.mark.usefixtures("host")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(step, "limits_now", lambda: (150.0, 30.0))
    eager = replace(VARIANTS["compiled"], make=lambda model, *_: torch.compile(model, backend="eager"))
    monkeypatch.setitem(VARIANTS, "compiled", eager)
    monkeypatch.chdir(tmp_path)


def test_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--models", "resnet18_025", "--batches", "1", "--size", "16", "--last", "2", "--patch", "2"]
    files = ["--json", "step.json", "--markdown", "step.md"]
    assert step.main([*command, "--seconds", "0", "--no-memory", *files]) == 0
    document = json.loads(Path("step.json").read_text())
    (row,) = document["rows"]
    assert (row["name"], row["patch"], row["input"]) == ("resnet18_025", [2, 2], [1, 3, 16, 16])
    assert len(row["convolutions"]) == 2
    assert list(row["step_ms"]) == list(VARIANTS)
    assert row["unmeasured"] == {}  # "whole" ran its compiled parts, too
    assert set(row["forward_only_ms"]) == set(_forward_baselines.PROGRAMS) - set(_forward_baselines.missing())
    assert document["machine"]["allocator"]["name"]
    assert document["peak_gflops"] == 150
    out, table = capsys.readouterr().out, Path("step.md").read_text()
    for variant in VARIANTS:
        assert f" {variant} " in out
        assert f"| {variant} " in table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batches", "0"], "--batches takes an integer of at least 1, got '0'"),
        (["--last", "some"], "--last takes an integer of at least 1, or all, got 'some'"),
        (["--size", "0"], "--size must be at least 1, got 0"),
        (["--seconds", "nan"], "--seconds must be a number of at least 0, got nan"),
        (["--models", "nonsense"], "unknown model 'nonsense'"),
        (["--json", "no/such.json"], "there is no folder"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert step.main(options) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


@pytest.mark.parametrize("name", _forward_baselines.PROGRAMS)
def test_other_programs_compute_the_same(name: str) -> None:
    if name in _forward_baselines.missing():
        pytest.skip(f"needs {_forward_baselines.missing()[name]}")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.Flatten()).eval()
    x = torch.randn(2, 3, 6, 6)
    others = [other for other in _forward_baselines.PROGRAMS if other != name]
    with _forward_baselines.forwards(model, x, 1, without=others) as found:
        assert list(found) == [name]
        torch.testing.assert_close(found[name](), model(x).detach())
        assert found[name]() is None  # from the second call on only the time counts
        found[name].process.kill()  # type: ignore[attr-defined]
        found[name].process.wait()  # type: ignore[attr-defined]
        with pytest.raises((ComparisonError, BrokenPipeError)):
            found[name]()

"""benchmarks/capture.py: a whole run on a small image."""

from __future__ import annotations

import json
from pathlib import Path

import capture
import pytest

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Of transformers' own.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(capture, "STEPS", ("resnet18_025",))
    file = tmp_path / "capture.json"
    words = ["--models", "MobileNetV1", "--size", "64", "--rounds", "1", "--seconds", "0", "--json", str(file)]
    capture.main(words)
    found = json.loads(file.read_text())
    times = found["first_steps"]["MobileNetV1"]
    assert times["filtered"]["median"] > 0 < times["dynamo"]["median"]
    assert times["beyond"]["median"] == pytest.approx(times["filtered"]["median"] - times["dynamo"]["median"], abs=0.02)
    step = found["later_steps"]["resnet18_025"]
    assert step["put_together"]["median"] > 0
    assert len(step["model"]["all"]) >= 5
    assert "resnet18_025, a step" in capsys.readouterr().out

"""gf-tvm train as a person's job, predict and export: what they print and leave, and users' mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from photo_folders import CLASSES, photos

from gf_tvm.runners import cli
from gf_tvm.training.job import JobConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A job of a second."""
    data = photos(tmp_path / "my photos")
    options = ["--image-size", "8", "--batch", "8", "--epochs", "3", "--last", "1", "--lr", "0.1"]
    return ["train", "--model", "training_models:tiny", "--data", data, *options]


def test_from_photographs_to_predictions(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, results = tmp_path / "a model", tmp_path / "results.json"
    metrics = tmp_path / "m.jsonl"
    assert cli.main([*arguments, "--out", str(out), "--json", str(results), "--metrics", str(metrics)]) == 0
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if not line.startswith("gf-tvm: warning")]
    assert lines[0].startswith("protocol transfer: ")
    assert lines[1].startswith("24 pictures to train on, 6 for validation")
    assert "fine-tuning R2 chained" in shown.err or any(line.startswith("R2 chained 3/3: loss") for line in lines)
    table = shown.out.splitlines()
    assert {name for name in CLASSES if any(line.startswith(name) for line in table)} == set(CLASSES)
    assert f"model: '{out}'    try it: gf-tvm predict --model '{out}' PICTURE..." in table
    written = json.loads(results.read_text())
    assert written["schema"] == "gf_tvm.job/1"
    assert f"{100 * written['accuracy']:.1f} % after epoch {written['best_epoch']} of 3" in shown.out
    assert len(metrics.read_text().splitlines()) == 3

    folder = tmp_path / "my photos" / CLASSES[2]
    first = sorted(folder.iterdir())[0]
    predictions = tmp_path / "p.json"
    command = ["predict", "--model", str(out), "--top", "2", "--json", str(predictions)]
    assert cli.main([*command, str(first), str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    assert lines[0].startswith(f"{first}: ")
    found = json.loads(predictions.read_text())["predictions"]
    assert [len(row["classes"]) for row in found] == [2] * 11
    assert f"{found[0]['classes'][0]['class']} {100 * found[0]['classes'][0]['probability']:.1f} %" in lines[0]

    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    assert cli.main([*command, str(broken), str(first)]) == 2
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 1
    assert f"gf-tvm: error: cannot read the image {str(broken)!r}" in shown.err
    assert "1 of 2 pictures could not be read" in shown.err
    assert len(json.loads(predictions.read_text())["predictions"]) == 1

    about = tmp_path / "about.json"
    assert cli.main(["export", "--model", str(out), "--onnx", str(tmp_path / "m.onnx"), "--json", str(about)]) == 0
    assert "training_models:tiny, 3 classes" in capsys.readouterr().out
    assert json.loads(about.read_text())["inputs"] == {"image": ["n", 3, 8, 8]}
    assert (tmp_path / "m.onnx").stat().st_size > 1000


def test_digits_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "training_models:tiny", "--image-size", "8", "--epochs", "1", "--last", "1", "--batch", "64"]
    assert cli.main(["train", *options, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().err
    assert "no --data: scikit-learn's 1797 images of digits" in shown
    assert "1438 pictures to train on, 359 for validation" in shown


def test_interrupted(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, calls = torch.optim.SGD.step, []

    def stop(self: torch.optim.SGD, *args: Any) -> Any:
        calls.append(self)
        if len(calls) == 5:  # the second step of the second epoch
            raise KeyboardInterrupt
        return step(self, *args)

    command = [*arguments, "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.SGD, "step", stop)
        assert cli.main(command) == 130
    assert "the same command with --resume goes on" in capsys.readouterr().err
    assert cli.main(command) == 2
    assert "--resume goes on with it" in capsys.readouterr().err
    assert cli.main([*command, "--resume"]) == 0
    assert "going on after epoch 1 of 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--out DIR is needed"),
        (["--out", "o", "--patch", "exact,2"], "--patch exact,2 names 2 backward passes"),
        (["--out", "o", "--pretrain-epochs", "3"], "--pretrain-epochs does not belong to --protocol transfer"),
        (["--out", "o", "--flip"], "--flip does not belong to --protocol transfer"),
        (["--out", "o", "--checkpoint", "c"], "--checkpoint does not belong to --protocol transfer"),
        (["--out", "o", "--resume"], "there is no interrupted job in 'o'"),
        (["--out", "o", "--weights", "none", "--model", "resnet19"], "unknown model 'resnet19'"),
        (["--out", "o", "--weights", "no.pth"], "cannot read the weights 'no.pth': No such file"),
        (["--out", "o", "--validation", "2"], "validation must lie between 0 and 1"),
        (["--out", "o", "--last", "9"], "9"),
        (["--protocol", "paper", "--out", "o"], "--out does not belong to --protocol paper"),
        (["--protocol", "paper", "--no-augment"], "--no-augment does not belong to --protocol paper"),
        (["--protocol", "paper", "--weights", "imagenet"], "--weights does not belong to --protocol paper"),
    ],
)
def test_mistakes(
    arguments: list[str],
    options: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*arguments, *options]) == 2
    shown = capsys.readouterr().err
    assert said in shown.splitlines()[-1]
    assert shown.splitlines()[-1].startswith("gf-tvm: error: ")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "command", [["predict", "--model", "none", "a.png"], ["export", "--model", "none", "--onnx", "a"]]
)
def test_no_model(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(command) == 2
    assert capsys.readouterr().err == (
        "gf-tvm: error: there is no model in 'none': no config.json; gf-tvm train --out makes one\n"
    )


def test_settings_from_a_file(arguments: list[str], tmp_path: Path) -> None:
    from gf_tvm.runners._transfer import job_of

    (tmp_path / "c.json").write_text(json.dumps({"epochs": 7, "clip": None, "patch": 4, "augment": False}))
    args = cli.build_parser().parse_args([*arguments, "--config", str(tmp_path / "c.json"), "--out", "o"])
    config = job_of(args)
    assert (config.epochs, config.clip, config.patch, config.augment) == (3, None, (4, 4), False)
    assert job_of(cli.build_parser().parse_args(["train", "--model", "m"])) == JobConfig("m")

"""gf-tvm train: what it prints and writes, users' mistakes, and SIGKILL at any moment."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import HELPERS
from fake_library import FakeLibrary, loaded
from training_models import patterns, state_of

from gf_tvm.runners import cli
from gf_tvm.training import EpochRow, TrainConfig
from gf_tvm.training.job import JobConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A run of a second: a tiny network on 160 images of 8x8 pixels."""
    data = patterns(tmp_path / "patterns.npz")
    return [
        *("train", "--protocol", "paper", "--model", "training_models:tiny", "--data", data),
        *("--last", "1", "--image-size", "8"),
        *("--batch", "8", "--epochs", "2", "--pretrain-epochs", "1"),
    ]


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_train(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    options = ["--patch", "exact,2,4x2", "--json", str(out), "--threads", "1", "--seed", "5", "--clip", "0", "--flip"]
    assert cli.main([*arguments, *options]) == 0
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if not line.startswith("gf-tvm: warning")]
    names = [line.split(":")[0] for line in lines]
    runs = ("exact", "R2 chained", "R4x2 chained")
    assert names == ["pretrain 1/1", *(f"{run} {i}/2" for run in runs for i in (1, 2))]
    assert all(" forward " in line and " backward " in line and " MB" in line and "test" in line for line in lines)
    table = shown.out.splitlines()
    assert "fine-tuned 1 convolutions and the classifier" in table[0]
    assert [line.split()[0] for line in table[3:6]] == ["exact", "R2", "R4x2"]
    assert table[6:] == [
        f"frozen layers' results ({', '.join(runs)}): computed in every epoch: training images are flipped or "
        "shifted at random"
    ]
    result = json.loads(out.read_text())
    assert result["schema"] == "gf_tvm.train/1"
    assert [run["variant"] for run in result["runs"]] == ["exact", "R2 chained", "R4x2 chained"]
    for run in result["runs"]:
        config = TrainConfig(**run["config"])
        assert (config.seed, config.clip, config.flip, config.batch) == (5, None, True, 8)
        rows = [EpochRow(**row) for row in run["rows"]]
        assert len(rows) == 2
        assert f"{100 * rows[-1].test_accuracy:.1f}" in next(line for line in table if line.startswith(run["variant"]))
        assert run["threads"] == 1
    kept = [run["rows"][0]["kept_bytes_convolutions"] for run in result["runs"]]
    assert kept[0] == 4 * kept[1] == 8 * kept[2]


def test_library(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, out = FakeLibrary(), tmp_path / "out.json"
    library.path = tmp_path / "fake.gfb"  # type: ignore[attr-defined]
    monkeypatch.setattr("gf_tvm.bundle.library.load", {library.path: library}.__getitem__)  # type: ignore[attr-defined]
    with loaded(library):
        options = ["--library", str(tmp_path / "fake.gfb"), "--patch", "exact,2", "--json", str(out)]
        assert cli.main([*arguments, *options]) == 0
    assert [run["kernels"] for run in json.loads(out.read_text())["runs"]] == [{"3": "exact"}, {"3": "tvm"}]


def test_every_setting_is_an_option() -> None:
    values: dict[str, Any] = {
        "model": "resnet18", "data": "x.npz", "last": 3, "image_size": 16, "batch": 7, "epochs": 4,
        "pretrain_epochs": 6, "lr": 0.3, "pretrain_lr": 0.4, "momentum": 0.5, "weight_decay": 0.6,
        "schedule": "constant", "clip": 0.7, "flip": True, "shift": 3, "seed": 8, "skew": 0.8, "test_fraction": 0.3,
        "train_bn_affine": True, "warmup_epochs": 0.5, "step_epochs": 9, "step_factor": 0.25, "amp": "bfloat16",
        "patience": 10, "min_delta": 0.01, "cache": "off", "chain": "float16",
    }  # fmt: skip
    values |= {"strict": True, "weights": "imagenet", "augment": False, "validation": 0.3}
    assert set(values) | {"patch"} == {*TrainConfig("resnet18").to_dict(), *JobConfig("resnet18").to_dict()}
    flags = {"chain": "--means", "augment": "--no-augment"}
    options = [
        part
        for key, value in values.items()
        for part in (flags.get(key, f"--{key.replace('_', '-')}"), *([] if isinstance(value, bool) else [str(value)]))
    ]
    args = vars(cli.build_parser().parse_args(["train", *options]))
    assert {key: args[key] for key in values} == values
    # What is not given is left to the protocol's own configuration.
    args = vars(cli.build_parser().parse_args(["train", "--model", "resnet18"]))
    assert set(values) & set(args) == {"model", "chain"}


@pytest.mark.parametrize(
    ("file", "options", "expected"),
    [
        (None, [], True),
        (None, ["--no-chain"], False),
        (None, ["--means", "bfloat16"], "bfloat16"),
        (False, [], False),
        ("float16", [], "float16"),
        (False, ["--means", "float16"], "float16"),
        ("float16", ["--no-chain"], False),
    ],
)
def test_chains_by_file_and_options(tmp_path: Path, file: Any, options: list[str], expected: Any) -> None:
    command = ["train", "--model", "resnet18", *options]
    if file is not None:
        (tmp_path / "c.json").write_text(json.dumps({"chain": file}))
        command += ["--config", str(tmp_path / "c.json")]
    assert cli.build_parser().parse_args(command).chain == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--patch", "0"], "patch must be at least 1, got 0"),
        (["--patch", "2,-1"], "patch must be at least 1, got -1"),
        (["--patch", "two"], "patches are written as exact,2,4 or 2x1 (height x width), got 'two'"),
        (["--patch", "2.5"], "got '2.5'"),
        (["--patch", ""], "got ''"),
        (["--model", "resnet19"], "unknown model 'resnet19'; known: mobilenetv2, resnet18"),
        (["--model", "training_models:no_convolutions"], "has no Conv2d module"),
        (["--model", "training_models:missing"], "training_models has no missing"),
        (["--last", "3"], "last must be between 1 and 2"),
        (["--last", "0"], "last must be an integer of at least 1, got 0"),
        (["--data", "nowhere"], "no data at 'nowhere'; give digits, scenes, a folder of class folders of images"),
        (["--data", "EMPTY"], "has no class folders"),
        (["--batch", "1000"], "fewer than one batch of 1000"),
        (["--epochs", "0"], "epochs must be an integer of at least 1"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--lr", "nan"], "lr must be a finite number"),
        (["--clip", "-1"], "clip must be above 0"),
        (["--schedule", "exponential"], "invalid choice: 'exponential'"),
        (["--warmup-epochs", "1"], "warmup_epochs must be below the epochs of each phase (1), got 1.0"),
        (["--step-epochs", "0"], "step_epochs must be an integer of at least 1, got 0"),
        (["--step-factor", "0"], "step_factor must be above 0"),
        (["--patience", "0"], "patience must be an integer of at least 1, got 0"),
        (["--min-delta", "-1"], "min_delta must be a finite number of at least 0, got -1.0"),
        (["--amp", "float16"], "invalid choice: 'float16'"),
        (["--cache", "gpu"], "invalid choice: 'gpu'"),
        (["--cache", "disk"], "cache 'disk' keeps its files in the checkpoint folder"),
        (["--metrics", "EMPTY/no/folder.jsonl"], "there is no folder"),
        (["--metrics", "EMPTY"], "cannot write"),
        (["--tensorboard", "FILE"], "cannot write for TensorBoard into"),
        (["--skew", "2"], "skew must lie between 0.5 and 1"),
        (["--threads", "0"], "threads must be at least 1"),
        (["--resume"], "resuming needs the checkpoint folder"),
        (["--checkpoint", "FILE"], "cannot write into the checkpoint folder"),
        (["--json", "EMPTY/no/folder.json"], "cannot write"),
        (["--library", "FILE"], "not a gf_tvm bundle"),
        (["--library", "no.gfb"], "cannot read bundle"),
        (["--image-size", "4000000"], "160 images of 4000000x4000000 pixels"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("")
    before = files_in(tmp_path)
    options = [str(tmp_path / option) if option.startswith(("EMPTY", "FILE")) else option for option in options]
    assert cli.main([*arguments, *options]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert message in shown.err
    assert files_in(tmp_path) == before


def test_another_configuration_is_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments += ["--patch", "2", "--checkpoint", str(tmp_path / "c")]
    assert cli.main(arguments) == 0
    before = files_in(tmp_path)
    capsys.readouterr()
    assert cli.main([*arguments, "--resume", "--lr", "0.5"]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert "finetune-training_models-tiny-patterns-R2-chained-last1-seed0.pt" in shown.err
    assert "(this run: 0.5)" in shown.err
    assert files_in(tmp_path) == before
    assert cli.main([*arguments, "--resume"]) == 0


def test_interrupted(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = torch.optim.SGD.step, []

    def stop(self: torch.optim.SGD, *args: Any) -> Any:
        calls.append(self)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return step(self, *args)

    out = tmp_path / "out.json"
    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.SGD, "step", stop)
        assert cli.main([*arguments, "--json", str(out), "--checkpoint", str(tmp_path / "c")]) == 130
    assert not out.exists()
    assert cli.main([*arguments, "--json", str(out), "--checkpoint", str(tmp_path / "c"), "--resume"]) == 0
    assert out.exists()


@pytest.mark.slow
def test_killed_at_any_moment(arguments: list[str], tmp_path: Path) -> None:
    """Kill a run again and again: every checkpoint on disk is whole, and the end is that of an undisturbed run."""
    # Long enough to be killed several times; one thread, so that both runs add up in the same order.
    arguments += ["--patch", "2", "--epochs", "40", "--pretrain-epochs", "20", "--threads", "1", "--shift", "1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cli.main([*arguments, "--checkpoint", str(whole)]) == 0
    command = [sys.executable, "-m", "gf_tvm.runners.cli", *arguments, "--checkpoint", str(killed), "--resume"]
    environment = {**os.environ, "PYTHONPATH": HELPERS}
    rng = random.Random(0)
    kills, progress = 0, set()
    while True:
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        # Start-up takes seconds and varies: wait until this process has written a checkpoint, then a moment more.
        before = {path: path.stat().st_mtime_ns for path in killed.glob("*.pt")}
        while process.poll() is None:
            if {path: path.stat().st_mtime_ns for path in killed.glob("*.pt")} != before:
                break
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        if kills < 4 and process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        code = process.wait()
        for path in killed.glob("*.pt"):
            content = torch.load(path, weights_only=True)  # fails for a torn file
            progress.add((path.name[:8], len(content["rows"])))
        if code != -signal.SIGKILL:
            break
    assert code == 0
    assert kills >= 2
    assert len(progress) > kills // 2  # it moved on between the kills
    (a,), (b,) = whole.glob("finetune-*.pt"), killed.glob("finetune-*.pt")
    expected, got = state_of(a), state_of(b)
    assert all(expected[name].equal(got[name]) for name in expected)
    assert not list(killed.glob(".*.tmp"))

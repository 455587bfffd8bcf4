"""Schedules, early stopping, mixed precision, and metrics of training."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_library import FakeLibrary, loaded
from training_models import patterns, state_of

from gf_tvm.runners import cli
from gf_tvm.training import EpochRow, Event, TrainConfig, TrainingError, train, train_variants
from gf_tvm.training.learning_rate import learning_rate
from gf_tvm.training.metrics import SCHEMA, JsonLines, Metrics, TensorBoard
from gf_tvm.training.stopping import best_epoch, stops

pytestmark = pytest.mark.usefixtures("one_thread")

TIMES = ("seconds", "forward_seconds", "backward_seconds", "update_seconds", "forward_ms", "backward_ms", "update_ms")


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    data = patterns(tmp_path / "patterns.npz")
    return TrainConfig(*("training_models:tiny", data, 2, 1, 8, 8), epochs=3, pretrain_epochs=1, shift=0)


class Stop(Exception):
    """Ends a run as a crash would."""


def stop_at(phase: str, epoch: int, step: int = 2) -> Any:
    def callback(event: Event) -> None:
        if (event.phase, event.epoch, event.step) == (phase, epoch, step) and event.row is None:
            raise Stop

    return callback


def states_equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return list(a) == list(b) and all(a[name].equal(b[name]) for name in a)


def without_times(row: EpochRow) -> dict[str, Any]:
    return {name: value for name, value in asdict(row).items() if name not in TIMES}


# --- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("schedule", ["cosine", "constant", "step", "linear"])
def test_schedules_are_those_of_torch(schedule: str, warmup: int) -> None:
    total, every, factor, lr = 23, 4, 0.3, 0.2
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    rates = torch.optim.lr_scheduler
    left = total - warmup
    main: Any = {
        "cosine": lambda: rates.CosineAnnealingLR(optimizer, left),
        "constant": lambda: rates.ConstantLR(optimizer, 1.0),
        "step": lambda: rates.StepLR(optimizer, every, factor),
        "linear": lambda: rates.LinearLR(optimizer, 1.0, 0.0, left),
    }[schedule]
    if warmup:
        first = rates.LinearLR(optimizer, 1 / (warmup + 1), 1.0, warmup)
        scheduler: Any = rates.SequentialLR(optimizer, [first, main()], [warmup])
    else:
        scheduler = main()
    expected, got = [], []
    for step in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        got.append(learning_rate(schedule, lr, step, total, warmup, every, factor))
        optimizer.step()
        scheduler.step()
    assert got == pytest.approx(expected, rel=1e-6)
    assert max(got) == pytest.approx(lr)


def test_a_run_follows_its_schedule(config: TrainConfig) -> None:
    config = replace(config, pretrain_epochs=0, schedule="step", step_epochs=1, step_factor=0.5, warmup_epochs=0.5)
    rows = train(config).rows
    steps = rows[0].steps
    warmup = round(0.5 * steps)
    expected = [config.lr * 0.5 ** ((epoch * steps - 1 - warmup) // steps) for epoch in (1, 2, 3)]
    assert [row.lr for row in rows] == pytest.approx(expected)
    assert len(set(expected)) == 3


# --- early stopping ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "min_delta", "best", "patience_used"),
    [
        ([], 0.0, 0, 0),
        ([0.5], 0.0, 1, 0),
        ([0.5, 0.5, 0.4], 0.0, 1, 2),
        ([0.5, 0.6, 0.7], 0.0, 3, 0),
        ([0.5, 0.55, 0.6, 0.65], 0.1, 4, 0),  # compared with the best, not with the last
        ([0.5, 0.55, 0.6], 0.1001, 1, 2),
        ([0.0, 0.0], 0.0, 1, 1),
    ],
)
def test_the_best_epoch(scores: list[float], min_delta: float, best: int, patience_used: int) -> None:
    assert best_epoch(scores, min_delta) == best
    assert not stops(scores, None, min_delta)
    assert not stops(scores, patience_used + 1, min_delta)
    assert stops(scores, patience_used, min_delta) == (patience_used > 0 or len(scores) > 0)


@pytest.fixture
def stopping(config: TrainConfig) -> TrainConfig:
    """Stops after the third epoch: no second one can be better by a whole point of 1."""
    return replace(config, epochs=6, patience=2, min_delta=1.0)


def test_training_stops_early_with_the_best_weights(stopping: TrainConfig, tmp_path: Path) -> None:
    result = train(stopping, checkpoint=tmp_path)
    assert (len(result.rows), result.best_epoch) == (3, 1)
    assert result.test_accuracy == result.rows[0].test_accuracy
    assert result.to_dict()["best_epoch"] == 1
    # The schedule reaches over all six epochs, so the first epoch is that of a run that never stops.
    states: dict[int, Any] = {}

    def keep(event: Event) -> None:
        if event.phase == "finetune" and event.row is not None:
            states[event.epoch] = state_of(next((tmp_path / "whole").glob("finetune-*.pt")))

    whole = train(replace(stopping, patience=None), checkpoint=tmp_path / "whole", callback=keep)
    assert len(whole.rows) == 6
    assert whole.best_epoch is None
    assert whole.test_accuracy == whole.rows[-1].test_accuracy
    assert states_equal(result.model.state_dict(), states[1])
    assert not states_equal(states[3], states[1])
    assert states_equal(state_of(next(tmp_path.glob("finetune-*.pt"))), states[1])


def test_patience_without_stopping_keeps_the_best(stopping: TrainConfig) -> None:
    result = train(replace(stopping, epochs=2, patience=5))
    assert (len(result.rows), result.best_epoch) == (2, 1)
    assert result.test_accuracy == result.rows[0].test_accuracy


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_early_stopping_resumes(stopping: TrainConfig, tmp_path: Path, epoch: int) -> None:
    whole = train(stopping)
    with pytest.raises(Stop):
        train(stopping, checkpoint=tmp_path, callback=stop_at("finetune", epoch))
    resumed = train(stopping, checkpoint=tmp_path, resume=True)
    assert resumed.resumed == epoch - 1
    assert (len(resumed.rows), resumed.best_epoch) == (3, 1)
    assert states_equal(resumed.model.state_dict(), whole.model.state_dict())
    assert list(map(without_times, resumed.rows)) == list(map(without_times, whole.rows))
    done = train(stopping, checkpoint=tmp_path, resume=True)
    assert done.resumed == 3
    assert states_equal(done.model.state_dict(), whole.model.state_dict())


def test_a_checkpoint_without_the_best_weights(stopping: TrainConfig, tmp_path: Path) -> None:
    train(stopping, checkpoint=tmp_path)
    file = next(tmp_path.glob("finetune-*.pt"))
    content = torch.load(file, weights_only=True)
    torch.save({**content, "best": None}, file)
    with pytest.raises(TrainingError, match="lacks the best epoch's weights"):
        train(stopping, checkpoint=tmp_path, resume=True)


# --- everything together ----------------------------------------------------------------------------------------------


def test_all_features_resume_bit_for_bit(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(
        config, schedule="linear", warmup_epochs=0.5, amp="bfloat16", patience=3, cache="disk", epochs=3, clip=1.0
    )
    whole = train(config, checkpoint=tmp_path / "whole")
    for epoch in (2, 3):
        with pytest.raises(Stop):
            train(config, checkpoint=tmp_path / "c", resume=True, callback=stop_at("finetune", epoch))
    resumed = train(config, checkpoint=tmp_path / "c", resume=True)
    assert resumed.resumed == 2
    assert states_equal(resumed.model.state_dict(), whole.model.state_dict())
    assert list(map(without_times, resumed.rows)) == list(map(without_times, whole.rows))


# --- mixed precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["off", "memory"])
def test_mixed_precision(config: TrainConfig, cache: str) -> None:
    config = replace(config, epochs=5, pretrain_epochs=5, cache=cache)
    single, (exact, two) = train(config), train_variants(replace(config, amp="bfloat16"), ["exact", 2])
    assert all(p.dtype == torch.float32 for p in two.model.parameters())
    assert not states_equal(single.model.state_dict(), two.model.state_dict())
    assert two.rows[-1].train_loss == pytest.approx(single.rows[-1].train_loss, abs=0.1)
    assert two.test_accuracy > 0.9
    assert exact.test_accuracy > 0.9


def test_mixed_precision_runs_the_kernels_of_its_dtype(config: TrainConfig) -> None:
    config = replace(config, epochs=1, amp="bfloat16", pretrain_epochs=0)
    both, single = FakeLibrary(dtypes=("bfloat16",)), FakeLibrary(dtypes=("float32",), digest="single")
    for library in (both, single):
        library.path = Path("fake.gfb")  # type: ignore[attr-defined]
    with loaded(both, single):
        fast, slow = train(config, library=both), train(config, library=single)  # type: ignore[arg-type]
    assert fast.kernels == {"3": "tvm"}
    assert both.called.count("backward_weight") == fast.rows[0].steps + 1  # once when the network compiles itself
    assert slow.kernels == {"3": "torch"}
    assert "bfloat16" in slow.missing_workloads[0]
    assert single.called == ["filter_input"]  # when the layers' shapes are found, in float32


# --- metrics ----------------------------------------------------------------------------------------------------------


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines(config: TrainConfig, tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    seen: list[int] = []

    def count(event: Event) -> None:
        if event.row is not None:
            seen.append(len(lines_of(file)))  # flushed by now

    file.write_text("of an earlier run\n")
    with Metrics([JsonLines(file)]) as metrics:
        results = train_variants(config, ["exact", 2], metrics=metrics, callback=count)
    lines = lines_of(file)
    assert seen == list(range(1, 8))
    assert [(line["run"], line["phase"], line["epoch"]) for line in lines] == [
        (None, "pretrain", 1),
        *((run, "finetune", epoch) for run in ("exact", "R2 chained") for epoch in (1, 2, 3)),
    ]
    rows = [*results[0].pretrain_rows, *results[0].rows, *results[1].rows]
    for line, row in zip(lines, rows, strict=True):
        assert {key: line[key] for key in asdict(row)} == asdict(row)
        assert line["schema"] == SCHEMA
        assert (line["model"], line["data"], line["seed"]) == (config.model, config.data, 0)


@pytest.mark.parametrize("damage", ["", "lost line", "torn line", "lost file"])
def test_json_lines_of_a_resumed_run(config: TrainConfig, tmp_path: Path, damage: str) -> None:
    file, folder = tmp_path / "m.jsonl", tmp_path / "c"
    with pytest.raises(Stop), Metrics([JsonLines(file)]) as metrics:
        train(config, checkpoint=folder, metrics=metrics, callback=stop_at("finetune", 3))
    text = file.read_text()
    if damage == "lost file":
        file.unlink()
    elif damage:
        cut = text[: text.rstrip().rfind("\n") + 1] if damage == "lost line" else text[:-20]
        file.write_text(cut)
    for _ in range(2):  # the second time nothing is left to do, and nothing is added
        with Metrics([JsonLines(file, resume=True)]) as metrics:
            result = train(config, checkpoint=folder, metrics=metrics, resume=True)
        lines = lines_of(file)
        assert [(line["phase"], line["epoch"]) for line in lines] == [
            *(("pretrain", 1), ("finetune", 1), ("finetune", 2), ("finetune", 3))
        ]
        fields = asdict(result.rows[0])
        assert [{key: line[key] for key in fields} for line in lines[1:]] == [asdict(row) for row in result.rows]


@pytest.mark.parametrize("content", ["hello\n", "{}\n", '{"schema": "other"}\n', "[1]\n"])
def test_a_file_that_has_no_metrics(tmp_path: Path, content: str) -> None:
    file = tmp_path / "m.jsonl"
    file.write_text(content)
    with pytest.raises(TrainingError, match=r"line 1 of '.*' is no line of metrics"):
        JsonLines(file, resume=True)
    assert file.read_text() == content


def test_metrics_that_cannot_be_written(config: TrainConfig, tmp_path: Path) -> None:
    rows = train(replace(config, epochs=1, pretrain_epochs=0)).rows
    for file, reason in ((tmp_path / "no" / "folder.jsonl", "No such file"), (Path("/dev/full"), "No space left")):
        with (
            pytest.raises(TrainingError, match=f"cannot write the metrics to '{file}': {reason}"),
            Metrics([JsonLines(file)]) as metrics,
        ):
            metrics.rows(config, "finetune", rows)


def test_tensorboard(config: TrainConfig, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, tb = tmp_path / "c", tmp_path / "tb"
    with pytest.raises(Stop), Metrics([TensorBoard(tb)]) as metrics:
        train(config, checkpoint=folder, metrics=metrics, callback=stop_at("finetune", 3))
    with Metrics([TensorBoard(tb)]) as metrics:
        result = train(config, checkpoint=folder, metrics=metrics, resume=True)
    assert sorted(path.name for path in tb.iterdir()) == ["R2 chained", "pretrain"]
    for run, rows in (("R2 chained", result.rows), ("pretrain", result.pretrain_rows)):
        events = EventAccumulator(str(tb / run)).Reload()
        assert set(events.Tags()["scalars"]) == set(asdict(rows[0])) - {"epoch"}
        for name in ("train_loss", "test_accuracy", "lr"):
            scalars = events.Scalars(name)
            assert [scalar.step for scalar in scalars] == [row.epoch for row in rows]  # each once
            assert [s.value for s in scalars] == pytest.approx([getattr(row, name) for row in rows], rel=1e-6)


def test_without_the_package_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TrainingError, match="pip install tensorboard"):
        TensorBoard(tmp_path / "tb")
    assert not (tmp_path / "tb").exists()


def test_command_line(config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, metrics = tmp_path / "out.json", tmp_path / "m.jsonl"
    options = ["--model", config.model, "--data", config.data, "--last", "1", "--image-size", "8", "--batch", "8"]
    options += ["--epochs", "4", "--pretrain-epochs", "1", "--shift", "0", "--patch", "2", "--patience", "1"]
    options += ["--min-delta", "1", "--json", str(out), "--metrics", str(metrics), "--checkpoint", str(tmp_path / "c")]
    assert cli.main(["train", "--protocol", "paper", *options]) == 0
    shown = capsys.readouterr().out
    assert "frozen layers' results (R2 chained): kept in memory (0.16 MB)" in shown
    assert "R2 chained: weights of epoch 1, trained 2" in shown
    (run,) = json.loads(out.read_text())["runs"]
    assert (run["cache"]["kind"], run["best_epoch"], len(run["rows"])) == ("memory", 1, 2)
    assert len(lines_of(metrics)) == 3
    assert cli.main(["train", "--protocol", "paper", *options, "--resume"]) == 0
    assert len(lines_of(metrics)) == 3

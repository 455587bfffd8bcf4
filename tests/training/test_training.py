"""The training protocol: what is trained, with which gradients, what is measured, and checkpoints."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake_library import FakeLibrary, loaded
from torch import Tensor, nn
from training_models import patterns, state_of, tiny

import gf_tvm
from gf_tvm.chains.capture.backend import Backend
from gf_tvm.core.geometry import Geometry
from gf_tvm.errors import GeometryError, ModelError
from gf_tvm.models import build_model
from gf_tvm.training import (
    EpochRow,
    Event,
    Pretrained,
    TrainConfig,
    TrainingError,
    finetune,
    load_data,
    pretrain,
    train,
    train_variants,
    trainer,
)
from gf_tvm.training import checkpoint as files
from gf_tvm.training.data import batches
from gf_tvm.training.loop import derived
from gf_tvm.training.step_costs import count_kept_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

TIMES = ("seconds", "forward_seconds", "backward_seconds", "update_seconds", "forward_ms", "backward_ms", "update_ms")


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Seconds of work: 4 classes of 40 images of 8x8 pixels, a tiny network."""
    return TrainConfig(
        "training_models:tiny",
        patterns(tmp_path / "patterns.npz"),
        patch=2,
        last=1,
        image_size=8,
        batch=8,
        epochs=3,
        pretrain_epochs=2,
        shift=0,
    )


def states_equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return list(a) == list(b) and all(a[name].equal(b[name]) for name in a)


def without_times(row: EpochRow) -> dict[str, Any]:
    return {name: value for name, value in asdict(row).items() if name not in TIMES}


class Stop(Exception):
    """Ends a run as a crash would, at a chosen moment."""


def stop_at(phase: str, epoch: int, step: int) -> Callable[[Event], None]:
    def callback(event: Event) -> None:
        if (event.phase, event.epoch, event.step) == (phase, epoch, step) and event.row is None:
            raise Stop

    return callback


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("last", 0), ("last", 1.5), ("batch", 0), ("batch", True), ("epochs", 0), ("pretrain_epochs", -1),
        ("seed", -1), ("seed", 2**63), ("image_size", "32"), ("shift", -1), ("lr", 0), ("lr", -0.1),
        ("lr", float("nan")), ("lr", float("inf")), ("lr", "0.1"), ("pretrain_lr", 0.0), ("momentum", 1.0),
        ("momentum", -0.1), ("weight_decay", -1e-4), ("clip", 0), ("clip", -1.0), ("clip", float("nan")),
        ("schedule", "exponential"), ("patch", "R2"), ("warmup_epochs", -1), ("warmup_epochs", 10), ("step_epochs", 0),
        ("step_factor", 0), ("amp", "float16"), ("chain", "int8"), ("patience", 0), ("patience", 1.5),
        ("min_delta", -0.1), ("min_delta", float("nan")), ("cache", "gpu"),
    ],
)  # fmt: skip
def test_config_names_what_is_wrong(field: str, value: Any) -> None:
    with pytest.raises(TrainingError) as error:
        TrainConfig("resnet18", **{field: value})
    assert field in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("patch", [0, -1, (2, 0), (1, 2, 3), 2.5, True])
def test_config_refuses_patches(patch: Any) -> None:
    with pytest.raises(GeometryError, match="patch"):
        TrainConfig("resnet18", patch=patch)


def test_config_round_trip() -> None:
    for patch, variant in ((None, "exact"), ("exact", "exact"), (2, "R2"), ([2, 1], "R2x1")):
        config = TrainConfig("resnet18", patch=patch, clip=None)  # type: ignore[arg-type]
        assert config.variant == (variant if variant == "exact" else f"{variant} chained")
        assert replace(config, chain=False).variant == variant
        assert TrainConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_exactly_what_decides_pretraining_decides_its_checkpoint(config: TrainConfig, tmp_path: Path) -> None:
    # Every field is changed once: two runs share pretrained weights exactly if none of these fields differs.
    fine_tuning_only = {"patch", "last", "epochs", "lr", "train_bn_affine", "patience", "min_delta", "cache", "chain"}
    fine_tuning_only |= {"strict"}
    changes: dict[str, Any] = {
        "model": "training_models:pointwise", "data": patterns(tmp_path / "other.npz"), "patch": 4, "last": 2,
        "image_size": 10, "batch": 4, "epochs": 1, "pretrain_epochs": 1, "lr": 0.01, "pretrain_lr": 0.01,
        "momentum": 0.5, "weight_decay": 0.0, "schedule": "constant", "clip": None, "flip": True, "shift": 1,
        "seed": 1, "skew": 0.6, "test_fraction": 0.5, "train_bn_affine": True, "warmup_epochs": 0.5, "step_epochs": 2,
        "step_factor": 0.5, "amp": "bfloat16", "patience": 2, "min_delta": 0.1, "cache": "off", "chain": False,
        "strict": True,
    }  # fmt: skip
    assert set(changes) == set(config.to_dict())
    changed = {
        key for key, value in changes.items() if replace(config, **{key: value}).pretraining() != config.pretraining()
    }
    assert changed == set(changes) - fine_tuning_only


# --- what is trained, and how -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_bn_affine", [False, True])
@pytest.mark.parametrize("patch", [None, 2])
def test_only_the_last_convolutions_and_the_head_are_trained(
    config: TrainConfig, patch: int | None, train_bn_affine: bool
) -> None:
    config = replace(config, patch=patch, train_bn_affine=train_bn_affine)
    dataset = load_data(config)
    pretrained = pretrain(config, dataset)
    result = finetune(config, dataset, pretrained)
    after = result.model.state_dict()
    assert list(after) == list(pretrained.state)
    changed = {name for name, value in pretrained.state.items() if not value.equal(after[name])}
    trained = {"3.weight", "3.bias", "9.weight", "9.bias"}
    assert changed == trained | ({"4.weight", "4.bias"} if train_bn_affine else set())
    assert result.trained_layers == ("3",)
    assert result.head == "9"
    assert result.trained_parameters == sum(after[name].numel() for name in changed)
    assert result.parameters == sum(p.numel() for p in result.model.parameters())
    assert isinstance(result.model[3], gf_tvm.FilteredConv2d) == (patch is not None)
    assert not any(isinstance(result.model[i], gf_tvm.FilteredConv2d) for i in (0, 9))
    assert result.kernels == {"3": "exact" if patch is None else "torch"}


@pytest.mark.parametrize("cache", ["off", "memory"])
def test_chained_runs_train_alike_and_keep_less(config: TrainConfig, cache: str) -> None:
    config = replace(config, model="training_models:pointwise", patch=2, last=2, shift=0, flip=False, cache=cache)
    dataset = load_data(config)
    pretrained = pretrain(config, dataset)
    plain, chained, half = (
        finetune(replace(config, chain=chain), dataset, pretrained) for chain in (False, True, "float16")
    )
    assert (plain.chains, chained.chains) == ((), (("3", "5"),))
    assert [r.config.variant for r in (plain, chained, half)] == ["R2", "R2 chained", "R2 chained float16"]
    for a, b in zip(chained.rows, half.rows, strict=True):
        assert b.train_loss == pytest.approx(a.train_loss, rel=1e-3)
        assert b.kept_bytes_convolutions < a.kept_bytes_convolutions
    for a, b in zip(plain.rows, chained.rows, strict=True):
        assert b.train_loss == pytest.approx(a.train_loss, rel=1e-4)
        assert 0 < b.kept_bytes_convolutions <= b.kept_bytes < a.kept_bytes
    assert chained.cache["kind"] == cache


def by_hand(config: TrainConfig, dataset: Any, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[float]]:
    """Fine-tuning of ``tiny`` written out plainly: momentum, decay, cosine and clipping from their definitions."""
    model = tiny(4)
    model.load_state_dict(state)
    if config.patch is not None:
        gf_tvm.filter_model(model, patch=config.patch, layers=["3"])  # type: ignore[arg-type]
    trained = [*model[3].parameters(), *model[9].parameters()]  # type: ignore[index]
    velocity = [torch.zeros_like(p) for p in trained]
    steps = len(dataset.finetune_train) // config.batch
    losses = []
    for epoch in range(1, config.epochs + 1):
        model.train()
        for i in (1, 4):
            model[i].eval()  # type: ignore[index]
        torch.manual_seed(derived(config.seed, f"finetune {epoch}"))
        generator = torch.Generator().manual_seed(derived(config.seed, f"finetune {epoch} images"))
        total = 0.0
        drawn = batches(dataset.finetune_train, config.batch, generator, config.flip, config.shift, drop_last=True)
        for step, (x, y) in enumerate(drawn):
            progress = ((epoch - 1) * steps + step) / (config.epochs * steps)
            lr = config.lr * (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else config.lr
            loss = F.cross_entropy(model(x), y)
            grads = torch.autograd.grad(loss, trained)
            norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
            scale = 1.0 if config.clip is None else min(1.0, config.clip / (norm + 1e-6))
            with torch.no_grad():
                for p, v, g in zip(trained, velocity, grads, strict=True):
                    v.mul_(config.momentum).add_(g * scale + config.weight_decay * p)
                    p.sub_(lr * v)
            total += loss.item()
        losses.append(total / steps)
    return model.state_dict(), losses


@pytest.mark.parametrize(
    "changes",
    [
        {"patch": None},
        {"patch": 2, "schedule": "constant", "clip": None},
        {"patch": (4, 2), "clip": 0.1, "weight_decay": 0.1, "shift": 1, "flip": True, "lr": 0.1},
    ],
)
def test_fine_tuning_is_what_it_says(config: TrainConfig, changes: dict[str, Any]) -> None:
    config = replace(config, **changes)
    dataset = load_data(config)
    pretrained = pretrain(config, dataset)
    with torch.random.fork_rng():
        expected, losses = by_hand(config, dataset, pretrained.state)
    result = finetune(config, dataset, pretrained)
    assert [row.train_loss for row in result.rows] == pytest.approx(losses, rel=1e-4)
    for name, value in result.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_patch_1_on_pointwise_convolutions_is_exact(config: TrainConfig) -> None:
    config = replace(config, model="training_models:pointwise", last=3)
    exact, one, two = train_variants(config, ["exact", 1, 2])
    assert [row.train_loss for row in one.rows] == pytest.approx([row.train_loss for row in exact.rows], rel=1e-4)
    assert [row.train_loss for row in two.rows] != pytest.approx([row.train_loss for row in exact.rows], rel=1e-4)
    assert exact.initial_test_accuracy == one.initial_test_accuracy == two.initial_test_accuracy


def test_it_learns(config: TrainConfig) -> None:
    config = replace(config, epochs=8, pretrain_epochs=8, skew=1.0)  # no class of part B was seen while pretraining
    for result in train_variants(config, ["exact", 2]):
        assert result.initial_test_accuracy < 0.6
        assert result.test_accuracy > 0.9
        assert result.rows[-1].train_loss < 0.5 * result.rows[0].train_loss
        assert result.pretrain_rows[-1].test_accuracy > 0.9


def test_rows_and_events(config: TrainConfig) -> None:
    events: list[Event] = []
    result = train(config, callback=events.append)
    dataset = load_data(config)
    for phase, rows, part in (
        ("pretrain", result.pretrain_rows, dataset.pretrain_train),
        ("finetune", result.rows, dataset.finetune_train),
    ):
        steps = len(part) // 8
        mine = [event for event in events if event.phase == phase]
        expected = [
            (epoch, step) for epoch in range(1, len(rows) + 1) for step in (*range(steps + 1), steps)
        ]  # before the first step, after each, and with the row
        assert [(event.epoch, event.step) for event in mine] == expected
        assert [event.row for event in mine if event.row] == list(rows)
        assert {event.steps for event in mine} == {steps}
        assert mine[0].seconds_left is None
        assert all(event.seconds_left is not None and event.seconds_left >= 0 for event in mine[1:])
        assert mine[-1].seconds_left == 0
        assert [row.epoch for row in rows] == list(range(1, len(rows) + 1))
        for row in rows:
            assert row.steps == steps
            for name in ("forward", "backward", "update"):
                median, total = getattr(row, f"{name}_ms") / 1e3, getattr(row, f"{name}_seconds")
                assert 0 < median <= total
                assert total >= median * steps / 2  # at least half of the steps take the median or longer
            assert row.seconds >= row.forward_seconds + row.backward_seconds + row.update_seconds
            assert 0 <= row.train_accuracy <= 1
            assert (row.train_accuracy * steps * 8) % 1 == pytest.approx(0, abs=1e-6)
    total = config.epochs * (len(dataset.finetune_train) // 8)
    assert result.rows[-1].lr == pytest.approx(0.5 * config.lr * (1 + math.cos(math.pi * (total - 1) / total)))


def test_test_accuracy_is_that_of_the_returned_model(config: TrainConfig) -> None:
    result = train(config)
    images = load_data(config).finetune_test
    with torch.no_grad():
        right = result.model.eval()(images.x).argmax(1) == images.y
    assert result.test_accuracy == pytest.approx(float(right.float().mean()))


def test_result_is_json(config: TrainConfig) -> None:
    result = train(replace(config, epochs=1, pretrain_epochs=0))
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain["schema"] == "gf_tvm.train/1"
    assert plain["variant"] == "R2 chained"
    assert TrainConfig(**plain["config"]) == result.config
    assert EpochRow(**plain["rows"][0]) == result.rows[0]
    assert plain["pretrain_rows"] == []
    assert plain["threads"] == 1
    assert plain["versions"]["torch"] == torch.__version__
    assert plain["dataset"]["images"] == load_data(config).sizes
    assert plain["test_accuracy"] == result.rows[0].test_accuracy
    assert set(plain["step_ms"]) == {"forward", "backward", "update"}


def test_global_generators_are_left_alone_and_not_used(config: TrainConfig) -> None:
    def states() -> tuple[bytes, Any, bytes]:
        return torch.get_rng_state().numpy().tobytes(), random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[union-attr, index]

    config = replace(config, epochs=1, pretrain_epochs=1, flip=True, shift=1)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    before = states()
    first = train(config)
    assert states() == before
    torch.manual_seed(2)
    random.seed(2)
    np.random.seed(2)
    assert states_equal(train(config).model.state_dict(), first.model.state_dict())
    assert not states_equal(train(replace(config, seed=1)).model.state_dict(), first.model.state_dict())


def test_a_loss_that_is_not_finite(config: TrainConfig) -> None:
    with pytest.raises(TrainingError, match=r"the loss became nan in step 1 of pretrain epoch 1; a lower learning"):
        train(replace(config, model="training_models:explodes"))
    with pytest.raises(TrainingError, match="of finetune epoch 1"):
        train(replace(config, model="training_models:explodes", pretrain_epochs=0))


# --- bytes kept for the backward pass ---------------------------------------------------------------------------------


def test_kept_bytes_of_known_networks() -> None:
    n, c, h = 4, 8, 10
    x = torch.randn(n, 3, h, h)
    map_bytes = n * c * h * h * 4
    first, second = nn.Conv2d(3, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)
    model = nn.Sequential(first, nn.ReLU(), second)
    with count_kept_bytes(model, {"first": first, "second": second}) as kept:
        model(x)
    # Each convolution keeps its input; ReLU keeps its result, which is the second one's input. No weights.
    assert kept.layers == {"first": x.numel() * 4, "second": map_bytes}
    assert kept.total == x.numel() * 4 + map_bytes
    gf_tvm.filter_model(model, patch=(2, 4), layers=["2"])
    grid = Geometry(n, c, c, h, h, (3, 3), (2, 4), padding=(1, 1)).saved_shape
    with count_kept_bytes(model, {"first": first, "second": second}) as kept:
        model(x)
    assert kept.layers == {"first": x.numel() * 4, "second": math.prod(grid) * 4}
    assert kept.total == x.numel() * 4 + map_bytes + math.prod(grid) * 4
    model.requires_grad_(False)
    with count_kept_bytes(model, {"first": first}) as kept:
        model(x)
    assert (kept.total, kept.in_layers) == (0, 0)


def test_counting_changes_nothing() -> None:
    model, x = tiny(4).eval(), torch.randn(2, 3, 8, 8)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with count_kept_bytes(model, {"0": model[0]}):  # type: ignore[index]
        loss = model(x).square().sum()
    got = torch.autograd.grad(loss, list(model.parameters()))
    assert all(a.equal(b) for a, b in zip(got, expected, strict=True))
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_rows_count_exact_and_filtered_convolutions(config: TrainConfig) -> None:
    exact, two, four = train_variants(replace(config, epochs=1), ["exact", 2, 4])
    map_bytes = 8 * 8 * 8 * 8 * 4  # batch x channels x height x width x float32
    kept = [result.rows[0].kept_bytes_convolutions for result in (exact, two, four)]
    assert kept == [map_bytes, map_bytes // 4, map_bytes // 16]
    assert exact.pretrain_rows[0].kept_bytes_convolutions == 0
    # A frozen network up to the fine-tuned convolution keeps nothing.
    assert exact.rows[0].kept_bytes < exact.pretrain_rows[0].kept_bytes


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("training_models:two_classes", r"gives logits of shape \(2, 2\) for 2 images of 4 classes"),
        ("training_models:wants_wide_images", r"does not run on images of shape \(2, 3, 8, 8\)"),
        ("training_models:segmentation", r"logits must have shape \(images, classes\)"),
        ("training_models:no_convolutions", "has no Conv2d module"),
        ("training_models:not_filterable", "cannot be filtered"),
        ("training_models:missing", "training_models has no missing"),
        ("resnet19", "known: mobilenetv2, resnet18"),
    ],
)
def test_unfit_models_are_found_before_training(config: TrainConfig, model: str, message: str) -> None:
    def never(event: Event) -> None:
        raise AssertionError(event)

    with pytest.raises(ModelError, match=message) as error:
        train(replace(config, model=model), callback=never)
    assert "\n" not in str(error.value)


def test_too_many_layers_are_found_before_training(config: TrainConfig) -> None:
    def never(event: Event) -> None:
        raise AssertionError(event)

    for patch in (None, 2):
        with pytest.raises(ModelError, match="last must be between 1 and 2"):
            train(replace(config, last=3, patch=patch), callback=never)
    with pytest.raises(ModelError, match="fewer than one batch of 100"):
        train(replace(config, batch=100), callback=never)
    with pytest.raises(TrainingError, match="give at least one patch"):
        train_variants(config, [], callback=never)


def test_a_convolution_that_cannot_be_filtered_stays_exact(config: TrainConfig) -> None:
    result = train(replace(config, model="training_models:half_filterable", last=2, epochs=1))
    assert result.kernels == {"0": "torch", "2.conv": "exact"}
    assert result.trained_layers == ("0", "2.conv")


@pytest.mark.parametrize("cache", ["memory", "off"])
@pytest.mark.parametrize("chain", [True, False])
def test_convolutions_with_a_forward_pass_of_their_own(config: TrainConfig, chain: bool, cache: str) -> None:
    changes = {"model": "training_models:subclassed", "epochs": 1, "chain": chain, "cache": cache}
    both = train(replace(config, **changes, last=2))  # type: ignore[arg-type]
    assert both.kernels == {"0": "torch", "2": "torch"}
    assert both.trained_layers == ("0", "2")
    assert both.chains == ((("0", "2"),) if chain else ())
    last = train(replace(config, **changes, last=1))  # type: ignore[arg-type]
    assert (last.kernels, last.cache["kind"]) == ({"2": "torch"}, cache)
    kept = config.batch * 8 * 4 * 4 * 4  # x~ of 4 x 4 patches; in a chain also the means of the ReLU behind it
    assert last.rows[0].kept_bytes_convolutions == (2 * kept if chain else kept)


def test_a_model_without_a_linear_layer(config: TrainConfig) -> None:
    result = train(replace(config, model="training_models:no_head", epochs=1))
    assert result.head is None
    assert result.trained_layers == ("2",)


@pytest.mark.parametrize("factory", ["transformers_mobilenetv2", "transformers_resnet"])
def test_transformers_models(config: TrainConfig, factory: str) -> None:
    pytest.importorskip("transformers")
    config = replace(config, model=f"training_models:{factory}", last=3, image_size=32, epochs=1, pretrain_epochs=1)
    exact, filtered = train_variants(config, ["exact", 2])
    assert set(filtered.kernels.values()) == {"torch"}
    assert len(filtered.kernels) == 3
    assert filtered.head is not None
    assert "classifier" in filtered.head
    assert 0 < filtered.rows[0].kept_bytes_convolutions < exact.rows[0].kept_bytes_convolutions
    assert not states_equal(exact.model.state_dict(), filtered.model.state_dict())


# --- libraries --------------------------------------------------------------------------------------------------------


def test_a_library_is_used(config: TrainConfig) -> None:
    library = FakeLibrary()
    library.path = Path("fake.gfb")  # type: ignore[attr-defined]
    with loaded(library):
        plain, fast = train(config), train(config, library=library)  # type: ignore[arg-type]
    assert fast.kernels == {"3": "tvm"}
    assert fast.missing_workloads == ()
    assert fast.library == {"path": "fake.gfb", "digest": "fake"}
    assert plain.library is None
    steps = 3 * fast.rows[0].steps
    # Once more when the network compiles itself. Nothing before the convolution needs a gradient.
    assert library.called.count("backward_weight") == steps + 1
    assert library.called.count("filter_input") == steps + 2  # and once to find the shapes that the layers see
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(value, fast.model.state_dict()[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("cache", ["memory", "off"])
@pytest.mark.parametrize(("has", "by"), [((), "torch"), (("input_grad", "weight_grad"), "tvm")])
def test_chains_of_a_run_with_a_library(config: TrainConfig, has: tuple[str, ...], by: str, cache: str) -> None:
    library = FakeLibrary(has=("filter_input", *has))
    library.path = Path("fake.gfb")  # type: ignore[attr-defined]
    config = replace(config, model="training_models:pointwise", last=2, epochs=1, cache=cache)
    with loaded(library):
        result = train(config, library=library)  # type: ignore[arg-type]
    assert result.chains == (("3", "5"),)
    assert result.kernels == {"3": by, "5": by}
    assert {key.partition("_n8")[0] for key in result.missing_workloads} == {"input_grad", "weight_grad"} - set(has)
    if has:
        assert library.called.count("weight_grad") == 2 * (result.rows[0].steps + 1)  # and when it compiles itself


def test_what_a_library_lacks_is_reported(config: TrainConfig) -> None:
    library = FakeLibrary(has=("filter_input",))
    library.path = Path("fake.gfb")  # type: ignore[attr-defined]
    with loaded(library):
        result = train(replace(config, epochs=1), library=library)  # type: ignore[arg-type]
    assert result.kernels == {"3": "torch"}
    assert result.missing_workloads == ("backward_n8_ci8_co8_8x8_k3x3_s1x1_p1x1_d1x1_g1_r2x2_float32_nchw",)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epoch", "step"), [(1, 0), (1, 3), (2, 0), (2, 5), (3, 7)])
def test_a_resumed_run_is_the_same_run(config: TrainConfig, tmp_path: Path, epoch: int, step: int) -> None:
    config = replace(config, shift=1)
    whole = train(config)
    with pytest.raises(Stop):
        train(config, checkpoint=tmp_path / "c", callback=stop_at("finetune", epoch, step))
    events: list[Event] = []
    resumed = train(config, checkpoint=tmp_path / "c", resume=True, callback=events.append)
    assert resumed.resumed == epoch - 1
    assert resumed.pretrain_cached
    assert {event.phase for event in events} == {"finetune"}
    assert (events[0].epoch, events[0].step) == (epoch, 0)
    assert states_equal(resumed.model.state_dict(), whole.model.state_dict())
    assert list(map(without_times, resumed.rows)) == list(map(without_times, whole.rows))
    assert states_equal(state_of(next((tmp_path / "c").glob("finetune-*.pt"))), whole.model.state_dict())


def test_runs_of_when_chains_were_no_default(config: TrainConfig, tmp_path: Path) -> None:
    unchained = replace(config, chain=False)
    whole = train(unchained)
    for run in (replace(unchained, patch="exact"), unchained):
        with pytest.raises(Stop):
            train(run, checkpoint=tmp_path, callback=stop_at("finetune", 2, 1))
    # An exact run is the same run, with chains or without.
    assert train(replace(config, patch="exact"), checkpoint=tmp_path, resume=True).resumed == 1
    with pytest.raises(TrainingError, match=r"no checkpoint of 'R2 chained' .* without chains .*-R2-.*--no-chain"):
        train(config, checkpoint=tmp_path, resume=True)
    resumed = train(unchained, checkpoint=tmp_path, resume=True)
    assert resumed.resumed == 1
    assert states_equal(resumed.model.state_dict(), whole.model.state_dict())
    assert train(config, checkpoint=tmp_path).resumed == 0  # both are there from now on
    assert train(config, checkpoint=tmp_path, resume=True).resumed == config.epochs


class Stateful(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return x


@pytest.mark.parametrize("cache", ["memory", "off"])
def test_compiling_is_no_part_of_a_step(config: TrainConfig, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is compiled, once, before the first step; and compiling leaves no trace in the model."""
    waited = 0.3
    captures: list[float] = []
    capture = Backend.__call__

    def slow(self: Backend, *args: Any, **kwargs: Any) -> Any:
        captures.append(time.perf_counter())
        time.sleep(waited)
        return capture(self, *args, **kwargs)

    monkeypatch.setattr(Backend, "__call__", slow)
    built = build_model

    def stateful(*args: Any) -> nn.Module:
        return nn.Sequential(*built(*args), Stateful())  # type: ignore[misc]

    monkeypatch.setattr(trainer, "build_model", stateful)
    dataset = load_data(config)
    run = replace(config, cache=cache)
    result = finetune(run, dataset, pretrain(replace(run, pretrain_epochs=0), dataset))
    assert len(captures) == 1
    assert result.cache["kind"] == cache
    for row in result.rows:
        assert row.forward_seconds + row.backward_seconds < waited
        assert row.seconds < waited * 2
    assert result.model[-1].calls == config.epochs * result.rows[0].steps  # type: ignore[index]


def test_pretraining_goes_on_where_it_stopped(config: TrainConfig, tmp_path: Path) -> None:
    whole = train(config)
    with pytest.raises(Stop):
        train(config, checkpoint=tmp_path, callback=stop_at("pretrain", 2, 4))
    events: list[Event] = []
    again = train(config, checkpoint=tmp_path, callback=events.append)
    assert (events[0].phase, events[0].epoch) == ("pretrain", 2)
    assert not again.pretrain_cached
    assert again.pretrained_digest == whole.pretrained_digest
    assert list(map(without_times, again.pretrain_rows)) == list(map(without_times, whole.pretrain_rows))
    assert states_equal(again.model.state_dict(), whole.model.state_dict())


def test_variants_share_the_pretrained_weights(config: TrainConfig, tmp_path: Path) -> None:
    events: list[Event] = []
    results = train_variants(config, ["exact", 2, (2, 1)], checkpoint=tmp_path, callback=events.append)
    assert [event.epoch for event in events if event.phase == "pretrain" and event.row] == [1, 2]
    assert len({result.pretrained_digest for result in results}) == 1
    assert [result.config.variant for result in results] == ["exact", "R2 chained", "R2x1 chained"]
    assert len(list(tmp_path.glob("pretrain-*.pt"))) == 1
    names = {file.name for file in tmp_path.glob("finetune-*.pt")}
    assert names == {
        f"finetune-training_models-tiny-patterns-{v}-last1-seed0.pt" for v in ("exact", "R2-chained", "R2x1-chained")
    }
    other = train(replace(config, pretrain_lr=0.01), checkpoint=tmp_path)
    assert not other.pretrain_cached
    assert other.pretrained_digest != results[0].pretrained_digest
    assert len(list(tmp_path.glob("pretrain-*.pt"))) == 2
    third = train(replace(config, lr=0.01, patch=4), checkpoint=tmp_path)
    assert third.pretrain_cached
    assert third.pretrained_digest == results[0].pretrained_digest
    assert third.pretrain_rows == results[0].pretrain_rows


def test_pretrained_weights_are_not_touched(config: TrainConfig) -> None:
    dataset = load_data(config)
    pretrained = pretrain(config, dataset)
    before = copy.deepcopy(pretrained.state)
    finetune(config, dataset, pretrained)
    assert states_equal(before, pretrained.state)


def test_weights_that_do_not_fit(config: TrainConfig) -> None:
    dataset = load_data(config)
    pretrained = pretrain(config, dataset)
    state = {name: value for name, value in pretrained.state.items() if name != "3.weight"}
    with pytest.raises(ModelError, match="pretrained weights do not fit 'training_models:tiny'"):
        finetune(config, dataset, Pretrained(state, "", (), False))


@pytest.mark.parametrize(
    "changes",
    [{"lr": 0.01}, {"epochs": 4}, {"batch": 4}, {"pretrain_epochs": 1}, {"skew": 0.8}, {"schedule": "constant"}],
)
def test_a_checkpoint_of_another_run_is_refused_by_name(
    config: TrainConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    train(config, checkpoint=tmp_path / "c")
    file = next((tmp_path / "c").glob("finetune-*.pt"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    (key, value), events = next(iter(changes.items())), list[Event]()
    with pytest.raises(TrainingError) as error:
        train(replace(config, **changes), checkpoint=tmp_path / "c", resume=True, callback=events.append)
    message = str(error.value)
    assert repr(str(file)) in message
    assert f"{key}={getattr(config, key)!r} (this run: {value!r})" in message
    assert "\n" not in message
    assert not events  # also not after pretraining anew
    assert {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()} == before


def test_a_checkpoint_from_other_pretrained_weights_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    dataset = load_data(config)
    pretrained = pretrain(config, dataset)
    finetune(config, dataset, pretrained, checkpoint=tmp_path)
    other = replace(pretrained, digest="another")
    with pytest.raises(TrainingError, match=r"finetune-.* is of another run: pretrained='\w+' \(this run: 'another'\)"):
        finetune(config, dataset, other, checkpoint=tmp_path, resume=True)


def test_a_checkpoint_from_other_data_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    train(config, checkpoint=tmp_path / "c")
    patterns(Path(config.data), per_class=44)
    with pytest.raises(TrainingError, match="dataset="):
        train(config, checkpoint=tmp_path / "c", resume=True)
    anew = train(config, checkpoint=tmp_path / "c")
    assert anew.resumed == 0
    assert not anew.pretrain_cached


def test_a_factory_that_changed_is_pretrained_again(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def initialised_differently(num_classes: int) -> nn.Module:
        model = tiny(num_classes)
        torch.nn.init.zeros_(model[0].bias)  # type: ignore[index, arg-type]
        return model

    train(config, checkpoint=tmp_path)
    monkeypatch.setattr("training_models.tiny", initialised_differently)
    assert not train(config, checkpoint=tmp_path).pretrain_cached
    assert train(config, checkpoint=tmp_path).pretrain_cached


def test_without_resume_a_run_starts_over(config: TrainConfig, tmp_path: Path) -> None:
    first = train(config, checkpoint=tmp_path)
    second = train(config, checkpoint=tmp_path)
    assert second.resumed == 0
    assert second.pretrain_cached
    assert states_equal(first.model.state_dict(), second.model.state_dict())
    done = train(config, checkpoint=tmp_path, resume=True)
    assert done.resumed == 3
    assert done.rows == second.rows
    assert states_equal(first.model.state_dict(), done.model.state_dict())


def test_resume_needs_a_folder(config: TrainConfig) -> None:
    with pytest.raises(TrainingError, match="checkpoint folder"):
        train(config, resume=True)


def damaged(content: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "truncated": content[: len(content) // 2],
        "last bytes missing": content[:-40],
        "text": b"hello",
        "other archive": b"PK\x05\x06" + bytes(18),
    }


@pytest.mark.parametrize("damage", list(damaged(b"")))
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_damaged_checkpoints(config: TrainConfig, tmp_path: Path, kind: str, damage: str) -> None:
    train(config, checkpoint=tmp_path / "c")
    file = next((tmp_path / "c").glob(f"{kind}-*.pt"))
    file.write_bytes(damaged(file.read_bytes())[damage])
    with pytest.raises(TrainingError) as error:
        train(config, checkpoint=tmp_path / "c", resume=True)
    assert f"the checkpoint {str(file)!r} cannot be read" in str(error.value)
    assert "delete it" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        {"format": "gf_tvm.checkpoint/0"},
        {"model": 1},
        [1, 2],
        {"format": files.FORMAT},
        {"format": files.FORMAT, "identity": 3},
        {"format": files.FORMAT, "identity": "same", "rows": [{}], "optimizer": {}, "model": {}},
        {"format": files.FORMAT, "identity": "same", "rows": [], "optimizer": {}, "model": {}},
        {"format": files.FORMAT, "identity": "same", "rows": [], "optimizer": {}, "model": {}, "best": None},
    ],
)
def test_files_that_are_no_checkpoint(config: TrainConfig, tmp_path: Path, content: Any) -> None:
    train(config, checkpoint=tmp_path / "c")
    file = next((tmp_path / "c").glob("finetune-*.pt"))
    if isinstance(content, dict) and content.get("identity") == "same":
        content = {**content, "identity": torch.load(file, weights_only=True)["identity"]}
    torch.save(content, file)
    with pytest.raises(TrainingError) as error:
        train(config, checkpoint=tmp_path / "c", resume=True)
    assert repr(str(file)) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_would_run_code_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    train(config, checkpoint=tmp_path / "c")
    file = next((tmp_path / "c").glob("finetune-*.pt"))
    torch.save({"format": files.FORMAT, "identity": Evil()}, file)
    with pytest.raises(TrainingError, match="cannot be read"):
        train(config, checkpoint=tmp_path / "c", resume=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("failing", ["replace", "fsync", "save"])
def test_a_failed_write_keeps_the_last_checkpoint(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    train(config, checkpoint=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args: Any, **_: Any) -> None:
        if failing == "save":
            args[1].write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch if failing == "save" else os, failing, full)
    with pytest.raises(TrainingError, match=r"cannot write the checkpoint '.*': No space left on device"):
        train(replace(config, lr=0.01), checkpoint=tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_leftovers_of_killed_runs_are_removed(config: TrainConfig, tmp_path: Path) -> None:
    dead = tmp_path / f".finetune-x.pt.{2**22 + 1}.tmp"  # above the largest process id
    alive = tmp_path / f".finetune-x.pt.{os.getppid()}.tmp"
    foreign = tmp_path / ".other.tmp"
    features = dead.with_name(dead.name.replace("finetune-x.pt", "features-x.bin"))
    for file in (dead, alive, foreign, features):
        file.write_text("")
    train(replace(config, epochs=1, pretrain_epochs=1), checkpoint=tmp_path)
    assert not dead.exists()
    assert not features.exists()
    assert alive.exists()
    assert foreign.exists()


def test_folders_that_cannot_be_written(config: TrainConfig, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "below", Path("/proc/nowhere")):
        with pytest.raises(TrainingError, match="cannot write into the checkpoint folder"):
            train(config, checkpoint=folder)

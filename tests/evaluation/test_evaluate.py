"""Evaluation: FLOPs, cosines, memory by type, the recommendation, resuming, the command and users' mistakes."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_models import SubclassedConv, patterns, tiny

import gf_tvm
from gf_tvm.core.geometry import Geometry
from gf_tvm.evaluation import EvaluateConfig, EvaluationError, Progress, Setting, evaluate, evaluator, recommend
from gf_tvm.evaluation.alignment import _gradients, cosine, cosines
from gf_tvm.evaluation.config import parse_size
from gf_tvm.evaluation.flops import Needs, count_step, exact_backward_flops, filtered_backward_flops, forward_flops
from gf_tvm.evaluation.step import CHAINS, LOSS, kept_by_type, measure, measure_apart
from gf_tvm.evaluation.store import Store
from gf_tvm.models import build_model
from gf_tvm.runners import cli
from gf_tvm.training import TrainConfig, load_data, pretrain
from gf_tvm.training.data import batches
from gf_tvm.training.loop import derived, seeded
from gf_tvm.training.step_costs import count_kept_bytes
from gf_tvm.training.trainer import finetune, obstacles

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def train(tmp_path: Path) -> TrainConfig:
    """A run of a second: a tiny network on 160 images of 8x8 pixels."""
    data = patterns(tmp_path / "patterns.npz")
    return TrainConfig(
        "training_models:tiny", data, image_size=8, batch=8, epochs=1, pretrain_epochs=1, shift=0, last=2
    )


# --- FLOPs ------------------------------------------------------------------------------------------------------------

#: 2 images, 3 -> 4 channels, 6x6 -> 6x6, 3x3 kernels; patches of 4x4 make a grid of 2x2.
CONV = Geometry(2, 3, 4, 6, 6, kernel=(3, 3), patch=(4, 4), padding=(1, 1))
PIXELS = 2 * 4 * 6 * 6  # of y


def test_flops_of_a_convolution() -> None:
    terms = PIXELS * 3 * 9
    assert forward_flops(CONV) == 2 * terms
    assert forward_flops(CONV, bias=True) == 2 * terms + PIXELS
    assert forward_flops(CONV, filtered=True) == 2 * terms + 2 * 3 * 6 * 6  # each input pixel is in one sum
    assert exact_backward_flops(CONV, Needs()) == 4 * terms
    assert exact_backward_flops(CONV, Needs(x=False, bias=True)) == 2 * terms + PIXELS
    product = 2 * 2 * (2 * 2) * 4 * 3
    means = PIXELS + 2 * 4 * (2 * 2)
    assert filtered_backward_flops(CONV, Needs()) == means + 2 * product + 4 * 3 * 9
    assert filtered_backward_flops(CONV, Needs(x=False, bias=True)) == means + product + PIXELS
    assert filtered_backward_flops(CONV, Needs(False, False, True)) == PIXELS


def test_flops_of_groups_dilation_and_clipped_patches() -> None:
    depthwise = Geometry(1, 4, 4, 4, 4, kernel=(3, 3), patch=(7, 7), padding=(1, 1), groups=4)
    assert depthwise.grid == (1, 1)  # the map is smaller than the patch
    assert forward_flops(depthwise, filtered=True) == 2 * 64 * 9 + 64
    assert filtered_backward_flops(depthwise, Needs()) == (64 + 4) + 2 * (2 * 4) + 4 * 9
    dilated = Geometry(1, 2, 2, 8, 8, kernel=(3, 3), patch=(2, 2), padding=(2, 2), dilation=(2, 2))
    assert dilated.dilated
    product = 2 * 16 * 2 * 2
    assert filtered_backward_flops(dilated, Needs()) == (128 + 2 * 16) + product + 9 * product
    # A 1x1 kernel of stride 2 has one input pixel in nine that no patch covers where the map is odd.
    strided = Geometry(1, 1, 1, 9, 9, kernel=(1, 1), patch=(2, 2), stride=(2, 2))
    covered = sum(len(strided.rows.in_range(i)) for i in range(strided.rows.patches))
    assert forward_flops(strided, filtered=True) == 2 * 25 + covered**2


def test_flops_of_a_step() -> None:
    model = tiny(4).eval().requires_grad_(False)
    x = torch.zeros(2, 3, 8, 8)
    first = 2 * (2 * 8 * 64) * 3 * 9 + 2 * 8 * 64
    second = 2 * (2 * 8 * 64) * 8 * 9 + 2 * 8 * 64
    linear = 2 * 2 * 32 * 4 + 2 * 4
    flops = count_step(model, x)
    assert (flops.forward, flops.backward) == (first + second + linear, 0)
    model[3].requires_grad_(True)
    model[-1].requires_grad_(True)
    head = 2 * (2 * 2 * 32 * 4) + 2 * 4
    assert count_step(model, x).backward == 2 * (2 * 8 * 64) * 8 * 9 + 2 * 8 * 64 + head
    model[0].requires_grad_(True)  # now the second needs the gradient of its input, too
    both = 2 * (2 * 8 * 64) * (3 + 2 * 8) * 9 + 2 * (2 * 8 * 64)
    assert count_step(model, x).backward == both + head
    gf_tvm.filter_model(model, patch=2, layers=["3"])
    flops = count_step(model, x)
    assert flops.forward == first + second + linear + 2 * 8 * 64
    grid = 2 * 8 * 16
    filtered = 2 * 8 * 64 + grid + 2 * (2 * grid * 8) + 8 * 8 * 9 + 2 * 8 * 64
    assert flops.backward == 2 * (2 * 8 * 64) * 3 * 9 + 2 * 8 * 64 + filtered + head


def test_flops_of_a_chain() -> None:
    """Sums of derivatives in the forward pass; no sum over the pixels of a gradient that stays on the grid."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.MaxPool2d(2))
    x = torch.zeros(2, 3, 8, 8)
    plain = count_step(gf_tvm.filter_model(model, 2, last=2, chain=False), x)
    chained = count_step(gf_tvm.filter_model(model, 2, last=2), x)
    pixels, patches = 2 * 4 * 64, 2 * 4 * 16  # of the first convolution; to the second the pooling's gradient is full
    assert chained.forward - plain.forward == pixels  # of the ReLU
    first, second = -pixels - patches + 2 * patches - pixels, 2 * (2 * 6 * 16) - 2 * 6 * 64
    assert chained.backward - plain.backward == first + second


# --- memory -----------------------------------------------------------------------------------------------------------


def test_kept_by_type_sums_to_what_is_kept() -> None:
    model = tiny(4)
    model.requires_grad_(False)[3].requires_grad_(True)
    x, y = torch.randn(8, 3, 8, 8), torch.zeros(8, dtype=torch.int64)
    for filtered in (False, True):
        if filtered:
            gf_tvm.filter_model(model, patch=2, last=1)
        kept = kept_by_type(model, x, y)
        with count_kept_bytes(model, {"3": model[3]}) as counted:
            F.cross_entropy(model(x), y)
        assert sum(kept.values()) == counted.total
        full = 8 * 8 * 64 * 4
        convolution = "FilteredConv2d" if filtered else "Conv2d"
        assert kept[convolution] == counted.layers["3"] == (full // 4 if filtered else full)
        assert kept["ReLU"] == full  # the activation's own output stays, filtered or not
        assert kept[LOSS] > 0


@pytest.mark.parametrize(("model", "size", "last"), [("training_models:pointwise", 8, 2), ("resnet18_025", 32, 4)])
def test_kept_by_type_leaves_chains_as_they_are(model: str, size: int, last: int) -> None:
    network = build_model(model, 4, 3, size).eval().requires_grad_(False)
    for _, layer in gf_tvm.select_layers(network, last=last):
        layer.requires_grad_(True)
    gf_tvm.filter_model(network, 2, last=last)
    x, y = torch.randn(8, 3, size, size), torch.zeros(8, dtype=torch.int64)
    with count_kept_bytes(network, {}) as counted:
        F.cross_entropy(network(x), y)
    before = [(chain.convolutions, chain.kept_values) for chain in gf_tvm.chains_of(network).chains]
    assert before
    kept = kept_by_type(network, x, y)
    assert [(chain.convolutions, chain.kept_values) for chain in gf_tvm.chains_of(network).chains] == before
    assert sum(kept.values()) == counted.total
    values = sum(4 * kept_values for _, kept_values in before)
    # What is kept beside them in the traced module has no module of its own.
    assert values <= kept[CHAINS] < 1.5 * values
    assert "FilteredConv2d" not in kept


def test_peak_is_that_of_a_process_of_its_own(train: TrainConfig) -> None:
    small = measure_apart(replace(train, last=1), 4, False, None, steps=2)
    large = measure_apart(replace(train, last=1, image_size=64, batch=128), 4, False, None, steps=2)
    assert small.peak_bytes is not None
    assert large.peak_bytes is not None
    # 128 images of 8 channels of 64x64 pixels: the convolution keeps its input, batch norm and ReLU theirs.
    assert large.kept_bytes_convolutions == 128 * 8 * 64 * 64 * 4
    assert large.peak_bytes - small.peak_bytes > large.kept_bytes > 3 * large.kept_bytes_convolutions
    assert sum(large.kept_bytes_by_type.values()) == large.kept_bytes
    assert (small.energy_joules_per_step is None) == small.energy.startswith("not measured")


# --- cosines ----------------------------------------------------------------------------------------------------------


def test_cosines_against_autograd(train: TrainConfig) -> None:
    """Computed once more by hand: exact gradients by autograd, filtered ones by the functional operator."""
    train = replace(train, model="training_models:pointwise", last=2, patch=(2, 2))
    dataset = load_data(train)
    state = pretrain(train, dataset).state
    found = cosines(train, dataset, state, count=1)
    assert [(layer.name, layer.variant) for layer in found] == [("3", "R2"), ("5", "R2")]

    with seeded(train.seed, "weights"):
        model = build_model(train.model, 4, 3, 8)
    model.load_state_dict(state)
    model.eval()
    generator = torch.Generator().manual_seed(derived(train.seed, "cosine images"))
    x, y = next(iter(batches(dataset.finetune_train, 8, generator, drop_last=True)))
    gradients = []
    for patch in (None, 2):
        first, last = model[3], model[5]
        h = model[2](model[1](model[0](x))).detach()
        for layer in (first, last):
            layer.weight.grad = None

        def conv(layer: nn.Module, z: torch.Tensor, patch: int | None = patch) -> torch.Tensor:
            if patch is None:
                return F.conv2d(z, layer.weight, layer.bias)
            return gf_tvm.functional.conv2d(z, layer.weight, layer.bias, patch=patch)

        middle = model[4](conv(first, h))
        middle.retain_grad()
        out = model[6:](conv(last, middle))
        F.cross_entropy(out, y).backward()
        gradients.append((first.weight.grad, last.weight.grad, middle.grad))
    expected = [F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item() for a, b in zip(*gradients, strict=True)]
    assert found[0].cosine_weight == pytest.approx(expected[0], abs=1e-5)
    assert found[0].cosine_input is None  # nothing before it is trained
    assert found[1].cosine_weight == pytest.approx(expected[1], abs=1e-5)
    assert found[1].cosine_input == pytest.approx(expected[2], abs=1e-5)
    assert 0 < found[1].cosine_input < 0.999


def test_cosine_is_one_where_filtering_is_exact(train: TrainConfig) -> None:
    train = replace(train, model="training_models:pointwise", last=2, patch=(1, 1))
    dataset = load_data(train)
    for layer in cosines(train, dataset, pretrain(train, dataset).state, count=2):
        assert layer.cosine_weight == pytest.approx(1.0)
    assert cosine([torch.tensor([3.0]), torch.tensor([4.0])], [torch.tensor([4.0]), torch.tensor([-3.0])]) == 0


class Residual(nn.Module):
    """The input of its second convolution is read by a residual, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (n, 3, h, w) -> logits (n, 3)."""
        h = self.first(x)
        return (self.second(h) + 10 * h).mean(dim=(2, 3))


def test_the_gradient_of_a_layers_input_is_its_own() -> None:
    model, x, y = Residual(), torch.randn(2, 3, 4, 4), torch.tensor([0, 2])
    found = _gradients(model, {"second": model.second}, x, y, 0)["second"][1]
    h = model.first(x).detach().requires_grad_()
    logits = (model.second(h) + 10 * h.detach()).mean(dim=(2, 3))
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, y), h)
    torch.testing.assert_close(found, [expected])


# --- the recommendation -----------------------------------------------------------------------------------------------


def row(variant: str, last: int, scores: list[float], kept: int, ms: float) -> Setting:
    step = {"forward": ms / 2, "backward": ms / 4, "update": ms / 4}
    seeds, none = tuple(range(len(scores))), tuple(0.0 for _ in scores)
    return Setting(variant, last, seeds, tuple(scores), none, step, kept, kept // 2, {}, None, 0, 0, None)


ROWS = [
    row("exact", 2, [0.90, 0.92], 1000, 10),
    row("R2", 2, [0.89, 0.92], 400, 6),
    row("R4", 2, [0.86, 0.88], 200, 5),
    row("exact", 4, [0.95, 0.97], 4000, 20),
    row("R2", 4, [0.93, 0.955], 900, 9),
    row("R4", 4, [0.91, 0.93], 300, 7),
]


@pytest.mark.parametrize(
    ("budget", "drop", "expected"),
    [
        (None, None, ("exact", 4)),  # the highest score: R2 is 1.75 points worse with a standard error of 0.25
        (None, 0.02, ("exact", 4)),
        (1000, None, ("R2", 4)),
        (1000, 0.01, ("R2", 2)),  # R2 with last 4 drops too much; with last 2 it ties with exact and is faster
        (399, None, ("R4", 4)),
        (399, 0.04, ("R4", 4)),  # drops 4 points
        (399, 0.039, None),  # R4 with last 2 drops 4 points, too
        (200, None, ("R4", 2)),
        (199, None, None),
    ],
)
def test_recommendation(budget: int | None, drop: float | None, expected: tuple[str, int] | None) -> None:
    best, obstacles = recommend(ROWS, budget, drop)
    assert (None if best is None else (best.variant, best.last)) == expected
    assert (obstacles is None) == (best is not None)


def test_ties_are_broken_by_the_step_time() -> None:
    # Equal means, unequal seeds: a difference of 0 with a standard error of 1 point.
    best, _ = recommend([row("exact", 1, [0.9, 0.92], 10, 5), row("R2", 1, [0.91, 0.91], 5, 4)])
    assert best is not None
    assert best.variant == "R2"
    assert "cannot be told from the highest" in best.why or "shortest step" in best.why
    # One seed shows no noise.
    best, _ = recommend([row("exact", 1, [0.90], 10, 5), row("R2", 1, [0.8999], 5, 4)])
    assert best is not None
    assert best.variant == "exact"


def test_no_recommendation_says_what_rules_out_what() -> None:
    best, obstacles = recommend([ROWS[0], ROWS[2]], 500, 0.01)
    assert best is None
    assert obstacles is not None
    assert "0.0005 MB kept for the backward pass rules out exact, last 2 (0.001 MB)" in obstacles
    assert "at most 1 points rules out R4, last 2 (4.00 points)" in obstacles
    with pytest.raises(EvaluationError, match="R4, last 4: no exact setting with last 4"):
        recommend([ROWS[0], ROWS[5]], None, 0.01)


# --- evaluating and resuming ------------------------------------------------------------------------------------------


def test_evaluate_and_resume(train: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(evaluator, "measure_apart", measure)  # here, because processes take seconds to start
    for name in ("finetune", "measure_apart", "cosines"):
        real = getattr(evaluator, name)

        def counted(*args: Any, name: str = name, real: Any = real, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(evaluator, name, counted)
    train = replace(train, chain=False)
    config, out = EvaluateConfig(train, ["exact", 7], [2], memory_budget=10**9, max_score_drop=1.0), tmp_path / "out"
    stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, out)
    assert calls == ["measure_apart", "measure_apart", "finetune", "finetune"]
    calls.clear()
    stop_at = 0
    events: list[Progress] = []
    evaluation = evaluate(config, out, callback=events.append)
    assert calls == ["finetune", "cosines"]  # the rest had been finished
    assert events[-1].done == events[-1].total
    assert all(a.done <= b.done for a, b in pairwise(events))

    calls.clear()
    again = evaluate(config, out)
    assert not calls
    assert again.to_dict() == evaluation.to_dict() == json.loads((out / "evaluation.json").read_text())
    assert evaluation.recommendation is not None
    assert evaluation.train_config == json.loads((out / "train.json").read_text())
    more = evaluate(replace(config, seeds=[0, 1]), out)
    assert calls == ["finetune", "finetune"]  # of the new seed
    assert [s.seeds for s in more.settings] == [(0, 1), (0, 1)]
    assert [s.scores[0] for s in more.settings] == [s.scores[0] for s in again.settings]
    calls.clear()
    evaluate(replace(config, train=replace(train, lr=0.01)), out)
    assert calls.count("finetune") == 2

    exact, filtered = evaluation.settings
    assert (exact.name, filtered.name) == ("exact, last 2", "R7, last 2")
    assert filtered.kept_bytes_convolutions == 8 * (3 + 8) * 4 * 4  # 2x2 patches of 8x8 pixels, clipped
    assert exact.kept_bytes_convolutions == 8 * (3 + 8) * 64 * 4
    assert filtered.backward_flops < exact.backward_flops
    assert [layer.name for layer in evaluation.layers] == ["0", "3"]
    none = evaluate(replace(config, memory_budget=1), out)
    assert none.recommendation is None
    assert none.obstacles.limits is not None
    assert none.to_dict()["obstacles"]["limits"] in (out / "evaluation.json").read_text()
    assert not (out / "train.json").exists()  # of the evaluation before


def test_chained_variants_cost_only_themselves(
    train: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, str]] = []
    monkeypatch.setattr(evaluator, "measure_apart", measure)
    for name in ("finetune", "measure_apart", "cosines"):
        real = getattr(evaluator, name)

        def counted(run: TrainConfig, *args: Any, name: str = name, real: Any = real, **kwargs: Any) -> Any:
            made.append((name, run.variant))
            return real(run, *args, **kwargs)

        monkeypatch.setattr(evaluator, name, counted)
    train = replace(train, model="training_models:pointwise")
    out = tmp_path / "out"
    plain = evaluate(EvaluateConfig(replace(train, chain=False), ["exact", 2], [2]), out)
    assert [s.variant for s in plain.settings] == ["exact", "R2"]
    made.clear()
    config = EvaluateConfig(
        train, ["exact", 2], [2], memory_budget=plain.settings[1].kept_bytes - 1, layer_by_layer=True
    )
    both = evaluate(config, out)
    assert made == [("measure_apart", "R2 chained"), ("finetune", "R2 chained")]
    assert [s.variant for s in both.settings] == ["exact", "R2", "R2 chained"]
    exact, filtered, chained = both.settings
    assert [exact, filtered] == list(plain.settings)
    assert [s.chains for s in both.settings] == [[], [], [["3", "5"]]]
    assert chained.scores[0] == pytest.approx(filtered.scores[0], abs=0.051)  # one image of 20
    assert chained.kept_bytes < filtered.kept_bytes
    assert sum(chained.kept_bytes_by_type.values()) == chained.kept_bytes
    assert chained.backward_flops < filtered.backward_flops
    assert {layer.variant for layer in both.layers} == {"R2"}  # the same gradients
    assert "chains" in both.conditions
    # The only one within the budget: what gf-tvm train takes then is that patch in chains.
    assert both.recommendation is not None
    assert both.recommendation.variant == "R2 chained"
    assert both.train_config is not None
    assert (both.train_config["patch"], both.train_config["chain"]) == ("2", True)
    assert json.loads((out / "evaluation.json").read_text()) == both.to_dict()
    made.clear()
    default = evaluate(EvaluateConfig(train, ["exact", 2], [2]), out)
    assert not made
    assert default.settings == (exact, chained)
    assert default.layers == both.layers


def test_variants_of_a_dtype_of_means(train: TrainConfig) -> None:
    config = EvaluateConfig(replace(train, chain="float16"), ["exact", 2, (2, 1)], layer_by_layer=True)
    names = ["exact", "R2", "R2 chained float16", "R2x1", "R2x1 chained float16"]
    assert list(config.variants) == names
    assert [config.run(name, 1, 0).variant for name in names] == names
    with pytest.raises(EvaluationError, match="layer_by_layer adds runs without chains"):
        replace(config, train=replace(train, chain=False))


def test_a_damaged_part_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "parts")
    store.put("run", {"a": 1}, {"score": 0.5})
    assert store.get("run", {"a": 1}) == {"score": 0.5}
    assert store.get("run", {"a": 2}) is None
    (path,) = store.folder.iterdir()
    for text in (path.read_text().replace("0.5", "0.9"), path.read_text()[:-9], "[]", ""):
        path.write_text(text)
        with pytest.raises(EvaluationError, match="is damaged"):
            store.get("run", {"a": 1})


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(train: TrainConfig) -> list[str]:
    return [
        *("evaluate", "--model", train.model, "--data", train.data, "--image-size", "8", "--batch", "8"),
        *("--epochs", "1", "--pretrain-epochs", "1", "--patch", "exact,2", "--last", "1"),
    ]


def test_command(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = tmp_path / "out", tmp_path / "rows.json"
    options = ["--out", str(out), "--json", str(file), "--memory-budget", "1MB", "--max-accuracy-drop", "100"]
    assert cli.main([*arguments, *options, "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    content = json.loads(file.read_text())
    assert content == json.loads((out / "evaluation.json").read_text())
    assert content["schema"] == "gf_tvm.evaluate/1"
    assert content["limits"] == {"memory_budget": 10**6, "max_score_drop": 1.0}
    assert set(content) == {
        *("schema", "machine", "threads", "versions", "conditions", "model", "data", "task", "metric", "settings"),
        *("layers", "limits", "obstacles", "recommendation"),
    }
    shifted = "training images are flipped or shifted at random"
    assert content["obstacles"] == {"limits": None, "filtering": {}, "cache": shifted}
    assert content["conditions"]["scores"] == "on 20 test images after the last epoch"
    assert f"scores: {content['conditions']['scores']}" in shown
    best = content["recommendation"]
    assert f"recommended: {best['variant']}, last {best['last']}: {best['why']}" in shown
    assert "of the weight" in shown
    assert "ReLU" in shown

    # Its configuration is what gf-tvm train takes, wherever --config stands; and options override it.
    config, result = out / "train.json", tmp_path / "train.json"
    command = ["train", "--epochs", "2", "--config", str(config), "--json", str(result), "--threads", "1"]
    assert cli.main([*command, "--epochs", "1"]) == 0
    (run,) = json.loads(result.read_text())["runs"]
    (setting,) = (s for s in content["settings"] if (s["variant"], s["last"]) == (best["variant"], best["last"]))
    assert run["variant"] == best["variant"]
    assert run["config"]["last"] == best["last"]
    assert run["test_accuracy"] == setting["scores"][0]
    assert run["rows"][0]["kept_bytes"] == setting["kept_bytes"] == sum(setting["kept_bytes_by_type"].values())
    assert cli.main(command) == 0
    (run,) = json.loads(result.read_text())["runs"]
    assert len(run["rows"]) == 2


def test_command_with_chains(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluator, "measure_apart", measure)
    command = [*arguments, "--model", "training_models:pointwise", "--last", "1,2", "--patch", "2", "--layer-by-layer"]
    assert cli.main([*command, "--threads", "1", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "R2 chained, last 2: a chain of 2: 3, 5" in shown
    assert "R2 chained, last 1: there is no chain" in shown
    settings = json.loads((tmp_path / "out/evaluation.json").read_text())["settings"]
    assert [(s["variant"], s["last"]) for s in settings] == [
        *(("R2", 1), ("R2 chained", 1), ("R2", 2), ("R2 chained", 2)),
    ]
    kept = [s["kept_bytes_convolutions"] for s in settings]
    assert kept[0] == kept[1] == 8 * 8 * 16 * 4  # x~ of one convolution, in no chain
    assert kept[3] == kept[2] + 8 * 8 * 16 * 4  # and the means of a ReLU


def test_what_stood_in_the_way_is_said(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A convolution that cannot be filtered, frozen layers whose results cannot be kept, limits that nothing meets."""
    monkeypatch.setattr(evaluator, "measure_apart", measure)
    monkeypatch.setattr(gf_tvm.nn, "filter_obstacle", lambda module: "odd" if type(module) is SubclassedConv else None)
    options = ["--model", "training_models:subclassed", "--last", "2", "--memory-budget", "1B", "--threads", "1"]
    assert cli.main([*arguments, *options, "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out/evaluation.json").read_text())["obstacles"]
    assert set(found) == {"limits", "filtering", "cache"}
    assert list(found["filtering"]) == ["2"]  # the first convolution is filtered
    assert "the memory budget" in found["limits"]
    assert found["cache"] == "training images are flipped or shifted at random"  # the default shift
    shown = capsys.readouterr().out
    assert "not filtered, exact in every setting:\n  2: odd" in shown
    assert f"the frozen layers are computed in every step: {found['cache']}" in shown
    assert f"no recommendation: {found['limits']}" in shown


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("training_models:not_traceable", "the model cannot be traced: "),
        ("training_models:tiny", None),
    ],
)
def test_whether_frozen_results_are_kept_is_known_before(train: TrainConfig, model: str, reason: str | None) -> None:
    """The same reason as the run itself gives later."""
    train = replace(train, model=model, last=1, patch=2)
    dataset = load_data(train)
    filtering, cache = obstacles(train, dataset)
    assert filtering == {}
    assert cache == finetune(train, dataset, pretrain(train, dataset)).cache["reason"]
    assert cache is None if reason is None else reason in str(cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "resnet19"], "unknown model 'resnet19'"),
        (["--model", "training_models:wants_wide_images"], "does not run on images of shape"),
        (["--model", "training_models:segmentation"], "the model's logits must have shape"),
        (["--model", "training_models:no_convolutions"], "has no Conv2d module"),
        (["--data", "nowhere"], "no data at 'nowhere'"),
        (["--patch", "two"], "patches are written as exact,2,4"),
        (["--patch", ""], "got ''"),
        (["--patch", "0"], "patch must be at least 1, got 0"),
        (["--last", ""], "--last is written as 1,2,4, got ''"),
        (["--last", "0"], "last must be an integer of at least 1, got 0"),
        (["--last", "1,3"], "last must be between 1 and 2"),
        (["--seeds", "a"], "--seeds is written as 1,2,4, got 'a'"),
        (["--seeds", "-1"], "seed must be an integer of at least 0, got -1"),
        (["--memory-budget", "much"], "a memory budget is written as 64MB, 500kB or 1.5GiB, got 'much'"),
        (["--memory-budget", "0MB"], "got '0MB'"),
        (["--max-accuracy-drop", "-1"], "must lie between 0 and 100 points, got -1"),
        (["--max-accuracy-drop", "nan"], "must lie between 0 and 100 points, got nan"),
        (["--patch", "2", "--max-accuracy-drop", "1"], "against the exact backward pass: add exact"),
        (["--epochs", "0"], "epochs must be an integer of at least 1"),
        (["--threads", "0"], "threads must be at least 1"),
        (["--out", "FILE"], "cannot write into the folder"),
        (["--json", "no/folder.json"], "cannot write"),
        (["--library", "no.gfb"], "cannot read bundle"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    (tmp_path / "FILE").write_text("")
    options = [str(tmp_path / option) if option == "FILE" else option for option in options]
    assert cli.main([*arguments, "--out", str(tmp_path / "out"), *options]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert message in shown.err
    assert not (tmp_path / "out").exists()


def test_a_step_that_dies_is_one_line(train: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EvaluationError, match=r"a step of exact, last 3 could not be measured: last must be between"):
        measure_apart(replace(train, last=3), 4, False, None, steps=1)
    died = subprocess.CompletedProcess("", -9, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: died)
    with pytest.raises(EvaluationError, match="killed by signal 9"):
        measure_apart(train, 4, False, None, steps=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "a configuration must be JSON"),
        ("[]", "must be an object of settings, got list"),
        ('{"schema": "gf_tvm.train/1"}', "not a configuration of schema 'gf_tvm.train_config/1'"),
        ('{"model": "resnet18", "epoch": 1}', "unknown setting 'epoch'; known: model, weights, data"),
        ('{"model": ["resnet18"]}', "model must be a single value, got ['resnet18']"),
        ('{"model": "resnet18", "epochs": "many"}', "argument --epochs: invalid int value: 'many'"),
        ('{"model": "resnet18", "epochs": 1.5}', "epochs must be an integer of at least 1, got 1.5"),
        ('{"data": "digits"}', "the following arguments are required: --model"),
        (None, "cannot read this configuration: No such file"),
    ],
)
def test_mistakes_in_a_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    assert cli.main(["train", "--config", str(file)]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert message in shown.err


@pytest.mark.parametrize(
    ("text", "size"),
    [("64MB", 64_000_000), ("1.5 GiB", 1_610_612_736), ("500kB", 500_000), ("12", 12), ("3 b", 3), ("2KiB", 2048)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("field", ["patches", "last", "seeds"])
def test_empty_lists(train: TrainConfig, field: str) -> None:
    with pytest.raises(EvaluationError, match=f"{field} must be a list of at least one value"):
        EvaluateConfig(train, **{field: []})

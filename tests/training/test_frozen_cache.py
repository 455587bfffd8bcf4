"""The cache of what the frozen layers compute: same results, where it is allowed, what a damaged file does."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_models import patterns

import gf_tvm
from gf_tvm.models import build_model
from gf_tvm.training import Event, Images, TrainConfig, TrainingError, train, train_variants
from gf_tvm.training import feature_files as files
from gf_tvm.training import frozen as frozen_module
from gf_tvm.training.cut import CannotSplit, split
from gf_tvm.training.feature_files import TensorSpec

pytestmark = pytest.mark.usefixtures("one_thread")

TIMES = ("seconds", "forward_seconds", "backward_seconds", "update_seconds", "forward_ms", "backward_ms", "update_ms")


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """A tiny network on 120 training images of 8x8 pixels, nothing random before the trained convolution."""
    data = patterns(tmp_path / "patterns.npz")
    return TrainConfig(
        *("training_models:tiny", data, 2, 1, 8, 8), epochs=3, pretrain_epochs=1, shift=0, cache="memory"
    )


def states_equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return list(a) == list(b) and all(a[name].equal(b[name]) for name in a)


def without_times(row: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(row).items() if name not in TIMES}


class Frozen(nn.Module):
    """A network whose first convolution is frozen by :func:`freeze`; ``middle`` lies between it and the trained one."""

    def __init__(self, middle: nn.Module | None = None, after: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.middle = nn.Conv2d(3, 4, 3, padding=1), middle or nn.ReLU()
        self.second, self.after = nn.Conv2d(4, 4, 3, padding=1), after or nn.Identity()
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(self.first(x))
        logits: Tensor = self.head(self.after(self.second(y) + y).mean((2, 3)))
        return logits


def frozen(model: nn.Module, trained: tuple[str, ...] = ("second", "head")) -> nn.Module:
    model.requires_grad_(False)
    for name in trained:
        model.get_submodule(name).requires_grad_(True)
    return model


# --- cutting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18_025", "mobilenetv2_025"])
@pytest.mark.parametrize("patch", [None, 2])
def test_parts_are_the_model_bit_for_bit(name: str, patch: int | None) -> None:
    torch.manual_seed(0)
    model, x = build_model(name, 4, 3, 16), torch.randn(4, 3, 16, 16)
    layers = [layer for layer, _ in gf_tvm.nn.select_layers(model, last=3)]
    if patch:
        gf_tvm.filter_model(model, patch=patch, last=3)
    trained = [n for n, m in model.named_modules() if n in layers or isinstance(m, nn.Linear)]
    frozen(model, tuple(trained))
    model.eval()
    parts = split(model, x, lambda: None)
    parameters = [p for p in model.parameters() if p.requires_grad]
    whole = model(x)
    pieces = parts.rest(*(value.detach() for value in parts.frozen(x)))
    assert whole.equal(pieces)
    expected = torch.autograd.grad(whole.square().sum(), parameters)
    got = torch.autograd.grad(pieces.square().sum(), parameters)
    assert all(a.equal(b) for a, b in zip(got, expected, strict=True))
    assert not any(p.requires_grad for p in parts.frozen.parameters())
    owned = {id(p) for p in model.parameters()}
    assert {id(p) for part in (parts.frozen, parts.rest) for p in part.parameters()} <= owned


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Counts(nn.Module):
    """Changes its buffer in every training step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        return x * self.steps


class Branches(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return y if y.sum() > 0 else -y


class Flips(Frozen):
    """Draws with Python code in the network's own forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return y if torch.rand([]) > 0.5 else 2 * y


class Steps(Frozen):
    """Counts its steps in the forward pass of a module that is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return super().forward(x)


class Overwrites(Frozen):
    """The frozen branch overwrites what the trained one has read before: the order matters."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.second(y)
        logits: Tensor = self.head((z + y.mul_(2)).mean((2, 3)))
        return logits


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Frozen(nn.Dropout(0.5)), "random numbers are drawn before"),
        (Frozen(Noise()), "random numbers are drawn before"),
        (Frozen(Counts()), "changes its buffers"),
        (Branches(), "cannot be traced"),
        (Flips(), "draws random numbers"),
        (Steps(), "changes its buffers"),
        (Overwrites(), "other results"),
    ],
)
def test_what_cannot_be_cut(model: nn.Module, reason: str) -> None:
    before = {name: value.clone() for name, value in frozen(model).state_dict().items()}
    x, generator = torch.randn(2, 3, 8, 8), torch.get_rng_state()
    with pytest.raises(CannotSplit, match=reason):
        split(model, x, model.train)
    assert torch.get_rng_state().equal(generator)
    assert states_equal(model.state_dict(), before)


class Sized(Frozen):
    """The image's size crosses the cut as a number."""

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.interpolate(self.second(self.first(x)[:, :, ::2, ::2]), size=x.shape[-2:])
        logits: Tensor = self.head(y.mean((2, 3)))
        return logits


class BatchSized(Frozen):
    """The number of images crosses the cut."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.second(self.first(x)).mean((2, 3)).view(x.shape[0], -1))
        return logits


def test_what_is_not_a_value_per_image() -> None:
    images = Images(torch.randn(5, 3, 8, 8), torch.zeros(5, dtype=torch.int64), ("a",))
    for model in (Sized(), BatchSized()):
        parts = split(frozen(model), images.x, model.eval)
        if isinstance(model, BatchSized):
            with pytest.raises(CannotSplit, match="int that depends on the batch crosses the cut"):
                frozen_module._layout(parts, images)
            continue
        layouts = frozen_module._layout(parts, images)
        assert torch.Size([8, 8]) in layouts
        assert TensorSpec((5, 4, 4, 4), torch.float32) in layouts


@pytest.mark.parametrize("after", [nn.Dropout(0.5), Noise(), Counts()])
def test_randomness_after_the_cut_stays(after: nn.Module) -> None:
    model = frozen(Frozen(after=after))
    parts = split(model, torch.randn(2, 3, 8, 8), model.train)
    values = parts.frozen(torch.randn(2, 3, 8, 8))
    assert not parts.rest(*values).equal(parts.rest(*values))


def test_the_first_layer_is_trained() -> None:
    model = frozen(Frozen(), ("first", "second", "head"))
    with pytest.raises(CannotSplit, match="reads the images themselves"):
        split(model, torch.randn(2, 3, 8, 8), model.train)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"patch": None}, {"model": "resnet18_025", "last": 3}, {"amp": "bfloat16"}])
def test_the_same_run_with_and_without(config: TrainConfig, changes: dict[str, Any]) -> None:
    config = replace(config, epochs=2, **changes)
    kept, plain = train(config), train(replace(config, cache="off"))
    assert (kept.cache["kind"], plain.cache["kind"]) == ("memory", "off")
    assert kept.cache["reason"] is None
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if config.amp == "off" else {"rtol": 0.05, "atol": 0.01}
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(kept.model.state_dict()[name], value, **tolerance, msg=name)
    assert [row.train_loss for row in kept.rows] == pytest.approx([row.train_loss for row in plain.rows], rel=0.01)
    assert kept.initial_test_accuracy == pytest.approx(plain.initial_test_accuracy, abs=0.03)
    sizes = kept.dataset["images"]
    steps = kept.rows[0].steps * config.batch
    assert kept.cache["hits"] == 2 * steps + 3 * sizes["finetune_test"]
    assert [row.kept_bytes_convolutions for row in kept.rows] == [row.kept_bytes_convolutions for row in plain.rows]
    if not changes:  # one map of 8 channels crosses the cut
        assert kept.cache["bytes"] == (sizes["finetune_train"] + sizes["finetune_test"]) * 8 * 8 * 8 * 4


def test_frozen_layers_run_once_per_image(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    images = 0
    forward = nn.BatchNorm2d.forward

    def counted(self: nn.BatchNorm2d, x: Tensor) -> Tensor:
        nonlocal images
        if x.requires_grad is False and torch.is_grad_enabled() is False and self.weight.shape[0] == 8:
            images += len(x)
        return forward(self, x)

    totals = {}
    for cache in ("memory", "off"):
        for epochs in (2, 4):
            images = 0
            with monkeypatch.context() as patched:
                patched.setattr(nn.BatchNorm2d, "forward", counted)
                train(replace(config, cache=cache, epochs=epochs, pretrain_epochs=0))
            totals[cache, epochs] = images
    tested = 2 * 2 * load_sizes(config)["finetune_test"]  # two more epochs; two batch norms without the cache
    assert totals["off", 4] - totals["off", 2] == tested
    assert totals["memory", 4] - totals["memory", 2] == tested // 2


def load_sizes(config: TrainConfig) -> dict[str, int]:
    from gf_tvm.training import load_data

    return load_data(config).sizes


def test_off_with_a_reason(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = replace(config, epochs=1, pretrain_epochs=0, cache="auto")
    for changes, reason in (
        ({"flip": True}, "flipped or shifted"),
        ({"shift": 1}, "flipped or shifted"),
        ({"cache": "off"}, "not wanted"),
        ({"last": 2}, "reads the images themselves"),
    ):
        cache = train(replace(config, **changes)).cache  # type: ignore[arg-type]
        assert (cache["kind"], cache["bytes"], cache["hits"]) == ("off", 0, 0)
        assert reason in cache["reason"]
    monkeypatch.setattr(frozen_module.cpu, "available_bytes", lambda: 1000)
    monkeypatch.setattr("gf_tvm.training.data.base.available_bytes", lambda: None)
    assert "too much for memory" in train(replace(config, cache="memory")).cache["reason"]
    assert "no checkpoint folder" in train(config).cache["reason"]
    assert train(config, checkpoint=tmp_path / "c").cache["kind"] == "disk"  # auto, too large for memory
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    assert "too much for the disk" in train(config, checkpoint=tmp_path / "d").cache["reason"]


def test_disk_without_a_folder(config: TrainConfig) -> None:
    with pytest.raises(TrainingError, match="cache 'disk' keeps its files in the checkpoint folder"):
        train(replace(config, cache="disk"))


def test_a_disk_cache_is_shared_and_gives_the_same_bits(config: TrainConfig, tmp_path: Path) -> None:
    memory = train(config)
    exact, two = train_variants(replace(config, cache="disk"), ["exact", 2], checkpoint=tmp_path / "c")
    assert (exact.cache["kind"], exact.cache["reused"]) == ("disk", False)
    assert two.cache["reused"]  # the same frozen layers
    assert states_equal(two.model.state_dict(), memory.model.state_dict())
    assert len(list((tmp_path / "c").glob("features-*.bin"))) == 2  # for training and testing
    other = train(replace(config, cache="disk", seed=1), checkpoint=tmp_path / "c")  # other weights, other split
    assert not other.cache["reused"]
    weights = train(replace(config, cache="disk", pretrain_lr=0.01), checkpoint=tmp_path / "c")  # the same split
    assert (weights.cache["reused"], weights.cache["notes"]) == (False, [])
    assert not list((tmp_path / "c").glob(".*"))


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_resumed_run_is_the_same_run(config: TrainConfig, tmp_path: Path, kind: str) -> None:
    class Stop(Exception):
        pass

    def stop(event: Event) -> None:
        if (event.phase, event.epoch, event.step) == ("finetune", 2, 3) and event.row is None:
            raise Stop

    config = replace(config, cache=kind)
    whole = train(config, checkpoint=tmp_path / "whole")
    with pytest.raises(Stop):
        train(config, checkpoint=tmp_path / "c", callback=stop)
    resumed = train(config, checkpoint=tmp_path / "c", resume=True)
    assert resumed.resumed == 1
    assert states_equal(resumed.model.state_dict(), whole.model.state_dict())
    assert list(map(without_times, resumed.rows)) == list(map(without_times, whole.rows))
    # The cache is no part of a run's identity.
    assert train(replace(config, cache="off"), checkpoint=tmp_path / "c", resume=True).resumed == 3


# --- files ------------------------------------------------------------------------------------------------------------


def flip_a_byte(content: bytes) -> bytes:
    return content[:100] + bytes([content[100] ^ 255]) + content[101:]


@pytest.mark.parametrize(
    ("suffix", "damage", "reason"),
    [
        (".bin", flip_a_byte, "its sha256 is another one"),
        (".bin", lambda content: content[:-64], "bytes, not"),
        (".bin", lambda content: b"", "bytes, not"),
        (".json", lambda content: content[:-10], "made anew"),
        (".json", lambda content: b"{}", "is not of format"),
        (".json", lambda content: content.replace(b'"weights": "', b'"weights": "0'), "its identity is another one"),
        (".bin", None, "No such file"),
        (".json", None, "No such file"),
    ],
)
def test_damaged_files_are_made_anew(
    config: TrainConfig, tmp_path: Path, suffix: str, damage: Any, reason: str
) -> None:
    config = replace(config, epochs=1, cache="disk")
    whole = train(config, checkpoint=tmp_path)
    file = next(tmp_path.glob(f"features-*-train-*{suffix}"))
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes()))
    again = train(config, checkpoint=tmp_path)
    (note,) = again.cache["notes"]
    assert str(file.with_suffix(".bin")) in note
    assert reason in note
    assert "\n" not in note
    assert not again.cache["reused"]
    assert states_equal(again.model.state_dict(), whole.model.state_dict())
    assert train(config, checkpoint=tmp_path).cache["reused"]


def test_values_of_other_code_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    """A whole file with the right key whose values are not the model's."""
    config = replace(config, epochs=1, cache="disk")
    train(config, checkpoint=tmp_path)
    file = next(tmp_path.glob("features-*-train-*.bin"))
    head = json.loads(file.with_suffix(".json").read_text())
    layouts = [TensorSpec(tuple(t["shape"]), getattr(torch, t["dtype"])) for t in head["tensors"]]
    files.write(file, head["identity"], layouts, [(0, [torch.ones(layout.shape) for layout in layouts])])
    again = train(config, checkpoint=tmp_path)
    assert "not those that the model computes" in again.cache["notes"][0]


def test_a_full_disk(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sha256_of", full)
    result = train(replace(config, epochs=1, cache="disk"), checkpoint=tmp_path)
    assert result.cache["kind"] == "off"
    assert "No space left on device" in result.cache["reason"]
    assert not list(tmp_path.glob("features-*"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_files_hold_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    a, b = (torch.arange(5 * n).reshape(5, n).to(dtype) for n in (3, 7))
    layouts = [TensorSpec(tuple(t.shape), dtype) for t in (a, b)]
    files.write(tmp_path / "x.bin", {"a": 1}, layouts, [(0, [a[:2], b[:2]]), (2, [a[2:], b[2:]])])
    read = files.read(tmp_path / "x.bin", {"a": 1}, layouts)
    assert read is not None
    assert read[0].equal(a)
    assert read[1].equal(b)
    assert files.read(tmp_path / "y.bin", {}, layouts) is None
    with pytest.raises(files.Refused, match="identity"):
        files.read(tmp_path / "x.bin", {"a": 2}, layouts)
    with pytest.raises(files.Refused, match="tensors"):
        files.read(tmp_path / "x.bin", {"a": 1}, layouts[:1])

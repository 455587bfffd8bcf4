"""Built-in networks against the papers' numbers, and factories of every kind."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gf_tvm.errors import ModelError
from gf_tvm.models import LAST_MAP, BasicBlock, InvertedResidual, build_model, logits_of


def convolution_outputs(model: nn.Module, image_size: int, batch: int = 1) -> list[tuple[str, tuple[int, ...]]]:
    """(name, output shape without the batch) of every convolution, in the order in which they run."""
    shapes: list[tuple[str, tuple[int, ...]]] = []
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: shapes.append((name, tuple(out.shape[1:]))))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad():
        model.eval()(torch.zeros(batch, 3, image_size, image_size))
    for hook in hooks:
        hook.remove()
    return shapes


# The numbers of parameters are those of the papers' networks as everybody implements them (torchvision's, for one).
@pytest.mark.parametrize(
    ("name", "parameters", "convolutions", "last"),
    [
        ("mobilenetv2", 3_504_872, 52, (1280, 7, 7)),
        ("resnet18", 11_689_512, 20, (512, 7, 7)),
        ("resnet34", 21_797_672, 36, (512, 7, 7)),
    ],
)
def test_networks_of_the_papers(name: str, parameters: int, convolutions: int, last: tuple[int, ...]) -> None:
    model = build_model(name, 1000, image_size=224)
    assert sum(p.numel() for p in model.parameters()) == parameters
    outputs = convolution_outputs(model, 224)
    assert len(outputs) == convolutions
    assert outputs[0][1][1:] == (112, 112)
    assert outputs[-1][1] == last


def test_mcunet_has_the_published_size() -> None:
    """0.64 M parameters and 12.8 M multiplications at 96 pixels, as the authors' model zoo says of mcunet-in1."""
    model = build_model("mcunet", 1000, image_size=96)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 0.64
    outputs = dict(convolution_outputs(model, 96))
    weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    pixels = {name: shape[1] * shape[2] for name, shape in outputs.items()}
    multiplications = sum(pixels[name] * weight.numel() for name, weight in weights.items()) + 160 * 1000
    assert round(multiplications / 1e6, 1) == 12.8
    assert list(outputs.values())[-1] == (160, 3, 3)
    kernels = [weight.shape[-1] for weight in weights.values() if weight.shape[1] == 1 and weight.shape[-1] > 1]
    assert kernels == [3, 3, 3, 7, 3, 3, 7, 5, 3, 3, 7, 5, 5, 3]


@pytest.mark.parametrize("name", ["mobilenetv2_025", "resnet18_025", "resnet34_025", "mcunet_050"])
def test_small_images_keep_maps_that_patches_fit(name: str) -> None:
    outputs = convolution_outputs(build_model(name, 10, image_size=32), 32)
    assert outputs[0][1][1:] == (32, 32)  # no stride in the stem, no pooling
    assert {shape[1:] for _, shape in outputs[-4:]} == {(8, 8)}


def test_last_convolutions_of_a_resnet_are_3x3() -> None:
    model = build_model("resnet18_025", 10)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert names[-4:] == ["layer4.0.conv1", "layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2"]
    assert [name for name, _ in convolution_outputs(model, 32)] == names  # registered as they run


@settings(max_examples=25)
@given(st.sampled_from(["mobilenetv2_010", "resnet18_010", "mcunet_010"]), st.integers(1, 160))
def test_any_image_size(name: str, image_size: int) -> None:
    model = build_model(name, 3, image_size=image_size)
    outputs = convolution_outputs(model, image_size)
    smallest = 3 if name == "mcunet_010" and image_size >= 96 else LAST_MAP
    assert min(min(shape[1:]) for _, shape in outputs) >= min(smallest, image_size)
    with torch.no_grad():
        assert model(torch.zeros(2, 3, image_size, image_size)).shape == (2, 3)


def test_width_scales_channels() -> None:
    def channels(name: str) -> list[int]:
        return [shape[0] for _, shape in convolution_outputs(build_model(name, 10), 32)]

    assert [c / f for c, f in zip(channels("resnet18_050"), channels("resnet18"), strict=True)] == [0.5] * 20
    # The paper rounds to multiples of 8 and never takes away more than a tenth.
    for c, f in zip(channels("mobilenetv2_035"), channels("mobilenetv2"), strict=True):
        assert c % 8 == 0
        assert c >= max(0.9 * 0.35 * f, 8)


def test_residuals() -> None:
    x = torch.rand(2, 8, 6, 6)
    kept, changed = InvertedResidual(8, 8, 1, 6), InvertedResidual(8, 16, 1, 6)
    strided, block = InvertedResidual(8, 8, 2, 6), BasicBlock(8, 8, 1)
    for module in (kept, changed, strided):
        nn.init.zeros_(module.conv[-1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(block.bn2.weight)
    with torch.no_grad():
        assert kept(x).equal(x)
        assert not changed(x).any()
        assert not strided(x).any()
        assert block(x).equal(x)  # x is not negative, so ReLU keeps it
        projected = BasicBlock(8, 16, 2).eval()
        nn.init.zeros_(projected.bn2.weight)
        torch.testing.assert_close(projected(x), projected.downsample(x).relu())


def test_in_channels_and_gradients() -> None:
    for name in ("mobilenetv2_010", "resnet18_010", "mcunet_010", "resnet34_010"):
        model = build_model(name, 5, in_channels=1, image_size=16)
        loss = model(torch.randn(4, 1, 16, 16)).logsumexp(1).sum()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_seeded_weights() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in build_model("resnet18_010", 10).parameters()])

    assert weights(1).equal(weights(1))
    assert not weights(1).equal(weights(2))


@pytest.mark.parametrize(
    "name", ["", "resnet", "resnet18_25", "resnet18_000", "resnet18_025_", "ResNet18", "a.b", "_025"]
)
def test_unknown_names_list_the_known(name: str) -> None:
    with pytest.raises(ModelError) as error:
        build_model(name, 10)
    message = str(error.value)
    assert repr(name) in message
    assert all(
        known in message for known in ("mobilenetv2", "mcunet", "fcn", "mobilenetv2_050", "package.module:factory")
    )
    assert "\n" not in message


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "10"])
@pytest.mark.parametrize("what", ["num_classes", "in_channels", "image_size"])
def test_sizes_are_positive_integers(what: str, value: Any) -> None:
    with pytest.raises(ModelError, match=what):
        build_model("resnet18", **{"num_classes": 10, what: value})


# --- factories --------------------------------------------------------------------------------------------------------


@pytest.fixture
def factories(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module ``user_models`` whose factories record how they were called."""
    module = types.ModuleType("user_models")
    calls: list[dict[str, Any]] = []

    def linear(**values: Any) -> nn.Module:
        calls.append(values)
        return nn.Linear(4, 4)

    class Nested:
        @staticmethod
        def make(num_classes: int) -> nn.Module:
            return linear(num_classes=num_classes)

    class Net(nn.Linear):
        def __init__(self, num_classes: int = 7) -> None:
            super().__init__(4, num_classes)
            calls.append({"num_classes": num_classes})

    def raises() -> nn.Module:
        raise RuntimeError("no weights\nhere")

    vars(module).update(
        calls=calls,
        plain=lambda: linear(),  # noqa: PLW0108 (takes no arguments)
        classes=lambda num_classes: linear(num_classes=num_classes),
        everything=lambda image_size, in_channels, num_classes: linear(i=image_size, c=in_channels, n=num_classes),
        keywords=linear,
        positional=lambda num_classes, /: linear(num_classes=num_classes),
        Nested=Nested,
        Net=Net,
        raises=raises,
        returns_none=lambda: None,
        instance=nn.Linear(2, 2),
        number=3,
    )
    monkeypatch.setitem(sys.modules, "user_models", module)
    return module


@pytest.mark.parametrize(
    ("factory", "call"),
    [
        ("plain", {}),
        ("classes", {"num_classes": 10}),
        ("everything", {"i": 28, "c": 1, "n": 10}),
        ("keywords", {"num_classes": 10}),
        ("Nested.make", {"num_classes": 10}),
        ("Net", {"num_classes": 10}),
    ],
)
def test_factories_get_what_they_accept(factories: types.ModuleType, factory: str, call: dict[str, Any]) -> None:
    assert isinstance(build_model(f"user_models:{factory}", 10, in_channels=1, image_size=28), nn.Module)
    assert factories.calls == [call]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("user_models:missing", "user_models has no missing"),
        ("user_models:Nested.missing", "user_models has no Nested.missing"),
        ("user_models:raises", "the factory failed: RuntimeError: no weights here"),
        ("user_models:positional", "the factory failed: TypeError"),
        ("user_models:returns_none", "must return an nn.Module, got NoneType"),
        ("user_models:instance", "must be a callable that returns an nn.Module, got Linear"),
        ("user_models:number", "must be a callable that returns an nn.Module, got int"),
        ("no_such_module_anywhere:f", "cannot import no_such_module_anywhere: ModuleNotFoundError"),
        ("user_models:", "must have the form package.module:factory"),
        (":factory", "must have the form package.module:factory"),
        (".models:factory", "must have the form package.module:factory"),
    ],
)
def test_bad_factories_give_one_line(factories: types.ModuleType, name: str, message: str) -> None:
    with pytest.raises(ModelError) as error:
        build_model(name, 10)
    assert message in str(error.value)
    assert repr(name) in str(error.value)
    assert "\n" not in str(error.value)


def test_modules_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gf_tvm_test_models.py").write_text("from torch import nn\ndef make(): return nn.Identity()\n")
    (tmp_path / "gf_tvm_test_broken.py").write_text("import nothing_of_that_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = list(sys.path)
    assert isinstance(build_model("gf_tvm_test_models:make", 10), nn.Identity)
    with pytest.raises(ModelError, match="No module named 'nothing_of_that_name'"):
        build_model("gf_tvm_test_broken:make", 10)
    assert sys.path == before
    del sys.modules["gf_tvm_test_models"]


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_logits_of() -> None:
    logits = torch.zeros(2, 5)
    assert logits_of(logits) is logits
    assert logits_of(types.SimpleNamespace(logits=logits)) is logits
    for bad, message in ((None, "NoneType"), ({"out": logits}, "dict"), (types.SimpleNamespace(logits=3), "SimpleN")):
        with pytest.raises(ModelError, match=message):
            logits_of(bad)
    with pytest.raises(ModelError, match=r"\(2, 5, 8, 8\)"):
        logits_of(torch.zeros(2, 5, 8, 8))
    with pytest.raises(ModelError, match=r"\(images, classes, height, width\), got \(2, 5\)"):
        logits_of(logits, dims=4)


@pytest.mark.parametrize("factory", ["transformers_mobilenetv2", "transformers_resnet"])
def test_transformers_models(factory: str) -> None:
    pytest.importorskip("transformers")
    model = build_model(f"training_models:{factory}", 6, image_size=32)
    with torch.no_grad():
        assert logits_of(model(torch.zeros(2, 3, 32, 32))).shape == (2, 6)

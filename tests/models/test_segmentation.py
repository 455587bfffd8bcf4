"""Segmentation networks filtered and trained; the task's loss and score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gf_tvm
from gf_tvm.core import reference
from gf_tvm.errors import ModelError
from gf_tvm.models import HEADS, build_model
from gf_tvm.models.classification import TRUNKS
from gf_tvm.nn import FilteredConv2d
from gf_tvm.runners import cli
from gf_tvm.shapes import model_cases
from gf_tvm.training import TrainConfig
from gf_tvm.training.data import IGNORED, Images
from gf_tvm.training.loop import is_batch_norm
from gf_tvm.training.tasks import MeanIoU, Segmentation, objective_of

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 16
NETWORKS = [f"{head}_{trunk}_010" for head in HEADS for trunk in TRUNKS]


def tiny(name: str, size: int = SIZE, classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, classes, image_size=size)


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_have_the_images_size(name: str) -> None:
    model = tiny(name).eval()
    for height, width in ((SIZE, SIZE), (13, 18)):
        with torch.no_grad():
            assert model(torch.randn(1, 3, height, width)).shape == (1, 5, height, width)


def test_every_pixel_sees_its_own_place() -> None:
    """A change in one corner changes that corner's logits most: nothing is mirrored or mixed up on the way."""
    for name in ("fcn_resnet18_010", "upernet_mobilenetv2_010", "deeplabv3_efficientnet_lite0_010"):
        model = tiny(name, 64).eval()
        x = torch.randn(1, 3, 64, 64)
        changed = x.clone()
        changed[..., :12, 52:] += 3
        with torch.no_grad():
            change = (model(changed) - model(x)).abs().sum(dim=(0, 1))
        quarter = {
            (i, j): float(change[32 * i : 32 * i + 32, 32 * j : 32 * j + 32].sum()) for i in (0, 1) for j in (0, 1)
        }
        assert max(quarter, key=quarter.__getitem__) == (0, 1)


@pytest.mark.parametrize("size", [32, 64, 128, 512])
def test_dilated_trunks_and_rates(size: int) -> None:
    """The last map is an eighth of the image, below 128 pixels a quarter; what strides would do, dilation does."""
    with torch.device("meta"):
        model = build_model("deeplabv3_resnet18", 5, image_size=size)
        upernet = build_model("upernet_resnet18", 5, image_size=size)
        maps = model.trunk.maps(torch.empty(1, 3, size, size))  # type: ignore[operator, union-attr]
        pyramid = upernet.trunk.maps(torch.empty(1, 3, size, size))  # type: ignore[operator, union-attr]
    last = size // (4 if size < 128 else 8)
    assert maps[-1].shape[-2:] == (last, last)
    assert pyramid[-1].shape[-1] == max(size // 8 if size < 128 else size // 32, 8)
    dilations = {name: m.dilation[0] for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert dilations["trunk.layer4.1.conv2"] == (4 if size >= 128 else 2)
    assert dilations["trunk.layer4.0.conv1"] == (2 if size >= 128 else 1)
    rates = [dilations[f"head.branches.{i}.0"] for i in (1, 2, 3)]
    assert rates == {32: [2, 3, 4], 64: [3, 6, 9], 128: [3, 6, 9], 512: [12, 24, 36]}[size]
    assert all(m.dilation == (1, 1) for m in upernet.modules() if isinstance(m, nn.Conv2d))


def test_classes_do_not_change_the_convolutions() -> None:
    """A bundle that is built for a network serves it with any number of classes."""
    few, many = (build_model("pspnet_resnet18_010", n, image_size=32) for n in (2, 21))
    shapes = [[m.weight.shape for m in model.modules() if isinstance(m, nn.Conv2d)] for model in (few, many)]
    assert shapes[0] == shapes[1]
    cases = model_cases(few, (2, 3, 32, 32), last=6, patches=[2])
    assert cases
    assert any(
        case.geometry.dilation != (1, 1) for case in model_cases(tiny("deeplabv3_resnet18_010"), (2, 3, 16, 16), last=6)
    )


class ReferenceConv(torch.autograd.Function):
    """The filtered convolution from :mod:`gf_tvm.core.reference` alone, without gf_tvm's operators."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: FilteredConv2d) -> Tensor:
        from gf_tvm.core.geometry import Geometry

        ctx.geometry = Geometry(
            n=x.shape[0],
            ci=x.shape[1],
            h=x.shape[2],
            w=x.shape[3],
            co=layer.out_channels,
            kernel=layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            patch=layer.patch,
        )
        ctx.save_for_backward(reference.filter_input(x, ctx.geometry), weight)
        return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        saved, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        return (*reference.backward(grad_y, saved, weight, ctx.geometry, needs), None)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", NETWORKS)
def test_filtered_gradients_are_the_references(name: str, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the head's convolutions and some of the trunk's, batch norms in evaluation or training mode."""
    model = tiny(name).double()
    in_head = sum(isinstance(m, nn.Conv2d) for m in model.head.modules())  # type: ignore[union-attr]
    last = in_head + 4
    gf_tvm.filter_model(model, patch=2, last=last)
    report = gf_tvm.filter_report(model)
    assert len(report.filtered) == last
    assert sum(layer.startswith("head.") for layer in report.filtered) == in_head
    assert set(report.left_alone.values()) == {"not selected"}
    model.train()
    if frozen:
        for module in model.modules():
            if is_batch_norm(module):
                module.eval()
    x = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    y = torch.randint(0, 5, (2, SIZE, SIZE), dtype=torch.uint8)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        Segmentation().loss(model(x), y).backward()  # type: ignore[no-untyped-call]
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    found = gradients()
    assert set(found) == {key for key, _ in model.named_parameters()}
    with monkeypatch.context() as patched:
        patched.setattr(
            FilteredConv2d, "forward", lambda self, input: ReferenceConv.apply(input, self.weight, self.bias, self)
        )
        expected = gradients()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-9, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")
    gf_tvm.unfilter_model(model)
    exact = gradients()
    assert any(not torch.allclose(exact[key], found[key], rtol=1e-3) for key in found)  # it was filtered at all
    top = next(key for key in exact if key.startswith("classifier"))
    torch.testing.assert_close(exact[top], found[top])


def test_one_image_trains() -> None:
    """Pooling to one cell leaves no statistics for a batch norm."""
    for head in ("pspnet", "deeplabv3", "upernet"):
        tiny(f"{head}_mobilenetv2_010").train()(torch.randn(1, 3, SIZE, SIZE)).sum().backward()


# --- the task ---------------------------------------------------------------------------------------------------------


def test_mean_iou() -> None:
    y = torch.tensor([[[0, 0, 1], [1, 1, IGNORED]], [[0, 0, 0], [0, 0, 0]]], dtype=torch.uint8)
    predicted = torch.tensor([[[0, 1, 1], [1, 2, 2]], [[0, 0, 0], [0, 0, 3]]])
    logits = F.one_hot(predicted, 5).movedim(-1, 1).float()
    # class 0: 6 pixels right, 8 labelled, 6 predicted; class 1: 2 right, 3 labelled, 3 predicted; others: not labelled
    expected = (6 / 8 + 2 / 4) / 2
    whole, apart = MeanIoU(), MeanIoU()
    whole.add(logits, y)
    for image in range(2):
        apart.add(logits[image : image + 1], y[image : image + 1])
    assert whole.value() == apart.value() == pytest.approx(expected)
    nothing = MeanIoU()
    assert nothing.value() == 0
    nothing.add(logits, torch.full_like(y, IGNORED))
    assert nothing.value() == 0


def test_loss_ignores_pixels_and_enlarges_logits() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 8, 8, requires_grad=True)
    y = torch.randint(0, 3, (2, 8, 8), dtype=torch.uint8)
    y[:, :3] = IGNORED
    loss = Segmentation().loss(logits, y)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, :, 3:], y[:, 3:].long()))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not bool(gradient[:, :, :3].any())
    small = logits.detach()[..., ::2, ::2]
    large = F.interpolate(small, size=(8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(Segmentation().loss(small, y), Segmentation().loss(large, y))
    scores = MeanIoU(), MeanIoU()
    scores[0].add(small, y)
    scores[1].add(large, y)
    assert scores[0].value() == scores[1].value()
    assert Segmentation().loss(logits, torch.full_like(y, IGNORED)) == 0


def test_task_follows_the_labels() -> None:
    x, classes = torch.zeros(2, 3, 4, 4), ("a", "b")
    assert objective_of(Images(x, torch.zeros(2, dtype=torch.long), classes)).metric == "accuracy"
    segmentation = objective_of(Images(x, torch.zeros(2, 4, 4, dtype=torch.uint8), classes))
    assert (segmentation.name, segmentation.metric) == ("segmentation", "mIoU")
    with pytest.raises(ModelError, match="height, width"):
        segmentation.logits(torch.zeros(2, 2))


def squares(folder: Path, count: int = 60, size: int = 16) -> str:
    """A VOC-style folder of bright (class 1) and dark (class 2) squares on grey."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for part in ("JPEGImages", "SegmentationClass"):
        (folder / part).mkdir(parents=True)
    for number in range(count):
        image, mask = rng.normal(128, 10, (size, size, 3)), np.zeros((size, size), np.uint8)
        side, label = rng.integers(5, 9), number % 2 + 1
        top, left = rng.integers(0, size - side, 2)
        image[top : top + side, left : left + side] += 100 if label == 1 else -100
        mask[top : top + side, left : left + side] = label
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "JPEGImages" / f"{number}.png")
        Image.fromarray(mask).save(folder / "SegmentationClass" / f"{number}.png")
    return str(folder)


def test_train_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    options = [
        "--model",
        "fcn_resnet18_025",
        "--data",
        squares(tmp_path / "voc", 160),
        "--image-size",
        "16",
        "--last",
        "2",
    ]
    options += ["--batch", "8", "--pretrain-epochs", "10", "--epochs", "2", "--shift", "1", "--skew", "0.8"]
    options += ["--patch", "exact,2", "--no-chain"]
    arguments = ["train", "--protocol", "paper", *options, "--json", str(out), "--checkpoint", str(tmp_path / "c")]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr()
    assert "mIoU train" in shown.err
    assert "accuracy" not in shown.err
    assert "(mIoU)" in shown.out
    runs = json.loads(out.read_text())["runs"]
    assert [(run["variant"], run["task"], run["metric"]) for run in runs] == [
        ("exact", "segmentation", "mIoU"),
        ("R2", "segmentation", "mIoU"),
    ]
    for run in runs:
        assert TrainConfig(**run["config"]).model == "fcn_resnet18_025"
        assert run["head"] == "classifier"
        assert len(run["trained_layers"]) == 2
        assert run["test_accuracy"] > 0.45  # 0.28 if everything is taken for background
    kept = [run["rows"][0]["kept_bytes_convolutions"] for run in runs]
    assert kept[0] == 4 * kept[1]
    assert cli.main([*arguments, "--resume"]) == 0
    assert json.loads(out.read_text())["runs"][1]["rows"] == runs[1]["rows"]


def test_a_classifier_is_refused_for_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = squares(tmp_path / "voc")
    sizes = ["--image-size", "16", "--batch", "8"]
    assert cli.main(["train", "--protocol", "paper", "--model", "resnet18_010", "--data", data, *sizes]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "must have shape (images, classes, height, width), got (2, 3)" in error
    arguments = ["train", "--protocol", "paper", "--model", "fcn_resnet18_010", "--data", "digits", *sizes]
    assert cli.main(arguments) == 2
    assert "must have shape (images, classes), got (2, 10, 16, 16)" in capsys.readouterr().err


def test_transformers_segmentation() -> None:
    """Hugging Face's own networks, whose logits are smaller than the image."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileNetV2Config(num_labels=4, image_size=32, depth_multiplier=0.1, output_stride=8)
    model = transformers.MobileNetV2ForSemanticSegmentation(config).eval()
    gf_tvm.filter_model(model, patch=2, last=4)
    logits = Segmentation().logits(model(torch.randn(2, 3, 32, 32)))
    assert logits.shape[-1] < 32
    Segmentation().loss(logits, torch.randint(0, 4, (2, 32, 32), dtype=torch.uint8)).backward()  # type: ignore[no-untyped-call]
    layers = [module for module in model.modules() if isinstance(module, FilteredConv2d)]
    assert len(layers) == 4
    assert all(layer.weight.grad is not None for layer in layers)

"""A person's job: pictures in a folder, a network with its weights, and a model that is used without gf_tvm."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from photo_folders import CLASSES, photo, photos
from torch import nn

import gf_tvm
from gf_tvm.errors import ModelError, PictureError
from gf_tvm.models import Preprocessing, build_model
from gf_tvm.training import TrainingError
from gf_tvm.training.data.pictures import Skipped
from gf_tvm.training.job import (
    JobConfig,
    JobResult,
    export_onnx,
    fine_tune_model,
    load_model,
    memory,
    predict,
    saved,
)
from gf_tvm.training.job import dataset as datasets
from gf_tvm.training.job.dataset import find_pictures
from gf_tvm.training.trainer import freeze

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = "training_models:tiny"


def job(data: str, **values: Any) -> JobConfig:
    values = {"model": TINY, "image_size": 8, "batch": 8, "epochs": 3, "last": 1, "lr": 0.1, **values}
    return JobConfig(data=data, **values)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return photos(tmp_path / "photos")


# --- the job ----------------------------------------------------------------------------------------------------------


def test_job(data: str, tmp_path: Path) -> None:
    lines: list[str] = []
    config = job(data, epochs=6, lr=0.2, train_bn_affine=True)
    result = fine_tune_model(config, out := tmp_path / "out", say=lines.append)
    assert result.classes == tuple(sorted(CLASSES))
    assert result.counts == {"train": 24, "validation": 6}
    assert result.accuracy == max(row.test_accuracy for row in result.rows)
    assert result.accuracy >= 5 / 6  # one colour is stronger than the others
    assert lines[0].startswith("24 pictures to train on, 6 for validation (20 % of each class")
    assert "R2 chained" in lines[-1]
    assert sum(map(sum, result.confusion)) == 6
    right = sum(result.confusion[i][i] for i in range(3))
    assert right / 6 == pytest.approx(result.accuracy)
    names = {"config.json", "model.safetensors", "metrics.json", "curves.png", "confusion.png"}
    assert {path.name for path in out.iterdir()} == names
    written = json.loads((out / "metrics.json").read_text())
    assert written == json.loads(json.dumps(result.to_dict(), default=str))
    about = json.loads((out / "config.json").read_text())
    assert about["classes"] == list(result.classes)
    assert about["training"]["accuracy"] == result.accuracy
    assert JobConfig(**about["training"]["config"]) == config
    assert not any(isinstance(module, gf_tvm.FilteredConv2d) for module in result.model.modules())
    # What was left says what was measured.
    loaded = load_model(out)
    pictures = list(Path(data).rglob("*.png"))
    said = [one for one in predict(loaded, pictures, top=3) if not isinstance(one, PictureError)]
    assert len(said) == 30
    assert all(sum(share for _, share in one.classes) == pytest.approx(1) for one in said)
    named = sum(one.classes[0][0] == one.picture.parent.name for one in said)
    assert named >= 25
    for name, value in loaded.model.state_dict().items():
        assert value.equal(result.model.state_dict()[name])


def test_all_are_used_where_there_are_fewer_than_a_batch(data: str, tmp_path: Path) -> None:
    result = fine_tune_model(job(data, batch=100, epochs=1), tmp_path / "out")
    assert result.batch == 24
    assert result.rows[0].steps == 1


def test_the_best_epochs_weights_are_left(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gf_tvm.training import loop

    scores = iter([0.0, 0.2, 0.9, 0.5, 0.9])
    states: list[dict[str, Any]] = []

    def score(model: nn.Module, *_: Any, **__: Any) -> float:
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return next(scores)

    monkeypatch.setattr(loop, "accuracy_of", score)
    result = fine_tune_model(job(data, epochs=4), tmp_path / "out")
    assert (result.best_epoch, result.accuracy) == (2, 0.9)
    assert all(value.equal(states[2][name]) for name, value in result.model.state_dict().items())


def test_exact_and_filtered_at_patch_1(data: str, tmp_path: Path) -> None:
    """1x1 convolutions filtered in patches of one pixel have the exact gradients, so the same model is left."""
    found = []
    for patch in ("exact", 1):
        config = job(data, model="training_models:pointwise", patch=patch, last=3)
        found.append(fine_tune_model(config, tmp_path / f"out{patch}").model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-4)


def interrupted_after(epochs: int, steps: int = 3) -> Any:
    calls = 0

    def follow(event: Any) -> None:
        nonlocal calls
        if event.epoch == epochs + 1 and event.step == 1:
            raise KeyboardInterrupt

    return follow


def test_an_interrupted_job_goes_on(data: str, tmp_path: Path) -> None:
    config = job(data, epochs=4)
    whole = fine_tune_model(config, tmp_path / "whole")
    out, lines = tmp_path / "out", list[str]()
    with pytest.raises(KeyboardInterrupt):
        fine_tune_model(config, out, callback=interrupted_after(2))
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt"}
    with pytest.raises(TrainingError, match="interrupted: --resume goes on"):
        fine_tune_model(config, out)
    with pytest.raises(TrainingError, match=r"of another run: lr=0.1"):
        fine_tune_model(job(data, epochs=4, lr=0.3), out, resume=True)
    result = fine_tune_model(config, out, resume=True, say=lines.append)
    assert result.resumed == 2
    assert "going on after epoch 2 of 4" in lines
    assert [row.train_loss for row in result.rows] == [row.train_loss for row in whole.rows]
    assert result.initial_accuracy == whole.initial_accuracy
    for name, value in result.model.state_dict().items():
        assert value.equal(whole.model.state_dict()[name])
    assert not (out / "checkpoint.pt").exists()
    for resume in (False, True):
        with pytest.raises(TrainingError, match="has a finished model"):
            fine_tune_model(config, out, resume=resume)
    with pytest.raises(TrainingError, match="no interrupted job"):
        fine_tune_model(config, tmp_path / "new", resume=True)


def test_other_pictures_are_another_job(data: str, tmp_path: Path) -> None:
    config, out = job(data, epochs=2), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        fine_tune_model(config, out, callback=interrupted_after(1))
    for path in (Path(data) / CLASSES[1]).iterdir():
        path.write_bytes(path.read_bytes() + b"\0")  # still pictures, of another size
    with pytest.raises(TrainingError, match="of another run: "):
        fine_tune_model(config, out, resume=True)


# --- pictures ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(counts=st.lists(st.integers(2, 12), min_size=2, max_size=4), share=st.floats(0.01, 0.99), seed=st.integers(0, 9))
def test_every_class_is_in_both_parts(counts: list[int], share: float, seed: int) -> None:
    files = [(Path(f"{label}/{number}"), label) for label, count in enumerate(counts) for number in range(count)]
    names = tuple(str(label) for label in range(len(counts)))
    found = datasets._split(names, files, share, seed, Skipped(), "data")
    assert sorted([*found.train, *found.validation]) == sorted(files)
    assert {label for _, label in found.train} == {label for _, label in found.validation} == set(range(len(counts)))
    for label, count in enumerate(counts):
        taken = sum(other == label for _, other in found.validation)
        assert abs(taken - count * share) <= 1
    again = datasets._split(names, files, share, seed, Skipped(), "data")
    assert (again.train, again.validation) == (found.train, found.validation)


def test_a_class_of_one_picture_is_named(tmp_path: Path) -> None:
    folder = Path(photos(tmp_path / "photos", 1))
    photo(0, 7).save(folder / CLASSES[0] / "more.png")
    with pytest.raises(ModelError, match=rf"the class {CLASSES[1]!r} of .* has 1 picture, and at least 2"):
        fine_tune_model(job(str(folder)), tmp_path / "out")


def test_folders_train_and_val(tmp_path: Path) -> None:
    photos(tmp_path / "data" / "train", 6)
    photos(tmp_path / "data" / "val", 2, first=50)
    found = find_pictures(str(tmp_path / "data"), 0.2, 0, Skipped(), 8)
    assert (len(found.train), len(found.validation)) == (18, 6)
    assert all("train" in path.parts for path, _ in found.train if isinstance(path, Path))
    assert "as the folders 'train' and 'val' say" in found.how
    labels = {path.parent.name: label for path, label in found.validation if isinstance(path, Path)}
    assert all(found.classes[label] == name for name, label in labels.items())
    (tmp_path / "data" / "val" / CLASSES[0]).rename(tmp_path / "data" / "val" / "aardvark")
    with pytest.raises(ModelError, match=r"the class 'aardvark' is in .*, but not in"):
        find_pictures(str(tmp_path / "data"), 0.2, 0, Skipped(), 8)


def test_a_folder_train_alone_is_split(tmp_path: Path) -> None:
    photos(tmp_path / "data" / "train", 5)
    found = find_pictures(str(tmp_path / "data"), 0.2, 0, Skipped(), 8)
    assert (len(found.train), len(found.validation)) == (12, 3)


def test_broken_files_are_counted(data: str, tmp_path: Path) -> None:
    folder, lines = Path(data) / CLASSES[0], list[str]()
    (folder / "text.jpg").write_text("no picture")
    content = (folder / "0 ✿.png").read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) * 2 // 3])
    result = fine_tune_model(job(data, epochs=1), tmp_path / "out", say=lines.append)
    assert result.skipped == 2
    assert f"skipped 2 of 32 pictures in {data!r} (--strict: stop at the first)" in lines
    with pytest.raises(PictureError, match=r"text.jpg"):
        fine_tune_model(job(data, epochs=1, strict=True), tmp_path / "strict")


def test_data_that_are_no_folder(tmp_path: Path) -> None:
    x = np.stack([np.asarray(photo(i % 2, i, (8, 8))) for i in range(20)])
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(20) % 2)
    found = find_pictures(str(tmp_path / "d.npz"), 0.2, 0, Skipped(), 8)
    assert (len(found.train), len(found.validation)) == (16, 4)
    pixels, label = found.train[0]
    assert any(np.array_equal(pixels, one) and i % 2 == label for i, one in enumerate(x))  # type: ignore[arg-type]
    digits = find_pictures("digits", 0.2, 0, Skipped(), 224)
    assert len(digits.train) + len(digits.validation) == 1797
    assert np.shape(digits.train[0][0]) == (8, 8, 3)


@pytest.mark.parametrize("name", ["scenes", "voc"])
def test_masks_are_another_job(name: str, tmp_path: Path) -> None:
    for folder in ("JPEGImages", "SegmentationClass"):
        (tmp_path / folder).mkdir()
    with pytest.raises(ModelError, match=r"has masks.* use --protocol paper"):
        find_pictures("scenes" if name == "scenes" else str(tmp_path), 0.2, 0, Skipped(), 8)


# --- networks and weights ---------------------------------------------------------------------------------------------


def test_a_built_in_network_needs_weights(data: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'resnet18_010' has random weights.*--weights FILE.*efficientnet_lite0"):
        fine_tune_model(job(data, model="resnet18_010"), tmp_path / "out")
    with pytest.raises(ModelError, match="unknown model 'resnet19'"):
        fine_tune_model(job(data, model="resnet19"), tmp_path / "out")


def test_weights_from_a_file(data: str, tmp_path: Path) -> None:
    """Frozen layers keep the file's weights, the classifier is a new one, and that is said."""
    before = build_model("resnet18_010", 7, image_size=32).state_dict()
    torch.save(before, tmp_path / "w.pth")
    lines: list[str] = []
    config = job(data, model="resnet18_010", weights=str(tmp_path / "w.pth"), image_size=32, epochs=1)
    result = fine_tune_model(config, tmp_path / "out", say=lines.append)
    assert f"weights: {tmp_path / 'w.pth'}" in lines
    assert "a new classifier: 3 classes instead of 7" in lines
    after = result.model.state_dict()
    assert result.trained_layers == ("layer4.1.conv2",)
    trained = {name for name in before if not name.startswith("fc") and not after[name].equal(before[name])}
    assert trained == {"layer4.1.conv2.weight"}


def test_imagenet_weights(tmp_path: Path) -> None:
    """Lite0 from its package: what is not trained is as it was published, and pictures are prepared for it."""
    from gf_tvm.models import find_weights

    data = photos(tmp_path / "photos", 2)
    config = job(data, model="efficientnet_lite0", epochs=1, image_size=32, batch=2)
    result = fine_tune_model(config, tmp_path / "out")
    published = find_weights("imagenet", "efficientnet_lite0")
    assert published.preprocessing is not None
    assert result.preprocessing == published.preprocessing.at(32)
    assert "weights: imagenet" in result.how
    state = result.model.state_dict()
    changed = {name for name, value in published.state.items() if not value.equal(state[name])}
    assert changed == {"features.17.0.weight", "classifier.1.weight", "classifier.1.bias"}
    assert load_model(tmp_path / "out").preprocessing == result.preprocessing


def test_another_job_begins_with_the_model_of_one(data: str, tmp_path: Path) -> None:
    first = fine_tune_model(job(data, epochs=1), tmp_path / "first")
    lines: list[str] = []
    config = job(data, model=str(tmp_path / "first"), image_size=None, epochs=1)
    second = fine_tune_model(config, tmp_path / "second", say=lines.append)
    assert second.initial_accuracy == first.accuracy
    assert second.preprocessing == first.preprocessing
    assert not any("new classifier" in line for line in lines)
    other = tmp_path / "two"
    for name in CLASSES[:2]:
        (other / name).parent.mkdir(exist_ok=True)
        (Path(data) / name).rename(other / name)
    third = fine_tune_model(job(str(other), model=str(tmp_path / "first"), epochs=1), tmp_path / "third")
    assert "a new classifier: 2 classes instead of 3" in third.how
    assert load_model(tmp_path / "third").model(torch.zeros(1, 3, 8, 8)).shape == (1, 2)


def test_a_factory_with_other_classes(data: str, tmp_path: Path) -> None:
    result = fine_tune_model(job(data, model="training_models:two_classes", epochs=1), tmp_path / "out")
    assert "a new classifier: 3 classes instead of 2" in result.how
    assert load_model(tmp_path / "out").model(torch.zeros(1, 3, 8, 8)).shape == (1, 3)
    with pytest.raises(ModelError, match=r"must have shape \(images, classes\)"):
        fine_tune_model(job(data, model="training_models:segmentation"), tmp_path / "other")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_of_transformers(data: str, tmp_path: Path) -> None:
    """From a folder of save_pretrained to one that from_pretrained loads, as if nothing had been filtered."""
    transformers = pytest.importorskip("transformers")
    from training_models import transformers_resnet

    before = transformers_resnet(5)
    before.save_pretrained(tmp_path / "hub")
    config = job(data, model=str(tmp_path / "hub"), image_size=32, epochs=1, last=2)
    result = fine_tune_model(config, tmp_path / "out")
    assert "a new classifier: 3 classes instead of 5" in result.how
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        logits = loaded(x).logits
        assert logits.equal(result.model(x).logits)
        assert load_model(tmp_path / "out").model(x).logits.equal(logits)
    assert loaded.config.id2label == dict(enumerate(result.classes))
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert processor["crop_size"] == {"height": 32, "width": 32}


@pytest.mark.parametrize("content", ["{}", "[]", "no json", '{"model_type": "no_such_type"}'])
def test_folders_that_are_no_model(content: str, data: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ModelError, match=r"has no config.json"):
        fine_tune_model(job(data, model=str(tmp_path / "model")), tmp_path / "out")
    (tmp_path / "model" / "config.json").write_text(content)
    with pytest.raises(ModelError) as error:
        fine_tune_model(job(data, model=str(tmp_path / "model")), tmp_path / "out")
    assert str(tmp_path / "model") in str(error.value)
    assert "\n" not in str(error.value)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_too_large_a_batch_names_one_that_fits(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gf_tvm.machine import cpu

    config = job(data, model="resnet18_025", weights="none", image_size=64, batch=24)
    model = build_model("resnet18_025", 3, image_size=64)
    names = [name for name, _ in gf_tvm.select_layers(model, last=1)]
    freeze(model, names)
    size = memory.bytes_per_image(model, names, config.steps(64))
    monkeypatch.setattr(cpu, "available_bytes", lambda: int(size * 10.5 / memory.SHARE))
    with pytest.raises(TrainingError, match=r"a step of 24 images needs about .*: --batch 10 fits"):
        fine_tune_model(config, tmp_path / "out")
    monkeypatch.setattr(cpu, "available_bytes", lambda: size // 2)
    with pytest.raises(TrainingError, match="not even one image fits"):
        fine_tune_model(config, tmp_path / "out")


def test_what_filtering_saves_counts() -> None:
    """Filtered convolutions keep less, so larger batches fit."""
    model = build_model("resnet18_025", 3, image_size=64)
    names = [name for name, _ in gf_tvm.select_layers(model, last=4)]
    freeze(model, names)
    gf = JobConfig(TINY, patch=4).steps(64), JobConfig(TINY, patch="exact").steps(64)
    filtered, exact = (memory.bytes_per_image(model, names, config) for config in gf)
    assert filtered < exact
    assert not any(isinstance(module, gf_tvm.FilteredConv2d) for module in model.modules())


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 12 bytes")])
def test_no_memory_while_training(error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(TrainingError, match="not enough memory for a batch of 32: --batch 16 may fit"):
        memory.told_if_too_large(fail, 32)


def test_other_errors_stay_what_they_are() -> None:
    def fail() -> None:
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        memory.told_if_too_large(fail, 32)


# --- what is left, without gf_tvm -------------------------------------------------------------------------------------

PLAIN = """
import sys
sys.modules["gf_tvm"] = None  # importing it fails
sys.path.insert(0, sys.argv[1])
import torch, network
x = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(network.load()(x), sys.argv[3])
"""


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet18_025", 32), ("resnet34_010", 64), ("mobilenetv2_025", 32), ("mcunet", 96), ("efficientnet_lite0", 128)],
)
def test_a_plain_network_gives_the_same_logits(name: str, size: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(name, 3, image_size=size)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    saved.save_model(tmp_path, model, name, size, ("a", "b", "c"), Preprocessing(size, size), {})
    x = torch.randn(2, 3, size, size)
    torch.save(x, tmp_path / "x.pt")
    command = [sys.executable, "-c", PLAIN, str(tmp_path), str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
    subprocess.run(command, check=True)
    with torch.no_grad():
        expected = model.eval()(x)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt", weights_only=True), expected, rtol=1e-5, atol=1e-5)
    loaded = load_model(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(x), expected)
    # And as ONNX, in batches of another size.
    runtime = pytest.importorskip("onnxruntime")
    export_onnx(loaded, tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for n in (1, 2):
        (logits,) = session.run(["logits"], {"image": x[:n].numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected[:n], rtol=1e-3, atol=1e-3)
    properties = session.get_modelmeta().custom_metadata_map
    assert json.loads(properties["classes"]) == ["a", "b", "c"]
    assert Preprocessing.from_dict(json.loads(properties["preprocessing"])) == loaded.preprocessing


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema": "other"}, "not of a model that gf-tvm train made"),
        ({"classes": []}, "must name model, classes"),
        ({"classes": ["a"]}, "do not fit"),
        ({"built_for": 0}, "must name model, classes and built_for"),
        ({"preprocessing": {"size": -1}}, "preprocessing: size"),
        ({"model": "resnet19"}, "unknown model"),
        ({"model": "resnet34_010"}, "do not fit"),
    ],
)
def test_damaged_configurations(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = build_model("resnet18_010", 2)
    saved.save_model(tmp_path, model, "resnet18_010", 32, ("a", "b"), Preprocessing(32, 32), {})
    assert load_model(tmp_path).classes == ("a", "b")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelError, match=said):
        load_model(tmp_path)


def test_predictions_of_pictures_that_cannot_be_read(tmp_path: Path) -> None:
    model = build_model("resnet18_010", 2)
    saved.save_model(tmp_path / "m", model, "resnet18_010", 32, ("a", "b"), Preprocessing(32, 32), {})
    photo(0, 0).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    loaded = load_model(tmp_path / "m")
    found = list(predict(loaded, [tmp_path / "b.png", tmp_path / "a.png", tmp_path / "none.png"], top=9))
    assert isinstance(found[0], PictureError)
    assert not isinstance(found[1], PictureError)
    assert [name for name, _ in found[1].classes] in (["a", "b"], ["b", "a"])
    assert isinstance(found[2], PictureError)
    with pytest.raises(ModelError, match="top must be a positive integer"):
        list(predict(loaded, [], top=0))


def test_results_as_json_keep_everything(data: str, tmp_path: Path) -> None:
    result: JobResult = fine_tune_model(job(data, epochs=1), tmp_path / "out")
    plain = result.to_dict()
    assert set(vars(result)) - {"model"} <= set(plain)
    assert plain["protocol"] == "transfer"
    assert plain["class_accuracy"].keys() == set(result.classes)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"validation": 0}, "validation"),
        ({"validation": 1.0}, "validation"),
        ({"epochs": 0}, "epochs"),
        ({"lr": 0}, "lr"),
        ({"image_size": -3}, "image_size"),
        ({"last": 0}, "last"),
        ({"patch": "R2"}, "patch"),
    ],
)
def test_settings_out_of_range(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        JobConfig(TINY, **values)

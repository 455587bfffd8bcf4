"""Reading images, splitting them into two parts, and drawing batches."""

from __future__ import annotations

import codecs
import errno
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from gf_tvm.errors import ModelError
from gf_tvm.training.data import IGNORED, Images, batches, load_dataset, load_images, split_labels, split_parts

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def message_of(data: object, **values: Any) -> str:
    """The one line with which loading fails."""
    with pytest.raises(ModelError) as error:
        load_images(str(data), **values)
    message = str(error.value)
    assert "\n" not in message
    return message


# --- digits -----------------------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    images = load_images("digits", image_size=8)
    assert images.x.shape == (1797, 3, 8, 8)
    for channel in range(3):
        assert np.array_equal(images.x[:, channel].numpy(), digits.images.astype(np.float32) / 16)
    assert np.array_equal(images.y.numpy(), digits.target)
    assert images.classes == tuple("0123456789")


def test_digits_enlarged() -> None:
    small, large = load_images("digits", image_size=8), load_images("digits", image_size=32)
    assert large.x.shape == (1797, 3, 32, 32)
    assert large.x.min() >= 0
    assert large.x.max() <= 1
    at = (np.arange(32) + 0.5) / 4 - 0.5  # centres of the new pixels; outermost values go on to the border
    for image, enlarged in zip(small.x[:20, 0].numpy(), large.x[:20, 2].numpy(), strict=True):
        rows = np.stack([np.interp(at, np.arange(8), column) for column in image.T], axis=1)
        expected = np.stack([np.interp(at, np.arange(8), row) for row in rows])
        np.testing.assert_allclose(enlarged, expected, atol=1e-5)
    assert large.y.equal(small.y)


# --- folders ----------------------------------------------------------------------------------------------------------


def save(path: Path, color: Any, size: tuple[int, int] = (6, 4), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path)


def test_folder(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "b.png", RED)
    save(tmp_path / "cat" / "a.PNG", GREEN, mode="P")
    save(tmp_path / "ant" / "x.bmp", BLUE)
    save(tmp_path / "ant" / "y.png", (255, 255, 255), mode="L")
    save(tmp_path / "ant" / "z.png", RED, mode="RGBA")
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "readme.txt").write_text("not a class")
    save(tmp_path / ".cache" / "x.png", RED)
    images = load_images(str(tmp_path), image_size=5)
    assert images.classes == ("ant", "cat")
    assert images.y.tolist() == [0, 0, 0, 1, 1]
    assert images.x.shape == (5, 3, 5, 5)
    assert images.x.dtype == torch.float32
    expected = [(0, 0, 1), (1, 1, 1), (1, 0, 0), (0, 1, 0), (1, 0, 0)]
    for image, color in zip(images.x, expected, strict=True):
        assert image.flatten(1).equal(torch.tensor(color, dtype=torch.float32)[:, None].expand(3, 25))


def test_folder_takes_the_centre_and_turns_photos(tmp_path: Path) -> None:
    image = Image.new("RGB", (30, 10), RED)
    image.paste(GREEN, (10, 0, 20, 5))
    image.paste(BLUE, (10, 5, 20, 10))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down, as a camera writes it
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "1.png")
    image.save(tmp_path / "a" / "2.png", exif=exif)
    save(tmp_path / "b" / "1.png", RED)
    x = load_images(str(tmp_path), image_size=10).x
    green, blue = (torch.tensor(c, dtype=torch.float32)[:, None, None] / 255 for c in (GREEN, BLUE))
    assert x[0, :, :5].equal(green.expand(3, 5, 10))
    assert x[0, :, 5:].equal(blue.expand(3, 5, 10))
    assert x[1, :, :5].equal(blue.expand(3, 5, 10))


def test_bad_folders(tmp_path: Path) -> None:
    assert "has no class folders" in message_of(tmp_path)
    (tmp_path / "cat").mkdir()
    assert f"{str(tmp_path / 'cat')!r} has no images" in message_of(tmp_path)
    save(tmp_path / "cat" / "a.png", RED)
    assert "has 1 class (cat)" in message_of(tmp_path)
    save(tmp_path / "dog" / "a.png", RED)
    assert len(load_images(str(tmp_path)).y) == 2
    broken = tmp_path / "dog" / "b.png"
    broken.write_bytes((tmp_path / "dog" / "a.png").read_bytes()[:50])
    assert f"cannot read the image {str(broken)!r}" in message_of(tmp_path, strict=True)
    broken.write_text("no image at all")
    assert f"cannot read the image {str(broken)!r}" in message_of(tmp_path, strict=True)
    broken.unlink()
    (tmp_path / "eel" / ".deeper").mkdir(parents=True)
    save(tmp_path / "eel" / ".deeper" / "a.png", RED)
    assert f"{str(tmp_path / 'eel')!r} has no images" in message_of(tmp_path)
    (tmp_path / "eel" / "a.HEIC").touch()
    assert "but 1 of .heic, which is not read" in message_of(tmp_path)


def test_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:  # no chmod: root reads every folder
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert f"cannot read the data folder {str(tmp_path)!r}: Permission denied" in message_of(tmp_path)


def test_missing_and_odd_paths(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    assert f"no data at {str(file)!r}" in message_of(file)
    file.write_text("1,2")
    assert "neither a folder of class folders nor an .npz" in message_of(file)
    assert "no data file" in message_of(tmp_path / "x.npz")
    assert "no data at 'Digits'" in message_of("Digits")
    for size in (0, -1, 2.0, True):
        assert "image_size must be a positive integer" in message_of("digits", image_size=size)


# --- .npz -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("x", "y"), ("images", "labels")])
@pytest.mark.parametrize("layout", ["nhw", "nhw1", "nhw3", "n1hw", "n3hw"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_npz(tmp_path: Path, names: tuple[str, str], layout: str, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    expected = rng.integers(0, 255, (5, 3 if "3" in layout else 1, 6, 6)).astype(np.uint8)
    stored = expected if dtype is np.uint8 else (expected / 255).astype(dtype)
    if layout == "nhw":
        stored = stored[:, 0]
    elif layout.startswith("nhw"):
        stored = stored.transpose(0, 2, 3, 1)
    np.savez(tmp_path / "d.npz", **dict(zip(names, (stored, np.array([30, -7, 30, 2, 2], np.int16)), strict=True)))
    images = load_images(str(tmp_path / "d.npz"), image_size=6)
    assert images.classes == ("-7", "2", "30")
    assert images.y.tolist() == [2, 0, 2, 1, 1]
    assert images.y.dtype == torch.int64
    torch.testing.assert_close(images.x, torch.from_numpy(expected).float().expand(5, 3, 6, 6) / 255)


def test_npz_is_resized(tmp_path: Path) -> None:
    x = np.full((4, 20, 30), 0.5, np.float32)
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(4))
    images = load_images(str(tmp_path / "d.npz"), image_size=7)
    torch.testing.assert_close(images.x, torch.full((4, 3, 7, 7), 0.5))


X, Y = np.zeros((4, 8, 8), np.float32), np.arange(4)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X}, "must have an array 'y' or 'labels', it has: x"),
        ({"y": Y, "z": X}, "must have an array 'x' or 'images', it has: y, z"),
        ({}, "it has: nothing"),
        ({"x": X, "y": Y[:3]}, "has 4 images, its labels must have shape (4,), got (3,)"),
        ({"x": X, "y": Y[:, None]}, "got (4, 1)"),
        ({"x": X, "y": Y.astype(float)}, "labels in"),
        ({"x": X, "y": np.array(["a", "b", "c", "d"])}, "must be integers, got <U1"),
        ({"x": X.astype(np.int32), "y": Y}, "must be uint8 or floating, got int32"),
        ({"x": X.astype(complex), "y": Y}, "must be uint8 or floating, got complex128"),
        ({"x": np.zeros((4, 8, 8, 4), np.uint8), "y": Y}, "with c = 1 or 3, got (4, 8, 8, 4)"),
        ({"x": np.zeros((4, 8), np.uint8), "y": Y}, "got (4, 8)"),
        ({"x": np.zeros((4, 0, 8), np.uint8), "y": Y}, "are empty"),
        ({"x": X[:0], "y": Y[:0]}, "are empty"),
        ({"x": np.where(np.arange(64).reshape(8, 8) == 9, np.nan, X), "y": Y}, "must be finite"),
        ({"x": X, "y": np.zeros(4, int)}, "has 1 class (0), at least 2 are needed"),
        ({"x": np.array([X, None], dtype=object), "y": Y}, "cannot read"),  # pickled: must not be loaded
    ],
)
def test_bad_npz(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    assert message in message_of(tmp_path / "d.npz")


def test_damaged_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=X, y=Y)
    whole = (tmp_path / "d.npz").read_bytes()
    flipped = whole.replace(X.tobytes()[:64], b"\x01" * 64, 1)
    for content in (b"", b"no zip", whole[:-30], whole[:100], flipped, np.arange(3).tobytes()):
        (tmp_path / "d.npz").write_bytes(content)
        assert "cannot read" in message_of(tmp_path / "d.npz")
    np.savez_compressed(tmp_path / "d.npz", x=np.random.default_rng(0).random((4, 8, 8)), y=Y)
    packed = bytearray((tmp_path / "d.npz").read_bytes())
    packed[200:300] = bytes(100)
    (tmp_path / "d.npz").write_bytes(packed)
    assert "cannot read" in message_of(tmp_path / "d.npz")
    np.save(tmp_path / "a.npy", X)
    (tmp_path / "a.npy").rename(tmp_path / "d.npz")  # under the wrong name
    assert "holds a single array" in message_of(tmp_path / "d.npz")


# --- the split --------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 60), min_size=2, max_size=8),
    st.integers(0, 2**63 - 1),
    st.floats(0.5, 1.0),
    st.floats(0.01, 0.99),
)
def test_split(sizes: list[int], seed: int, skew: float, test_fraction: float) -> None:
    y = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(1))]
    parts = split_parts(y, len(sizes), seed, skew, test_fraction)
    assert torch.cat(parts).sort().values.equal(torch.arange(len(y)))  # all images, none twice
    again = split_parts(y, len(sizes), seed, skew, test_fraction)
    assert all(a.equal(b) for a, b in zip(parts, again, strict=True))
    counts = [torch.bincount(y[part], minlength=len(sizes)) for part in parts]
    in_a, in_b = counts[0] + counts[1], counts[2] + counts[3]
    mainly_a = 0
    for label, size in enumerate(sizes):
        shares = {round(size * skew), round(size * (1.0 - skew))}
        if skew < 1.0:
            least = min(2, size // 2)
            shares = {min(max(share, least), size - least) for share in shares}
            assert min(int(in_a[label]), int(in_b[label])) >= least
        assert int(in_a[label]) in shares
        mainly_a += int(in_a[label]) >= int(in_b[label]) and size > 0
        for train, test in (counts[:2], counts[2:]):
            count = int(train[label] + test[label])
            tested = round(count * test_fraction)
            assert int(test[label]) == (min(max(tested, 1), count - 1) if count > 1 else tested)
    if skew == 1.0 and all(sizes):
        assert mainly_a == (len(sizes) + 1) // 2
        assert not bool((in_a * in_b).any())


def test_split_depends_on_the_seed() -> None:
    y = torch.arange(10).repeat(40)
    first, second = (split_parts(y, 10, seed) for seed in (0, 1))
    assert all(not a[: len(b)].equal(b[: len(a)]) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("skew", "fraction", "what"),
    [
        (0.4, 0.25, "skew"),
        (1.1, 0.25, "skew"),
        (float("nan"), 0.25, "skew"),
        (0.9, 0.0, "test_fraction"),
        (0.9, 1.0, "test_fraction"),
    ],
)
def test_split_refuses(skew: float, fraction: float, what: str) -> None:
    with pytest.raises(ModelError, match=what):
        split_parts(torch.arange(10), 10, 0, skew, fraction)


def test_dataset(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal([1, 2, 3], [0.5, 1, 2], (200, 6, 6, 3)).astype(np.float32)
    path = str(tmp_path / "d.npz")
    np.savez(path, x=x, y=np.arange(200) % 4)
    dataset = load_dataset(path, image_size=6, seed=3)
    assert sum(dataset.sizes.values()) == 200
    assert dataset.classes == ("0", "1", "2", "3")
    known = dataset.pretrain_train.x  # statistics are those of part A's training images, and of nothing else
    torch.testing.assert_close(known.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(known.std((0, 2, 3)), torch.ones(3), atol=1e-5, rtol=0)
    scale = torch.tensor(dataset.std)[:, None, None]
    shift = torch.tensor(dataset.mean)[:, None, None]
    original = torch.from_numpy(x).permute(0, 3, 1, 2)
    found: list[int] = []
    for part in dataset.parts.values():
        for image, label in zip(part.x * scale + shift, part.y, strict=True):
            found.append(int((original - image).abs().amax((1, 2, 3)).argmin()))
            torch.testing.assert_close(image, original[found[-1]], atol=1e-4, rtol=1e-4)
            assert found[-1] % 4 == label
    assert sorted(found) == list(range(200))
    same = load_dataset(path, image_size=6, seed=3)
    assert same.digest == dataset.digest
    assert load_dataset(path, image_size=6, seed=4).digest != dataset.digest
    x[7, 0, 0, 0] += 1
    np.savez(path, x=x, y=np.arange(200) % 4)
    assert load_dataset(path, image_size=6, seed=3).digest != dataset.digest


@pytest.mark.filterwarnings("ignore:.*too few images of some classes")
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(0, 99), st.floats(0.5, 0.99), st.booleans())
def test_every_class_is_in_all_parts_or_is_named(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seed: int, skew: float, large: bool
) -> None:
    sizes = [100 * large, *sizes] if large else sizes
    labels = np.repeat(np.arange(len(sizes)), sizes)
    path = tmp_path_factory.mktemp("data") / "d.npz"
    np.savez(path, x=np.random.default_rng(0).random((len(labels), 4, 4), np.float32), y=labels)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            dataset = load_dataset(str(path), image_size=4, seed=seed, skew=skew)
        except ModelError as error:
            assert "part would be empty" in str(error)  # noqa: PT017
            return
    said = "".join(str(warning.message) for warning in caught)
    assert ("too few images of some classes" in said) == bool(said)
    for name, part in dataset.parts.items():
        present = set(part.y.tolist())
        sentence = next((text for text in said.split("; ") if f"{name} has none of" in text), "")
        for label, size in enumerate(sizes):
            assert (label in present) != (repr(str(label)) in sentence.partition("none of")[2])
            if size >= 4 or (size > 1 and name.endswith("train")):
                assert label in present


def test_classes_without_images_in_a_part_are_named(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(4), [100, 3, 3, 3])
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).random((109, 4, 4), np.float32), y=labels)
    with pytest.warns(UserWarning, match=r"pretrain_test has none of '\d'") as caught:
        dataset = load_dataset(str(tmp_path / "d.npz"), image_size=4)
    assert "_train has none" not in str(caught[0].message)
    assert set(dataset.pretrain_train.y.tolist()) == set(dataset.finetune_train.y.tolist()) == {0, 1, 2, 3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_dataset(str(tmp_path / "d.npz"), image_size=4, skew=1.0)  # no common class is what was asked for


def test_constant_images_stay_finite(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.ones((40, 8, 8), np.float32), y=np.arange(40) % 2)
    dataset = load_dataset(str(tmp_path / "d.npz"), image_size=8)
    assert all(bool(part.x.isfinite().all()) for part in dataset.parts.values())


def test_too_few_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=X, y=Y)
    with pytest.raises(ModelError, match="has 4 images: too few, its pretrain_test part would be empty"):
        load_dataset(str(tmp_path / "d.npz"))


# --- batches ----------------------------------------------------------------------------------------------------------


def numbered(n: int, size: int = 4) -> Images:
    """Images whose pixels and labels say which image they are."""
    x = torch.arange(n)[:, None, None, None] * 1000.0 + torch.arange(3 * size * size).view(1, 3, size, size) + 1
    return Images(x, torch.arange(n), tuple(map(str, range(n))))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 30), st.integers(1, 12), st.booleans(), st.one_of(st.none(), st.integers(0, 99)))
def test_batches(n: int, batch: int, drop_last: bool, seed: int | None) -> None:
    images = numbered(n)
    drawn = list(batches(images, batch, None if seed is None else seeded(seed), drop_last=drop_last))
    assert [len(y) for _, y in drawn[:-1]] == [batch] * (len(drawn) - 1)
    assert len(drawn) == (n // batch if drop_last else -(-n // batch))
    labels = torch.cat([y for _, y in drawn]) if drawn else torch.arange(0)
    assert len(labels.unique()) == len(labels)  # each image at most once
    if seed is None:
        assert labels.equal(torch.arange(len(labels)))
    for x, y in drawn:
        assert x.equal(images.x[y])
    if seed is not None:
        again = list(batches(images, batch, seeded(seed), drop_last=drop_last))
        assert all(a[1].equal(b[1]) for a, b in zip(drawn, again, strict=True))


def test_shuffles_differ() -> None:
    orders = [torch.cat([y for _, y in batches(numbered(20), 5, seeded(seed))]).tolist() for seed in range(3)]
    assert len({tuple(order) for order in orders}) == 3


def test_flip_mirrors_about_half() -> None:
    images = numbered(400)
    mirrored = 0
    for x, y in batches(images, 32, seeded(0), flip=True):
        for image, label in zip(x, y, strict=True):
            original = images.x[label]
            assert image.equal(original) or image.equal(original.flip(-1))
            mirrored += not image.equal(original)
    assert 160 < mirrored < 240


def moved(image: Tensor, down: int, right: int) -> Tensor:
    """``image`` moved, pixel by pixel, zeros following."""
    out = torch.zeros_like(image)
    h, w = image.shape[-2:]
    for i in range(h):
        for j in range(w):
            if 0 <= i - down < h and 0 <= j - right < w:
                out[:, i, j] = image[:, i - down, j - right]
    return out


def test_shift_moves_by_every_amount() -> None:
    images = numbered(300)
    seen = set()
    for x, y in batches(images, 32, seeded(0), shift=1):
        for image, label in zip(x, y, strict=True):
            found = [
                (down, right)
                for down in (-1, 0, 1)
                for right in (-1, 0, 1)
                if image.equal(moved(images.x[label], down, right))
            ]
            assert len(found) == 1
            seen.update(found)
    assert len(seen) == 9


def test_random_changes_need_a_generator() -> None:
    for changes in ({"flip": True}, {"shift": 1}):
        with pytest.raises(ValueError, match="generator"):
            next(batches(numbered(4), 2, **changes))  # type: ignore[arg-type]


# --- CIFAR ------------------------------------------------------------------------------------------------------------


def python2(value: Any) -> bytes:
    """The opcodes that Python 2 writes for ``value``, as in the published files: text is bytes."""
    if isinstance(value, bytes):
        return b"T" + len(value).to_bytes(4, "little") + value
    if isinstance(value, int):
        return b"J" + value.to_bytes(4, "little", signed=True)
    if isinstance(value, list):
        return b"](" + b"".join(map(python2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(key) + python2(item) for key, item in value.items()) + b"u"
    name = python2(value.dtype.str[1:].encode())
    dtype = b"cnumpy\ndtype\n" + name + python2(0) + python2(1) + b"\x87R(" + python2(3) + python2(b"|") + b"NNN"
    dtype += python2(-1) + python2(-1) + python2(0) + b"tb"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + python2(0) + b"\x85" + python2(b"b") + b"\x87R("
    )
    shape = b"(" + b"".join(map(python2, value.shape)) + b"t"
    return array + python2(1) + shape + dtype + b"\x89" + python2(value.tobytes()) + b"tb"


def write2(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x80\x02" + python2(value) + b".")


def cifar(folder: Path, names: tuple[str, ...], meta: str, key: bytes, labels: bytes, per_file: int = 8) -> Any:
    """Write a small CIFAR; returns all its pixels and labels."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (per_file * len(names), 3072)).astype(np.uint8)
    y = [i % 4 for i in range(len(x))]
    for i, name in enumerate(names):
        part = slice(i * per_file, (i + 1) * per_file)
        write2(
            folder / name, {b"batch_label": b"training", labels: y[part], b"data": x[part], b"filenames": [b"a.png"]}
        )
    write2(folder / meta, {key: [b"cat", b"dog", b"eel", b"fox"], b"num_cases_per_batch": per_file})
    return x, y


CIFAR10 = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


def test_cifar10(tmp_path: Path) -> None:
    x, y = cifar(tmp_path, CIFAR10, "batches.meta", b"label_names", b"labels")
    images = load_images(str(tmp_path))
    assert images.classes == ("cat", "dog", "eel", "fox")
    assert images.y.tolist() == y
    assert np.array_equal((images.x * 255).round().byte().numpy(), x.reshape(-1, 3, 32, 32))  # planes, row by row
    assert images.test is not None
    assert images.test.tolist() == [False] * 40 + [True] * 8
    assert load_images(str(tmp_path), image_size=16).x.shape == (48, 3, 16, 16)
    dataset = load_dataset(str(tmp_path), skew=0.75)
    assert dataset.sizes["pretrain_test"] + dataset.sizes["finetune_test"] == 8


def test_cifar100(tmp_path: Path) -> None:
    _, y = cifar(tmp_path, ("train", "test"), "meta", b"fine_label_names", b"fine_labels")
    images = load_images(str(tmp_path))
    assert images.classes == ("cat", "dog", "eel", "fox")
    assert images.y.tolist() == y
    assert images.test is not None
    assert images.test.tolist() == [False] * 8 + [True] * 8


def test_bad_cifar(tmp_path: Path) -> None:
    x, _ = cifar(tmp_path, CIFAR10, "batches.meta", b"label_names", b"labels")
    path, whole = tmp_path / "data_batch_3", (tmp_path / "data_batch_3").read_bytes()
    labels = [0] * 8
    for content, message in (
        ({b"data": x[:8]}, "must have 8 labels from 0 to 3"),
        ({b"data": x[:8], b"labels": [0, 1]}, "must have 8 labels"),
        ({b"data": x[:8], b"labels": [4] * 8}, "must have 8 labels from 0 to 3"),
        ({b"data": x[:8].astype(np.int16), b"labels": labels}, "its data must be n x 3072 uint8"),
        ({b"data": x[:8, :3000], b"labels": labels}, "its data must be n x 3072 uint8"),
        ({b"data": [1, 2], b"labels": labels}, "its data must be n x 3072 uint8"),
        ([1, 2], "it holds a list"),
    ):
        write2(path, content)
        assert message in message_of(tmp_path)
        assert str(path) in message_of(tmp_path)
    for damaged in (b"", b"no pickle", whole[:-400], whole[:50]):
        path.write_bytes(damaged)
        assert f"{str(path)!r} is not a file of CIFAR" in message_of(tmp_path)
    path.unlink()
    assert "has no data_batch_3" in message_of(tmp_path)
    path.write_bytes(whole)
    write2(tmp_path / "batches.meta", {b"label_names": [1, 2]})
    assert "class names are no text" in message_of(tmp_path)
    write2(tmp_path / "batches.meta", {b"other": [b"a"]})
    assert "it has no label_names" in message_of(tmp_path)


class Touches:
    """A pickle that makes a file while it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_cifar_runs_no_code(tmp_path: Path) -> None:
    cifar(tmp_path / "data", CIFAR10, "batches.meta", b"label_names", b"labels")
    victim = tmp_path / "made"
    content = pickle.dumps({b"data": Touches(victim)}, protocol=2)
    (tmp_path / "data" / "test_batch").write_bytes(content)
    assert "which the published files do not" in message_of(tmp_path / "data")
    assert not victim.exists()
    pickle.loads(content)
    assert victim.exists()  # that is what it would have done


# --- images and masks -------------------------------------------------------------------------------------------------


def save_pair(folder: Path, name: str, mask: Any, color: Any = RED, mode: str = "P") -> None:
    """An image of one colour and its mask, as PASCAL VOC stores them."""
    mask = np.asarray(mask, np.uint8)
    save(folder / "JPEGImages" / f"{name}.png", color, mask.shape[::-1])
    (folder / "SegmentationClass").mkdir(exist_ok=True)
    image = Image.fromarray(mask)
    if mode == "P":
        image.putpalette([(7 * i + 3) % 256 for i in range(768)])
    image.save(folder / "SegmentationClass" / f"{name}.png")


MASK = np.array([[0, 0, 1, 1], [0, 2, 1, 255], [2, 2, 2, 2], [0, 0, 0, 255]])


def test_voc(tmp_path: Path) -> None:
    save_pair(tmp_path, "b", MASK, GREEN)
    save_pair(tmp_path, "a", MASK * 0, BLUE, mode="L")
    images = load_images(str(tmp_path), image_size=4)
    assert images.classes == ("background", "1", "2")
    assert images.has_masks
    assert images.test is None
    assert images.y.dtype == torch.uint8
    assert images.y.tolist() == [(MASK * 0).tolist(), MASK.tolist()]  # indices, not the palette's colours
    assert images.x[1, :, 0, 0].tolist() == [0, 1, 0]
    doubled = load_images(str(tmp_path), image_size=8).y[1]
    assert doubled.equal(torch.from_numpy(MASK.astype(np.uint8)).repeat_interleave(2, 0).repeat_interleave(2, 1))
    save_pair(tmp_path, "c", np.kron(np.eye(2), np.ones((4, 6))) * 2)  # 8 high, 12 wide: the centre square
    expected = np.kron(np.eye(2), np.ones((4, 4))) * 2
    assert load_images(str(tmp_path), image_size=8).y[2].tolist() == expected.tolist()


def test_voc_lists_and_classes(tmp_path: Path) -> None:
    for number in range(4):
        save_pair(tmp_path, f"i{number}", MASK)
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("i2\ni0\n")
    (lists / "val.txt").write_text("i3\n")
    (tmp_path / "classes.txt").write_text("nothing\nant\nbee\ncat\n")
    images = load_images(str(tmp_path), image_size=4)
    assert images.classes == ("nothing", "ant", "bee", "cat")
    assert len(images) == 3
    assert images.test is not None
    assert images.test.tolist() == [False, False, True]


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_voc_lists_as_other_programs_write_them(tmp_path: Path, mark: bytes, end: bytes) -> None:
    """With a byte-order mark, other line ends, names with spaces and letters beyond ASCII."""
    names = ["a dog", "zwölf"]
    for name in names:
        save_pair(tmp_path, name, MASK)
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_bytes(mark + end.join(name.encode() for name in names))
    (tmp_path / "classes.txt").write_bytes(mark + end.join([b"nothing", b"ant", "Bär".encode(), b""]))
    images = load_images(str(tmp_path), image_size=4)
    assert images.classes == ("nothing", "ant", "Bär")
    assert len(images) == 2


def test_voc_lists_in_another_encoding_are_told_by_line(tmp_path: Path) -> None:
    save_pair(tmp_path, "a", MASK)
    (tmp_path / "classes.txt").write_bytes(b"nothing\nant\nB\xe4r\n")
    assert "line 3: not UTF-8" in message_of(tmp_path, image_size=4)


def test_bad_voc(tmp_path: Path) -> None:
    masks = tmp_path / "SegmentationClass"
    (tmp_path / "JPEGImages").mkdir()
    masks.mkdir()
    assert "has no masks" in message_of(tmp_path)
    save_pair(tmp_path, "a", MASK)
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    assert "has the class 2" in message_of(tmp_path, image_size=4)
    (tmp_path / "classes.txt").unlink()
    Image.new("L", (5, 4)).save(masks / "a.png")
    assert "has 5x4 pixels, its image 4x4" in message_of(tmp_path)
    Image.new("RGB", (4, 4)).save(masks / "a.png")
    assert "must hold palette indices or grey values, not RGB" in message_of(tmp_path)
    (masks / "a.png").write_text("no image")
    assert f"cannot read the image {str(masks / 'a.png')!r}" in message_of(tmp_path, strict=True)
    (tmp_path / "JPEGImages" / "a.png").unlink()
    assert "has no image JPEGImages/a.jpg" in message_of(tmp_path)
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Segmentation" / "train.txt").write_text("b\n")
    save(tmp_path / "JPEGImages" / "b.png", RED)
    assert f"there is no {str(masks / 'b.png')!r}" in message_of(tmp_path)


# --- scenes -----------------------------------------------------------------------------------------------------------


def test_scenes() -> None:
    pytest.importorskip("sklearn")
    scenes = load_images("scenes", image_size=24)
    assert scenes.classes == ("background", *"0123456789")
    assert scenes.x.shape == (len(scenes), 3, 24, 24)
    assert scenes.y.shape == (len(scenes), 24, 24)
    assert 0 <= float(scenes.x.min()) < float(scenes.x.max()) <= 1
    assert set(scenes.y.unique().tolist()) == set(range(11))
    digits = [len(set(mask.unique().tolist()) - {0}) for mask in scenes.y]
    assert min(digits) == 1  # of one class, or only one had a place
    assert max(digits) == 4
    ink = scenes.y > 0  # digits are brighter than what is around them
    assert float(scenes.x.mean(1)[ink].mean()) > float(scenes.x.mean(1)[~ink].mean()) + 0.15
    again, other = load_images("scenes", image_size=24), load_images("scenes", image_size=24, seed=1)
    assert again.x.equal(scenes.x)
    assert again.y.equal(scenes.y)
    assert not other.y.equal(scenes.y)


def test_scenes_for_testing_show_other_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources that say by their brightness who they are: none is in a training and in a test scene."""
    from gf_tvm.training.data import scenes

    drawn: dict[bool, set[int]] = {False: set(), True: set()}
    count = [0]

    def compose(x: Tensor, y: Tensor, digits: Tensor, labels: Tensor, generator: torch.Generator) -> None:
        test = count[0] >= scenes.SCENES * (1 - scenes.TEST_SHARE)
        drawn[test].update(int(value) for value in digits[:, 0, 0, 0])
        count[0] += 1

    sources = torch.arange(1797).float().view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    monkeypatch.setattr(scenes, "read_digits", lambda _: (sources, torch.zeros(1797, dtype=torch.long)))
    monkeypatch.setattr(scenes, "_compose", compose)
    images = scenes.load_scenes(8)
    assert images.test is not None
    assert int(images.test.sum()) == 1200
    assert len(drawn[True]) > 200
    assert len(drawn[False]) > 700
    assert not drawn[True] & drawn[False]


# --- the split of images with masks, and of those with test images ----------------------------------------------------


def test_dominant_class() -> None:
    y = torch.zeros(4, 4, 4, dtype=torch.uint8)
    y[0, 0, :3], y[0, 1, :2] = 2, 1
    y[1] = IGNORED
    y[1, 0, 0] = 1
    y[2, :3] = 255
    y[3, :, :2], y[3, 0, 2] = 1, 2
    assert split_labels(Images(torch.zeros(4, 3, 4, 4), y, ("background", "a", "b"))).tolist() == [2, 1, 0, 1]


def test_split_keeps_test_images() -> None:
    y = torch.arange(400) % 4
    test = torch.arange(400) % 5 == 0
    a, a_test, b, b_test = split_parts(y, 4, 0, 0.9, 0.25, test)
    assert torch.cat([a, a_test, b, b_test]).sort().values.equal(torch.arange(400))
    assert not bool(test[a].any() | test[b].any())
    assert bool(test[a_test].all() & test[b_test].all())
    for part, size in ((a, 80), (a_test, 20), (b, 80), (b_test, 20)):
        counts = sorted(torch.bincount(y[part], minlength=4).tolist())
        assert counts == [size // 10, size // 10, size * 9 // 10, size * 9 // 10]
    # The main classes of a part are the same in training and in testing.
    assert torch.bincount(y[a]).argsort()[2:].sort().values.equal(torch.bincount(y[a_test]).argsort()[2:].sort().values)


def test_masks_move_with_their_images() -> None:
    size = 6
    x = torch.arange(40 * size * size).view(40, 1, size, size).float().expand(-1, 3, -1, -1) + 1
    y = (x[:, 0].long() % 200).to(torch.uint8)
    images = Images(x, y, tuple(map(str, range(200))))
    changed = 0
    for moved_x, moved_y in batches(images, 8, seeded(0), flip=True, shift=2):
        assert moved_y.dtype == torch.uint8
        shown = moved_x[:, 0]
        assert moved_y.equal(torch.where(shown == 0, IGNORED, shown.long() % 200).to(torch.uint8))
        changed += int((moved_y == IGNORED).sum())
    assert changed

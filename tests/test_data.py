"""Reading images, splitting them into two parts, and drawing batches."""

from __future__ import annotations

import errno
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
from gf_tvm.training.data import Images, batches, load_dataset, load_images, split_parts

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
    assert f"cannot read the image {str(broken)!r}" in message_of(tmp_path)
    broken.write_text("no image at all")
    assert f"cannot read the image {str(broken)!r}" in message_of(tmp_path)
    broken.unlink()
    (tmp_path / "eel" / "deeper").mkdir(parents=True)
    save(tmp_path / "eel" / "deeper" / "a.png", RED)
    assert f"{str(tmp_path / 'eel')!r} has no images" in message_of(tmp_path)


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
        assert int(in_a[label]) in shares
        mainly_a += int(in_a[label]) >= int(in_b[label]) and size > 0
        for train, test in (counts[:2], counts[2:]):
            assert int(test[label]) == round(int(train[label] + test[label]) * test_fraction)
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

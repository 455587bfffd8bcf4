"""Photographs decoded when they are wanted: what the network sees, augmentation, broken files, memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from photo_folders import photo
from PIL import Image

from gf_tvm.errors import PictureError
from gf_tvm.models import Preprocessing
from gf_tvm.training.data import Photos, batches, steps
from gf_tvm.training.data.photos import AREA, RATIO, Kept, check_headers, crop_box
from gf_tvm.training.data.pictures import Skipped

PLAIN = Preprocessing(8, 8, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def arrays(count: int, height: int = 8, width: int = 8) -> list[np.ndarray]:  # type: ignore[type-arg]
    """Pictures of one value each, which is their number."""
    return [np.full((height, width, 3), number, np.uint8) for number in range(count)]


def of(count: int, preprocessing: Preprocessing = PLAIN, augment: bool = False) -> Photos:
    return Photos(arrays(count), [number % 2 for number in range(count)], ("a", "b"), preprocessing, augment=augment)


def numbers(x: torch.Tensor) -> list[int]:
    return [round(v) for v in (x[:, 0, 0, 0] * 255).tolist()]


def joined(lists: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


@settings(max_examples=30)
@given(
    width=st.integers(9, 60), height=st.integers(9, 60), size=st.integers(4, 16), more=st.integers(0, 6),
    filter_=st.sampled_from(["bilinear", "bicubic", "nearest", "lanczos"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_centre_as_the_weights_want_it(
    width: int, height: int, size: int, more: int, filter_: str, seed: int
) -> None:
    """Shorter side resized, centre cut out, normalised: written down once more, step by step."""
    preprocessing = Preprocessing(size, size + more, filter_, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    image = photo(0, seed, (width, height))
    ((x, y),) = Photos([np.asarray(image)], [0], ("a",), preprocessing).batches(4)
    if max(width, height) <= 2 * min(width, height):
        scale, side = min(width, height), size + more
        wanted = (int(side * width / scale), int(side * height / scale))
        resized = image.resize(wanted, Image.Resampling[filter_.upper()])
        left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
        pixels = np.asarray(resized.crop((left, top, left + size, top + size))) / 255
        expected = (pixels - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.6, 0.7])
        torch.testing.assert_close(x[0].permute(1, 2, 0).double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    assert x.shape == (1, 3, size, size)
    assert y.tolist() == [0]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5))
@settings(max_examples=40)
def test_every_picture_is_in_an_epoch(n: int, batch: int, seed: int) -> None:
    """Full batches; those of the last one that are there twice are the epoch's first."""
    found = [numbers(x) for x, _ in batches(of(n), batch, generator(seed), drop_last=True)]
    assert [len(one) for one in found] == [batch] * steps(of(n), batch)
    flat = joined(found)
    assert sorted(flat[:n]) == list(range(n))
    assert all(number == flat[at % n] for at, number in enumerate(flat))
    in_order = [numbers(x) for x, _ in batches(of(n), batch)]
    assert joined(in_order) == list(range(n))


def test_labels_go_with_their_pictures() -> None:
    for x, y in batches(of(20), 6, generator(3), drop_last=True):
        assert [number % 2 for number in numbers(x)] == y.tolist()


def test_epochs_repeat_themselves_and_differ() -> None:
    noise = [np.random.default_rng(i).integers(0, 256, (12, 20, 3)).astype(np.uint8) for i in range(9)]
    source = Photos(noise, [0] * 9, ("a",), PLAIN, augment=True)

    def epoch(seed: int) -> torch.Tensor:
        return torch.cat([x for x, _ in batches(source, 4, generator(seed), drop_last=True)])

    assert epoch(1).equal(epoch(1))
    assert not epoch(1).equal(epoch(2))


def test_only_shuffled_batches_are_augmented() -> None:
    noise = [np.random.default_rng(i).integers(0, 256, (8, 8, 3)).astype(np.uint8) for i in range(5)]
    source = Photos(noise, [0] * 5, ("a",), PLAIN, augment=True)
    ((plain, _),) = batches(source, 5)
    assert plain.mul(255).round().byte().permute(0, 2, 3, 1).numpy().tolist() == [one.tolist() for one in noise]
    ((random, _),) = batches(source, 5, generator(), drop_last=True)
    assert not any(a.equal(b) for a in random for b in plain)


def test_about_half_is_mirrored() -> None:
    slope = np.repeat(np.arange(0, 240, 30, dtype=np.uint8)[None, :, None], 8, 0).repeat(3, 2)
    source = Photos([slope] * 200, [0] * 200, ("a",), PLAIN, augment=True)
    ((x, _),) = batches(source, 200, generator(), drop_last=True)
    rising = (x[:, 0, 4, -1] > x[:, 0, 4, 0]).sum()
    assert 70 < rising < 130


@given(
    st.integers(1, 300), st.integers(1, 300), st.tuples(*[st.floats(0, 1) for _ in range(4)])
)  # fmt: skip
def test_random_parts(width: int, height: int, draw: tuple[float, ...]) -> None:
    left, top, w, h = crop_box(width, height, draw)
    assert left >= 0
    assert top >= 0
    assert left + w <= width * (1 + 1e-9)
    assert top + h <= height * (1 + 1e-9)
    assert w * h <= AREA[1] * width * height * (1 + 1e-9)
    if w < width and h < height:
        assert w * h == pytest.approx((AREA[0] + (AREA[1] - AREA[0]) * draw[0]) * width * height)
        assert RATIO[0] * 0.999 <= w / h <= RATIO[1] * 1.001


# --- broken files -----------------------------------------------------------------------------------------------------


def folder_with_a_broken_one(folder: Path) -> list[Path]:
    paths = []
    for number in range(6):
        Image.fromarray(arrays(7)[number]).save(path := folder / f"{number}.bmp")
        paths.append(path)
    content = (folder / "2.bmp").read_bytes()
    (folder / "2.bmp").write_bytes(content[:-20])  # its head is whole
    return paths


def test_a_broken_file_is_replaced(tmp_path: Path) -> None:
    paths, lines = folder_with_a_broken_one(tmp_path), list[str]()
    source = Photos(paths, [0] * 6, ("a",), PLAIN, skipped=Skipped(say=lines.append))
    for epoch in range(2):
        found = [numbers(x) for x, _ in batches(source, 4, generator(epoch), drop_last=True)]
        assert [len(one) for one in found] == [4, 4]
        assert set(joined(found)) == {0, 1, 3, 4, 5}
    assert joined(numbers(x) for x, _ in batches(source, 4)) == [0, 1, 3, 4, 5]
    assert len(lines) == 1
    assert repr(str(paths[2])) in lines[0]
    strict = Photos(paths, [0] * 6, ("a",), PLAIN, skipped=Skipped(strict=True))
    with pytest.raises(PictureError, match=r"2.bmp"):
        list(batches(strict, 4))


def test_heads_are_looked_at_first(tmp_path: Path) -> None:
    paths, lines = folder_with_a_broken_one(tmp_path), list[str]()
    (tmp_path / "3.bmp").write_text("no picture")
    good = check_headers([(path, 0) for path in paths], Skipped(say=lines.append))
    assert [path.name for path, _ in good] == ["0.bmp", "1.bmp", "2.bmp", "4.bmp", "5.bmp"]
    assert len(lines) == 1


def test_nothing_but_broken_files(tmp_path: Path) -> None:
    path = folder_with_a_broken_one(tmp_path)[2]
    source = Photos([path, path], [0, 0], ("a",), PLAIN, skipped=Skipped(say=lambda line: None))
    with pytest.raises(ValueError, match="no picture of the data can be read"):
        list(batches(source, 2, generator(), drop_last=True))


# --- memory -----------------------------------------------------------------------------------------------------------


def test_what_is_kept_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    for number in range(6):
        photo(0, number, (8, 8)).save(path := tmp_path / f"{number}.png")
        paths.append(path)
    reads: list[Path] = []
    from gf_tvm.training.data import photos

    read = photos.read_picture
    monkeypatch.setattr(photos, "read_picture", lambda path, side: reads.append(path) or read(path, side))  # type: ignore[func-returns-value]
    kept = Kept(4 * 8 * 8 * 3)
    source = Photos(paths, [0] * 6, ("a",), PLAIN, kept=kept)
    first, second = (torch.cat([x for x, _ in batches(source, 2)]) for _ in range(2))
    assert first.equal(second)
    assert kept.bytes == kept.limit
    assert sorted(reads) == sorted([*paths, *(path for path in paths if reads.count(path) == 2)])
    assert len(reads) == 6 + 2


MEASURED = """
import sys
from pathlib import Path
import torch
from gf_tvm.machine.cpu import peak_bytes
from gf_tvm.errors import PictureError
from gf_tvm.models import Preprocessing
from gf_tvm.training.data import batches
from gf_tvm.training.data.pictures import Skipped
from gf_tvm.training.data.photos import Kept, Photos, check_headers
from gf_tvm.training.data.listing import list_folder
listing = list_folder(Path(sys.argv[1]))
files = check_headers(listing.files[:64], Skipped())
def through(files):
    source = Photos([f for f, _ in files], [y for _, y in files], listing.classes, Preprocessing(96, 110), augment=True,
                    kept=Kept(32 << 20))
    return sum(len(x) for x, _ in batches(source, 32, torch.Generator().manual_seed(0), drop_last=True))
through(files)  # what Pillow, PyTorch and threads take by themselves
before = peak_bytes()
assert through(check_headers(listing.files, Skipped())) == 10016
print(peak_bytes() - before)
"""


@pytest.mark.slow
def test_ten_thousand_pictures_do_not_fill_memory(tmp_path: Path) -> None:
    """Kept as they are decoded they would take 400 MB; the limit is 32."""
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for number in range(10_000):
        target = tmp_path / "data" / "ab"[number % 2] / f"{number}.jpg"
        if number < 10:
            photo(number % 2, number, (150, 120)).save(target)
        else:
            os.link(tmp_path / "data" / "ab"[number % 2] / f"{number % 10}.jpg", target)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path / "data")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100 << 20

"""Photographs as people have them: every kind of file, broken ones among others, and masks on them."""

from __future__ import annotations

import io
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gf_tvm.errors import ModelError, PictureError
from gf_tvm.runners import cli
from gf_tvm.training.data import load_images
from gf_tvm.training.data.listing import list_folder, split_folders
from gf_tvm.training.data.pictures import Skipped, read_picture, turned


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures")


def noise(seed: int, height: int, width: int) -> Any:
    """Random colours, (h, w, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


sizes = st.tuples(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9))


# --- kinds of pixels --------------------------------------------------------------------------------------------------


def grey_of(rgb: Any) -> Any:
    return np.asarray(Image.fromarray(rgb).convert("L"))


def three(grey: Any) -> Any:
    return np.repeat(np.asarray(grey)[..., None], 3, axis=2)


def as_grey(path: Path, rgb: Any) -> tuple[Path, Any, int]:
    Image.fromarray(grey_of(rgb)).save(path := path.with_suffix(".png"))
    return path, three(grey_of(rgb)), 0


def as_palette(path: Path, rgb: Any) -> tuple[Path, Any, int]:
    image = Image.fromarray(rgb).quantize(200)
    image.save(path := path.with_suffix(".png"))
    return path, np.asarray(image.convert("RGB")), 0


def as_black_and_white(path: Path, rgb: Any) -> tuple[Path, Any, int]:
    bits = grey_of(rgb) > 127
    Image.fromarray(bits).save(path := path.with_suffix(".tif"))
    return path, three(bits * np.uint8(255)), 0


def as_16_bits(path: Path, rgb: Any) -> tuple[Path, Any, int]:
    """A grey value v of 8 bits is 257 v of 16."""
    Image.fromarray(grey_of(rgb).astype(np.uint16) * 257).save(path := path.with_suffix(".png"))
    return path, three(grey_of(rgb)), 0


def as_16_bits_tiff(path: Path, rgb: Any) -> tuple[Path, Any, int]:
    deep = grey_of(rgb).astype(np.uint16) * 257
    Image.fromarray(np.minimum(deep.astype(int) + 100, 65535).astype(np.uint16)).save(path := path.with_suffix(".tif"))
    return path, three(grey_of(rgb)), 1


def as_16_bit_colours(path: Path, rgb: Any) -> tuple[Path, Any, int]:
    """Pillow does not write such files: a PNG by hand."""
    height, width = rgb.shape[:2]
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in rgb)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (path := path.with_suffix(".png")).write_bytes(content)
    return path, rgb, 0


def as_floats(path: Path, rgb: Any) -> tuple[Path, Any, int]:
    Image.fromarray((grey_of(rgb) / 255).astype(np.float32)).save(path := path.with_suffix(".tiff"))
    return path, three(grey_of(rgb)), 0


def as_cmyk(path: Path, rgb: Any) -> tuple[Path, Any, int]:
    Image.fromarray(rgb).convert("CMYK").save(path := path.with_suffix(".tif"))
    return path, rgb, 1


def as_cmyk_jpeg(path: Path, rgb: Any) -> tuple[Path, Any, int]:
    """One colour, which JPEG keeps."""
    flat = np.broadcast_to(rgb[:1, :1], rgb.shape)
    Image.fromarray(flat).convert("CMYK").save(path := path.with_suffix(".jpg"), quality=100)
    return path, flat, 4


def as_transparent(path: Path, rgb: Any) -> tuple[Path, Any, int]:
    """Half of the pixels cannot be seen; what colour they have does not matter."""
    alpha = np.where(rgb[..., :1] > 127, 255, 0).astype(np.uint8)
    Image.fromarray(np.concatenate([rgb, alpha], 2)).save(path := path.with_suffix(".png"))
    return path, np.where(alpha > 0, rgb, np.uint8(255)), 0


def as_grey_and_alpha(path: Path, rgb: Any) -> tuple[Path, Any, int]:
    alpha = np.where(rgb[..., 0] > 127, 255, 0).astype(np.uint8)
    Image.fromarray(np.stack([grey_of(rgb), alpha], 2)).save(path := path.with_suffix(".png"))
    return path, three(np.where(alpha > 0, grey_of(rgb), np.uint8(255))), 0


def as_transparent_palette(path: Path, rgb: Any) -> tuple[Path, Any, int]:
    image = Image.fromarray(rgb).quantize(200)
    image.save(path := path.with_suffix(".png"), transparency=0)
    seen = np.where(np.asarray(image)[..., None] == 0, np.uint8(255), np.asarray(image.convert("RGB")))
    return path, seen, 0


def as_animation(path: Path, rgb: Any) -> tuple[Path, Any, int]:
    """The first frame counts."""
    later = [Image.fromarray(255 - rgb), Image.fromarray(rgb[::-1].copy())]
    Image.fromarray(rgb).save(
        path := path.with_suffix(".webp"), save_all=True, append_images=later, lossless=True, exact=True, duration=100
    )
    return path, rgb, 0


def as_animated_png(path: Path, rgb: Any) -> tuple[Path, Any, int]:
    Image.fromarray(rgb).save(
        path := path.with_suffix(".png"), save_all=True, append_images=[Image.fromarray(255 - rgb)]
    )
    return path, rgb, 0


def as_animated_gif(path: Path, rgb: Any) -> tuple[Path, Any, int]:
    first, second = (Image.new("P", (5, 4), index) for index in (1, 2))
    for image in (first, second):
        image.putpalette([0, 0, 0, *rgb[0, 0].tolist(), 9, 9, 9])
    first.save(path := path.with_suffix(".gif"), save_all=True, append_images=[second], duration=100)
    return path, np.broadcast_to(rgb[:1, :1], (4, 5, 3)), 0


KINDS: dict[str, Callable[[Path, Any], tuple[Path, Any, int]]] = {
    name.removeprefix("as_"): value for name, value in sorted(globals().items()) if name.startswith("as_")
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15)
@given(size=sizes)
def test_kinds(kind: str, place: Path, size: tuple[int, int, int]) -> None:
    """What is read is what was drawn, to within ``error`` of 255 levels."""
    path, expected, error = KINDS[kind](place / f"ein Bild von {kind}", noise(*size))
    image = read_picture(path)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - expected.astype(int)).max() <= error


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.full((3, 3), 70_000, np.int32), "integers of 32 bits"),
        (np.full((3, 3), 1.5, np.float32), "floating values from 1.5 to 1.5, not from 0 to 1"),
        (np.array([[0.0, np.nan]], np.float32), "floating values"),
        (np.array([[-0.1, 0.5]], np.float32), "floating values from -0.1"),
    ],
)
def test_values_of_unknown_range_are_refused(values: Any, said: str, tmp_path: Path) -> None:
    Image.fromarray(values).save(path := tmp_path / "a.tif")
    with pytest.raises(PictureError, match=said) as error:
        read_picture(path)
    assert repr(str(path)) in str(error.value)


# --- turned pictures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".jpg"])
@given(size=sizes, orientation=st.integers(0, 9))
@settings(max_examples=20)
def test_orientation(suffix: str, place: Path, size: tuple[int, int, int], orientation: int) -> None:
    """What a camera stores is the picture turned back; 0 and 9 mean nothing and turn nothing."""
    image = Image.fromarray(np.broadcast_to(noise(*size)[:1, :1], (8, 16, 3)).copy())
    image.paste((0, 0, 0), (0, 0, 8, 8))  # no two orientations look alike, in JPEG neither
    back = {6: 8, 8: 6}.get(orientation, orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {".webp": {"lossless": True}, ".jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    turned(image, back).save(path := place / f"turned{suffix}", exif=exif, **lossless)
    seen = read_picture(path)
    assert seen.size == image.size
    difference = np.abs(np.asarray(seen).astype(int) - np.asarray(image).astype(int))
    assert difference.max() <= (4 if suffix == ".jpg" else 0)


@given(orientation=st.integers(1, 8), upright=st.booleans())
@settings(max_examples=20)
def test_masks_on_turned_pictures(tmp_path_factory: pytest.TempPathFactory, orientation: int, upright: bool) -> None:
    """A mask was drawn on the picture as it is seen, or, where only that fits, on the pixels as they are stored."""
    folder = tmp_path_factory.mktemp("voc")
    for name in ("JPEGImages", "SegmentationClass"):
        (folder / name).mkdir()
    mask = np.zeros((6, 12), np.uint8)
    mask[:2, :5] = 1  # the top left corner, which is white
    image = Image.fromarray(three(mask * np.uint8(255)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    back = {6: 8, 8: 6}.get(orientation, orientation)
    turned(image, back).save(folder / "JPEGImages" / "a.png", exif=exif)
    drawn = Image.fromarray(mask)
    if not upright and orientation >= 5:
        drawn = turned(drawn, back)
    drawn.save(folder / "SegmentationClass" / "a.png")
    images = load_images(str(folder), image_size=6)
    assert images.x[0, 0].gt(0.5).equal(images.y[0] == 1)
    assert bool((images.y[0] == 1).any())


# --- decoding small ---------------------------------------------------------------------------------------------------


def test_large_jpegs_are_decoded_small(tmp_path: Path) -> None:
    image = Image.linear_gradient("L").resize((1600, 1200)).convert("RGB")
    image.save(path := tmp_path / "a.jpg", quality=95)
    assert read_picture(path).size == (1600, 1200)
    small = read_picture(path, 100)
    assert small.size == (400, 300)  # not below twice what is wanted; JPEG has halves of halves
    expected, actual = (np.asarray(i.resize((40, 30), Image.Resampling.BOX)).astype(int) for i in (image, small))
    assert np.abs(expected - actual).max() <= 3


# --- folders ----------------------------------------------------------------------------------------------------------


def write(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed, 6, 6)).save(path)
    return path


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    lambda name: not name.startswith(".") and len(name.encode()) < 200
)


@settings(max_examples=40)
@given(names=st.lists(NAMES, min_size=2, max_size=3, unique=True), file=NAMES)
def test_names_in_every_alphabet(tmp_path_factory: pytest.TempPathFactory, names: list[str], file: str) -> None:
    folder = tmp_path_factory.mktemp("names")
    for name in names:
        write(folder / name / f"{file}.png")
    listing = list_folder(folder)
    assert listing.classes == tuple(sorted(names))
    assert [path.name for path, _ in listing.files] == [f"{file}.png"] * len(names)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_names_that_are_no_text(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name / "x.png").rename(tmp_path / name / b"\xff\xfe.png".decode(errors="surrogateescape"))
    assert len(load_images(str(tmp_path)).y) == 2


def test_what_is_no_picture(tmp_path: Path) -> None:
    """Hidden files of macOS have a picture's name; folders of archivers and NAS are no classes."""
    for name in ("a", "b", "a/deeper/still"):
        write(tmp_path / name / "x.png")
        (tmp_path / name / "._x.png").write_bytes(b"\0\5\x16\7 of macOS")
        (tmp_path / name / "Thumbs.db").touch()
    for name in ("__MACOSX", "@eaDir", ".hidden"):
        write(tmp_path / name / "x.png")
    (tmp_path / "a" / "x.heic").touch()
    with pytest.warns(UserWarning, match=r"1 files of .heic in .* are not read"):
        listing = list_folder(tmp_path)
    assert listing.classes == ("a", "b")
    found = [path.relative_to(tmp_path).as_posix() for path, _ in listing.files]
    assert found == ["a/x.png", "a/deeper/still/x.png", "b/x.png"]


def test_pictures_in_no_class(tmp_path: Path) -> None:
    write(tmp_path / "x.png")
    with pytest.raises(ModelError, match="it has 1 pictures that are in no class; expected FOLDER/CLASS/IMAGE"):
        list_folder(tmp_path)


@pytest.mark.parametrize("names", [("train", "val"), ("Train", "VALID"), ("training", "test"), ("train", None)])
def test_folders_of_a_split(names: tuple[str, str | None], tmp_path: Path) -> None:
    for name in names:
        if name is not None:
            write(tmp_path / name / "cat" / "x.png")
    train, validation = names
    assert split_folders(tmp_path) == (tmp_path / str(train), None if validation is None else tmp_path / validation)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("train", "val", "ship"):
        write(tmp_path / name / "x.png")
    assert split_folders(tmp_path) is None
    assert list_folder(tmp_path).classes == ("ship", "train", "val")


# --- broken files -----------------------------------------------------------------------------------------------------


def broken(kind: str, path: Path) -> None:
    content = io.BytesIO()
    Image.fromarray(noise(3, 40, 40)).save(content, "JPEG")
    whole = content.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to(path.parent / "nothing")
    else:
        path.write_bytes(
            {"empty": b"", "text": b"not a picture", "head": whole[:100], "truncated": whole[: len(whole) // 2]}[kind]
        )


@pytest.mark.parametrize("kind", ["empty", "text", "head", "truncated"])
def test_a_broken_file_among_many(kind: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        for number in range(3):
            write(tmp_path / name / f"{number}.png", number)
    broken(kind, path := tmp_path / "a" / "x y.jpg")
    with pytest.warns(UserWarning, match="x y.jpg|skipped 1") as said:
        images = load_images(str(tmp_path), image_size=6)
    lines = [str(warning.message) for warning in said]
    assert lines[0].startswith(f"cannot read the image {str(path)!r}: ")
    assert lines[1].startswith(f"skipped 1 of 7 pictures in {str(tmp_path)!r}")
    assert images.y.tolist() == [0, 0, 0, 1, 1, 1]
    for image, seed in zip(images.x, (0, 1, 2, 0, 1, 2), strict=True):
        assert image.mul(255).round().permute(1, 2, 0).byte().numpy().tolist() == noise(seed, 6, 6).tolist()
    with pytest.raises(PictureError) as error:
        load_images(str(tmp_path), image_size=6, strict=True)
    assert repr(str(path)) in str(error.value)


@pytest.mark.parametrize("kind", ["folder", "dangling"])
def test_what_only_has_a_pictures_name(kind: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name / "1.png")
    broken(kind, tmp_path / "a" / "x.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_images(str(tmp_path), image_size=6)) == 2


@given(st.binary(max_size=200), st.sampled_from([".png", ".jpg", ".gif", ".tif", ".webp", ".bmp", ".ppm", ".tga"]))
def test_any_bytes_are_a_picture_or_one_line(place: Path, content: bytes, suffix: str) -> None:
    (path := place / f"bytes{suffix}").write_bytes(content)
    try:
        assert read_picture(path).mode == "RGB"
    except PictureError as error:
        said = str(error)
    else:
        said = repr(str(path))
    assert repr(str(path)) in said
    assert "\n" not in said


@given(st.data())
def test_damaged_pictures_are_pictures_or_one_line(place: Path, data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]))
    content = io.BytesIO()
    Image.fromarray(noise(1, 9, 9)).save(content, form)
    damaged = bytearray(content.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    (path := place / "damaged").write_bytes(damaged[: data.draw(st.integers(1, len(damaged)))])
    try:
        assert read_picture(path).mode == "RGB"
    except PictureError as error:
        said = str(error)
    else:
        said = ""
    assert "\n" not in said


def test_many_broken_files_are_counted() -> None:
    lines: list[str] = []
    skipped = Skipped(say=lines.append)
    for number in range(50):
        skipped.add(PictureError(f"cannot read {number}"))
    skipped.end(70, "here")
    assert lines[:2] == ["cannot read 0; skipped", "cannot read 1; skipped"]
    assert lines[8:] == ["skipped 50 of 70 pictures in 'here' (--strict: stop at the first)"]


def test_a_class_of_broken_files(tmp_path: Path) -> None:
    write(tmp_path / "a" / "1.png")
    broken("text", tmp_path / "b" / "1.png")
    said = r"no image of the class folder .* can be read"
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ModelError, match=said):
        load_images(str(tmp_path))


# --- masks ------------------------------------------------------------------------------------------------------------


def pair(folder: Path, name: str, mask: Any) -> None:
    write(folder / "JPEGImages" / f"{name}.png")
    (folder / "SegmentationClass").mkdir(exist_ok=True)
    Image.fromarray(mask).save(folder / "SegmentationClass" / f"{name}.png")


@pytest.mark.parametrize("names", [None, "background\nthing\n"])
def test_masks_of_0_and_255_are_explained(names: str | None, tmp_path: Path) -> None:
    mask = np.zeros((6, 6), np.uint8)
    mask[2:4, 2:4] = 255
    pair(tmp_path, "a", mask)
    if names is not None:
        (tmp_path / "classes.txt").write_text(names)
    with pytest.raises(ModelError, match=r"0 and 255, and 255 means a pixel of no class.* write 1 instead"):
        load_images(str(tmp_path), 6)
    pair(tmp_path, "b", np.minimum(mask, 1))  # one that has the class: 255 is what it is
    assert load_images(str(tmp_path), 6).y.unique().tolist() == [0, 1, 255]


def test_masks_of_one_bit(tmp_path: Path) -> None:
    mask = np.zeros((6, 6), bool)
    mask[2:4, 2:4] = True
    pair(tmp_path, "a", mask)
    assert load_images(str(tmp_path), 6).y[0].numpy().tolist() == mask.astype(int).tolist()


@pytest.mark.parametrize("folder", ["JPEGImages", "SegmentationClass"])
def test_broken_pairs(folder: str, tmp_path: Path) -> None:
    mask = np.eye(6, dtype=np.uint8)
    for name in ("a", "b", "c"):
        pair(tmp_path, name, mask)
    (tmp_path / "SegmentationClass" / "._a.png").write_bytes(b"of macOS")
    (tmp_path / folder / "b.png").write_bytes(b"broken")
    with pytest.warns(UserWarning, match=r"b.png.*; skipped"), pytest.warns(UserWarning, match="skipped 1 of 3"):
        images = load_images(str(tmp_path), 6)
    assert len(images) == 2
    with pytest.raises(PictureError):
        load_images(str(tmp_path), 6, strict=True)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_skips_or_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        for number in range(10):
            write(tmp_path / "data" / name / f"{number}.png", number)
    broken("truncated", tmp_path / "data" / "a" / "x.jpg")
    arguments = ["train", "--protocol", "paper", "--model", "training_models:tiny", "--data", str(tmp_path / "data")]
    arguments += ["--patch", "2"]
    arguments += ["--epochs", "1", "--pretrain-epochs", "0", "--batch", "2", "--last", "1", "--image-size", "8"]
    with pytest.warns(UserWarning, match="skipped 1 of 21"), pytest.warns(UserWarning, match="x.jpg.*; skipped"):
        assert cli.main([*arguments]) == 0
    capsys.readouterr()
    assert cli.main([*arguments, "--strict"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gf-tvm: error: cannot read the image")

"""One photograph as people have them: a file of any common format becomes red, green and blue, upright, 8 bits each.

What a picture shows on a screen is what a network gets. Where values have no known range, the file is refused by name:
a guess would be a wrong picture.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ModelError, PictureError

if TYPE_CHECKING:
    from PIL.Image import Image

#: Files that are read; what else lies in a folder is counted, and said.
IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".mpo", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)

#: Files that are pictures, too, but that Pillow does not read.
OTHER_PICTURES = (".arw", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".nef", ".orf", ".raf", ".rw2", ".svg")

#: Broken files that are named one by one; the rest is counted.
NAMED = 8

#: Pillow's name of the EXIF entry that says how a picture is turned.
_ORIENTATION = 0x0112


def is_picture(path: Path) -> bool:
    """Whether a file's name says that it is a picture. Hidden files are none, such as the ``._x.png`` of macOS."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def read_picture(path: Path, side: int | None = None) -> Image:
    """A picture as it is seen: mode RGB, turned as its EXIF entry says, its first frame where it has several.

    Transparent pixels lie on white. Values of 16 bits are scaled to 8, floating ones from 0..1.

    Args:
        side: pixels of the shorter side that are wanted. A JPEG may be decoded at a smaller size, of at least twice
            that, which takes less time and memory.

    Raises:
        PictureError: it cannot be read, or has values of unknown range.
    """
    image, _ = read_turned(path, side)
    return image


def read_turned(path: Path, side: int | None = None) -> tuple[Image, int]:
    """As :func:`read_picture`; and how the stored pixels were turned, 1 to 8 (EXIF; 1: not at all)."""
    from PIL import ImageOps

    with opened(path) as image:
        try:
            if side is not None:
                image.draft(None, (2 * side, 2 * side))
            image.load()
            orientation = orientation_of(image)
            return _rgb(ImageOps.exif_transpose(image), image.format), orientation
        except PictureError as error:
            raise PictureError(f"the image {str(path)!r} {error}") from None
        except _errors() as error:
            raise _unreadable(path, error) from None


def orientation_of(image: Image) -> int:
    """How a picture's stored pixels are to be turned, 1 to 8 (EXIF); 1, not at all, where it says nothing sensible."""
    value = image.getexif().get(_ORIENTATION, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def opened(path: Path) -> Image:
    """A picture's file, opened and not yet decoded. Raises PictureError."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a file's odd metadata, which nobody here needs
            return Image.open(path)
    except _errors() as error:
        raise _unreadable(path, error) from None


def _errors() -> tuple[type[Exception], ...]:
    """What Pillow raises for damaged files of its many formats."""
    import struct

    from PIL import Image

    return (
        *(OSError, ValueError, SyntaxError, EOFError, TypeError, IndexError, KeyError, OverflowError, MemoryError),
        *(struct.error, Image.DecompressionBombError, ZeroDivisionError, AttributeError, NotImplementedError),
    )


def _unreadable(path: Path, error: Exception) -> PictureError:
    from PIL import UnidentifiedImageError

    if isinstance(error, FileNotFoundError):
        return PictureError(f"there is no {str(path)!r}")
    if isinstance(error, UnidentifiedImageError):
        reason = "it is empty" if path.is_file() and not path.stat().st_size else "it is no picture of a known format"
    else:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
    return PictureError(f"cannot read the image {str(path)!r}: {reason}")


def _rgb(image: Image, form: str | None) -> Image:
    """Any mode -> RGB; ``form``: of the file. Raises PictureError (to follow the file's name), and as Pillow does."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and form in ("PNG", "PPM")):
        # Pillow would cut off all above 255. 65535 / 255 = 257.
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((np.clip(values, 0, 65535) / 257 + 0.5).astype(np.uint8)).convert("RGB")
    if image.mode == "I":
        raise PictureError("has integers of 32 bits, whose range is not known: save it with 8 or 16 bits")
    if image.mode == "F":
        values = np.asarray(image)
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            low, high = np.nanmin(values), np.nanmax(values)
            raise PictureError(f"has floating values from {low:.3g} to {high:.3g}, not from 0 to 1: scale them")
        return Image.fromarray((values * 255 + 0.5).astype(np.uint8)).convert("RGB")
    if image.mode == "LAB":
        raise PictureError("has the colours of CIE L*a*b*: save it as RGB")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, (255, 255, 255, 255)), seen).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def turned(image: Image, orientation: int) -> Image:
    """``image`` turned as an EXIF orientation of 1 to 8 says."""
    from PIL import Image

    method = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    return image if method is None else image.transpose(method)


def check_pillow(folder: Path) -> None:
    """Raise ModelError where Pillow is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ModelError(f"reading images from {str(folder)!r} needs pillow: pip install pillow ({error})") from None


class Skipped:
    """Broken files among others: each is told once in a line, the first ones by name, and counted.

    Attributes:
        count: of files so far.
    """

    def __init__(self, strict: bool = False, say: Callable[[str], Any] | None = None) -> None:
        """``strict``: the first one is an error. ``say``: takes the lines; by default they are warnings."""
        self.strict, self.count, self._say = strict, 0, say or _warn

    def add(self, error: PictureError) -> None:
        """Take note of a file that could not be used. Raises it if that is wanted."""
        if self.strict:
            raise error
        self.count += 1
        if self.count <= NAMED:
            self._say(f"{error}; skipped")

    def end(self, of: int, folder: str) -> None:
        """Say how many of the folder's files were skipped."""
        if self.count:
            self._say(f"skipped {self.count} of {of} pictures in {folder!r} (--strict: stop at the first)")


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)

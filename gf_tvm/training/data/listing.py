"""Which files of a folder are pictures of which class, by names alone."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ...errors import ModelError
from .pictures import IMAGE_SUFFIXES, OTHER_PICTURES, is_picture

#: Folders that archivers and cameras leave, which are no classes.
_NO_CLASSES = ("__MACOSX", "@eaDir", "lost+found")

#: What people call the folders of pictures to train on, and to look at meanwhile; the first that is there counts.
TRAIN, VALIDATION = ("train", "training"), ("val", "valid", "validation", "test")


@dataclass(frozen=True)
class Listing:
    """Pictures of a folder.

    Attributes:
        classes: names, sorted.
        files: (file, index into ``classes``), by class and name.
    """

    classes: tuple[str, ...]
    files: tuple[tuple[Path, int], ...]


def list_folder(folder: Path) -> Listing:
    """The pictures of ``folder/<class>/``, also in folders below. Warns of pictures in formats that are not read.

    Raises:
        ModelError: the folder cannot be read; no class folders, or one without pictures (named).
    """
    try:
        classes = sorted(path.name for path in folder.iterdir() if _may_be_class(path))
        found = {name: _below(folder / name) for name in classes}
        loose = sum(is_picture(path) for path in folder.iterdir())
    except OSError as error:
        where = error.filename if error.filename is not None else str(folder)
        raise ModelError(f"cannot read the data folder {str(where)!r}: {error.strerror}") from None
    if not classes:
        there = f"it has {loose} pictures that are in no class; " if loose else ""
        raise ModelError(f"the data folder {str(folder)!r} has no class folders: {there}expected FOLDER/CLASS/IMAGE")
    others = Counter[str]()
    files: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        pictures = [path for path in found[name] if is_picture(path)]
        unread = [path.suffix.lower() for path in found[name] if path.suffix.lower() in OTHER_PICTURES]
        others.update(unread)
        if not pictures:
            instead = f", but {len(unread)} of {unread[0]}, which is not read" if unread else ""
            raise ModelError(
                f"the class folder {str(folder / name)!r} has no images ({' '.join(IMAGE_SUFFIXES)}){instead}"
            )
        files += [(path, label) for path in pictures]
    for suffix, count in sorted(others.items()):
        warnings.warn(
            f"{count} files of {suffix} in {str(folder)!r} are not read: save them as JPEG or PNG", stacklevel=3
        )
    return Listing(tuple(classes), tuple(files))


def split_folders(folder: Path) -> tuple[Path, Path | None] | None:
    """The folders ``train`` and ``val`` (None where only the first is there) of ``folder``; None if it has none.

    A class may have such a name, too: then it has pictures, and no class folders.
    """
    try:
        there = {path.name.lower(): path for path in sorted(folder.iterdir()) if _may_be_class(path)}
    except OSError as error:
        raise ModelError(f"cannot read the data folder {str(folder)!r}: {error.strerror}") from None
    train, validation = (
        next((there[name] for name in names if name in there and _has_classes(there[name])), None)
        for names in (TRAIN, VALIDATION)
    )
    return None if train is None else (train, validation)


def _has_classes(folder: Path) -> bool:
    try:
        return any(map(_may_be_class, folder.iterdir())) and not any(map(is_picture, folder.iterdir()))
    except OSError:
        return False


def _may_be_class(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".") and path.name not in _NO_CLASSES


def _below(folder: Path) -> list[Path]:
    """All files below a class's folder, hidden folders left out, sorted. Raises OSError."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for where, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _NO_CLASSES)
        found += [Path(where, name) for name in sorted(names)]
    return [path for path in found if path.is_file()]

"""Checkpoint files: written so that a crash at any moment leaves the last complete one, and read with suspicion."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..files import check_archive, make_folder, replacing
from .config import TrainingError

#: Changes with the content of a checkpoint; another one is refused.
FORMAT = "gf_tvm.checkpoint/1"


def prepare_folder(folder: Path) -> None:
    """Create the folder, remove what killed runs left half-written, and make sure that files can be written.

    Raises:
        TrainingError: the folder cannot be created or written.
    """
    try:
        make_folder(folder)
        for file in folder.glob(".*.tmp"):
            match = re.search(r"\.(?:pt|bin|json)\.(\d+)\.tmp$", file.name)
            if match and not _running(int(match[1])):
                file.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise TrainingError(f"cannot write into the checkpoint folder {str(folder)!r}: {reason}") from None


def _running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def save(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` (plain values and tensors) to ``path`` by staging, fsync and rename.

    Raises:
        TrainingError: the disk is full or not writable; what was at ``path`` before is still there.
    """
    try:
        with replacing(path) as file:
            torch.save({"format": FORMAT, **content}, file)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself survives a power cut
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch's archive writer reports a full disk as RuntimeError
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise TrainingError(f"cannot write the checkpoint {str(path)!r}: {reason}") from None


def load(path: Path) -> dict[str, Any] | None:
    """Read a checkpoint; None where there is none. Only plain values and tensors are loaded, no code.

    Raises:
        TrainingError: the file cannot be read, is damaged, or is no checkpoint of this format.
    """
    try:
        with open(path, "rb") as file:
            check_archive(file)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = (getattr(error, "strerror", None) or str(error)).strip().splitlines() or [type(error).__name__]
        raise TrainingError(f"the checkpoint {str(path)!r} cannot be read ({reason[0][:120]}); delete it") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise TrainingError(f"{str(path)!r} is not a checkpoint of format {FORMAT!r}, found {found!r}; delete it")
    return content


def check_same(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuse a checkpoint that another configuration made.

    Raises:
        TrainingError: names the file and the first fields that differ.
    """
    if expected.get("patch", "") is None:  # an exact run has no chains, whatever it was told of them
        found = {**found, "chain": expected["chain"]}
    keys = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
    if keys:
        listed = ", ".join(f"{key}={found.get(key)!r} (this run: {expected.get(key)!r})" for key in keys[:3])
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise TrainingError(f"the checkpoint {str(path)!r} is of another run: {listed}{more}")


def state_digest(state: dict[str, Any]) -> str:
    """sha256 of names, shapes, dtypes and values of a state dict."""
    h = hashlib.sha256()
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):  # a module's get_extra_state may return anything
            h.update(f"{name} {tensor!r};".encode())
            continue
        h.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        h.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def file_name(text: str) -> str:
    """``text`` with everything but letters, digits, dot, dash and underscore replaced."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)

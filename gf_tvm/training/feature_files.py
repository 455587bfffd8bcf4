"""Files of a disk cache: plain numbers, memory-mapped when read, beside a JSON file that says what they are.

``X.bin`` has the tensors one after the other, each at a multiple of 64 bytes; ``X.json`` has what they belong to,
their shapes and dtypes, and the sha256 of ``X.bin``. It is written last, so it only speaks of a complete file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import MAX_JSON, read_limited, replacing, sha256_of

FORMAT = "gf_tvm.features/1"
ALIGNMENT = 64


class Refused(Exception):
    """Why a file is not used."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write(
    path: Path, identity: dict[str, Any], layouts: list[TensorSpec], parts: Iterable[tuple[int, list[Tensor]]]
) -> None:
    """Write the tensors, given in parts: (first row, the rows of each tensor). Both files appear whole or not at all.

    Raises:
        OSError: they cannot be written.
    """
    offsets, size = _offsets(layouts)
    description = path.with_suffix(".json")
    # Written as a file, not through memory: a full disk is then an error and not a signal.
    with replacing(path) as file:
        file.truncate(size)
        for first, tensors in parts:
            for layout, offset, tensor in zip(layouts, offsets, tensors, strict=True):
                row = prod(layout.shape[1:]) * layout.dtype.itemsize
                file.seek(offset + first * row)
                file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())  # before the old file's description goes: a full disk leaves both
        head = {"format": FORMAT, "identity": identity, "tensors": _described(layouts), "sha256": sha256_of(file)}
        description.unlink(missing_ok=True)
    with replacing(description) as file:
        file.write(json.dumps(head).encode())


def read(path: Path, identity: dict[str, Any], layouts: list[TensorSpec]) -> list[Tensor] | None:
    """The tensors, mapped into memory; None where there are none. Writing to them does not change the file.

    Raises:
        Refused: the file is damaged or of something else.
    """
    description = path.with_suffix(".json")
    if not path.exists() and not description.exists():
        return None
    offsets, size = _offsets(layouts)
    try:
        head = json.loads(read_limited(description, MAX_JSON))
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise Refused(f"{description.name} is not of format {FORMAT!r}")
        for name, expected in (("identity", identity), ("tensors", _described(layouts))):
            if head.get(name) != expected:
                raise Refused(f"its {name} is another one")
        if path.stat().st_size != size:
            raise Refused(f"it has {path.stat().st_size} bytes, not {size}")
        with open(path, "rb") as file:
            if sha256_of(file) != head.get("sha256"):
                raise Refused("its sha256 is another one")
        bytes_ = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c"))
    except (OSError, ValueError) as error:
        raise Refused(" ".join(str(error).split())) from None
    return [
        bytes_[offset : offset + layout.bytes].view(layout.dtype).reshape(layout.shape)
        for layout, offset in zip(layouts, offsets, strict=True)
    ]


def _offsets(layouts: list[TensorSpec]) -> tuple[list[int], int]:
    """Where each tensor begins, and the size of the file."""
    offsets, end = [], 0
    for layout in layouts:
        offsets.append(end)
        end += -(-layout.bytes // ALIGNMENT) * ALIGNMENT
    return offsets, end


def _described(layouts: list[TensorSpec]) -> list[dict[str, Any]]:
    return [{"shape": list(layout.shape), "dtype": str(layout.dtype).removeprefix("torch.")} for layout in layouts]

"""Finished parts of an evaluation: one small file each, found again by everything that decides its content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..files import MAX_JSON, make_folder, read_limited, replacing
from ..training.checkpoint import file_name
from .results import EvaluationError

#: Changes with the content of a part; files of another one are not found, because it is a part of their key.
FORMAT = "gf_tvm.evaluation_part/1"


class Store:
    """A folder of finished parts.

    Raises:
        EvaluationError: the folder cannot be created or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            make_folder(folder)
        except OSError as error:
            raise EvaluationError(f"cannot write into the folder {str(folder)!r}: {error.strerror or error}") from None

    def get(self, label: str, key: dict[str, Any]) -> Any:
        """The part with this key, None where there is none.

        Raises:
            EvaluationError: its file cannot be read or is damaged.
        """
        path = self._path(label, key)
        try:
            content = json.loads(read_limited(path, MAX_JSON))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise EvaluationError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
        except ValueError:
            content = None
        if not isinstance(content, dict) or content.get("sha256") != _digest(content.get("value")):
            raise EvaluationError(f"{str(path)!r} is damaged (its checksum does not fit); delete it")
        return content["value"]

    def put(self, label: str, key: dict[str, Any], value: Any) -> None:
        """Write a part. Raises EvaluationError."""
        write_json(self._path(label, key), {"key": _keyed(key), "value": value, "sha256": _digest(value)})

    def _path(self, label: str, key: dict[str, Any]) -> Path:
        return self.folder / f"{file_name(label)}-{_digest(_keyed(key))[:16]}.json"


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` so that the file is there whole or as it was before. Raises EvaluationError."""
    try:
        with replacing(path) as file:
            file.write((json.dumps(value, indent=2) + "\n").encode())
    except OSError as error:
        raise EvaluationError(f"cannot write {str(path)!r}: {error.strerror or error}") from None


def _keyed(key: dict[str, Any]) -> dict[str, Any]:
    return {"format": FORMAT, **key}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

"""Single convolutions to tune, compile and compare: the paper's cases, a shapes file; which of them, in which dtypes.

A shapes file is JSON: an object whose ``cases`` list holds one object per convolution. The fields of
:class:`~gf_tvm.core.geometry.Geometry`, ``dtype`` and ``patches`` may stand in the head (then they hold for every case)
or in a case (then they override the head); ``name`` belongs to a case, ``source`` (free text) to the head.
``gf_tvm/shapes/paper_cases.json`` is an example. Nothing here imports PyTorch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib import resources
from typing import Any

from ..core.geometry import Geometry, Pair, Patch, as_pair
from ..core.workload import DTYPES, Workload
from ..errors import GeometryError
from ..files import MAX_JSON, read_limited

_REQUIRED = ("n", "ci", "co", "h", "w", "kernel")
_DEFAULTS: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "dtype": "float32"}
_FIELDS = (*_REQUIRED, *_DEFAULTS, "patches")


@dataclass(frozen=True)
class Case:
    """One convolution with one patch.

    Args:
        name: readable; cases that differ in nothing but the patch share it.
        geometry: shapes and patch; n >= 1.
        dtype: storage dtype of x, y, W and their gradients, one of :data:`~gf_tvm.core.workload.DTYPES`.
        layers: the model's layers that have this geometry; empty for a case from a file.
        first: the input of one of these layers needs no gradient, because nothing before it is trained.
    """

    name: str
    geometry: Geometry
    dtype: str = "float32"
    layers: tuple[str, ...] = ()
    first: bool = False


def paper_cases(patches: Sequence[Patch] | None = None) -> list[Case]:
    """The seven latency cases of the paper, each with every patch of ``patches`` (default: 2 and 4)."""
    file = resources.files(__package__) / "paper_cases.json"
    return _parse_cases(file.read_text(encoding="utf-8"), "paper_cases.json", patches)


def load_cases(path: str | os.PathLike[str], patches: Sequence[Patch] | None = None) -> list[Case]:
    """Read a shapes file.

    Args:
        path: a JSON file, see the module's description.
        patches: replaces the patches named in the file, those of single cases included.

    Returns:
        The cases in the file's order, each once per patch.

    Raises:
        GeometryError: the file cannot be read or does not describe convolutions; names file, case and field.
    """
    try:
        text = read_limited(path, MAX_JSON).decode("utf-8-sig")
    except OSError as error:
        raise GeometryError(f"{path}: cannot read this shapes file: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise GeometryError(f"{path}: a shapes file must be JSON text in UTF-8") from None
    return _parse_cases(text, str(path), patches)


def _parse_cases(text: str, source: str, patches: Sequence[Patch] | None) -> list[Case]:
    try:
        head = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GeometryError(f"{source}: not JSON: {error}") from None
    if not isinstance(head, dict) or not isinstance(head.get("cases"), list) or not head["cases"]:
        raise GeometryError(f"{source}: a shapes file is an object with a non-empty list 'cases'")
    unknown = sorted(set(head) - {*_FIELDS, "source", "cases"})
    if unknown:
        raise GeometryError(f"{source}: head: unknown field {unknown[0]!r}; known: {', '.join(_FIELDS)}")
    shared = {key: head[key] for key in _FIELDS if key in head}
    if patches is not None:
        patches = as_patches(patches)
    cases: list[Case] = []
    names: dict[str, int] = {}
    for index, entry in enumerate(head["cases"], start=1):
        where = f"{source}: case {index}"
        try:
            parsed = _parse_case(entry, shared, patches)
        except GeometryError as error:
            raise GeometryError(f"{where}: {error}") from None
        name = parsed[0].name
        if name in names:
            if "name" in entry:
                raise GeometryError(f"{where}: name {name!r} is already taken by case {names[name]}")
            name = f"{name}#{index}"
        names[name] = index
        cases += [replace(case, name=name) for case in parsed]
    return cases


def _parse_case(entry: Any, shared: dict[str, Any], patches: Sequence[Patch] | None) -> list[Case]:
    if not isinstance(entry, dict):
        raise GeometryError(f"must be an object, got {_short(entry)}")
    unknown = sorted(set(entry) - {*_FIELDS, "name"})
    if unknown:
        raise GeometryError(f"unknown field {unknown[0]!r}; known: name, {', '.join(_FIELDS)}")
    fields = {**_DEFAULTS, **shared, **entry}
    name = fields.pop("name", None)
    dtype = fields.pop("dtype")
    own_patches = fields.pop("patches", None)
    missing = [key for key in _REQUIRED if key not in fields]
    if missing:
        raise GeometryError(f"field {missing[0]!r} is missing here and in the head")
    if dtype not in DTYPES:
        raise GeometryError(f"dtype must be one of {', '.join(DTYPES)}, got {_short(dtype)}")
    if name is not None and (not isinstance(name, str) or not name.strip() or not name.isprintable()):
        raise GeometryError(f"name must be a non-empty line of text, got {_short(name)}")
    if patches is None:
        if own_patches is None:
            raise GeometryError("field 'patches' is missing here and in the head, and no patch was asked for")
        patches = as_patches(own_patches)
    cases = []
    for patch in patches:
        geometry = Geometry(**fields, patch=patch)  # type: ignore[arg-type]
        if geometry.n < 1:
            raise GeometryError("n must be at least 1, got 0")
        cases.append(Case(name or _default_name(geometry), geometry, dtype))
    return cases


def as_patches(patches: Any) -> list[Pair]:
    """``patches`` as pairs without repetitions. Raises GeometryError.

    A list: ``[2, 4]`` is two square patches, ``[[2, 1]]`` one oblong.
    """
    if not isinstance(patches, Sequence) or isinstance(patches, str) or not patches:
        raise GeometryError(f"patches must be a non-empty list of patches, got {_short(patches)}")
    return list(dict.fromkeys(as_pair(patch, "patch", 1) for patch in patches))


def _short(value: Any) -> str:
    """``repr`` that fits into one line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _default_name(geometry: Geometry) -> str:
    channels = str(geometry.ci) if geometry.ci == geometry.co else f"{geometry.ci}-{geometry.co}"
    return f"{channels}x{geometry.h}x{geometry.w}"


def workloads_of(cases: Iterable[Case], chained: bool = False) -> list[Workload]:
    """What training on these cases calls: each workload once, in the order of the cases.

    ``filter_input`` and ``backward`` for each; ``backward_weight`` too where the input of a layer needs no gradient
    (as long as nothing before that layer is trained). With ``chained`` also ``input_grad`` and ``weight_grad``, which
    chains of convolutions call (:mod:`gf_tvm.chains`).
    """
    kernels = [
        (kernel, case)
        for case in cases
        for kernel in (
            *("filter_input", "backward"),
            *(("backward_weight",) if case.first else ()),
            *(("input_grad", "weight_grad") if chained else ()),
        )
    ]
    return list(dict.fromkeys(Workload(kernel, case.geometry, case.dtype) for kernel, case in kernels))


def parse_input(text: str) -> tuple[int, int, int, int]:
    """``"8x3x32x32"`` -> (8, 3, 32, 32): batch, channels, height, width. Raises GeometryError."""
    match = re.fullmatch(r"(\d{1,9})x(\d{1,9})x(\d{1,9})x(\d{1,9})", text.strip().lower(), flags=re.ASCII)
    if match is None or min(numbers := tuple(int(part) for part in match.groups())) < 1:
        raise GeometryError(
            f"an input is written NxCxHxW with numbers of at least 1 (as 8x3x32x32), got {_short(text)}"
        )
    n, c, h, w = numbers
    return n, c, h, w


def parse_patches(text: str) -> list[Pair]:
    """``"2,4"`` -> [(2, 2), (4, 4)]; ``"2x1,4"`` -> [(2, 1), (4, 4)] (height x width). Raises GeometryError."""
    patches: list[Pair] = []
    for part in text.split(","):
        match = re.fullmatch(r"(-?\d{1,9})(?:x(-?\d{1,9}))?", part.strip().lower(), flags=re.ASCII)
        if match is None:
            raise GeometryError(f"patches are written as 2,4 or 2x1,4 (height x width), got {_short(text)}")
        rows = int(match[1])
        patches.append(as_pair((rows, int(match[2])) if match[2] else rows, "patch", 1))
    return list(dict.fromkeys(patches))


def parse_dtypes(text: str) -> list[str]:
    """``"float32,float16"`` -> ["float32", "float16"]. Raises GeometryError."""
    dtypes = [part.strip() for part in text.split(",")]
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise GeometryError(f"dtypes are written as {','.join(DTYPES)}, got {_short(dtype)}")
    return list(dict.fromkeys(dtypes))


def with_dtypes(cases: Iterable[Case], dtypes: Sequence[str]) -> list[Case]:
    """All cases in each of these dtypes, in place of their own; equal ones once."""
    return list(dict.fromkeys(replace(case, dtype=dtype) for dtype in dtypes for case in cases))


def pick_cases(cases: Sequence[Case], text: str) -> list[Case]:
    """Choose cases by number or name: ``"4-7"``, ``"1,3"``, ``"layer4.*"``; numbers count names, from 1.

    Raises:
        GeometryError: a part fits no case; lists the cases.
    """
    names = list(dict.fromkeys(case.name for case in cases))
    chosen: set[str] = set()
    for part in (part.strip() for part in text.split(",")):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part, flags=re.ASCII)
        if match is not None:
            low, high = int(match[1]), int(match[2] or match[1])
            found = names[low - 1 : high] if 1 <= low <= high <= len(names) else []
        else:
            found = [name for name in names if name == part or fnmatchcase(name, part)]
        if not found:
            known = ", ".join(f"{i} {name}" for i, name in enumerate(names, start=1))
            raise GeometryError(f"no case {part!r}; cases: {known}")
        chosen.update(found)
    return [case for case in cases if case.name in chosen]


def format_patch(patch: Pair) -> str:
    """(2, 2) -> "R2", (2, 1) -> "R2x1"."""
    return f"R{patch[0]}" if patch[0] == patch[1] else f"R{patch[0]}x{patch[1]}"

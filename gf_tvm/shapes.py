"""Which convolutions to tune, compile and compare: the paper's cases, a shapes file, or the layers of a model.

A shapes file is JSON: an object whose ``cases`` list holds one object per convolution. The fields of
:class:`~gf_tvm.core.geometry.Geometry`, ``dtype`` and ``patches`` may stand in the head (then they hold for every case)
or in a case (then they override the head); ``name`` belongs to a case, ``source`` (free text) to the head.
``gf_tvm/data/paper_cases.json`` is an example. Nothing here imports TVM.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .core.geometry import Geometry, Pair, as_pair
from .core.workload import DTYPES, Workload
from .errors import GeometryError, ModelError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("gf_tvm")

Patch = int | Sequence[int]

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
    file = resources.files(__package__) / "data" / "paper_cases.json"
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
        text = Path(path).read_text(encoding="utf-8")
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
        patches = _check_patches(patches, "patches")
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
        patches = _check_patches(own_patches, "patches")
    cases = []
    for patch in patches:
        geometry = Geometry(**fields, patch=patch)  # type: ignore[arg-type]
        if geometry.n < 1:
            raise GeometryError("n must be at least 1, got 0")
        cases.append(Case(name or _default_name(geometry), geometry, dtype))
    return cases


def _check_patches(patches: Any, name: str) -> list[Pair]:
    """``patches`` as pairs without repetitions. A list: ``[2, 4]`` is two square patches, ``[[2, 1]]`` one oblong."""
    if not isinstance(patches, Sequence) or isinstance(patches, str) or not patches:
        raise GeometryError(f"{name} must be a non-empty list of patches, got {_short(patches)}")
    return list(dict.fromkeys(as_pair(patch, "patch", 1) for patch in patches))


def _short(value: Any) -> str:
    """``repr`` that fits into one line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _default_name(geometry: Geometry) -> str:
    channels = str(geometry.ci) if geometry.ci == geometry.co else f"{geometry.ci}-{geometry.co}"
    return f"{channels}x{geometry.h}x{geometry.w}"


def model_cases(
    model: torch.nn.Module,
    input_shape: Sequence[int],
    last: int | None = None,
    layers: Any = None,
    patches: Sequence[Patch] = (2,),
) -> list[Case]:
    """The convolutions of a model that would be filtered, with the shapes that they see.

    Runs the model once on zeros, in evaluation mode, and leaves it as it was. Which inputs need a gradient when
    the selected layers alone are trained is taken from autograd itself, not from the order of the layers: the
    shortcut of a residual block needs none either if its main path's first layer does not.

    Args:
        model: takes one tensor of ``input_shape``.
        input_shape: (n, c, h, w) of a training batch, n >= 1.
        last, layers: as in :func:`gf_tvm.filter_model`.
        patches: every layer is taken with each of them.

    Returns:
        Cases in the order in which the layers first run; layers with equal geometry and dtype are one case whose
        name counts them ("layer4.1.conv1 x3").

    Raises:
        ModelError: no such layers, or the model does not run on that input.
        GeometryError: bad patches.
    """
    import torch

    from .nn import _obstacle, _shown, select_layers

    shape = tuple(input_shape)
    pairs = _check_patches(patches, "patches")
    selected = dict(select_layers(model, last, layers))
    # As filter_model does it: what cannot be filtered is left out, unless it was asked for by name or nothing remains.
    obstacles = {name: reason for name, module in selected.items() if (reason := _obstacle(module))}
    by_name = not (last is not None or callable(layers))
    for name, reason in obstacles.items():
        if by_name or len(obstacles) == len(selected):
            raise ModelError(f"{_shown(name)} cannot be filtered: {reason}")
        logger.warning("%s left alone: %s", _shown(name), reason)
    selected = {name: module for name, module in selected.items() if name not in obstacles}
    seen: dict[tuple[Geometry, str], list[tuple[str, bool]]] = {}  # geometry without patch, dtype: who, needs gradient
    called: set[str] = set()

    def recorder(name: str) -> Callable[..., None]:
        def record(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            called.add(name)
            seen.setdefault(_call_of(name, module, x), []).append((name, bool(x.requires_grad)))

        return record

    hooks = [module.register_forward_pre_hook(recorder(name), with_kwargs=True) for name, module in selected.items()]
    parameters = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    trained = {id(p) for module in selected.values() for p in module.parameters()}
    first = next((p for p, _ in parameters if p.is_floating_point()), None)
    try:
        model.eval()
        for parameter, _ in parameters:
            if parameter.is_floating_point():
                parameter.requires_grad_(id(parameter) in trained)
        with torch.enable_grad():
            zeros = torch.zeros(
                shape,
                dtype=first.dtype if first is not None else torch.float32,
                device=first.device if first is not None else None,
            )
            model(zeros)
    except (GeometryError, ModelError):
        raise
    except Exception as error:
        raise does_not_run(model, shape, error) from error
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in parameters:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        for module, training in modes:
            module.training = training
    idle = [name for name in selected if name not in called]
    if not called:
        raise ModelError(f"none of the selected layers ran in {type(model).__name__}: {', '.join(idle)}")
    if idle:
        logger.warning("selected layers that the model does not use: %s", ", ".join(idle))

    cases = []
    for (geometry, dtype), users in seen.items():
        names = tuple(dict.fromkeys(name for name, _ in users))
        label = names[0] if len(users) == 1 else f"{names[0]} x{len(users)}"
        needs_no_gradient = not all(needed for _, needed in users)
        cases += [Case(label, replace(geometry, patch=p), dtype, names, needs_no_gradient) for p in pairs]
    return cases


def does_not_run(model: torch.nn.Module, shape: Sequence[int], error: Exception) -> ModelError:
    """What to raise where ``model``, which is the user's code, fails on an input of that shape."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ModelError(f"{type(model).__name__} does not run on an input of shape {'x'.join(map(str, shape))}: {reason}")


def _call_of(name: str, module: Any, x: torch.Tensor) -> tuple[Geometry, str]:
    """Geometry (with a patch of one pixel) and dtype of one call of a layer, as FilteredConv2d would see it."""
    dtype = str(x.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ModelError(f"layer {name!r} works in {dtype}; kernels store {', '.join(DTYPES)}")
    if x.dim() != 4:
        raise ModelError(f"layer {name!r} gets an input of {x.dim()} dimensions; a batch (n, c, h, w) has 4")
    n, ci, h, w = x.shape
    padding = module.padding
    if module.padding_mode != "zeros":  # padded before the convolution, which then sees a larger map
        left, right, top, bottom = module._reversed_padding_repeated_twice
        h, w, padding = h + top + bottom, w + left + right, 0
    elif padding == "valid":
        padding = 0
    elif padding == "same":  # an odd total is padded to an even one after the map
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        h, w, padding = h + total[0] % 2, w + total[1] % 2, (total[0] // 2, total[1] // 2)
    settings = (module.stride, padding, module.dilation, module.groups)
    return Geometry(n, ci, module.out_channels, h, w, module.kernel_size, (1, 1), *settings), dtype


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

"""Reading the files of a report: what each is, and that it has what a page needs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import GeometryError, LogError, ReportError
from ..files import MAX_JSON, read_limited
from . import fields
from .fields import check

#: What ``schema`` (of a comparison: ``schema_version``) must be, and the command that writes it.
SCHEMAS = {
    "gf_tvm.train/1": "train",
    "gf_tvm.tune/1": "tune",
    "gf_tvm.evaluate/1": "evaluate",
}
COMPARE_VERSION = 1

_HEAD = {"machine": fields.OBJECT, "threads": fields.SIZE, "versions": fields.OBJECT}
_COMPARE = {
    **_HEAD,
    "peak_gflops": fields.ABOVE_ZERO,
    "bandwidth_gbs": fields.ABOVE_ZERO,
    "conditions": fields.OBJECT,
    "rows": fields.list_of(fields.OBJECT),
}
_COMPARE_ROW = {
    **dict.fromkeys(("name", "device", "baseline", "schedule"), fields.TEXT),
    "dtype": fields.one_of("float32", "float16", "bfloat16", "float64"),
    **dict.fromkeys(("n", "ci", "co", "h", "w", "groups"), fields.SIZE),
    **dict.fromkeys(("kernel", "stride", "dilation", "patch"), fields.SIZES),
    "padding": fields.OFFSETS,
    **dict.fromkeys(("baseline_ms", "reference_ms", "gf_tvm_ms", "roofline_ms"), fields.ABOVE_ZERO),
    "saved_bytes_baseline": fields.SIZE,
    "saved_bytes_gf_tvm": fields.SIZE,
    "max_rel_error": fields.NOT_NEGATIVE,
}
_COMPARE_OPTIONAL = {"gf_tvm_kernel_ms": fields.ABOVE_ZERO.or_none()}
_VARIANTS = ("exact", "filtered", "chained")
_CHAIN_ROW = {
    **dict.fromkeys(("name", "device", "schedule", "filtered_schedule"), fields.TEXT),
    "dtype": _COMPARE_ROW["dtype"],
    "patch": fields.SIZES,
    "convolutions": fields.each(fields.TEXT),
    "roofline_ms": fields.ABOVE_ZERO,
    "max_rel_error": fields.NOT_NEGATIVE,
}
#: Of a chain: what has a value for each variant.
_CHAIN_VALUES = {"forward_ms": fields.ABOVE_ZERO, "backward_ms": fields.ABOVE_ZERO, "kept_bytes": fields.SIZE}
_TUNE = {"device": fields.TEXT, "made": fields.OBJECT, "tasks": fields.OBJECTS}
_TUNE_TASK = {
    "workload": fields.TEXT,
    "seconds": fields.ABOVE_ZERO.or_none(),
    "default_seconds": fields.ABOVE_ZERO.or_none(),
    "trial_seconds": fields.list_of(fields.ABOVE_ZERO.or_none()),
}
_STEP = dict.fromkeys(("forward", "backward", "update"), fields.NOT_NEGATIVE)
_TRAIN_RUN = {
    **_HEAD,
    "variant": fields.TEXT,
    "config": fields.OBJECT,
    "test_accuracy": fields.SHARE,
    "initial_test_accuracy": fields.SHARE,
    "step_ms": fields.OBJECT,
    "rows": fields.OBJECTS,
}
_TRAIN_CONFIG = {"model": fields.TEXT, "data": fields.TEXT, "last": fields.SIZE, "seed": fields.COUNT}
_TRAIN_ROW = {"kept_bytes": fields.COUNT, "kept_bytes_convolutions": fields.COUNT}
_EVALUATE = {
    **_HEAD,
    **dict.fromkeys(("model", "data", "task", "metric"), fields.TEXT),
    "conditions": fields.TEXTS,
    "settings": fields.OBJECTS,
    "limits": fields.OBJECT,
    "recommendation": fields.OBJECT.or_none(),
}
_SETTING = {
    "variant": fields.TEXT,
    "last": fields.SIZE,
    "seeds": fields.each(fields.COUNT),
    "scores": fields.each(fields.SHARE),
    "initial_scores": fields.each(fields.SHARE),
    "step_ms": fields.OBJECT,
    "kept_bytes": fields.COUNT,
    "kept_bytes_convolutions": fields.COUNT,
    "peak_bytes": fields.COUNT.or_none(),
    "backward_flops": fields.COUNT,
    "forward_flops": fields.COUNT,
    "energy_joules_per_step": fields.NUMBER.or_none(),
}
#: What files of earlier versions lack.
_SETTING_OPTIONAL = {"other_cores": fields.NOT_NEGATIVE.or_none()}
_OBSTACLES = {"limits": fields.TEXT.or_none(), "filtering": fields.TEXTS, "cache": fields.TEXT.or_none()}
_LAYER = {
    "name": fields.TEXT,
    "variant": fields.TEXT,
    "cosine_weight": fields.COSINE,
    "cosine_input": fields.COSINE.or_none(),
}
_LIMITS = {"memory_budget": fields.COUNT.or_none(), "max_score_drop": fields.NUMBER.or_none()}
_RECOMMENDATION = {"variant": fields.TEXT, "last": fields.SIZE, "why": fields.TEXT}


@dataclass(frozen=True)
class Source:
    """A checked file. ``kind`` is the command that wrote it, or "log" for a tuning log; ``name`` the file's name."""

    name: str
    kind: str
    document: dict[str, Any]


def read_all(paths: Iterable[str | os.PathLike[str]]) -> list[Source]:
    """Read and check files. Raises ReportError: none, one that is given twice, and as :func:`read`."""
    sources: list[Source] = []
    seen: dict[Path, str] = {}
    for path in map(Path, paths):
        real = path.resolve()
        if real in seen:
            raise ReportError(f"{path}: given twice; its numbers would be counted twice")
        seen[real] = path.name
        sources.append(read(path))
    if not sources:
        raise ReportError("there is nothing to report: give files that gf-tvm compare, tune, train or evaluate wrote")
    return sources


def read(path: str | os.PathLike[str]) -> Source:
    """Read and check one file: the JSON of ``compare``, ``tune``, ``train`` or ``evaluate``, or a tuning log.

    Raises:
        ReportError: it cannot be read, is not JSON, is of another kind or schema version, lacks a field (which one,
            and in which row), or has no rows.
    """
    from ..tuning.log import MAX_BYTES

    path = Path(path)
    try:
        text = read_limited(path, MAX_BYTES if path.suffix == ".jsonl" else MAX_JSON).decode("utf-8")
    except OSError as error:
        raise ReportError(f"{path}: cannot read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ReportError(f"{path}: not JSON: not UTF-8 text") from None
    if path.suffix == ".jsonl":
        return _log(path, text)
    try:
        # NaN is not JSON, and would reach the page as a number.
        document = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path}: not JSON: {error or type(error).__name__}") from None
    kind = _kind(path, document)
    _CHECKS[kind](str(path), document)
    return Source(path.name, kind, document)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _kind(path: Path, document: Any) -> str:
    known = f"schema_version {COMPARE_VERSION} (compare) or schema {', '.join(SCHEMAS)}"
    if not isinstance(document, dict):
        raise ReportError(f"{path}: must be an object with {known}, got {fields.shown(document)}")
    schema = document.get("schema")
    if isinstance(schema, str) and schema in SCHEMAS:
        return SCHEMAS[schema]
    if schema is not None:
        raise ReportError(f"{path}: schema is {fields.shown(schema)}; this version reads {known}")
    version = document.get("schema_version")
    if version is None:
        raise ReportError(f"{path}: has no schema; this version reads {known}")
    if version != COMPARE_VERSION or isinstance(version, bool):
        raise ReportError(f"{path}: schema_version is {fields.shown(version)}; this version reads {known}")
    return "compare"


def _rows(where: str, rows: list[Any], kinds: Mapping[str, fields.Kind], what: str, name: str) -> None:
    for number, row in enumerate(rows, start=1):
        label = row.get(name) if isinstance(row, dict) else None
        check(f"{where}, {what} {number}" + (f" ({label})" if isinstance(label, str) else ""), row, kinds)


def _compare(where: str, document: dict[str, Any]) -> None:
    from ..comparison.limits import traffic
    from ..core.geometry import Geometry

    check(where, document, _COMPARE)
    document.setdefault("chains", [])  # earlier versions have none
    check(where, document, {"chains": fields.list_of(fields.OBJECT)})
    if not document["rows"] and not document["chains"]:
        raise ReportError(f"{where}: 'rows' is empty: there is nothing to report")
    _rows(where, document["chains"], _CHAIN_ROW, "chain", "name")
    for number, row in enumerate(document["chains"], start=1):
        for name, kind in _CHAIN_VALUES.items():
            place = f"{where}, chain {number} ({row['name']}), {name}"
            check(place, row.get(name), dict.fromkeys(_VARIANTS, kind))
    _rows(where, document["rows"], _COMPARE_ROW, "row", "name")
    for number, row in enumerate(document["rows"], start=1):
        place = f"{where}, row {number} ({row['name']})"
        # What only some comparisons have.
        check(place, row, {name: kind for name, kind in _COMPARE_OPTIONAL.items() if name in row})
        for name in ("peak_gflops", "bandwidth_gbs"):
            if name in row:
                check(f"{place}, {name}", row[name], {"median": fields.ABOVE_ZERO})
        # The least bytes and operations of the roofline follow from the geometry, by the formulas of the limit.
        values = (row[name] for name in Geometry.__match_args__)
        sizes: list[Any] = [tuple(value) if isinstance(value, list) else value for value in values]
        try:
            geometry = Geometry(*sizes)
            row["moved_bytes"], row["operations"] = traffic(geometry, row["dtype"])
        except (GeometryError, AttributeError, KeyError, TypeError) as error:
            raise ReportError(f"{place}: no convolution: {error}") from None


def _tune(where: str, document: dict[str, Any]) -> None:
    check(where, document, _TUNE)
    _rows(where, document["tasks"], _TUNE_TASK, "task", "workload")
    if not any(task["trial_seconds"] for task in document["tasks"]):
        raise ReportError(f"{where}: no kernel has a trial: there is nothing to report")


def _train(where: str, document: dict[str, Any]) -> None:
    check(where, document, {"runs": fields.OBJECTS})
    _rows(where, document["runs"], _TRAIN_RUN, "run", "variant")
    for number, run in enumerate(document["runs"], start=1):
        place = f"{where}, run {number} ({run['variant']})"
        check(f"{place}, config", run["config"], _TRAIN_CONFIG)
        check(f"{place}, step_ms", run["step_ms"], _STEP)
        _rows(place, run["rows"], _TRAIN_ROW, "epoch", "")


def _evaluate(where: str, document: dict[str, Any]) -> None:
    check(where, document, _EVALUATE)
    _rows(where, document["settings"], _SETTING, "setting", "variant")
    for number, setting in enumerate(document["settings"], start=1):
        place = f"{where}, setting {number} ({setting['variant']})"
        check(f"{place}, step_ms", setting["step_ms"], _STEP)
        check(place, setting, {name: kind for name, kind in _SETTING_OPTIONAL.items() if name in setting})
        for name in ("scores", "initial_scores"):
            if len(setting[name]) != len(setting["seeds"]):
                seeds, got = len(setting["seeds"]), len(setting[name])
                raise ReportError(f"{place}: {name!r} must have one number per seed, {seeds}, got {got}")
    layers = document.get("layers")
    if not isinstance(layers, list):  # an evaluation of the exact pass alone has none
        raise ReportError(f"{where}: 'layers' must be a list, got {fields.shown(layers)}")
    _rows(where, layers, _LAYER, "layer", "name")
    check(f"{where}, limits", document["limits"], _LIMITS)
    if "obstacles" in document:
        check(f"{where}, obstacles", document["obstacles"], _OBSTACLES)
    if document["recommendation"] is not None:
        check(f"{where}, recommendation", document["recommendation"], _RECOMMENDATION)


_CHECKS = {"compare": _compare, "tune": _tune, "train": _train, "evaluate": _evaluate}


def _log(path: Path, text: str) -> Source:
    """A tuning log in the form of the tuner's JSON with one task."""
    from ..tuning.log import SPACES, best_record, read_log, trials_of

    # Lines of JSON are what --json-events writes, too.
    if '"gf_tvm_log"' not in text.partition("\n")[0]:
        raise ReportError(
            f"{path}: not a tuning log; of tuning a report takes what gf-tvm tune --json writes, or logs "
            "(DIR/<device>/<workload>.jsonl)"
        )
    try:
        log = read_log(path)
    except LogError as error:
        raise ReportError(str(error)) from None
    best = best_record(log.records)
    trials = trials_of(log.records, best.space if best else SPACES[0])
    task = {
        "workload": log.identity.key,
        "seconds": best.seconds if best else None,
        "default_seconds": best.default_seconds if best else None,
        "trial_seconds": [record.seconds for record in trials],
    }
    document = {"device": log.identity.device, "made": log.made, "tasks": [task]}
    _tune(str(path), document)
    return Source(path.name, "log", document)

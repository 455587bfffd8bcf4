"""What boards answer, checked before it is believed: types, ranges and sizes.

A board may be of another version, faulty or not ours at all. What makes no sense is its trouble and no candidate's
result: everything that is believed is read here, and nothing that the log would refuse comes through.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from ...machine.sensors import Reading
from ..log import check_outcome
from .result import Result

#: Longest answer that is read, in characters; the longest honest one is a comparison of MetaSchedule's traces.
MAX_ANSWER = 1 << 20
# Characters of a name, of a candidate's message, and of what is shown of a line about the board.
_LONGEST_NAME, _LONGEST_MESSAGE, _LONGEST_LINE = 100, 2000, 500
_MOST_RUNS = 10_000
# Seconds of one call of a kernel: entering any function takes longer than the first, no trial as long as the second.
_LEAST_SECONDS, _MOST_SECONDS = 1e-9, 86400.0
_MOST_CORES = 1 << 16
#: What a board can say of a candidate: it does not build any.
_STATUSES = ("ok", "run", "wrong", "crash", "timeout")


class BadAnswer(Exception):
    """A board has answered what makes no sense; the message says what about it, in one line."""


@dataclass(frozen=True)
class Greeting:
    """What a board says of itself; see :meth:`gf_tvm.tuning.measuring.board_service.BoardService.hello`."""

    name: str
    cores: int
    threads: int
    emulated: bool
    gpu: Mapping[str, Any] | None
    checksums: bool


@dataclass(frozen=True)
class Answer:
    """What an answer has to say.

    Args:
        kind: "done", "broken" or "failed".
        value: if it is done, what was asked for, not checked yet; else a line of text.
        name: of the board, if it is told beside the line.
    """

    kind: str
    value: Any
    name: str = ""


def answer_of(text: str) -> Answer:
    """Read an answer.

    Raises:
        BadAnswer: it is something else.
    """
    if len(text) > MAX_ANSWER:
        raise BadAnswer(f"more than {MAX_ANSWER} characters")
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        raise BadAnswer(f"not JSON but {text[:40]!r}") from None
    fields = _object(answer, "the answer")
    if "done" in fields:
        return Answer("done", fields["done"])
    for kind in ("broken", "failed"):
        if isinstance(fields.get(kind), str):
            name = fields.get("name")
            return Answer(kind, " ".join(fields[kind].split())[:_LONGEST_LINE], name if _is_name(name) else "")
    raise BadAnswer("neither 'done', 'broken' nor 'failed' in it")


def name_and_versions(value: Any) -> tuple[str, dict[str, str | None]]:
    """A board's name and the versions of its packages, from its greeting. Raises BadAnswer."""
    fields = _object(value, "the greeting")
    name = fields.get("name")
    if not _is_name(name):
        raise BadAnswer(f"name must be text of 1 to {_LONGEST_NAME} printable characters")
    versions = _object(fields.get("versions"), "versions")
    if not all(version is None or isinstance(version, str) for version in versions.values()):
        raise BadAnswer("versions must be text or null")
    return name, {package: version and version[:_LONGEST_NAME] for package, version in versions.items()}


def greeting_of(value: Any) -> Greeting:
    """The greeting of a board whose versions are the host's. Raises BadAnswer."""
    name, _ = name_and_versions(value)
    numbers = {field: value.get(field) for field in ("cores", "threads")}
    for field, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool) or not 0 < number < _MOST_CORES:
            raise BadAnswer(f"{field} must be an integer from 1 on")
    if not isinstance(value.get("emulated"), bool):
        raise BadAnswer("emulated must be true or false")
    gpu = value.get("gpu")
    if gpu is not None:
        _object(gpu, "gpu")
        if not all(isinstance(gpu.get(field), str) for field in ("name", "arch")):
            raise BadAnswer("name and arch of the GPU must be text")
    checksums = value.get("checksums") == "sha256"
    return Greeting(name, **numbers, emulated=value["emulated"], gpu=gpu, checksums=checksums)


def seconds_of(value: Any, most: float) -> float:
    """A duration from 0 to ``most`` seconds. Raises BadAnswer."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= most:
        raise BadAnswer(f"a duration must be a number from 0 to {most:.0f}")
    return float(value)


def reading_of(value: Any) -> dict[str, Any]:
    """What a board's sensors say, as plain values; see :class:`gf_tvm.machine.sensors.Reading`. Raises BadAnswer."""
    try:
        return Reading.from_dict(value).to_dict()
    except ValueError as error:
        raise BadAnswer(str(error)) from None


def results_of(value: Any, names: Collection[str] | None) -> tuple[dict[str, Any], dict[str, Result]]:
    """What came of running libraries.

    Args:
        value: the answer.
        names: of the libraries of a comparison; None for a single library.

    Returns:
        (sensors, results by name); a single result's name is "".

    Raises:
        BadAnswer: something in it makes no sense, or there is not one result for each library.
    """
    fields = _object(value, "the answer to run")
    sensors = reading_of(fields.get("sensors"))
    if names is None:
        return sensors, {"": _result_of(fields.get("result"))}
    results = _object(fields.get("results"), "results")
    if set(results) != set(names):
        raise BadAnswer(f"results must be those of the {len(names)} libraries that were compared")
    return sensors, {name: _result_of(results[name]) for name in names}


def _result_of(value: Any) -> Result:
    fields = dict(_object(value, "a result"))
    if fields.get("excess") is None:
        fields.pop("excess", None)
    fields.pop("board", None)  # what is logged of the board is what it told of its sensors
    try:
        check_outcome(fields)
    except ValueError as error:
        raise BadAnswer(str(error)) from None
    status, runs, message = fields["status"], fields.get("runs", []), fields.get("message", "")
    if status not in _STATUSES:
        raise BadAnswer(f"status must be one of {', '.join(_STATUSES)}")
    if (status == "ok") != bool(runs):
        raise BadAnswer("runs must be given for a kernel that ran well, and only for such")
    if status == "ok" and fields.get("excess", 0) > 1:
        raise BadAnswer("excess must be at most 1 for a kernel that ran well")
    if len(runs) > _MOST_RUNS or not all(_LEAST_SECONDS <= run <= _MOST_SECONDS for run in runs):
        raise BadAnswer(f"runs must be at most {_MOST_RUNS} times from 1 ns to a day")
    if len(message) > _LONGEST_MESSAGE:
        raise BadAnswer(f"message must have at most {_LONGEST_MESSAGE} characters")
    return Result(status, tuple(map(float, runs)), fields.get("excess"), message)


def _is_name(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST_NAME and value.isprintable()


def _object(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BadAnswer(f"{name} must be an object")
    return value

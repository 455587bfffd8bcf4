"""Putting the logs of several farms together, and telling what logs have. Needs neither TVM nor PyTorch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LogError
from ..machine.profiles import list_profiles
from .log import (
    SUFFIX,
    Identity,
    Log,
    LogFolder,
    LogMismatch,
    Record,
    best_record,
    check_identity,
    comparable,
    difference,
    log_path,
    read_log,
)


@dataclass(frozen=True)
class MergedLog:
    """What became of one workload's logs.

    Attributes:
        path: the merged file.
        sources: how many files it was made of, itself included if it was there before.
        records: lines that it has now, but for the header.
        added: lines that it did not have before.
        repeated: lines of the sources that another source has as well.
    """

    path: Path
    sources: int
    records: int
    added: int
    repeated: int


def devices_of(root: str | os.PathLike[str]) -> list[str]:
    """The devices that a folder of logs has logs of.

    Raises:
        LogError: no such folder, or not one of logs.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise LogError(f"there is no folder of tuning logs {str(folder)!r}")
    found = sorted({path.parent.name for path in folder.glob(f"*/*{SUFFIX}")})
    if not found:
        hint = f"; give its parent {str(folder.absolute().parent)!r}" if any(folder.glob(f"*{SUFFIX}")) else ""
        raise LogError(f"{folder}: no tuning logs in a folder <device>{hint}")
    return found


def logs_of(root: str | os.PathLike[str], device: str) -> list[Path]:
    """The files of one device, sorted."""
    return sorted((Path(root) / device).glob(f"[!.]*{SUFFIX}"))


def merge(sources: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], device: str) -> tuple[MergedLog, ...]:
    """Combine the logs of one device from several folders; nothing is written unless all of them go together.

    Every record of every source is in the result once: records follow each other as the sources do, those that are
    equal to one of an earlier source left out. If several farms have a winner, the fastest is moved to the end, where
    the newest winner is looked for. Logs that ``out`` has already come first, so that nothing in them is lost, and
    merging again changes nothing.

    Args:
        sources: folders of logs.
        out: the folder to write to; it is made if it is not there, and may be one of the sources.
        device: name of the device; the logs' target must be that of its profile.

    Returns:
        What became of each workload, sorted by key.

    Raises:
        LogMismatch: two logs of a workload belong to different targets or definitions, or their times cannot be
            compared; names both files.
        LogError: no logs of this device, a damaged log, a folder that cannot be written or is being written.
    """
    paths: dict[str, list[Path]] = {}
    for source in sources:
        devices_of(source)
        if not _same_folder(source, out):
            for path in logs_of(source, device):
                paths.setdefault(path.name, []).append(path)
    if not paths and not logs_of(out, device):
        raise LogError(f"no tuning logs of {device} in {', '.join(str(source) for source in sources)}")
    # Once before anything is made or locked, for its complaints, and once more under the lock.
    _combine(paths, Path(out), device)
    with LogFolder(out, device) as folder:
        combined = _combine(paths, Path(out), device)
        folder.write({made.path: (identity, header, records) for made, identity, header, records in combined})
    return tuple(made for made, *_ in combined)


def _same_folder(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _combine(
    paths: Mapping[str, Sequence[Path]], out: Path, device: str
) -> list[tuple[MergedLog, Identity, dict[str, Any], list[Record]]]:
    combined = []
    for name in sorted(paths):
        target = log_path(out, device, name.removesuffix(SUFFIX))
        old = [target] if os.path.lexists(target) else []
        logs = [read_log(path) for path in (*old, *paths[name])]
        _check(logs, device, name.removesuffix(SUFFIX))
        records = _records(logs)
        total = sum(len(log.records) for log in logs)
        before = len(logs[0].records) if old else 0
        made = MergedLog(target, len(logs), len(records), len(records) - before, total - len(records))
        combined.append((made, logs[0].identity, _made(logs), records))
    return combined


def _check(logs: Sequence[Log], device: str, key: str) -> None:
    """Raise LogMismatch unless all logs belong to this device and workload, and may be mixed."""
    first = logs[0]
    target = next((profile.target for profile in list_profiles() if profile.name == device), first.identity.target)
    wanted = Identity(device, target, key, first.identity.workload, first.identity.definition)
    for log in logs:
        try:
            check_identity(log.path, log.identity, wanted)
        except LogMismatch as error:
            beside = "" if log is first else f" (as in {first.path})"
            raise LogMismatch(f"{error}{beside}") from None
        if differs := difference(log.made, first.made):
            name, here, there = differs
            raise LogMismatch(
                f"{log.path}: measured with {name} {here}, {first.path} with {there}; "
                "their times cannot be compared, so they stay apart"
            )


def _records(logs: Sequence[Log]) -> list[Record]:
    records: list[Record] = []
    seen: set[str] = set()
    for log in logs:
        # Equal lines of one source stay: that a trial failed twice in the same way is not a copy.
        lines = [json.dumps(record.to_dict(), sort_keys=True) for record in log.records]
        records += [record for record, line in zip(log.records, lines, strict=True) if line not in seen]
        seen.update(lines)
    rejected = [record for record in records if record.kind == "rejected"]
    # What each farm calls its best, unless another farm has found it wrong.
    outcomes = [best_record([*log.records, *rejected]) for log in logs]
    winners = [record for record in outcomes if record is not None and record.kind == "winner"]
    if winners:
        fastest = min(winners, key=lambda record: record.seconds or 0.0)
        last = max(index for index, record in enumerate(records) if record.kind == "winner")
        if records[last] != fastest:
            records.remove(fastest)
            records.append(fastest)
    return records


def _made(logs: Sequence[Log]) -> dict[str, Any]:
    """The header's ``made`` of a merged log: the first source's, and under "merged" that of every other."""
    first = {name: value for name, value in logs[0].made.items() if name != "merged"}
    others: list[Any] = []
    for log in logs:
        own = {name: value for name, value in log.made.items() if name != "merged"}
        listed = log.made.get("merged", [])
        for made in (own, *(listed if isinstance(listed, list) else [])):
            if made != first and made not in others:
                others.append(made)
    return {**first, "merged": others} if others else first


@dataclass(frozen=True)
class LogSummary:
    """What one log has.

    Attributes:
        path: the file.
        device, key, workload: what it belongs to.
        trials: measurements of the search, of which ``failed`` did not end well.
        seconds: of the best record, as ``gf-tvm build`` would choose it; None if no trial ended well.
        default_seconds: the default schedule in the final comparison; None before there was one.
        confirmed: the best was confirmed in a final comparison.
        boards: names of the boards that measured.
        emulated: measured under emulation.
        cache: "warm" or "cold".
        made: how it was measured.
    """

    path: Path
    device: str
    key: str
    workload: dict[str, Any]
    trials: int
    failed: int
    seconds: float | None
    default_seconds: float | None
    confirmed: bool
    boards: tuple[str, ...]
    emulated: bool
    cache: str
    made: dict[str, Any]

    @property
    def gain(self) -> float | None:
        """How many times faster than the default schedule."""
        return self.default_seconds / self.seconds if self.default_seconds and self.seconds else None


def summarize(path: Path) -> LogSummary:
    """Say what a log has. Raises LogError if it is damaged."""
    log = read_log(path)
    trials = [record for record in log.records if record.kind == "trial"]
    best = best_record(log.records)
    boards = {str(record.board["name"]) for record in log.records if record.board and record.board.get("name")}
    settings = comparable(log.made)
    return LogSummary(
        path=path,
        device=log.identity.device,
        key=log.identity.key,
        workload=log.identity.workload,
        trials=len(trials),
        failed=sum(record.status != "ok" for record in trials),
        seconds=best.seconds if best else None,
        default_seconds=best.default_seconds if best else None,
        confirmed=bool(best and best.confirmed),
        boards=tuple(sorted(boards)),
        emulated=settings["emulated"],
        cache=str(settings["cache"]),
        made=log.made,
    )

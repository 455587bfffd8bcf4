"""The tuning log: a folder per device, a file per workload, a line per trial.

``tuning_logs/<device>/<workload key>.jsonl``. Every line is a JSON object whose last field is the CRC-32 of the rest
of the line. The first line, the header, says what the file belongs to (:class:`Identity`) and how it was measured
(``made``); each further line is a :class:`Record`. A line is written in one piece and synced to the disk before the
next trial begins, so a process that is killed loses at most the line it was writing; that torn end is ignored by
readers and cut off by the next writer. Anything else that is not as it was written is an error that names the file
and the line.

There is one writer per folder, because two tuners on one device would spoil each other's measurements.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import fcntl
import itertools
import json
import math
import os
import socket
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LogError
from ..files import create, read_limited, same_file
from .traces import check_trace

if TYPE_CHECKING:
    from ..core.workload import Workload
    from ..machine.profiles import DeviceProfile

SCHEMA = 1
SUFFIX = ".jsonl"

#: How a trial ended. ``build``: the schedule or the compiler refused; ``run``: loading or calling it raised;
#: ``wrong``: other numbers than the reference; ``crash``: it took its process down; ``timeout``: it did not end.
STATUSES = ("ok", "build", "run", "wrong", "crash", "timeout")
#: ``trial``: one measurement during the search; ``winner``: the outcome of the final comparison; ``rejected``: a
#: trial that was good in the search and failed in the final comparison.
KINDS = ("trial", "winner", "rejected")
SPACES = ("ours", "metaschedule")

#: Fields of ``made`` that must agree before trials may be added to a file: with others, times cannot be compared.
#: ``cache`` and ``emulated`` are what :func:`comparable` makes of ``made``, which need not have them. A log has ``gpu``
#: where a GPU runs the kernels, else ``cpu``.
COMPARABLE = ("cpu", "gpu", "threads", "tvm", "cache", "emulated")

#: Of one log and of one line. A record of ours has 0.5 kB, one with a trace 5 to 20 kB; parsed, a line takes up to 25
#: times as much memory.
MAX_BYTES = 128 << 20
MAX_LINE = 1 << 20

_CRC = ',"crc":"%08x"}'
_CRC_LENGTH = len(_CRC % 0)
_LOCK = ".lock"


class LogMismatch(LogError):
    """A sound log that belongs to something else: another device, workload, kernel definition or schema."""


@dataclass(frozen=True)
class Identity:
    """What a log belongs to.

    Args:
        device: name of the device profile; also the folder's name.
        target: the profile's TVM target.
        key: the workload's key; also the file's name.
        workload: the workload as plain values.
        definition: hash of the kernel's definition and its space.
    """

    device: str
    target: str
    key: str
    workload: dict[str, Any]
    definition: str


@dataclass(frozen=True)
class Record:
    """One line of a log after the header.

    Args:
        kind: one of :data:`KINDS`.
        space: one of :data:`SPACES`; says whether ``config`` or ``trace`` is set.
        id: equal for equal candidates of one space.
        status: one of :data:`STATUSES`.
        config: choices in a space of our own.
        trace: a MetaSchedule trace as plain JSON values, of what :mod:`gf_tvm.tuning.traces` allows.
        seconds: median time of one call; None unless ``status`` is "ok".
        runs: seconds per call of each repetition.
        excess: largest error against the float64 reference in units of what is allowed; None if it was not compared.
        message: what went wrong, one line.
        default_seconds: of a winner: the default schedule's median in the same comparison.
        board: of a trial on a board of a farm: its name and state (clock, temperature) as plain values.
        source: the file it was read from.
        emulated: the file's times were measured under emulation, so they say nothing about a board.
    """

    kind: str
    space: str
    id: str
    status: str
    config: dict[str, int | str] | None = None
    trace: Any = None
    seconds: float | None = None
    runs: tuple[float, ...] = ()
    excess: float | None = None
    message: str = ""
    default_seconds: float | None = None
    board: dict[str, str | int | float | bool | None] | None = None
    source: Path | None = field(default=None, compare=False)
    emulated: bool = field(default=False, compare=False)

    @property
    def confirmed(self) -> bool:
        """Whether this is the outcome of a final comparison, checked once more with other inputs."""
        return self.kind == "winner"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without fields that say nothing."""
        values: dict[str, Any] = {"kind": self.kind, "space": self.space, "id": self.id, "status": self.status}
        for name in ("config", "trace", "seconds", "excess", "default_seconds", "board"):
            if getattr(self, name) is not None:
                values[name] = getattr(self, name)
        if self.runs:
            values["runs"] = list(self.runs)
        if self.message:
            values["message"] = self.message
        return values

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], source: Path | None = None, emulated: bool = False) -> Record:
        """Inverse of :meth:`to_dict`. Raises ValueError naming the field that is missing or wrong."""
        unknown = sorted(set(value) - _RECORD_FIELDS)
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r}")
        for name, known in (("kind", KINDS), ("space", SPACES)):
            _check_word(value, name, known)
        check_outcome(value)
        if not isinstance(value.get("id", ""), str):
            raise ValueError("id must be text")
        if not value.get("id"):
            raise ValueError("id is missing")
        config = value.get("config")
        if value["space"] == "ours":
            if not isinstance(config, dict) or not all(_is_choice(choice) for choice in config.values()):
                raise ValueError("config must be an object of integers and strings")
            if value["id"] != config_id(config):
                raise ValueError("id is not that of config")
            if "trace" in value:
                raise ValueError("trace is for the space metaschedule only")
        else:
            # A candidate with a configuration is scheduled by that, which nothing has checked here.
            if "config" in value:
                raise ValueError("config is for the space ours only")
            check_trace(value.get("trace"))
        for name in ("seconds", "default_seconds"):
            if name in value and not _is_time(value[name]):
                raise ValueError(f"{name} must be a number above 0")
        if (value["status"] == "ok" and value["kind"] != "rejected") != ("seconds" in value):
            raise ValueError("seconds must be given for a trial that ended well, and only for such")
        if value["kind"] == "winner" and value["status"] != "ok":
            raise ValueError("a winner's status must be ok")
        return cls(**{**value, "runs": tuple(value.get("runs", ()))}, source=source, emulated=emulated)


_RECORD_FIELDS = {
    *("kind", "space", "id", "status", "config", "trace"),
    *("seconds", "runs", "excess", "message", "default_seconds", "board"),
}


def check_outcome(value: Mapping[str, Any]) -> None:
    """Check what became of a candidate: those fields of a :class:`Record` that a measurement fills.

    Args:
        value: with ``status``, and ``runs``, ``excess``, ``message`` and ``board`` where they say something.

    Raises:
        ValueError: naming the field that is missing or wrong.
    """
    _check_word(value, "status", STATUSES)
    if not isinstance(value.get("message", ""), str):
        raise ValueError("message must be text")
    if "excess" in value and not (_is_number(value["excess"]) and value["excess"] >= 0):
        raise ValueError("excess must be a number of at least 0")
    runs = value.get("runs", [])
    if not isinstance(runs, list) or not all(_is_time(run) for run in runs):
        raise ValueError("runs must be a list of numbers above 0")
    board = value.get("board", {})
    if not isinstance(board, dict) or not all(_is_plain(item) for item in board.values()):
        raise ValueError("board must be an object of text, numbers, true, false and null")


def _check_word(value: Mapping[str, Any], name: str, known: Sequence[str]) -> None:
    if not (isinstance(value.get(name), str) and value[name] in known):
        raise ValueError(f"{name} must be one of {', '.join(known)}")


def config_id(config: Mapping[str, int | str]) -> str:
    """The ``id`` of a configuration: its canonical JSON text."""
    return json.dumps(dict(config), sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class Log:
    """The contents of one file.

    Args:
        path: the file.
        identity: what it belongs to.
        made: how it was measured: versions, ``cpu`` or ``gpu``, ``threads``, and the measurement's parameters.
        records: in the order in which they were written.
        sound_bytes: size of the file without a torn end.
        torn: whether a torn end was ignored.
    """

    path: Path
    identity: Identity
    made: dict[str, Any]
    records: list[Record]
    sound_bytes: int
    torn: bool


def comparable(made: Mapping[str, Any]) -> dict[str, Any]:
    """The values of :data:`COMPARABLE` in a log's ``made``.

    ``cache`` is "cold" where every timed call was preceded by a flush of the caches, else "warm"; ``emulated`` is True
    where the boards were virtual ones.
    """
    measurement = made.get("measurement")
    cache = measurement.get("cache", "warm") if isinstance(measurement, dict) else "warm"
    given = {"cache": cache, "emulated": bool(made.get("emulated", False))}
    return {name: given[name] if name in given else made.get(name) for name in COMPARABLE}


def difference(made: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Why times of two ``made`` cannot be compared: the first field that differs, and its values; None if none does."""
    have, want = comparable(made), comparable(other)
    return next(((name, have[name], want[name]) for name in COMPARABLE if have[name] != want[name]), None)


def log_path(root: Path, device: str, key: str) -> Path:
    """Where the log of a workload lies under ``root``."""
    return root / device / f"{key}{SUFFIX}"


def best_record(records: Iterable[Record]) -> Record | None:
    """The newest winner; before there is one, the fastest trial. None if no trial ended well."""
    records = list(records)
    rejected = {(record.space, record.id) for record in records if record.kind == "rejected"}
    good = [record for record in records if record.status == "ok" and (record.space, record.id) not in rejected]
    winners = [record for record in good if record.kind == "winner"]
    if winners:
        return winners[-1]
    return min(good, key=lambda record: record.seconds or math.inf, default=None)


def trials_of(records: Sequence[Record], space: str) -> list[Record]:
    """The trials in one kind of space, those that were rejected later counting as what they were rejected for."""
    rejected = {record.id: record for record in records if record.kind == "rejected" and record.space == space}
    trials = [record for record in records if record.kind == "trial" and record.space == space]
    return [replace(rejected[r.id], kind="trial") if r.id in rejected else r for r in trials]


# ---------------------------------------------------------------------------------------------------------- reading


def read_log(path: Path, identity: Identity | None = None) -> Log:
    """Read one file and check every line.

    Args:
        path: the file.
        identity: what it must belong to; None accepts any.

    Raises:
        LogMismatch: it belongs to something else; says to what.
        LogError: it cannot be read or is damaged; names file and line.
    """
    try:
        # A FIFO or a device would block or never end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise LogError(f"{path}: not a tuning log but {'a folder' if path.is_dir() else 'a special file'}")
        data = read_limited(path, MAX_BYTES)
    except OSError as error:
        raise LogError(f"{path}: cannot read this tuning log: {error.strerror or error}") from None
    sound = data.rfind(b"\n") + 1
    lines = data[:sound].split(b"\n")[:-1]
    if data[sound:] and sound:
        # Without its newline the last line counts only if it is whole: the cut may have fallen just before it.
        with contextlib.suppress(ValueError):
            _decode(data[sound:].removesuffix(b"\r"))
            lines.append(data[sound:])
            sound = len(data)
    # Git and editors may give a text file other line ends and a byte-order mark.
    lines = [line.removesuffix(b"\r") for line in lines]
    if lines:
        lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)
    if not lines:
        raise LogError(f"{path}: not a tuning log: {'no header in its first line' if data else 'the file is empty'}")
    found, made = _read_header(path, lines[0])
    if identity is not None:
        check_identity(path, found, identity)
    records = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            records.append(Record.from_dict(_decode(line), path, comparable(made)["emulated"]))
        except ValueError as error:
            raise LogError(f"{path}, line {number}: damaged: {error}") from None
    return Log(path, found, made, records, sound, torn=sound < len(data))


def check_identity(path: Path, found: Identity, wanted: Identity) -> None:
    """Raise LogMismatch, naming the first difference, if a log belongs to something else than ``wanted``."""
    for name in ("device", "key", "target"):
        have, want = getattr(found, name), getattr(wanted, name)
        if have != want:
            raise LogMismatch(f"{path}: does not fit: its {name} is {have}, wanted is {want}")
    if found.workload != wanted.workload:
        raise LogMismatch(f"{path}: does not fit: its header describes another workload than {wanted.key}")
    if found.definition != wanted.definition:
        raise LogMismatch(
            f"{path}: does not fit: made for another definition of the kernel "
            f"({found.definition[:12]}, now {wanted.definition[:12]})"
        )


def find_best(
    workload: Workload, profile: DeviceProfile, roots: Sequence[str | os.PathLike[str]]
) -> tuple[Record | None, list[str]]:
    """The best schedule that the logs know for a workload.

    Args:
        workload: what to look for.
        profile: the device it will run on.
        roots: folders of logs, in order of precedence: the first that has a usable result decides, because times
            from different folders may come from different machines. A result that was measured under emulation
            counts only if there is no other. See also :func:`shipped_logs`.

    Returns:
        The record, or None, and one line for every log that does not fit or has no good trial.

    Raises:
        LogError: a log is damaged or unreadable; names file and line.
    """
    # Imports TVM, which the rest of this module does without.
    from ..schedules import get_space

    reasons: list[str] = []
    emulated = None
    for log in _fitting_logs(identity_of(workload, profile), roots, reasons):
        best = best_record(log.records)
        if best is None:
            reasons.append(f"{log.path}: no trial ended well")
        elif best.config is not None and not fits_space(best.config, get_space(workload, profile)):
            raise LogError(f"{log.path}: its best configuration {best.id} is not in the space of {workload.key}")
        elif not best.emulated:
            return best, reasons
        else:
            emulated = emulated or best
    return emulated, reasons


def seeds(
    identity: Identity, space: Any, roots: Sequence[str | os.PathLike[str]], count: int
) -> tuple[list[dict[str, int | str]], list[str]]:
    """Configurations that were fast elsewhere, to begin a search with: proposals, to be measured anew.

    Args:
        identity: what is going to be tuned; logs of another target or definition propose nothing.
        space: its space.
        roots: folders of logs, however measured.
        count: how many configurations at most.

    Returns:
        Distinct valid configurations and one line for every log that does not fit. Each log gives its best in turn,
        because times of different logs cannot be compared.

    Raises:
        LogError: a log is damaged or unreadable; names file and line.
    """
    reasons: list[str] = []
    ranked = [_ranked_configs(log.records, space) for log in _fitting_logs(identity, roots, reasons)]
    found: dict[str, dict[str, int | str]] = {}
    for turn in itertools.zip_longest(*ranked):
        for config in turn:
            if config is not None:
                found.setdefault(config_id(config), config)
    return list(found.values())[: max(count, 0)], reasons


def _ranked_configs(records: Sequence[Record], space: Any) -> list[dict[str, int | str]]:
    """The configurations of one log that ended well and are points of ``space``: the best, then the others by time."""
    rejected = {(record.space, record.id) for record in records if record.kind == "rejected"}
    good = [r for r in records if r.status == "ok" and r.config is not None and (r.space, r.id) not in rejected]
    best = best_record(good)
    good.sort(key=lambda record: (record is not best, record.seconds or math.inf))
    return [record.config for record in good if record.config is not None and fits_space(record.config, space)]


def _fitting_logs(identity: Identity, roots: Sequence[str | os.PathLike[str]], reasons: list[str]) -> Iterator[Log]:
    """The logs of ``identity`` in several folders. Adds a line to ``reasons`` for each that belongs to another."""
    for root in roots:
        path = log_path(Path(root), identity.device, identity.key)
        if not os.path.lexists(path):
            continue
        try:
            log = read_log(path, identity)
        except LogMismatch as error:
            reasons.append(str(error))
            continue
        yield log


def identity_of(workload: Workload, profile: DeviceProfile) -> Identity:
    """What the log of a workload on a device belongs to."""
    from ..schedules import definition_hash

    definition = definition_hash(workload, profile)
    return Identity(profile.name, profile.target, workload.key, plain(workload.to_dict()), definition)


def fits_space(config: Mapping[str, int | str], space: Any) -> bool:
    """Whether a configuration names every knob of ``space``, with values the knobs have, and is valid there."""
    if set(config) != set(space.knobs):
        return False
    # 1 == True and 1 == 1.0 in Python, so the types are compared too.
    chosen = all(any(type(v) is type(c) and v == c for v in space.knobs[k]) for k, c in config.items())
    return chosen and bool(space.valid(dict(config)))


def shipped_logs() -> Path | None:
    """The folder of the logs that come with the package; None if it was installed without them."""
    from importlib import resources

    try:
        folder = resources.files("gf_tvm.tuning_logs")
    except ModuleNotFoundError:
        return None
    path = Path(str(folder))
    return path if path.is_dir() else None


def plain(value: Any) -> Any:
    """``value`` as it comes back from JSON (tuples become lists)."""
    return json.loads(json.dumps(value))


# ---------------------------------------------------------------------------------------------------------- writing


class LogFolder:
    """The right to write the logs of one device; held by one process at a time.

    Use it as a context manager::

        with LogFolder(root, device) as folder, folder.open(identity, made) as log:
            log.append(record)

    Raises:
        LogError: the folder cannot be made or written, its disk is full, or another process holds it (named).
    """

    def __init__(self, root: str | os.PathLike[str], device: str) -> None:
        self.root = Path(root)
        self.path = self.root / device
        self.device = device
        self._lock: int | None = None

    def __enter__(self) -> LogFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._acquire()
            self._sign(self._lock)
            # What a writer that was killed while it made a file has left.
            for stale in self.path.glob(f".*{SUFFIX}.tmp"):
                stale.unlink(missing_ok=True)
        except OSError as error:
            self.close()
            raise LogError(f"{self.path}: cannot write tuning logs here: {error.strerror or error}") from None
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def _acquire(self) -> int:
        path = self.path / _LOCK
        while True:
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
            except OSError as error:
                raise _no_lock(path, error) from None
            try:
                status = os.fstat(handle)
                # It is emptied and signed below, under whatever other name it has.
                if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                    raise _no_lock(path)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    holder = os.pread(handle, 200, 0).decode("utf-8", "replace").strip("\0\n ") or "another process"
                    raise LogError(
                        f"{self.path}: is being written by {holder}; wait for it or use other logs"
                    ) from None
                # The last holder may have removed the file between our open and our lock.
                if same_file(handle, path):
                    return handle
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)

    @staticmethod
    def _sign(handle: int) -> None:
        text = f"process {os.getpid()} on {socket.gethostname()}\n".encode()
        # Also finds a full disk before the first candidate is built.
        os.ftruncate(handle, 0)
        os.pwrite(handle, text, 0)
        os.fsync(handle)

    def close(self) -> None:
        """Let others write. The lock also falls with the process, however that ends."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.path / _LOCK)
            os.close(self._lock)
            self._lock = None

    def peek(self, identity: Identity, made: Mapping[str, Any]) -> Log | None:
        """The log of one workload, if there is one and :meth:`open` would continue it.

        Raises:
            LogMismatch: there is a log that belongs to something else, or was measured otherwise.
            LogError: it is damaged.
        """
        path = log_path(self.root, self.device, identity.key)
        if not os.path.lexists(path):
            return None
        log = read_log(path, identity)
        if differs := difference(log.made, made):
            name, then, now = differs
            raise LogMismatch(
                f"{path}: does not fit: measured with {name} {then}, now {now}; "
                "times cannot be compared, so use another folder of logs"
            )
        return log

    def open(self, identity: Identity, made: Mapping[str, Any]) -> LogWriter:
        """Open the log of one workload for adding trials; make it if there is none.

        Args:
            identity: what the log belongs to; ``identity.device`` must be this folder's.
            made: how this process measures; must agree with the file's in :data:`COMPARABLE`.

        Raises:
            LogError: as :meth:`peek`, or the log cannot be written.
        """
        if self._lock is None or identity.device != self.device:
            raise ValueError(f"the folder of {identity.device!r} is not held")
        log = self.peek(identity, made)
        if log is None:
            path = log_path(self.root, self.device, identity.key)
            self._create(path, identity, made)
            log = read_log(path, identity)
        return LogWriter(log)

    def _create(self, path: Path, identity: Identity, made: Mapping[str, Any]) -> None:
        self.write({path: (identity, made, [])})

    def write(self, logs: Mapping[Path, tuple[Identity, Mapping[str, Any], Sequence[Record]]]) -> None:
        """Write whole files into this folder: all are on the disk before the first is renamed into its place.

        Args:
            logs: for each file of :func:`log_path` its identity, ``made`` and records.

        Raises:
            LogError: the disk is full or failed; every file is as it was before, or as it was to be. Or a reader
                would refuse a line; every file is as it was before.
        """
        staged = {path: path.with_name(f".{path.name}.tmp") for path in logs}
        path = self.path
        try:
            for path, (identity, made, records) in logs.items():
                lines = [_header_line(path, identity, made), *(_record_line(path, record) for record in records)]
                with create(staged[path]) as file:
                    file.writelines(lines)
                    file.flush()
                    os.fsync(file.fileno())
            for path in logs:
                os.replace(staged[path], path)
            _sync_folder(self.path)
        except (OSError, LogError) as error:
            for temporary in staged.values():
                with contextlib.suppress(OSError):
                    temporary.unlink()
            if isinstance(error, LogError):
                raise
            raise LogError(f"{path}: cannot write this tuning log: {error.strerror or error}") from None


class LogWriter:
    """One open log. :attr:`records` holds what it had when it was opened and what was added since.

    ``recovered`` says whether a torn end was cut off on opening.
    """

    def __init__(self, log: Log) -> None:
        self.path = log.path
        self.records = list(log.records)
        self.recovered = log.torn
        self._size = log.sound_bytes
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            try:
                os.ftruncate(self._file, self._size)
                if os.pread(self._file, 1, self._size - 1) != b"\n":
                    self._write(b"\n")
            except BaseException:
                os.close(self._file)
                raise
        except OSError as error:
            raise LogError(f"{self.path}: cannot write this tuning log: {error.strerror or error}") from None

    def __enter__(self) -> LogWriter:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def append(self, record: Record) -> None:
        """Add a record; on return it is on the disk.

        Raises:
            LogError: the disk is full or failed, or a reader would refuse the record; the file keeps all earlier
                records and nothing of this one.
        """
        line = _record_line(self.path, record)
        try:
            self._write(line)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise LogError(
                f"{self.path}: cannot write this tuning log: {error.strerror or error}; "
                f"its {len(self.records)} earlier records are kept"
            ) from None
        self.records.append(record)

    def _write(self, data: bytes) -> None:
        written = 0
        while written < len(data):
            written += os.write(self._file, data[written:])
        os.fsync(self._file)
        self._size += len(data)


# ------------------------------------------------------------------------------------------------------------ lines


def _header_line(path: Path, identity: Identity, made: Mapping[str, Any]) -> bytes:
    """The first line of a log. Raises LogError for one that a reader would refuse: the file would be lost with it."""
    header = {
        "gf_tvm_log": SCHEMA,
        "device": identity.device,
        "target": identity.target,
        "key": identity.key,
        "workload": identity.workload,
        "definition": identity.definition,
        "made": dict(made),
    }
    try:
        line = _encode(header)
        _read_header(path, line[:-1])
    except (ValueError, TypeError, RecursionError, LogError) as error:
        raise LogError(f"{path}: cannot write a header that no reader would take: {error}") from None
    return line


def _record_line(path: Path, record: Record) -> bytes:
    """A further line of a log. Raises LogError for one that a reader would refuse: the file would be lost with it."""
    try:
        line = _encode(record.to_dict())
        Record.from_dict(_decode(line[:-1]))
    except (ValueError, TypeError, RecursionError) as error:
        raise LogError(f"{path}: cannot write a record that no reader would take: {error}") from None
    return line


def _encode(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return (text[:-1] + _CRC % zlib.crc32(text.encode("ascii")) + "\n").encode("ascii")


def _decode(line: bytes) -> dict[str, Any]:
    """The object of a line without its checksum. Raises ValueError."""
    if len(line) > MAX_LINE:
        raise ValueError(f"it has more than {MAX_LINE / 1e6:.3g} MB")
    body = line[:-_CRC_LENGTH] + b"}"
    if line[-_CRC_LENGTH:] != (_CRC % zlib.crc32(body)).encode("ascii"):
        raise ValueError("its checksum does not fit")
    try:
        value = json.loads(body)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _read_header(path: Path, line: bytes) -> tuple[Identity, dict[str, Any]]:
    # A file in another schema, or with no relation to this package, need not have our checksums: look at it first.
    try:
        if len(line) > MAX_LINE:
            raise ValueError
        schema = json.loads(line)["gf_tvm_log"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise LogError(f"{path}: not a tuning log: no header in its first line") from None
    if schema != SCHEMA or isinstance(schema, bool):
        raise LogMismatch(f"{path}: does not fit: written in log schema {schema!r}; this version reads {SCHEMA}")
    try:
        header = _decode(line)
        texts = [header.get(name) for name in ("device", "target", "key", "definition")]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("device, target, key and definition must be text")
        if not isinstance(header.get("workload"), dict) or not isinstance(header.get("made"), dict):
            raise ValueError("workload and made must be objects")
    except ValueError as error:
        raise LogError(f"{path}, line 1: damaged: {error}") from None
    names = ("device", "target", "key", "workload", "definition")
    return Identity(**{name: header[name] for name in names}), header["made"]


def _is_choice(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | bool) or _is_number(value)


def _is_number(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 1 << 53
    return isinstance(value, float) and math.isfinite(value)


def _is_time(value: Any) -> bool:
    return _is_number(value) and value > 0


def _no_lock(path: Path, error: OSError | None = None) -> Exception:
    """What to raise where the lock is no file of ours, or cannot be opened."""
    if error is not None and error.errno not in (errno.ELOOP, errno.EISDIR):
        return error
    return LogError(f"{path}: is a link, a folder or a special file, and must be a plain file or missing; remove it")


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

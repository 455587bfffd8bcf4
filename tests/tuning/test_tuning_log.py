"""The tuning log: nothing that was finished is lost, nothing that is not as it was written is used."""

from __future__ import annotations

import codecs
import contextlib
import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gf_tvm.errors import LogError
from gf_tvm.tuning import log as logs
from gf_tvm.tuning.log import Identity, LogFolder, LogMismatch, Record, best_record, config_id, fits_space, read_log

IDENTITY = Identity("board", "llvm -mcpu=x", "backward_n1", {"kernel": "backward", "n": 1}, "0123456789abcdef")
MADE = {"cpu": "Some CPU", "threads": 2, "tvm": "0.27.0", "created": "2026-11-01T00:00:00Z"}


def trial(number: int, seconds: float | None = 1e-3, **changes: Any) -> Record:
    config = {"tile": number, "order": "ij"}
    record = Record("trial", "ours", config_id(config), "ok", config, seconds=seconds, runs=(1e-3, 2e-3), excess=0.25)
    return replace(record, **changes)


TRACE: list[Any] = [
    [
        ["GetSBlock", [], ["c", "main"], ["b0"]],
        ["GetLoops", ["b0"], [], ["l1", "l2"]],
        ["SamplePerfectTile", ["l1"], [2, 64], ["v3", "v4"]],
    ],
    [[2, [8, 8]]],
]
RECORDS = [
    trial(1),
    trial(2, None, status="crash", runs=(), excess=None, message="while running: its process ended with SIGSEGV"),
    trial(3, None, status="wrong", runs=(), excess=7.5),
    Record("trial", "metaschedule", "0xabc", "ok", None, TRACE, 2e-3, (2e-3,), 0.5),
    trial(1, kind="winner", default_seconds=3e-3),
    trial(4, None, kind="rejected", status="wrong", message="ä and \n a new line"),
    trial(5, board={"name": "pi-2", "mhz": 1500.0, "celsius": 61, "throttled": False, "governor": None}),
]


def write(root: Path, records: list[Record] = RECORDS, identity: Identity = IDENTITY) -> Path:
    with LogFolder(root, identity.device) as folder, folder.open(identity, MADE) as log:
        for record in records:
            log.append(record)
    return logs.log_path(root, identity.device, identity.key)


def one_line(error: pytest.ExceptionInfo[LogError], *parts: str) -> str:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text
    return text


# ------------------------------------------------------------------------------------------------ what was written


def test_a_log_reads_back_as_it_was_written(tmp_path: Path) -> None:
    path = write(tmp_path)
    log = read_log(path, IDENTITY)
    assert log.records == RECORDS
    assert log.identity == IDENTITY
    assert log.made == MADE
    assert not log.torn
    assert all(record.source == path for record in log.records)
    # A line of JSON for each, for people and for other programs.
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()[1:]] == [r.kind for r in RECORDS]


@given(
    ends=st.lists(st.sampled_from([b"\n", b"\r\n"]), min_size=20, max_size=20), mark=st.booleans(), cut=st.booleans()
)
def test_line_ends_and_a_byte_order_mark_of_other_programs(ends: list[bytes], mark: bool, cut: bool) -> None:
    """As git's autocrlf and editors leave them; a record is added to such a log, too."""
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder))
        lines = path.read_bytes().splitlines()
        data = b"".join(line + end for line, end in zip(lines, itertools.cycle(ends), strict=False))
        path.write_bytes(codecs.BOM_UTF8 * mark + (data.removesuffix(b"\n") if cut else data))
        assert read_log(path, IDENTITY).records == RECORDS
        write(Path(folder), [trial(100)])
        assert read_log(path, IDENTITY).records == [*RECORDS, trial(100)]


def test_records_are_added_to_a_log_that_is_there(tmp_path: Path) -> None:
    write(tmp_path, RECORDS[:3])
    path = write(tmp_path, RECORDS[3:])
    assert read_log(path).records == RECORDS


configs = st.dictionaries(st.text(max_size=5), st.integers(-(2**40), 2**40) | st.text(max_size=5), max_size=4)
times = st.floats(min_value=1e-9, max_value=1e3)


@given(configs, times, st.lists(times, max_size=3), st.floats(0, 1e9), st.text(max_size=20))
def test_any_record_survives(
    config: dict[str, int | str], seconds: float, runs: list[float], excess: float, message: str
) -> None:
    identity = config_id(config)
    record = Record("trial", "ours", identity, "ok", config, None, seconds, tuple(runs), excess, message)
    line = logs._encode(record.to_dict())
    assert line.count(b"\n") == 1
    assert Record.from_dict(logs._decode(line[:-1])) == record


# ---------------------------------------------------------------------------------------------------- torn and damaged


def test_a_log_cut_anywhere_keeps_every_whole_line_and_can_be_continued(tmp_path: Path) -> None:
    data = write(tmp_path).read_bytes()
    header = data.index(b"\n") + 1
    # Around the ends of lines everywhere, else every seventh: each cut waits for the disk several times.
    near = {end + d for end in _line_ends(data) for d in (-2, -1, 0, 1, 2)}
    for cut in sorted(c for c in near | set(range(0, len(data), 7)) if header <= c < len(data)):
        path = logs.log_path(tmp_path / str(cut), "board", IDENTITY.key)
        path.parent.mkdir(parents=True)
        path.write_bytes(data[:cut])
        # A last line that lacks nothing but its newline is whole.
        whole = data[: cut + 1].count(b"\n") - 1
        assert read_log(path, IDENTITY).records == RECORDS[:whole]
        with LogFolder(tmp_path / str(cut), "board") as folder, folder.open(IDENTITY, MADE) as log:
            assert log.records == RECORDS[:whole]
            assert log.recovered == (cut not in (header, *_line_ends(data)))
            log.append(trial(9))
        assert read_log(path, IDENTITY).records == [*RECORDS[:whole], trial(9)]


def _line_ends(data: bytes) -> list[int]:
    """Cuts after which no part of a line is lost: behind each newline and before it."""
    ends = [i for i, byte in enumerate(data) if byte == 10]
    return [*ends, *(end + 1 for end in ends)]


def test_a_log_cut_in_its_header_is_refused(tmp_path: Path) -> None:
    data = write(tmp_path).read_bytes()
    for cut in range(data.index(b"\n") + 1):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(data[:cut])
        with pytest.raises(LogError) as error:
            read_log(path)
        one_line(error, "cut.jsonl: not a tuning log")


def test_no_changed_byte_goes_unnoticed(tmp_path: Path) -> None:
    data = write(tmp_path).read_bytes()
    path = tmp_path / "changed.jsonl"
    rng = random.Random(1)
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(changed))
        if place == len(data) - 1:
            # The last newline: it looks as if the line had been torn.
            assert read_log(path).records == RECORDS[:-1]
            continue
        with pytest.raises(LogError) as error:
            read_log(path, IDENTITY)
        line = data[:place].count(b"\n") + 1
        if line > 1 and data[place] != 10:
            one_line(error, f"changed.jsonl, line {line}: damaged: its checksum does not fit")
        else:
            one_line(error, "changed.jsonl")


def test_a_missing_line_break_is_damage(tmp_path: Path) -> None:
    path = write(tmp_path)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:3], lines[3] + lines[4], *lines[5:]]))
    with pytest.raises(LogError) as error:
        read_log(path)
    one_line(error, f"{path}, line 4: damaged")


def poisons() -> dict[str, bytes]:
    header: dict[str, Any] = {"gf_tvm_log": 1, "device": "board", "target": "llvm -mcpu=x", "key": "backward_n1"}
    header |= {"workload": IDENTITY.workload, "definition": IDENTITY.definition, "made": MADE}
    first = logs._encode(header)

    def record(**changes: Any) -> bytes:
        values = {**trial(1).to_dict(), **changes}
        return first + logs._encode({name: value for name, value in values.items() if value is not None})

    good = logs._encode(trial(1).to_dict())
    return {
        "empty": b"",
        "a line break": b"\n",
        "zeros": b"\0" * 4096,
        "not UTF-8": b"\xff\xfe\x00\x01\n" * 3,
        "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        "other JSON": b'{"some": "file"}\n',
        "a list": b"[1, 2]\n",
        "null": b"null\n",
        "deeply nested": b"[" * 100_000 + b"\n",
        "deeply nested header": b'{"gf_tvm_log":' + b"[" * 100_000 + b"\n",
        "newer schema": logs._encode({**header, "gf_tvm_log": 2}),
        "schema true": logs._encode({**header, "gf_tvm_log": True}),
        "header without checksum": json.dumps(header).encode() + b"\n",
        "header without device": logs._encode({k: v for k, v in header.items() if k != "device"}),
        "header with a number for a device": logs._encode({**header, "device": 5}),
        "header without workload": logs._encode({**header, "workload": None}),
        "header twice": first + first,
        "no checksum": first + b'{"kind":"trial"}\n',
        "a blank line": first + b"\n" + good,
        "a nested line": first + b"[" * 100_000 + b"\n",
        "record is a list": first + b"[]\n",
        "unknown kind": record(kind="trail"),
        "kind is a list": record(kind=[]),
        "unknown status": record(status="fine"),
        "unknown space": record(space="theirs"),
        "unknown field": record(second=1.0),
        "no id": record(id=None),
        "another id": record(id='{"order":"ij","tile":2}'),
        "no config": record(config=None),
        "config is a list": record(config=[1]),
        "float in config": record(config={"tile": 1.5}),
        "true in config": record(config={"tile": True, "order": "ij"}),
        "no seconds": record(seconds=None),
        "negative seconds": record(seconds=-1.0),
        "no time at all": record(seconds=0),
        "seconds are text": record(seconds="1e-9"),
        "seconds are true": record(seconds=True),
        "endless number": record(seconds=10**400),
        "crashed in no time": record(status="crash"),
        "negative runs": record(runs=[1.0, -1.0]),
        "runs are a number": record(runs=1.0),
        "excess is text": record(excess="none"),
        "message is a number": record(message=1),
        "a winner that failed": record(kind="winner", status="wrong", seconds=None),
        "board is text": record(board="pi-2"),
        "board has a list": record(board={"name": ["pi-2"]}),
        "board has an endless number": record(board={"mhz": 10**400}),
        "trace is text": record(space="metaschedule", config=None, trace="x"),
        "trace beside a config": record(trace=TRACE),
        "config beside a trace": record(space="metaschedule", trace=TRACE),
    }


@pytest.mark.parametrize("name", sorted(poisons()))
def test_poisoned_logs_give_one_clear_line(tmp_path: Path, name: str) -> None:
    path = logs.log_path(tmp_path, "board", IDENTITY.key)
    path.parent.mkdir()
    path.write_bytes(poisons()[name])
    with pytest.raises(LogError) as error:
        read_log(path, IDENTITY)
    assert len(one_line(error, str(path))) < 400
    # Nobody writes into such a file either, and nothing of it changes.
    with LogFolder(tmp_path, "board") as folder, pytest.raises(LogError):
        folder.open(IDENTITY, MADE)
    assert path.read_bytes() == poisons()[name]


def test_seconds_that_are_no_numbers_for_json(tmp_path: Path) -> None:
    path = write(tmp_path, [])
    for word in ("NaN", "Infinity", "-Infinity", "1e999"):
        body = json.dumps(trial(1).to_dict(), separators=(",", ":")).replace('"seconds":0.001', f'"seconds":{word}')
        assert word in body
        line = body[:-1] + logs._CRC % logs.zlib.crc32(body.encode()) + "\n"
        other = tmp_path / "other.jsonl"
        other.write_bytes(path.read_bytes() + line.encode())
        with pytest.raises(LogError) as error:
            read_log(other)
        one_line(error, "other.jsonl, line 2: damaged: seconds")


def test_what_is_not_a_file_is_refused_without_waiting(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "fifo.jsonl")
    for name in ("folder.jsonl", "fifo.jsonl", "missing.jsonl"):
        with pytest.raises(LogError) as error:
            read_log(tmp_path / name)
        one_line(error, str(tmp_path / name))


# ------------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"device": "board2"}, "its device is board2, wanted is board"),
        ({"target": "cuda"}, "its target is cuda, wanted is llvm -mcpu=x"),
        ({"key": "backward_n2"}, "its key is backward_n2, wanted is backward_n1"),
        ({"workload": {"kernel": "backward", "n": 2}}, "describes another workload than backward_n1"),
        ({"definition": "fedcba9876543210"}, "made for another definition of the kernel (fedcba987654, now 0123456789"),
    ],
)
def test_a_log_of_something_else_is_refused_by_name(tmp_path: Path, other: dict[str, Any], words: str) -> None:
    written = write(tmp_path / "other", identity=replace(IDENTITY, **other))
    path = logs.log_path(tmp_path, "board", IDENTITY.key)
    path.parent.mkdir()
    written.rename(path)
    with pytest.raises(LogMismatch) as error:
        read_log(path, IDENTITY)
    one_line(error, f"{path}: does not fit: ", words)


OTHERWISE: dict[str, tuple[dict[str, Any], str]] = {
    "cpu": ({"cpu": "another"}, "cpu Some CPU, now another"),
    "gpu": ({"gpu": "a GPU"}, "gpu None, now a GPU"),
    "threads": ({"threads": 4}, "threads 2, now 4"),
    "tvm": ({"tvm": "0.28.0"}, "tvm 0.27.0, now 0.28.0"),
    "cache": ({"measurement": {"repeats": 5, "cache": "cold"}}, "cache warm, now cold"),
    "emulated": ({"emulated": True}, "emulated False, now True"),
}
assert set(OTHERWISE) == set(logs.COMPARABLE)


@pytest.mark.parametrize("field", OTHERWISE)
def test_times_that_cannot_be_compared_are_not_mixed(tmp_path: Path, field: str) -> None:
    path = write(tmp_path)
    changes, words = OTHERWISE[field]
    with LogFolder(tmp_path, "board") as folder, pytest.raises(LogMismatch) as error:
        folder.open(IDENTITY, {**MADE, **changes})
    one_line(error, str(path), f"measured with {words}")
    # What older logs do not say: warm caches, on a real machine.
    with LogFolder(tmp_path, "board") as folder:
        folder.open(IDENTITY, {**MADE, "measurement": {"cache": "warm"}, "emulated": False}).close()
    # Other provenance may differ, and reading is allowed: a schedule is good on other machines of the profile.
    with LogFolder(tmp_path, "board") as folder:
        folder.open(IDENTITY, {**MADE, "created": "later", "python": "3.13"}).close()
    assert read_log(path, IDENTITY).records == RECORDS


# ------------------------------------------------------------------------------------------------------ one writer

HOLD = """
import sys, time
from gf_tvm.tuning.log import LogFolder
with LogFolder(sys.argv[1], "board"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_two_processes_do_not_write_one_folder(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(LogError) as error, LogFolder(tmp_path, "board"):
        pass
    one_line(error, str(tmp_path / "board"), f"is being written by process {holder.pid} on ")
    # Another device's logs are not affected, and this one's as soon as the holder is gone, however it went.
    with LogFolder(tmp_path, "board2"):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert read_log(write(tmp_path)).records == RECORDS


def test_the_lock_falls_with_the_block(tmp_path: Path) -> None:
    for _ in range(2):
        with LogFolder(tmp_path, "board"):
            with pytest.raises(LogError, match=f"process {os.getpid()} "), LogFolder(tmp_path, "board"):
                pass
            assert (tmp_path / "board" / ".lock").exists()
        assert list((tmp_path / "board").iterdir()) == []


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "board").mkdir()
    stale = tmp_path / "board" / ".backward_n1.jsonl.tmp"
    stale.write_bytes(b"half a hea")
    assert read_log(write(tmp_path)).records == RECORDS
    assert not stale.exists()


# ------------------------------------------------------------------------------------------- full and unwritable disks


def test_a_disk_that_fills_up_keeps_all_earlier_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LogFolder(tmp_path, "board") as folder, folder.open(IDENTITY, MADE) as log:
        for record in RECORDS[:3]:
            log.append(record)
        before = log.path.read_bytes()
        real_write, left = os.write, [40]

        def write_until_full(handle: int, data: bytes) -> int:
            if left[0] == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = real_write(handle, data[: left[0]])
            left[0] -= written
            return written

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write_until_full)
            with pytest.raises(LogError) as error:
                log.append(RECORDS[3])
        one_line(error, str(log.path), "No space left on device", "3 earlier records are kept")
        assert log.path.read_bytes() == before
        log.append(RECORDS[4])
    assert read_log(log.path).records == [*RECORDS[:3], RECORDS[4]]


def test_a_disk_that_fails_to_sync_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LogFolder(tmp_path, "board") as folder, folder.open(IDENTITY, MADE) as log:

        def fail(handle: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(LogError, match="Input/output error"):
                log.append(RECORDS[0])
    assert read_log(log.path).records == []


def test_a_full_disk_is_found_before_anything_is_measured(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("may not mount a small disk here")
    try:
        path = write(disk)
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(b"x" * 4096)
        with pytest.raises(LogError) as error, LogFolder(disk, "board"):
            pass
        one_line(error, str(disk / "board"), "No space left on device")
        assert read_log(path).records == RECORDS
        assert sorted(p.name for p in path.parent.iterdir()) == [path.name]
        (disk / "filler").unlink()
        with LogFolder(disk, "board") as folder:
            folder.open(IDENTITY, MADE).close()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


@pytest.mark.parametrize("root", ["file/logs", "file", "/proc/no_such_folder"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, root: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(LogError) as error, LogFolder(tmp_path / root, "board"):
        pass
    one_line(error, str(tmp_path / root / "board"), "cannot write tuning logs here")


# ------------------------------------------------------------------------------------------------------------ choosing


def test_the_newest_winner_counts_then_the_fastest_trial() -> None:
    slow, fast, failed = trial(1, 3e-3), trial(2, 1e-3), trial(3, None, status="crash", runs=())
    winner = trial(1, 2e-3, kind="winner")
    rejected = trial(2, None, kind="rejected", status="wrong", runs=())
    assert best_record([]) is None
    assert best_record([failed]) is None
    assert best_record([slow, failed, fast]) == fast
    assert best_record([slow, fast, rejected]) == slow
    assert best_record([slow, winner, fast]) == winner
    assert best_record([slow, fast, replace(fast, kind="winner"), winner]) == winner
    # A winner that a later comparison finds wrong is none any more.
    assert best_record([slow, fast, replace(fast, kind="winner"), rejected]) == slow
    # Equal ids of another space are other candidates.
    assert best_record([fast, replace(rejected, space="metaschedule", trace=[], config=None)]) == fast


class Space:
    def __init__(self) -> None:
        self.knobs = {"tile": (1, 2, 4), "order": ("ij", "ji")}

    def valid(self, config: dict[str, Any]) -> bool:
        return config != {"tile": 4, "order": "ji"}


@pytest.mark.parametrize(
    ("config", "fits"),
    [
        ({"tile": 1, "order": "ij"}, True),
        ({"tile": 4, "order": "ji"}, False),
        ({"tile": 3, "order": "ij"}, False),
        ({"tile": True, "order": "ij"}, False),
        ({"tile": "1", "order": "ij"}, False),
        ({"tile": 1}, False),
        ({"tile": 1, "order": "ij", "more": 1}, False),
        ({}, False),
    ],
)
def test_fits_space(config: dict[str, Any], fits: bool) -> None:
    assert fits_space(config, Space()) is fits


def test_reading_logs_needs_neither_tvm_nor_torch() -> None:
    code = "import gf_tvm.tuning as t, sys; [getattr(t, name) for name in t.__all__]; "
    code += "assert not {'tvm', 'torch', 'xgboost'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

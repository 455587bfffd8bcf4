"""gf-tvm cache: says what is there, and deletes no more than was asked for."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gf_tvm
from gf_tvm.bundle.format import LIBRARY, SCHEMA, checksums, write
from gf_tvm.core.geometry import Geometry
from gf_tvm.core.workload import KERNELS, Workload
from gf_tvm.runners import cache as command
from gf_tvm.runners import cli

VERSIONS = {"gf_tvm": gf_tvm.__version__, "tvm": "0.27.0"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GF_TVM_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setenv("GF_TVM_CACHE_SIZE", "3MiB")
    monkeypatch.delenv("GF_TVM_LOGS", raising=False)
    return tmp_path / "kernels"


def entry(folder: Path, name: str, days: float, kernels: dict[str, str], programs: int = 0) -> Path:
    """An entry that was used so many days ago. ``kernels``: their schedules."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.gfb"
    files = {LIBRARY: name.encode()}
    keys = {name: Workload(name, Geometry(1, 2, 2, 6, 6, 3, 2)).key for name in kernels}
    manifest = {
        "schema": SCHEMA,
        "device": "rpi4",
        "versions": VERSIONS,
        "sha256": checksums(files),
        "kernels": [{"key": keys[kernel], "schedule": schedule} for kernel, schedule in kernels.items()],
        "programs": [{"key": f"chain_{index}"} for index in range(programs)],
    }
    write(path, manifest, files)
    used = time.time() - 86400 * days
    os.utime(path, (used, used))
    return path


@pytest.fixture
def entries(folder: Path) -> Iterator[list[Path]]:
    """Of today, of 2 days ago and in use, of 10 days ago and damaged."""
    paths = [
        entry(folder, "today", 0, {"backward": "tuned", "filter_input": "default", "expand": "tuned"}),
        entry(folder, "twodays", 2, {"backward": "default"}, programs=2),
        entry(folder, "tendays", 10, {}, programs=1),
    ]
    paths[2].write_bytes(paths[2].read_bytes()[:-7])
    used = time.time() - 86400 * 10
    os.utime(paths[2], (used, used))
    with open(paths[1], "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield paths


def run(*args: str) -> int:
    return cli.main(["cache", *args])


def test_entries_are_shown(entries: list[Path], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    _, _, *rows, last = capsys.readouterr().out.splitlines()
    cells = [re.split(r"  +", row.strip()) for row in rows]
    names, used, sizes, devices, kernels, tuned, versions, notes = (list(column) for column in zip(*cells, strict=True))
    assert names == ["today", "twodays", "tendays"]
    assert used[0] == f"{datetime.fromtimestamp(entries[0].stat().st_mtime):%Y-%m-%d %H:%M}"
    assert sizes == [command._size(path.stat().st_size) for path in entries]
    assert devices == ["rpi4", "rpi4", "-"]
    assert kernels == ["1 backward, 1 filter_input, 1 expand", "1 backward, 2 programs", "-"]
    assert tuned == ["2 of 3", "0 of 1", "-"]
    assert versions == [", ".join(f"{name} {version}" for name, version in VERSIONS.items())] * 2 + ["-"]
    assert notes[:2] == ["-", "in use"]
    assert notes[2].startswith("damaged: tendays.gfb: truncated")
    size = sum(path.stat().st_size for path in entries)
    assert last == f"{folder}: 3 entries, {command._size(size)} of at most 3 MiB"


def test_list_as_json(entries: list[Path], folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache.json"
    assert run("--json", str(out)) == 0
    found = json.loads(out.read_text())
    assert found["folder"] == str(folder)
    assert (found["limit_bytes"], found["bytes"]) == (3 << 20, sum(path.stat().st_size for path in entries))
    assert [values["path"] for values in found["entries"]] == list(map(str, entries))
    first, second, third = found["entries"]
    assert first["workloads"] == [
        Workload(k, Geometry(1, 2, 2, 6, 6, 3, 2)).key for k in ("backward", "filter_input", "expand")
    ]
    assert (first["tuned"], first["versions"], first["in_use"]) == (2, VERSIONS, False)
    assert (second["programs"], second["in_use"]) == (["chain_0", "chain_1"], True)
    assert third["damaged"]
    assert datetime.fromisoformat(second["used"]).timestamp() == pytest.approx(entries[1].stat().st_mtime, abs=1)


@pytest.mark.parametrize(
    ("options", "left"),
    [((), [False, True, False]), (("--older-than", "1"), [True, True, False]), (("--older-than", "11"), [True] * 3)],
)
def test_clear(
    options: tuple[str, ...],
    left: list[bool],
    entries: list[Path],
    tmp_path: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = [path.stat().st_size for path in entries]
    out = tmp_path / "cleared.json"
    assert run("clear", *options, "--json", str(out)) == 0
    assert [path.exists() for path in entries] == left
    removed = [path for path, stays in zip(entries, left, strict=True) if not stays]
    freed = sum(size for size, stays in zip(sizes, left, strict=True) if not stays)
    first, *kept = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{folder}: deleted {len(removed)}, ")
    busy = [] if options == ("--older-than", "11") else ["twodays"]
    assert kept == [f"kept {name}: a running process has loaded it" for name in busy]
    found = json.loads(out.read_text())
    assert found["freed_bytes"] == freed
    assert [values["path"] for values in found["removed"]] == list(map(str, removed))
    assert [Path(values["path"]).stem for values in found["kept"]] == busy


def test_json_may_stand_before_clear(entries: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "cleared.json"
    assert run("--json", str(out), "clear") == 0
    assert len(json.loads(out.read_text())["removed"]) == 2


def test_no_folder_is_no_entries(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert run() == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{folder}: 0 entries, 0 B of at most 3 MiB"
    assert run("clear") == 0
    assert not folder.exists()


@pytest.mark.parametrize("days", ["x", "-1", "nan", "inf", ""])
def test_days_that_are_none(days: str, capsys: pytest.CaptureFixture[str], entries: list[Path]) -> None:
    assert run("clear", f"--older-than={days}") == 2
    assert f"must be a number of days that is not negative, got {days!r}" in capsys.readouterr().err
    assert all(path.exists() for path in entries)


@pytest.mark.parametrize("action", [[], ["clear"]])
def test_what_cannot_be_is_said_in_one_line(
    action: list[str], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write_bytes(b"")
    assert run(*action) == 2
    assert capsys.readouterr().err == f"gf-tvm: error: {folder}: Not a directory\n"
    assert run(*action, "--json", str(folder / "x.json")) == 2
    assert "x.json" in capsys.readouterr().err
    monkeypatch.setenv("GF_TVM_CACHE_SIZE", "much")
    assert run(*action) == 2
    line = "gf-tvm: error: GF_TVM_CACHE_SIZE is written as 500MB, 2GiB or a number of bytes, got 'much'\n"
    assert capsys.readouterr().err == line


@given(size=st.integers(0, 1 << 45))
def test_sizes_are_shown_to_three_digits(size: int) -> None:
    number, unit = command._size(size).split()
    assert float(number) * {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[unit] == pytest.approx(size, 0.006)
    assert "e" not in number or size > 999 << 30


def test_no_kernel_is_named_so_that_its_name_cannot_be_read_from_a_key() -> None:
    for name in KERNELS:
        assert Workload(name, Geometry(1, 2, 2, 6, 6, 3, 2)).key.partition("_n")[0] == name


def test_showing_needs_neither_pytorch_nor_tvm(entries: list[Path]) -> None:
    code = """
import sys
from gf_tvm.runners import cli
code = cli.main(["cache"])
print(code, sorted({"torch", "tvm", "tvm_ffi"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"

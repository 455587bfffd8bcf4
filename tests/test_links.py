"""Where this package creates or locks a file under a name of its own, it follows no link that lies there."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from farm_helpers import small_workload

from gf_cuda.program import Program
from gf_tvm.comparison import plot
from gf_tvm.errors import LogError
from gf_tvm.evaluation.store import Store
from gf_tvm.files import make_folder, replacing
from gf_tvm.machine.profiles import get_profile
from gf_tvm.report.page import _write
from gf_tvm.runners._output import check_writable, write_json
from gf_tvm.training import checkpoint, feature_files
from gf_tvm.tuning.log import LogFolder, identity_of, log_path, read_log
from gf_tvm.tuning.merge import merge

MADE = {"cpu": "c", "threads": 1, "tvm": "0"}

#: Paths that were opened for writing, while :func:`names_created` watches.
_opened: list[str] | None = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and arguments[2] & (os.O_CREAT | os.O_TRUNC):
        _opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_watch)


def names_created(work: Callable[[Path], None], folder: Path) -> list[Path]:
    """The files inside ``folder``, relative to it, that ``work`` opens to create or empty them."""
    global _opened
    _opened = []
    try:
        work(folder)
    finally:
        found, _opened = _opened, None
    return sorted({Path(name).relative_to(folder) for name in found if Path(name).is_relative_to(folder)})


def figure(folder: Path) -> None:
    from matplotlib.figure import Figure

    plot.save(Figure(), folder / "a.png")


def features(folder: Path) -> None:
    layouts = [feature_files.TensorSpec((2, 3), torch.float32)]
    feature_files.write(folder / "a.bin", {}, layouts, [(0, [torch.zeros(2, 3)])])


def replaced(folder: Path) -> None:
    with replacing(folder / "a") as file:
        file.write(b"new")


def log(folder: Path) -> None:
    identity = identity_of(small_workload(), get_profile("host"))
    with LogFolder(folder, identity.device) as held, held.open(identity, MADE):
        pass
    read_log(log_path(folder, identity.device, identity.key))


def merged(folder: Path) -> None:
    source = folder.with_name("source")
    log(source)
    merge([source], folder, get_profile("host").name)


def program(folder: Path) -> None:
    launch = {"function": "f", "grid": [1, 1, 1], "block": [1, 1, 1], "shared": 0, "arguments": [["argument", 0]]}
    argument = {"name": "y", "dtype": "float32", "shape": [1], "output": True}
    values = {"schema": 1, "arch": "sm_53", "scratch_bytes": 0, "arguments": [argument], "launches": [launch]}
    Program.from_dict(values).save(str(folder / "a.zip"), "", b"\x7fELF", "cubin")


WORKS: dict[str, Callable[[Path], object]] = {
    "results": lambda folder: write_json(folder / "a.json", [1]),
    "a check of where results go": lambda folder: check_writable(folder / "a.json"),
    "a folder": make_folder,
    "a replaced file": replaced,
    "a checkpoint": lambda folder: checkpoint.save(folder / "a.pt", {"x": torch.zeros(3)}),
    "a checkpoint's folder": checkpoint.prepare_folder,
    "features": features,
    "a part of an evaluation": lambda folder: Store(folder).put("x", {}, 1),
    "a report": lambda folder: _write(folder, {"index.html": b"", "a.svg": b""}),
    "a plot": figure,
    "a log": log,
    "a merged log": merged,
    "a program": program,
}


@pytest.mark.parametrize("name", WORKS)
def test_a_link_under_any_name_that_is_created_leads_nowhere(tmp_path: Path, name: str) -> None:
    def work(folder: Path) -> None:
        WORKS[name](folder)

    first = tmp_path / "first"
    first.mkdir()
    created = names_created(work, first)
    assert created
    for number, place in enumerate(created):
        for kind in ("full", "missing"):
            folder = tmp_path / f"{number}{kind}"
            victim = tmp_path / f"victim{number}{kind}"
            (folder / place).parent.mkdir(parents=True)
            if kind == "full":
                victim.write_text("precious")
            (folder / place).symlink_to(victim)
            if place.name == ".lock":
                with pytest.raises(LogError, match=r"\.lock: is a link"):
                    work(folder)
            else:
                work(folder)
            assert victim.read_text() == "precious" if kind == "full" else not victim.exists(), place
            shutil.rmtree(tmp_path / "source", ignore_errors=True)


@pytest.mark.parametrize("kind", ["another name", "folder", "pipe"])
def test_a_lock_that_is_no_file_of_its_own_is_refused(tmp_path: Path, kind: str) -> None:
    lock, victim = tmp_path / "board" / ".lock", tmp_path / "victim"
    lock.parent.mkdir()
    victim.write_text("precious")
    if kind == "folder":
        lock.mkdir()
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        os.link(victim, lock)
    with pytest.raises(LogError, match="must be a plain file or missing; remove it"), LogFolder(tmp_path, "board"):
        pass
    assert victim.read_text() == "precious"

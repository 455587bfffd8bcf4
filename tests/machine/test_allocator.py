"""Which allocator a process uses, and starting commands anew under another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gf_tvm.machine import allocator
from gf_tvm.machine.allocator import ALLOCATORS, AllocatorError, in_use, installed, label_of
from gf_tvm.runners import _allocator

#: A command that says under what it runs, and what its children would.
COMMAND = """
import json, os, sys, threading
from gf_tvm.machine import allocator
from gf_tvm.runners import _allocator, cli

def run(args):
    print(json.dumps({"pid": os.getpid(), "argv": sys.argv[1:], "heavy": sorted({"torch", "tvm"} & set(sys.modules)),
        "environment": {n: os.environ.get(n) for n in ("LD_PRELOAD", "MALLOC_CONF", _allocator.RESTARTED)},
        "children": allocator.environment_of_children(), "stdin": sys.stdin.read(), "used": allocator.in_use()}))
    return 3

parser = cli.Parser(prog="tell")
parser.add_argument("--text")
_allocator.add_allocator_argument(parser)
parser.set_defaults(run=run)
sys.exit(cli.run_command("tell", lambda: cli.run_parsed(parser, None)))
"""


@pytest.fixture
def jemalloc() -> Path:
    path = installed(ALLOCATORS["jemalloc"])
    if path is None:
        pytest.skip("needs libjemalloc2")
    return path


def tell(*options: str, **environment: str) -> tuple[dict[str, Any], int]:
    own = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "MALLOC_CONF")}
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**own, **environment},
    ) as process:
        out, err = process.communicate("from stdin")
    if process.returncode == 2:
        return {"error": err}, 2
    assert err == ""
    found = json.loads(out)
    assert found["pid"] == process.pid
    return found, process.returncode


def test_a_command_starts_itself_anew_once(jemalloc: Path) -> None:
    """With the same number, arguments, input and exit code, and nothing that its children would inherit."""
    found, code = tell("--text", "a b")
    assert (code, found["stdin"], found["argv"], found["heavy"]) == (3, "from stdin", ["--text", "a b"], [])
    assert found["used"]["name"] == "jemalloc"
    assert found["used"]["settings"] == ALLOCATORS["jemalloc"].settings
    assert set(found["environment"].values()) == {None}
    assert found["children"] == {"LD_PRELOAD": str(jemalloc), **(ALLOCATORS["jemalloc"].settings or {})}


def test_the_systems_own_is_kept_on_request() -> None:
    found, _ = tell("--allocator", "system")
    assert (found["used"]["name"], found["children"]) == ("system", {})


def test_what_the_user_has_set_stays(jemalloc: Path) -> None:
    found, _ = tell(MALLOC_CONF="dirty_decay_ms:100")
    assert found["environment"]["MALLOC_CONF"] == "dirty_decay_ms:100"
    assert found["used"]["settings"]["MALLOC_CONF"] == "dirty_decay_ms:100"
    preloaded, _ = tell(LD_PRELOAD=str(jemalloc))
    assert (preloaded["used"]["name"], preloaded["children"]) == ("jemalloc", {})
    assert preloaded["environment"]["LD_PRELOAD"] == str(jemalloc)
    refused, code = tell("--allocator", "system", LD_PRELOAD=str(jemalloc))
    assert code == 2
    assert refused["error"] == "tell: error: --allocator system, but jemalloc is preloaded: unset LD_PRELOAD\n"


def test_a_library_that_the_loader_refuses_ends_in_one_line(tmp_path: Path) -> None:
    """And in no loop: it has the right head, and nothing behind it."""
    head = Path(os.path.realpath("/proc/self/exe")).read_bytes()[:64]
    (tmp_path / "libjemalloc.so.2").write_bytes(head)
    found, code = tell(LD_LIBRARY_PATH=str(tmp_path))
    assert code == 2
    assert "does not use it; say --allocator system" in found["error"]


def test_a_library_of_another_architecture_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = bytearray(Path(os.path.realpath("/proc/self/exe")).read_bytes()[:64])
    file = tmp_path / "libjemalloc.so.2"
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    file.write_bytes(head)
    assert installed(ALLOCATORS["jemalloc"]) == file
    head[18] ^= 0xFF
    file.write_bytes(head)
    assert installed(ALLOCATORS["jemalloc"]) != file


def test_what_is_asked_for_and_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "installed", lambda _: None)
    if in_use()["name"] == "system":
        _allocator.ensure(None, restart=True)
        with pytest.raises(AllocatorError, match="apt install libjemalloc2"):
            _allocator.ensure("jemalloc", restart=True)
    with pytest.raises(AllocatorError, match="unknown allocator 'x'; known: jemalloc, system"):
        _allocator.ensure("x", restart=True)


def test_a_program_is_not_replaced(jemalloc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("started anew"))
    _allocator.ensure(None, restart=False)
    if in_use()["name"] == "system":
        with pytest.raises(AllocatorError, match=f"LD_PRELOAD={jemalloc}"):
            _allocator.ensure("jemalloc", restart=False)


def test_labels() -> None:
    assert label_of({"allocator": {"name": "jemalloc", "version": "5.3.0-0-gabc"}}) == "jemalloc 5.3.0"
    assert label_of({"allocator": {"name": "system", "version": None}}) == "system"
    assert label_of({}) == label_of({"allocator": 3}) == "unknown"

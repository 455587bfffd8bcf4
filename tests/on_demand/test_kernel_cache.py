"""Kernels built on demand: right, once for all who want them, whoever is killed, and never in the way."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import HELPERS
from hypothesis import given
from hypothesis import strategies as st
from kernel_caches import Ready, Watcher, built, idle, small, staged
from odd_programs import OddProgram
from strategies import compiling, geometries
from torch import nn
from toy_task import wait_until
from virtual_pi import running, wait_until_gone

import gf_tvm
from gf_tvm.bundle import runtime
from gf_tvm.core import verify
from gf_tvm.core.workload import DTYPES, KERNELS, Workload
from gf_tvm.errors import CacheError
from gf_tvm.on_demand import KernelCache, Wanted, builder, obstacle
from gf_tvm.on_demand import cache as cache_module
from gf_tvm.on_demand.store import Store
from gf_tvm.runners import cli

pytestmark = pytest.mark.usefixtures("host")


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_said", set())


@pytest.fixture
def cache(tmp_path: Path) -> KernelCache:
    return KernelCache(tmp_path / "kernels", logs=())


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def refused(cache: KernelCache, wanted: Wanted) -> None:
    """Request what cannot be built, and wait until that is known."""
    ready = Ready()
    cache.request(wanted, ready)
    assert wait_until(lambda: idle(cache))
    assert not ready.calls


#: A process that wants something: its cache's folder and what it wants; then it acts on what it is told.
CHILD = f"""
import sys
sys.path.insert(0, {HELPERS!r})
import logging, os, threading
from pathlib import Path
logging.basicConfig(format="%(message)s", stream=sys.stdout)
from kernel_caches import Ready, built, idle, small
from gf_tvm.on_demand import KernelCache
import gf_tvm.bundle.library
cache, wanted = KernelCache(Path(sys.argv[1]), logs=()), small(int(sys.argv[2]))
print("begins", flush=True)
input()
"""


@contextlib.contextmanager
def child(folder: Path, number: int, code: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process with CHILD's names, ready to run ``code`` when it gets a line."""
    command = [sys.executable, "-c", CHILD + code, str(folder), str(number)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def children(pid: int) -> list[int]:
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


# ----------------------------------------------------------------------------------------------- what is built is right


@pytest.mark.slow
@compiling(5)
@given(
    kernels=st.lists(st.sampled_from(sorted(KERNELS)), min_size=1, max_size=2),
    geometry=geometries(smallest_n=1, largest_out=5),
    dtype=st.sampled_from(sorted(DTYPES)),
    seed=st.integers(0, 99),
)
def test_what_was_wanted_is_built_loaded_and_right(
    tmp_path_factory: pytest.TempPathFactory, kernels: list[str], geometry: Any, dtype: str, seed: int
) -> None:
    cache = KernelCache(tmp_path_factory.mktemp("cache") / "new", logs=())
    wanted = Wanted(tuple(Workload(kernel, geometry, dtype) for kernel in kernels))
    assert cache.find(wanted) is None
    ready = Ready()
    cache.request(wanted, ready)
    library = ready.wait()
    assert ready.calls[0][1] == "gf_tvm-kernels"  # the thread
    assert cache.find(wanted) is library
    for workload in wanted.workloads:
        kernel = library.find(workload.kernel, geometry, dtype)
        assert kernel is not None
        inputs, outputs = verify.random_inputs(workload, seed), verify.poisoned_outputs(workload)
        kernel(*inputs, *outputs)
        assert verify.excess(outputs, verify.expected(workload, inputs)) <= 1
    at_once = Ready()
    cache.request(wanted, at_once)
    assert at_once.calls == [(library, threading.current_thread().name)]


def test_programs_of_chains_are_built_and_right(cache: KernelCache) -> None:
    plain = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3))
    x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1))

    def gradients(**options: Any) -> tuple[nn.Module, list[torch.Tensor]]:
        model = gf_tvm.filter_model(copy.deepcopy(plain), 2, last=2, chain=True, **options)
        model(x).square().sum().backward()
        return model, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    model, expected = gradients()
    programs = tuple(gf_tvm.programs_of(model))
    # A segment, the backward pass, and two convolutions' forward passes.
    assert len(programs) == 4
    library = built(cache, Wanted(programs=programs))
    assert sorted(library.programs) == sorted(program.key for program in programs)
    _, found = gradients(library=library)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_another_process_finds_it_fast_and_without_the_compiler(cache: KernelCache) -> None:
    built(cache, small(0))
    code = """
import time
cache.find(small(1))  # reads the code of gf_tvm, once in a process
from gf_tvm.bundle.runtime import start_runtime
start_runtime()
start = time.perf_counter()
library = cache.find(wanted)
print(f"{time.perf_counter() - start:.4f}", len(library.workloads), "tvm" in sys.modules)
"""
    with child(cache.folder, 0, code) as process:
        seconds, kernels, compiler = process.communicate("\n")[0].split()
    assert (kernels, compiler) == ("1", "False")
    assert float(seconds) < 0.5  # 2 ms, on a machine that others use as well


# ------------------------------------------------------------------------------------------------------ several at once


@pytest.mark.slow
def test_processes_that_want_the_same_have_it_built_once(tmp_path: Path) -> None:
    """Three want the same, and a fourth something else: two builds, one after the other."""
    code = """
library = built(cache, wanted)
print(os.stat(library.path).st_ino, library.digest, flush=True)
"""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(child(tmp_path, number, code)) for number in (0, 0, 0, 1)]
        with Watcher(tmp_path) as watcher:
            for process in processes:
                go(process)
            answers = [process.communicate(timeout=120)[0].split() for process in processes]
    assert answers[0] == answers[1] == answers[2] != answers[3]
    assert [len(answer) for answer in answers] == [2] * 4
    assert len(watcher.seen) == 2
    assert watcher.most == 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".gfb", ".gfb"]  # and the lock


def test_one_object_builds_each_thing_once_and_tells_all(cache: KernelCache) -> None:
    first, second, third = Ready(), Ready(), Ready()

    def ends(library: Any) -> None:
        sys.exit("no more of this")

    with Watcher(cache.folder) as watcher:
        cache.request(small(0), ends)  # others hear of it all the same
        cache.request(small(0), first)
        cache.request(small(1), third)
        cache.request(small(0), second)
        assert first.wait() is second.wait()
        assert third.wait() is not first.wait()
    assert len(watcher.seen) == 2


def test_the_limit_is_kept(tmp_path: Path) -> None:
    """What a process has loaded stays; what none has goes when the next is built."""
    cache = KernelCache(tmp_path, limit=1, logs=())
    with child(tmp_path, 0, "built(cache, wanted); input()") as process:
        go(process)
        assert wait_until(lambda: any(entry.in_use for entry in cache.entries()))
        built(cache, small(1))
        assert len(cache.entries()) == 2  # both are in use
        process.kill()
        process.wait()
        built(cache, small(2))
    found = {key for entry in cache.entries() for key in entry.workloads}
    assert found == {small(number).workloads[0].key for number in (1, 2)}


# ---------------------------------------------------------------------------------------------------- ends of processes


def test_a_killed_builder_is_survived(cache: KernelCache, caplog: pytest.LogCaptureFixture) -> None:
    """The one who wanted it goes on without; another, who waits for the same, builds it."""
    before, never = set(children(os.getpid())), Ready()
    cache.request(small(0), never)
    assert wait_until(lambda: staged(cache.folder))
    (victim,) = set(children(os.getpid())) - before
    os.kill(victim, signal.SIGSTOP)
    (left,) = staged(cache.folder)
    other, ready = KernelCache(cache.folder, logs=()), Ready()
    other.request(small(0), ready)
    assert wait_until(lambda: len(set(children(os.getpid())) - before) == 2)
    assert not ready.calls
    os.kill(victim, signal.SIGKILL)
    assert ready.wait().workloads == small(0).workloads
    assert left not in staged(cache.folder)
    assert wait_until(lambda: idle(cache))
    (warning,) = warnings_of(caplog)
    assert "ended by signal 9 (Killed)" in warning
    assert not never.calls


def test_a_program_ends_at_once_and_what_it_had_built_is_finished(tmp_path: Path) -> None:
    """Even while the builder is stopped; it neither keeps the program nor is lost with it."""
    with child(tmp_path, 0, "cache.request(wanted, print); input()") as process:
        go(process)
        assert wait_until(lambda: staged(tmp_path))
        (worker,) = children(process.pid)
        os.kill(worker, signal.SIGSTOP)
        start = time.monotonic()
        output, _ = process.communicate("\n", timeout=60)
        assert (process.returncode, output) == (0, "")
        assert time.monotonic() - start < 20
        assert KernelCache(tmp_path, logs=()).find(small(0)) is None
        os.kill(worker, signal.SIGCONT)
    wait_until_gone(worker)
    assert KernelCache(tmp_path, logs=()).find(small(0)) is not None


def test_a_builder_that_waits_ends_with_its_program(tmp_path: Path) -> None:
    with Store(tmp_path, 1).building(), child(tmp_path, 0, "cache.request(wanted, print); input()") as process:
        go(process)
        assert wait_until(lambda: children(process.pid))
        (worker,) = children(process.pid)
        # It has opened the lock, so it waits.
        assert wait_until(lambda: any(_opens(worker, tmp_path / ".building")))
        assert running(worker)
        process.communicate("\n", timeout=60)
        wait_until_gone(worker, 20)
    assert KernelCache(tmp_path, logs=()).entries() == []


def _opens(pid: int, path: Path) -> Iterator[bool]:
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            yield os.readlink(link) == str(path)


def test_a_copy_of_the_process_goes_on(cache: KernelCache) -> None:
    """Copied while another thread is inside the cache, as DataLoader does it."""
    built(cache, small(0))
    with cache._lock:
        pid = os.fork()
        if not pid:
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest has another use for it
                signal.alarm(20)
                os._exit(0 if cache.find(small(0)) is not None else 3)
            finally:
                os._exit(4)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


# ------------------------------------------------------------------------------------------------- what cannot be built


def test_the_builder_is_modest(cache: KernelCache, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = tmp_path / "told.json"
    refused(cache, Wanted(programs=(OddProgram("odd", "tell", str(told)),)))
    found = json.loads(told.read_text())
    assert found["nice"] == min(os.getpriority(os.PRIO_PROCESS, 0) + 10, 19)
    assert found["session"] == found["pid"] != os.getsid(0)
    assert (found["OMP_NUM_THREADS"], found["TVM_NUM_THREADS"]) == ("1", "1")
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (OddProgram("a", "fail", "no such\n  instruction"), r": no such instruction$"),
        (OddProgram("b", "crash"), r": the process that built was ended by signal 6 \(Aborted\)$"),
        (OddProgram("c", "sleep"), r": it was not built within 4 seconds$"),
    ],
    ids=["fail", "crash", "sleep"],
)
def test_a_failure_is_said_once(
    cache: KernelCache,
    program: OddProgram,
    reason: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(builder, "SECONDS", 4 if program.what == "sleep" else 60)
    refused(cache, Wanted(programs=(program,)))
    monkeypatch.setattr(builder, "run", lambda *args: None)  # would fail with another reason
    refused(cache, Wanted(programs=(program,)))
    assert cache.find(Wanted(programs=(program,))) is None
    (warning,) = warnings_of(caplog)
    assert re.search(reason, warning), warning
    assert "plain PyTorch operators run instead" in warning
    assert cache.entries() == []
    assert staged(cache.folder) == [] or program.what != "fail"


def test_what_is_no_data_is_not_built(cache: KernelCache, caplog: pytest.LogCaptureFixture) -> None:
    class Local(OddProgram):
        """Of no module: another process cannot import it."""

    refused(cache, Wanted(programs=(Local("a", "fail"),)))
    (warning,) = warnings_of(caplog)
    assert "cannot be passed to another process" in warning


def test_changed_code_is_not_taken_for_what_it_was(
    cache: KernelCache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code on disk is another one than when this process looked first."""
    monkeypatch.setattr("gf_tvm.on_demand.identity.code_digest", lambda: "of yesterday")
    refused(cache, small(0))
    (warning,) = warnings_of(caplog)
    assert "have changed since this process began; start it again" in warning
    assert cache.entries() == []


@contextlib.contextmanager
def disk(folder: Path, *options: str) -> Iterator[Path]:
    """A small disk."""
    folder.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join(options), "none", str(folder)], check=False
        ).returncode
    ):
        pytest.skip("a disk that is full or read-only needs the right to mount one")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("how", ["a file", "below a file", "full", "read-only"])
def test_a_folder_that_cannot_be_written_is_said_once(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.ExitStack() as stack:
        folder = tmp_path / "place"
        if how == "full":
            stack.enter_context(disk(folder, "size=8k"))
        elif how == "read-only":
            stack.enter_context(disk(folder, "ro"))
        else:
            folder.write_bytes(b"")
            folder = folder / "kernels" if how == "below a file" else folder
        cache = KernelCache(folder, logs=())
        assert cache.find(small(0)) is None
        refused(cache, small(0))
        if how != "full":  # there, who knows
            refused(cache, small(1))
        (warning,) = warnings_of(caplog)
        assert "plain PyTorch operators run instead" in warning
        if how == "full":
            assert re.search("No space left on device|linking .* failed", warning)
        else:
            assert f"cannot write to the cache of kernels {str(folder)!r}" in warning
            assert "GF_TVM_CACHE_DIR names another folder" in warning


def test_what_a_read_only_folder_has_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with disk(tmp_path / "disk", "size=1m") as folder:
        with child(folder, 0, "built(cache, wanted)") as process:
            process.communicate("\n")
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        cache = KernelCache(folder, logs=())
        library = cache.find(small(0))
        assert library is not None
        assert [entry.in_use for entry in cache.entries()] == [True]
        cleared = cache.clear()
        assert (len(cleared.removed), len(cleared.kept)) == (0, 1)
    assert not warnings_of(caplog)


#: What may be missing, and what is said of it.
MISSING = {
    "linker": "no C++ compiler found to link with; install g++",
    "compiler": "TVM's compiler is not installed",
    "Python": "not run by a Python that can be started again",
}


def take_away(what: str, patch: pytest.MonkeyPatch, empty: Path) -> None:
    if what == "linker":
        patch.setenv("PATH", str(empty))
        find_spec = importlib.util.find_spec
        patch.setattr(importlib.util, "find_spec", lambda name: None if name == "ziglang" else find_spec(name))
    elif what == "compiler":
        patch.setattr(runtime, "_libraries", lambda: empty)
    else:
        patch.setattr(sys, "executable", "")


@pytest.mark.parametrize("what", MISSING)
def test_what_is_missing_is_said_once_and_how_to_do_without(
    what: str, cache: KernelCache, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_away(what, monkeypatch, tmp_path)
    said = obstacle()
    assert said is not None
    assert MISSING[what] in said
    command = re.search(r"\(gf-tvm (build .*?)\)", said)
    assert command is not None
    args = cli.build_parser().parse_args(shlex.split(command[1].replace("--last K", "--last 2")))
    assert args.out == Path("FILE.gfb")
    for number in range(2):
        refused(cache, small(number))
    (warning,) = warnings_of(caplog)
    assert said in warning
    assert not cache.folder.exists()


def test_without_tvm_nothing_is_found_and_that_is_said(
    cache: KernelCache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("gf_tvm.on_demand.identity._versions", lambda: version("apache-tvm"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cache.find(small(0)) is None
    refused(cache, small(0))
    refused(cache, small(1))
    (warning,) = warnings_of(caplog)
    assert "apache-tvm is not installed" in warning
    assert "gf-tvm build --device" in warning


def test_nothing_is_missing_here() -> None:
    assert obstacle() is None


# --------------------------------------------------------------------------------------------------------- the settings


def test_the_environment_sets_folder_size_and_logs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GF_TVM_CACHE_DIR", str(tmp_path / "here"))
    monkeypatch.setenv("GF_TVM_CACHE_SIZE", "1.5MiB")
    cache = KernelCache()
    assert (cache.folder, cache.limit, cache._logs) == (tmp_path / "here", 3 << 19, ())
    monkeypatch.setenv("GF_TVM_CACHE_DIR", "")
    monkeypatch.setenv("GF_TVM_CACHE_SIZE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.setenv("GF_TVM_LOGS", f"{tmp_path}/a::{tmp_path}/b")
    cache = KernelCache()
    assert (cache.folder, cache.limit) == (tmp_path / "gf_tvm/kernels", 2 << 30)
    assert cache._logs == (tmp_path / "a", tmp_path / "b")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}  # nothing is made before something is built


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *(
            ("GF_TVM_CACHE_SIZE", text, "500MB, 2GiB or a number of bytes, got")
            for text in ("2 G", "-1", "0", "nan", "x")
        ),
        ("GF_TVM_LOGS", "/nowhere/logs", "there is no folder of tuning logs '/nowhere/logs'"),
    ],
)
def test_settings_that_say_nothing_sensible(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(CacheError, match=re.escape(message)):
        KernelCache()


def test_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GF_TVM_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(CacheError, match="set GF_TVM_CACHE_DIR"):
        KernelCache()


def test_further_logs_are_used(tmp_path: Path, host: Any) -> None:
    """A log that is damaged shows that it was read."""
    (workload,) = small(0).workloads
    log = tmp_path / "logs" / host.name / f"{workload.key}.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("not a log\n{}\n")
    cache = KernelCache(tmp_path / "kernels", logs=(tmp_path / "logs",))
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr(cache_module, "say_once", said.append)
        refused(cache, small(0))
    assert len(said) == 1
    assert str(log) in said[0]

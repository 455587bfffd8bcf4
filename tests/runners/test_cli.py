"""The frame of the command line: exit codes, one-line errors, tables, progress and JSON files."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import stat
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unicodedata import category

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gf_tvm
from gf_tvm.errors import DeviceError, GfTvmError
from gf_tvm.machine.profiles import get_profile, list_profiles
from gf_tvm.runners import _output, cli
from gf_tvm.runners._output import OutputError, ProgressBar, check_writable, format_table, write_json

#: Of terminals.
ENCODINGS = ["ascii", "latin-1", "cp1252", "utf-8"]
GF_TVM = [sys.executable, "-m", "gf_tvm.runners.cli"]


class Terminal(io.StringIO):
    """Takes progress for a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], int]:
    """Runs ``gf-tvm fake`` with the given function as its work."""

    def call(work: Callable[[], Any]) -> int:
        module = types.ModuleType("gf_tvm.runners.fake")

        def add_parser(subparsers: Any) -> None:
            subparsers.add_parser("fake").set_defaults(run=run)

        def run(args: argparse.Namespace) -> int:
            return work() or 0

        vars(module).update(add_parser=add_parser)
        monkeypatch.setattr(cli, "COMMANDS", {"fake": module})
        return cli.main(["fake"])

    return call


def raises(error: BaseException) -> Callable[[], Any]:
    def work() -> Any:
        raise error

    return work


# --- exit codes and messages ------------------------------------------------------------------------------------------


@given(
    text=st.text(max_size=20) | st.sampled_from(["Bücher/ä.json", "\udcff.json", "\x1b]0;x\x07\x1b[2J\r", "\u202egpj"]),
    encoding=st.sampled_from(ENCODINGS),
)
def test_what_a_terminal_cannot_show_is_escaped(text: str, encoding: str) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding)
    with contextlib.redirect_stdout(screen):
        assert cli.run_command("gf-tvm", lambda: print(f"<{text}>") or 0) == 0
    shown = screen.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert shown.startswith("<")
    assert shown.rstrip("\n").endswith(">")
    # Nor what would give it orders, or turn round what it shows.
    assert all(letter in "\n\t" or category(letter)[0] != "C" for letter in shown)


@given(rows=st.lists(st.lists(st.text(max_size=9), min_size=2, max_size=2), max_size=3), text=st.text(max_size=20))
def test_tables_and_progress_have_the_lines_that_they_should_have(rows: list[list[str]], text: str) -> None:
    """And none that a name or a message adds."""
    rows = [[f"x{cell}" for cell in row] for row in rows]  # empty rows have a line without an end
    plain = [["x", "x"] for _ in rows]
    assert len(format_table(("a", "b"), rows).splitlines()) == len(format_table(("a", "b"), plain).splitlines())
    for tty in (False, True):
        stream = Terminal() if tty else io.StringIO()
        with ProgressBar(2, text, stream=stream) as progress:
            progress.update(1, text)
            progress.write(text)
        shown = stream.getvalue()
        assert all(letter in "\n\t\r" or category(letter)[0] != "C" for letter in shown)
        assert tty or "\r" not in shown


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (GfTvmError("patch must be at least 1, got 0"), 2, "gf-tvm: error: patch must be at least 1, got 0"),
        (DeviceError("unknown device 'pi'\nknown: host"), 2, "gf-tvm: error: unknown device 'pi' known: host"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a.json"),
            2,
            "gf-tvm: error: a.json: No space left on device",
        ),
        (OSError("no strerror here"), 2, "gf-tvm: error: no strerror here"),
        (KeyboardInterrupt(), 130, "gf-tvm: interrupted"),
    ],
)
def test_errors_are_one_line(
    command: Callable[[Callable[[], Any]], int],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    line: str,
) -> None:
    assert command(raises(error)) == code
    assert capsys.readouterr() == ("", line + "\n")


def test_a_bug_keeps_its_traceback(command: Callable[[Callable[[], Any]], int]) -> None:
    with pytest.raises(ZeroDivisionError):
        command(raises(ZeroDivisionError()))


@pytest.mark.parametrize("code", [0, 1, 3])
def test_exit_code_is_that_of_the_command(command: Callable[[Callable[[], Any]], int], code: int) -> None:
    assert command(lambda: code) == code


def test_warnings_are_one_line(command: Callable[[Callable[[], Any]], int], capsys: pytest.CaptureFixture[str]) -> None:
    before = warnings.formatwarning

    def work() -> None:
        print(warnings.formatwarning(UserWarning("no kernel"), UserWarning, "nn.py", 1), end="")

    assert command(work) == 0
    assert capsys.readouterr().out == "gf-tvm: warning: no kernel\n"
    assert warnings.formatwarning is before


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "COMMAND"),
        (["frobnicate"], "frobnicate"),
        (["devices", "--frobnicate"], "--frobnicate"),
        (["devices", "--js", "x"], "--js"),  # no abbreviations: they would break when an option is added
        (["devices", "--json"], "--json"),
    ],
)
def test_usage_errors_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], part: str) -> None:
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("gf-tvm")
    assert "error: " in err
    assert part in err
    assert "--help" in err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"\n    {name} " in out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert cli.main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: gf-tvm {name} ")
    # Farm and logs are commands of commands; a report finds nothing out that is not in the files that it reads.
    if name not in ("farm", "logs", "report"):
        assert "--json FILE" in out  # every command can write what it found for a program to read


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"gf-tvm {gf_tvm.__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    """A board has no compiler and little memory, and ``--help`` must answer at once."""
    code = (
        "import sys; from gf_tvm.runners.cli import main; main(['--help']); "
        "heavy = {'torch', 'tvm', 'tvm_ffi', 'numpy', 'xgboost', 'sklearn', 'matplotlib', 'transformers'}; "
        "sys.exit(', '.join(heavy & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_reader_that_goes_away() -> None:
    with subprocess.Popen([*GF_TVM, "devices"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == cli.EXIT_BROKEN_PIPE


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_full_disk_behind_standard_output(unbuffered: str) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*GF_TVM, "devices"], stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment
        )
    assert (done.returncode, done.stderr) == (2, "gf-tvm: error: No space left on device\n")


# --- devices ----------------------------------------------------------------------------------------------------------


def test_devices(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "devices.json"
    assert cli.main(["devices", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    host = get_profile("host").name
    for profile in list_profiles():
        line = next(line for line in out.splitlines() if line.startswith(profile.name + " "))
        assert profile.description in line
        assert line.endswith("host") == (profile.name == host)
    value = json.loads(file.read_text())
    assert value["host"] == host
    assert [device["name"] for device in value["devices"]] == [profile.name for profile in list_profiles()]
    assert next(device for device in value["devices"] if device["name"] == host)["runs_here"] is True


def test_devices_where_no_profile_fits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert cli.main(["devices"]) == 0
    assert not [line for line in capsys.readouterr().out.splitlines() if line.endswith(("host", "yes"))]


def test_unwritable_json_is_found_before_the_work(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["devices", "--json", str(tmp_path / "no" / "such.json")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "there is no folder" in err


# --- JSON files -------------------------------------------------------------------------------------------------------


def test_write_json_makes_plain_values(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    value = {
        "nan": float("nan"),
        "inf": [float("-inf"), 1.5],
        2: (np.float32(0.5), np.int64(3)),
        "path": Path("x"),
        "n": None,
    }
    check_writable(file)
    assert list(tmp_path.iterdir()) == []
    write_json(file, value)
    assert json.loads(file.read_text()) == {"nan": None, "inf": [None, 1.5], "2": [0.5, 3], "path": "x", "n": None}
    assert list(tmp_path.iterdir()) == [file]


def test_write_json_takes_the_usual_permissions(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    before = os.umask(0o027)
    try:
        write_json(file, 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    file = tmp_path / "a.json"
    file.write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_output.os, function, full)
    with pytest.raises(OutputError, match=r"a\.json': No space left on device"):
        write_json(file, {"new": 1})
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    file.write_text("old")
    monkeypatch.setattr(_output.os, "fsync", lambda _: raises(KeyboardInterrupt())())
    with pytest.raises(KeyboardInterrupt):
        write_json(file, {"new": 1})
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_value_that_is_no_json_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert list(tmp_path.iterdir()) == []


def test_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link, file = tmp_path / "link.json", tmp_path / "there" / "a.json"
    link.symlink_to(file)
    write_json(link, [1])
    assert link.is_symlink()
    assert json.loads(file.read_text()) == [1]
    assert list((tmp_path / "there").iterdir()) == [file]


def test_devices_and_pipes_are_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        check_writable(pipe)
        write_json(pipe, [1])
        assert json.loads(os.read(reader, 100)) == [1]
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    for device in ("/dev/null", "/dev/stdout"):  # only asked: as root, a mistake would rename a file over it
        assert _output._in_place(Path(device))


@pytest.mark.parametrize("check", [check_writable, lambda path: write_json(path, 1)])
def test_paths_that_cannot_be_written(tmp_path: Path, check: Callable[[Path], None]) -> None:
    (tmp_path / "file").write_text("kept")
    for path, reason in (
        (tmp_path / "none" / "a.json", "there is no folder"),
        (tmp_path, "it is a folder"),
        (tmp_path / "file" / "a.json", "Not a directory"),
        (tmp_path / ("n" * 300), "File name too long"),
    ):
        with pytest.raises(OutputError, match=reason):
            check(path)
    check_writable(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:  # not chmod: root may write everywhere
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(_output, "create", refuse)
    with pytest.raises(OutputError, match="Permission denied"):
        check_writable(tmp_path / "a.json")


# --- tables and progress ----------------------------------------------------------------------------------------------


def test_format_table() -> None:
    text = format_table(("name", "ms"), [("a", 1.23456), ("b", None)])
    assert [line.split() for line in text.splitlines()] == [
        ["name", "ms"],
        ["------", "-----"],
        ["a", "1.235"],
        ["b", "-"],
    ]
    assert format_table(("name", "ms"), []).split()[:2] == ["name", "ms"]


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(_output.time, "monotonic", lambda: self.now)


def test_progress_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stream = Clock(monkeypatch), io.StringIO()
    with ProgressBar(60, "tune", "trial", stream=stream) as progress:
        for i in range(60):
            clock.now += 0.99
            progress.advance(note=f"best {100 - i} ms")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "tune: 11/60 trials, 00:10 passed, 00:48 left, best 90 ms"
    assert lines[-1] == "tune: 60/60 trials, 00:59 passed, 00:00 left, best 41 ms"
    assert len(lines) == 6


@given(pauses=st.lists(st.integers(0, 12), max_size=4), total=st.none() | st.just(4))
@settings(max_examples=10, deadline=None)
def test_a_log_file_hears_of_a_job_however_long_its_steps_take(pauses: list[int], total: int | None) -> None:
    """Intervals of 50 ms stand for those of ten seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_output, "LINE_INTERVAL", 0.05)
        stream, begun = io.StringIO(), time.monotonic()
        with ProgressBar(total, "build", stream=stream) as progress:
            for pause in pauses:
                time.sleep(0.02 * pause)
                progress.advance()
            shown = len(stream.getvalue().splitlines())
            passed = time.monotonic() - begun
        assert shown <= passed / 0.05
        if passed > 0.15:
            assert shown >= 1  # a busy machine may be late, but not silent
        text = stream.getvalue()
        time.sleep(0.12)
        assert stream.getvalue() == text  # nothing after its end
        assert all(line.startswith("build: ") and "passed" in line for line in text.splitlines())


def test_progress_of_a_short_job_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stream = Clock(monkeypatch), io.StringIO()
    with ProgressBar(2, "build", stream=stream) as progress:
        clock.now += 9
        progress.update(2)
    assert stream.getvalue() == ""


def test_time_left_does_not_count_what_was_done_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stream = Clock(monkeypatch), io.StringIO()
    with ProgressBar(100, "tune", "trial", initial=80, stream=stream) as progress:
        clock.now += 20
        progress.advance()
    assert stream.getvalue() == "tune: 81/100 trials, 00:20 passed, 06:20 left\n"


def test_progress_without_a_total(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stream = Clock(monkeypatch), io.StringIO()
    with ProgressBar(None, "tune", stream=stream) as progress:
        clock.now += 20
        progress.advance(3)
        progress.write("resumed")
    assert stream.getvalue() == "tune: 3 steps, 00:20 passed\nresumed\n"


def test_progress_on_a_terminal() -> None:
    stream = Terminal()
    with ProgressBar(64, "tune", "trial", initial=10, stream=stream) as progress:
        progress.update(64, "best 1.5 ms")
        progress.write("checked")
    text = stream.getvalue()
    assert "tune:" in text
    assert "64/64" in text
    assert "best 1.5 ms" in text
    assert "checked\n" in text

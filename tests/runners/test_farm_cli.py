"""``gf-tvm farm`` and ``gf-tvm tune --tracker``: mistakes give one line and exit code 2; the table of boards."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from farm_helpers import TrackerProcess, free_port

from gf_tvm.farm.protocol import TrackerConnection
from gf_tvm.runners.cli import main
from gf_tvm.runners.farm._arguments import parse_address, say_line
from gf_tvm.tuning.measuring.options import FarmOptions

NOWHERE = "127.0.0.1:9"
FIELDS = {"n": 1, "ci": 8, "co": 8, "h": 6, "w": 6, "kernel": 3, "padding": 1}


@pytest.fixture(autouse=True)
def no_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOST", "PORT", "KEY"):
        monkeypatch.delenv(f"TVM_TRACKER_{name}", raising=False)


@pytest.fixture(scope="module")
def tracker() -> Iterator[TrackerProcess]:
    with TrackerProcess() as process:
        yield process


@pytest.fixture
def shapes(tmp_path: Path) -> str:
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps({"patches": [2], "cases": [FIELDS]}))
    return str(path)


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("gf-tvm")
    return lines[0]


SERVE = ("farm", "serve", "--tracker", NOWHERE, "--key", "rpi4", "--allow-root")  # as tests may be run


@pytest.mark.parametrize("command", [("farm", "tracker"), SERVE])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "a-name"])
def test_an_open_address_needs_a_flag_that_names_the_risk(
    capsys: pytest.CaptureFixture[str], command: tuple[str, ...], host: str
) -> None:
    line = fails(capsys, *command, "--host", host, "--port", str(free_port()))
    assert f"--host {host} is open to other machines, and whoever reaches it runs code there" in line
    assert "--whoever-reaches-it-runs-code" in line
    # The flag in short is not the flag.
    assert "unrecognized arguments" in fails(capsys, *command, "--host", host, "--whoever")


def test_with_the_flag_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, *SERVE, "--host", "192.0.2.7", "--whoever-reaches-it-runs-code")
    assert "cannot bind 192.0.2.7:0: Cannot assign requested address" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["farm"], "the following arguments are required: COMMAND"),
        (["farm", "fly"], "invalid choice: 'fly'"),
        (["farm", "tracker", "--port", "-1"], "--port must be from 0 to 65535, got -1"),
        (["farm", "tracker", "--port", "65536"], "--port must be from 0 to 65535, got 65536"),
        (["farm", "tracker", "--port", "ssh"], "argument --port: invalid int value: 'ssh'"),
        (["farm", "status"], "the following arguments are required: --tracker"),
        (["farm", "status", "--tracker", NOWHERE], f"the tracker at {NOWHERE} cannot be reached: Connection refused"),
        (["farm", "status", "--tracker", NOWHERE, "--json", "/no/such/x.json"], "cannot write '/no/such/x.json'"),
        (["farm", "serve", "--key", "rpi4"], "the following arguments are required: --tracker"),
        (["farm", "serve", "--tracker", NOWHERE], "the following arguments are required: --key"),
        ([*SERVE, "--port", "70000"], "--port must be from 0 to 65535, got 70000"),
        ([*SERVE, "--advertise", "board"], "--advertise must be HOST:PORT with a port from 1 to 65535, got 'board'"),
        ([*SERVE, "--idle-seconds", "0"], "--idle-seconds must be more than 0, got 0.0"),
        ([*SERVE, "--idle-seconds", "nan"], "--idle-seconds must be more than 0, got nan"),
        ([*SERVE, "--name", "my board"], "--name must be a word without ':', got 'my board'"),
        (["farm", "serve", "--tracker", NOWHERE, "--key", "a:b"], "--key must be a word without ':', got 'a:b'"),
        (["farm", "serve", "--tracker", NOWHERE, "--key", ""], "--key must be a word without ':', got ''"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert message in fails(capsys, *words)


@pytest.mark.parametrize(
    "text", ["", "board", "9190", ":9190", "board:", "board:ssh", "board:0", "board:65536", "board:-1", "board:9190x"]
)
def test_an_address_that_is_none(capsys: pytest.CaptureFixture[str], text: str) -> None:
    line = fails(capsys, "farm", "status", f"--tracker={text}")
    assert f"--tracker must be HOST:PORT with a port from 1 to 65535, got {text!r}" in line


@pytest.mark.parametrize("before", ["http://", "https://", "tcp://", "ssh://pi@", "pi@", "//", ""])
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "board-1.lan"])
@pytest.mark.parametrize("port", [":9190", ":80", ""])
@pytest.mark.parametrize("after", ["", "/", "/status?x=1"])
def test_a_url_is_told_what_to_write(
    capsys: pytest.CaptureFixture[str], before: str, host: str, port: str, after: str
) -> None:
    text = before + host + port + after
    if {"/", "@"} & set(text):
        line = fails(capsys, "farm", "status", "--tracker", text)
        assert f"got {text!r}" in line
        meant = f"{host}{port or ':9190'}"
        assert line.rstrip().endswith(f"; write {meant}")
        assert parse_address(meant, "--tracker") == (host.strip("[]"), int(meant.rpartition(":")[2]))


def test_a_name_that_nobody_knows(capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "farm", "status", "--tracker", "no-such-host.invalid:9190")
    assert "the tracker at no-such-host.invalid:9190 cannot be reached: " in line


@pytest.mark.parametrize("command", [("farm", "tracker"), SERVE])
def test_a_busy_port(capsys: pytest.CaptureFixture[str], command: tuple[str, ...]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = fails(capsys, *command, "--port", str(port))
    assert line == f"gf-tvm: error: cannot bind 127.0.0.1:{port}: Address already in use"


# ------------------------------------------------------------------------------------------------------------- status


SENSORS = {"known": True, "mhz": 1500.0, "celsius": 51.25, "throttled": [], "throttled_before": []}
INFO = {
    "name": "pi-1",
    "state": "busy",
    "cores": 4,
    "versions": {"gf-tvm": "0.1.0", "apache-tvm": "0.27.0"},
    "trials": 40,
    "failed": 3,
    "emulated": False,
    "sensors": SENSORS,
}


def table(text: str) -> dict[str, list[str]]:
    """The cells of a printed table by their first one; columns are two spaces apart."""
    lines = text.splitlines()
    (rule,) = [line for line in lines if line.startswith("---")]
    widths = [len(part) for part in rule.split()]
    rows = {}
    for line in lines[lines.index(rule) + 1 :]:
        cells, at = [], 0
        for width in widths:
            cells.append(line[at : at + width].strip())
            at += width + 2
        rows[cells[0]] = cells
    return rows


def test_status(capsys: pytest.CaptureFixture[str], tmp_path: Path, tracker: TrackerProcess) -> None:
    assert main(["farm", "status", "--tracker", tracker.text]) == 0
    assert f"no board is registered with the tracker at {tracker.text}" in capsys.readouterr().out

    now = time.time()
    hot = {**SENSORS, "throttled": ["undervoltage"], "throttled_before": ["undervoltage", "throttled"], "celsius": 81.0}
    blind = {"known": False, "mhz": None, "celsius": None, "throttled": [], "throttled_before": []}
    infos: list[tuple[str, dict[str, Any] | None]] = [
        ("rpi4", {**INFO, "updated": now}),
        ("rpi4", {**INFO, "name": "pi-2", "state": "free", "updated": now - 300, "sensors": hot}),
        ("rpi4", {**INFO, "name": "virtual", "emulated": True, "updated": now, "sensors": blind}),
        ("phone", None),
    ]
    connections = []
    try:
        for number, (key, info) in enumerate(infos):
            connection = TrackerConnection(tracker.address)
            connections.append(connection)
            told = {"key": f"server:{key}", "addr": [None, 5000 + number]}
            connection.update_info(told if info is None else {**told, "gf_tvm": info})
        out = tmp_path / "boards.json"
        assert main(["farm", "status", "--tracker", tracker.text, "--json", str(out)]) == 0
    finally:
        for connection in connections:
            connection.close()
    captured = capsys.readouterr()
    assert captured.err == ""
    rows = table(captured.out)
    assert list(rows) == ["127.0.0.1:5003", "pi-1", "pi-2", "virtual"]  # by key, then by name
    usual = ["0.1.0", "0.27.0", "4"]
    assert rows["pi-1"] == ["pi-1", "rpi4", "127.0.0.1:5000", "busy", *usual, "1500.0", "51.2", "no", "40", "3"]
    assert rows["pi-2"][3].startswith("free, silent for 30")
    assert rows["pi-2"][8:] == ["81.0", "undervoltage (since boot: throttled)", "40", "3"]
    assert rows["virtual"][3] == "busy, emulated"
    assert rows["virtual"][7:10] == ["-", "-", "-"]
    assert rows["127.0.0.1:5003"] == ["127.0.0.1:5003", "phone", "127.0.0.1:5003", "?", *["-"] * 8]
    written = json.loads(out.read_text())
    assert written["tracker"] == tracker.text
    assert written["boards"][0] == {"key": "phone", "address": "127.0.0.1:5003"}
    assert written["boards"][1] == {"key": "rpi4", "address": "127.0.0.1:5000", **INFO, "updated": now}


def test_the_environment_gives_the_defaults(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tracker: TrackerProcess
) -> None:
    monkeypatch.setenv("TVM_TRACKER_HOST", tracker.address[0])
    assert "127.0.0.1:9190" in fails(capsys, "farm", "status")  # TVM's port where none is told
    monkeypatch.setenv("TVM_TRACKER_PORT", "ninety")
    assert "got '127.0.0.1:ninety'" in fails(capsys, "farm", "status")
    monkeypatch.setenv("TVM_TRACKER_PORT", str(tracker.address[1]))
    assert main(["farm", "status"]) == 0
    assert tracker.text in capsys.readouterr().out
    assert "are required: --key" in fails(capsys, "farm", "serve")
    monkeypatch.setenv("TVM_TRACKER_KEY", "a:b")
    assert "got 'a:b'" in fails(capsys, "farm", "serve")
    # What is said counts more than what the environment says.
    assert "tracker at 127.0.0.1:9 " in fails(capsys, "farm", "status", "--tracker", NOWHERE)


# --------------------------------------------------------------------------------------------------------------- tune


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "rpi4"], "--tracker needs --key KEY, the kind of board; gf-tvm farm status lists the keys"),
        (["--key", "rpi4"], "--tracker needs --device, what the boards are, such as rpi4; gf-tvm devices lists them"),
        (["--key", "rpi4", "--device", "host"], "--tracker needs --device, what the boards are, such as rpi4"),
        (["--key", "rpi4", "--device", "rpi4", "--boards", "0"], "boards must be more than 0, got 0"),
        (["--key", "rpi4", "--device", "rpi4", "--drift", "-0.1"], "drift must be more than 0, got -0.1"),
        (["--key", "rpi4", "--device", "rpi4", "--patience", "0"], "patience_minutes must be more than 0, got 0.0"),
        (["--key", "rpi4", "--device", "rpi4", "--hot", "nan"], "hot_celsius must be more than 0, got nan"),
    ],
)
def test_tuning_mistakes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, shapes: str, words: list[str], message: str
) -> None:
    logs = tmp_path / "logs"
    assert message in fails(capsys, "tune", "--shapes", shapes, "--logs", str(logs), "--tracker", NOWHERE, *words)
    assert not logs.exists()


def test_tuning_without_a_tracker_or_a_board(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, shapes: str, tracker: TrackerProcess
) -> None:
    words = ["tune", "--shapes", shapes, "--logs", str(tmp_path / "logs"), "--device", "rpi4", "--key", "rpi5"]
    words += ["--threads", "1", "--tracker"]
    assert f"the tracker at {NOWHERE} cannot be reached: Connection refused" in fails(capsys, *words, NOWHERE)
    assert "--tracker must be HOST:PORT" in fails(capsys, *words, "board")
    line = fails(capsys, *words, tracker.text)
    assert line.endswith("knows no board with the key 'rpi5'; known keys: none, no board is registered")
    with TrackerConnection(tracker.address) as connection:
        connection.update_info({"key": "server:rpi4", "addr": [None, 5000]})
        line = fails(capsys, *words, tracker.text)
    assert line.endswith(f"the tracker at {tracker.text} knows no board with the key 'rpi5'; known keys: rpi4")
    assert not list(tmp_path.glob("logs/*/*.jsonl"))


def test_options_of_the_farm_reach_the_library(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, shapes: str
) -> None:
    given: dict[str, Any] = {}

    class Seen(Exception):
        pass

    def see(workloads: object, device: str, **arguments: Any) -> None:
        given.update(arguments, device=device)
        raise Seen

    monkeypatch.setattr("gf_tvm.tuning.tune", see)
    monkeypatch.setenv("TVM_TRACKER_HOST", "::1")
    monkeypatch.setenv("TVM_TRACKER_KEY", "rpi4")
    words = [
        "tune",
        "--shapes",
        shapes,
        "--device",
        "rpi4",
        "--cold",
        "--threads",
        "4",
        "--boards",
        "2",
        "--drift",
        "0",
    ]
    with pytest.raises(Seen):
        main([*words, "--drift", "0", "--hot", "75", "--patience", "5", "--tracker", "[::1]:9191"])
    assert given["farm"] == FarmOptions(
        ("::1", 9191), "rpi4", boards=2, hot_celsius=75.0, drift=None, patience_minutes=5.0
    )
    assert (given["device"], given["threads"], given["cold"]) == ("rpi4", 4, True)


@pytest.mark.parametrize(
    "numbers", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGHUP], [signal.SIGHUP, signal.SIGTERM]]
)
def test_virtual_pis_leave_nothing_however_they_are_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, numbers: list[int]
) -> None:
    """Also if a second signal comes while the first is dealt with."""
    seen: list[Path] = []

    def watch(pis: list[Any]) -> None:
        seen.append(pis[0].folder)
        try:
            os.kill(os.getpid(), numbers[0])
            time.sleep(10)
        finally:
            for number in numbers[1:]:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("gf_tvm.farm.virtual.prepare_root", lambda *_: tmp_path)
    monkeypatch.setattr("gf_tvm.runners.farm.virtual._watch", watch)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    assert main(["farm", "virtual", "1", "--tracker", NOWHERE, "--key", "rpi4"]) == 130
    assert seen
    assert not list(tmp_path.iterdir())
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


def test_lines_for_a_terminal_that_was_closed_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Closed())
    say_line("the server ends")


def test_a_server_does_not_run_as_root_unless_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    class Told(Exception):
        pass

    def server(options: Any, say: Any) -> None:
        made.append(options)
        raise Told

    monkeypatch.setattr("gf_tvm.farm.server.Server", server)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    plain = [word for word in SERVE if word != "--allow-root"]
    assert fails(capsys, *plain).endswith("or --allow-root where the whole machine is there for it")
    assert not made
    for user, words in ((0, ["--allow-root"]), (1000, [])):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        with pytest.raises(Told):
            main([*plain, *words])
    assert len(made) == 2

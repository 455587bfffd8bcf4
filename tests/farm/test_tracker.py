"""The tracker: whatever one client says, or does not say, the others are served."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from farm_helpers import CLI, TrackerProcess
from hypothesis import example, given, settings
from hypothesis import strategies as st
from toy_task import wait_until

from gf_tvm.farm import protocol
from gf_tvm.farm.protocol import TrackerConnection
from gf_tvm.farm.tracker import boards_of

HELLO = struct.pack("<i", protocol.TRACKER_MAGIC)
SECONDS = 30.0  # for a busy machine
INFO = {"key": "server:good", "addr": [None, 9], "gf_tvm": {"name": "b"}}


@pytest.fixture(scope="module")
def tracker() -> Iterator[TrackerProcess]:
    with TrackerProcess() as process:
        yield process


@contextlib.contextmanager
def stranger(tracker: TrackerProcess, *pieces: bytes) -> Iterator[socket.socket]:
    """Says something and stays."""
    with socket.create_connection(tracker.address, SECONDS) as connection:
        with contextlib.suppress(OSError):
            for piece in pieces:
                connection.sendall(piece)
        yield connection


def message(value: Any) -> bytes:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<i", len(data)) + data


def closed(connection: socket.socket) -> bool:
    """Whether the tracker closes the connection, after whatever it answers."""
    connection.settimeout(SECONDS)
    with contextlib.suppress(ConnectionError):
        while connection.recv(1 << 16):
            pass
    return True


def check_served(tracker: TrackerProcess) -> None:
    """A board can register, be listed, offer itself and be given to a client."""
    with TrackerConnection(tracker.address, SECONDS) as board, TrackerConnection(tracker.address, SECONDS) as client:
        board.update_info(INFO)
        assert [b.info for b in boards_of(client.summary()) if b.key == "good"] == [INFO["gf_tvm"]]
        board.put("good", 9, "good:0.5", None)
        assert board.pending_match_keys() == ["good:0.5"]
        assert client.request("good", SECONDS) == (("127.0.0.1", 9), "good:0.5")
        assert board.pending_match_keys() == []


NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -1, 2**31])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["key", "addr", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
SOUND = [
    [1],
    [2, "stop"],
    [3, "k", [9, "k:1"], None],
    [4, "k", "user", 1],
    [5, {"key": "server:k", "addr": [None, 1]}],
    [6],
    [7],
]


@st.composite
def messages(draw: st.DrawFn) -> Any:
    """Any value, or one that is nearly a message."""
    if draw(st.integers(0, 4)) == 0:
        return draw(VALUES)
    made = json.loads(json.dumps(draw(st.sampled_from(SOUND))))
    place = made
    while isinstance(place, list | dict) and place:
        key = draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1))
        if not isinstance(place[key], list | dict) or draw(st.booleans()):
            place[key] = draw(VALUES)
            break
        place = place[key]
    return made


@given(said=st.lists(messages(), min_size=1, max_size=6))
@example([[5, {"key": 5, "addr": [None, 1]}]])
@example([[5, {"key": "server:k", "addr": [None, 1], "gf_tvm": "x" * 900_000}]])
@example([[3, "k", [9, "k:1"], None], [3, "k", [9, "k:1"], None], [4, "k", "", 1]])
@example([[4, "k", "", "high"], [4, "k", "", 1]])
@settings(max_examples=60, deadline=None)
def test_what_one_client_says_keeps_no_other_from_being_served(tracker: TrackerProcess, said: list[Any]) -> None:
    with stranger(tracker, HELLO, *map(message, said)):
        check_served(tracker)
    check_served(tracker)


@pytest.mark.parametrize(
    "pieces",
    [
        (b"GET / HTTP/1.1\r\n\r\n",),
        (HELLO, message(b"[" * 100_000)),
        (HELLO, message(b"\xff\xfe")),
        (HELLO, struct.pack("<i", 1 << 30)),
        (HELLO, message([5, {"key": 5, "addr": [None, 1]}])),
        (HELLO, message([5, {"key": "k", "addr": [None, 1], "gf_tvm": "x" * 900_000}])),
        (HELLO, *(message([3, "k", [9, f"k:{i}"], None]) for i in range(100))),
    ],
)
def test_who_says_what_makes_no_sense_is_disconnected(tracker: TrackerProcess, pieces: tuple[bytes, ...]) -> None:
    with stranger(tracker, *pieces) as connection:
        assert closed(connection)
    check_served(tracker)


def test_many_servers_that_say_much_are_listed_as_far_as_a_message_goes(tracker: TrackerProcess) -> None:
    with contextlib.ExitStack() as stack:
        for number in range(150):
            board = stack.enter_context(TrackerConnection(tracker.address, SECONDS))
            board.update_info({"key": f"server:k{number}", "addr": [None, 1], "x": "x" * 7500})
        client = stack.enter_context(TrackerConnection(tracker.address, SECONDS))
        assert 50 < len(client.summary()["server_info"]) < 150


def test_a_greeting_in_pieces_and_one_with_a_message(tracker: TrackerProcess) -> None:
    with stranger(tracker, HELLO[:1]) as slow, stranger(tracker, HELLO + message([1])) as quick:
        slow.sendall(HELLO[1:] + message([1]))
        for connection in (slow, quick):
            connection.settimeout(SECONDS)
            with connection.makefile("rb") as answer:
                assert answer.read(9) == HELLO + message(0)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def test_a_thousand_idle_connections_keep_nobody_from_being_served() -> None:
    """And the tracker has nothing to do when they are gone. It is given as few descriptors as systems give."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2000:
        pytest.skip("needs 2000 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))  # which the tracker inherits
    try:
        process = TrackerProcess()
        process.start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    try:
        with contextlib.ExitStack() as stack:
            for number in range(1100):
                stack.enter_context(stranger(process, HELLO if number % 2 else b""))
            check_served(process)
        check_served(process)
        assert process._process is not None
        pid = process._process.pid
        assert wait_until(lambda: len(os.listdir(f"/proc/{pid}/fd")) < 40)
        before = cpu_seconds(pid)
        time.sleep(3)
        assert cpu_seconds(pid) - before < 1.0
    finally:
        process.kill()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_clients_that_do_nothing_are_disconnected_and_those_that_wait_are_not() -> None:
    code = (
        "import sys; from gf_tvm.farm import tracker_server as t; "
        "t._HELLO_SECONDS, t._IDLE_SECONDS, t._SWEEP_SECONDS = 0.5, 2.0, 0.2; "
        "from gf_tvm.runners import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    process = TrackerProcess()
    process.command = [CLI[0], "-c", code]
    with (
        process as tracker,
        stranger(tracker) as silent,
        stranger(tracker, HELLO) as idle,
        TrackerConnection(tracker.address, SECONDS) as board,
    ):
        board.update_info(INFO)
        with stranger(tracker, HELLO, message([4, "k", "", 1])) as waiting:
            assert closed(silent)
            assert closed(idle)
            waiting.settimeout(2.5)
            assert waiting.recv(4) == HELLO
            with pytest.raises(TimeoutError):
                waiting.recv(4)
            board.put("k", 9, "k:0.5", None)
            waiting.settimeout(SECONDS)
            with waiting.makefile("rb") as answer:
                size = struct.unpack("<i", answer.read(4))[0]
                assert json.loads(answer.read(size)) == [0, ["127.0.0.1", 9, "k:0.5"]]


def test_what_strangers_do_fills_no_terminal() -> None:
    tracker = TrackerProcess()
    tracker.start(stderr=True)
    try:
        for _ in range(200):
            with stranger(tracker, HELLO, message([99])) as connection:
                assert closed(connection)
        assert tracker._process is not None
        tracker._process.terminate()
        _, text = tracker._process.communicate()
        lines = text.splitlines()
        assert 2 < len(lines) <= 25
        assert "closed the connection of 127.0.0.1:" in lines[0]
        assert "there is no message 99" in lines[0]
        assert "Traceback" not in text
    finally:
        tracker.kill()


def test_an_offer_is_void_when_its_server_is_gone(tracker: TrackerProcess) -> None:
    with TrackerConnection(tracker.address, SECONDS) as client:
        with TrackerConnection(tracker.address, SECONDS) as board:
            board.put("gone", 9, "another:0.5", None)
        assert wait_until(lambda: "gone" not in queues(client))
        assert client.request("gone", 1.0) is None


def queues(client: TrackerConnection) -> dict[str, Any]:
    found: dict[str, Any] = client.summary()["queue_info"]
    return found

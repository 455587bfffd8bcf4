"""The board's server and its protocol, against TVM's own client and against clients that do what they must not."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unicodedata import category

import numpy as np
import pytest
from farm_helpers import BABBLE, NativeBoard, TrackerProcess, babble
from hypothesis import given
from hypothesis import strategies as st
from toy_task import wait_until

from gf_tvm.farm import doctor, protocol
from gf_tvm.farm.protocol import Address, ClientHello, TrackerConnection, TrackerLost
from gf_tvm.farm.tracker import Board, boards_of
from gf_tvm.runners.farm import status
from gf_tvm.tuning.measuring.messages import gpu_of
from gf_tvm.tuning.task import TuningError

MAGIC = struct.pack("<i", protocol.RPC_MAGIC)

# ------------------------------------------------------------------------------------------------- what a client says


@st.composite
def hellos(draw: st.DrawFn) -> bytes:
    """Bytes that start as a client's greeting does, more or less."""
    key = draw(
        st.one_of(
            st.binary(max_size=40),
            st.builds(
                lambda key, seconds: f"client:{key} -timeout={seconds}".encode(),
                st.text(max_size=8),
                st.one_of(st.floats(), st.text(max_size=4)),
            ),
        )
    )
    length = draw(st.sampled_from([len(key), len(key) + 1, 0, -1, protocol.MAX_KEY + 1, 2**31 - 1]))
    start = draw(st.sampled_from([MAGIC, MAGIC, MAGIC[::-1], struct.pack("<i", protocol.TRACKER_MAGIC)]))
    whole = start + struct.pack("<i", length) + key + draw(st.binary(max_size=3))
    return whole[: draw(st.integers(0, len(whole)))] if draw(st.booleans()) else whole


def outcome(pieces: list[bytes]) -> object:
    """What becomes of a greeting; NaN is written out, since it is not equal to itself."""
    hello = ClientHello()
    try:
        for piece in pieces:
            if found := hello.feed(piece):
                return str(found)
    except ValueError:
        return ValueError
    return None


@given(data=st.one_of(hellos(), st.binary(max_size=60)), cuts=st.lists(st.integers(0, 60), max_size=8))
def test_a_greeting_in_pieces_is_the_same_greeting(data: bytes, cuts: list[int]) -> None:
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[a:b] for a, b in itertools.pairwise(bounds)]
    whole = outcome([data])
    assert outcome(pieces) == whole
    if isinstance(whole, str):
        assert data[:4] == MAGIC
        assert 0 < struct.unpack("<i", data[4:8])[0] <= min(protocol.MAX_KEY, len(data) - 8)
    elif whole is None:
        assert data[:4] == MAGIC[: len(data)][:4] or len(data) < 4


def test_a_greeting_of_tvm() -> None:
    words = b"client:rpi4:0.25 -timeout=1.5"
    assert ClientHello().feed(MAGIC + struct.pack("<i", len(words)) + words) == ("rpi4:0.25", 1.5)
    assert ClientHello().feed(MAGIC + struct.pack("<i", 4) + b"rpi4") == ("rpi4", None)


# --------------------------------------------------------------------------------------------------- odd trackers

# What must not time out has LONG; what waits for more than comes gives up after less than a second, and surely before
# PROMPT, in which a busy machine may have done other things.
LONG, PROMPT = 250.0, 50.0

Act = Callable[[socket.socket], object]


@contextlib.contextmanager
def peer(act: Act) -> Iterator[Address]:
    """Something that listens, and does ``act`` with the first who comes."""
    over = threading.Event()

    def serve() -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                act(connection)
                over.wait(LONG)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[:2]
        finally:
            over.set()
            thread.join(LONG)


def sends(*pieces: bytes, pause: float = 0.0) -> Act:
    def act(connection: socket.socket) -> None:
        connection.recv(4)
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause)

    return act


def message(data: bytes) -> bytes:
    return struct.pack("<i", len(data)) + data


HELLO = struct.pack("<i", protocol.TRACKER_MAGIC)


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (sends(), "no answer in time"),
        (sends(HELLO[:1], HELLO[1:2], HELLO[2:3], pause=0.15), "no answer in time"),
        (lambda connection: connection.shutdown(socket.SHUT_RDWR), "closed the connection|reset|[Bb]roken"),
        (sends(b"SSH-2.0-OpenSSH\r\n"), "but not a tracker of TVM"),
    ],
)
def test_no_tracker(act: Act, reason: str) -> None:
    with peer(act) as address:
        begun = time.monotonic()
        with pytest.raises(TrackerLost, match=reason):
            TrackerConnection(address, 0.3 if "in time" in reason else LONG)
        assert time.monotonic() - begun < PROMPT


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()[:2]
    with pytest.raises(TrackerLost, match=rf"127\.0\.0\.1:{address[1]} cannot be reached: Connection refused"):
        TrackerConnection(address, LONG)


@pytest.mark.parametrize(
    "pieces",
    [
        (),
        (b"\1",),
        (struct.pack("<i", 0),),
        (struct.pack("<i", -1),),
        (struct.pack("<i", 2**31 - 1), b"[" * 1000),
        (struct.pack("<i", 100), b"[0,"),
        (message(b"\xff\xfe{"),),
        (message(b"[" * 100_000),),
        (message(b"[]"),),
        (message(b"17"),),
        (message(b'[0, ["host", "no port", "key"]]'),),
        (message(b"null"),),
    ],
)
def test_a_tracker_that_answers_nonsense(pieces: tuple[bytes, ...]) -> None:
    with peer(sends(HELLO, *pieces)) as address, TrackerConnection(address, LONG) as tracker:
        tracker.timeout = 0.3
        begun = time.monotonic()
        with pytest.raises(TrackerLost):
            tracker.summary()
        assert time.monotonic() - begun < PROMPT
        # What comes on a connection after that could be half of a message.
        assert tracker.fileno() == -1
        with pytest.raises(TrackerLost, match="the connection is closed"):
            tracker.pending_match_keys()


def test_an_answer_that_trickles_does_not_extend_the_deadline() -> None:
    answer = message(b'[0, {"queue_info": {}, "server_info": []}]'.ljust(10 * round(2 * PROMPT)))
    slow = sends(HELLO, *(answer[i : i + 1] for i in range(len(answer))), pause=0.1)
    with peer(slow) as address, TrackerConnection(address, LONG) as tracker:
        tracker.timeout = 0.4
        begun = time.monotonic()
        with pytest.raises(TrackerLost, match="no answer in time"):
            tracker.summary()
        assert time.monotonic() - begun < PROMPT


def test_a_request_that_is_not_granted() -> None:
    with peer(sends(HELLO)) as address, TrackerConnection(address, LONG) as tracker:
        assert tracker.request("rpi4", 0.2) is None
        assert tracker.fileno() == -1  # so that the tracker forgets it
    nonsense = (b"[0, [0, 1e999, 0]]", b'[0, ["h", 70000, "k"]]', b"[0, [null, NaN, 1]]")
    for answer in (b"[1, null]", b"[0, null]", b"17", *nonsense):
        with (
            peer(sends(HELLO, message(answer))) as address,
            TrackerConnection(address, LONG) as tracker,
            pytest.raises(TrackerLost, match="did not grant a server for 'rpi4'"),
        ):
            tracker.request("rpi4", LONG)


def test_entries_of_the_list_that_make_no_sense_are_left_out() -> None:
    good = {"key": "server:k", "addr": ["::1", 9], "gf_tvm": {"name": "b"}}
    stock = {"key": "server:k", "addr": ["10.0.0.1", 9]}
    odd = [None, 3, {}, {"key": 3}, {"key": "server:k", "addr": [3, 4], "gf_tvm": 5}, {"key": "server:k", "addr": None}]
    found = boards_of({"server_info": [good, stock, *odd]})
    assert Board("k", "[::1]:9", {"name": "b"}) in found
    assert Board("k", "10.0.0.1:9", {}) in found
    assert all(board.name for board in found)


NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -1])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text() | st.just("\x1b[2J\n"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
INFO = {
    "name": "b",
    "state": "free",
    "client": None,
    "arch": "aarch64",
    "model": "Pi",
    "device": "rpi4",
    "gpu": {"name": "Orin", "arch": "sm_87", "driver": "12.2"},
    "cores": 4,
    "trials": 3,
    "failed": 1,
    "crashed_sessions": 0,
    "updated": 1.5,
    "emulated": False,
    "versions": {"gf-tvm": "0.1.0", "torch": None},
    "sensors": {"celsius": 50.0, "mhz": 1500, "throttled": ["undervoltage"], "throttled_before": [], "known": True},
}


@st.composite
def entries(draw: st.DrawFn) -> Any:
    """What a stranger registers: anything, or nearly what a server says."""
    if draw(st.integers(0, 9)) == 0:
        return draw(VALUES)
    info: dict[str, Any] = json.loads(json.dumps(INFO))
    place = draw(st.sampled_from([info, info["gpu"], info["versions"], info["sensors"]]))
    place[draw(st.sampled_from(sorted(place)))] = draw(VALUES)
    entry: dict[str, Any] = {"key": "server:k", "addr": ["10.0.0.1", 9], "gf_tvm": info}
    if draw(st.booleans()):
        entry[draw(st.sampled_from(sorted(entry)))] = draw(VALUES)
    return entry


@given(registered=VALUES | st.lists(entries(), max_size=4))
def test_whatever_is_registered_can_be_listed(registered: Any) -> None:
    found = boards_of({"server_info": registered})
    table = status.format_table(*status._table(found, time.time()))
    assert all(letter == "\n" or letter.isprintable() or category(letter) == "Zs" for letter in table)
    for board in found:
        assert 0 < len(board.name) <= 1000
        assert board.name.isprintable()
        assert list(doctor.compare_versions({}, board.info.get("versions") or {}, board.name))
        with contextlib.suppress(TuningError):
            gpu_of(board.name, board.info.get("gpu"), "sm_53")


def test_what_a_server_says_is_listed_whole() -> None:
    (found,) = boards_of({"server_info": [{"key": "server:k", "addr": ["10.0.0.1", 9], "gf_tvm": INFO}]})
    sensors = found.info.pop("sensors")
    assert {name: sensors[name] for name in INFO["sensors"]} == INFO["sensors"]  # type: ignore[call-overload, attr-defined]
    assert found.info == {name: value for name, value in INFO.items() if name != "sensors"}


def test_a_list_without_end_is_cut() -> None:
    assert len(boards_of({"server_info": [{"key": "server:k", "addr": ["h", 9]}] * 5000})) == 1000


# --------------------------------------------------------------------------------------------------------- the server


# Quick where something is to be noticed. Clients of a busy machine get their time, as long as a test can wait for it.
QUICK = {"_TICK": 0.1, "_INFO_SECONDS": 0.5, "_PENDING_SECONDS": 0.2, "_GRACE_SECONDS": 0.5}
QUICK |= {"_HELLO_SECONDS": PROMPT, "_UNUSED_SECONDS": LONG}


class QuickBoard(NativeBoard):
    """A board that runs tests/farm/quick_board.py; ``seconds`` are put over :data:`QUICK`."""

    def __init__(
        self,
        name: str,
        tracker: Address,
        key: str,
        folder: Path,
        *options: str,
        **seconds: float,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(name, tracker, key, folder, *options, TMPDIR=str(folder))
        self._seconds = json.dumps({**QUICK, **seconds})

    @property
    def arguments(self) -> list[str]:
        return [str(Path(__file__).with_name("quick_board.py")), self._seconds, *super().arguments[2:]]

    def left(self) -> list[str]:
        """What sessions have left, or still have, of files."""
        return sorted(str(path) for path in self.folder.glob("gf_tvm-board-*"))

    def unplug(self) -> None:
        """Close its standard input."""
        self._close_stdin()


@pytest.fixture(scope="module")
def tracker() -> Iterator[TrackerProcess]:
    with TrackerProcess() as process:
        yield process


@pytest.fixture(scope="module")
def shared(tracker: TrackerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[QuickBoard]:
    with QuickBoard("quick", tracker.address, "quick", tmp_path_factory.mktemp("quick")) as board:
        yield board


@pytest.fixture
def board(tracker: TrackerProcess, shared: QuickBoard) -> QuickBoard:
    """A board that is free, whatever the test before has done to it."""
    assert wait_until(lambda: state(tracker, "quick") == "free"), shared.output
    return shared


def entry(tracker: TrackerProcess, key: str) -> Board | None:
    return next((board for board in tracker.boards() if board.key == key), None)


def state(tracker: TrackerProcess, key: str) -> object:
    found = entry(tracker, key)
    return found and found.info["state"]


def request(tracker: TrackerProcess, key: str) -> tuple[Address, str]:
    with TrackerConnection(tracker.address) as connection:
        granted = connection.request(key, LONG)
    assert granted is not None
    return granted


def greet(address: Address, words: str) -> socket.socket:
    connection = socket.create_connection(address, LONG)
    connection.sendall(MAGIC + message(f"client:{words}".encode()))
    return connection


def admitted(connection: socket.socket) -> bool:
    return struct.unpack("<i", connection.recv(4, socket.MSG_WAITALL))[0] == protocol.RPC_MAGIC


def closed(connection: socket.socket) -> bool:
    """Wait until the other side closes the connection."""
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(4096):
            pass
    return True


def test_tvms_own_client(tracker: TrackerProcess, board: QuickBoard, tmp_path: Path) -> None:
    import tvm
    from tvm import rpc

    remote = rpc.connect_tracker(*tracker.address).request("quick", session_timeout=60)
    data = bytes(range(256)) * 1000
    remote.upload(bytearray(data), "weights.bin")
    assert remote.download("weights.bin") == data
    (folder,) = board.left()
    assert os.listdir(folder) == ["weights.bin"]
    remote.remove("weights.bin")
    assert os.listdir(folder) == []

    values = np.arange(6, dtype="float32").reshape(2, 3)
    there = tvm.runtime.tensor(values, remote.cpu())
    assert "remote" in str(there.device)
    np.testing.assert_array_equal(there.numpy(), values)
    assert remote.get_function("gf_tvm.request")("hello") == "hello at quick"

    for outside in ("../stray", "a/../../stray", str(tmp_path / "stray")):
        with pytest.raises(Exception, match="outside the session's folder"):
            remote.upload(bytearray(b"stray"), outside)
        with pytest.raises(Exception, match="outside the session's folder"):
            remote.load_module(outside)
    assert not list(board.folder.rglob("stray")) + list(tmp_path.rglob("stray"))
    assert state(tracker, "quick") == "busy"
    del remote, there
    gc.collect()
    assert wait_until(lambda: state(tracker, "quick") == "free")
    assert board.left() == []


def test_a_wrong_key_is_refused_and_the_board_stays_on_offer(tracker: TrackerProcess, board: QuickBoard) -> None:
    for words in ("quick", "quick:0.123", ":", "server:quick", f"x{'y' * 4000}"):
        with greet(("127.0.0.1", board.port), words) as connection:
            assert struct.unpack("<i", connection.recv(4))[0] == protocol.RPC_MISMATCH
            assert closed(connection)
    with greet(*request(tracker, "quick")) as connection:
        assert admitted(connection)
        with greet(("127.0.0.1", board.port), "quick:0.123") as second:
            assert not admitted(second)


def test_a_match_key_admits_one_client(tracker: TrackerProcess, board: QuickBoard) -> None:
    address, match_key = request(tracker, "quick")
    with greet(address, match_key) as connection, greet(address, match_key) as second:
        assert admitted(connection)
        assert not admitted(second)
    assert wait_until(lambda: state(tracker, "quick") == "free")
    with greet(address, match_key) as late:
        assert not admitted(late)


def test_strangers_do_not_block_a_client(tracker: TrackerProcess, board: QuickBoard) -> None:
    here = ("127.0.0.1", board.port)
    for data in BABBLE:
        babble(here, data, 0.05)
    with contextlib.ExitStack() as stack:
        # More than it keeps at once, half of them in the midst of their greeting.
        for number in range(20):
            connection = stack.enter_context(socket.create_connection(here, 5))
            connection.sendall(MAGIC + struct.pack("<i", 100) if number % 2 else b"")
        begun = time.monotonic()
        with greet(*request(tracker, "quick")) as client:
            assert admitted(client)
            assert time.monotonic() - begun < PROMPT - 10  # before any of them is sent away
    assert "does not speak TVM's RPC protocol" in board.output


def test_one_that_says_nothing_is_sent_away(tracker: TrackerProcess, tmp_path: Path) -> None:
    with QuickBoard("terse", tracker.address, "terse", tmp_path, _HELLO_SECONDS=1.0) as board:
        with socket.create_connection(("127.0.0.1", board.port), LONG) as connection:
            connection.sendall(MAGIC)
            assert closed(connection)
        board.wait_for("said nothing for 1 s")


def test_a_client_that_goes_away_frees_the_board(tracker: TrackerProcess, board: QuickBoard) -> None:
    with greet(*request(tracker, "quick")) as connection:
        assert admitted(connection)
        assert wait_until(lambda: state(tracker, "quick") == "busy")
        assert len(board.left()) == 1
    assert wait_until(lambda: state(tracker, "quick") == "free")
    assert board.left() == []


CLIENT = """
import sys
from gf_tvm.tuning.measuring.link import Link
link = Link()
link.hello("link")
assert link.connect((sys.argv[1], int(sys.argv[2])), sys.argv[3], 250.0)
print("connected", flush=True)
link.call(sys.argv[4])
"""


def call(tracker: TrackerProcess, key: str, text: str) -> subprocess.Popen[str]:
    """A client, as a process of its own, that makes one request; it is connected when this returns."""
    words = [sys.executable, "-c", CLIENT, tracker.address[0], str(tracker.address[1]), key, text]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "connected\n"
    return process


def test_a_session_that_hangs_is_ended_when_its_client_is(tracker: TrackerProcess, board: QuickBoard) -> None:
    with call(tracker, "quick", "hang") as client:
        board.wait_for("hangs")
        assert wait_until(lambda: state(tracker, "quick") == "busy")
        client.kill()
    board.wait_for("its client is gone")
    assert wait_until(lambda: state(tracker, "quick") == "free")


def test_a_session_that_crashes_leaves_the_server(tracker: TrackerProcess, board: QuickBoard) -> None:
    pid = board.pid
    with call(tracker, "quick", "crash") as client:
        assert client.wait(LONG) != 0
    assert wait_until(lambda: state(tracker, "quick") == "free")
    board.wait_for("crashed with SIGSEGV")
    with call(tracker, "quick", "count") as client:
        assert client.wait(LONG) == 0
    assert wait_until(lambda: (found := entry(tracker, "quick")) is not None and found.info["failed"] == 1)
    found = entry(tracker, "quick")
    assert found is not None
    assert (found.info["crashed_sessions"], found.info["trials"]) == (1, 1)
    assert board.alive
    assert board.pid == pid
    assert board.left() == []


def test_the_session_of_a_stock_client_lasts_as_long_as_it_asks_for(tracker: TrackerProcess, board: QuickBoard) -> None:
    address, match_key = request(tracker, "quick")
    begun = time.monotonic()
    with greet(address, f"{match_key} -timeout=0.7") as connection:
        assert admitted(connection)
        assert closed(connection)
        assert 0.7 <= time.monotonic() - begun < PROMPT
    board.wait_for("its 1 s are over")
    assert wait_until(lambda: state(tracker, "quick") == "free")


def test_idle_clients(tracker: TrackerProcess, tmp_path: Path) -> None:
    """A client may keep a board for as long as it works, not for as long as it likes."""
    with QuickBoard("idle", tracker.address, "idle", tmp_path, "--idle-seconds", "4") as board:
        begun = time.monotonic()
        with greet(*request(tracker, "idle")) as connection:
            assert admitted(connection)
            assert closed(connection)
            assert 4 <= time.monotonic() - begun < 4 + PROMPT
        board.wait_for("its client did nothing for 4 s")
        # A request that is worked on is no idleness, though the session uses no processor time.
        with call(tracker, "idle", "hang") as client:
            board.wait_for("hangs")
            time.sleep(4.6)
            assert state(tracker, "idle") == "busy"
            client.kill()


def test_unused_offers(tracker: TrackerProcess, tmp_path: Path) -> None:
    """One takes the offer and does not come; the next one gets another."""
    with QuickBoard("offer", tracker.address, "offer", tmp_path, _UNUSED_SECONDS=4.0):
        address, first = request(tracker, "offer")
        again, second = request(tracker, "offer")
        assert (address, first) != (again, second)
        with greet(address, first) as late, greet(again, second) as client_of_the_second:
            assert not admitted(late)
            assert admitted(client_of_the_second)


def children(pid: int) -> list[int]:
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(file.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(file.parent.name))
    return found


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "SIGHUP", "stdin"])
def test_the_end(tracker: TrackerProcess, tmp_path: Path, how: str) -> None:
    """It ends with its session, and leaves no folder; the tracker forgets it."""
    with QuickBoard("end", tracker.address, "end", tmp_path) as board:
        with greet(*request(tracker, "end")) as connection:
            assert admitted(connection)
            assert wait_until(lambda: children(board.pid))
            (session,) = children(board.pid)
            assert len(board.left()) == 1
            board.unplug() if how == "stdin" else os.kill(board.pid, signal.Signals[how])
            assert wait_until(lambda: not board.alive)
            assert board.exit_code == 0
            assert closed(connection)
        assert not Path(f"/proc/{session}").exists()
        assert board.left() == []
        assert "Traceback" not in board.output
    assert wait_until(lambda: entry(tracker, "end") is None)


def test_a_session_dies_with_a_server_that_is_killed(tracker: TrackerProcess, tmp_path: Path) -> None:
    with QuickBoard("killed", tracker.address, "killed", tmp_path) as board:
        connection = greet(*request(tracker, "killed"))
        assert admitted(connection)
        assert wait_until(lambda: children(board.pid))
        os.kill(board.pid, signal.SIGKILL)
        assert closed(connection)
        connection.close()


def test_what_a_board_tells(tracker: TrackerProcess, board: QuickBoard) -> None:
    found = entry(tracker, "quick")
    assert found is not None
    assert found.address == f"127.0.0.1:{board.port}"
    assert json.loads(json.dumps(found.info)) == found.info
    assert found.info["name"] == "quick"
    assert found.info["cores"] == len(os.sched_getaffinity(0))
    assert {"gf-tvm", "apache-tvm", "apache-tvm-ffi", "python"} <= set(found.info["versions"])
    assert abs(time.time() - found.info["updated"]) < PROMPT

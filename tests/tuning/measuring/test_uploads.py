"""What was uploaded to a board is looked at before it is loaded, and nothing else on the board is touched."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from fake_farm import TASK, FakeFarm
from hypothesis import given
from hypothesis import strategies as st

from gf_tvm.farm.server import Counters, SessionContext
from gf_tvm.machine.sensors import Sensors
from gf_tvm.tuning.measuring.board_link import State
from gf_tvm.tuning.measuring.board_service import BoardService
from gf_tvm.tuning.measuring.messages import checksum, task_values

#: What a session answers when it has found nothing wrong with the files, since nobody has greeted it.
PASSED = {"failed": "ValueError: hello must come first", "name": "b"}


def ask(folder: Path, operation: str, trouble: str = "", **arguments: Any) -> Any:
    context = SessionContext("b", folder, Counters(), Sensors(folder), False, None, trouble)
    return json.loads(BoardService(context).handle(json.dumps({"op": operation, **arguments})))


def run(folder: Path, file: str, checksums: dict[str, str] | None, compare: bool = False) -> Any:
    sent = {} if checksums is None else {"checksums": checksums}
    if compare:
        return ask(folder, "compare", task=task_values(TASK), files={"ours": file}, seed=1, **sent)
    return ask(folder, "run", task=task_values(TASK), file=file, best=None, **sent)


@given(sent=st.binary(min_size=1, max_size=64), data=st.data(), compare=st.booleans())
def test_what_arrived_otherwise_than_it_was_sent_is_the_boards_trouble(
    sent: bytes, data: st.DataObject, compare: bool
) -> None:
    shorter = st.integers(0, len(sent)).map(lambda count: sent[:count])
    arrived = data.draw(st.none() | shorter | st.binary(max_size=64), "arrived")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "1.so"
        if arrived is not None:
            path.write_bytes(arrived)
        answer = run(Path(folder), "1.so", {"1.so": checksum(sent)}, compare)
        if arrived == sent:
            assert answer == PASSED
        else:
            assert set(answer) == {"broken", "name"}
            assert "uploaded library" in answer["broken"]
            assert not path.exists()  # its place is needed


def test_a_host_that_sends_no_checksums_is_served(tmp_path: Path) -> None:
    assert run(tmp_path, "1.so", None) == PASSED


@given(
    parts=st.lists(st.sampled_from(["..", ".", "", "a", "link", "/", "precious"]), max_size=6), compare=st.booleans()
)
def test_no_file_outside_of_the_session_is_touched(parts: list[str], compare: bool) -> None:
    with tempfile.TemporaryDirectory() as outer:
        precious = Path(outer) / "precious"
        precious.write_bytes(b"x")
        folder = Path(outer) / "session"
        folder.mkdir()
        (folder / "link").symlink_to(precious)
        for file in ("/".join(parts), str(precious), "../precious"):
            for sums in (None, {file: checksum(b"y")}):
                answer = run(folder, file, sums, compare)
                assert precious.read_bytes() == b"x"
                assert folder.is_dir()
                inside = (folder / file).resolve()
                if folder.resolve() not in inside.parents:
                    assert answer["failed"].startswith("ValueError: ")
                    assert answer != PASSED


def test_a_session_without_a_folder_says_so_and_who_it_is() -> None:
    answer = ask(Path("/dev/null"), "hello", "no files can be kept in /tmp: Read-only file system", options={})
    assert answer == {"broken": "no files can be kept in /tmp: Read-only file system", "name": "b"}
    farm = FakeFarm([0.0])
    board = farm.board("z")
    board.state = State.CONNECTING
    board.name = ""
    farm.answer(board, "10.0.0.5:9000", plain=True)
    farm.answer(board, json.dumps(answer), plain=True)
    assert "b is put aside for 300 s: no files can be kept in /tmp: Read-only file system" in farm.notes()
    assert farm.troubles("b") == {"broken": 1}


@pytest.mark.parametrize("understood", [False, True])
def test_only_boards_that_understand_checksums_are_sent_them(understood: bool) -> None:
    farm = FakeFarm([0.0])
    board = farm.board("a", **({"checksums": "sha256"} if understood else {}))
    board.reference_due = 9
    farm.job()
    board.give_work()
    farm.answer(board, 0.5)
    farm.answer(board, "3 abc", plain=True)
    process: Any = board.process
    _, request = process.sent[-1]
    assert request["op"] == "run"
    assert request.get("checksums") == ({request["file"]: "3 abc"} if understood else None)

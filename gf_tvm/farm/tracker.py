"""TVM's tracker: starting it, and asking it which boards there are."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

from ..bundle.runtime import without_torch
from ..errors import FarmError
from ..machine.sensors import Reading
from .protocol import Address, TrackerConnection, TrackerLost, show


@dataclass(frozen=True)
class Board:
    """What the tracker knows of one server.

    Args:
        key: the kind of board.
        address: as the server told it, for people.
        info: what a server of gf_tvm says of itself (:meth:`gf_tvm.farm.server.Server.info`), as far as it is of the
            right types; empty for others. Its texts are strangers' all the same.
    """

    key: str
    address: str
    info: dict[str, Any]

    @property
    def name(self) -> str:
        """Its name, or its address if it has none."""
        return str(self.info.get("name") or self.address)


def boards(address: Address, timeout: float = 5.0) -> list[Board]:
    """All servers that are registered. Raises TrackerLost."""
    with TrackerConnection(address, timeout) as tracker:
        return boards_of(tracker.summary())


def boards_of(summary: dict[str, Any]) -> list[Board]:
    """The servers in a tracker's summary, by key and name.

    Anyone can register anything: entries that make no sense are left out, and so is what is not as
    :meth:`gf_tvm.farm.server.Server.info` tells it.
    """
    listed = summary.get("server_info")
    found = [_board_of(entry) for entry in (listed if isinstance(listed, list) else [])[:_MOST_BOARDS]]
    return sorted((board for board in found if board is not None), key=lambda board: (board.key, board.name))


def _board_of(entry: Any) -> Board | None:
    key = entry.get("key") if isinstance(entry, dict) else None
    if not _is_word(key) or not key.removeprefix("server:"):
        return None
    where = entry.get("addr")
    known = isinstance(where, list) and len(where) == 2 and _is_word(where[0]) and _is_count(where[1])
    info = entry.get("gf_tvm")
    address = show((where[0], where[1])) if known else "?"
    return Board(key.removeprefix("server:"), address, _info_of(info) if isinstance(info, dict) else {})


def _info_of(info: dict[str, Any]) -> dict[str, Any]:
    """Those fields of a server's info that are what they should be."""
    found = {name: info[name] for name, check in _FIELDS.items() if name in info and check(info[name])}
    with contextlib.suppress(ValueError):
        sensors = Reading.from_dict(info.get("sensors")).to_dict()
        found["sensors"] = {name: value for name, value in sensors.items() if name in info["sensors"]}
    return found


def _is_word(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST_WORD and value.isprintable()


def _is_text(value: Any) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= _LONGEST_WORD)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_versions(value: Any) -> bool:
    if not isinstance(value, dict) or len(value) > _MOST_PACKAGES:
        return False
    return all(_is_word(package) and _is_text(version) for package, version in value.items())


def _is_gpu(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and all(_is_word(value.get(name)) for name in ("name", "arch", "driver"))
    )


# The tracker's message of a megabyte has more boards than anyone's farm.
_MOST_BOARDS, _MOST_PACKAGES = 1000, 32
_LONGEST_WORD = 200
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "name": _is_word,
    **dict.fromkeys(("state", "client", "arch", "model", "device"), _is_text),
    **dict.fromkeys(("cores", "trials", "failed", "crashed_sessions"), _is_count),
    "updated": lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e15,
    "emulated": _is_flag,
    "versions": _is_versions,
    "gpu": _is_gpu,
}


def check_key(address: Address, key: str) -> list[Board]:
    """The boards with a key.

    Raises:
        TrackerLost: no tracker there.
        FarmError: there is no board with that key; names the keys that there are. TVM would wait for ever.
    """
    known = boards(address)
    if chosen := [board for board in known if board.key == key]:
        return chosen
    keys = ", ".join(sorted({board.key for board in known})) or "none, no board is registered"
    raise FarmError(f"the tracker at {show(address)} knows no board with the key {key!r}; known keys: {keys}")


def run_tracker(
    address: Address, ready: Callable[[Address], None], say: Callable[[str], None] = lambda line: None
) -> None:
    """Run TVM's tracker, with bounds, in this process until it is interrupted.

    Unlike ``tvm.exec.rpc_tracker`` it takes the port that it was told to take, or none.

    Args:
        address: to bind.
        ready: called with the bound address when it listens.
        say: called with a line of text about clients that are refused.

    Raises:
        FarmError: the address cannot be bound, or TVM or tornado is not installed.
    """
    try:
        with without_torch():
            from .tracker_server import BoundedTracker
    except ImportError as error:
        raise FarmError(f"the tracker needs more packages: pip install 'gf-tvm[tune]' ({error})") from None
    listener = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise FarmError(f"cannot bind {show(address)}: {error.strerror or error}") from None
    # A stranger on the port is worth a line; the traceback that tornado makes of it is not.
    for name in ("tornado", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    asyncio.set_event_loop(asyncio.new_event_loop())
    handler = BoundedTracker(listener, say)
    ready(listener.getsockname()[:2])
    try:
        handler.run()
    finally:
        listener.close()


__all__ = ["Board", "TrackerLost", "boards", "boards_of", "check_key", "run_tracker"]

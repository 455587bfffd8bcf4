"""TVM's tracker: starting it, and asking it which boards there are."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..bundle.runtime import without_torch
from ..errors import FarmError
from .protocol import Address, TrackerConnection, TrackerLost, show


@dataclass(frozen=True)
class Board:
    """What the tracker knows of one server.

    Args:
        key: the kind of board.
        address: as the server told it, for people.
        info: what a server of gf_tvm says of itself (:meth:`gf_tvm.farm.server.Server.info`); empty for others.
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
    """The servers in a tracker's summary, by key and name; entries that make no sense are left out."""
    found = []
    for entry in summary.get("server_info", []):
        if not isinstance(entry, dict) or not isinstance(entry.get("key"), str):
            continue
        where = entry.get("addr")
        text = show((str(where[0]), where[1])) if isinstance(where, list) and len(where) == 2 else "?"
        info = entry.get("gf_tvm")
        found.append(Board(entry["key"].removeprefix("server:"), text, info if isinstance(info, dict) else {}))
    return sorted(found, key=lambda board: (board.key, board.name))


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


def run_tracker(address: Address, ready: Callable[[Address], None]) -> None:
    """Run TVM's tracker in this process until it is interrupted.

    Unlike ``tvm.exec.rpc_tracker`` it takes the port that it was told to take, or none.

    Args:
        address: to bind.
        ready: called with the bound address when it listens.

    Raises:
        FarmError: the address cannot be bound, or TVM or tornado is not installed.
    """
    try:
        with without_torch():
            from tvm.rpc import tracker
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
    handler = tracker.TrackerServerHandler(listener, tracker.base.random_key("tracker"))
    ready(listener.getsockname()[:2])
    try:
        handler.run()
    finally:
        listener.close()


__all__ = ["Board", "TrackerLost", "boards", "boards_of", "check_key", "run_tracker"]

"""The host's process for one board: TVM's RPC client, whose calls cannot be interrupted, where they can be ended.

It imports neither PyTorch nor TVM's compiler, so there may be one for each of many boards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...farm.protocol import Address, TrackerConnection, show
from .answers import MAX_ANSWER
from .messages import checksum


class Link:
    """The requests that the measurer makes; one board at a time."""

    def __init__(self) -> None:
        self._session: Any = None

    def hello(self, role: str) -> dict[str, Any]:
        """Load TVM's runtime."""
        from ...bundle.runtime import start_runtime, without_torch

        with without_torch():
            start_runtime()
        return {"threads": 1}

    def connect(self, tracker: Address, key: str, timeout: float) -> str | None:
        """Ask the tracker for a board and open a session with it.

        Args:
            tracker: its address.
            key: the kind of board.
            timeout: seconds to wait for a board.

        Returns:
            The board's address, or None if no board became free.
        """
        import tvm_ffi

        self.close()
        with TrackerConnection(tracker) as connection:
            granted = connection.request(key, timeout)
        if granted is None:
            return None
        (host, port), match_key = granted
        self._session = tvm_ffi.get_global_func("rpc.Connect")(host, port, match_key, False)
        return show((host, port))

    def upload(self, path: Path, name: str) -> str:
        """Send a file into the session's folder; returns its checksum."""
        data = path.read_bytes()
        self._session["tvm.rpc.server.upload"](name, bytearray(data))
        return checksum(data)

    def call(self, request: str) -> str:
        """Make a request of the session; see :mod:`gf_tvm.tuning.measuring.board_service`.

        Returns:
            The answer. One that is too long is cut after the first character too many, by which it is known.
        """
        from ...farm.server import REQUEST

        answer = self._session[REQUEST](request)
        return str(answer)[: MAX_ANSWER + 1]

    def close(self) -> None:
        """End the session; harmless when repeated."""
        self._session = None


def new_link(_: object) -> Link:
    """See :func:`gf_tvm.tuning.measuring.process.serve`."""
    return Link()

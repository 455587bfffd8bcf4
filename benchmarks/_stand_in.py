"""A server whose sessions take the tuner's requests and take a known time for a trial, but run nothing.

``python _stand_in.py HOST:PORT NAME SECONDS`` serves the tracker there until standard input closes.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict
from typing import Any

from gf_tvm.farm.server import Server, ServerOptions, SessionContext
from gf_tvm.tuning.measuring.board_service import BoardService
from gf_tvm.tuning.measuring.result import Result

KEY = "stand-in"


class StandIn(BoardService):
    """Trials take as long as $STAND_IN_SECONDS says and are all the same."""

    def __init__(self, context: SessionContext) -> None:
        super().__init__(context)
        self._seconds = float(os.environ["STAND_IN_SECONDS"])

    def prepare(self, task: dict[str, Any], seed: int) -> float:
        """Nothing to prepare."""
        return 0.0

    def run(self, task: dict[str, Any], file: str, best: float | None, reference: bool = False) -> dict[str, Any]:
        """Take the time of a trial."""
        path = self._context.folder / file
        if not path.stat().st_size:
            raise ValueError(f"{file} is empty")
        time.sleep(self._seconds)
        path.unlink()
        self._count(result := Result("ok", (1e-3,), 0.0))
        return {"result": asdict(result), "sensors": self.sense()}


def main() -> None:
    address, name, seconds = sys.argv[1:]
    os.environ["STAND_IN_SECONDS"] = seconds
    # tvm_ffi would import PyTorch, of which eight servers would need much memory and no function.
    sys.modules["torch"] = None  # type: ignore[assignment]
    host, _, port = address.rpartition(":")
    options = ServerOptions(KEY, name, (host, int(port)), service=StandIn, until_stdin_closes=True)
    server = Server(options, lambda line: None)
    server.load()
    server.run()


if __name__ == "__main__":
    main()

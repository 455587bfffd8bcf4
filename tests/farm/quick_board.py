"""``gf-tvm farm serve`` without PyTorch, which starts in a second, and with less patience than it has otherwise.

``python quick_board.py SECONDS ARGUMENT ...``: SECONDS is a JSON object of constants of gf_tvm.farm.server, the rest
goes to gf-tvm.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

from gf_tvm.farm import server
from gf_tvm.farm.server import SessionContext


class Obedient:
    """A service that does what it is told."""

    def __init__(self, context: SessionContext) -> None:
        self._context = context

    def handle(self, request: str) -> str:
        if request == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if request == "hang":
            self._context.counters.working = True
            print("hangs", flush=True)
            time.sleep(1000)
        if request == "count":
            self._context.counters.count(failed=True)
        return f"{request} at {self._context.name}"

    def close(self) -> None:
        pass


def main() -> int:
    sys.modules["torch"] = None  # type: ignore[assignment]
    for name, value in json.loads(sys.argv[1]).items():
        assert hasattr(server, name)
        setattr(server, name, value)
    made = server.ServerOptions

    def options(**given: Any) -> server.ServerOptions:
        return made(**{**given, "service": Obedient, "preload": None})

    server.ServerOptions = options  # type: ignore[assignment, misc]
    from gf_tvm.runners import cli

    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())

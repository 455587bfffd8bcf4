"""What deploy runs on a board before anything is installed there: ``python3 - FUNCTION ARGS`` over ssh gets this text.

So it imports only the standard library, and holds to Python 3.7; the answer is one line of JSON behind MARK.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MARK = "gf_tvm-answer "
STAMP = "gf_tvm-deployed"
_GRACE_SECONDS = 5.0


def folder_of(text: str) -> Path:
    """The absolute folder that ``text`` names here; relative ones begin at the home folder."""
    return Path.home() / os.path.expanduser(text)


def probe(folder: str) -> dict[str, Any]:
    """What matters for an installation in ``folder``."""
    place = folder_of(folder)
    there = place
    while not there.exists() and there != there.parent:
        there = there.parent
    venv = place / "venv" / "bin" / "python"
    try:
        stamp: str | None = (place / "venv" / STAMP).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        stamp = None
    library, version = _libc()
    return {
        "folder": str(place),
        "machine": platform.machine(),
        "bits": sys.maxsize.bit_length() + 1,
        "system": platform.system(),
        "python": platform.python_version(),
        "libc": library,
        "libc_version": version,
        "free": shutil.disk_usage(str(there)).free,
        "writable": os.access(str(there), os.W_OK | os.X_OK) and there.is_dir(),
        "venv_module": find_spec("venv") is not None and find_spec("ensurepip") is not None,
        # One whose Python was upgraded away does not find pip any more.
        "venv": venv.exists() and _succeeds([str(venv), "-c", "import pip"]),
        "stamp": stamp,
        "time": time.time(),
    }


def _libc() -> tuple[str, str]:
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (AttributeError, OSError, ValueError):
        return "", ""
    return name, version


def _succeeds(command: list[str]) -> bool:
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode == 0
    except OSError:
        return False


def prepare(folder: str, name: str, token: str, take_over: str) -> dict[str, Any]:
    """Before a server is started: end the one of an earlier connection, and find two free ports.

    A connection that broke down can leave its server waiting for minutes until the system gives up on the connection.

    Args:
        folder: of the installation.
        name: of the board's server.
        token: of the deploy that asks.
        take_over: "yes" also ends the server of another deploy.

    Returns:
        ports; ended: whether a server was ended; other: whether another deploy's server was left running.
    """
    pid, owner = _running(folder, name)
    other = pid is not None and owner != token
    if pid is not None and (not other or take_over == "yes"):
        _end(pid)
        other, ended = False, True
    else:
        ended = False
    sockets = [socket.socket() for _ in range(2)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    (folder_of(folder) / "run").mkdir(parents=True, exist_ok=True)
    return {"ports": ports, "ended": ended, "other": other}


def finish(folder: str, name: str, token: str) -> dict[str, Any]:
    """End this deploy's server, if it still runs."""
    pid, owner = _running(folder, name)
    if pid is not None and owner == token:
        _end(pid)
    return {"ended": pid is not None}


def _running(folder: str, name: str) -> tuple[int | None, str]:
    """Process and token of the server that was started last, if it still runs."""
    try:
        words = (folder_of(folder) / "run" / name).read_text(encoding="ascii").split()
        pid, token = int(words[0]), words[1]
        # The number may belong to another process by now.
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError, IndexError):
        return None, ""
    return (pid, token) if b"serve" in command and b"gf_tvm.runners.cli" in command else (None, "")


def _end(pid: int) -> None:
    """End a server; the processes of its sessions end with it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline:
            try:
                state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2]
            except OSError:
                return
            if state.split()[:1] in (["Z"], ["X"]):
                return
            time.sleep(0.05)


def main(words: list[str]) -> None:
    function = {"probe": probe, "prepare": prepare, "finish": finish}[words[0]]
    print(MARK + json.dumps(function(*words[1:])))  # type: ignore[operator]


if __name__ == "__main__":
    main(sys.argv[1:])

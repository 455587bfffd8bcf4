"""The doctor on a board, over ssh: whether or not anything is installed there."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import queue
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import FarmError
from .deploy import FOLDER, INSTALL_SECONDS, SshBoard, board_name, connect, new_token
from .doctor import FAILED, OK, WARNING, Check, compare_versions, versions
from .ssh import Ssh, SshError

_MESSAGE = "gf_tvm-doctor-says "
#: What the doctor is made of; none of it imports more than the standard library.
_PORTABLE = (
    *("gf_tvm", "gf_tvm.errors", "gf_tvm.machine", "gf_tvm.machine.allocator", "gf_tvm.machine.sensors"),
    *("gf_tvm.farm", "gf_tvm.farm.jetson", "gf_tvm.farm.doctor"),
)

_LOADER = """
import json, sys, types
def say(**message):
    print({mark!r} + json.dumps(message), flush=True)
def load(name, text):
    module = sys.modules[name] = types.ModuleType(name)
    module.__file__, module.__package__ = name, name if text is None else name.rpartition(".")[0]
    if text is None:
        module.__path__ = []
    else:
        exec(compile(text, name, "exec"), vars(module))
for name, text in {sources!r}:
    load(name, text)
from gf_tvm.farm import doctor
"""


def _doctor_script(work: str) -> bytes:
    """A program for any Python from 3.7 on that holds the doctor and does ``work``."""
    sources = []
    for name in _PORTABLE:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        text = None if spec.submodule_search_locations else Path(spec.origin).read_text(encoding="utf-8")
        sources.append((name, text))
    return (_LOADER.format(mark=_MESSAGE, sources=sources) + work).encode()


_LOOK = """
for check in doctor.board_checks(folder={folder!r}):
    say(kind="check", **vars(check))
say(kind="report", **doctor.report([]))
"""

_VERIFY = """
from pathlib import Path
progress = lambda done, total: say(kind="progress", done=done, total=total)
try:
    for check in doctor.verify_library(Path({path!r}), progress):
        say(kind="check", **vars(check))
finally:
    Path({path!r}).unlink()
"""


def remote_checks(
    ssh: Ssh,
    python: str = "python3",
    folder: str = FOLDER,
    library: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Check]:
    """Look at a board over ssh, whether or not anything is installed there, and compare it with this host.

    Args:
        ssh: the board.
        python: to use there if gf_tvm is not installed.
        folder: where gf_tvm would be installed.
        library: a bundle whose kernels are to be run there.
        progress: called with the number of kernels done and of all.

    Raises:
        OSError: the bundle cannot be read.
    """
    sent = time.time()
    try:
        board = connect(ssh, board_name(ssh.target), python, folder)
    except FarmError as error:
        yield Check("connection", FAILED, str(error))
        return
    yield Check("connection", OK, f"{ssh.target} answers")
    yield _clock(board.facts["time"], sent, time.time())
    installed = bool(board.facts["venv"])
    interpreter = board.venv_python if installed else board.python
    found: list[dict[str, Any]] = []
    yield from _run_there(board, interpreter, _LOOK.format(folder=board.folder), progress, found)
    for one in found:
        if installed and one["kind"] == "report":
            yield from compare_versions(versions(), one["versions"], "the board")
    if library is None:
        return
    data = library.read_bytes()
    if not installed:
        yield Check(library.name, FAILED, "cannot be run: gf_tvm is not installed there", "gf-tvm farm deploy")
        return
    path = f"{board.folder}/run/{new_token()}-{re.sub(r'[^A-Za-z0-9_.-]', '_', library.name)}"
    try:
        script = f"umask 077 && mkdir -p {shlex.quote(board.folder + '/run')} && exec cat > {shlex.quote(path)}"
        ssh.run(f"exec sh -c {shlex.quote(script)}", data, INSTALL_SECONDS)
    except SshError as error:
        yield Check(library.name, FAILED, f"cannot be copied: {error}")
        return
    for check in _run_there(board, interpreter, _VERIFY.format(path=path), progress, []):
        # Its name there has a token in front.
        yield Check(check.name.rpartition("/")[2].replace(Path(path).name, library.name), *_rest(check))


def _rest(check: Check) -> tuple[str, str, str]:
    return check.status, check.detail, check.advice


def _clock(there: float, sent: float, received: float) -> Check:
    """Whether both clocks agree; the board's was read at some time between the two."""
    ahead = max(sent - there, there - received, 0.0)
    if ahead > 10:
        detail = f"differs by {ahead:.0f} s from this machine's"
        return Check("clock of the board", WARNING, detail, "let it follow a time server: timedatectl set-ntp true")
    return Check("clock of the board", OK, "agrees with this machine's")


def _run_there(
    board: SshBoard,
    interpreter: str,
    work: str,
    progress: Callable[[int, int], None] | None,
    others: list[dict[str, Any]],
) -> Iterator[Check]:
    """Run the doctor there and yield its checks as they come; other messages go to ``others``."""
    messages: queue.SimpleQueue[dict[str, Any] | Exception | None] = queue.SimpleQueue()

    def on_line(line: str) -> None:
        if line.startswith(_MESSAGE):
            with contextlib.suppress(ValueError):
                messages.put(json.loads(line[len(_MESSAGE) :]))

    def run() -> None:
        try:
            board.ssh.run(f"cd / && exec {shlex.quote(interpreter)} -", _doctor_script(work), INSTALL_SECONDS, on_line)
            messages.put(None)
        except Exception as error:
            messages.put(error)

    threading.Thread(target=run, daemon=True).start()
    while True:
        message = messages.get()
        if message is None:
            return
        if isinstance(message, Exception):
            yield Check("doctor", FAILED, f"ended early: {message}")
            return
        if message["kind"] == "check":
            yield Check(message["name"], message["status"], message["detail"], message["advice"])
        elif message["kind"] == "progress":
            if progress is not None:
                progress(message["done"], message["total"])
        else:
            others.append(message)

"""What the commands that compute in their own process take their memory from.

An allocator can only be replaced before a process starts. So :func:`ensure` starts the process again, once, in its own
place, before the command imports anything: same number, same arguments, same files. The commands that tune do without:
a trial's kernel writes into tensors that exist.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from ..machine import allocator
from ..machine.allocator import PRELOAD, AllocatorError

#: Tells the process that was started anew what was changed in its environment, and what was there before.
RESTARTED = "GF_TVM_RESTARTED"


def add_allocator_argument(parser: argparse.ArgumentParser) -> None:
    """``--allocator``. :func:`gf_tvm.runners.cli.run_parsed` sees to it."""
    parser.add_argument(
        "--allocator",
        choices=sorted(allocator.ALLOCATORS),
        help="what the process takes its memory from (default: jemalloc where it is installed, else the system's)",
    )


def ensure(wanted: str | None, restart: bool) -> None:
    """Make this process run under an allocator. Does not return where the process is started anew.

    Args:
        wanted: a name of :data:`gf_tvm.machine.allocator.ALLOCATORS`; None: jemalloc where it is installed, and no
            other was preloaded.
        restart: whether this process may be started again: it is a command, and has done nothing yet.

    Raises:
        AllocatorError: ``wanted`` is unknown, not there, or not what this process runs under.
    """
    if wanted is not None and wanted not in allocator.ALLOCATORS:
        raise AllocatorError(f"unknown allocator {wanted!r}; known: {', '.join(sorted(allocator.ALLOCATORS))}")
    before = _take_back()
    now = allocator.in_use()["name"]
    target = allocator.ALLOCATORS[wanted or "jemalloc"]
    if now == target.name or (wanted is None and now != "system"):
        return
    if before:
        raise AllocatorError(
            f"{target.library} was preloaded, but this process does not use it; say --allocator system"
        )
    if target.library is None:
        if os.environ.get(PRELOAD):
            raise AllocatorError(f"--allocator system, but {now} is preloaded: unset {PRELOAD}")
        raise AllocatorError(f"--allocator system, but this Python was built with {now}")
    path = allocator.installed(target)
    if path is None:
        if wanted is not None:
            raise AllocatorError(f"{target.library} is not installed: {target.install}")
        return
    # A program that calls a command's function is not ours to replace; nor can other threads be taken along.
    if not restart or not sys.executable:
        if wanted is not None:
            raise AllocatorError(f"this process already runs under {now}: start it with {PRELOAD}={path}")
        return
    changed = {PRELOAD: ":".join(filter(None, (str(path), os.environ.get(PRELOAD))))}
    changed |= {name: value for name, value in (target.settings or {}).items() if name not in os.environ}
    note = json.dumps({"before": {name: os.environ.get(name) for name in changed}, "changed": changed})
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **changed, RESTARTED: note})


def _take_back() -> bool:
    """In the process that :func:`ensure` started: set the environment to what the user's was. Whether it is that."""
    note = os.environ.pop(RESTARTED, None)
    if note is None:
        return False
    content = json.loads(note)
    allocator.give_to_children(content["changed"])
    for name, value in content["before"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    return True

"""Asks a script a question in a process of its own: JSON in, JSON out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from gf_tvm.machine.allocator import environment_of_children

_CLEAR = Path("/proc/self/clear_refs")
_TIMEOUT = 300


def ask(script: str, request: dict[str, Any]) -> dict[str, Any]:
    """What ``script`` prints last when it is called with ``request``; or ``reason``, why there is nothing."""
    command = [sys.executable, str(Path(script).resolve()), json.dumps(request)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
            env={**os.environ, **environment_of_children()},
        )
    except subprocess.TimeoutExpired:
        return {"reason": f"no result after {_TIMEOUT} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"reason": said[-1]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def reset_peak() -> str | None:
    """Set this process's peak of resident memory back to what is resident now; why not, if not. Linux only."""
    try:
        _CLEAR.write_text("5")
    except OSError as error:
        return f"{_CLEAR}: {error.strerror}"
    return None

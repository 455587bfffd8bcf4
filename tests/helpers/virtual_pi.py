"""Running things in a virtual Pi, for the tests that need one. Importing PyTorch there takes 15 to 20 s: share it."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from gf_tvm.farm.virtual import environment, python_command


def run_in(root: Path, *args: str | Path, cwd: Path, seconds: float = 280.0, **variables: str) -> str:
    """Run the root's Python with ``args`` and return what it printed; fails the test if its exit code is not 0."""
    done = subprocess.run(
        python_command(root, *map(str, args)),
        env=environment(root, HOME=str(cwd), TMPDIR=str(cwd), **variables),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def running(pid: int) -> bool:
    """Whether a process is there and has not ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until_gone(pid: int, seconds: float = 120.0) -> None:
    """Wait for the end of a process that need not be a child; fails the test if it takes longer."""
    end = time.monotonic() + seconds
    while running(pid):
        assert time.monotonic() < end, f"process {pid} still runs after {seconds:.0f} s"
        time.sleep(0.05)

"""The process that builds one entry: started by :func:`run`, it gets what is wanted as a pickle and says what failed.

A fresh process, because a copy of one that has threads may inherit a lock that nobody will ever open. It has low
priority, one thread, and is the first that the system ends when memory runs out. While it waits for another builder it
ends with the process that started it; what it has begun it finishes, so that the next run finds it, within
:data:`SECONDS`.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..building import build
from ..bundle.runtime import without_torch
from ..errors import BuildError, BundleError, GfTvmError
from ..machine.profiles import get_profile
from .identity import Wanted, key_of
from .store import Store

#: After which a build is ended: nothing that takes so long is of use to a training.
SECONDS = 3600
_NICE = 10


@dataclass(frozen=True)
class Job:
    """One entry to build.

    Attributes:
        folder, limit: as in :class:`.store.Store`.
        logs: as in :func:`.identity.key_of`.
        parent: number of the process that wants it.
        seconds: after which the build is ended.
    """

    wanted: Wanted
    key: str
    folder: Path
    limit: int
    logs: tuple[Path, ...]
    parent: int
    seconds: int


def run(wanted: Wanted, key: str, store: Store, logs: tuple[Path, ...]) -> None:
    """Build an entry in a process of its own, and wait for it. If another process builds the same, take its result.

    Raises:
        BuildError: it could not be built; says why.
        OSError: no process can be started, or there is no room for its input.
    """
    job = Job(wanted, key, store.folder, store.limit, logs, os.getpid(), SECONDS)
    with tempfile.TemporaryFile() as task, tempfile.TemporaryFile() as output:
        try:
            pickle.dump(job, task)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise BuildError(f"what is wanted cannot be passed to another process: {error}") from None
        task.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-m", __name__.rpartition(".")[0]],
            stdin=task,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=store.folder,  # Python searches the current folder first, and here are no modules
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
                "OMP_NUM_THREADS": "1",
                "TVM_NUM_THREADS": "1",
            },
            start_new_session=True,  # Ctrl-C is for the process that trains
        )
        code = process.wait()
        if code == 0:
            return
        output.seek(0)
        lines = [line.strip() for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    if code == -signal.SIGALRM:
        raise BuildError(f"it was not built within {SECONDS} seconds")
    if code < 0:
        raise BuildError(f"the process that built was ended by signal {-code} ({signal.strsignal(-code)})")
    raise BuildError(lines[-1] if lines else f"the process that built ended with exit code {code}")


def main() -> int:
    """The process: a :class:`Job` from standard input, what failed as the last line of the output, 0 if nothing did."""
    os.nice(_NICE)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        _build(pickle.load(sys.stdin.buffer))
    except GfTvmError as error:
        print(" ".join(str(error).split()))
        return 1
    except OSError as error:
        print(": ".join(str(part) for part in (error.filename, error.strerror or error) if part is not None))
        return 1
    return 0


def _build(job: Job) -> None:
    store = Store(job.folder, job.limit)
    with store.building(go_on=lambda: os.getppid() == job.parent) as ours:
        if not ours:
            raise BuildError("nobody waits for it any more")
        # The system's way of ending a process, which works inside a compiler, too.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(job.seconds)
        path = store.path(job.key)
        try:
            store.check(job.key, job.wanted)
            return
        except FileNotFoundError:
            pass
        except BundleError:
            store.remove(path)
        if key_of(job.wanted, get_profile("host"), job.logs) != job.key:
            raise BuildError("gf_tvm's code or the tuning logs have changed since this process began; start it again")
        with without_torch():
            import tvm  # noqa: F401
        build(job.wanted.workloads, "host", job.logs, path, programs=job.wanted.programs)
        store.trim(keep=job.key)

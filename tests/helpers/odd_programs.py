"""Programs that say how they are built, or do not get built: to be pickled, and imported by the process that builds."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gf_tvm.core.workload import Workload
from gf_tvm.errors import BuildError
from gf_tvm.machine.profiles import DeviceProfile


@dataclass(frozen=True)
class OddProgram:
    """A program that does ``what`` in place of making a module, and fails.

    Attributes:
        what: "fail"; "crash"; "sleep" for a minute; "tell" the file ``text`` in what process it is.
        text: the failure's.
    """

    key: str
    what: str
    text: str = ""

    def module(self, profile: DeviceProfile, config_of: Callable[[Workload], dict[str, Any]]) -> Any:
        if self.what == "crash":
            os.abort()
        if self.what == "sleep":
            time.sleep(60)
        if self.what == "tell":
            threads = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "TVM_NUM_THREADS")}
            told = {"nice": os.getpriority(os.PRIO_PROCESS, 0), "session": os.getsid(0), "pid": os.getpid(), **threads}
            Path(self.text).write_text(json.dumps(told))
        raise BuildError(self.text or "odd")

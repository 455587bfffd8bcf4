"""What a run has used of the processors."""

from __future__ import annotations

import resource


def cpu_seconds() -> float:
    """Of this process and all children that have ended: does not depend on what else the machine does, as time does."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )

"""Kernels for what a filtered model runs, built when it is captured, used as soon as they are there."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING

from ..chains.capture.assemble import Assembled
from ..chains.capture.wanted import programs_of_steps, without_library, workloads_of
from ..errors import CacheError
from ..machine.profiles import get_profile
from ..ops.dispatch import AWAITED
from .cache import KernelCache, obstacle, say_once
from .identity import Wanted

if TYPE_CHECKING:
    from ..bundle.library import Library

#: Of the environment: "0" has no kernels built or looked for.
SWITCH = "GF_TVM_ON_DEMAND"


@cache
def _kernel_cache() -> KernelCache:
    return KernelCache()


def find_kernels(assembled: Assembled) -> None:
    """Have what a captured graph can use, and has no library for, built in the background.

    Until it is there plain PyTorch operators run, with the same results. Where nothing can be built that is said once.
    """
    if os.environ.get(SWITCH) == "0":
        return
    steps = without_library(assembled)
    fronts = [step for step in assembled.fronts if not step.library]
    if not steps and not fronts:
        return

    def ready(library: Library) -> None:
        for step in (*steps, *fronts):
            step.use(library.digest)

    forward = tuple(step.program(get_profile("host")) for step in fronts)
    wanted = Wanted(workloads_of(steps), (*programs_of_steps(steps), *forward))
    try:
        kernels = _kernel_cache()
    except CacheError as error:
        say_once(str(error))
        return
    if obstacle() is None:
        for step in steps:
            step.use(AWAITED)
    kernels.request(wanted, ready)

"""Which space belongs to which workload on which device, and the hash that ties a log to it."""

from __future__ import annotations

import hashlib
import json

from gf_tvm.core.workload import Workload
from gf_tvm.machine.profiles import DeviceProfile

from . import cpu, cpu_dilated, gpu
from .space import Space


def get_space(workload: Workload, profile: DeviceProfile) -> Space:
    """The space of ``workload`` on ``profile``'s kind of device."""
    if profile.gpu is not None:
        return gpu.get_space(workload, profile)
    geometry = workload.geometry
    if workload.kernel.startswith("backward"):
        if geometry.dilated and workload.kernel != "backward_weight":
            return cpu_dilated.backward(workload, profile)
        if geometry.depthwise:
            return cpu.depthwise_backward(workload, profile)
        return cpu.backward(workload, profile)
    product = workload.kernel == "weight_grad" or (workload.kernel == "input_grad" and not geometry.dilated)
    if product and not geometry.depthwise:
        return cpu.backward(workload, profile)
    if workload.kernel == "filter_input":
        return (cpu.depthwise_filter_input if geometry.depthwise else cpu.filter_input)(workload, profile)
    return cpu.plain(workload, profile)


def definition_hash(workload: Workload, profile: DeviceProfile) -> str:
    """What a tuning log's configs mean: changes with the definition, the schedule or the knobs, and with nothing else.

    It is taken of the scheduled default point as text, so that renaming a Python variable keeps old logs valid and
    changing the kernel does not.
    """
    space = get_space(workload, profile)
    text = space.module(space.default).script() + json.dumps({k: list(v) for k, v in space.knobs.items()})
    return hashlib.sha256(text.encode()).hexdigest()[:16]

"""Which NVIDIA GPU this machine has.

It is looked at in a process of its own: CUDA does not survive a fork, and a board's server forks every session.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TypedDict

from ..errors import DeviceError

#: For starting Python, and for a driver that may have to load its kernel module and wake the GPU first.
PROBE_SECONDS = 60.0


class GpuInfo(TypedDict):
    """What logs and ``gf-tvm farm status`` tell of a GPU; plain values for JSON.

    ``driver`` is the newest CUDA that the driver knows ("10.2"), ``max_mhz`` the multiprocessors' highest clock, and
    ``emulated`` says that it is not a GPU at all, so that its times mean nothing.
    """

    name: str
    arch: str
    driver: str
    multiprocessors: int
    max_mhz: float
    memory_bytes: int
    emulated: bool


def look() -> GpuInfo:
    """Look at the first GPU, in this process. Raises GfCudaError."""
    from gf_cuda import get_driver

    driver = get_driver()
    device = driver.device()
    return {
        "name": device.name,
        "arch": device.arch,
        "driver": f"{driver.version // 1000}.{driver.version % 1000 // 10}",
        "multiprocessors": device.multiprocessors,
        "max_mhz": device.clock_khz / 1e3,
        "memory_bytes": device.total_memory,
        "emulated": driver.emulated,
    }


def probe(seconds: float = PROBE_SECONDS) -> GpuInfo:
    """Look at the first GPU, without using CUDA in this process.

    Raises:
        DeviceError: there is none that can be used, or its driver does not answer.
    """
    path = json.dumps([os.path.abspath(entry) for entry in sys.path])
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, path],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DeviceError(f"no GPU can be used: the CUDA driver did not answer in {seconds:.0f} s") from None
    except OSError as error:
        raise DeviceError(f"no GPU can be looked for: cannot start {sys.executable}: {error.strerror}") from None
    try:
        kind, value = json.loads(done.stdout.decode("utf-8", "replace").splitlines()[-1])
    except (IndexError, ValueError):
        words = done.stderr.decode("utf-8", "replace").strip().splitlines()
        reason = words[-1] if words else f"the process that looked for it ended with code {done.returncode}"
        raise DeviceError(f"no GPU can be used: {reason}") from None
    if kind != "found":
        raise DeviceError(f"no GPU can be used: {value}")
    info: GpuInfo = value
    return info


_CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from gf_cuda import GfCudaError
from gf_tvm.machine.gpu import look
try:
    answer = ["found", look()]
except GfCudaError as error:
    answer = ["none", str(error)]
print(json.dumps(answer), flush=True)
"""


def check_gpu(arch: str = "") -> GpuInfo:
    """The first GPU, which must be of ``arch`` ("sm_53"); "" takes any. Raises DeviceError."""
    info = probe()
    if arch and info["arch"] != arch:
        raise DeviceError(f"a GPU of {arch} is wanted, this machine's is {describe(info)}")
    return info


def check_device(device: str) -> GpuInfo | None:
    """Make sure that this machine is, or has, the device of a profile, and tell what its GPU is; None without one.

    Args:
        device: name of a profile; "cuda" is any GPU, "host" any CPU.

    Raises:
        DeviceError: unknown, or not this machine.
    """
    from .profiles import get_profile, missing_flags, runs_here

    if device == "cuda":  # get_profile would look for it in this process
        return check_gpu()
    profile = get_profile(device)
    if profile.gpu is not None:
        try:
            return check_gpu(profile.gpu.arch)
        except DeviceError as error:
            raise DeviceError(f"this machine is no {profile.name}: {error}") from None
    if not runs_here(profile):
        lacking = missing_flags(profile)
        reason = f"its CPU lacks {', '.join(lacking)}" if lacking else f"it is not an {profile.arch} machine"
        raise DeviceError(f"this machine is no {profile.name}: {reason}")
    return None


def describe(info: GpuInfo) -> str:
    """In a few words."""
    text = f"{info['name']} ({info['arch']}), CUDA {info['driver']}"
    return f"{text}, emulated" if info["emulated"] else text

"""What a report should say about the GPU and, on a Jetson, about the board and its clocks. Standard library only."""

import glob
import os
import platform
import re
from typing import Any, Dict, Optional

from .driver import Device

_GPU_CLOCKS = ("*.gpu", "*.gp10b", "*.gv11b", "*.ga10b")  # Nano and TX1, TX2, Xavier, Orin


def describe(device: Device, root: str = "/") -> Dict[str, Any]:
    """GPU and board as plain values for JSON: sizes in bytes, clocks in MHz.

    ``clocks`` (of the GPU: now, lowest and highest allowed) is None where the system does not say; ``board`` and
    ``l4t`` are None on other machines than a Jetson.
    """
    driver = device.driver.version
    return {
        "name": device.name,
        "arch": device.arch,
        "multiprocessors": device.multiprocessors,
        "memory_bytes": device.total_memory,
        "l2_bytes": device.l2_bytes,
        "mhz": device.clock_khz / 1e3,
        "driver_cuda": f"{driver // 1000}.{driver % 1000 // 10}",
        "board": board(root),
        "l4t": l4t(root),
        "clocks": clocks(root),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "python": platform.python_version(),
    }


def board(root: str = "/") -> Optional[str]:
    """A board's name as its firmware gives it ("NVIDIA Jetson Nano Developer Kit"); None elsewhere."""
    return _read(os.path.join(root, "proc/device-tree/model")).strip("\0") or None


def l4t(root: str = "/") -> Optional[str]:
    """Version of a Jetson's system ("32.7.1"); None elsewhere."""
    text = _read(os.path.join(root, "etc/nv_tegra_release"))
    match = re.search(r"R(\d+).*REVISION: ([\d.]+)", text)
    return f"{match.group(1)}.{match.group(2)}" if match else None


def clocks(root: str = "/") -> Optional[Dict[str, float]]:
    """MHz of a Jetson's GPU: "now", "lowest" and "highest" allowed; None elsewhere."""
    for pattern in _GPU_CLOCKS:
        for folder in sorted(glob.glob(os.path.join(root, "sys/class/devfreq", pattern))):
            hertz = [_read(os.path.join(folder, name)) for name in ("cur_freq", "min_freq", "max_freq")]
            if all(value.isdigit() for value in hertz):
                now, lowest, highest = (int(value) / 1e6 for value in hertz)
                return {"now": now, "lowest": lowest, "highest": highest}
    return None


def advice(root: str = "/") -> Optional[str]:
    """What makes measuring on this board doubtful; None if nothing is known to."""
    found = clocks(root)
    if found is not None and found["lowest"] < found["highest"]:
        return (
            "the GPU's clock varies between {lowest:.0f} and {highest:.0f} MHz: "
            "sudo nvpmodel -m 0 && sudo jetson_clocks"
        ).format(**found)
    return None


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""

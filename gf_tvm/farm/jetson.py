"""What the doctor looks at on a Jetson: system, power mode, clocks, CUDA's driver and compiler, swap.

Standard library only, and nothing newer than Python 3.7, as :mod:`gf_tvm.farm.doctor`, which runs these probes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Tuple  # noqa: UP035

from ..machine.sensors import gpu_folders

#: A line of the doctor's: name, status, what was found, what to do about it.
Line = Tuple[str, str, str, str]  # noqa: UP006 (Python 3.7)

#: Runs in a process of its own, with whatever Python there is: a broken driver may crash or hang.
LOOK_AT_DRIVER = """
import ctypes, json
def call(name, *arguments):
    code = getattr(cuda, name)(*arguments)
    if code:
        raise SystemExit(name + " returned " + str(code))
number = ctypes.c_int()
def attribute(which):
    call("cuDeviceGetAttribute", ctypes.byref(number), which, 0)
    return number.value
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError as error:
    print(json.dumps(["no driver", str(error)]))
else:
    call("cuDriverGetVersion", ctypes.byref(number))
    version = "%d.%d" % (number.value // 1000, number.value % 1000 // 10)
    call("cuInit", 0)
    name = ctypes.create_string_buffer(256)
    call("cuDeviceGetName", name, 256, 0)
    arch = "sm_%d%d" % (attribute(75), attribute(76))
    print(json.dumps(["found", version, name.value.decode(errors="replace"), arch]))
"""

_GIB = float(1 << 30)
#: The doctor's advice where a CPU-only check cannot know: JetPack 4 is CUDA 10.2.
_COMPILER_ADVICE = "install JetPack's cuda-nvrtc (JetPack 4: apt install cuda-nvrtc-10-2), or nvcc"


def is_jetson(root: Path) -> bool:
    """Whether this machine is one, by what its firmware or its system says."""
    return "jetson" in _text(root / "proc/device-tree/model").lower() or (root / "etc/nv_tegra_release").exists()


def system(root: Path) -> Line:
    """Jetson Linux (L4T)."""
    text = _text(root / "etc/nv_tegra_release")
    match = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text)
    if match is None:
        return "L4T", "unknown", "/etc/nv_tegra_release cannot be read", ""
    release = f"R{match.group(1)}.{match.group(2)}"
    if int(match.group(1)) < 32 or (match.group(1) == "32" and match.group(2) < "4"):
        return "L4T", "warning", f"{release}: its CUDA is older than 10.2", "install JetPack 4.6 (L4T R32.6 or newer)"
    return "L4T", "ok", release, ""


def power_mode(root: Path, ask: Callable[[], str]) -> Line:
    """nvpmodel's mode; ``ask`` gives what ``nvpmodel -q`` prints, for where its file does not tell."""
    match = re.search(r"pmode:(\d+)", _text(root / "var/lib/nvpmodel/status"))
    if match is None:
        match = re.search(r"^(\d+)\s*$", ask(), re.MULTILINE)
    if match is None:
        return "nvpmodel", "unknown", "cannot be told (sudo nvpmodel -q)", ""
    mode = int(match.group(1))
    if mode == 0:
        return "nvpmodel", "ok", "mode 0 (MAXN)", ""
    advice = "sudo nvpmodel -m 0, with a power supply that is strong enough (Nano: 5 V, 4 A)"
    return "nvpmodel", "warning", f"mode {mode}: clocks are limited", advice


def gpu_clock(root: Path) -> Line:
    """Whether jetson_clocks has fixed the GPU's clock."""
    for folder in gpu_folders(root):
        values = [_text(folder / name) for name in ("cur_freq", "min_freq", "max_freq")]
        if all(value.isdigit() for value in values):
            now, least, most = (int(value) / 1e6 for value in values)
            if least < most:
                detail = f"{now:.0f} MHz, varies from {least:.0f} to {most:.0f}"
                return "GPU clock", "warning", detail, "sudo jetson_clocks: times must not depend on what ran before"
            return "GPU clock", "ok", f"{now:.0f} MHz, fixed", ""
    return "GPU clock", "unknown", "cannot be read", ""


def driver(found: Any) -> Line:
    """CUDA's driver and the GPU, from what LOOK_AT_DRIVER printed."""
    if found[0] != "found":
        return "CUDA driver", "failed", f"cannot be loaded: {found[1]}", "it is part of L4T: flash the board again"
    version, name, present = found[1:]
    detail = f"CUDA {version}, {name} ({present})"
    if [int(part) for part in version.split(".")] < [10, 2]:
        return "CUDA driver", "failed", detail, "gf_tvm needs that of CUDA 10.2: install JetPack 4.6"
    return "CUDA driver", "ok", detail, ""


def compiler(root: Path) -> Line:
    """NVRTC and nvcc: one is needed where the driver is older than the compiler that made a bundle."""
    found = []
    for pattern in ("usr/local/cuda*/lib64/libnvrtc.so*", "usr/local/cuda*/targets/*/lib/libnvrtc.so*"):
        libraries = sorted(path for path in root.glob(pattern) if "builtins" not in path.name)
        if libraries:
            found.append(str(libraries[-1]))
            break
    nvcc = shutil.which("nvcc") or next((str(path) for path in sorted(root.glob("usr/local/cuda*/bin/nvcc"))), None)
    if nvcc is not None:
        found.append(nvcc)
    if not found:
        return "CUDA compiler", "warning", "neither libnvrtc nor nvcc", _COMPILER_ADVICE
    return "CUDA compiler", "ok", ", ".join(found), ""


def swap(root: Path) -> Line:
    """Swap, without which PyTorch and a GPU's context can end a board of 2 or 4 GiB."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _text(root / "proc/meminfo", 1 << 16), flags=re.MULTILINE))
    if "SwapTotal" not in fields:
        return "swap", "unknown", "/proc/meminfo does not tell", ""
    total, free = (int(fields[name]) * 1024 / _GIB for name in ("SwapTotal", "SwapFree"))
    memory = int(fields.get("MemTotal", 0)) * 1024 / _GIB
    detail = f"{total:.1f} GiB, {free:.1f} free"
    if memory + total < 5:
        advice = "add a swap file of 4 GiB, and end the desktop (sudo systemctl isolate multi-user)"
        return "swap", "warning", f"{detail}, besides {memory:.1f} GiB of memory", advice
    return "swap", "ok", detail, ""


def ask_nvpmodel() -> str:
    """What ``nvpmodel -q`` prints; "" without it."""
    try:
        done = subprocess.run(
            ["nvpmodel", "-q"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=5.0,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace")


def _text(file: Path, limit: int = 4096) -> str:
    try:
        with open(os.fspath(file), "rb") as stream:
            return stream.read(limit).decode("utf-8", "replace").strip("\0\n ")
    except OSError:
        return ""

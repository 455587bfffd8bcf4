"""Clocks, temperatures, governor and throttling of this machine, read from Linux sysfs.

Standard library only, and nothing newer than Python 3.7: ``gf-tvm farm doctor`` sends this file to boards on which
nothing is installed yet.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

#: Bits of the Raspberry Pi firmware's "get_throttled": now, and 16 bits higher since boot.
THROTTLE_BITS = ("undervoltage", "frequency capped", "throttled", "soft temperature limit")

#: Types of thermal zones that are, or hold, the CPU: Pi and most Arm boards, Jetson, Intel.
_CPU_ZONE = re.compile(r"cpu|soc|x86_pkg", re.IGNORECASE)
_GPU_ZONE = re.compile(r"gpu", re.IGNORECASE)
#: Types of cooling devices by which the kernel of a Jetson lowers clocks ("gpu-balanced"); fans are not among them.
_THROTTLING = re.compile(r"balanced|throttle", re.IGNORECASE)
_VCGENCMD_SECONDS = 2.0


@dataclass(frozen=True)
class Reading:
    """What the sensors say; None is unknown.

    Attributes:
        mhz: clock of the slowest CPU.
        max_mhz: the highest that this CPU can have.
        celsius: temperature of the CPU, of its hottest part if there are several sensors.
        governor: of the clock; several, joined by commas, if the CPUs differ.
        throttled: what limits the clock now, in the words of THROTTLE_BITS; empty if nothing does, or unknown.
        throttled_before: the same since boot.
        known: whether it could be read what limits the clock.
        gpu_mhz, gpu_max_mhz, gpu_celsius: of a Jetson's GPU.
    """

    mhz: float | None = None
    max_mhz: float | None = None
    celsius: float | None = None
    governor: str | None = None
    throttled: tuple[str, ...] = ()
    throttled_before: tuple[str, ...] = ()
    known: bool = False
    gpu_mhz: float | None = None
    gpu_max_mhz: float | None = None
    gpu_celsius: float | None = None

    def hot(self, limit_celsius: float) -> bool:
        """Whether the temperature is known and has reached the limit."""
        return self.celsius is not None and self.celsius >= limit_celsius

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Any) -> Reading:
        """Inverse of :meth:`to_dict`, for what another machine has told.

        Missing fields are unknown; fields that this version does not know are left out.

        Raises:
            ValueError: naming the field whose value is no such reading.
        """
        if not isinstance(values, dict):
            raise ValueError("sensors must be an object")
        found: dict[str, Any] = {}
        for name, check, wanted in _FIELDS:
            value = values.get(name)
            if value is not None:
                if not check(value):
                    raise ValueError(f"{name} of the sensors must be {wanted}")
                found[name] = tuple(value) if isinstance(value, list) else value
        return cls(**found)


def _is_mhz(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1e6


def _is_celsius(value: Any) -> bool:
    return _is_number(value) and -300 < value < 1e4


def _is_number(value: Any) -> bool:
    # The comparison also keeps integers out that are too large for a float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < math.inf


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_WORD


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= _MOST_WORDS and all(map(_is_word, value))


_LONGEST_WORD, _MOST_WORDS = 200, 16
_MHZ, _CELSIUS = "a clock in MHz or null", "a temperature in degrees Celsius or null"
_FIELDS = (
    *((name, _is_mhz, _MHZ) for name in ("mhz", "max_mhz", "gpu_mhz", "gpu_max_mhz")),
    *((name, _is_celsius, _CELSIUS) for name in ("celsius", "gpu_celsius")),
    ("governor", _is_word, "a short text or null"),
    *((name, _is_words, "a list of a few short texts") for name in ("throttled", "throttled_before")),
    ("known", lambda value: isinstance(value, bool), "true or false"),
)


class Sensors:
    """Reads the sensors found under ``root``; by default under $GF_TVM_SENSORS, else /.

    Nothing here raises: what cannot be read is unknown. A reading takes less than 5 ms where the firmware's flags are
    in sysfs; else ``vcgencmd`` is run, as long as it answers.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = Path(os.environ.get("GF_TVM_SENSORS") or "/") if root is None else Path(root)
        # vcgencmd asks this machine's firmware, whatever the root is.
        self._vcgencmd = shutil.which("vcgencmd") if self.root == Path("/") else None

    def read(self) -> Reading:
        """What the sensors say now."""
        mhz, max_mhz, governor = self._clock()
        gpu_mhz, gpu_max_mhz = self._gpu_clock()
        flags = self._flags()
        cooling = self._cooling() if flags is None else None
        return Reading(
            mhz=mhz,
            max_mhz=max_mhz,
            celsius=self._celsius(_CPU_ZONE),
            governor=governor,
            throttled=("throttled",) if cooling else () if flags is None else throttle_names(flags),
            throttled_before=() if flags is None else throttle_names(flags >> 16),
            known=flags is not None or cooling is not None,
            gpu_mhz=gpu_mhz,
            gpu_max_mhz=gpu_max_mhz,
            gpu_celsius=self._celsius(_GPU_ZONE),
        )

    def _clock(self) -> tuple[float | None, float | None, str | None]:
        cpus = self.root / "sys/devices/system/cpu"
        # One policy stands for all the CPUs that share a clock; old kernels have only the folders of the CPUs.
        folders = _glob(cpus, "cpufreq/policy[0-9]*") or _glob(cpus, "cpu[0-9]*/cpufreq")
        clocks = []
        governors = []
        for folder in folders:
            now, most = (_number(folder / name) for name in ("scaling_cur_freq", "cpuinfo_max_freq"))
            clocks.append((now, most))
            governor = _text(folder / "scaling_governor")
            if governor and governor not in governors:
                governors.append(governor)
        known = [(now, most) for now, most in clocks if now]
        now, most = min(known, key=lambda pair: pair[0]) if known else (None, clocks[0][1] if clocks else None)
        return now and now / 1e3, most and most / 1e3, ",".join(governors) or None

    def _gpu_clock(self) -> tuple[float | None, float | None]:
        """Of a Jetson's GPU, now and at most, in MHz."""
        for folder in gpu_folders(self.root):
            now = _number(folder / "cur_freq")
            if now is not None:
                steps = [int(step) for step in _text(folder / "available_frequencies").split() if step.isdigit()]
                most = max(steps, default=None) or _number(folder / "max_freq")
                return now / 1e6, most and most / 1e6
        return None, None

    def _cooling(self) -> bool | None:
        """Whether a Jetson's kernel lowers clocks against heat; None if it does not say."""
        states = [
            _number(folder / "cur_state")
            for folder in _glob(self.root / "sys/class/thermal", "cooling_device[0-9]*")
            if _THROTTLING.search(_text(folder / "type"))
        ]
        known = [state for state in states if state is not None]
        return any(known) if known else None

    def _celsius(self, kind: re.Pattern[str]) -> float | None:
        found = []
        for zone in _glob(self.root / "sys/class/thermal", "thermal_zone[0-9]*"):
            value = _number(zone / "temp")
            # A sensor that is switched off gives values such as -256000.
            if value is not None and -60e3 < value < 200e3 and kind.search(_text(zone / "type")):
                found.append(value / 1e3)
        return max(found) if found else None

    def _flags(self) -> int | None:
        for file in _glob(self.root / "sys/devices/platform", "soc*/*firmware*/get_throttled"):
            flags = parse_flags(_text(file))
            if flags is not None:
                return flags
        if self._vcgencmd is None:
            return None
        try:
            done = subprocess.run(
                [self._vcgencmd, "get_throttled"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=_VCGENCMD_SECONDS,
                check=False,
            )
            flags = parse_flags(done.stdout.decode("ascii", "replace").partition("=")[2])
        except (OSError, subprocess.SubprocessError):
            flags = None
        if flags is None:  # no access to the firmware, or not a Pi: asking again would only cost time
            self._vcgencmd = None
        return flags


def parse_flags(text: str) -> int | None:
    """The number in ``50005`` or ``0x50005``, which is hexadecimal either way; None if there is none."""
    match = re.fullmatch(r"(?:0x)?([0-9a-fA-F]{1,8})", text.strip())
    return int(match.group(1), 16) if match else None


def throttle_names(flags: int) -> tuple[str, ...]:
    """The words for the lowest four bits."""
    return tuple(name for bit, name in enumerate(THROTTLE_BITS) if flags >> bit & 1)


def gpu_folders(root: Path) -> list[Path]:
    """Where the kernel of a Jetson tells of its GPU's clock: cur_freq, min_freq, max_freq in Hz."""
    folders = _glob(root / "sys/class/devfreq", "*.gpu") + _glob(root / "sys/class/devfreq", "*.gp10b")
    return folders + _glob(root / "sys/devices/gpu.0/devfreq", "*")


def _glob(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def _text(file: Path) -> str:
    try:
        with open(file, "rb") as stream:
            return stream.read(256).decode("ascii", "replace").strip()
    except OSError:
        return ""


def _number(file: Path) -> float | None:
    text = _text(file)
    return float(text) if re.fullmatch(r"-?\d{1,12}", text) else None

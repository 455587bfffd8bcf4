"""Energy of work on this machine's CPU: a board's power monitor (INA3221), else the processor's own counters (RAPL).

Meters, the subtraction of idle power and the integration of power over time are those of :mod:`gf_cuda.meters`; GPUs'
are in :mod:`gf_cuda.energy`, with the power monitor of boards. Here are RAPL and the choice.

Source of RAPL's files and units: the Linux kernel's documentation of the power capping framework (powercap).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gf_cuda.energy import ina3221
from gf_cuda.meters import Energy, Meter, NotMeasured, joules_a_step, read_during

__all__ = ["SECONDS", "Energy", "Meter", "NotMeasured", "RaplMeter", "find_meter", "joules_a_step", "rapl"]

#: Seconds that work is repeated for its energy.
SECONDS = 2.0

#: Seconds between two readings of a RAPL counter. The smallest ones (32 bits of 15.3 uJ, 65 kJ) wrap after minutes at
#: the highest power of a server; a counter that wraps twice between readings would lose energy unseen.
_INTERVAL = 5.0

_TOTAL = "total"


@dataclass(frozen=True)
class _Counter:
    """One RAPL zone: its name, the file with its counter in uJ, and where that wraps around (uJ)."""

    name: str
    file: Path
    limit: int

    def read(self) -> int:
        return _number(self.file)


class RaplMeter(Meter):
    """Sums the processors' energy counters; made by :func:`rapl`."""

    def __init__(self, counters: list[_Counter], interval: float = _INTERVAL) -> None:
        super().__init__(f"RAPL {'+'.join(counter.name for counter in counters)}", _TOTAL)
        self._counters, self._interval = counters, interval

    def _over(self, run: Callable[[], None]) -> tuple[dict[str, float], float, int]:
        joules = {counter.name: 0.0 for counter in self._counters}
        start, before, readings = time.perf_counter(), self._read(), 1

        def add() -> None:
            nonlocal before, readings
            now = self._read()
            for counter, old, new in zip(self._counters, before, now, strict=True):
                joules[counter.name] += 1e-6 * (new - old if new >= old else new - old + counter.limit)
            before, readings = now, readings + 1

        read_during(run, add, self._interval)
        return {**joules, _TOTAL: sum(joules.values())}, time.perf_counter() - start, readings

    def _read(self) -> list[int]:
        return [counter.read() for counter in self._counters]


def find_meter(sysfs: str = "/sys") -> Meter:
    """The meter of this machine's CPU: of the whole board where there is one, else of the processors.

    Args:
        sysfs: where sysfs is mounted.

    Raises:
        NotMeasured: neither exists, or this user may not read it; says what was looked for.
    """
    try:
        return ina3221(sysfs)
    except NotMeasured as error:
        reason = str(error)
    try:
        return rapl(sysfs)
    except NotMeasured as error:
        raise NotMeasured(f"not measured: {reason}; {error}") from None


def rapl(sysfs: str = "/sys", interval: float = _INTERVAL) -> RaplMeter:
    """The counters of all processors and of their memory.

    Cores and GPU of a processor are parts of its package, and a zone ``psys`` contains the packages: neither is added.

    Args:
        interval: seconds between readings; the counters must not wrap twice in it.

    Raises:
        NotMeasured: no counters, or this user may not read them (most systems let only root).
    """
    folder = Path(sysfs, "class", "powercap")
    counters = []
    # intel-rapl:0 is a package, intel-rapl:0:1 a part of it; AMD's processors are named so, too. The same packages may
    # be there again as intel-rapl-mmio, which is not looked at.
    zones = (zone for zone in sorted(folder.glob("intel-rapl:*")) if re.fullmatch(r"intel-rapl:\d+(:\d+)?", zone.name))
    for zone in zones:
        name = _text(zone / "name")
        if name.startswith("package") and zone.name.count(":") == 1:
            pass
        elif name == "dram":
            name = f"{name}-{zone.name.split(':')[1]}"
        else:
            continue
        limit = _number(zone / "max_energy_range_uj")
        counters.append(_Counter(name, zone / "energy_uj", limit))
    if not any(counter.name.startswith("package") for counter in counters):
        raise NotMeasured(f"no RAPL counters under {folder}")
    meter = RaplMeter(counters, interval)
    meter._read()  # what cannot be read is said now
    return meter


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError as error:
        raise NotMeasured(f"{file}: {error.strerror or error}") from None


def _number(file: Path) -> int:
    text = _text(file)
    if not text.isdecimal():
        raise NotMeasured(f"{file}: not a number: {text[:40]!r}")
    return int(text)

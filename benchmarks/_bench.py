"""What benchmarks share: what the machine is, a user's mistakes, how results are kept; those of the farm a tracker."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from gf_tvm.core.geometry import Geometry
from gf_tvm.core.workload import Workload
from gf_tvm.errors import FarmError, GfTvmError
from gf_tvm.farm.protocol import Address, TrackerLost
from gf_tvm.farm.server import versions
from gf_tvm.farm.tracker import boards
from gf_tvm.machine import allocator, cpu


class UsageError(GfTvmError):
    """Options that do not go together."""


#: Takes little time to build and to run, and has a space of many schedules.
SMALL = Workload("backward", Geometry(n=2, ci=16, co=16, h=14, w=14, kernel=(3, 3), padding=(1, 1), patch=(2, 2)))


class Tracker:
    """``gf-tvm farm tracker`` on a free port; a context manager."""

    def __enter__(self) -> Tracker:
        command = [sys.executable, "-m", "gf_tvm.runners.cli", "farm", "tracker", "--port", "0"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise FarmError("the tracker did not start")
        self.address: Address = ("127.0.0.1", int(line.split()[2].rpartition(":")[2]))
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate()

    def wait_for(self, count: int, seconds: float = 300.0) -> None:
        """Wait until ``count`` boards are registered."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(TrackerLost):
                if len(boards(self.address)) == count:
                    return
            time.sleep(0.2)
        raise FarmError(f"not {count} boards after {seconds:.0f} s")


def conditions() -> dict[str, Any]:
    """Where and when this runs."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cpu": cpu.cpu_model(),
        "cores": cpu.usable_cores(),
        "allocator": allocator.in_use(),
        "load_before": [round(value, 2) for value in os.getloadavg()],
        "versions": versions(),
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and largest of repeated measurements, and all of them."""
    return {
        "median": round(statistics.median(values), 2),
        "low": round(min(values), 2),
        "high": round(max(values), 2),
        "all": [round(value, 2) for value in values],
    }


def show(figures: dict[str, Any]) -> str:
    """``median (low to high)``."""
    return f"{figures['median']:.1f} ({figures['low']:.1f} to {figures['high']:.1f})"


def keep(found: dict[str, Any], header: list[str], rows: list[list[Any]], path: Path | None) -> None:
    """Print a table, and write everything as JSON."""
    print(tabulate(rows, header, disable_numparse=True))
    where = found["conditions"]
    load = ", ".join(f"{value:g}" for value in where["load_before"])
    print(f"{where['date']}, {where['cpu']}, {where['cores']} cores, load before: {load}")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with what all benchmarks take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures")
    return parser


def say(line: str) -> None:
    """Tell on stderr what goes on."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)

"""Energy of CPUs: RAPL's counters in made-up sysfs trees, and which meter is taken."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from gf_tvm.machine.energy import NotMeasured, find_meter, joules_a_step, rapl

LIMIT = 1_000_000_000  # uJ


def zone(sysfs: Path, number: str, name: str, microjoules: int = 0) -> Path:
    folder = sysfs / "class/powercap" / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(name + "\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{LIMIT}\n")
    return folder


def set_to(folder: Path, microjoules: int) -> None:
    staged = folder / "staged"  # renamed, so that no reading sees an empty file
    staged.write_text(f"{microjoules}\n")
    staged.replace(folder / "energy_uj")


def test_packages_and_memory_are_added_and_their_parts_are_not(tmp_path: Path) -> None:
    counted = [zone(tmp_path, "0", "package-0"), zone(tmp_path, "1", "package-1"), zone(tmp_path, "0:1", "dram")]
    others = [zone(tmp_path, "0:0", "core"), zone(tmp_path, "2", "psys"), zone(tmp_path, "0:2", "uncore")]
    meter = find_meter(str(tmp_path))
    assert meter.name == "RAPL package-0+dram-0+package-1"
    meter.rest(0.01)
    assert meter.idle_watts["total"] == 0

    def work() -> None:
        for file in (*counted, *others):
            set_to(file, 3_000_000)

    energy = meter.measure(work)
    assert energy.joules == pytest.approx(9.0)
    assert energy.parts == pytest.approx({"package-0": 3.0, "package-1": 3.0, "dram-0": 3.0})


def test_counters_wrap_around(tmp_path: Path) -> None:
    folder = zone(tmp_path, "0", "package-0", LIMIT - 2_000_000)
    meter = rapl(str(tmp_path), interval=0.001)
    meter.rest(0.01)

    def work() -> None:
        # Round more than once in all, but less than once between two readings.
        for value in (1_000_000, LIMIT // 2, LIMIT - 1_000_000, 4_000_000):
            set_to(folder, value)
            time.sleep(0.1)

    energy = meter.measure(work)
    assert energy.joules == pytest.approx(2 + 1000 + 4)
    assert energy.samples > 4


def test_idle_power_is_subtracted(tmp_path: Path) -> None:
    folder = zone(tmp_path, "0", "package-0")
    meter = rapl(str(tmp_path))
    meter.idle_watts = {"total": 10.0, "package-0": 10.0}
    value = 0

    def step() -> None:
        nonlocal value
        value += 5_000_000
        set_to(folder, value)
        time.sleep(0.02)

    joules, energy = joules_a_step(meter, step, lambda: None, step_seconds=0.05, seconds=0.2)
    assert energy.total_joules == pytest.approx(4 * 5)
    assert energy.joules == pytest.approx(20 - 10 * energy.seconds)
    assert joules == pytest.approx(energy.joules / 4)
    assert energy.joules < 20


def test_a_board_has_a_meter_of_its_own(tmp_path: Path) -> None:
    zone(tmp_path, "0", "package-0")
    rail = tmp_path / "bus/i2c/drivers/ina3221x/6-0040/iio:device0"
    rail.mkdir(parents=True)
    (rail / "rail_name_0").write_text("POM_5V_IN\n")
    (rail / "in_power0_input").write_text("4000\n")
    assert find_meter(str(tmp_path)).name == "INA3221 POM_5V_IN"


def test_not_measured_says_why(tmp_path: Path) -> None:
    with pytest.raises(NotMeasured, match=r"not measured: no INA3221 power monitor .*; no RAPL counters under"):
        find_meter(str(tmp_path))
    folder = zone(tmp_path, "0", "package-0")
    (folder / "energy_uj").unlink()
    with pytest.raises(NotMeasured, match="energy_uj: No such file"):
        find_meter(str(tmp_path))
    (folder / "energy_uj").write_text("much\n")
    with pytest.raises(NotMeasured, match="energy_uj: not a number: 'much'"):
        find_meter(str(tmp_path))


def test_a_meter_that_breaks_while_it_measures(tmp_path: Path) -> None:
    folder = zone(tmp_path, "0", "package-0")
    meter = rapl(str(tmp_path), interval=0.001)
    meter.rest(0.01)
    with pytest.raises(NotMeasured, match="No such file"):
        meter.measure((folder / "energy_uj").unlink)

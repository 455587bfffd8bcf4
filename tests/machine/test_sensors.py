"""Sensors, on made-up sysfs trees: the words for flags and clocks, and that nothing which can be there raises."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gf_tvm.machine.sensors import THROTTLE_BITS, Reading, Sensors, parse_flags, throttle_names

CPUS = "sys/devices/system/cpu"
FIRMWARE = "sys/devices/platform/soc/soc:firmware/get_throttled"


def put(root: Path, name: str, text: object) -> None:
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n")


@pytest.fixture
def pi(tmp_path: Path) -> Path:
    """A Raspberry Pi 4 at work, as its kernel shows it."""
    for name, text in (("scaling_cur_freq", 1500000), ("cpuinfo_max_freq", 1800000), ("scaling_governor", "ondemand")):
        put(tmp_path, f"{CPUS}/cpufreq/policy0/{name}", text)
    put(tmp_path, "sys/class/thermal/thermal_zone0/type", "cpu-thermal")
    put(tmp_path, "sys/class/thermal/thermal_zone0/temp", 61835)
    put(tmp_path, FIRMWARE, "50005")
    return tmp_path


def test_a_pi(pi: Path) -> None:
    assert Sensors(pi).read() == Reading(
        mhz=1500.0,
        max_mhz=1800.0,
        celsius=61.835,
        governor="ondemand",
        throttled=("undervoltage", "throttled"),
        throttled_before=("undervoltage", "throttled"),
        known=True,
    )


def test_root_comes_from_the_environment(pi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GF_TVM_SENSORS", str(pi))
    assert Sensors().read().mhz == 1500.0
    monkeypatch.setenv("GF_TVM_SENSORS", "")
    assert Sensors().root == Path("/")


def test_nothing_there_is_unknown(tmp_path: Path) -> None:
    assert Sensors(tmp_path / "no such folder").read() == Reading()
    assert Sensors(tmp_path).read().to_dict() == {
        "mhz": None,
        "max_mhz": None,
        "celsius": None,
        "governor": None,
        "throttled": [],
        "throttled_before": [],
        "known": False,
        "gpu_mhz": None,
        "gpu_max_mhz": None,
        "gpu_celsius": None,
    }


def test_a_jetson_tells_of_its_gpu_and_of_throttling(tmp_path: Path) -> None:
    for name, value in (
        ("cur_freq", 76800000),
        ("max_freq", 614400000),
        ("available_frequencies", "76800000 921600000"),
    ):
        put(tmp_path, f"sys/class/devfreq/57000000.gpu/{name}", value)
    for number, kind, value in ((1, "CPU-therm", 41500), (2, "GPU-therm", 39000), (3, "thermal-fan-est", 90000)):
        put(tmp_path, f"sys/class/thermal/thermal_zone{number}/type", kind)
        put(tmp_path, f"sys/class/thermal/thermal_zone{number}/temp", value)
    reading = Sensors(tmp_path).read()
    assert (reading.gpu_mhz, reading.gpu_max_mhz) == (76.8, 921.6)
    assert (reading.celsius, reading.gpu_celsius) == (41.5, 39.0)
    assert not reading.known
    put(tmp_path, "sys/class/thermal/cooling_device0/type", "pwm-fan")
    put(tmp_path, "sys/class/thermal/cooling_device0/cur_state", 3)
    assert not Sensors(tmp_path).read().known
    put(tmp_path, "sys/class/thermal/cooling_device1/type", "gpu-balanced")
    for state, throttled in ((0, ()), (2, ("throttled",))):
        put(tmp_path, "sys/class/thermal/cooling_device1/cur_state", state)
        reading = Sensors(tmp_path).read()
        assert (reading.known, reading.throttled) == (True, throttled)


def test_the_older_place_of_a_jetsons_gpu(tmp_path: Path) -> None:
    put(tmp_path, "sys/devices/gpu.0/devfreq/57000000.gpu/cur_freq", 921600000)
    put(tmp_path, "sys/devices/gpu.0/devfreq/57000000.gpu/max_freq", 921600000)
    reading = Sensors(tmp_path).read()
    assert (reading.gpu_mhz, reading.gpu_max_mhz) == (921.6, 921.6)


def test_the_slowest_cpu_counts_with_its_own_maximum(tmp_path: Path) -> None:
    for cpu, now, most in ((0, 1200000, 1400000), (4, 1800000, 2400000), (7, "", 2400000)):  # CPU 7 is switched off
        put(tmp_path, f"{CPUS}/cpu{cpu}/cpufreq/scaling_cur_freq", now)
        put(tmp_path, f"{CPUS}/cpu{cpu}/cpufreq/cpuinfo_max_freq", most)
        put(tmp_path, f"{CPUS}/cpu{cpu}/cpufreq/scaling_governor", "schedutil" if cpu else "performance")
    reading = Sensors(tmp_path).read()
    assert (reading.mhz, reading.max_mhz, reading.governor) == (1200.0, 1400.0, "performance,schedutil")


def test_the_hottest_cpu_zone_counts_and_no_other(tmp_path: Path) -> None:
    zones = (("acpitz", 27800), ("CPU-therm", 50500), ("cpu-big", 64000), ("GPU-therm", 90000), ("cpu-off", -256000))
    for index, (kind, temp) in enumerate(zones):
        put(tmp_path, f"sys/class/thermal/thermal_zone{index}/type", kind)
        put(tmp_path, f"sys/class/thermal/thermal_zone{index}/temp", temp)
    reading = Sensors(tmp_path).read()
    assert reading.celsius == 64.0
    assert reading.hot(64.0)
    assert not reading.hot(64.1)
    assert not Reading().hot(0.0)


@pytest.mark.parametrize("bit", range(4))
def test_every_bit_now_and_since_boot(tmp_path: Path, bit: int) -> None:
    for flags, now, before in ((1 << bit, (THROTTLE_BITS[bit],), ()), (1 << bit + 16, (), (THROTTLE_BITS[bit],))):
        put(tmp_path, FIRMWARE, f"{flags:x}")
        reading = Sensors(tmp_path).read()
        assert (reading.throttled, reading.throttled_before, reading.known) == (now, before, True)


@pytest.mark.parametrize(
    ("text", "flags"),
    [("0", 0), ("0x0", 0), ("50000", 0x50000), ("0x50005\n", 0x50005), ("", None), ("x", None), ("-1", None)],
)
def test_flags_are_hexadecimal_with_or_without_a_prefix(text: str, flags: int | None) -> None:
    assert parse_flags(text) == flags


@given(st.integers(0, (1 << 32) - 1))
def test_only_the_four_bits_have_names(flags: int) -> None:
    names = throttle_names(flags)
    assert sum(1 << THROTTLE_BITS.index(name) for name in names) == flags & 15


@pytest.mark.parametrize("text", ["", "abc", "-", "1e9", "\x00\xff", "9" * 400, "<unsupported>"])
def test_rubbish_is_unknown(tmp_path: Path, text: str) -> None:
    for name in ("scaling_cur_freq", "cpuinfo_max_freq"):
        put(tmp_path, f"{CPUS}/cpufreq/policy0/{name}", text)
    put(tmp_path, "sys/class/thermal/thermal_zone0/type", "cpu-thermal")
    put(tmp_path, "sys/class/thermal/thermal_zone0/temp", text)
    put(tmp_path, FIRMWARE, text + "!")
    assert Sensors(tmp_path).read() == Reading()


def test_folders_where_files_should_be_are_unknown(tmp_path: Path) -> None:
    for name in (f"{CPUS}/cpufreq/policy0/scaling_cur_freq", "sys/class/thermal/thermal_zone0/temp", FIRMWARE):
        (tmp_path / name).mkdir(parents=True)
    assert Sensors(tmp_path).read() == Reading()


def vcgencmd(folder: Path, script: str) -> None:
    folder.mkdir()
    command = folder / "vcgencmd"
    command.write_text(f"#!/bin/sh\necho asked >> {folder}/calls\n{script}\n")
    command.chmod(command.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(
    ("script", "known"),
    [
        ("echo throttled=0x20002", True),
        ("echo 'VCHI initialization failed'; exit 255", False),
        ("exec sleep 1000", False),
    ],
)
def test_vcgencmd_is_asked_until_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, known: bool
) -> None:
    if Path("/sys/devices/platform/soc/soc:firmware/get_throttled").exists():  # pragma: no cover
        pytest.skip("this is a Raspberry Pi, where sysfs comes first")
    vcgencmd(tmp_path / "bin", script)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setattr("gf_tvm.machine.sensors._VCGENCMD_SECONDS", 0.3 if "sleep" in script else 250.0)
    monkeypatch.delenv("GF_TVM_SENSORS", raising=False)
    sensors = Sensors()
    for _ in range(2):
        reading = sensors.read()
        assert reading.known is known
        assert reading.throttled == (("frequency capped",) if known else ())
    assert (tmp_path / "bin/calls").read_text().count("asked") == (2 if known else 1)
    # Another root is not this machine.
    assert not Sensors(tmp_path).read().known


def test_a_reading_is_cheap(pi: Path) -> None:
    sensors = Sensors(pi)
    assert min(_seconds(sensors) for _ in range(20)) < 5e-3


def _seconds(sensors: Sensors) -> float:
    start = time.perf_counter()
    sensors.read()
    return time.perf_counter() - start


def test_needs_nothing_but_the_standard_library() -> None:
    code = (
        "import sys; from gf_tvm.machine import sensors; sensors.Sensors().read(); "
        "print({'torch', 'tvm', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"

"""Energy: a Jetson's power rails in made-up sysfs trees, NVML played by a small library, and the arithmetic."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from toy_task import wait_until

from gf_cuda import energy, meters
from gf_cuda.energy import find_meter
from gf_cuda.meters import EnergyMeter, Meter, NotMeasured, PowerMeter, integrate, joules_a_step


def iio(sysfs: Path, rails: dict[str, str], folder: str = "6-0040/iio:device0") -> Path:
    """The files of L4T 32: power in mW."""
    path = sysfs / "bus/i2c/drivers/ina3221x" / folder
    path.mkdir(parents=True)
    for number, (rail, power) in enumerate(rails.items()):
        (path / f"rail_name_{number}").write_text(rail + "\n")
        (path / f"in_power{number}_input").write_text(power + "\n")
    return path


def hwmon(sysfs: Path, rails: dict[str, tuple[str, str]], device: str = "1-0040") -> Path:
    """The files of later systems: voltage in mV, current in mA."""
    path = sysfs / "bus/i2c/drivers/ina3221" / device / "hwmon/hwmon3"
    path.mkdir(parents=True)
    for number, (rail, (voltage, current)) in enumerate(rails.items(), start=1):
        (path / f"in{number}_label").write_text(rail + "\n")
        (path / f"in{number}_input").write_text(voltage + "\n")
        (path / f"curr{number}_input").write_text(current + "\n")
    (path / "in7_label").write_text("sum of shunt voltages\n")
    (path / "in7_input").write_text("1\n")
    return path


NANO = {"POM_5V_IN": "4000", "POM_5V_GPU": "1500", "POM_5V_CPU": "500"}


def test_the_total_of_a_nano_is_its_input_rail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = iio(tmp_path, {"POM_5V_GPU": "1500", "POM_5V_IN": "4000", "POM_5V_CPU": "500"})  # order is no promise
    meter = find_meter(sysfs=str(tmp_path), nvml="no such library")
    assert meter.name == "INA3221 POM_5V_IN"
    assert meter.rest(0.05) == pytest.approx(4.0)
    assert meter.idle_watts == pytest.approx({"POM_5V_IN": 4.0, "POM_5V_GPU": 1.5, "POM_5V_CPU": 0.5})

    (folder / "in_power1_input").write_text("7000\n")
    (folder / "in_power0_input").write_text("3500\n")
    assert isinstance(meter, PowerMeter)
    sample, moments = meter._sample, []

    def noted() -> tuple[float, meters.Watts]:
        found = sample()
        moments.append(found[0])
        return found

    monkeypatch.setattr(meter, "_sample", noted)
    found = meter.measure(lambda: wait_until(lambda: len(moments) >= 5))
    assert found.samples == len(moments) >= 6
    assert found.seconds == moments[-1] - moments[0] > 0
    assert found.joules == pytest.approx(3.0 * found.seconds)  # the parts are not added
    assert found.total_joules == pytest.approx(7.0 * found.seconds)
    assert found.parts == pytest.approx({"POM_5V_GPU": 2.0 * found.seconds, "POM_5V_CPU": 0.0}, abs=1e-9)


def test_hwmon_multiplies_voltage_and_current(tmp_path: Path) -> None:
    hwmon(tmp_path, {"VDD_IN": ("5000", "900"), "VDD_CPU_GPU_CV": ("5000", "200")})
    meter = find_meter(sysfs=str(tmp_path), nvml="no such library")
    assert meter.name == "INA3221 VDD_IN"
    assert meter.rest(0.03) == pytest.approx(4.5)
    assert meter.idle_watts == pytest.approx({"VDD_IN": 4.5, "VDD_CPU_GPU_CV": 1.0})


def test_rails_of_several_monitors(tmp_path: Path) -> None:
    hwmon(tmp_path, {"VDD_GPU_SOC": ("5000", "200")})
    hwmon(tmp_path, {"VDD_IN": ("5000", "900")}, "1-0041")
    meter = energy.ina3221(str(tmp_path))
    meter.rest(0.03)
    assert set(meter.idle_watts) == {"VDD_IN", "VDD_GPU_SOC"}


@pytest.mark.parametrize(
    ("rails", "said"),
    [
        ({}, "no INA3221 power monitor"),
        ({"GPU": "1", "CPU": "2"}, "has no rail POM_5V_IN or VDD_IN, only GPU, CPU"),
        ({"POM_5V_IN": "fast"}, "in_power0_input: not a number: 'fast'"),
    ],
)
def test_what_cannot_be_measured_is_said(tmp_path: Path, rails: dict[str, str], said: str) -> None:
    if rails:
        iio(tmp_path, rails)
    with pytest.raises(NotMeasured, match=said) as caught:
        find_meter(sysfs=str(tmp_path), nvml="libnvidia-no.so.1")
    assert "no NVML (libnvidia-no.so.1)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_rights_are_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    iio(tmp_path, NANO)

    def refused(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(NotMeasured, match="rail_name_0: Permission denied"):
        energy.ina3221(str(tmp_path))


def test_a_monitor_that_fails_during_a_run(tmp_path: Path) -> None:
    folder = iio(tmp_path, NANO)
    meter = energy.ina3221(str(tmp_path))
    meter.rest(0.02)
    with pytest.raises(NotMeasured, match="in_power0_input: No such file"):
        meter.measure((folder / "in_power0_input").unlink)


def test_the_step_itself_may_fail(tmp_path: Path) -> None:
    iio(tmp_path, NANO)
    meter = energy.ina3221(str(tmp_path))
    meter.rest(0.02)
    with pytest.raises(ZeroDivisionError):
        meter.measure(lambda: print(1 // 0))


def test_trapezoidal_rule() -> None:
    samples = [(0.0, {"a": 1.0, "b": 0.0}), (1.0, {"a": 3.0, "b": 2.0}), (1.5, {"a": 3.0, "b": 0.0})]
    assert integrate(samples) == {"a": 3.5, "b": 1.5}


def test_a_counter_is_read_when_it_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A counter that moves every 50 ms, by 2 W: a shorter run is found all the same."""
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    def joules() -> float:
        return 2.0 * 0.05 * int(clock[0] / 0.05)

    monkeypatch.setattr(meters, "time", SimpleNamespace(perf_counter=lambda: clock[0], sleep=sleep))

    meter = EnergyMeter("counter", "gpu", joules)
    meter.idle_watts = {"gpu": 0.5}
    found = meter.measure(lambda: sleep(0.02))
    assert found.total_joules / found.seconds == pytest.approx(2.0, rel=0.05)
    assert found.joules == pytest.approx(found.total_joules - 0.5 * found.seconds)
    assert found.parts == {}


def test_a_counter_that_stands_still() -> None:
    meter = EnergyMeter("counter", "gpu", lambda: 7.0, longest_step=0.02)
    assert meter.rest(0.01) == 0.0


def test_joules_a_step_runs_long_enough_and_empties_the_queue() -> None:
    """The fake device takes 2 ms a step, and 3 W above an idle power of 1 W."""
    log: list[str] = []

    class Fake(Meter):
        def _over(self, run):  # type: ignore[no-untyped-def]
            run()
            seconds = 0.002 * log.count("step")
            return {"gpu": 4.0 * seconds}, seconds, 2

    meter = Fake("fake", "gpu")
    meter.idle_watts = {"gpu": 1.0}
    joules, whole = joules_a_step(meter, lambda: log.append("step"), lambda: log.append("wait"), 0.002, 0.5)
    assert log.count("step") == 250
    assert joules == pytest.approx(0.006)
    assert whole.joules == pytest.approx(1.5)
    assert log[-1] == "wait"
    assert log.index("wait") == 25
    log.clear()
    joules_a_step(meter, lambda: log.append("step"), lambda: log.append("wait"), 30.0, 0.5)
    assert log.count("step") == 1


_NVML = r"""
#include <cstring>
#include <cstdlib>
// 250 W; the counter is in millijoules and moves at every reading. STUB_NVML says what this GPU lacks.
static bool lacks(const char* what) { const char* v = getenv("STUB_NVML"); return v && strstr(v, what); }
static unsigned long long counter = 0;
extern "C" int nvmlInit_v2() { return lacks("init") ? 9 : 0; }
extern "C" const char* nvmlErrorString(int code) { return code == 9 ? "Driver Not Loaded" : "Not Supported"; }
extern "C" int nvmlDeviceGetHandleByIndex_v2(unsigned i, void** gpu) { *gpu = (void*)0x1000; return i; }
extern "C" int nvmlDeviceGetHandleByPciBusId_v2(const char* id, void** gpu) {
  *gpu = (void*)0x1000;
  return strcmp(id, "0000:3b:00.0") ? 6 : 0;
}
extern "C" int nvmlDeviceGetTotalEnergyConsumption(void* gpu, unsigned long long* value) {
  *value = counter += 500;
  return gpu != (void*)0x1000 || lacks("energy") ? 3 : 0;
}
extern "C" int nvmlDeviceGetPowerUsage(void* gpu, unsigned* value) {
  *value = 250000;
  return gpu != (void*)0x1000 || lacks("power") ? 3 : 0;
}
"""


@pytest.fixture(scope="module")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.cpp").write_text(_NVML)
    subprocess.run(["g++", "-shared", "-fPIC", "-o", "libnvml.so", "nvml.cpp"], cwd=folder, check=True)
    return str(folder / "libnvml.so")


def test_nvml_has_a_counter(nvml: str, tmp_path: Path) -> None:
    for bus_id in (None, "0000:3b:00.0"):
        meter = find_meter(bus_id, str(tmp_path), nvml)
        assert meter.name == "NVML energy counter"
        assert meter.rest(0.01) > 0
        assert meter.measure(lambda: None).total_joules == pytest.approx(1.0)  # two readings of 0.5 J


def test_nvml_without_a_counter_integrates_power(nvml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_NVML", "energy")
    meter = find_meter(None, str(tmp_path), nvml)
    assert isinstance(meter, PowerMeter)
    assert meter.rest(0.02) == pytest.approx(250.0)


@pytest.mark.parametrize(
    ("lacks", "bus_id", "said"),
    [
        ("init", None, r"nvmlInit_v2: Driver Not Loaded \(9\)"),
        ("energy power", None, r"nvmlDeviceGetPowerUsage: Not Supported \(3\)"),
        ("", "0000:00:00.0", r"nvmlDeviceGetHandleByPciBusId_v2: Not Supported \(6\)"),
    ],
)
def test_nvml_says_what_it_cannot(
    nvml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str, bus_id: str | None, said: str
) -> None:
    monkeypatch.setenv("STUB_NVML", lacks)
    with pytest.raises(NotMeasured, match=said):
        find_meter(bus_id, str(tmp_path), nvml)


def test_a_library_that_is_not_nvml(tmp_path: Path) -> None:
    with pytest.raises(NotMeasured, match="this NVML has no nvmlInit_v2"):
        energy.nvml_meter(None, "libm.so.6")

"""How much energy a training step takes: from a Jetson's power monitor (INA3221), else from NVML.

Energy is what the device took above its idle power, which is measured before. Standard library only.

Sources: NVIDIA's Jetson Linux documentation (power monitors, rail names) and the NVML API reference.
"""

import ctypes
import glob
import math
import os
import threading
import time
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

from .errors import GfCudaError

#: Rails that feed the whole module. The others are parts of them, and must not be added to them.
TOTAL_RAILS = ("POM_5V_IN", "VDD_IN")

#: L4T 32 (JetPack 4) has NVIDIA's driver with iio files, later ones the Linux kernel's with hwmon files.
_IIO = "bus/i2c/drivers/ina3221x/*/iio*device*"
_HWMON = "bus/i2c/drivers/ina3221/*/hwmon/hwmon*"

Watts = Dict[str, float]


class NotMeasured(GfCudaError):
    """There is no meter, or this user may not read it; the message is the reason."""


class Energy(NamedTuple):
    """What a run took, in joules.

    ``joules`` is what it took above idle, ``total_joules`` includes idle; ``parts`` has the rails that the total
    consists of (GPU, CPU), above idle; ``samples`` is the number of readings.
    """

    joules: float
    total_joules: float
    seconds: float
    samples: int
    parts: Dict[str, float]


class Meter:
    """One source of energy readings; made by :func:`find_meter`.

    Attributes:
        name: for people and reports ("INA3221 POM_5V_IN", "NVML energy counter").
        idle_watts: idle power by rail; empty before :meth:`rest`.
    """

    def __init__(self, name: str, total: str) -> None:
        self.name = name
        self.idle_watts: Watts = {}
        self._total = total

    def rest(self, seconds: float = 2.0) -> float:
        """Measure the idle power for that many seconds, in which nothing may run; return watts of the total."""
        joules, took, _ = self._over(lambda: time.sleep(seconds))
        self.idle_watts = {rail: value / took for rail, value in joules.items()}
        return self.idle_watts[self._total]

    def measure(self, run: Callable[[], None]) -> Energy:
        """The energy of ``run``, which must return only when the device has finished.

        Raises:
            NotMeasured: the meter cannot be read any more.
        """
        if not self.idle_watts:
            self.rest()
        joules, seconds, samples = self._over(run)
        above = {rail: value - self.idle_watts[rail] * seconds for rail, value in joules.items()}
        total = above.pop(self._total)
        return Energy(total, joules[self._total], seconds, samples, above)

    def _over(self, run: Callable[[], None]) -> Tuple[Dict[str, float], float, int]:
        """Joules by rail, seconds and readings while ``run`` runs."""
        raise NotImplementedError


def read_during(run: Callable[[], None], read: Callable[[], None], interval: float) -> None:
    """Call ``read`` about every ``interval`` seconds while ``run`` runs, in a thread, and once more after it.

    Raises:
        GfCudaError: what ``read`` raised, after ``run`` has ended.
    """
    done = threading.Event()
    failures: List[GfCudaError] = []

    def follow() -> None:
        while not done.wait(interval):
            try:
                read()
            except GfCudaError as error:
                failures.append(error)
                return

    thread = threading.Thread(target=follow, name="gf_cuda energy", daemon=True)
    thread.start()
    try:
        run()
    finally:
        done.set()
        thread.join()
    if failures:
        raise failures[0]
    read()


class PowerMeter(Meter):
    """Integrates power over time: a thread reads it about every ``interval`` seconds."""

    def __init__(self, name: str, total: str, read: Callable[[], Watts], interval: float = 0.01) -> None:
        super().__init__(name, total)
        self._read, self._interval = read, interval

    def _over(self, run: Callable[[], None]) -> Tuple[Dict[str, float], float, int]:
        samples = [self._sample()]
        read_during(run, lambda: samples.append(self._sample()), self._interval)
        return integrate(samples), samples[-1][0] - samples[0][0], len(samples)

    def _sample(self) -> Tuple[float, Watts]:
        before = time.perf_counter()
        watts = self._read()
        return (before + time.perf_counter()) / 2, watts  # an I2C transfer takes up to a millisecond


class EnergyMeter(Meter):
    """Reads a counter of joules that the device keeps.

    The counter moves in steps (20 to 100 ms on today's GPUs), so a run is measured from one step to another; the
    waiting counts as idle.
    """

    def __init__(self, name: str, total: str, read: Callable[[], float], longest_step: float = 0.3) -> None:
        super().__init__(name, total)
        self._read, self._longest_step = read, longest_step

    def _over(self, run: Callable[[], None]) -> Tuple[Dict[str, float], float, int]:
        start, before = self._step()
        run()
        end, after = self._step()
        return {self._total: after - before}, end - start, 2

    def _step(self) -> Tuple[float, float]:
        """Time and joules when the counter has just moved; of now if it does not move."""
        first, end = self._read(), time.perf_counter() + self._longest_step
        value = first
        while value == first and time.perf_counter() < end:
            time.sleep(0.001)
            value = self._read()
        return time.perf_counter(), value


def integrate(samples: List[Tuple[float, Watts]]) -> Dict[str, float]:
    """(seconds, watts by rail) at several moments -> joules by rail, by the trapezoidal rule."""
    joules = dict.fromkeys(samples[0][1], 0.0)
    for (t0, before), (t1, after) in zip(samples, samples[1:]):
        for rail in joules:
            joules[rail] += (t1 - t0) * (before[rail] + after[rail]) / 2
    return joules


def find_meter(bus_id: Optional[str] = None, sysfs: str = "/sys", nvml: str = "libnvidia-ml.so.1") -> Meter:
    """The meter of this machine's GPU.

    Args:
        bus_id: PCI bus id of the GPU, as the driver gives it; None: the first GPU that NVML knows. A Jetson has one.
        sysfs: where sysfs is mounted.
        nvml: NVML's library.

    Raises:
        NotMeasured: neither exists, or this user may not read it.
    """
    try:
        return ina3221(sysfs)
    except NotMeasured as error:
        reason = str(error)
    try:
        return nvml_meter(bus_id, nvml)
    except NotMeasured as error:
        raise NotMeasured(f"{reason}; {error}") from None


def pci_bus_id(ordinal: int = 0) -> Optional[str]:
    """What CUDA's GPU with this number is called on the PCI bus; None where the driver does not say.

    NVML counts all GPUs, CUDA those that CUDA_VISIBLE_DEVICES lets it see, so numbers do not tell which is which.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        name, device = ctypes.create_string_buffer(32), ctypes.c_int()
        if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), ordinal):
            return None
        if cuda.cuDeviceGetPCIBusId(name, len(name), device):
            return None
    except (OSError, AttributeError):
        return None
    return name.value.decode("ascii")


def ina3221(sysfs: str = "/sys") -> PowerMeter:
    """The power monitor of a Jetson. Raises NotMeasured."""
    rails: Dict[str, Callable[[], float]] = {}
    for folder in sorted(glob.glob(os.path.join(sysfs, _IIO))):
        for label in sorted(glob.glob(os.path.join(folder, "rail_name_*"))):
            power = os.path.join(folder, "in_power{}_input".format(label.rpartition("_")[2]))
            if os.path.exists(power):
                rails.setdefault(_text(label), _milliwatts(power))
    for folder in sorted(glob.glob(os.path.join(sysfs, _HWMON))):
        for label in sorted(glob.glob(os.path.join(folder, "in*_label"))):
            number = os.path.basename(label)[2 : -len("_label")]
            voltage = os.path.join(folder, f"in{number}_input")
            current = os.path.join(folder, f"curr{number}_input")
            # The driver also labels sums of shunt voltages, which have no current of their own.
            if os.path.exists(voltage) and os.path.exists(current):
                rails.setdefault(_text(label), _millivolts_milliamperes(voltage, current))
    if not rails:
        raise NotMeasured(f"no INA3221 power monitor under {sysfs}/bus/i2c")
    totals = [rail for rail in TOTAL_RAILS if rail in rails]
    if not totals:
        raise NotMeasured("the INA3221 has no rail {}, only {}".format(" or ".join(TOTAL_RAILS), ", ".join(rails)))
    # Two totals would be one and the same supply seen twice: one is enough, and neither is a part of the other.
    chosen = {rail: read for rail, read in rails.items() if rail not in totals[1:]}

    def read_all() -> Watts:
        return {rail: read() for rail, read in chosen.items()}

    read_all()  # what cannot be read is said now
    return PowerMeter("INA3221 " + totals[0], totals[0], read_all)


def _milliwatts(file: str) -> Callable[[], float]:
    return lambda: _number(file) / 1e3


def _millivolts_milliamperes(voltage: str, current: str) -> Callable[[], float]:
    return lambda: _number(voltage) * _number(current) / 1e6


def _text(file: str) -> str:
    try:
        with open(file, encoding="ascii", errors="replace") as opened:
            return opened.read().strip()
    except OSError as error:
        raise NotMeasured(f"{file}: {error.strerror}") from None


def _number(file: str) -> float:
    text = _text(file)
    try:
        return float(text)
    except ValueError:
        raise NotMeasured(f"{file}: not a number: {text[:40]!r}") from None


def nvml_meter(bus_id: Optional[str] = None, library: str = "libnvidia-ml.so.1") -> Meter:
    """NVML's energy counter, or its power where a GPU has no counter (before Volta). Raises NotMeasured."""
    nvml = _Nvml(library, bus_id)
    try:
        nvml.joules()
    except NotMeasured:
        nvml.watts()  # raises what there is to say
        return PowerMeter("NVML power", "gpu", lambda: {"gpu": nvml.watts()})
    return EnergyMeter("NVML energy counter", "gpu", nvml.joules)


class _Nvml:
    """Two readings of one GPU through NVML."""

    def __init__(self, library: str, bus_id: Optional[str]) -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError:
            raise NotMeasured(f"no NVML ({library})") from None
        self._call("nvmlInit_v2")
        self._gpu = ctypes.c_void_p()
        if bus_id is None:
            self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(0), ctypes.byref(self._gpu))
        else:
            name = ctypes.c_char_p(bus_id.encode("ascii"))
            self._call("nvmlDeviceGetHandleByPciBusId_v2", name, ctypes.byref(self._gpu))

    def joules(self) -> float:
        value = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self._gpu, ctypes.byref(value))
        return value.value / 1e3

    def watts(self) -> float:
        value = ctypes.c_uint()
        self._call("nvmlDeviceGetPowerUsage", self._gpu, ctypes.byref(value))
        return value.value / 1e3

    def _call(self, name: str, *arguments: object) -> None:
        try:
            code = getattr(self._library, name)(*arguments)
        except AttributeError:
            raise NotMeasured(f"this NVML has no {name}") from None
        if code:
            raise NotMeasured(f"{name}: {self._error(code)}")

    def _error(self, code: int) -> str:
        try:
            describe = self._library.nvmlErrorString
        except AttributeError:
            return f"error {code}"
        describe.restype = ctypes.c_char_p
        return "{} ({})".format(describe(code).decode("ascii", "replace"), code)


def joules_a_step(
    meter: Meter, step: Callable[[], object], synchronize: Callable[[], None], step_seconds: float, seconds: float = 1.5
) -> Tuple[float, Energy]:
    """Energy above idle of one call of ``step``, from a run that is long against the meter's resolution.

    Args:
        step: puts work into the device's queue.
        synchronize: waits until the queue is empty.
        step_seconds: roughly how long the device works on a step.
        seconds: to run.

    Returns:
        Joules a step, and the whole run's energy.
    """
    step_seconds = max(step_seconds, 1e-6)
    steps = max(1, math.ceil(seconds / step_seconds))
    # The queue holds a thousand launches or so; emptying it now and then keeps a run from ending late.
    batch = max(1, int(0.05 / step_seconds))

    def run() -> None:
        for index in range(steps):
            step()
            if (index + 1) % batch == 0:
                synchronize()
        synchronize()

    energy = meter.measure(run)
    return energy.joules / steps, energy

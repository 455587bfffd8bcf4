"""The meter of this machine's GPU: a Jetson's power monitor (INA3221), else NVML. Standard library only.

Sources: NVIDIA's Jetson Linux documentation (power monitors, rail names) and the NVML API reference.
"""

import ctypes
import glob
import os
from typing import Callable, Dict, Optional

from .meters import EnergyMeter, Meter, NotMeasured, PowerMeter, Watts

#: Rails that feed the whole module. The others are parts of them, and must not be added to them.
TOTAL_RAILS = ("POM_5V_IN", "VDD_IN")

#: L4T 32 (JetPack 4) has NVIDIA's driver with iio files, later ones the Linux kernel's with hwmon files.
_IIO = "bus/i2c/drivers/ina3221x/*/iio*device*"
_HWMON = "bus/i2c/drivers/ina3221/*/hwmon/hwmon*"


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

"""How much energy work takes: meters that read power or a counter, of whatever device.

Energy is what the device took above its idle power, which is measured before. Standard library only.
"""

import math
import threading
import time
from typing import Callable, Dict, List, NamedTuple, Tuple

from .errors import GfCudaError

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
    """One source of energy readings; see :mod:`gf_cuda.energy` for those of GPUs.

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

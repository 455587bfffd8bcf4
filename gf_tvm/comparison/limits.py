"""What a backward pass must move and compute at least, and the shortest time that a machine's limits allow for it."""

from __future__ import annotations

import math

from ..core import reference
from ..core.dtypes import itemsize, torch_dtype
from ..core.geometry import Geometry


def traffic(geometry: Geometry, dtype: str) -> tuple[int, int]:
    """Bytes that a filtered backward pass moves at least, and its floating-point operations.

    Counted once each: grad_y, x~ and W read, grad_x and grad_W written; two floating-point operations for each
    multiply-add of the two matrix products.
    """
    elements = math.prod(geometry.y_shape) + math.prod(geometry.x_shape) + 2 * math.prod(geometry.weight_shape)
    product = 2 * geometry.n * math.prod(geometry.grid) * geometry.co * geometry.ci_group
    taps = math.prod(geometry.kernel) if geometry.dilated else 1
    return itemsize(dtype) * elements + saved_bytes(geometry, dtype), product * (1 + taps)


def saved_bytes(geometry: Geometry, dtype: str) -> int:
    """Bytes of x~."""
    return math.prod(geometry.saved_shape) * reference.sum_dtype(torch_dtype(dtype)).itemsize


def shortest(moved: int, operations: int, peak_gflops: float, bandwidth_gbs: float) -> tuple[float, str]:
    """The time (ms) of what takes longer, moving or computing, at these rates; "bandwidth" or "arithmetic"."""
    times = {"bandwidth": copying(moved, bandwidth_gbs), "arithmetic": operations / peak_gflops / 1e6}
    limit = max(times, key=times.__getitem__)
    return times[limit], limit


def copying(moved: int, bandwidth_gbs: float) -> float:
    """The time (ms) of moving so many bytes."""
    return moved / bandwidth_gbs / 1e6


def roofline(geometry: Geometry, dtype: str, peak_gflops: float, bandwidth_gbs: float) -> tuple[float, str]:
    """The shortest time (ms) that the machine's limits allow for a filtered backward pass, and which limit it is.

    Sums are made in float32 for every storage dtype, hence one peak.
    """
    return shortest(*traffic(geometry, dtype), peak_gflops, bandwidth_gbs)

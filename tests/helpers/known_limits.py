"""A machine whose limits are known and cost no time: what they are is not what the tests of comparisons look at."""

from __future__ import annotations

from typing import Any

import pytest

from gf_tvm.comparison.cpu import COPY, SGEMM, LimitCall
from gf_tvm.machine import cpu


def rates_of(value: float) -> dict[str, Any]:
    """What :meth:`LimitCall.rates` tells where every round found the same."""
    return {"median": value, "quartiles": (value, value), "best": value, "repeats": 5}


def install(monkeypatch: pytest.MonkeyPatch, peak: float = 150.0, bandwidth: float = 30.0) -> None:
    """GFLOP/s and GB/s, before and after a comparison and in every round."""
    known = {SGEMM: peak, COPY: bandwidth}
    monkeypatch.setattr(cpu, "copy_bandwidth", lambda: bandwidth)
    monkeypatch.setattr(cpu, "sgemm_peak", lambda: peak)
    monkeypatch.setattr(cpu, "sgemm_rates", lambda: {"torch.mm": peak})
    monkeypatch.setattr(cpu, "products", lambda size: {"torch.mm": lambda: None})
    monkeypatch.setattr(cpu, "copy_call", lambda: (lambda: None, 1.0))
    monkeypatch.setattr(LimitCall, "rates", lambda self, timing: rates_of(known[self.name]))

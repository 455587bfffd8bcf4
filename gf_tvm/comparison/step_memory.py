"""How far a process's memory rises by a step: ``python -m gf_tvm.comparison.step_memory RESULT``, request on stdin.

Its own process, because a peak never goes down. The start is the process with PyTorch imported and the library
loaded, before the model is. Linux only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..core.geometry import Pair
from ..machine import cpu
from ..machine.allocator import environment_of_children
from .chains import ChainCase
from .steps import VARIANTS, TrainingStep, Variant

_CLEAR = Path("/proc/self/clear_refs")
#: Inductor may compile for minutes on a slow machine.
_TIMEOUT = 1800.0
#: Before the steps that count as usual: the first captures and compiles, the second may again.
_WARM_UP, _STEPS = 2, 3


def peaks(variant: Variant, patch: Pair, case: ChainCase, library: Path | None) -> Mapping[str, Any]:
    """``peak_bytes`` and ``step_peak_bytes`` (see :class:`~.steps.StepRow`), or the ``reason`` why not."""
    with tempfile.TemporaryDirectory(prefix="gf_tvm-") as folder:
        model, result = Path(folder) / "model.pt", Path(folder) / "result.json"
        try:
            torch.save(case.model, model)
        except Exception as error:  # pickle's, and whatever the model's own methods raise
            return {"reason": f"the model cannot be pickled: {type(error).__name__}: {error}"}
        request = {
            "variant": variant.name,
            "patch": patch,
            "layers": case.layers,
            "shape": case.input_shape,
            "model": str(model),
            "library": None if library is None else str(library),
            "threads": torch.get_num_threads(),
        }
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        try:
            done = subprocess.run(
                [sys.executable, "-m", __name__, str(result)],
                input=json.dumps(request),
                capture_output=True,
                text=True,
                check=False,
                timeout=_TIMEOUT,
                env={**os.environ, **environment_of_children(), "PYTHONPATH": path},
            )
        except subprocess.TimeoutExpired:
            return {"reason": f"no result after {_TIMEOUT:.0f} s"}
        if result.exists():
            found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
            return found
        ended = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        return {"reason": (done.stderr.strip().splitlines() or [ended])[-1]}


def _measure(request: dict[str, Any]) -> dict[str, Any]:
    from ..bundle.library import load

    torch.set_num_threads(request["threads"])
    library = None if request["library"] is None else load(request["library"])
    start = _peak_from_now()
    if start is None:
        return {"reason": "this system does not set a process's peak of memory back"}
    model = torch.load(request["model"], weights_only=False)
    made = VARIANTS[request["variant"]].make(model, tuple(request["patch"]), request["layers"], library)
    step = TrainingStep(made, request["shape"])
    for _ in range(_WARM_UP):
        step()
    highest = cpu.peak_bytes()
    _peak_from_now()
    for _ in range(_STEPS):
        step()
    usual = cpu.peak_bytes()
    assert highest is not None  # where the peak can be set back, it can be read
    assert usual is not None
    return {"peak_bytes": max(highest, usual) - start, "step_peak_bytes": usual - start}


def _peak_from_now() -> int | None:
    """Set this process's peak back to what is resident, and say how much that is; None where that cannot be done."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return None
    return cpu.peak_bytes()


if __name__ == "__main__":
    found = _measure(json.load(sys.stdin))
    Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")

"""Runs compiled forward passes on a board: ``on_board.py FOLDER`` prints the largest error of each, see test_fronts.py.

The folder holds the library, and arrays by the number of the case: ``K_given_J`` (entries, packed parameters),
``K_value_J`` and ``K_error_J`` of the exits in float64. Without PyTorch, whose import takes long under emulation.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from gf_tvm.bundle import runtime

with runtime.without_torch():
    import numpy as np
    import tvm_ffi

FENCE, ALIGNMENT = 64, 64


def fenced(elements: int) -> tuple[Any, Any]:
    """(memory full of NaN, the elements in it that may be written), aligned."""
    memory = np.full(elements + 2 * FENCE + ALIGNMENT, np.nan, np.float32)
    start = FENCE + -(memory.ctypes.data + 4 * FENCE) % ALIGNMENT // 4
    return memory[: start + elements + FENCE], memory[start : start + elements]


def inside(values: Any) -> Any:
    """A copy that is aligned."""
    _, own = fenced(values.size)
    own[:] = values.ravel()
    return own


def worst(function: Any, given: list[Any], arena: int, values: list[Any], errors: list[Any]) -> float:
    memories = [fenced(arena), *(fenced(value.size) for value in values)]
    function(*(tvm_ffi.from_dlpack(t) for t in (*map(inside, given), *(own for _, own in memories))))
    for memory, own in memories:
        start = (own.ctypes.data - memory.ctypes.data) // 4
        if not np.isnan(memory[:start]).all() or not np.isnan(memory[start + own.size :]).all():
            return float("inf")
    found = 0.0
    for (_, own), value, error in zip(memories[1:], values, errors, strict=True):
        off = float(np.max(np.abs(own - value.ravel()) / (error.ravel() + np.finfo(np.float32).tiny)))
        found = max(found, off if off == off else float("inf"))
    return found


def changes_noticed(path: Path) -> int:
    """Of all bits of some memory, those whose change changes its fingerprint."""
    fingerprints = runtime.fingerprints_of(path)
    assert fingerprints is not None
    memory = np.random.default_rng(1).integers(0, 256, 300, np.uint8)

    def state() -> bytes:
        return fingerprints([memory.ctypes.data + 3], [memory.size - 3])

    before, noticed = state(), 0
    for bit in range(8 * 3, 8 * memory.size):
        memory[bit // 8] ^= 1 << bit % 8
        noticed += state() != before
        memory[bit // 8] ^= 1 << bit % 8
    return noticed if state() == before else -1


def main() -> None:
    folder = Path(sys.argv[1])
    runtime.start_runtime()
    library = folder / "kernels.so"
    module = runtime.load_library(library)
    arrays = np.load(folder / "arrays.npz")
    found = []
    for k, case in enumerate(json.loads((folder / "cases.json").read_text())):
        given = [arrays[f"{k}_given_{j}"] for j in range(case["given"])]
        values, errors = ([arrays[f"{k}_{kind}_{j}"] for j in range(case["exits"])] for kind in ("value", "error"))
        found.append(worst(module[case["symbol"]], given, case["arena"], values, errors))
    print(json.dumps({"worst": found, "changes": changes_noticed(library)}))


if __name__ == "__main__":
    main()

"""How much memory a backward kernel takes at most beyond its inputs and outputs.

In a process of its own, because TVM keeps the scratch memory of earlier calls: inputs and outputs are made and
written, the process's peak of resident memory is set back to what it holds, and the first call is made. What the peak
then lies above is the kernel's, besides a few hundred kB for starting threads. Linux only.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from _own_process import ask, reset_peak

from gf_tvm.bundle.library import load
from gf_tvm.core.workload import Workload
from gf_tvm.machine import cpu


def extra_bytes(library: Path, workload: Workload, threads: int) -> dict[str, Any]:
    """``extra_bytes`` of a kernel's first call and of the second one; or why they are unknown, in ``reason``."""
    request = {"library": str(library), "workload": workload.to_dict(), "threads": threads}
    return {"extra_bytes": None, **ask(__file__, request)}


def _measure(request: dict[str, Any]) -> dict[str, Any]:
    import torch

    from gf_tvm.core.verify import argument_specs

    torch.set_num_threads(request["threads"])
    workload = Workload.from_dict(request["workload"])
    library = load(request["library"])
    kernel = library.find(workload.kernel, workload.geometry, workload.dtype)
    if kernel is None:
        return {"reason": "the bundle lacks this kernel"}
    # Written, so that their pages are there before.
    tensors = [torch.full(spec.shape, 0.5, dtype=spec.dtype) for spec in argument_specs(workload)]
    outputs = [spec.output for spec in argument_specs(workload)]
    calls = []
    for _ in range(2):
        if reason := reset_peak():
            return {"reason": reason}
        before = cpu.peak_bytes()
        kernel(*tensors)
        after = cpu.peak_bytes()
        assert before is not None  # where the peak can be set back, it can be read
        assert after is not None
        calls.append(after - before)
    return {
        "extra_bytes": calls[0],
        "extra_bytes_second_call": calls[1],
        "argument_bytes": sum(t.nbytes for t in tensors),
        "output_bytes": sum(t.nbytes for t, output in zip(tensors, outputs, strict=True) if output),
    }


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))

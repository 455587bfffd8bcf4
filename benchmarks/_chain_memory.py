"""How far the process's memory rises in a training step, exact, filtered and chained, each in a process of its own.

The first step makes what stays: gradients, the operators' own caches. Then the peak of resident memory is set back to
what is resident, and the second step is made. All larger blocks are mapped and given back one by one, so that none is
resident that nobody holds. Linux with glibc.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from pathlib import Path
from typing import Any

from _own_process import ask, reset_peak

from gf_tvm.comparison.chain_variants import VARIANTS

_MMAP_THRESHOLD = -3  # of malloc.h


def step_bytes(arguments: dict[str, Any], number: int, patch: tuple[int, int], bundle: Path) -> dict[str, int | None]:
    """By variant, the bytes by which a step's peak lies above what is there before it; None where it is unknown.

    Args:
        arguments: those of chains.py, as :func:`chains.networks` takes them. number: which of the networks.
        bundle: the kernels of the filtered and the chained variant.
    """
    found: dict[str, int | None] = {}
    for variant in VARIANTS:
        request = {"arguments": arguments, "number": number, "patch": patch, "bundle": str(bundle), "variant": variant}
        found[variant] = ask(__file__, request).get("bytes")
    return found


def _measure(request: dict[str, Any]) -> dict[str, Any]:
    import torch
    from chains import networks

    import gf_tvm
    from gf_tvm.comparison.steps import TrainingStep
    from gf_tvm.machine import cpu
    from gf_tvm.training.trainer import freeze

    if ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 16) != 1:
        return {"reason": "the C library's allocator cannot be told to map blocks"}
    arguments = argparse.Namespace(**request["arguments"])
    torch.set_num_threads(arguments.threads)
    _, model, names, shape = networks(arguments)[request["number"]]
    freeze(model.eval(), names)
    if request["variant"] != "exact":
        library, chain = gf_tvm.load(request["bundle"]), request["variant"] == "chained"
        gf_tvm.filter_model(model, request["patch"], layers=names, library=library, chain=chain)
    step = TrainingStep(model, shape)
    step()
    if reason := reset_peak():
        return {"reason": reason}
    before = cpu.peak_bytes()
    step()
    after = cpu.peak_bytes()
    if before is None or after is None:
        return {"reason": "the system does not tell"}
    return {"bytes": after - before}


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))

"""Runs GPU schedules on the CPU: TVM prints OpenCL C, PoCL compiles it, and gf_tvm's own list of launches runs it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from gf_tvm.codegen import cuda
from gf_tvm.machine.profiles import DeviceProfile

#: As the CUDA target of the profile, but for what OpenCL has no word for.
_TARGET_KEYS = ("max_threads_per_block", "max_num_threads", "max_shared_memory_per_block")


class NoPocl(RuntimeError):
    """There is none that works."""


class Pocl:
    """An OpenCL context on PoCL's CPU device."""

    def __init__(self) -> None:
        import pyopencl

        self._cl = pyopencl
        found = [p for p in pyopencl.get_platforms() if "Portable" in p.name]
        contexts = (pyopencl.Context(platform.get_devices()) for platform in found)
        context = next((context for context in contexts if self._builds(context)), None)
        if context is None:
            raise NoPocl(
                "none of the OpenCL platforms is a PoCL that knows this processor; install pyopencl[pocl] or, for one "
                "that is newer than that, Debian's pocl-opencl-icd"
            )
        self._context = context
        self._queue = pyopencl.CommandQueue(self._context)

    def _builds(self, context: Any) -> bool:
        """PyPI's PoCL has an LLVM of 2022, which compiles nothing for processors that it does not know."""
        try:
            self._cl.Program(context, "__kernel void nothing(__global float* a) {}").build()
        except self._cl.Error:
            return False
        return True

    def run(
        self, schedule: Any, profile: DeviceProfile, inputs: list[torch.Tensor], outputs: list[torch.Tensor]
    ) -> None:
        """Run a schedule on contiguous CPU tensors; outputs are written in place, scratch memory is NaN before."""
        cl = self._cl
        known = json.loads(profile.target)
        target = {"kind": "opencl", **{key: known[key] for key in _TARGET_KEYS}}
        plan, source = cuda.lower(schedule, target, "gf")
        program = cl.Program(self._context, source).build(options="-cl-opt-disable")
        tensors = [*inputs, *outputs]
        for argument, tensor in zip(plan["arguments"], tensors, strict=True):
            assert tuple(argument["shape"]) == tuple(tensor.shape), argument
            assert argument["dtype"] == str(tensor.dtype).removeprefix("torch."), argument
        assert [a["output"] for a in plan["arguments"]] == [False] * len(inputs) + [True] * len(outputs)
        flags = cl.mem_flags.READ_WRITE | cl.mem_flags.COPY_HOST_PTR
        buffers = [cl.Buffer(self._context, flags, hostbuf=tensor.numpy()) for tensor in tensors]
        poison = np.full(max(plan["scratch_bytes"], 4) // 4, np.nan, np.float32)
        scratch = cl.Buffer(self._context, flags, hostbuf=poison)
        for launch in plan["launches"]:
            kernel = cl.Kernel(program, launch["function"])
            arguments = [
                buffers[value] if kind == "argument" else scratch[value : plan["scratch_bytes"]]
                for kind, value in launch["arguments"]
            ]
            size = [grid * block for grid, block in zip(launch["grid"], launch["block"], strict=True)]
            kernel(self._queue, size, launch["block"], *arguments)
        for tensor, buffer in zip(outputs, buffers[len(inputs) :], strict=True):
            cl.enqueue_copy(self._queue, tensor.numpy(), buffer)
        self._queue.finish()

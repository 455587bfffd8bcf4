"""Runs GPU kernels on CPU tensors: as OpenCL on PoCL, or the very CUDA source on the emulated driver."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

from gf_cuda import Executable, get_driver
from gf_tvm.codegen import cuda
from gf_tvm.core import verify
from gf_tvm.core.workload import Workload
from gf_tvm.machine.profiles import DeviceProfile
from gf_tvm.schedules import get_space

#: Runs a schedule on (inputs, outputs).
Run = Callable[[Any, DeviceProfile, list[torch.Tensor], list[torch.Tensor]], None]


def run_emulated(
    schedule: Any, profile: DeviceProfile, inputs: list[torch.Tensor], outputs: list[torch.Tensor]
) -> None:
    """Compile for the emulated driver, whose memory is the process's, and launch; scratch memory is NaN before."""
    made = cuda.compile_program(schedule, profile)
    tensors = [*inputs, *outputs]
    for argument, tensor, output in zip(
        made.program.arguments, tensors, [False] * len(inputs) + [True] * len(outputs), strict=True
    ):
        assert (tuple(argument.shape), argument.dtype, argument.output) == (
            *(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), output),
        )
    device = get_driver().device()
    executable = Executable(device, made.program, made.image)
    scratch = torch.full((made.program.scratch_bytes // 4 + 64,), torch.nan)
    executable([tensor.data_ptr() for tensor in tensors], -(-scratch.data_ptr() // 16) * 16, 0)
    device.synchronize()
    executable.unload()


def error(run: Run, workload: Workload, profile: DeviceProfile, seed: int, sampled: bool = False) -> float:
    """The error of a kernel, default or random point of its space, in units of what is allowed."""
    space = get_space(workload, profile)
    config = space.sample(random.Random(seed)) if sampled else space.default
    inputs, outputs = verify.random_inputs(workload, seed), verify.poisoned_outputs(workload)
    run(space.schedule(config), profile, inputs, outputs)
    return verify.excess(outputs, verify.expected(workload, inputs))

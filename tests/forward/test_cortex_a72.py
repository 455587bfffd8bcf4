"""The loops of compiled forward passes that do the products, as code for a Cortex-A72. An estimate: nothing is run."""

from __future__ import annotations

import shutil
from collections import Counter
from typing import Any

import pytest
import torch
from cortex_a72 import hot_loops, products_a_cycle
from front_networks import network_of

from gf_tvm.blocked.steps import Convolution, Winograd
from gf_tvm.chains.plan.graph import Conv
from gf_tvm.codegen.compile import compile_module
from gf_tvm.forward.emit_front import emit_front
from gf_tvm.forward.lower import lower
from gf_tvm.machine.profiles import get_profile

RPI4 = get_profile("rpi4")

#: Input channels, output channels, pixels along an axis, taps along an axis, stride, groups.
CASES = {
    "1x1": (96, 24, 56, 1, 1, 1),
    "1x1, many weights": (960, 160, 7, 1, 1, 1),
    "colours": (3, 32, 112, 3, 2, 1),
    "3x3": (64, 128, 56, 3, 2, 1),
    "3x3, grouped": (64, 64, 28, 3, 1, 4),
    "Winograd": (64, 64, 56, 3, 1, 1),
    "Winograd, small": (512, 512, 7, 3, 1, 1),
    "depthwise 3x3": (96, 96, 56, 3, 1, 96),
    "depthwise 3x3, strided": (144, 144, 56, 3, 2, 144),
    "depthwise 5x5": (240, 240, 28, 5, 1, 240),
}


def loops_of(ci: int, co: int, size: int, taps: int, stride: int, groups: int) -> tuple[Convolution, list[list[str]]]:
    """A convolution's step by default, and its loops of products: Winograd's transforms, which also add, are none."""
    settings: Any = {"kernel": (taps, taps), "stride": (stride, stride), "padding": (taps // 2,) * 2, "groups": groups}
    op = Conv("conv", (0,), (0, None), co=co, filtered=False, **settings)
    front = lower(network_of([op], [torch.empty(1, ci, size, size)], [torch.empty(0)], [1]).part, RPI4).front
    (step,) = (call.step for call in front.calls if isinstance(call.step, Convolution))
    loops = hot_loops(compile_module(emit_front(front, RPI4), RPI4))
    return step, [body for body in loops if not any(line.startswith(("fadd", "fmul")) for line in body)]


@pytest.mark.skipif(shutil.which("llvm-mca") is None, reason="needs llvm-mca")
@pytest.mark.parametrize("case", CASES)
def test_products_by_default(case: str) -> None:
    """By llvm-mca's model at least 0.9 of the products that the core could do, from registers, by lanes of them."""
    step, loops = loops_of(*CASES[case])
    assert isinstance(step, Winograd) == case.startswith("Winograd")
    assert loops
    for body in loops:
        assert products_a_cycle(body) >= 0.9
        kinds = Counter(line.split()[0] for line in body)
        assert sum(n for name, n in kinds.items() if name.startswith("ld")) < kinds["fmla"]
        if not step.depthwise:
            # Pixels are loaded as vectors: hardly a scalar into all lanes.
            assert kinds["ld1r"] + kinds["dup"] < kinds["fmla"] / 8

"""torch.utils.flop_counter on filtered convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_library import FakeLibrary, loaded
from hypothesis import given, settings
from strategies import NEEDS, SEEDS, geometries, tensors
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import gf_tvm
from gf_tvm.core.geometry import Geometry
from gf_tvm.evaluation import flops
from gf_tvm.ops.functional import conv2d

pytestmark = pytest.mark.usefixtures("one_thread")


def counted(run: Any) -> tuple[Any, int]:
    counter = FlopCounterMode(display=False)
    with counter:
        result = run()
    return result, counter.get_total_flops()


@pytest.mark.parametrize(
    ("geometry", "forward", "to_x", "to_weight"),
    [
        # 2 images of 6 x 6, so 3 x 3 patches; 4 x 3 channels; 9 taps.
        (Geometry(2, 3, 4, 6, 6, 3, 2, 1, 1), 2 * 2 * 36 * 12 * 9, 2 * 2 * 9 * 12, 2 * 2 * 9 * 12),
        # Outputs of 7 x 5 in patches of 4 x 2: 2 x 3. Groups of 2 input channels for each of 4 output channels.
        (Geometry(1, 4, 4, 7, 5, 1, (4, 2), 1, 0, 1, 2), 2 * 35 * 4 * 2, 2 * 6 * 4 * 2, 2 * 6 * 4 * 2),
        # Depthwise, stride 2: 4 x 4 outputs, 2 x 2 patches.
        (Geometry(3, 5, 5, 8, 8, 3, 2, 2, 1, 1, 5), 2 * 3 * 16 * 5 * 9, 2 * 3 * 4 * 5, 2 * 3 * 4 * 5),
        # The dilated case: grad_x is a convolution with all taps on the grid of 5 x 5.
        (Geometry(1, 2, 3, 10, 10, 3, 2, 1, 2, 2), 2 * 100 * 6 * 9, 2 * 25 * 6 * 9, 2 * 25 * 6),
    ],
    ids=["plain", "grouped", "depthwise", "dilated"],
)
@pytest.mark.parametrize("with_library", [False, True])
def test_by_hand(geometry: Geometry, forward: int, to_x: int, to_weight: int, with_library: bool) -> None:
    g, library = geometry, FakeLibrary()
    settings = (g.stride, g.padding, g.dilation, g.groups, g.patch, library if with_library else None)
    with loaded(library):
        for needs in ((True, True), (True, False), (False, True)):
            x, weight, bias, grad_y = tensors(g, 0, torch.float32)
            x.requires_grad_(needs[0])
            weight.requires_grad_(needs[1])
            y, ours = counted(lambda at=(x, weight, bias): conv2d(*at, *settings))
            assert ours == forward
            assert counted(lambda y=y, grad_y=grad_y: y.backward(grad_y))[1] == needs[0] * to_x + needs[1] * to_weight
        with torch.no_grad():
            assert counted(lambda: conv2d(x, weight, bias, *settings))[1] == forward


@settings(max_examples=100)
@given(geometry=geometries(), seed=SEEDS, needs=NEEDS)
def test_forward_is_counted_as_torchs_own_and_backward_as_the_products(geometry, seed, needs) -> None:
    g = geometry
    x, weight, bias, grad_y = tensors(g, seed)
    leaves = [t.requires_grad_(need) for t, need in zip((x, weight, bias), needs, strict=True)]
    y, ours = counted(lambda: conv2d(*leaves, g.stride, g.padding, g.dilation, g.groups, g.patch))
    _, exact = counted(lambda: F.conv2d(*leaves, g.stride, g.padding, g.dilation, g.groups))
    assert ours == exact
    if y.requires_grad:
        # What the evaluation counts besides: sums of W, means, and grad_b.
        wanted = flops.filtered_backward_flops(g, flops.Needs(needs[0], needs[1]))
        if needs[0] or needs[1]:
            wanted -= y.numel() + g.n * g.co * g.grid[0] * g.grid[1]
        if needs[0] and not g.dilated:
            wanted -= weight.numel()
        assert counted(lambda: y.backward(grad_y))[1] == wanted


def test_a_model_by_modules() -> None:
    torch.manual_seed(0)
    model = gf_tvm.filter_model(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1)), 4, last=1
    )
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.randn(2, 3, 8, 8)).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.gf_tvm.conv2d] == 2 * 2 * 64 * 20 * 9
    assert counts[torch.ops.gf_tvm.conv2d_backward] == 2 * (2 * 2 * 4 * 20)
    assert counts[torch.ops.aten.convolution] == 2 * 2 * 64 * 12 * 9

"""Convolutions on blocked maps, whose weights are packed in every call, against float64."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gf_tvm
from gf_tvm.blocked.convolution import ConvolutionProgram
from gf_tvm.blocked.emit_packing import packs_by_tiles
from gf_tvm.blocked.steps import Convolution, Winograd
from gf_tvm.bundle.library import Library
from gf_tvm.core.geometry import Geometry
from gf_tvm.errors import DeviceError
from gf_tvm.machine.profiles import cpu_flags, get_profile
from gf_tvm.ops import operators

pytestmark = pytest.mark.usefixtures("one_thread")

#: Relative norm of the error of Winograd's algorithm, F(4): docs/forward.md.
WINOGRAD = 1e-5


def random_geometry(rng: random.Random) -> Geometry:
    """Any convolution that there is a program for."""
    kernel = rng.choice(((1, 1), (1, 1), (3, 3), (3, 3), (5, 5), (2, 3), (7, 1)))
    dilation = rng.choice(((1, 1), (1, 1), (1, 1), (2, 1), (2, 3)))
    padding = tuple(rng.randint(0, d * (k - 1)) for k, d in zip(kernel, dilation, strict=True))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    height, width = (rng.randint(low, low + rng.choice((0, 3, 13, 30))) for low in least)
    stride = rng.choice(((1, 1), (1, 1), (2, 2), (1, 2)))
    ci, co = rng.choice((1, 3, 4, 8, 17, 32, 40)), rng.choice((1, 2, 16, 19, 48, 70))
    depthwise = rng.random() < 0.2
    groups = ci if depthwise else 1
    n = rng.choice((1, 2, 3))
    return Geometry(n, ci, ci if depthwise else co, height, width, kernel, 1, stride, padding, dilation, groups)  # type: ignore[arg-type]


def winograd_geometry(rng: random.Random) -> Geometry:
    """A 3x3 convolution with pixels enough for Winograd's algorithm."""
    height, width = rng.randint(17, 23), rng.randint(17, 23)
    padding = rng.randint(0, 1)
    return Geometry(4, rng.choice((32, 37, 64)), rng.choice((16, 24, 50)), height, width, 3, 1, 1, padding)


def cases() -> list[tuple[Geometry, bool]]:
    """Random ones, and those that networks have."""
    rng = random.Random(3)
    found = [random_geometry(rng) for _ in range(40)] + [winograd_geometry(rng) for _ in range(8)]
    found += [
        Geometry(2, 3, 32, 33, 33, 7, 1, 2, 3),
        Geometry(2, 160, 96, 7, 7, 1, 1),
        Geometry(2, 64, 64, 7, 7, 3, 1, 1, 1),
        Geometry(1, 20, 30, 1, 1, 1, 1),
    ]
    # Many weights and few pixels: every task packs its own.
    heavy = [Geometry(2, 250, 300, 5, 5, 3, 1, 1, 1), Geometry(3, 500, 400, 4, 4, 1, 1)]
    return [
        *((geometry, rng.random() < 0.5) for geometry in dict.fromkeys(found)),
        *((geometry, bias) for geometry in heavy for bias in (True, False)),
    ]


CASES = cases()


@pytest.fixture(scope="module", params=["host", "x86-64-v3"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Library:
    try:
        profile = get_profile(request.param)
    except DeviceError as error:
        pytest.skip(str(error))
    if not set(profile.cpu_flags) <= set(cpu_flags()) or profile.arch != get_profile("host").arch:
        pytest.skip(f"this CPU does not run {profile.name}'s code")
    path = tmp_path_factory.mktemp("convolutions") / "all.gfb"
    gf_tvm.build([], profile, out=path, programs=[ConvolutionProgram(*case) for case in CASES])
    return gf_tvm.load(path)


def tensors(geometry: Geometry, bias: bool, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes: list[Any] = [geometry.x_shape, geometry.weight_shape, *([(geometry.co,)] if bias else [])]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def exact(geometry: Geometry, given: list[Tensor]) -> Tensor:
    x, weight, *bias = (t.double() for t in given)
    settings = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    return F.conv2d(x, weight, bias[0] if bias else None, *settings)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def bound(program: ConvolutionProgram, step: Convolution) -> float:
    """What the error may be, as a relative norm, of sums of that length."""
    if isinstance(step, Winograd):
        return WINOGRAD
    terms = program.geometry.ci_group * math.prod(program.geometry.kernel) + 1
    return 4 * math.sqrt(terms) * torch.finfo(torch.float32).eps


def test_all_forms_are_met() -> None:
    steps = [ConvolutionProgram(*case).steps(get_profile("x86-64-v4"))[1] for case in CASES]
    assert {type(step) for step in steps} == {Convolution, Winograd}
    assert sum(map(packs_by_tiles, steps)) == 4


def test_every_result_is_right(library: Library) -> None:
    profile = get_profile(library.device)
    for seed, (geometry, bias) in enumerate(CASES):
        program = ConvolutionProgram(geometry, bias)
        given = tensors(geometry, bias, seed)
        function = library.program(program.key)
        assert function is not None
        for _ in range(2):  # the second time memory is as the first left it
            y = torch.full(geometry.y_shape, math.nan)
            function(*given, y)
            error = relative(y, exact(geometry, given))
            assert error <= bound(program, program.steps(profile)[1]), (geometry, bias, error)
            given[1].mul_(-2)  # weights change between calls


def test_the_operator_takes_the_program(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry, bias = next(case for case in CASES if case[1])
    given = tensors(geometry, bias, 0)
    settings = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups, (1, 1))

    def run(x: Tensor) -> Tensor:
        return operators.conv2d(x, *given[1:], *settings, library.digest, False)[0]

    wanted = exact(geometry, given)
    offset = torch.empty(given[0].numel() + 1)[1:].view_as(given[0]).copy_(given[0])  # begins at an odd address
    with monkeypatch.context() as patch:
        patch.setattr(F, "conv2d", lambda *_: pytest.fail("PyTorch computes it"))
        assert relative(run(given[0]), wanted) < 1e-5
        assert relative(run(offset), wanted) < 1e-5
    # What it does not take PyTorch computes.
    assert relative(run(given[0].to(memory_format=torch.channels_last)), wanted) < 1e-5
    assert run(given[0][:0]).shape == (0, *geometry.y_shape[1:])


def test_groups_of_several_channels_have_none() -> None:
    assert not ConvolutionProgram.exists(Geometry(1, 8, 8, 5, 5, 3, 1, groups=2))
    assert not ConvolutionProgram.exists(Geometry(1, 4, 8, 5, 5, 3, 1, groups=4))
    assert ConvolutionProgram.exists(Geometry(1, 4, 4, 5, 5, 3, 1, groups=4))


def test_memory_is_given_back(library: Library) -> None:
    """What a call takes for itself: transformed tiles, packed weights."""
    program = next(
        ConvolutionProgram(*case)
        for case in CASES
        if isinstance(ConvolutionProgram(*case).steps(get_profile(library.device))[1], Winograd)
    )
    given, y = tensors(program.geometry, program.bias, 0), torch.empty(program.geometry.y_shape)
    function = library.program(program.key)
    assert function is not None

    def used() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    function(*given, y)
    before = used()
    for _ in range(100):
        function(*given, y)
    assert used() - before < 10 * y.nbytes

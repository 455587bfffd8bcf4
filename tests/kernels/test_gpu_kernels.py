"""GPU kernels against the float64 reference, without a GPU: as OpenCL on PoCL, and as CUDA on the emulated driver."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import emulated_cuda
import gpu_check
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import KINDS, SEEDS, compiling, geometries, kinds

from gf_tvm.core import verify
from gf_tvm.core.geometry import Geometry
from gf_tvm.core.workload import KERNELS, Workload
from gf_tvm.kernels import stages as st_
from gf_tvm.kernels.gpu import fused, unfused
from gf_tvm.machine.profiles import DeviceProfile, get_profile
from gf_tvm.schedules import get_space

NANO = get_profile("jetson-nano")


@pytest.fixture(scope="module")
def pocl() -> gpu_check.Run:
    pytest.importorskip("pyopencl", reason="runs kernels with pyopencl[pocl]", exc_type=ImportError)
    from pocl import NoPocl, Pocl

    try:
        return Pocl().run
    except NoPocl as error:
        pytest.skip(str(error))


@pytest.fixture
def emulated() -> Iterator[gpu_check.Run]:
    with emulated_cuda.environment():
        yield gpu_check.run_emulated


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_random_geometries_on_pocl(pocl: gpu_check.Run) -> None:
    """All kernels, the default and random points of their spaces."""
    met: Counter[str] = Counter()
    checked: Counter[str] = Counter()

    @compiling(104)
    @given(geometries(smallest_n=1, largest_channels=9), SEEDS, st.booleans())
    def every(geometry: Geometry, seed: int, sampled: bool) -> None:
        kernel = list(KERNELS)[checked.total() % len(KERNELS)]
        checked[kernel] += 1
        met.update(kinds(geometry))
        workload = Workload(kernel, geometry)
        error = gpu_check.error(pocl, workload, NANO, seed, sampled)
        assert error <= 1, f"{workload.key}: {error} times the allowed error"

    every()
    assert checked.total() >= 100
    assert not set(KINDS) - set(met) - {"empty batch"}


@compiling(16)
@given(geometries(smallest_n=1, largest_channels=9), SEEDS, st.sampled_from(tuple(KERNELS)), st.booleans())
def test_cuda_source(geometry: Geometry, seed: int, kernel: str, half: bool) -> None:
    """The source that a GPU gets, float16 too (which PoCL's CPU device does not have), and the launcher."""
    workload = Workload(kernel, geometry, "float16" if half else "float32")
    with emulated_cuda.environment():
        error = gpu_check.error(gpu_check.run_emulated, workload, NANO, seed, sampled=True)
    assert error <= 1, f"{workload.key}: {error} times the allowed error"


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(2, 72, 40, 15, 13, (3, 3), (2, 2), (1, 1), (1, 1)),  # tiles that are not full, several of each axis
        Geometry(3, 64, 64, 16, 16, (3, 3), (4, 4), (1, 1), (1, 1)),  # vector loads and stores
        Geometry(2, 32, 48, 17, 16, (3, 3), (2, 2), (2, 2), (1, 1)),  # stride 2, uneven edges
        Geometry(2, 32, 32, 16, 16, (3, 3), (2, 2), (1, 1), (4, 4), (4, 4)),  # dilated: shifted patches
        Geometry(2, 24, 48, 14, 14, (3, 3), (2, 2), (1, 1), (1, 1), (1, 1), 3),  # grouped
        Geometry(4, 40, 40, 28, 28, (3, 3), (7, 7), (1, 1), (1, 1), (1, 1), 40),  # depthwise
    ],
    ids=lambda geometry: geometry.key,
)
def test_realistic_shapes(emulated: gpu_check.Run, geometry: Geometry) -> None:
    for kernel, dtype in (("filter_input", "float32"), ("backward", "float32"), ("backward", "float16")):
        error = gpu_check.error(emulated, Workload(kernel, geometry, dtype), NANO, 1)
        assert error <= 1, f"{kernel} {dtype}: {error} times the allowed error"


def test_long_sums_over_a_channel(emulated: gpu_check.Run) -> None:
    """More patches than one block sums."""
    geometry = Geometry(3, 2, 2, 100, 100, (1, 1), (1, 1), groups=2)
    assert geometry.n * 100 * 100 > 3 * unfused.SUM_THREADS * unfused.SUM_LENGTH
    for kernel in ("filter_grad", "backward_weight"):
        error = gpu_check.error(emulated, Workload(kernel, geometry), NANO, 5)
        assert error <= 1, f"{error} times the allowed error"


class ShortSum(unfused.Shapes):
    """The weight gradient's sum ends one step too early."""

    def __init__(self, geometry: Geometry, tiles: unfused.Tiles) -> None:
        super().__init__(geometry, tiles)
        self.split -= tiles.wk


def test_a_wrong_kernel_is_caught(emulated: gpu_check.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistakes that are easy to make: clipped patches, the last step of a sum, and grad_b."""
    workload = Workload("backward", Geometry(2, 12, 10, 9, 9, (3, 3), (2, 2), (1, 1), (1, 1)))

    def error(device: DeviceProfile = NANO) -> float:
        return gpu_check.error(emulated, workload, device, 3)

    assert error() <= 1
    for module, name, wrong in (
        (unfused, "scale", lambda geometry, i, j: st_.tirx.const(0.25, "float32")),
        (fused, "Shapes", ShortSum),
        (st_, "patch_count", lambda geometry, i, j: st_.tirx.const(4.0, "float32")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, wrong)
            assert error() > 1, name


def test_pooling_fused_with_the_product_or_not(emulated: gpu_check.Run) -> None:
    """Both forms of the backward pass, whichever the default is."""
    for kernel in ("backward", "backward_input"):
        for geometry in (
            Geometry(2, 24, 20, 15, 13, (3, 3), (2, 2), (1, 1), (1, 1)),
            Geometry(2, 24, 48, 8, 8, (3, 3), (4, 4), (1, 1), (1, 1), (1, 1), 3),
        ):
            workload = Workload(kernel, geometry)
            space = get_space(workload, NANO)
            assert set(space.knobs["fuse"]) == {0, 1}
            for fuse in (0, 1):
                config = {**space.default, "fuse": fuse}
                inputs, outputs = verify.random_inputs(workload, 2), verify.poisoned_outputs(workload)
                emulated(space.schedule(config), NANO, inputs, outputs)
                error = verify.excess(outputs, verify.expected(workload, inputs))
                assert error <= 1, f"{workload.key} {config}: {error} times the allowed error"


def test_no_fused_form_where_a_block_cannot_take_the_channels() -> None:
    many = Geometry(8, 512, 512, 14, 14, (3, 3), (2, 2), (1, 1), (1, 1))
    dilated = Geometry(2, 16, 16, 16, 16, (3, 3), (2, 2), (1, 1), (4, 4), (4, 4))
    for geometry in (many, dilated):
        assert "fuse" not in get_space(Workload("backward", geometry), NANO).knobs
    space = get_space(Workload("backward", Geometry(8, 64, 256, 14, 14, (3, 3), (2, 2), (1, 1), (1, 1))), NANO)
    assert not space.valid({**space.default, "fuse": 1, "m": 128, "ci": 64, "tm": 8, "tc": 8})  # 132 KB of g~
    assert not space.valid({**space.default, "fuse": 1, "m": 32, "ci": 32, "tm": 4, "tc": 4})  # half of the channels


def test_bfloat16_has_no_kernels_on_gpus() -> None:
    assert "bfloat16" not in NANO.dtypes


def test_spaces_have_a_valid_default_and_fit_the_board() -> None:
    for kernel in KERNELS:
        for channels, size, groups in ((3, 5, 1), (64, 56, 1), (512, 14, 1), (96, 28, 96), (64, 14, 8)):
            geometry = Geometry(8, channels, channels, size, size, (3, 3), (2, 2), (1, 1), (1, 1), (1, 1), groups)
            space = get_space(Workload(kernel, geometry), NANO)
            assert space.valid(space.default), (kernel, geometry.key, space.default)


def test_poisoned_outputs_are_overwritten(emulated: gpu_check.Run) -> None:
    """What the caller has to zero, and no more, is left alone: pixels of grad_x that no patch covers."""
    geometry = Geometry(1, 2, 2, 10, 10, (3, 3), (2, 2))
    assert not geometry.covers_input
    workload = Workload("backward_input", geometry)
    (grad_x, _) = verify.poisoned_outputs(workload)
    uncovered = grad_x == 0
    inputs, outputs = verify.random_inputs(workload, 0), verify.poisoned_outputs(workload)
    outputs[0][uncovered] = 7.0
    emulated(get_space(workload, NANO).schedule(get_space(workload, NANO).default), NANO, inputs, outputs)
    assert (outputs[0][uncovered] == 7.0).all()
    assert not outputs[0].isnan().any()

"""The TE kernels, compiled, against the float64 reference: every kernel, any geometry, many schedules."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import KINDS, SEEDS, compiling, geometries, kinds
from tvm.script.ir_builder import tirx as T

from gf_tvm.bundle.runtime import start_runtime
from gf_tvm.codegen.compile import compile_module
from gf_tvm.core import verify
from gf_tvm.core.geometry import Geometry
from gf_tvm.core.workload import DTYPES, KERNELS, Workload
from gf_tvm.kernels import definition
from gf_tvm.kernels.cpu import emit, on_grid, simd
from gf_tvm.kernels.cpu.sweep import Sweep, Tiles
from gf_tvm.machine.profiles import DeviceProfile, get_profile
from gf_tvm.schedules import cpu, definition_hash, get_space

pytestmark = pytest.mark.early

# What runs in training; the others are checked on fewer geometries.
MAIN = ("filter_input", "backward", "backward_input", "backward_weight")
PRODUCTS = ("input_grad", "weight_grad")
SINGLE = tuple(kernel for kernel in KERNELS if kernel not in MAIN)


@pytest.fixture(scope="module")
def profile() -> DeviceProfile:
    start_runtime()
    return get_profile("host")


def run(workload: Workload, module: object, profile: DeviceProfile, seed: int = 0) -> float:
    """Compile and run on fresh inputs and poisoned outputs; the error in units of what is allowed."""
    inputs, outputs = verify.random_inputs(workload, seed), verify.poisoned_outputs(workload)
    compile_module(module, profile)["main"](*inputs, *outputs)
    return verify.excess(outputs, verify.expected(workload, inputs))


def check(workload: Workload, profile: DeviceProfile, seed: int, config: dict[str, int] | None = None) -> None:
    space = get_space(workload, profile)
    config = space.default if config is None else config
    error = run(workload, space.schedule(config), profile, seed)
    assert error <= 1, f"{workload.key} with {config}: {error} times the allowed error"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_default_schedules_on_two_hundred_random_geometries(profile: DeviceProfile) -> None:
    met: Counter[str] = Counter()
    checked = 0

    @compiling(204)
    @given(geometries(smallest_n=1, largest_channels=7), SEEDS, st.sampled_from(MAIN[1:]))
    def every(geometry: Geometry, seed: int, kernel: str) -> None:
        nonlocal checked
        checked += 1
        met.update(kinds(geometry))
        check(Workload("filter_input", geometry), profile, seed)
        check(Workload(kernel, geometry), profile, seed)

    every()
    assert checked >= 200
    missing = set(KINDS) - set(met) - {"empty batch"}
    assert not missing, f"never met: {missing}"


@compiling(25)
@given(geometries(smallest_n=1, largest_channels=6), SEEDS, st.sampled_from(SINGLE))
def test_single_kernels(profile: DeviceProfile, geometry: Geometry, seed: int, kernel: str) -> None:
    check(Workload(kernel, geometry), profile, seed)


@compiling(25)
@given(geometries(smallest_n=1, largest_channels=9), SEEDS, st.sampled_from(MAIN), st.sampled_from(DTYPES[1:]))
def test_sixteen_bit_storage(profile: DeviceProfile, geometry: Geometry, seed: int, kernel: str, dtype: str) -> None:
    check(Workload(kernel, geometry, dtype), profile, seed)


@compiling(30)
@given(geometries(smallest_n=1, largest_out=20, largest_channels=40), SEEDS, st.sampled_from((*MAIN, *PRODUCTS)))
def test_sampled_points_of_the_spaces(profile: DeviceProfile, geometry: Geometry, seed: int, kernel: str) -> None:
    workload = Workload(kernel, geometry)
    check(workload, profile, seed, get_space(workload, profile).sample(random.Random(seed)))


@compiling(12)
@given(
    st.builds(
        Geometry,
        st.integers(2, 3),
        st.sampled_from((32, 48)),
        st.sampled_from((30, 64)),
        st.integers(9, 16),
        st.integers(9, 16),
        st.sampled_from((1, 3)),
        st.sampled_from((2, (2, 3), 4)),
        padding=st.integers(0, 1),
        groups=st.sampled_from((1, 2)),
    ),
    SEEDS,
    st.sampled_from(MAIN[1:]),
)
def test_blocks_that_are_pooled_between_the_products_of_others(
    profile: DeviceProfile, geometry: Geometry, seed: int, kernel: str
) -> None:
    """Default schedules do not do that to maps as small as these. Some channels arrive in time, and some do not."""
    workload, ph = Workload(kernel, geometry), geometry.grid[0]
    rows = random.Random(seed).choice([rows for rows in (1, 2, 3, ph) if ph % rows == 0])
    tiles = Tiles(rows, m=profile.lanes, ci=8, co=8, cv=profile.lanes, together=16, near=4, ahead=4)
    sweep = Sweep(workload, tiles, profile.lanes)
    with emit.function() as module:
        sweep.emit()
    assert sweep.ahead is not None
    assert sweep.ahead.most_channels > 0
    assert run(workload, module(), profile, seed) <= 1


@compiling(15)
@given(geometries(smallest_n=1, largest_channels=9), SEEDS, st.sampled_from(tuple(KERNELS)))
def test_plain_definitions_without_any_schedule(
    profile: DeviceProfile, geometry: Geometry, seed: int, kernel: str
) -> None:
    workload = Workload(kernel, geometry)
    assert run(workload, definition(workload), profile, seed) <= 1


@pytest.mark.parametrize("name", ["x86-64-v3", "x86-64-v4"])
@pytest.mark.parametrize("r", [2, 4, 7])
def test_realistic_shapes(name: str, r: int, profile: DeviceProfile) -> None:
    from gf_tvm.machine.profiles import runs_here

    other = get_profile(name)
    if not runs_here(other):
        # The code for other CPUs still has to come out of the compiler.
        workload = Workload("backward", Geometry(2, 32, 64, 28, 28, 3, r, padding=1))
        space = get_space(workload, other)
        compile_module(space.schedule(space.default), other)
        return
    for geometry in (
        Geometry(4, 64, 96, 28, 28, 3, r, padding=1),
        Geometry(2, 96, 96, 28, 28, 3, r, padding=1, stride=2, groups=96),
        Geometry(2, 48, 80, 14, 14, 1, r),
        Geometry(2, 32, 64, 33, 33, 3, r, padding=8, dilation=8),
    ):
        for kernel in MAIN if name == "x86-64-v4" else MAIN[:2]:
            check(Workload(kernel, geometry), other, r)


def test_a_wrong_kernel_is_caught(profile: DeviceProfile) -> None:
    """The bound can fail: a patch too few, a tap too few, a value scaled by 1 + 1e-5."""
    workload = Workload("backward", Geometry(2, 16, 16, 12, 12, 3, 2, padding=1))
    inputs, outputs = verify.random_inputs(workload, 3), verify.poisoned_outputs(workload)
    space = get_space(workload, profile)
    compile_module(space.schedule(space.default), profile)["main"](*inputs, *outputs)
    wanted = verify.expected(workload, inputs)
    assert verify.excess(outputs, wanted) <= 1
    for k in range(3):
        for wrong in (outputs[k] * (1 + 1e-4), outputs[k].roll(1, 0), torch.zeros_like(outputs[k])):
            assert verify.excess([*outputs[:k], wrong, *outputs[k + 1 :]], wanted) > 1
    almost = outputs[0].clone()
    almost[-1, -1, -1, -1] = float("nan")
    assert verify.excess([almost, *outputs[1:]], wanted) == float("inf")
    lacking = [inputs[0].clone(), *inputs[1:]]
    lacking[0][0, 0, 0, 0] = 0.0
    again = verify.poisoned_outputs(workload)
    compile_module(space.schedule(space.default), profile)["main"](*lacking, *again)
    assert verify.excess(again, wanted) > 1


def test_the_definition_hash_depends_on_what_matters(profile: DeviceProfile) -> None:
    workload = Workload("backward", Geometry(2, 16, 16, 12, 12, 3, 2, padding=1))
    again = Workload("backward", Geometry(2, 16, 16, 12, 12, 3, 2, padding=1))
    other = Workload("backward", Geometry(2, 16, 16, 12, 12, 3, 4, padding=1))
    assert definition_hash(workload, profile) == definition_hash(again, profile)
    assert definition_hash(workload, profile) != definition_hash(other, profile)


def check_both(geometry: Geometry, profile: DeviceProfile, seed: int, by_channels: bool | None = None) -> None:
    """Both products of one g~, cut as some point of both spaces says."""
    choice = random.Random(seed)
    workloads = [Workload(kernel, geometry) for kernel in PRODUCTS]
    of_x, of_w = (get_space(workload, profile) for workload in workloads)
    common = [rows for rows in of_x.knobs["rows"] if rows in of_w.knobs["rows"]]
    rows = choice.choice([rows for rows in common if by_channels is None or by_channels == (rows == 0)])
    tiles = cpu.tiles_of({**of_w.sample(choice), **of_x.sample(choice), "rows": rows}, geometry, profile)
    shapes = {spec.name: spec.shape for workload in workloads for spec in verify.argument_specs(workload)}
    with emit.function() as module:
        tensors = {name: T.arg(name, T.buffer(shape, "float32")) for name, shape in shapes.items()}
        flat = {name: simd.flat(tensor) for name, tensor in tensors.items()}
        with simd.streaming("float32", shared=True):
            on_grid.emit_both(geometry, tiles, profile.lanes, {**flat, "saved": flat["filtered_x"]})
    (g, weight), (_, saved) = (verify.random_inputs(workload, seed) for workload in workloads)
    (grad_x,), (grad_w,) = (verify.poisoned_outputs(workload) for workload in workloads)
    compile_module(module(), profile)["main"](g, weight, grad_x, saved, grad_w)
    for workload, found, inputs in zip(workloads, (grad_x, grad_w), ([g, weight], [g, saved]), strict=True):
        assert verify.excess([found], verify.expected(workload, inputs)) <= 1, workload.key


@compiling(25)
@given(geometries(smallest_n=1, largest_channels=40), SEEDS)
def test_both_products_of_a_convolution_at_once(profile: DeviceProfile, geometry: Geometry, seed: int) -> None:
    assume(not (geometry.dilated or geometry.depthwise))
    check_both(geometry, profile, seed)


@pytest.mark.parametrize("patch", [2, 7])
@pytest.mark.parametrize("by_channels", [True, False])
def test_both_products_with_many_and_few_patches(profile: DeviceProfile, by_channels: bool, patch: int) -> None:
    """Groups and tiles that the channels do not fill."""
    geometry = Geometry(5, 2 * 37, 2 * 29, 14, 14, (3, 3), (patch, patch), padding=(1, 1), groups=2)
    for seed in range(3):
        check_both(geometry, profile, seed, by_channels)

"""gf_tvm.core.geometry and gf_tvm.core.reference against the definition written out (brute_force.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import brute_force
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from brute_force import Conv
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import KINDS, NEEDS, SEEDS, geometries, kinds, tensors
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gf_tvm.core import reference
from gf_tvm.core.geometry import Geometry
from gf_tvm.errors import GeometryError

ALL = (True, True, True)
QUICK = settings(max_examples=60)

pytestmark = pytest.mark.usefixtures("one_thread")


def conv_of(geometry: Geometry) -> Conv:
    return Conv(geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, geometry.groups, geometry.patch)


def assert_equal_to_definition(geometry: Geometry, seed: int, needs: tuple[bool, bool, bool]) -> None:
    conv = conv_of(geometry)
    x, weight, _, grad_y = tensors(geometry, seed)
    assert conv.output_size(geometry.h, geometry.w) == geometry.y_shape[2:]
    filtered_x = reference.filter_input(x, geometry)
    grads = reference.backward(grad_y, filtered_x if needs[1] else None, weight, geometry, needs)
    arrays = (x.numpy(), weight.numpy(), grad_y.numpy())
    pairs = [
        (filtered_x, brute_force.filtered_x(arrays[0], conv)),
        (reference.filter_grad(grad_y, geometry), brute_force.filtered_grad_y(arrays[2], conv)),
    ]
    for grad, wanted, expected in zip(grads, needs, brute_force.backward(*arrays, conv), strict=True):
        assert (grad is not None) == wanted
        if grad is not None:
            pairs.append((grad, expected))
    for actual, expected in pairs:
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
def test_equals_definition_on_a_thousand_random_geometries() -> None:
    met: set[str] = set()
    count: Counter[str] = Counter()
    flags: Counter[tuple[bool, bool, bool]] = Counter()

    @settings(max_examples=1400, database=None)
    @given(geometry=geometries(), seed=SEEDS, needs=NEEDS)
    def check(geometry: Geometry, seed: int, needs: tuple[bool, bool, bool]) -> None:
        assert_equal_to_definition(geometry, seed, needs)
        if geometry.key not in met:
            count.update(kinds(geometry))
            flags[needs] += 1
        met.add(geometry.key)

    check()
    assert len(met) >= 1000
    assert {kind: n for kind in KINDS if (n := count[kind]) < 20} == {}
    assert len(flags) == 8
    assert min(flags.values()) >= 20


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize(("ci", "co", "groups"), [(3, 2, 1), (4, 6, 2), (3, 3, 3), (2, 4, 2)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 4), (5, 1)])
@pytest.mark.parametrize(
    ("patch", "dilation"), [((2, 2), (1, 1)), ((4, 3), (2, 1)), ((2, 1), (4, 3)), ((30, 1), (1, 1))]
)
def test_equals_definition_on_a_grid_of_cases(n, ci, co, groups, kernel, patch, dilation) -> None:
    """The same, with cases that are there in every run."""
    geometry = Geometry(n, ci, co, 18, 13, kernel, patch, (1, 2), (1, 0), dilation, groups)
    assert_equal_to_definition(geometry, 0, ALL)


def test_by_hand_with_rows_that_belong_to_no_patch() -> None:
    """5x5, kernel 3, r=2: Hy=3, P=2, oy=1 (patches {0}, {1,2}), ox=ceil((4-5)/2)=0 (patches {0,1}, {2,3}, not 4)."""
    geometry = Geometry(1, 1, 1, 5, 5, 3, 2)
    x = torch.arange(25.0).view(1, 1, 5, 5)
    weight = torch.ones(1, 1, 3, 3)
    weight[0, 0, 1, 1] = 3.0  # W~ = 11
    grad_y = torch.tensor([[1.0, 2, 4], [3, 5, 7], [6, 8, 12]]).view(1, 1, 3, 3)
    assert reference.filter_input(x, geometry)[0, 0].tolist() == [[0 + 1 + 5 + 6, 2 + 3 + 7 + 8], [52, 60]]
    assert reference.filter_grad(grad_y, geometry)[0, 0].tolist() == [[1, 3], [4.5, 8]]
    grad_x, grad_w, grad_b = reference.backward(grad_y, reference.filter_input(x, geometry), weight, geometry)
    assert grad_x is not None
    assert grad_x[0, 0].tolist() == [
        [11, 11, 33, 33, 0],
        [11, 11, 33, 33, 0],
        [49.5, 49.5, 88, 88, 0],
        [49.5, 49.5, 88, 88, 0],
        [0, 0, 0, 0, 0],
    ]
    assert grad_w is not None
    assert grad_w.unique().tolist() == [12 * 1 + 20 * 3 + 52 * 4.5 + 60 * 8]
    assert grad_b is not None
    assert grad_b.tolist() == [48]


def test_by_hand_with_stride_and_a_negative_offset() -> None:
    """One row of 10, kernel 1x3, stride 3, r=2: Hy=3, P=2, oy=1, ox=ceil((12-10)/2)=1; rows: ox=0."""
    geometry = Geometry(1, 1, 2, 1, 10, (1, 3), (1, 2), (1, 3))
    assert (geometry.cols.out_offset, geometry.cols.in_offset) == (1, 1)
    x = torch.arange(10.0).view(1, 1, 1, 10)
    weight = torch.tensor([[1.0, 2, 3], [0, 0, -1]]).view(2, 1, 1, 3)  # W~ = 6, -1
    grad_y = torch.tensor([[1.0, 2, 4], [10, 20, 60]]).view(1, 2, 1, 3)  # g~ = (1, 3), (10, 40)
    grad_x, grad_w, grad_b = reference.backward(grad_y, reference.filter_input(x, geometry), weight, geometry)
    assert grad_x is not None
    assert grad_x.flatten().tolist() == [6 - 10] * 5 + [18 - 40] * 5
    assert grad_w is not None
    assert grad_w[:, 0, 0, 0].tolist() == [10 * 1 + 35 * 3, 10 * 10 + 35 * 40]
    assert grad_b is not None
    assert grad_b.tolist() == [7, 90]


def test_by_hand_in_the_dilated_case() -> None:
    """One row of 8 of kernel (1, 3) at dilation (2, 2), r=2: g~ is convolved with W turned round, at dilation 1."""
    geometry = Geometry(1, 1, 1, 8, 8, (1, 3), 2, 1, (0, 2), 2)
    assert geometry.dilated
    weight = torch.tensor([1.0, 10, 100]).view(1, 1, 1, 3)
    grad_y = torch.zeros(1, 1, 8, 8)
    grad_y[0, 0, 0:2, 2:4] = 4.0  # g~ = 4 in patch (0, 1)
    grad_x, _, _ = reference.backward(grad_y, None, weight, geometry, (True, False, False))
    assert grad_x is not None
    # y[q] = sum_b W[b] x[q + b - 1] in patches, so x[0] meets W[0], and x[2] meets W[2].
    assert grad_x[0, 0, 0, ::2].tolist() == [4, 40, 400, 0]
    assert grad_x[0, 0, 2:].abs().max() == 0


@QUICK
@given(geometry=geometries(smallest_n=1), seed=SEEDS)
def test_linear_in_grad_y(geometry: Geometry, seed: int) -> None:
    x, weight, _, first = tensors(geometry, seed)
    second = tensors(geometry, seed + 1)[3]
    filtered_x = reference.filter_input(x, geometry)
    combined = reference.backward(2 * first - 3 * second, filtered_x, weight, geometry)
    parts = zip(*(reference.backward(g, filtered_x, weight, geometry) for g in (first, second)), strict=True)
    for actual, (a, b) in zip(combined, parts, strict=True):
        torch.testing.assert_close(actual, 2 * a - 3 * b, rtol=1e-10, atol=1e-10)


@QUICK
@given(
    n=st.integers(1, 3), h=st.integers(1, 6), w=st.integers(1, 6), groups=st.integers(1, 3), a=st.integers(1, 3),
    b=st.integers(1, 3), dilation=st.integers(1, 3), seed=SEEDS,
)  # fmt: skip
def test_true_gradient_where_nothing_is_filtered(n, h, w, groups, a, b, dilation, seed) -> None:
    """r=1, k=1, s=1: every patch is a pixel, so these are the gradients that autograd computes."""
    geometry = Geometry(n, groups * a, groups * b, h, w, 1, 1, 1, 0, dilation, groups)
    x, weight, bias, grad_y = tensors(geometry, seed)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    expected = torch.autograd.grad(F.conv2d(x, weight, bias, groups=groups, dilation=dilation), leaves, grad_y)
    actual = reference.backward(grad_y, reference.filter_input(x, geometry), weight, geometry)
    for ours, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-11)


# Half a unit in the last place: what rounding a result to the dtype costs at most.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@QUICK
@given(geometry=geometries(smallest_n=1), seed=SEEDS)
def test_other_dtypes(dtype: torch.dtype, geometry: Geometry, seed: int) -> None:
    """Sums as good as float32's, then one rounding; inputs are rounded to the dtype before both computations."""
    x, weight, _, grad_y = tensors(geometry, seed, dtype)

    def exact(x: Tensor, weight: Tensor, grad_y: Tensor) -> tuple[Tensor, ...]:
        x, weight, grad_y = x.double(), weight.double(), grad_y.double()
        sums = reference.filter_input(x, geometry)
        return sums, *(grad for grad in reference.backward(grad_y, sums, weight, geometry) if grad is not None)

    sums = reference.filter_input(x, geometry)
    actual = (sums, *reference.backward(grad_y, sums, weight, geometry))
    magnitudes = exact(x.abs(), weight.abs(), grad_y.abs())  # of the terms, which may cancel in the result
    for ours, expected, magnitude in zip(actual, exact(x, weight, grad_y), magnitudes, strict=True):
        assert ours is not None
        assert ours.dtype == (torch.float32 if ours is sums else dtype)
        rounding = ROUNDING[ours.dtype]
        allowed = rounding * expected.abs() + 3e-6 * magnitude + 1e-7  # the last for float16's smallest numbers
        assert bool(((ours.double() - expected).abs() <= allowed).all())


def test_sixteen_bits_are_summed_in_float32() -> None:
    """1000 ones: a bfloat16 sum of ones stops at 256."""
    geometry = Geometry(1, 1, 1, 25, 40, 1, (25, 40))
    ones = torch.ones(1, 1, 25, 40, dtype=torch.bfloat16)
    assert reference.filter_input(ones, geometry).item() == 1000
    grad_b = reference.backward(
        ones, None, torch.ones(1, 1, 1, 1, dtype=torch.bfloat16), geometry, (False, False, True)
    )[2]
    assert grad_b is not None
    assert grad_b.item() == 1000


@pytest.mark.parametrize("memory_format", [torch.channels_last, None])
def test_strides_do_not_matter(memory_format: torch.memory_format | None) -> None:
    geometry = Geometry(2, 3, 4, 7, 6, 3, 2, 1, 1)
    x, weight, _, grad_y = tensors(geometry, 0)
    expected = reference.backward(grad_y, reference.filter_input(x, geometry), weight, geometry)
    if memory_format is not None:
        x, weight, grad_y = (t.contiguous(memory_format=memory_format) for t in (x, weight, grad_y))
    else:
        x, weight, grad_y = (torch.stack([t, t], dim=-1)[..., 0] for t in (x, weight, grad_y))
    actual = reference.backward(grad_y, reference.filter_input(x, geometry), weight, geometry)
    for ours, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 0}, "patch must be at least 1, got 0"),
        ({"patch": (2, -1)}, r"patch must be at least 1, got \(2, -1\)"),
        ({"patch": 1.5}, "patch must be one integer or a pair of integers, got 1.5"),
        ({"patch": (1, 2, 3)}, "patch must be one integer or a pair"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"padding": -1}, "padding must be at least 0, got -1"),
        ({"dilation": 0}, "dilation must be at least 1, got 0"),
        ({"n": -1}, "n must be an integer of at least 0, got -1"),
        ({"h": 0}, "h must be an integer of at least 1, got 0"),
        ({"groups": 2}, "groups=2 must divide ci=3"),
        ({"kernel": 9}, "a 9x9 kernel .* does not fit into the 6x7 input"),
    ],
)
def test_bad_geometries(change: dict[str, object], message: str) -> None:
    good = {"n": 1, "ci": 3, "co": 4, "h": 6, "w": 7, "kernel": 3, "patch": 2}
    Geometry(**good)  # type: ignore[arg-type]
    with pytest.raises(GeometryError, match=message) as caught:
        Geometry(**(good | change))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@QUICK
@given(geometry=geometries())
def test_geometry_survives_json_and_has_its_own_key(geometry: Geometry) -> None:
    again = Geometry(**geometry.to_dict())
    assert again == geometry
    assert hash(again) == hash(geometry)
    assert again.key == geometry.key
    other = Geometry(**(geometry.to_dict() | {"patch": [geometry.patch[0] + 1, geometry.patch[1]]}))
    assert other != geometry
    assert other.key != geometry.key


# Results are copies, and what is kept between calls serves later ones


@settings(max_examples=150)
@given(geometry=geometries(smallest_n=1), seed=SEEDS)
def test_results_are_contiguous_copies(geometry: Geometry, seed: int) -> None:
    """Patches of one pixel, say, leave nothing to compute; what comes in must still stay as it is."""
    x, weight, _, grad_y = tensors(geometry, seed)
    versions = [t._version for t in (x, weight, grad_y)]
    sums, means = reference.filter_input(x, geometry), reference.filter_grad(grad_y, geometry)
    grads = reference.backward(grad_y, sums, weight, geometry)
    assert [t._version for t in (x, weight, grad_y)] == versions
    inputs = {t.untyped_storage().data_ptr() for t in (x, weight, grad_y)}
    for result in (sums, means, *grads):
        assert result is not None
        assert result.untyped_storage().data_ptr() not in inputs
    assert all(grad is not None and grad.is_contiguous() for grad in grads)


@settings(max_examples=200)
@given(geometry=geometries(smallest_n=1, largest_out=40), seed=SEEDS)
def test_expansion_of_small_and_large_maps(geometry: Geometry, seed: int) -> None:
    """What is kept serves small maps only, and nothing that is transformed: both ways are the definition."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.randn(geometry.n, geometry.ci, *geometry.grid, generator=generator, dtype=torch.float64)
    expected = torch.zeros(geometry.x_shape, dtype=torch.float64)
    for i in range(geometry.grid[0]):
        for j in range(geometry.grid[1]):
            rows, cols = geometry.rows.in_range(i), geometry.cols.in_range(j)
            expected[:, :, rows.start : rows.stop, cols.start : cols.stop] = grid[:, :, i : i + 1, j : j + 1]
    for actual in (
        reference.expand(grid, geometry),
        torch.vmap(lambda t: reference.expand(t, geometry))(grid[None])[0],
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@settings(max_examples=60)
@given(geometry=geometries(smallest_n=1), seed=SEEDS, value=st.sampled_from([float("inf"), float("nan")]))
def test_what_is_not_finite_stays_in_its_patch(geometry: Geometry, seed: int, value: float) -> None:
    x, _, _, grad_y = tensors(geometry, seed)
    for t, run in ((x, reference.filter_input), (grad_y, reference.filter_grad)):
        before = run(t, geometry)
        t.view(-1)[seed % t.numel()] = value
        after = run(t, geometry)
        finite = after.isfinite()
        assert int((~finite).sum()) <= 1
        torch.testing.assert_close(after[finite], before[finite])
    grid = torch.randn(1, geometry.ci, *geometry.grid, generator=torch.Generator().manual_seed(seed))
    finite = reference.expand(grid, geometry)
    grid[0, 0, 0, 0] = value
    row, col = geometry.rows.in_range(0), geometry.cols.in_range(0)
    changed = reference.expand(grid, geometry)
    assert int((~changed.isfinite()).sum()) == len(row) * len(col)
    torch.testing.assert_close(changed[0, 1:], finite[0, 1:])


def in_fake_tensors(run: Callable[..., object], *given: Tensor) -> None:
    with FakeTensorMode() as mode:
        run(*(mode.from_tensor(t) for t in given))


def in_inference_mode(run: Callable[..., object], *given: Tensor) -> None:
    with torch.inference_mode():
        run(*(t.clone() for t in given))


def in_grad(run: Callable[..., tuple[Tensor, ...]], *given: Tensor) -> None:
    torch.func.grad(lambda *at: sum(t.sum() for t in run(*at)))(*given)


def in_vmap(run: Callable[..., tuple[Tensor, ...]], *given: Tensor) -> None:
    torch.vmap(run)(*(t[None] for t in given))


@pytest.mark.parametrize("first", [in_fake_tensors, in_inference_mode, in_grad, in_vmap])
@pytest.mark.parametrize("geometry", [Geometry(2, 3, 4, 7, 6, 3, 2, 1, 1), Geometry(1, 2, 2, 9, 9, 3, 4, 2, 0, 1, 2)])
def test_whoever_comes_first_leaves_nothing_to_others(first: Callable[..., None], geometry: Geometry) -> None:
    x, weight, _, grad_y = tensors(geometry, 0)

    def run(x: Tensor, weight: Tensor, grad_y: Tensor) -> tuple[Tensor, ...]:
        return reference.backward(grad_y, reference.filter_input(x, geometry), weight, geometry)  # type: ignore[return-value]

    reference._kept_counts.cache_clear()
    reference._kept_patches.cache_clear()
    expected = run(x, weight, grad_y)
    reference._kept_counts.cache_clear()
    reference._kept_patches.cache_clear()
    first(run, x, weight, grad_y)
    leaves = [t.requires_grad_() for t in (x, weight, grad_y)]
    actual = run(*leaves)
    torch.autograd.grad(sum(t.square().sum() for t in actual), leaves)  # keeps what indexes for its backward pass
    torch.testing.assert_close(actual, expected)

"""gf_tvm.functional.conv2d and its operators, without a library and with one made of the reference."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_library import FakeLibrary, loaded
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import NEEDS, SEEDS, geometries, saved_tensors, tensors
from torch import Tensor

import gf_tvm
from gf_tvm.core import reference
from gf_tvm.core.geometry import Geometry
from gf_tvm.errors import BundleError, GeometryError, GfTvmError
from gf_tvm.ops import dispatch
from gf_tvm.ops.functional import conv2d

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PLAIN = Geometry(2, 3, 4, 8, 7, 3, 2, 1, 1)

pytestmark = pytest.mark.usefixtures("one_thread")


def call(geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None, library: Any = None) -> Tensor:
    g = geometry
    return conv2d(x, weight, bias, g.stride, g.padding, g.dilation, g.groups, g.patch, library)


def exact(geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)


def expected_grads(geometry: Geometry, x: Tensor, weight: Tensor, grad_y: Tensor, needs: Any = (True,) * 3) -> Any:
    x, weight = x.detach(), weight.detach()
    return reference.backward(grad_y, reference.filter_input(x, geometry), weight, geometry, needs)


@pytest.fixture
def library() -> Iterator[FakeLibrary]:
    library = FakeLibrary()
    with loaded(library):
        yield library


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialised memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert bool(torch.empty(3).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def forgetful() -> Iterator[None]:
    """As in a new process, where no fallback has been reported yet."""
    before = set(dispatch._said)
    dispatch._said.clear()
    yield
    dispatch._said.clear()
    dispatch._said.update(before)


@pytest.mark.usefixtures("poisoned")
@settings(max_examples=400)
@given(
    geometry=geometries(), seed=SEEDS, needs=NEEDS, dtype=st.sampled_from(DTYPES), with_bias=st.booleans(),
    with_library=st.booleans(), channels_last=st.booleans(),
)  # fmt: skip
def test_forward_is_exact_and_backward_is_the_reference(
    geometry, seed, needs, dtype, with_bias, with_library, channels_last
) -> None:
    x, weight, bias, grad_y = tensors(geometry, seed, dtype)
    expected = expected_grads(geometry, x, weight, grad_y, needs)
    # torch's own conv2d can crash on channels_last maps smaller than the stride (oneDNN, torch 2.13: 1x1 kernel).
    if channels_last and all(size >= max(2, s) for size, s in zip(x.shape[2:], geometry.stride, strict=True)):
        x, weight, grad_y = (t.to(memory_format=torch.channels_last) for t in (x, weight, grad_y))
    leaves = [t.requires_grad_(need) for t, need in zip((x, weight, bias), needs, strict=True)]
    if not with_bias:
        bias = None
    library = FakeLibrary()
    with loaded(library):
        y = call(geometry, x, weight, bias, library if with_library else None)
        torch.testing.assert_close(y, exact(geometry, x, weight, bias), rtol=0, atol=0)
        assert y.requires_grad == any(leaf.requires_grad for leaf in leaves[: 3 if with_bias else 2])
        if y.requires_grad:
            y.backward(grad_y)
    assert with_library or not library.calls
    if with_library and geometry.n and dtype != torch.float64:
        backward = {(1, 1): ["backward"], (1, 0): ["backward_input"], (0, 1): ["backward_weight"], (0, 0): []}
        assert library.called == ["filter_input"] * needs[1] + backward[needs[:2]]
    for leaf, grad, need in zip(leaves, expected, needs, strict=True):
        if need and (with_bias or leaf is not leaves[2]):
            assert leaf.grad is not None
            torch.testing.assert_close(leaf.grad, grad)
        else:
            assert leaf.grad is None


# What is kept for the backward pass


@pytest.mark.parametrize("geometry", [PLAIN, Geometry(2, 6, 6, 9, 9, 3, 4, 2, 1, 1, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_library", [False, True])
def test_keeps_filtered_input_and_weight_only(geometry, dtype, with_library, library) -> None:
    x, weight, bias, _ = (t.requires_grad_() for t in tensors(geometry, 0, dtype))
    with saved_tensors() as saved:
        call(geometry, x, weight, bias, library if with_library else None)
    sums, kept = saved
    assert kept is weight
    assert sums.shape == geometry.saved_shape
    assert sums.dtype == torch.float32
    assert sums.untyped_storage().nbytes() == 4 * sums.numel()  # not a view of something larger


@pytest.mark.parametrize("needs", [(True, False, True), (True, False, False), (False, False, True)])
def test_frozen_weight_keeps_nothing_of_x(needs, library) -> None:
    x, weight, bias, _ = tensors(PLAIN, 0, torch.float32)
    for tensor, need in zip((x, weight, bias), needs, strict=True):
        tensor.requires_grad_(need)
    with saved_tensors() as saved:
        call(PLAIN, x, weight, bias, library)
    assert sum(t.numel() for t in saved if t is not weight) == 0
    assert library.calls == []


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_nothing_is_filtered(mode, library) -> None:
    x, weight, bias, _ = (t.requires_grad_() for t in tensors(PLAIN, 0, torch.float32))
    with mode(), saved_tensors() as saved:
        y = call(PLAIN, x, weight, bias, library)
    assert not y.requires_grad
    assert saved == []
    assert library.calls == []
    torch.testing.assert_close(y, exact(PLAIN, x, weight, bias).detach(), rtol=0, atol=0)


# What a kernel is given


def test_contiguous_tensors_reach_the_kernels_uncopied(library) -> None:
    x, weight, _, grad_y = tensors(PLAIN, 0, torch.float32)
    x.requires_grad_()
    weight.requires_grad_()
    with saved_tensors() as saved:
        y = call(PLAIN, x, weight, None, library)
    grads = torch.autograd.grad(y, (x, weight), grad_y)
    sums = saved[0].data_ptr()
    (_, forward), (_, backward) = library.calls
    assert forward == [x.data_ptr(), sums]
    assert backward[:5] == [grad_y.data_ptr(), sums, weight.data_ptr(), *(grad.data_ptr() for grad in grads)]


@pytest.mark.parametrize("images", [1, 2])
def test_slices_reach_the_kernels_uncopied_if_they_are_aligned(images, library) -> None:
    """An image takes 32 bytes more than a multiple of 64, so that a slice is aligned after every second one only."""
    geometry = Geometry(2, 3, 2, 8, 7, 1, 2)
    x, weight, _, grad_y = tensors(geometry, 0, torch.float32)
    expected = expected_grads(geometry, x, weight, grad_y)
    x = torch.cat([x[:images], x, x])[images : images + 2].requires_grad_()
    assert x.is_contiguous()
    assert (x.data_ptr() % 64 == 0) == (images == 2)
    call(geometry, x, weight.requires_grad_(), None, library).backward(grad_y)
    assert (library.calls[0][1][0] == x.data_ptr()) == (images == 2)
    for leaf, grad in zip((x, weight), expected[:2], strict=True):
        torch.testing.assert_close(leaf.grad, grad)


def test_misaligned_tensors_are_copied(library) -> None:
    def misaligned(tensor: Tensor) -> Tensor:
        return torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:].view(tensor.shape)

    x, weight, _, grad_y = tensors(PLAIN, 0, torch.float32)
    expected = expected_grads(PLAIN, x, weight, grad_y)
    x, weight, grad_y = (misaligned(t) for t in (x, weight, grad_y))
    assert all(t.is_contiguous() and t.data_ptr() % 64 == 4 for t in (x, weight, grad_y))
    call(PLAIN, x.requires_grad_(), weight.requires_grad_(), None, library).backward(grad_y)
    assert library.called == ["filter_input", "backward"]
    for leaf, grad in zip((x, weight), expected[:2], strict=True):
        torch.testing.assert_close(leaf.grad, grad)


@pytest.mark.parametrize("with_library", [False, True])
@pytest.mark.parametrize("change", ["channels_last", "every second column", "expanded"])
def test_other_strides_give_the_same(change, with_library, library) -> None:
    x, weight, bias, grad_y = tensors(PLAIN, 0, torch.float32)
    if change == "expanded":
        grad_y = torch.full_like(grad_y, 0.5)
    expected = expected_grads(PLAIN, x, weight, grad_y)
    if change == "channels_last":
        x, weight, grad_y = (t.to(memory_format=torch.channels_last) for t in (x, weight, grad_y))
    elif change == "every second column":
        x, weight, grad_y = (torch.stack([t, t], dim=-1)[..., 0] for t in (x, weight, grad_y))
    else:
        grad_y = torch.tensor(0.5).expand_as(grad_y)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = call(PLAIN, x, weight, bias, library if with_library else None)
    assert y.is_contiguous(memory_format=torch.channels_last) == (change == "channels_last")
    y.backward(grad_y)
    for leaf, grad in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, grad)
    assert len(library.calls) == (2 if with_library else 0)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("padding", [1, 0])
def test_grad_x_is_zeroed_only_where_patches_leave_pixels_out(padding, library, monkeypatch) -> None:
    geometry = Geometry(1, 2, 2, 8, 8, 3, 2, 1, padding)
    assert geometry.covers_input == (padding == 1)
    found = []
    run = type(library.find("backward", geometry, "float32")).__call__

    def spy(kernel: Any, *tensors: Tensor) -> None:
        if kernel.name == "backward":
            found.append(tensors[3].clone())
        run(kernel, *tensors)

    monkeypatch.setattr("fake_library.FakeKernel.__call__", spy)
    x, weight, _, grad_y = tensors(geometry, 0, torch.float32)
    call(geometry, x.requires_grad_(), weight.requires_grad_(), None, library).backward(grad_y)
    assert len(found) == 1
    assert bool((found[0].isnan() if geometry.covers_input else found[0] == 0).all())
    torch.testing.assert_close(x.grad, expected_grads(geometry, x, weight, grad_y)[0])


# Which kernel runs

NEEDED = {(True, True): "backward", (True, False): "backward_input", (False, True): "backward_weight"}


@pytest.mark.parametrize("needs", NEEDED)
@pytest.mark.parametrize(
    "has",
    [(), ("backward",), ("backward_input",), ("backward_weight",), ("backward_input", "backward_weight", "backward")],
)
def test_exact_variant_else_superset_else_reference(has, needs) -> None:
    library = FakeLibrary(("filter_input", *has))
    x, weight, bias, grad_y = tensors(PLAIN, 0, torch.float32)
    leaves = [x.requires_grad_(needs[0]), weight.requires_grad_(needs[1]), bias.requires_grad_()]
    with loaded(library):
        call(PLAIN, x, weight, bias, library).backward(grad_y)
    wanted = NEEDED[needs]
    if wanted not in has:
        # Without x~, which is not kept for a frozen weight, "backward" cannot stand in.
        wanted = "backward" if "backward" in has and needs[1] else ""
    assert library.called == ["filter_input"] * needs[1] + [wanted] * bool(wanted)
    for leaf, grad, need in zip(leaves, expected_grads(PLAIN, x, weight, grad_y), (*needs, True), strict=True):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad, grad)


@pytest.mark.parametrize("has", [("filter_input",), ("backward",)])
@pytest.mark.parametrize("geometry", [PLAIN, Geometry(2, 6, 6, 9, 9, 3, 4, 2, 1, 1, 6)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_kernels_and_reference_can_share_a_layer(has, geometry, memory_format) -> None:
    """x~ is laid out alike by both."""
    library = FakeLibrary(has)
    x, weight, _, grad_y = (
        t.to(memory_format=memory_format) if t.dim() == 4 else t for t in tensors(geometry, 0, torch.float32)
    )
    with loaded(library):
        call(geometry, x.requires_grad_(), weight.requires_grad_(), None, library).backward(grad_y)
    assert library.called == list(has)
    for leaf, grad in zip((x, weight), expected_grads(geometry, x, weight, grad_y)[:2], strict=True):
        torch.testing.assert_close(leaf.grad, grad)


def test_an_unloaded_library_is_an_error() -> None:
    x, weight, _, _ = tensors(PLAIN, 0, torch.float32)
    with pytest.raises(BundleError, match="loaded"):
        call(PLAIN, x, weight.requires_grad_(), None, FakeLibrary(digest="nowhere"))


# Saying that the reference runs


def steps(library: Any, dtype: torch.dtype, n: int = 2, times: int = 3) -> list[str]:
    geometry = Geometry(n, 3, 4, 8, 7, 3, 2, 1, 1)
    x, weight, _, _ = (t.requires_grad_() for t in tensors(geometry, 0, dtype))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            call(geometry, x, weight, None, library).sum().backward()
    assert {warning.category for warning in caught} <= {gf_tvm.FallbackWarning}
    return [str(warning.message) for warning in caught]


@pytest.mark.usefixtures("forgetful")
def test_says_once_that_there_is_no_library() -> None:
    (message,) = steps(None, torch.float32)
    assert "no library was given" in message
    assert "\n" not in message
    assert steps(None, torch.float64, n=1) == []


@pytest.mark.usefixtures("forgetful")
def test_says_once_for_each_workload_that_a_library_lacks(library) -> None:
    assert steps(library, torch.float32) == []
    first, second = steps(library, torch.float64)
    assert "lacks filter_input n2_ci3" in first
    assert "float64" in first
    assert "lacks backward n2_ci3" in second
    assert steps(library, torch.float64) == []
    assert len(steps(library, torch.float64, n=1)) == 2
    assert steps(library, torch.float64, n=0) == []
    bare = FakeLibrary(("filter_input",), digest="bare")
    with loaded(bare):
        assert len(steps(bare, torch.float32)) == 1


@pytest.mark.usefixtures("forgetful")
def test_fallback_as_an_error_stays_one() -> None:
    x, weight, _, _ = tensors(PLAIN, 0, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", gf_tvm.FallbackWarning)
        for _ in range(2):
            with pytest.raises(gf_tvm.FallbackWarning):
                call(PLAIN, x, weight.requires_grad_(), None)


# Like torch's conv2d


@pytest.mark.parametrize("padding", ["same", "valid", 1, (2, 0)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 4), (4, 3)])
@pytest.mark.parametrize("dilation", [1, 2, (1, 3)])
@pytest.mark.parametrize("batched", [True, False])
def test_padding_and_unbatched_input_as_in_torch(padding, kernel, dilation, batched) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 11, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 2, *kernel, generator=generator, dtype=torch.float64)
    if not batched:
        x = x[0]
    leaves = [t.requires_grad_() for t in (x, weight)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same'")  # torch's remark on uneven padding
        expected = F.conv2d(x, weight, None, 1, padding, dilation, 2)
    y = conv2d(x, weight, None, 1, padding, dilation, 2, patch=2)
    torch.testing.assert_close(y, expected)
    if kernel == (1, 1) and padding in ("same", "valid"):
        y = conv2d(x, weight, None, 1, padding, dilation, 2, patch=1)  # nothing is filtered, so this is exact
        grad_y = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        for ours, true in zip(*(torch.autograd.grad(out, leaves, grad_y) for out in (y, expected)), strict=True):
            torch.testing.assert_close(ours, true)
    else:
        for grad, leaf in zip(torch.autograd.grad(y.sum(), leaves), leaves, strict=True):
            assert grad.shape == leaf.shape


def test_uneven_same_padding_filters_the_longer_map() -> None:
    x, weight, _, grad_y = tensors(Geometry(1, 1, 1, 7, 6, (2, 4), 2, 1, (0, 1)), 0)
    longer = Geometry(1, 1, 1, 8, 7, (2, 4), 2, 1, (0, 1))
    grad_y = tensors(longer, 0)[3]
    y = conv2d(x.requires_grad_(), weight.requires_grad_(), padding="same", patch=2)
    y.backward(grad_y)
    padded = F.pad(x.detach(), (0, 1, 0, 1))
    grad_x, grad_w, _ = expected_grads(longer, padded, weight, grad_y)
    torch.testing.assert_close(x.grad, grad_x[:, :, :7, :6])
    torch.testing.assert_close(weight.grad, grad_w)


@pytest.mark.parametrize("with_library", [False, True])
@pytest.mark.parametrize("start", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_as_in_torch(dtype, start, with_library, library) -> None:
    x, weight, bias, _ = (t.requires_grad_() for t in tensors(PLAIN, 0, start))
    with torch.autocast("cpu", dtype=dtype):
        expected = exact(PLAIN, x, weight, bias)
        y = call(PLAIN, x, weight, bias, library if with_library else None)
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
        grad_y = tensors(PLAIN, 1, y.dtype)[3]
        y.backward(grad_y)  # inside of autocast, which must not reach the reference's sums
    grads = expected_grads(PLAIN, x.to(y.dtype), weight.to(y.dtype), grad_y)
    for leaf, grad in zip((x, weight, bias), grads, strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == start
        torch.testing.assert_close(leaf.grad, grad.to(start), rtol=0, atol=0)
    assert bool(library.calls) == (with_library and y.dtype != torch.float64)


def test_operator_called_under_autocast_keeps_its_dtype() -> None:
    """Nothing is cast below the operator, or float32 sums would become bfloat16 ones."""
    x, weight, _, grad_y = tensors(PLAIN, 0, torch.float32)
    settings = (PLAIN.stride, PLAIN.padding, PLAIN.dilation, 1, PLAIN.patch, "")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, sums = torch.ops.gf_tvm.conv2d(x, weight, None, *settings, True)
        grads = torch.ops.gf_tvm.conv2d_backward(grad_y, sums, weight, x.shape, *settings, True, True, True)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, exact(PLAIN, x, weight, None))
    for ours, expected in zip(grads, expected_grads(PLAIN, x, weight, grad_y), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("with_library", [False, True])
def test_gradients_accumulate_and_the_graph_can_be_kept(with_library, library) -> None:
    x, weight, _, grad_y = tensors(PLAIN, 0, torch.float32)
    y = call(PLAIN, x.requires_grad_(), weight.requires_grad_(), None, library if with_library else None)
    y.backward(grad_y, retain_graph=True)
    once = weight.grad.clone()
    y.backward(grad_y)
    torch.testing.assert_close(weight.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(grad_y)


def test_one_layer_twice_in_a_graph() -> None:
    x, weight, _, grad_y = tensors(Geometry(1, 3, 3, 8, 8, 3, 2, 1, 1), 0)
    weight.requires_grad_()
    y = conv2d(conv2d(x, weight, padding=1), weight, padding=1)
    y.backward(grad_y)
    geometry = Geometry(1, 3, 3, 8, 8, 3, 2, 1, 1)
    middle = F.conv2d(x, weight.detach(), padding=1)
    grad_middle, second, _ = expected_grads(geometry, middle, weight, grad_y)
    first = expected_grads(geometry, x, weight, grad_middle)[1]
    torch.testing.assert_close(weight.grad, first + second)


def test_weight_changed_before_backward_is_an_error() -> None:
    x, weight, _, _ = tensors(PLAIN, 0)
    y = call(PLAIN, x.requires_grad_(), weight.requires_grad_(), None)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("wanted", [0, 1])
def test_no_second_derivative(wanted) -> None:
    x, weight, _, grad_y = tensors(PLAIN, 0)
    leaves = (x.requires_grad_(), weight.requires_grad_())
    (grad,) = torch.autograd.grad(
        call(PLAIN, x, weight, None), leaves[wanted], grad_y.requires_grad_(), create_graph=True
    )
    with pytest.raises(GfTvmError, match="no second derivative"):
        grad.square().sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 0}, "patch must be at least 1, got 0"),
        ({"patch": (2, -3)}, r"patch must be at least 1, got \(2, -3\)"),
        ({"patch": 2.5}, "patch must be one integer or a pair of integers, got 2.5"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"dilation": "2"}, "dilation must be one integer or a pair of integers, got '2'"),
        ({"padding": -1}, "padding must be at least 0, got -1"),
        ({"padding": "full"}, """padding must be numbers, "valid" or "same", got 'full'"""),
        ({"padding": "same", "stride": 2}, 'padding="same" needs stride 1'),
        ({"groups": 2}, "groups=2 must divide ci=3"),
        ({"groups": 3}, "groups=3 must divide co=4"),
        ({"groups": 0}, "groups must be an integer of at least 1, got 0"),
        (
            {"x": torch.ones(2, 4, 8, 7)},
            r"x has 4 channels, but a weight of shape \(4, 3, 3, 3\) with groups=1 wants 3",
        ),
        ({"x": torch.ones(2, 3, 2, 2), "padding": 0}, "3x3 kernel .* does not fit into the 2x2 input"),
        ({"x": torch.ones(8, 7)}, r"x must be \(n, c, h, w\) or \(c, h, w\), got shape \(8, 7\)"),
        ({"x": torch.ones(1, 1, 3, 8, 7)}, r"got shape \(1, 1, 3, 8, 7\)"),
        ({"weight": torch.ones(4, 3, 3)}, r"weight must have 4 dimensions, got shape \(4, 3, 3\)"),
        ({"bias": torch.ones(4, 1)}, r"bias must have 1 dimensions, got shape \(4, 1\)"),
        ({"bias": torch.ones(3)}, "bias has 3 values for 4 output channels"),
        ({"x": torch.ones(2, 3, 8, 7, dtype=torch.int64)}, "x must have a real floating dtype, got torch.int64"),
        (
            {"x": torch.ones(2, 3, 8, 7, dtype=torch.complex64)},
            "x must have a real floating dtype, got torch.complex64",
        ),
        (
            {"weight": torch.ones(4, 3, 3, 3, dtype=torch.int8)},
            "weight must have a real floating dtype, got torch.int8",
        ),
        ({"weight": torch.ones(4, 3, 3, 3).double()}, "weight is torch.float64, but x is torch.float32"),
        ({"bias": torch.ones(4).half()}, "bias is torch.float16, but x is torch.float32"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("grad", [True, False])
def test_bad_input(change, message, grad) -> None:
    good = {"x": torch.ones(2, 3, 8, 7), "weight": torch.ones(4, 3, 3, 3), "bias": torch.ones(4), "padding": 1}
    with torch.set_grad_enabled(grad):
        conv2d(**good)
        with pytest.raises(GeometryError, match=message) as caught:
            conv2d(**(good | change))
    assert "\n" not in str(caught.value)


def test_backward_operator_refuses_tensors_that_do_not_belong_together() -> None:
    x, weight, _, grad_y = tensors(PLAIN, 0)
    arguments = (x.shape, PLAIN.stride, PLAIN.padding, PLAIN.dilation, 1, PLAIN.patch, "")
    sums = torch.zeros(PLAIN.saved_shape)
    with pytest.raises(GeometryError, match="grad_y must have shape"):
        torch.ops.gf_tvm.conv2d_backward(grad_y[..., 1:], sums, weight, *arguments, True, True, True)
    with pytest.raises(GeometryError, match="grad_W needs x~ of shape"):
        torch.ops.gf_tvm.conv2d_backward(grad_y, sums[:0], weight, *arguments, True, True, True)


def test_two_threads_with_one_library(library) -> None:
    """Each trains a layer of its own; none may see the other's tensors."""
    geometry = Geometry(2, 4, 4, 16, 16, 3, 2, 1, 1)
    failures: list[str] = []
    barrier = threading.Barrier(2)

    def work(seed: int) -> None:
        x, weight, _, grad_y = tensors(geometry, seed, torch.float32)
        expected = expected_grads(geometry, x, weight, grad_y)
        x.requires_grad_()
        weight.requires_grad_()
        barrier.wait()
        for _ in range(50):
            grads = torch.autograd.grad(call(geometry, x, weight, None, library), (x, weight), grad_y)
            if not all(torch.allclose(a, b, atol=1e-4) for a, b in zip(grads, expected, strict=False)):
                failures.append(f"thread {seed}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(library.calls) == 200

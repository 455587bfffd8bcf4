"""Transforms of torch.func and forward-mode AD: exact tangents, filtered gradients, no second derivatives."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_library import FakeLibrary, loaded
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import NEEDS, SEEDS, geometries, tensors
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, linearize, vjp, vmap

import gf_tvm
from gf_tvm.core import reference, verify
from gf_tvm.core.geometry import Geometry
from gf_tvm.errors import DerivativeError
from gf_tvm.ops.functional import conv2d

PLAIN = Geometry(2, 3, 4, 8, 7, 3, 2, 1, 1)
DEPTHWISE = Geometry(2, 3, 3, 6, 6, 3, 4, 1, 1, 1, 3)
SMALL = st.deferred(lambda: geometries(largest_out=6))

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch's own formulas for tangents are in TorchScript.
    pytest.mark.filterwarnings("ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning"),
]


def filtered(geometry: Geometry, library: Any = None) -> Callable[..., Tensor]:
    g = geometry
    return lambda *leaves: conv2d(*leaves, g.stride, g.padding, g.dilation, g.groups, g.patch, library)


def exact(geometry: Geometry) -> Callable[..., Tensor]:
    return lambda *leaves: F.conv2d(*leaves, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)


def reference_grads(geometry: Geometry, x: Tensor, weight: Tensor, grad_y: Tensor) -> tuple[Tensor, ...]:
    return reference.backward(grad_y, reference.filter_input(x, geometry), weight, geometry)


# Tangents


def tangent_by_jvp(run: Callable[..., Tensor], leaves: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    return jvp(run, tuple(leaves), tuple(tangents))[1]


def tangent_by_dual_numbers(run: Callable[..., Tensor], leaves: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    with forward_ad.dual_level():
        dual = run(*(forward_ad.make_dual(leaf, tangent) for leaf, tangent in zip(leaves, tangents, strict=True)))
        tangent = forward_ad.unpack_dual(dual).tangent
        return torch.zeros_like(dual) if tangent is None else tangent


@settings(max_examples=150)
@given(
    geometry=SMALL, seed=SEEDS, which=NEEDS, needs=NEEDS, recorded=st.booleans(), with_bias=st.booleans(),
    by=st.sampled_from([tangent_by_jvp, tangent_by_dual_numbers]),
)  # fmt: skip
def test_tangents_are_those_of_a_convolution(geometry, seed, which, needs, recorded, with_bias, by) -> None:
    leaves, tangents = (list(tensors(geometry, s)[: 2 + with_bias]) for s in (seed, seed + 1))
    for leaf, need in zip(leaves, needs, strict=False):
        leaf.requires_grad_(need)
    which = [at for at, wanted in enumerate(which[: len(leaves)]) if wanted] or [0]

    def of(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def some(*chosen: Tensor) -> Tensor:
            given = list(leaves)
            for at, leaf in zip(which, chosen, strict=True):
                given[at] = leaf
            return run(*given, *[None] * (3 - len(given)))

        return some

    chosen, directions = ([what[at] for at in which] for what in (leaves, tangents))
    with torch.set_grad_enabled(recorded):
        expected = by(of(exact(geometry)), chosen, directions)
        torch.testing.assert_close(by(of(filtered(geometry)), chosen, directions), expected)


@settings(max_examples=40)
@given(geometry=SMALL, seed=SEEDS)
def test_tangents_of_tangents(geometry, seed) -> None:
    leaves, first, second = (tensors(geometry, seed + s)[:3] for s in range(3))

    def twice(run: Callable[..., Tensor]) -> Tensor:
        return jvp(lambda *at: jvp(run, at, first)[1], leaves, second)[1]

    torch.testing.assert_close(twice(filtered(geometry)), twice(exact(geometry)))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # by linearize, of any autograd function
def test_jacfwd_and_linearize_are_exact() -> None:
    leaves, tangents = (tensors(PLAIN, s)[:3] for s in (0, 1))
    torch.testing.assert_close(*(jacfwd(run(PLAIN), (0, 1, 2))(*leaves) for run in (filtered, exact)))
    y, linear = linearize(filtered(PLAIN), *leaves)
    torch.testing.assert_close(y, exact(PLAIN)(*leaves))
    torch.testing.assert_close(linear(*tangents), jvp(exact(PLAIN), leaves, tangents)[1])


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("second", [0, 1, 2])
def test_jacfwd_twice_is_exact(first, second) -> None:
    geometry = Geometry(1, 2, 2, 4, 3, 2, 2)
    leaves = tensors(geometry, 0)[:3]

    def twice(run: Callable[..., Tensor]) -> Tensor:
        return jacfwd(jacfwd(lambda *at: run(*at).sin(), first), second)(*leaves)

    torch.testing.assert_close(twice(filtered(geometry)), twice(exact(geometry)))


def test_gradients_are_filtered_inside_a_dual_level() -> None:
    x, weight, _, grad_y = tensors(PLAIN, 0)
    with forward_ad.dual_level():
        y = filtered(PLAIN)(forward_ad.make_dual(x.requires_grad_(), torch.ones_like(x)), weight, None)
        with forward_ad._set_fwd_grad_enabled(False):
            (grad_x,) = torch.autograd.grad(y, x, grad_y)
    torch.testing.assert_close(grad_x, reference_grads(PLAIN, x.detach(), weight, grad_y)[0])


def test_a_dual_level_keeps_nothing_of_x() -> None:
    x, weight, _, _ = tensors(PLAIN, 0)
    with forward_ad.dual_level():
        y = filtered(PLAIN)(x, weight.requires_grad_(), None)
    alive = weakref.ref(x)
    del x
    gc.collect()
    assert y.grad_fn is not None
    assert alive() is None


# Gradients


@settings(max_examples=60)
@given(geometry=SMALL, seed=SEEDS, dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_vjp_and_grad_are_filtered(geometry, seed, dtype) -> None:
    x, weight, bias, grad_y = tensors(geometry, seed, dtype)
    expected = reference_grads(geometry, x, weight, grad_y)
    library = FakeLibrary()
    with loaded(library):
        run = filtered(geometry, library)
        y, pull = vjp(run, x, weight, bias)
        assert not y.requires_grad
        torch.testing.assert_close(y, exact(geometry)(x, weight, bias), rtol=0, atol=0)
        torch.testing.assert_close(pull(grad_y), expected)
        torch.testing.assert_close(grad(lambda *at: (run(*at) * grad_y).sum(), (0, 1, 2))(x, weight, bias), expected)
    if geometry.n and dtype != torch.float64:
        assert library.called == ["filter_input", "backward"] * 2


@st.composite
def mapped(draw: st.DrawFn) -> tuple[int | None, ...]:
    """in_dims for x, weight, bias and grad_y; one of them is mapped at least."""
    dims = [draw(st.none() | st.integers(0, rank)) for rank in (4, 4, 1, 4)]
    return (*dims[:3], 0) if all(dim is None for dim in dims) else tuple(dims)


@settings(max_examples=150)
@given(geometry=SMALL, seed=SEEDS, in_dims=mapped(), size=st.integers(1, 3), needs=NEEDS)
def test_vmap_is_one_by_one(geometry, seed, in_dims, size, needs) -> None:
    """Forward passes, gradients and tangents, with and without autograd around the mapping."""
    many = [tensors(geometry, seed + i) for i in range(size)]
    given = [
        group[0] if dim is None else torch.stack(group, dim)
        for group, dim in zip(zip(*many, strict=True), in_dims, strict=True)
    ]
    wanted = tuple(at for at, need in enumerate(needs) if need) or (0,)
    run = filtered(geometry)

    def gradients(*at: Tensor) -> tuple[Tensor, ...]:
        return grad(lambda *leaves: (run(*leaves) * at[3]).sum(), wanted)(*at[:3])

    def tangent(*at: Tensor) -> Tensor:
        return jvp(run, at[:3], tuple(t.flip(0) for t in at[:3]))[1]

    for function in (gradients, tangent, lambda *at: run(*at[:3])):
        ours = vmap(function, in_dims)(*given)
        singly = [
            function(*(t if dim is None else t.select(dim, i) for t, dim in zip(given, in_dims, strict=True)))
            for i in range(size)
        ]
        if not isinstance(ours, tuple):
            ours, singly = (ours,), [(result,) for result in singly]
        for result, group in zip(ours, zip(*singly, strict=True), strict=True):
            torch.testing.assert_close(result, torch.stack(group))

    def total(*leaves: Tensor) -> Tensor:  # autograd around vmap
        dims = (*in_dims[:3], in_dims[3])
        return vmap(lambda *at: (run(*at[:3]) * at[3]).sum(), dims)(*leaves, given[3]).sum()

    def summed(*leaves: Tensor) -> Tensor:
        return sum(
            (run(*(t if dim is None else t.select(dim, i) for t, dim in zip(leaves, in_dims, strict=False)))
             * (given[3] if in_dims[3] is None else given[3].select(in_dims[3], i))).sum()
            for i in range(size)
        )  # fmt: skip

    leaves = [t.requires_grad_() for t in given[:3]]
    expected = torch.autograd.grad(summed(*leaves), leaves)
    torch.testing.assert_close(torch.autograd.grad(total(*leaves), leaves), expected)
    torch.testing.assert_close(grad(total, (0, 1, 2))(*leaves), expected)


def test_nested_maps() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *PLAIN.x_shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, *PLAIN.weight_shape, generator=generator, dtype=torch.float64)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return filtered(PLAIN)(x, weight, None).square().sum()

    ours = vmap(vmap(grad(loss, (0, 1))), (0, None))(x, weight)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(tuple(t[i, j] for t in ours), grad(loss, (0, 1))(x[i, j], weight[j]))


@pytest.mark.parametrize("geometry", [PLAIN, DEPTHWISE])
def test_jacrev_has_filtered_rows(geometry) -> None:
    x, weight, bias, grad_y = tensors(geometry, 0)
    ours = jacrev(filtered(geometry), (0, 1, 2))(x, weight, bias)
    for jacobian, expected in zip(ours, reference_grads(geometry, x, weight, grad_y), strict=True):
        torch.testing.assert_close(torch.tensordot(grad_y, jacobian, dims=4), expected)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_many_cotangents_at_once(needs) -> None:
    x, weight, _, _ = tensors(PLAIN, 0)
    many = torch.stack([tensors(PLAIN, seed)[3] for seed in range(3)])
    leaves = [leaf.requires_grad_() for leaf, need in zip((x, weight), needs, strict=True) if need]
    y = filtered(PLAIN)(x, weight, None)
    ours = torch.autograd.grad(y, leaves, many, is_grads_batched=True, retain_graph=True)
    for i, grad_y in enumerate(many):
        torch.testing.assert_close(tuple(t[i] for t in ours), torch.autograd.grad(y, leaves, grad_y, retain_graph=True))


def test_gradients_of_each_sample_of_a_model() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3, padding=1, groups=4)
    ).double()
    gf_tvm.filter_model(model, 2, last=2)
    images = tensors(Geometry(5, 3, 1, 8, 8, 1, 1), 0)[0]
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, parameters, image[None]).square().sum()

    ours = vmap(grad(loss), (None, 0))({name: p.detach() for name, p in parameters.items()}, images)
    for i, image in enumerate(images):
        expected = torch.autograd.grad(loss(parameters, image), list(parameters.values()))
        torch.testing.assert_close([ours[name][i] for name in parameters], list(expected))


@settings(max_examples=50)
@given(geometry=SMALL, seed=SEEDS)
def test_the_operators_x_sums_have_a_gradient(geometry, seed) -> None:
    x, weight, _, _ = tensors(geometry, seed)
    arguments = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups, geometry.patch, "", True)
    _, saved = torch.ops.gf_tvm.conv2d(x.requires_grad_(), weight, None, *arguments)
    direction = torch.randn(saved.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = verify.to_saved(reference.filter_input(x, geometry), geometry)
    torch.testing.assert_close(*(torch.autograd.grad(sums, x, direction)[0] for sums in (saved, expected)))


# Second derivatives


def losses(geometry: Geometry) -> dict[str, Callable[..., Tensor]]:
    """A loss in which y's gradient depends on x and weight, and one in which it is constant."""
    return {
        "curved": lambda *leaves: filtered(geometry)(*leaves).square().sum(),
        "linear": lambda *leaves: filtered(geometry)(*leaves).sum(),
    }


def backward_twice(loss: Callable[..., Tensor], first: int, second: int, leaves: Sequence[Tensor]) -> Any:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    (one,) = torch.autograd.grad(loss(*leaves), leaves[first], create_graph=True)
    return torch.autograd.grad(one.sum(), leaves[second], allow_unused=True)[0]


def dual_number_backward(loss: Callable[..., Tensor], first: int, second: int, leaves: Sequence[Tensor]) -> Any:
    with forward_ad.dual_level():
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        given = list(leaves)
        given[second] = forward_ad.make_dual(given[second], torch.ones_like(given[second]))
        (one,) = torch.autograd.grad(loss(*given), leaves[first])
        return forward_ad.unpack_dual(one).tangent


def backward_of_dual_number(loss: Callable[..., Tensor], first: int, second: int, leaves: Sequence[Tensor]) -> Any:
    with forward_ad.dual_level():
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        given = list(leaves)
        given[first] = forward_ad.make_dual(given[first], torch.ones_like(given[first]))
        tangent = forward_ad.unpack_dual(loss(*given)).tangent
        return torch.autograd.grad(tangent, leaves[second], allow_unused=True)[0]


def derivative_of(outer: Any, inner: Any) -> Callable[..., Any]:
    def second_derivative(
        loss: Callable[..., Tensor], first: int, second: int, leaves: Sequence[Tensor]
    ) -> Any:  # fmt: skip
        def by_second(at: Tensor) -> Tensor:
            given = list(leaves)
            given[second] = at

            def by_first(inner_at: Tensor) -> Tensor:
                once_more = list(given)
                once_more[first] = inner_at
                return loss(*once_more)

            return inner(by_first)(given[first]).sum()

        return outer(by_second)(leaves[second])

    return second_derivative


def along_ones(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda at: jvp(function, *ones(at))[1]


def ones(at: Tensor) -> tuple[tuple[Tensor], tuple[Tensor]]:
    """The point and the direction of ones, as jvp takes them."""
    return (at,), (torch.ones_like(at),)


SECOND = {
    "backward of backward": backward_twice,
    "tangent of backward": dual_number_backward,
    "backward of tangent": backward_of_dual_number,
    "grad of grad": derivative_of(grad, grad),
    "jacrev of grad": derivative_of(jacrev, grad),
    "jvp of grad": derivative_of(along_ones, grad),
    "jacfwd of grad": derivative_of(jacfwd, grad),
    "grad of jvp": derivative_of(grad, along_ones),
    "jacrev of jacrev": derivative_of(jacrev, jacrev),
}


@pytest.mark.parametrize("geometry", [PLAIN, DEPTHWISE], ids=["plain", "depthwise"])
@pytest.mark.parametrize("loss", ["curved", "linear"])
@pytest.mark.parametrize("way", SECOND.values(), ids=SECOND)
@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 1), (1, 0), (1, 1), (2, 1)])
def test_second_derivatives_are_refused(way, loss, first, second, geometry) -> None:
    """Except where the first derivative is a constant of what it would be differentiated by."""
    leaves = tensors(geometry, 0)[:3]
    constant = loss == "linear" and (first == second or first == 2)
    if way is SECOND["grad of jvp"] and loss == "curved" and first == second:
        # Of y^2, with a tangent that does not change: twice a gradient, both first ones.
        tangent = jvp(lambda at: exact(geometry)(*leaves[:first], at, *leaves[first + 1 :]), *ones(leaves[first]))[1]
        expected = reference_grads(geometry, *leaves[:2], 2 * tangent)[first]
        torch.testing.assert_close(way(losses(geometry)[loss], first, second, leaves), expected)
    elif constant:
        result = None
        try:
            result = way(losses(geometry)[loss], first, second, leaves)
        except DerivativeError:
            return
        assert result is None or not result.any()
    else:
        with pytest.raises(DerivativeError, match=r"no second derivative.*unfilter_model"):
            way(losses(geometry)[loss], first, second, leaves)


def test_hessian_is_refused() -> None:
    x, weight, bias, _ = tensors(PLAIN, 0)
    with pytest.raises(DerivativeError):
        torch.func.hessian(lambda w: filtered(PLAIN)(x, w, bias).square().sum())(weight)


# Compiled


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_transforms_under_compilation() -> None:
    """They interrupt the graph; what they give stays right."""
    x, weight, bias, _ = tensors(PLAIN, 0)
    many = torch.stack([x, 2 * x])

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return filtered(PLAIN)(x, weight, bias).square().sum()

    for function, arguments in (
        (vmap(grad(loss, (0, 1)), (0, None)), (many, weight)),
        (vmap(loss, (0, None)), (many, weight)),
        (lambda x, weight: jvp(loss, (x, weight), (x, weight))[1], (x, weight)),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(function, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), function(*arguments))
    torch._dynamo.reset()

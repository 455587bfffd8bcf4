"""The operators under opcheck, torch.compile, torch.export and other ways to run a graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fake_library import FakeLibrary, loaded
from strategies import saved_tensors, tensors
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import gf_tvm
from gf_tvm.chains.capture import live
from gf_tvm.core.geometry import Geometry
from gf_tvm.ops.functional import conv2d

GEOMETRIES = {
    "plain": Geometry(2, 3, 4, 8, 7, 3, 2, 1, 1),
    "grouped, strided, negative offset": Geometry(1, 4, 6, 9, 10, (2, 3), (3, 2), (2, 1), 0, 1, 2),
    "depthwise": Geometry(2, 3, 3, 6, 6, 3, 4, 1, 1, 1, 3),
    "dilated case": Geometry(1, 2, 2, 10, 10, 3, 2, 1, 2, 2),
    "one pixel": Geometry(1, 2, 3, 1, 1, 1, 1),
    "empty batch": Geometry(0, 2, 3, 6, 6, 3, 2, 1, 1),
}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch's own modules, imported or run while compiling.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=[False, True], ids=["no library", "library"])
def library(request: pytest.FixtureRequest) -> Iterator[FakeLibrary | None]:
    library = FakeLibrary()
    with loaded(library):
        yield library if request.param else None


def settings_of(geometry: Geometry, library: FakeLibrary | None) -> tuple[Any, ...]:
    g = geometry
    return (
        list(g.stride),
        list(g.padding),
        list(g.dilation),
        g.groups,
        list(g.patch),
        library.digest if library else "",
    )


def check(operator: Any, *variants: tuple[Any, ...]) -> None:
    """opcheck with all of its tests on the first variant of the arguments, and with the cheap ones on the others."""
    torch.library.opcheck(operator.default, variants[0])
    for arguments in variants[1:]:
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize(("dtype", "library"), [(torch.float32, False), (torch.bfloat16, True)], indirect=["library"])
def test_opcheck(geometry: Geometry, dtype: torch.dtype, library: FakeLibrary | None) -> None:
    x, weight, bias, grad_y = tensors(geometry, 0, dtype)
    settings = settings_of(geometry, library)
    _, sums = torch.ops.gf_tvm.conv2d(x, weight, None, *settings, True)
    frozen = (x.clone(), weight.clone(), None, *settings, False)
    trained = (x.requires_grad_(), weight.clone().requires_grad_(), bias.requires_grad_(), *settings, True)
    check(torch.ops.gf_tvm.conv2d, trained, frozen)
    needs = [(True, True, True), (True, False, False), (False, True, True), (False, False, True)]
    arguments = [(grad_y, sums, weight, list(geometry.x_shape), *settings, *need) for need in needs]
    check(torch.ops.gf_tvm.conv2d_backward, *arguments)


@pytest.mark.parametrize("which", ["x", "weight", "x and weight"])
@pytest.mark.parametrize("name", ["plain", "depthwise"])
def test_opcheck_channels_last(name: str, which: str, library: FakeLibrary | None) -> None:
    geometry = GEOMETRIES[name]
    x, weight, bias, grad_y = tensors(geometry, 0, torch.float32)
    if which.startswith("x"):
        x, grad_y = (t.to(memory_format=torch.channels_last) for t in (x, grad_y))
    if which.endswith("weight"):
        weight = weight.to(memory_format=torch.channels_last)
    settings = settings_of(geometry, library)
    _, sums = torch.ops.gf_tvm.conv2d(x, weight, None, *settings, True)
    arguments = (grad_y, sums, weight, list(geometry.x_shape), *settings, True, True, True)
    check(torch.ops.gf_tvm.conv2d_backward, arguments)
    check(torch.ops.gf_tvm.conv2d, (x.requires_grad_(), weight.clone().requires_grad_(), bias, *settings, True))


def small_model(library: FakeLibrary | None) -> nn.Module:
    """Every way a layer can be set up that takes a path of its own while it is traced."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8),
        nn.Conv2d(8, 8, (2, 3), padding="same", bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
    )
    return gf_tvm.filter_model(model, patch=2, layers=["2", "3", "5", "6"], library=library, chain=False)


def gradients(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = run(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for ours, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


def test_compiled_model_equals_eager_for_several_batch_sizes(library: FakeLibrary | None) -> None:
    model = small_model(library)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for n in (4, 3, 1, 5, 2):
        x = torch.randn(n, 3, 12, 10)
        assert_same(gradients(compiled, model, x), gradients(model, model, x))
    # A second size makes the batch dynamic and a batch of one is compiled for itself; no size after that costs a graph.
    assert counter.frame_count <= 3
    if library is not None:
        assert library.called.count("backward") == 2 * 5 * 4


@pytest.mark.parametrize("dynamic", [True, False])
def test_compiled_with_other_map_sizes(dynamic: bool, library: FakeLibrary | None) -> None:
    model = small_model(library)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n, h, w in ((2, 12, 10), (3, 9, 11)):
        x = torch.randn(n, 3, h, w)
        assert_same(gradients(compiled, model, x), gradients(model, model, x))


@pytest.mark.parametrize("frozen", ["input", "weight", "all"])
def test_compiled_with_frozen_tensors(frozen: str, library: FakeLibrary | None) -> None:
    model = small_model(library)
    if frozen != "input":
        for layer in model if frozen == "all" else [model[6]]:
            layer.requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 12, 10, requires_grad=frozen == "all")
    results = []
    for run in (compiled, model):
        leaves = [t for t in (x, *model.parameters()) if t.requires_grad]
        results.append(torch.autograd.grad(run(x).square().sum(), leaves))
    assert_same(*results)


def test_compiled_under_autocast(library: FakeLibrary | None) -> None:
    model = small_model(library)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 12, 10)
    results = []
    for run in (compiled, model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = run(x)
        assert y.dtype == torch.bfloat16
        results.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), list(model.parameters()))])
    assert [t.dtype for t in results[0]] == [t.dtype for t in results[1]]
    assert_same(*results)


def test_compiled_channels_last(library: FakeLibrary | None) -> None:
    model = small_model(library).to(memory_format=torch.channels_last)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 12, 10).to(memory_format=torch.channels_last)
    assert_same(gradients(compiled, model, x), gradients(model, model, x))


@pytest.mark.slow
def test_inductor() -> None:
    """The default backend calls a C++ compiler, hence once for all. It asserts what fake kernels say of strides."""
    library = FakeLibrary(("filter_input", "backward"), digest="inductor")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2))
    gf_tvm.filter_model(model, {"0": 2, "2": (2, 3)}, chain=False)
    model[2].library = library
    model.to(memory_format=torch.channels_last)
    compiled = torch.compile(model, fullgraph=True)
    with loaded(library):
        for n in (2, 3):
            x = torch.randn(n, 8, 12, 10).to(memory_format=torch.channels_last)
            assert_same(gradients(compiled, model, x), gradients(model, model, x))
    assert library.called == ["filter_input", "backward"] * 4


def test_compiled_graph_keeps_filtered_inputs_only() -> None:
    """The partitioner could as well keep x and filter it again in the backward pass."""
    geometry = Geometry(2, 3, 4, 32, 32, 3, 4, 1, 1)
    x, weight, _, _ = (t.requires_grad_() for t in tensors(geometry, 0, torch.float32))
    compiled = torch.compile(lambda x, w: conv2d(x, w, padding=1, patch=4), fullgraph=True, backend="aot_eager")
    with saved_tensors() as saved:
        compiled(x, weight)
    assert sorted(t.numel() for t in saved) == sorted([2 * 8 * 8 * 3, weight.numel()])


def test_filtering_after_compilation_takes_effect() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 3, padding=1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 2, 9, 9)
    exact = gradients(compiled, model, x)
    gf_tvm.filter_model(model, patch=3, last=1)
    filtered = gradients(compiled, model, x)
    assert_same(filtered, gradients(model, model, x))
    assert not torch.allclose(filtered[-2], exact[-2])
    gf_tvm.filter_model(model, patch=2, last=1)
    assert_same(gradients(compiled, model, x), gradients(model, model, x))
    gf_tvm.unfilter_model(model)
    assert_same(gradients(compiled, model, x), exact)


def test_fallback_is_said_in_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gf_tvm.ops.dispatch._said", set())
    model = small_model(None)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", gf_tvm.FallbackWarning)
        for _ in range(3):
            compiled(torch.randn(2, 3, 12, 10)).sum().backward()
    assert len([w for w in caught if w.category is gf_tvm.FallbackWarning]) == 1


@pytest.mark.parametrize("change", [{"groups": 2}, {"weight": torch.ones(4, 5, 3, 3)}])
def test_bad_input_is_named_while_compiling(change: dict[str, Any]) -> None:
    compiled = torch.compile(conv2d, fullgraph=True, backend="aot_eager")
    arguments = {"x": torch.ones(2, 3, 8, 7, requires_grad=True), "weight": torch.ones(4, 3, 3, 3)} | change
    with pytest.raises(Exception, match=r"groups=2 must divide ci=3|x has 3 channels"):
        compiled(**arguments)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # as nn.Conv2d
def test_exported_model_equals_eager() -> None:
    model = small_model(None).eval()
    x = torch.randn(2, 3, 12, 10)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    x = torch.randn(5, 3, 12, 10)
    torch.testing.assert_close(program.module()(x), model(x))


def test_meta_tensors() -> None:
    model = small_model(None).to("meta")
    x = torch.empty(2, 3, 12, 10, device="meta", requires_grad=True)
    y = model(x)
    y.sum().backward()
    assert y.shape == (2, 4, 6, 5)
    assert x.grad is not None
    assert x.grad.shape == x.shape


class Around(nn.Module):
    """Two modules that are chained, something that is compiled around them, and what stands in the way of one trace."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = (
            nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 2, 3, padding=1)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x * 2).relu() + x
        if float(x.shape[0]) > 0:  # fx cannot trace it, Dynamo can
            y = y.tanh()
        return self.last(y).sin() * 3


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by Dynamo, after a break
@pytest.mark.parametrize("fullgraph", [False, True])
def test_chains_under_compilation(fullgraph: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Chains interrupt the graph, what is around them is compiled; where that is forbidden they are left out."""
    plain, chained = (gf_tvm.filter_model(Around(), 2, last=4, chain=chain) for chain in (False, True))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(chained, backend=counter, fullgraph=fullgraph)
    live._said_one_graph.clear()
    for n in (2, 3, 3):
        x = torch.randn(n, 2, 12, 10)
        assert_same(gradients(compiled, chained, x), gradients(plain, plain, x))
    lengths = [len(chain.convolutions) for chain in gf_tvm.chains_of(chained).chains]
    assert lengths == ([] if fullgraph else [2, 2])
    assert caplog.text.count("chains interrupt a compiled graph") == fullgraph
    # Once more as soon as the batch is dynamic; without fullgraph nothing is left around the model.
    assert counter.frame_count == (2 if fullgraph else 0)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain(x))


def test_chained_models_are_exported_as_they_are() -> None:
    plain, chained = (gf_tvm.filter_model(Around(), 2, last=4, chain=chain) for chain in (False, True))
    x = torch.randn(2, 2, 12, 10)
    for strict in (False, True):
        program = torch.export.export(chained, (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), plain(x))

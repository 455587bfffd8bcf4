"""What is exported holds plain convolutions, so that it runs where gf_tvm is not installed."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fake_library import FakeLibrary, loaded
from hypothesis import given, settings
from strategies import SEEDS, geometries, tensors
from torch import Tensor, nn

import gf_tvm
from gf_tvm.core.geometry import Geometry

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch's own modules, imported or run while exporting, and what torch says of nn.Conv2d, too.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:Constant folding - Only steps=1"),
]


@pytest.fixture(params=[False, True], ids=["no library", "library"])
def library(request: pytest.FixtureRequest) -> Iterator[FakeLibrary | None]:
    library = FakeLibrary()
    with loaded(library):
        yield library if request.param else None


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False),
        nn.Conv2d(8, 6, (2, 3), padding="same", dilation=2),
        nn.Conv2d(6, 6, (2, 3), padding="same"),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"),
    )


def traced(model: nn.Module, x: Tensor) -> tuple[Any, list[str]]:
    program = torch.jit.trace(model, x)
    return program, [node.kind() for node in program.inlined_graph.nodes()]


def scripted(model: nn.Module, x: Tensor) -> tuple[Any, list[str]]:
    program = torch.jit.script(model)
    return program, [node.kind() for node in program.inlined_graph.nodes()]


def exported(strict: bool, dynamic: bool = False) -> Callable[..., tuple[Any, list[str]]]:
    def export(model: nn.Module, x: Tensor) -> tuple[Any, list[str]]:
        shapes = ({0: torch.export.Dim("n", min=2)},) if dynamic else None
        program = torch.export.export(model, (x,), strict=strict, dynamic_shapes=shapes)
        return program.module(), [str(node.target) for node in program.graph.nodes if node.op == "call_function"]

    return export


WAYS = {
    "trace": traced,
    "script": scripted,
    "export": exported(strict=False),
    "export strictly": exported(strict=True),
    "export for every batch": exported(strict=False, dynamic=True),
}


def operators(names: list[str]) -> list[str]:
    """Operations on tensors, convolutions in any form as "conv2d"."""
    return ["conv2d" if "conv" in name else name for name in names if not name.startswith("prim::")]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_programs_are_those_of_plain_convolutions(way, grad, library) -> None:
    model = gf_tvm.filter_model(network(), 2, last=5, library=library)
    x = torch.randn(2, 3, 12, 10)
    with torch.set_grad_enabled(grad):
        program, names = way(model, x)
        _, expected = way(network(), x)
    assert not [name for name in names if "gf_tvm" in name]
    assert operators(names) == operators(expected)
    assert operators(names).count("conv2d") >= 5
    torch.testing.assert_close(program(x), network()(x))
    if library is not None:
        assert library.calls == []
    if program is not model:  # exporting leaves the model as it was
        model(x).sum().backward()
        assert model[6].weight.grad is not None
        assert not bool((model[6].weight.grad[0, 0] != model[6].weight.grad[0, 0, 0, 0]).any())  # filtered


@settings(max_examples=25)
@given(geometry=geometries(smallest_n=1), seed=SEEDS)
def test_traced_functions_are_those_of_convolutions(geometry: Geometry, seed: int) -> None:
    g = geometry
    x, weight, bias, _ = tensors(g, seed)
    rest = (g.stride, g.padding, g.dilation, g.groups, g.patch)
    program = torch.jit.trace(lambda *at: gf_tvm.functional.conv2d(*at, *rest), (x, weight.requires_grad_(), bias))
    assert [node.kind() for node in program.graph.nodes() if "conv" in node.kind()] == ["aten::_convolution"]
    assert "gf_tvm::" not in str(program.graph)
    torch.testing.assert_close(program(x, weight, bias), torch.nn.functional.conv2d(x, weight, bias, *rest[:4]))


def test_a_saved_program_does_not_need_the_library() -> None:
    model = gf_tvm.filter_model(network(), 2, last=5, library=FakeLibrary(digest="nowhere"))
    x = torch.randn(2, 3, 12, 10)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), network()(x))


@pytest.mark.parametrize("dynamo", [False, True], ids=["TorchScript", "dynamo"])
def test_onnx(dynamo: bool) -> None:
    onnx = pytest.importorskip("onnx")
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
    pytest.importorskip("onnxscript")
    model = gf_tvm.filter_model(network(), 2, last=5).eval()
    x = torch.randn(2, 3, 12, 10)
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=dynamo)
    program = onnx.load_from_string(file.getvalue())
    onnx.checker.check_model(program)
    assert {node.domain for node in program.graph.node} == {""}
    assert [node.op_type for node in program.graph.node].count("Conv") == 5
    (y,) = evaluator(program).run(None, {program.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), network()(x).detach(), rtol=1e-4, atol=1e-5)

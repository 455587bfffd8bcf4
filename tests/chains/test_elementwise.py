"""Element-wise functions: every record against PyTorch's own operator and autograd, and the code made of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import ROOT
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from segment_reference import reference
from strategies import SEEDS
from torch import Tensor, nn

import gf_tvm
from gf_tvm.chains.compile.programs import ChainProgram
from gf_tvm.chains.compile.segment import Average, Node, Part, Segment
from gf_tvm.chains.plan import elementwise, grids
from gf_tvm.chains.plan.elementwise import FUNCTIONS, Code, Function, Settings
from gf_tvm.chains.plan.graph import Conv, Map, Region
from gf_tvm.chains.plan.grids import Grid
from gf_tvm.chains.plan.partition import partition
from gf_tvm.chains.run.plan import Plan, make_plan
from gf_tvm.chains.run.run import run_chain
from gf_tvm.core.geometry import Geometry
from gf_tvm.core.workload import Workload
from gf_tvm.functional import conv2d

_aten = torch.ops.aten

pytestmark = pytest.mark.usefixtures("one_thread")


def arguments_of(operator: Any, *given: Any, **named: Any) -> dict[str, Any]:
    """A call's arguments by name, defaults filled in."""
    schema = operator._schema.arguments
    found = {a.name: a.default_value for a in schema if a.has_default_value()}
    return found | dict(zip([a.name for a in schema], given, strict=False)) | named


NUMBERS = st.one_of(st.sampled_from([0, 1, 2, 6, -1, 0.5, 0.25, 0.7, 20.0]), st.floats(-4, 4))


@st.composite
def calls(draw: st.DrawFn) -> tuple[Any, dict[str, Any]]:
    """(operator, arguments by name, without the map) of a call that some record may be of."""
    name = draw(st.sampled_from(list(FUNCTIONS)))
    if not FUNCTIONS[name].operators:
        return FUNCTIONS[name].composed, {}
    operator = draw(st.sampled_from(sorted(FUNCTIONS[name].operators, key=str)))
    arguments: dict[str, Any] = {}
    for a in operator._schema.arguments[1:]:
        kind = str(a.type)
        if a.has_default_value() and draw(st.booleans()):
            arguments[a.name] = a.default_value
        elif kind in ("number", "float"):
            arguments[a.name] = draw(NUMBERS)
        elif kind == "Optional[number]":
            arguments[a.name] = draw(st.none() | NUMBERS)
        elif kind == "bool":
            arguments[a.name] = draw(st.booleans())
        elif kind == "str":
            arguments[a.name] = draw(st.sampled_from(["none", "tanh"]))
        else:
            assert kind == "Optional[Generator]", kind
            arguments[a.name] = None
    return operator, arguments


def kind_of(operator: Any, arguments: dict[str, Any]) -> tuple[str, Settings] | None:
    """What chains take a call of :func:`calls` for."""
    if isinstance(operator, torch._ops.OpOverload):
        return elementwise.recognised(operator, {"self": object(), **arguments})
    return next((name, ()) for name, function in FUNCTIONS.items() if function.composed is operator)


def inputs(settings: Settings, seed: int, dtype: torch.dtype) -> Tensor:
    """Values on and beside the edges of pieces, special ones, and random ones of many sizes."""
    edges = [0.0, 0.5, 1.0, 3.0, 6.0, 20.0, *(abs(float(s)) for s in settings if isinstance(s, int | float))]
    at = torch.tensor([sign * edge for edge in edges for sign in (-1, 1)], dtype=dtype)
    infinity = torch.full((), math.inf, dtype=dtype)
    random = torch.randn(100, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    special = torch.tensor([math.nan, math.inf, -math.inf, 1e-30, -1e-30, 100.0, -100.0], dtype=dtype)
    beside = [at, torch.nextafter(at, infinity), torch.nextafter(at, -infinity)]
    # PyTorch's vector code and that for the rest do not always agree on NaN, so it stands in both.
    return torch.cat([special, *beside, random, 10 * random**3, special])


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=-77.25), b.nan_to_num(nan=-77.25)) and (
        torch.equal(a.isnan(), b.isnan())
    )  # fmt: skip


def by_pytorch(operator: Any, arguments: dict[str, Any], z: Tensor) -> tuple[Tensor, Tensor]:
    """y and dy/dz of the operator itself."""
    leaf = z.clone().requires_grad_()
    y: Tensor = operator(leaf.clone(), **arguments)
    (slope,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return y.detach(), slope


def has_meaning(kind: str, its_settings: Settings) -> bool:
    """Whether PyTorch takes the settings."""
    try:
        elementwise.run(kind, its_settings, torch.zeros(1), False, False)
    except RuntimeError:
        return False
    return True


IN_PLACE = {o for f in FUNCTIONS.values() for o in f.operators if o._schema.arguments[0].is_write}
MET: set[str] = set()


@settings(max_examples=500)
@given(call=calls(), seed=SEEDS, dtype=st.sampled_from([torch.float64, torch.float32]), inplace=st.booleans())
def test_function_and_derivative_are_those_of_the_operator(call, seed, dtype, inplace) -> None:
    operator, arguments = call
    found = kind_of(operator, arguments)
    assume(found is not None)
    kind, its_settings = found
    assume(has_meaning(kind, its_settings))
    z = inputs(its_settings, seed, dtype)
    try:
        y, slope = by_pytorch(operator, arguments, z)
    except RuntimeError:
        if operator not in IN_PLACE:  # which have no derivative for some settings
            raise
        assume(False)
    MET.add(kind)
    assert same(elementwise.run(kind, its_settings, z.clone(), inplace, False)[0], y)
    result, derivative = elementwise.run(kind, its_settings, z.clone(), inplace, True)
    assert same(result, y)
    assert derivative is not None
    if operator in IN_PLACE:  # whose derivative PyTorch may take from the result, which has lost digits (elu, celu)
        largest = max((abs(s) for s in its_settings if isinstance(s, int | float)), default=0.0)
        lost = 4 * torch.finfo(dtype).eps * (1 + largest)
        torch.testing.assert_close(derivative, slope, rtol=1e-5, atol=lost, equal_nan=True)
        slope = derivative
    assert same(derivative, slope)
    function = FUNCTIONS[kind]
    weighted = function.derivative(torch.full_like(z, -2), y if function.of_result else z, *its_settings)
    torch.testing.assert_close(weighted, -2 * slope, rtol=0, atol=1e-44, equal_nan=True)  # tiny ones are rounded
    if function.is_result_enough(its_settings):
        from_result = function.derivative(torch.ones_like(y), y, *its_settings)
        assert same(from_result, derivative)


def test_calls_met_everything() -> None:
    assert set(FUNCTIONS) == MET


class TorchAlgebra:
    """The algebra of PyTorch's tensors."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def number(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=self.dtype)

    def kept(self, value: Tensor) -> Tensor:
        return value

    select = staticmethod(torch.where)
    less, less_equal = staticmethod(torch.lt), staticmethod(torch.le)
    greater, greater_equal = staticmethod(torch.gt), staticmethod(torch.ge)
    exp, tanh, erf, sqrt = (staticmethod(f) for f in (torch.exp, torch.tanh, torch.erf, torch.sqrt))


def close(found: Tensor, expected: Tensor, z: Tensor, tolerance: float) -> None:
    """Errors are relative to z where a function is z times a difference from one."""
    found = found.expand_as(expected)
    finite = expected.isfinite()
    assert same(found[~finite], expected[~finite]), (z[~finite], found[~finite], expected[~finite])
    error = (found - expected)[finite].abs() / (1 + z[finite].abs() + expected[finite].abs()).clamp(max=1e300)
    worst = error.argmax() if error.numel() else None
    assert worst is None or error[worst] < tolerance, (z[finite][worst], found[finite][worst], expected[finite][worst])


def check_expressions(kind: str, its_settings: Settings, seed: int) -> None:
    function, z = FUNCTIONS[kind], inputs(its_settings, seed, torch.float64)
    algebra = TorchAlgebra(z.dtype)
    y, slope = elementwise.run(kind, its_settings, z.clone(), False, True)
    assert slope is not None
    close(function.value(algebra, z, its_settings), y, z, 1e-13)
    # PyTorch has 1/6 of hardsigmoid and 1/alpha of celu in float32.
    tolerance = 1e-7 if kind in ("hardsigmoid", "celu") else 1e-13
    number = ~z.isnan()
    expressions = [function.slope(algebra, z, its_settings)]
    if function.is_result_enough(its_settings):
        expressions.append(function.slope_of_result(algebra, y, its_settings))
    for expression in expressions:
        expression = expression.expand_as(z)
        close(expression[number], slope[number], z[number], tolerance)
        # At NaN PyTorch has one answer or two: vectors and single numbers differ.
        _, answers = elementwise.run(kind, its_settings, torch.full((35,), math.nan, dtype=z.dtype), False, True)
        assert answers is not None
        assert all(torch.isclose(a, answers, rtol=1e-7, equal_nan=True).any() for a in expression[~number])


@settings(max_examples=500)
@given(call=calls(), seed=SEEDS)
def test_expressions_are_the_function_and_its_derivative(call, seed) -> None:
    found = kind_of(*call)
    assume(found is not None)
    kind, its_settings = found
    assume(FUNCTIONS[kind].code is not None)
    assume(has_meaning(kind, its_settings))
    MET.add(f"{kind} compiled")
    check_expressions(kind, its_settings, seed)


def test_expressions_met_everything() -> None:
    for name, function in FUNCTIONS.items():
        assert (f"{name} compiled" in MET) == (function.code is not None)


# Recognised

CALLS: list[tuple[Any, tuple[str, Settings] | None]] = [
    ((_aten.relu.default,), ("relu", ())),
    ((_aten.relu_.default,), ("relu", ())),
    ((_aten.hardtanh.default, 0, 6), ("relu6", ())),
    ((_aten.hardtanh.default, -1.0, 1.0), ("hardtanh", (-1.0, 1.0))),
    ((_aten.hardtanh_.default,), ("hardtanh", (-1, 1))),
    ((_aten.hardtanh.default, 1.0, -1.0), None),
    ((_aten.rrelu.default, 0.25, 0.75), ("leaky_relu", (0.5,))),
    ((_aten.rrelu.default, 0.25, 0.75, True), None),
    ((_aten.rrelu.default, 0.75, 0.25), None),
    ((_aten.elu.default, 1.6732632423543772, 1.0507009873554805), ("selu", ())),
    ((_aten.elu.default, 0.5), ("elu", (0.5,))),
    ((_aten.elu.default, 0.5, 2.0), None),
    ((_aten.elu.default, 0.5, 1.0, 2.0), None),
    ((_aten.celu_.default, 2.0), ("celu", (2.0,))),
    ((_aten.celu.default, -2.0), None),
    ((_aten.celu.default, 1e-40), None),
    ((_aten.clamp.default, 0, 6), ("clamp", (0, 6))),
    ((_aten.clamp.default, None, None), None),
    ((_aten.clip_.default, None, 3), ("clamp", (None, 3))),
    ((_aten.clamp_min.default, 0), ("clamp", (0, None))),
    ((_aten.clamp_max_.default, 1), ("clamp", (None, 1))),
    ((_aten.clamp.default, True, 6), None),
    ((_aten.leaky_relu.default, math.nan), None),
    ((_aten.leaky_relu.default, NotImplemented), None),
    ((_aten.clamp.Tensor, torch.zeros(()), None), None),
    ((_aten.pow.Tensor_Scalar, 2), ("square", ())),
    ((_aten.pow_.Scalar, 2.0), ("square", ())),
    ((_aten.pow.Tensor_Scalar, 3), ("pow", (3,))),
    ((_aten.gelu.default,), ("gelu", ("none",))),
    ((_aten.prelu.default, torch.zeros(1)), None),
    ((_aten.digamma.default,), None),
]


@pytest.mark.parametrize(("call", "expected"), CALLS, ids=str)
def test_calls_are_recognised(call: Any, expected: Any) -> None:
    operator, *given_arguments = call
    found = elementwise.recognised(operator, arguments_of(operator, object(), *given_arguments))
    assert repr(found) == repr(expected)


#: What keys of programs contain: other names or settings would leave bundles that exist without use.
MODULES: list[tuple[nn.Module, tuple[str, Settings]]] = [
    (nn.ReLU(), ("relu", ())),
    (nn.ReLU(inplace=True), ("relu", ())),
    (nn.ReLU6(), ("relu6", ())),
    (nn.Hardtanh(-0.7, 0.9), ("hardtanh", (-0.7, 0.9))),
    (nn.Hardtanh(), ("hardtanh", (-1.0, 1.0))),
    (nn.LeakyReLU(), ("leaky_relu", (0.01,))),
    (nn.ELU(), ("elu", (1.0,))),
    (nn.ELU(0.8, inplace=True), ("elu", (0.8,))),
    (nn.Hardswish(), ("hardswish", ())),
    (nn.Hardsigmoid(), ("hardsigmoid", ())),
    (nn.SiLU(inplace=True), ("silu", ())),
    (nn.Mish(), ("mish", ())),
    (nn.GELU(), ("gelu", ("none",))),
    (nn.GELU("tanh"), ("gelu", ("tanh",))),
    (nn.Sigmoid(), ("sigmoid", ())),
    (nn.Tanh(), ("tanh", ())),
    (nn.Softplus(2.0, 10.0), ("softplus", (2.0, 10.0))),
    (nn.LogSigmoid(), ("log_sigmoid", ())),
    (nn.SELU(), ("selu", ())),
    (nn.CELU(0.5, inplace=True), ("celu", (0.5,))),
    (nn.Hardshrink(0.3), ("hardshrink", (0.3,))),
    (nn.Softshrink(), ("softshrink", (0.5,))),
    (nn.Threshold(0.1, -2.0), ("threshold", (0.1, -2.0))),
    (nn.RReLU().eval(), ("leaky_relu", (0.22916666666666666,))),
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("module", "expected"), MODULES, ids=str)
def test_modules_are_recognised(module: nn.Module, expected: tuple[str, Settings]) -> None:
    traced = torch.export.export(nn.Sequential(nn.Identity(), module), (torch.randn(2, 3, 4, 5),), strict=False)
    (node,) = (node for node in traced.graph.nodes if node.op == "call_function")
    found = elementwise.recognised(node.target, arguments_of(node.target, *node.args, **node.kwargs))
    assert repr(found) == repr(expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", [name for name, function in FUNCTIONS.items() if function.composed])
def test_functions_of_several_operators_are_recognised(name: str) -> None:
    function = FUNCTIONS[name].composed
    assert function is not None

    class Twice(nn.Module):
        def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
            z = x * 3
            return function(z), function(other), z.abs(), z / (other.abs() + 1), z / (z.abs() + 2), z - other.tanh()

    x = torch.randn(2, 3, 4, 5)
    graph = torch.export.export(Twice(), (x, x.clone()), strict=False).graph
    found = {node: f for node in graph.nodes if (f := elementwise.recognised_at(node)) is not None}
    _, second = (node for node in graph.nodes if node.op == "placeholder")
    times_three = next(node for node in graph.nodes if node.target is _aten.mul.Tensor)
    first_result, second_result = graph.output_node().args[0][:2]
    assert found == {first_result: (name, times_three), second_result: (name, second)}


def test_the_documentation_lists_them() -> None:
    text = (ROOT / "docs/patch_grid.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| .+ \| (yes|no) \| (yes|no) \|$", text, re.MULTILINE)
    words = {True: "yes", False: "no"}
    assert rows == [(name, words[f.code is not None], words[f.bounded]) for name, f in FUNCTIONS.items()]


# In chains

CHANNELS = 4


def region(kind: str, its_settings: Settings, library: str = "") -> Region:
    """A convolution, the function, and a convolution."""
    conv: dict[str, Any] = {"co": CHANNELS, "patch": (2, 2), "library": library}
    ops = (
        Conv("first", (0,), (0, None), **conv),
        Map("function", (1,), kind=kind, settings=its_settings),
        Conv("second", (2,), (1, None), **conv),
    )
    return Region(1, ops, {3: "its result is used outside"})


def chain(kind: str, its_settings: Settings, shape: Any, library: str = "", means: torch.dtype | None = None) -> Plan:
    made = region(kind, its_settings, library)
    layout = partition(made, [shape], [True], frozenset({0, 1}))
    (ops,) = layout.units
    assert ops == (0, 1, 2)
    return make_plan(made, layout.situation, ops, means)


def defined(kind: str, its_settings: Settings) -> bool:
    """Whether a function and its derivative are numbers everywhere."""
    found = elementwise.run(kind, its_settings, torch.arange(-20, 21) / 4, False, True)
    return all(t is not None and bool(t.isfinite().all()) for t in found)


def tensors(kind: str, its_settings: Settings, dtype: torch.dtype) -> list[Tensor]:
    """The chain's input and weights; positive where the function is not defined everywhere."""
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, CHANNELS, 6, 7), (CHANNELS,) * 2)]
    x, first = drawn
    if not defined(kind, its_settings):
        x, first = x.abs() + 0.1, first.abs()
    second = torch.randn(CHANNELS, CHANNELS, generator=generator, dtype=torch.float64)
    return [t.to(dtype).requires_grad_() for t in (x, first[:, :, None, None], second[:, :, None, None])]


def chained(plan: Plan, given_tensors: list[Tensor]) -> list[Tensor]:
    """The chain's result and gradients."""
    x, *weights = given_tensors
    (y,) = run_chain(plan, [x], weights)
    return [y.detach(), *torch.autograd.grad(y, given_tensors, torch.arange(y.numel()).view(y.shape).to(y) % 7)]


#: Settings of each function that has any.
SETTINGS: dict[str, Settings] = {
    "hardtanh": (-2.0, 1.0),
    "leaky_relu": (0.25,),
    "threshold": (0.5, -1.0),
    "clamp": (-0.5, 0.75),
    "hardshrink": (0.5,),
    "softshrink": (0.5,),
    "pow": (3,),
    "elu": (1.5,),
    "celu": (0.5,),
    "gelu": ("none",),
    "softplus": (2.0, 10.0),
}


@pytest.fixture
def reciprocal(monkeypatch: pytest.MonkeyPatch) -> str:
    """A function that chains do not have: its record is all that they need."""
    function = Function(
        "reciprocal",
        operators=elementwise.called("reciprocal"),
        apply=lambda z, i: z.reciprocal_() if i else z.reciprocal(),
        derivative=lambda g, y: -g * y * y,
        of_result=True,
        code=Code(lambda v, z: v.number(1) / z, lambda v, y: v.number(0) - y * y),
        bounded=False,
    )
    assert elementwise.recognised(_aten.reciprocal.default, {"self": object()}) is None
    monkeypatch.setitem(FUNCTIONS, function.name, function)
    return function.name


def expected_of(kind: str, its_settings: Settings) -> list[Tensor]:
    """Result and gradients layer by layer, in float64, by PyTorch's autograd."""
    x, first, second = tensors(kind, its_settings, torch.float64)
    function = FUNCTIONS[kind]
    operator = function.composed or next(iter(function.operators))
    names = [] if function.composed else [a.name for a in operator._schema.arguments[1:]]
    y = conv2d(operator(conv2d(x, first, patch=2), **dict(zip(names, its_settings, strict=False))), second, patch=2)
    return [y.detach(), *torch.autograd.grad(y, [x, first, second], torch.arange(y.numel()).view(y.shape).to(y) % 7)]


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_every_function_in_a_chain(kind: str) -> None:
    given_tensors = tensors(kind, SETTINGS.get(kind, ()), torch.float64)
    plan = chain(kind, SETTINGS.get(kind, ()), tuple(given_tensors[0].shape))
    for found, expected in zip(chained(plan, given_tensors), expected_of(kind, SETTINGS.get(kind, ())), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_what_nothing_bounds_is_not_kept_in_16_bits(kind: str) -> None:
    plan = chain(kind, SETTINGS.get(kind, ()), (2, CHANNELS, 6, 7), means=torch.float16)
    z = torch.tensor([1e-7, 20.0, 1e6, -20.0, -1e6])
    _, slope = elementwise.run(kind, SETTINGS.get(kind, ()), z, False, True)
    assert slope is not None
    unbounded = bool((slope.nan_to_num(nan=0.0).abs() > 1000).any())
    assert FUNCTIONS[kind].bounded is not unbounded
    assert len(plan.derivatives) == (not unbounded)


#: Something to build beside the programs.
WORKLOAD = Workload("filter_input", Geometry(1, 1, 1, 4, 4, 1, 2))


def built(path: Path, *segments: Segment) -> gf_tvm.bundle.library.Library:
    gf_tvm.build([WORKLOAD], "host", out=path, programs=[ChainProgram(segment) for segment in segments])
    return gf_tvm.load(path)


def test_a_new_function_needs_its_record_alone(reciprocal: str, tmp_path: Path) -> None:
    assert elementwise.recognised(_aten.reciprocal.default, {"self": object()}) == (reciprocal, ())
    test_every_function_in_a_chain(reciprocal)
    test_what_nothing_bounds_is_not_kept_in_16_bits(reciprocal)
    test_compiled_functions([(reciprocal, ())], tmp_path)
    # The whole chain, its segment compiled.
    given_tensors = tensors(reciprocal, (), torch.float32)
    shape: Any = tuple(given_tensors[0].shape)
    library = built(tmp_path / "chain.gfb", *chain(reciprocal, (), shape).segments)
    calls_before = len(RAN)
    with pytest.MonkeyPatch.context() as patched:
        watch(patched)
        found = chained(chain(reciprocal, (), shape, library.digest), given_tensors)
    assert len(RAN) > calls_before
    for actual, expected in zip(found, expected_of(reciprocal, ()), strict=True):
        assert (actual - expected).norm() / expected.norm() < 1e-5


RAN: list[str] = []


def watch(patched: pytest.MonkeyPatch) -> None:
    """Notes the segments that run."""
    before = gf_tvm.chains.run.run._segments

    def watched(*arguments: Any) -> Any:
        found = before(*arguments)
        RAN.extend(found or ())
        return found

    patched.setattr(gf_tvm.chains.run.run, "_segments", watched)


def compiled_functions() -> Iterator[tuple[str, Settings]]:
    for kind, function in FUNCTIONS.items():
        if function.code is not None:
            yield kind, SETTINGS.get(kind, ())
    yield from [("gelu", ("tanh",)), ("clamp", (None, 1)), ("clamp", (0, None)), ("threshold", (1, 2))]


def segment_of(kinds: list[tuple[str, Settings]], shape: Any) -> Segment:
    """Results, derivatives, their means, and derivatives that follow from results.

    Maps are two, the second one of positive numbers, for functions that are not defined everywhere.
    """
    grid = Grid.of_output(Geometry(*shape[:2], 1, *shape[2:], 1, 2))
    nodes = tuple(Node(kind, (int(not defined(kind, its)),), its) for kind, its in kinds)
    parts = [Part("derivative", k) for k in range(len(nodes))]
    parts += [
        Part("result", 2 + k, *kind)
        for k, kind in enumerate(kinds)
        if elementwise.is_result_enough(*kind)
    ]  # fmt: skip
    return Segment(
        shape=shape,
        maps=2,
        nodes=nodes,
        written=tuple((2 + k, None) for k in range(len(nodes))),
        handed=tuple((part,) for part in parts),
        averages=tuple(Average((part,), grid) for part in parts),
        slopes=(),
    )


@pytest.mark.parametrize("kinds", [list(compiled_functions())], ids=["all"])
def test_compiled_functions(kinds: list[tuple[str, Settings]], tmp_path: Path) -> None:
    """Of numbers on edges of pieces and elsewhere, whole registers of them and single ones, against float64."""
    edges = [0.0, 0.25, 0.5, 0.75, 1.0, 2.0, 3.0, 6.0, 20.0, 1e-3, 80.0]
    points = torch.tensor([sign * edge for edge in edges for sign in (-1, 1)])
    random = 3 * torch.randn(2 * 3 * 7 * 9 - len(points), generator=torch.Generator().manual_seed(0))
    everywhere = torch.cat([points, random]).view(1, 6, 7, 9)
    maps = [everywhere, everywhere.abs() + 0.01]
    segment = segment_of(kinds, tuple(everywhere.shape))
    function = built(tmp_path / "functions.gfb", segment).program(segment.key)
    assert function is not None
    found = [torch.full(shape, torch.nan) for shape in segment.outputs]
    function(*(z.clone() for z in maps), *found)
    expected = [torch.full(shape, torch.nan, dtype=torch.float64) for shape in segment.outputs]
    reference(segment)(*(z.double() for z in maps), *expected)
    # The largest error of a pixel is relative to z where a function is z times a difference from one, also in means.
    written, handed = len(segment.written), len(segment.handed)
    bounds = [1 + maps[1] + right.abs() for right in expected[: written + handed]]
    bounds += [
        grids.patch_means(bound, average.grid)
        for bound, average in zip(bounds[written:], segment.averages, strict=True)
    ]
    for k, (actual, right, bound) in enumerate(zip(found, expected, bounds, strict=True)):
        assert right.isfinite().all()
        assert ((actual - right).abs() / bound).max() < 4 * 2**-23, k
    # NaN stays NaN, so that a step that went wrong shows it.
    found = [torch.full(shape, 0.0) for shape in segment.outputs]
    function(*(torch.full_like(z, torch.nan) for z in maps), *found)
    assert [kind for kind, y in zip(kinds, found, strict=False) if not y.isnan().all()] == []


#: Whose edges are no numbers of float32: there, too, the compiled code decides as PyTorch does in float32.
ROUNDED: list[tuple[str, Settings]] = [
    *(("hardtanh", limits) for limits in [(-0.7, 0.9), (-0.1, 0.3), (0.2, 0.6)]),
    *(("clamp", limits) for limits in [(-0.7, 0.9), (-0.1, 0.3), (0.2, None), (None, 0.6)]),
    *((kind, (limit,)) for kind in ("hardshrink", "softshrink") for limit in (0.1, 0.7, 0.9)),
    *(("threshold", (limit, -2.0)) for limit in (-0.1, 0.2, 0.6)),
]


def test_compiled_functions_on_edges_that_are_rounded(tmp_path: Path) -> None:
    edges = torch.tensor([0.7, 0.9, 0.1, 0.3, 0.2, 0.6])
    beside = [edges, torch.nextafter(edges, torch.tensor(2.0)), torch.nextafter(edges, torch.tensor(-2.0))]
    z = torch.cat([*beside, *(-t for t in beside)]).repeat(2).view(1, 2, 6, 6)
    segment = segment_of(ROUNDED, tuple(z.shape))
    function = built(tmp_path / "edges.gfb", segment).program(segment.key)
    assert function is not None
    found = [torch.full(shape, torch.nan) for shape in segment.outputs]
    function(z.clone(), z.clone(), *found)
    expected = [torch.full(shape, torch.nan) for shape in segment.outputs]
    reference(segment)(z, z, *expected)
    maps = len(segment.written) + len(segment.handed)
    assert [k for k in range(maps) if not torch.equal(found[k], expected[k])] == []


@pytest.mark.parametrize("wrong", ["value", "slope", "edge", "from result"])
def test_a_wrong_record_is_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    correct, other = FUNCTIONS["clamp"].code, FUNCTIONS["hardtanh"].code
    assert correct is not None
    assert other is not None
    code = {
        "value": Code(lambda v, z, *limits: correct.value(v, z, *limits) + v.number(1e-9), correct.slope),
        "slope": Code(correct.value, lambda v, z, *limits: correct.slope(v, z, *limits) * v.number(1 + 1e-9)),
        "edge": Code(correct.value, other.slope),
        "from result": correct,
    }[wrong]
    enough = wrong == "from result"
    clamp = replace(FUNCTIONS["clamp"], code=code, same_from_result=lambda low, high: enough)
    monkeypatch.setitem(FUNCTIONS, "clamp", clamp)
    with pytest.raises(AssertionError):
        check_expressions("clamp", (-0.5, 0.75), 0)

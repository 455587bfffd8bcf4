"""The backward pass of a chain as one compiled function does what its steps do one by one."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from chain_networks import BLOCKS, CHANNELS, Network, Residual, Unit
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import SEEDS, compiling
from test_chains import filtered_names, prepare, runs
from torch import Tensor, nn

import gf_tvm
from gf_tvm.bundle.cpu_library import _launch
from gf_tvm.bundle.runtime import load_library, start_runtime
from gf_tvm.chains import programs_of
from gf_tvm.chains.compile import compiled, emit_stage, emit_together, traversal
from gf_tvm.chains.compile.packs import Packed
from gf_tvm.chains.compile.programs import ChainProgram
from gf_tvm.chains.plan import grids
from gf_tvm.chains.plan.steps import ConvInput, ConvWeight, Expand, Filter, Gather, MapSum, PatchSum, Take, Times
from gf_tvm.chains.run import run
from gf_tvm.chains.run.plan import Plan
from gf_tvm.codegen.compile import compile_module, export
from gf_tvm.core import verify
from gf_tvm.core.geometry import Geometry
from gf_tvm.core.workload import Workload
from gf_tvm.errors import BuildError
from gf_tvm.machine.profiles import get_profile
from gf_tvm.schedules import registry

pytestmark = pytest.mark.usefixtures("one_thread")

Call = tuple[Plan, tuple[Tensor, ...], dict[int, Tensor | None]]
#: Kinds of steps and of stages that were met, to show that all were.
MET: Counter[str] = Counter()


def calls_of(model: nn.Module, x: Tensor, seed: int) -> list[Call]:
    """What the chains' backward passes get in one training step."""
    found: list[Call] = []
    true = run.backward

    def record(plan: Plan, kept: Packed, grads: Mapping[int, Tensor | None], function: Any) -> Any:
        exits = {value: None if grad is None else grad.detach() for value, grad in grads.items()}
        found.append((plan, tuple(tensor.detach() for tensor in kept.slots()), exits))
        return true(plan, kept, grads, function)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "backward", record)
        torch.manual_seed(seed)
        y = model(x)
        if y.requires_grad:
            y.backward(torch.randn(y.shape))
    return found


def by_steps(call: Call, magnitude: bool = False) -> dict[str, Tensor]:
    """The gradients in float64; with ``magnitude`` the sums of the absolute values of all that is added up in them."""
    plan, kept, grads = call
    if magnitude:
        kept, grads = tuple(t.abs() for t in kept), {v: None if t is None else t.abs() for v, t in grads.items()}
        steps = tuple(
            replace(step, factor=abs(step.factor)) if isinstance(step, Times) else step for step in plan.steps
        )
        plan = replace(plan, steps=steps)
    exact = {value: None if grad is None else grad.double() for value, grad in grads.items()}
    entries, tensors = run._Backward(plan, [t.double() for t in kept], exact).run()
    return named(entries, tensors)


def named(entries: dict[int, Tensor], tensors: dict[int, Tensor]) -> dict[str, Tensor]:
    found = {f"entry {v}": grad for v, grad in entries.items()} | {f"tensor {t}": grad for t, grad in tensors.items()}
    return {name: grad.flatten() for name, grad in found.items()}


def sums(steps: Sequence[Any]) -> float:
    """Square roots of the lengths of all sums, added up: rounding errors grow so, if they are independent."""
    total = 0.0
    for step in steps:
        if isinstance(step, ConvInput):
            total += math.sqrt(step.geometry.co_group * math.prod(step.geometry.kernel))
        elif isinstance(step, ConvWeight):
            total += math.sqrt(step.geometry.n * math.prod(step.geometry.grid))
        elif isinstance(step, PatchSum | MapSum):
            total += math.sqrt(math.prod(step.grid.shape) * 2)
        elif isinstance(step, Filter):
            total += math.sqrt(math.prod(step.geometry.patch))
        else:
            total += 1
    return total


def compile_and_load(backward: compiled.Backward, folder: Any) -> Any:
    """The function of a program, with the default schedules of its products."""
    profile = get_profile("host")
    program = ChainProgram(backward)
    path = folder / f"{program.key}.so"
    module = program.module(profile, lambda workload: dict(registry.get_space(workload, profile).default))
    export([compile_module(module, profile, "main")], path, profile)
    start_runtime()
    function = load_library(path)["main"]
    return lambda *tensors: _launch(function, *tensors)


def error(call: Call, function: Any) -> float:
    """The largest error of the compiled function in units of what is allowed."""
    bound = call[0].backward
    assert bound is not None
    packs = [torch.full_like(pack, torch.nan) for pack in bound.layout.empty()]
    kept = Packed.of(dict(enumerate(call[1])), bound.layout, packs, bound.layout.views(packs))
    inputs = bound.inputs(kept, call[2])
    assert inputs is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_result", poisoned)
        actual = named(*bound.run(function, inputs))
    expected, magnitude = by_steps(call), by_steps(call, magnitude=True)
    assert actual.keys() == expected.keys()
    allowed = verify.SAFETY * sums(call[0].steps) * torch.finfo(torch.float32).eps
    worst = 0.0
    for name, value in expected.items():
        excess = (actual[name].double() - value).abs() / (allowed * magnitude[name] + torch.finfo(torch.float32).tiny)
        worst = max(worst, math.inf if excess.isnan().any() else float(excess.max()))
    return worst


def poisoned(shape: tuple[int, ...], zero: bool) -> Tensor:
    return torch.zeros(shape) if zero else torch.full(shape, torch.nan)


@compiling(10)
@given(
    blocks=st.lists(BLOCKS, min_size=2, max_size=3),
    head=st.sampled_from(["pool", "mean", "map"]),
    size=st.tuples(st.integers(4, 15), st.integers(4, 15)),
    patches=st.lists(st.sampled_from([2, 2, 4, (2, 4), (3, 2)]), min_size=1, max_size=2),
    freeze=st.sampled_from(["nothing", "first", "some"]),
    needs_input=st.booleans(),
    cells=st.sampled_from([1.0, 4.0]),
    seed=SEEDS,
)
def test_compiled_gradients(tmp_path_factory, blocks, head, size, patches, freeze, needs_input, cells, seed) -> None:
    model = prepare(Network(copy.deepcopy(blocks), head), seed, freeze).float()
    names = filtered_names(model)
    x = torch.randn(2, CHANNELS, *size, generator=torch.Generator().manual_seed(seed))
    assume(runs(model, x))
    assume(names)
    choice = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grids, "MAX_CELLS", cells)  # above 1 grids may cut a map in different places
        gf_tvm.filter_model(model, {name: choice.choice(patches) for name in names}, chain=True)
        calls = [c for c in calls_of(model, x.requires_grad_(needs_input), seed) if c[0].backward is not None]
    assume(calls)
    for call in calls:
        check(call, tmp_path_factory.mktemp("program"))


def check(call: Call, folder: Any) -> None:
    bound = call[0].backward
    assert bound is not None
    MET.update(type(step).__name__ for step in bound.program.steps)
    MET["together"] += sum(len(stage) > 1 for stage in bound.program.stages)
    assert error(call, compile_and_load(bound.program, folder)) <= 1


UNIT: dict[str, Any] = {
    "kernel": 3,
    "stride": 1,
    "dilation": 1,
    "padding": None,
    "groups": 1,
    "bias": True,
    "norm": "trained",
    "act": "relu",
}


def residual_call(seed: int = 3) -> Call:
    """Two blocks whose second joins the first's result, on a map that patches do not divide; the input is trained."""
    blocks = [Unit(UNIT), Residual({**UNIT, "groups": 4}, {**UNIT, "norm": "frozen"}, False, "plus", "silu")]
    model = prepare(Network(blocks, "map"), seed, "nothing").float()
    gf_tvm.filter_model(model, 2, layers=filtered_names(model), chain=True)
    (call,) = calls_of(model, torch.randn(3, CHANNELS, 9, 7, requires_grad=True), seed)
    return call


def cells_call() -> Call:
    """Convolutions with patches of 4 and of 2 pixels, on a map that both cut in different places."""
    model = prepare(Network([Unit(UNIT), Unit(UNIT)], "pool"), 5, "nothing").float()
    patches = dict(zip(filtered_names(model), (4, 2), strict=True))
    gf_tvm.filter_model(model, patches, chain=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grids, "MAX_CELLS", 4.0)
        (call,) = calls_of(model, torch.randn(2, CHANNELS, 10, 13), 5)
    return call


def linear_call() -> Call:
    """A block that is added to its input without an activation: both gradients meet on one grid."""
    linear = {**UNIT, "act": "identity"}
    model = prepare(
        Network([Unit(UNIT), Residual(linear, linear, False, "plus", "identity"), Unit(UNIT)], "pool"), 7, ""
    )
    gf_tvm.filter_model(model.float(), 2, layers=filtered_names(model), chain=True)
    (call,) = calls_of(model, torch.randn(2, CHANNELS, 8, 8), 7)
    return call


def dilated_call() -> Call:
    """Convolutions whose gradients of x are convolutions on the grid, a grouped one and a depthwise one."""
    units = [Unit(UNIT), *(Unit({**UNIT, "dilation": 2, "groups": groups}) for groups in (2, CHANNELS)), Unit(UNIT)]
    model = prepare(Network(units, "pool"), 9, "nothing").float()
    gf_tvm.filter_model(model, 2, layers=filtered_names(model), chain=True)
    (call,) = calls_of(model, torch.randn(2, CHANNELS, 12, 9), 9)
    assert sum(step.geometry.dilated for step in call[0].steps if isinstance(step, ConvInput)) == 2
    return call


def test_grids_that_join_and_differ_and_dilated_ones(tmp_path) -> None:
    for call in (residual_call(), cells_call(), linear_call(), dilated_call()):
        check(call, tmp_path)


def test_every_kind_of_step_was_met() -> None:
    """Runs after the tests above."""
    if not MET:
        pytest.skip("the tests above did not run")
    kinds = (Take, Filter, Gather, ConvInput, ConvWeight, PatchSum, Expand)
    assert {kind.__name__ for kind in kinds} | {"Plus", "TimesSaved", "together"} <= MET.keys()


@pytest.mark.parametrize("mistake", ["pixels", "slot", "patch", "mean"])
def test_a_mistake_is_noticed(mistake, tmp_path, monkeypatch) -> None:
    call = cells_call() if mistake == "patch" else residual_call()
    if mistake == "pixels":
        monkeypatch.setattr(emit_together, "uniform", lambda grid: True)
    if mistake == "patch":
        true = traversal.indices
        monkeypatch.setattr(emit_stage, "indices", lambda part: (*true(part)[:4], true(part)[3], true(part)[5]))
    if mistake == "mean":
        monkeypatch.setattr(emit_stage.maps, "mean_scale", lambda g, s, at, lanes: emit_stage.simd.splat(0.25, lanes))
    bound = call[0].backward
    assert bound is not None
    function = compile_and_load(bound.program, tmp_path)
    if mistake == "slot":
        places = bound.program.layout.places
        number, start, shape = places[max(k for k, (_, _, shape) in places.items() if shape[0] == 3)]
        k = next(k for k, a in enumerate(bound.program.arguments) if (a.kind, a.number) == ("pack", number))
        true_function = function

        def function(*tensors: Tensor) -> None:
            changed = list(tensors)
            changed[k] = changed[k].clone()
            changed[k][start : start + math.prod(shape)] *= 1.001
            true_function(*changed)

    assert error(call, function) > 1


def test_a_bundle_serves_equal_chains_of_other_networks(tmp_path) -> None:

    def trained(before: int) -> nn.Module:
        blocks: list[nn.Module] = [Unit({**UNIT, "norm": "batch statistics"}) for _ in range(before)]
        model = prepare(Network([*blocks, Unit(UNIT), Unit(UNIT)], "pool"), 1, "nothing").float()
        names = filtered_names(model)[-2:]
        return gf_tvm.filter_model(model, 2, layers=names, chain=True)

    models = [trained(0), trained(1)]
    assert programs_of(models[0]) == []  # it has not run
    for model in models:
        model(torch.randn(2, CHANNELS, 8, 8, requires_grad=True))
    first, second = ({p.key: p for p in programs_of(model)} for model in models)
    assert first.keys() == second.keys()
    of_chain = [p for p in first.values() if isinstance(p, ChainProgram)]
    assert len(of_chain) == 3  # two segments of the forward pass
    assert len(first) == 4  # and the exact convolution
    (program,) = (p for p in of_chain if isinstance(p.what, compiled.Backward))
    assert models[1].blocks[1].conv.library is None
    workload = Workload("filter_input", Geometry(2, CHANNELS, CHANNELS, 8, 8, 3, 2, padding=1))
    report = gf_tvm.build([workload], "host", [], tmp_path / "chain.gfb", programs=[program, program])
    assert report.programs == (program.key,)
    library = gf_tvm.load(report.path)
    assert library.program(program.key) is not None
    assert library.program("chain") is None
    with pytest.raises(BuildError, match="GPU"):
        gf_tvm.build([workload], "jetson-nano", [], tmp_path / "gpu.gfb", programs=[program])

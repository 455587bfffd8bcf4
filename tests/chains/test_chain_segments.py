"""Compiled segments of a chain's forward pass: the same as operation by operation, whatever is in them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chain_networks import BLOCKS, CHANNELS, UNITS, Halves, Inverted, Joined, Network, Residual, Scaled, Unit
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st
from segment_reference import inputs_of, reference
from strategies import SEEDS
from test_chains import filtered_names, gradients, prepare, runs, worst
from torch import Tensor, nn

import gf_tvm
from gf_tvm.bundle.library import Library
from gf_tvm.chains.compile import emit_forward
from gf_tvm.chains.compile.forward import Call
from gf_tvm.chains.compile.programs import ChainProgram
from gf_tvm.chains.compile.segment import Segment
from gf_tvm.chains.model import plans_of
from gf_tvm.chains.plan.grids import Cuts, Grid
from gf_tvm.chains.run import run
from gf_tvm.chains.run.plan import Plan
from gf_tvm.core.geometry import Geometry
from gf_tvm.core.workload import Workload

pytestmark = pytest.mark.usefixtures("one_thread")

#: What segments had, to show that the random networks met everything.
MET: Counter[str] = Counter()


def count(segment: Segment) -> None:
    MET["segments"] += 1
    MET["several operations"] += len(segment.nodes) > 2
    MET["two grids"] += len({average.grid for average in segment.averages}) > 1
    MET["x~"] += any(average.layout == "sums, channels last" for average in segment.averages)
    MET["depthwise x~"] += any(average.layout == "sums" for average in segment.averages)
    MET["in place"] += any(over is not None for _, over in segment.written)
    MET["of its own"] += any(over is None for _, over in segment.written)
    MET["handed over"] += bool(segment.handed)
    products = [average.product for average in segment.averages]
    MET["from a result"] += any(part.what == "result" for product in products for part in product)


def by_reference(plan: Plan, entries: Sequence[Tensor], tensors: Sequence[Tensor]) -> dict[str, Callable[..., None]]:
    """Stands for ``run._segments``: every segment there is, in any dtype."""
    MET["chains"] += 1
    for segment in plan.segments:
        count(segment)
    for unit in plan.units:
        if isinstance(unit, Call):
            MET["some channels"] += any(channels and channels[1] < unit.segment.shape[1] for *_, channels in unit.slots)
    return {segment.key: reference(segment) for segment in plan.segments}


#: Residual blocks in a row, whose products of derivatives go from segment to segment.
SHARP = st.sampled_from(["relu", "relu6", "hardtanh", "leaky_relu", "hardswish", "hardsigmoid", "identity", "softplus"])
SHARP_UNITS = st.builds(
    lambda spec, norm, act: {**spec, "norm": norm, "act": act},
    UNITS,
    st.sampled_from(["trained", "frozen", "none"]),
    SHARP,
)
IN_A_ROW = st.lists(
    st.builds(lambda a, b, act: Residual(a, b, False, "plus", act), SHARP_UNITS, SHARP_UNITS, SHARP),
    min_size=2,
    max_size=3,
)


UNIT: dict[str, Any] = {"kernel": 3, "stride": 1, "dilation": 1, "padding": None, "groups": 1, "bias": True}


def unit(act: str, norm: str = "frozen", **other: Any) -> dict[str, Any]:
    return {**UNIT, "norm": norm, "act": act, **other}


@pytest.mark.parametrize("part", range(2))
@example(  # a product of some channels
    blocks=[Halves(unit("identity", "none"), "chunk", "relu"), Unit(unit("relu"))],
    head="mean",
    size=(8, 6),
    patch=2,
    freeze="nothing",
    needs_input=False,
    seed=0,
)
@settings(max_examples=80, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    blocks=st.one_of(st.lists(BLOCKS, min_size=1, max_size=4), IN_A_ROW),
    head=st.sampled_from(["pool", "mean", "map"]),
    size=st.tuples(st.integers(4, 15), st.integers(4, 15)),
    patch=st.sampled_from([2, 2, 4, (2, 4), (3, 2)]),
    freeze=st.sampled_from(["nothing", "first", "some"]),
    needs_input=st.booleans(),
    seed=SEEDS,
)
def test_random_networks_in_segments(part, blocks, head, size, patch, freeze, needs_input, seed) -> None:
    """How operations are shared out among segments, and what these are to compute; nothing is compiled."""
    model = prepare(Network(copy.deepcopy(blocks), head), seed, freeze)
    x = torch.randn(2, CHANNELS, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x.requires_grad_(needs_input)
    names = filtered_names(model)
    assume(runs(model, x))
    assume(names)
    chained = gf_tvm.filter_model(model, dict.fromkeys(names, patch), chain=True)
    expected = gradients(chained, x)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "_segments", by_reference)
        actual = gradients(chained, x)
    if not torch.allclose(actual["result"], expected["result"], rtol=1e-10, atol=1e-12):
        # Segments run when something needs them, so that several dropouts may draw their noise in another order.
        assert sum(isinstance(module, nn.Dropout) for module in model.modules()) > 1
        assume(False)
    assert worst(actual, expected) < 1e-10


def test_random_networks_met_everything() -> None:
    kinds = ("several operations", "two grids", "x~", "depthwise x~", "in place", "handed over")
    for what in (*kinds, "from a result", "some channels"):
        assert MET[what], MET
    assert MET["segments"] > MET["chains"]


# Compiled


class Edges(nn.Module):
    """Every function that segments compute, of values on the edges of its pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False) for _ in range(6))
        self.first, self.second, self.third, self.last = (
            nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False) for _ in range(4)
        )
        self.hardtanh = nn.Hardtanh(-2.0, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.second(F.relu(x)) + self.third(x)  # not in place
        a, b, c, d, e, f = (conv(x) for conv in self.convs)
        total = F.relu(a) + F.relu6(b) + self.hardtanh(c) + F.leaky_relu(d, 0.25)
        return self.last(total + F.hardswish(e) + F.hardsigmoid(f)).mean((2, 3))


class Smooth(nn.Module):
    """Every function that segments compute and that has no pieces."""

    def __init__(self) -> None:
        super().__init__()
        acts = [nn.ELU(1.5), nn.Sigmoid(), nn.Tanh(), nn.SiLU(), nn.Mish(), nn.GELU(), nn.GELU(approximate="tanh")]
        self.acts = nn.ModuleList(acts)
        self.convs = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False) for _ in acts)
        self.first, self.last = (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * 2
        total = x
        for conv, act in zip(self.convs, self.acts, strict=True):
            total = total + act(conv(x))
        return self.last(torch.tanh(total)).mean((2, 3))


def networks() -> dict[str, tuple[nn.Module, Any, tuple[int, ...]]]:
    """Networks, patches, and the shapes of their inputs."""
    residual = nn.Sequential(
        Residual(unit("relu", "trained"), unit("relu", "trained"), False, "plus", "relu"),
        Residual(unit("leaky_relu", "trained"), unit("relu", "trained"), False, "torch.add", "relu"),
    )
    strided = nn.Sequential(
        Unit(unit("hardswish", "trained", groups=2)),
        Residual(unit("relu6", stride=2), unit("relu"), True, "minus", "hardtanh"),
    )
    wide = nn.Sequential(
        Unit(unit("relu6", "not affine")), Scaled("times"), Unit(unit("relu", "trained", padding=0, kernel=5))
    )
    parts = nn.Sequential(
        Unit(unit("relu")), Joined(unit("relu"), unit("hardsigmoid"), True), Inverted(unit("relu6"), True)
    )
    return {
        "residual": (Network([residual], "pool"), 2, (2, CHANNELS, 13, 11)),
        "strided": (Network([strided], "mean"), (3, 2), (2, CHANNELS, 12, 18)),
        "wide": (Network([wide], "mean"), 2, (1, CHANNELS, 44, 39)),
        "parts": (Network([parts], "pool"), 4, (3, CHANNELS, 9, 7)),
        "edges": (Edges(), 2, (2, CHANNELS, 7, 6)),
        "smooth": (Smooth(), 2, (2, CHANNELS, 7, 6)),
    }


def prepared(name: str, dtype: torch.dtype, library: Library | None = None) -> tuple[nn.Module, Tensor]:
    """A network, chained, and its input."""
    model, patch, shape = networks()[name]
    prepare(model, 5, "nothing")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if isinstance(model, Edges):
        x = torch.randint(-7, 8, shape, generator=generator).double()
        for conv in (*model.convs, model.first, model.second, model.third, model.last):
            assert isinstance(conv, nn.Conv2d)
            conv.weight.data.copy_(torch.eye(CHANNELS)[:, :, None, None])
    patches = dict.fromkeys(filtered_names(model), patch)
    return gf_tvm.filter_model(model.to(dtype), patches, chain=True, library=library), x.to(dtype)


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """A training step: the result, what chains keep, and the gradients of all parameters."""
    found: dict[str, Tensor] = {}

    def forward(plan: Plan, *given: Any) -> Any:
        exits, kept = before(plan, *given)
        found.update({f"kept {len(found) + k}": t.detach().clone() for k, t in enumerate(kept.slots())})
        return exits, kept

    before = run.forward
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "forward", forward)
        y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y.dtype))
    found["result"] = y.detach()
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


#: Something to build beside the programs.
WORKLOAD = Workload("filter_input", Geometry(1, 1, 1, 4, 4, 1, 2))


def build(path: Path, segments: Sequence[Segment]) -> Library:
    keys = tuple(dict.fromkeys(segment.key for segment in segments))
    programs = [ChainProgram(segment) for segment in segments]
    assert gf_tvm.build([WORKLOAD], "host", out=path, programs=programs).programs == keys
    return gf_tvm.load(path)


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Tensor]]:
    """By network, a step in float64, operation by operation."""
    return {name: step(*prepared(name, torch.float64)) for name in networks()}


@pytest.fixture(scope="module")
def segments() -> dict[str, list[Segment]]:
    found = {}
    for name in networks():
        model, x = prepared(name, torch.float32)
        step(model, x)
        found[name] = [segment for plan in plans_of(model) for segment in plan.segments]
    return found


@pytest.fixture(scope="module")
def library(segments: dict[str, list[Segment]], tmp_path_factory: pytest.TempPathFactory) -> Library:
    return build(tmp_path_factory.mktemp("segments") / "all.gfb", [s for found in segments.values() for s in found])


def poisoned(plan: Plan, entries: Sequence[Tensor], tensors: Sequence[Tensor]) -> Any:
    """Stands for ``run._segments``: its functions, but outputs are NaN before, and all tensors have margins."""
    functions = _SEGMENTS(plan, entries, tensors)
    if functions is None:
        return None

    def checked(segment: Segment) -> Callable[..., None]:
        def call(*tensors: Tensor) -> None:
            MET[segment.key] += 1
            margin, guarded = 1024, []
            for k, t in enumerate(tensors):
                memory = torch.full((t.numel() + 2 * margin,), -77.25)
                inside = memory[margin : margin + t.numel()].view(t.shape)
                inside.copy_(t) if k < inputs_of(segment) else inside.fill_(torch.nan)
                guarded.append((memory, inside))
            functions[segment.key](*(inside for _, inside in guarded))
            for t, (memory, inside) in zip(tensors, guarded, strict=True):
                assert (memory[:margin] == -77.25).all()
                assert (memory[margin + t.numel() :] == -77.25).all()
                t.copy_(inside)

        return call

    return {segment.key: checked(segment) for segment in plan.segments}


_SEGMENTS = run._segments
#: Rounding of sums of some thousand numbers, which errors of single operations precede.
TOLERANCE = 2**-23 * 2000**0.5


@pytest.mark.parametrize("name", networks())
def test_compiled_segments(
    name: str,
    segments: dict[str, list[Segment]],
    expected: dict[str, dict[str, Tensor]],
    library: Library,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "_segments", poisoned)
    model, x = prepared(name, torch.float32, library)
    before = {segment.key: MET[segment.key] for segment in segments[name]}
    actual = step(model, x)
    assert segments[name]
    assert all(MET[segment.key] > before[segment.key] for segment in segments[name])
    assert worst({k: t.double() for k, t in actual.items()}, expected[name]) < TOLERANCE
    if name == "edges":
        # Small integers and few fractions: nothing is rounded but thirds and sixths.
        plain = step(*prepared(name, torch.float32))
        assert worst(actual, plain) < 3e-7


def test_networks_have_it_all(segments: dict[str, list[Segment]]) -> None:
    MET.clear()
    found = [segment for several in segments.values() for segment in several]
    for segment in found:
        count(segment)
    for what in ("two grids", "x~", "depthwise x~", "in place", "of its own", "handed over", "from a result"):
        assert MET[what], what
    kinds = {node.kind for segment in found for node in segment.nodes}
    pieces = {"relu", "relu6", "hardtanh", "leaky_relu", "hardswish", "hardsigmoid"}
    assert kinds == {"norm", "add", "scale", *pieces, "elu", "sigmoid", "tanh", "silu", "mish", "gelu"}
    assert {settings[1:] for s in found for settings in [n.settings for n in s.nodes if n.kind == "norm"]} == {
        (True, True),
        (False, False),
    }
    cuts = [c for s in found for a in s.averages for c in (a.grid.rows, a.grid.cols)]
    assert any(len(set(c.counts)) > 1 for c in cuts), "no clipped patches"
    assert any(sum(c.counts) < c.size for c in cuts), "no pixels without a patch"


@pytest.mark.parametrize("error", ["strict", "pixels"])
def test_deliberate_errors_are_noticed(
    error: str,
    segments: dict[str, list[Segment]],
    expected: dict[str, dict[str, Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if error == "strict":
        monkeypatch.setattr(emit_forward.tirx, "LE", emit_forward.tirx.LT)
    else:
        scales = emit_forward._scales
        monkeypatch.setattr(
            emit_forward, "_scales", lambda grid, times: scales(Grid(_unclipped(grid.rows), grid.cols), times)
        )
    library = build(tmp_path / "wrong.gfb", segments["edges"])
    monkeypatch.undo()
    actual = step(*prepared("edges", torch.float32, library))
    assert worst({k: t.double() for k, t in actual.items()}, expected["edges"]) > 100 * TOLERANCE


def _unclipped(cuts: Cuts) -> Cuts:
    """As if no patch was cut off by the map's edge."""
    size = max(cuts.counts)
    return Cuts(cuts.size, tuple(size * k for k in range(cuts.patches + 1)))


# What is not compiled


def test_other_tensors_run_operation_by_operation(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []

    def watched(*given: Any) -> Any:
        found.append(_SEGMENTS(*given))
        return found[-1]

    monkeypatch.setattr(run, "_segments", watched)
    model, x = prepared("residual", torch.float32, library)
    step(model, x)
    assert found[-1]
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert found[-1] is None
    step(model, x.contiguous(memory_format=torch.channels_last))
    assert found[-1] is None
    step(*prepared("residual", torch.float64, library))
    assert found[-1] is None
    step(*prepared("residual", torch.float32))
    assert found[-1] is None
    step(model, x)
    assert found[-1]


def test_a_library_that_lacks_some_says_so(segments: dict[str, list[Segment]], tmp_path: Path) -> None:
    library = build(tmp_path / "some.gfb", segments["residual"][:1])
    model, x = prepared("residual", torch.float32, library)
    with pytest.warns(gf_tvm.FallbackWarning, match="lacks chain_forward_n2_c4_13x11"):
        step(model, x)


def test_unaligned_parameters_and_inputs(expected: dict[str, dict[str, Tensor]], library: Library) -> None:
    model, x = prepared("residual", torch.float32, library)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            moved = torch.empty(tensor.numel() + 1)[1:].view(tensor.shape)
            tensor.data = moved.copy_(tensor.data)
    x = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    actual = step(model, x)
    assert worst({k: t.double() for k, t in actual.items()}, expected["residual"]) < TOLERANCE


@pytest.mark.parametrize(
    ("points", "size"), [((0, 2, 4, 6, 8), 8), ((0, 1, 4, 7, 10, 11), 11), ((0, 0, 2, 6, 6), 7), ((1, 5, 9), 12)]
)
@pytest.mark.parametrize("others", [(), ((0, 1),), ((0, 4, 8),)])
@pytest.mark.parametrize("most", [1, 3, 100])
def test_runs_of_bands_are_all_rows(points: Any, size: int, others: Any, most: int) -> None:
    columns = Cuts(3, (0, 3))
    grids = [
        Grid(Cuts(size, points), columns),
        *(Grid(Cuts(size, tuple(min(p, size) for p in o)), columns) for o in others),
    ]
    found = emit_forward.bands(size, grids, most)
    rows = [row for band in found for row in range(band.start, band.start + band.rows)]
    assert rows == list(range(size))
    for band in found:
        assert band.rows <= most
        for row in range(band.start, band.start + band.rows):
            for grid, place in zip(grids, band.places, strict=True):
                owners = [
                    i
                    for i, (a, b) in enumerate(zip(grid.rows.points, grid.rows.points[1:], strict=False))
                    if a <= row < b
                ]
                assert owners == ([] if place is None else [place])
    spelled = [
        emit_forward.Band(
            band.start + t * part.rows,
            band.rows,
            tuple(None if p is None else p + t * d for p, d in zip(band.places, part.places, strict=True)),
        )
        for part in emit_forward.runs(found)
        for t in range(part.times)
        for band in part.bands
    ]
    assert spelled == found

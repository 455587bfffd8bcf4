"""Padding, pooling, resizing and gates in chains: the same gradients as operation by operation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from region_networks import Builder, Case, random_case
from strategies import SEEDS, compiling
from test_chain_programs import Call, check
from test_chain_segments import TOLERANCE, build, by_reference, inputs_of
from torch import Tensor
from torch.nn import functional as F

from gf_tvm.chains.compile.packs import Packed
from gf_tvm.chains.compile.segment import Segment
from gf_tvm.chains.plan import lowering, sampling
from gf_tvm.chains.plan.graph import Gate, Misfit, Op, Pad, Resize, WindowPool
from gf_tvm.chains.plan.grids import Cuts
from gf_tvm.chains.plan.lowering import Mean
from gf_tvm.chains.plan.sampling import Sampling
from gf_tvm.chains.plan.steps import Gather
from gf_tvm.chains.run import run
from gf_tvm.chains.run.plan import Plan

pytestmark = pytest.mark.usefixtures("one_thread")

#: What chains had, to show that the random regions met everything.
MET: Counter[str] = Counter()


def count(plan: Plan) -> None:
    ops = {step.index: step.op for step in plan.forward}
    for op in ops.values():
        MET[kind(op)] += 1
        MET["one value an image"] += isinstance(op, Gate) and len(op.inputs) == 2
    for slot in plan.slots:
        if isinstance(slot, Mean):
            for i, _ in slot.factor:
                MET[f"through {kind(ops[i])}"] += 1
            passed = [kind(ops[i]) for i, _ in slot.factor if isinstance(ops[i], lowering.Resampling)]
            MET["through several"] += len(passed) > 1
            MET["empty patches"] += any(0 in cuts.counts for cuts in (slot.grid.rows, slot.grid.cols))
    MET["pieces"] += any(
        isinstance(step, Gather) and len(step.parts) == 1 and len(set(step.parts[0].rows.in_b)) < len(part.rows.in_b)
        for step in plan.steps
        if isinstance(step, Gather)
        for part in step.parts
    )


def kind(op: Op) -> str:
    return op.kind if isinstance(op, WindowPool) else type(op).__name__


def worst(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest error, in units of each tensor's largest value; infinite where anything is not finite."""
    found = [float((a - b).abs().max() / (b.abs().max() + 1e-6)) for a, b in zip(actual, expected, strict=True)]
    return max(found) if all(t.isfinite().all() for t in actual) else float("inf")


RANDOM = settings(max_examples=200, phases=[Phase.explicit, Phase.reuse, Phase.generate])


@RANDOM
@given(seed=SEEDS)
def test_chained_gradients_equal_unchained_ones(seed: int) -> None:
    case = random_case(seed)
    for plan in case.plans():
        count(plan)
    assert worst(case.results(case.chained()), case.results(case.plain())) < 1e-10


def test_random_regions_met_everything() -> None:
    """Runs after the test above."""
    if not MET:
        pytest.skip("the test above did not run")
    kinds = ("mean", "max", "Pad", "Resize")
    for what in (*kinds, *(f"through {name}" for name in kinds), "through several", "empty patches", "pieces", "Gate"):
        assert MET[what], (what, MET)


@RANDOM
@given(seed=SEEDS)
def test_random_regions_in_segments(seed: int) -> None:
    case = random_case(seed)
    assume(any(plan.segments for plan in case.plans()))
    expected = case.results(case.chained())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "_segments", by_reference)
        assert worst(case.results(case.chained()), expected) < 1e-10


# Regions in which nothing ends a chain


def between(steps: Callable[[Builder, int], int], size: tuple[int, int] = (16, 12), patch: int = 2, **how: Any) -> Case:
    """Convolution, batch norm and function, some steps, function, convolution, global mean."""
    b = Builder(1, **how)
    x = b.entry(2, 4, *size)
    b.entry(2, 1, 1, 1)
    v = b.conv(x, 4, 3, patch, padding=(1, 1))
    v = steps(b, b.map(b.norm(v), "silu"))
    v = b.conv(b.map(v, "tanh"), 4, 3, patch, padding=(1, 1))
    return b.case(b.add(lowering.Pool(b.name("mean"), (v,))))


def depth(b: Builder, v: int) -> int:
    """A residual branch that is dropped for some images."""
    branch = b.conv(v, 4, 3, padding=(1, 1))
    return b.add(lowering.Add("add", (v, b.add(Gate("depth", (b.map(branch, "relu"), 1))))))


def halved(b: Builder, v: int) -> int:
    """The shortcut of ResNets for CIFAR: every second pixel, and channels of zeros."""
    main = b.conv(b.map(b.conv(v, 4, 3, padding=(1, 1)), "relu"), 8, 3, stride=(2, 2), padding=(1, 1))
    short = b.pad(b.pool(v, "mean", (1, 1), (2, 2), ceil=True), channels=(2, 2))
    both = b.map(b.add(lowering.Add("add", (main, short))), "relu")
    return b.conv(both, 4, 1)


STAY: dict[str, Callable[[Builder, int], int]] = {
    "maxima": lambda b, v: b.pool(v, "max"),
    "means": lambda b, v: b.pool(v),
    "means of what the border cuts": lambda b, v: b.pool(b.pad(v, (0, -1), (0, -1)), ceil=True),
    "sums": lambda b, v: b.pool(v, divisor=1),
    "nearest": lambda b, v: b.resize(v, scale=(2.0, 3.0)),
    "nearest of other sizes": lambda b, v: b.resize(v, mode="nearest-exact", size=(23, 9)),
    "padding": lambda b, v: b.pad(v, (1, 2), (3, 0)),
    "padding of a batch norm": lambda b, v: b.pad(b.norm(v), (1, 2), (3, 0)),
    "one pixel more": lambda b, v: b.conv(b.pad(v, (0, 1), (0, 1)), 4, 2),
    "cropping": lambda b, v: b.pad(v, (-2, 1), (0, -3)),
    "there and back": lambda b, v: b.pool(b.map(b.resize(v, scale=(2.0, 2.0)), "relu"), "max"),
    "stochastic depth": depth,
    "fewer pixels, more channels": halved,
}


@pytest.mark.parametrize("steps", STAY)
@pytest.mark.parametrize("patch", [2, 4])
def test_what_ends_no_chain(steps: str, patch: int) -> None:
    case = between(STAY[steps], patch=patch)
    assert not [value for value in case.layout().reasons if value not in case.region.exits], case.layout().reasons
    (plan,) = case.plans()
    assert len(plan.forward) == len(case.region.ops)
    assert worst(case.results(case.chained()), case.results(case.plain())) < 1e-10


ENDS: dict[str, tuple[Callable[[Builder, int], int], str]] = {
    "windows that overlap": (lambda b, v: b.pool(v, "max", (3, 3), (2, 2), padding=(1, 1)), "do not fit the windows"),
    "windows across patches": (lambda b, v: b.pool(v, "max", (3, 3)), "do not fit the windows"),
    "means over padding": (lambda b, v: b.pool(v, "mean", (4, 2), padding=(2, 0)), "counts pixels beyond"),
    "cut windows that are divided like whole ones": (
        lambda b, v: b.pool(b.pad(v, (0, -1)), ceil=True, divisor=3),
        "counts pixels beyond",
    ),
    "nothing with a gradient": (
        lambda b, v: b.conv(b.pad(b.map(b.pad(v, (0, 4)), "relu"), (-16, 0)), 4, 1),
        "takes nothing that has a gradient",
    ),
    "bilinear": (lambda b, v: b.resize(v, mode="bilinear", corners=False, scale=(2.0, 2.0)), "cannot stay"),
    "a gradient for each image": (
        lambda b, v: b.add(Gate("gate", (v, b.conv(b.add(lowering.Pool("mean", (v,))), 1, 1, 1, filtered=False)))),
        "sum over channels",
    ),
}


@pytest.mark.parametrize("steps", ENDS)
def test_what_ends_one(steps: str) -> None:
    step, reason = ENDS[steps]
    case = between(step)
    assert any(reason in text for text in case.layout().reasons.values()), case.layout().reasons
    assert worst(case.results(case.chained()), case.results(case.plain())) < 1e-10


def test_means_that_overlap_need_no_patches_of_their_own_without_functions() -> None:
    """A branch of Inception: a convolution reads means over overlapping windows of another one's result."""
    b = Builder(3)
    v = b.conv(b.entry(2, 4, 12, 12), 4, 3, 4, padding=(1, 1))
    v = b.conv(b.pool(v, "mean", (2, 2), (1, 1)), 4, 1, 4)
    case = b.case(b.add(lowering.Pool("mean", (v,))))
    (plan,) = case.plans()
    assert len(plan.convolutions) == 2
    assert worst(case.results(case.chained()), case.results(case.plain())) < 1e-10


def test_nothing_of_full_size_is_kept() -> None:
    for steps in ("maxima", "means", "padding"):
        (plan,) = between(STAY[steps], patch=4).plans()
        pixels = 2 * 4 * 16 * 12
        assert plan.kept_values < pixels, steps


@pytest.mark.parametrize("steps", ["maxima", "means", "nearest", "padding", "stochastic depth"])
def test_other_tensors(steps: str) -> None:
    """Channels last, empty batches, 16 bits."""
    exact = between(STAY[steps])
    expected = exact.results(exact.plain())
    exact.entries[0] = exact.entries[0].to(memory_format=torch.channels_last)
    assert worst(exact.results(exact.chained()), expected) < 1e-10
    half = between(STAY[steps], dtype=torch.float16)
    assert worst([t.double() for t in half.results(half.chained())], expected) < 0.03
    exact.entries = [t[:0] for t in exact.entries]
    for t in exact.results(exact.chained()):
        assert not t.any()


def test_means_of_maxima_in_16_bits_are_exact() -> None:
    """Derivatives of ReLU, taken where the maxima are, are 0 or 1 as before."""
    b = Builder(4)
    v = b.map(b.conv(b.entry(2, 4, 16, 16), 4, 3, padding=(1, 1)), "relu")
    v = b.conv(b.map(b.pool(v, "max"), "relu"), 4, 3, padding=(1, 1))
    case = b.case(b.add(lowering.Pool("mean", (v,))))
    assert any(len(slot.factor) > 1 for plan in case.plans() for slot in plan.slots if isinstance(slot, Mean))
    expected = case.results(case.chained())
    case.means = torch.float16
    assert all(plan.derivatives for plan in case.plans())
    assert worst(case.results(case.chained()), expected) < 1e-12


def _shifted(axis: Sampling, cuts: Cuts) -> Cuts | None:
    found = _IMAGE(axis, cuts)
    return found and replace(found, points=tuple(max(0, p - 1) for p in found.points))


_IMAGE = sampling._image
MISTAKES: dict[str, tuple[Any, str, Any, str]] = {
    "a patch's image": (sampling, "_image", _shifted, "padding"),
    "padded pixels": (lowering, "_within", lambda grid, image: grid, "padding of a batch norm"),
    "a lost factor": (lowering._Lowering, "_times", lambda self, term, factor: term, "means"),
    "a product of another place": (run, "_through", lambda op, t, at: F.interpolate(t, at.shape[2:]), "maxima"),
    "a product that is not averaged": (run, "_through", lambda op, t, at: t[..., ::2, ::2], "means"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, wrong, steps = MISTAKES[mistake]
    monkeypatch.setattr(where, name, wrong)
    case = between(STAY[steps])
    assert worst(case.results(case.chained()), case.results(case.plain())) > 1e-3


# Along one axis


def matrix(axis: Sampling) -> Tensor:
    """(pixels of the result, pixels of the input)."""
    found = torch.zeros(axis.pixels, axis.size, dtype=torch.float64)
    for j, (a, b) in enumerate(axis.windows):
        found[j, a:b] = 1 / axis.divisors[j]
    return found


SIZES = st.integers(1, 14)
POOLED = st.builds(
    lambda size, kernel, stride, padding, *how: (size, kernel, stride, min(padding, kernel // 2), *how),
    *(SIZES, st.integers(1, 4), st.integers(1, 4), st.integers(0, 2), st.booleans(), st.booleans(), st.booleans()),
)


@given(axis=POOLED)
def test_means_along_an_axis(axis: tuple[Any, ...]) -> None:
    size, kernel, stride, padding, ceil, include_pad, fixed = axis
    assume(sampling.pooled_size(size, kernel, stride, padding, ceil) >= 1)
    t = torch.eye(size, dtype=torch.float64)[:, None, None]
    how = ((1, kernel), (1, stride), (0, padding), ceil, include_pad, kernel if fixed else None)
    expected = F.avg_pool2d(t, *how)[:, 0, 0].T
    torch.testing.assert_close(matrix(sampling.pooled(*axis)), expected)


@given(size=SIZES, target=SIZES, exact=st.booleans())
def test_nearest_along_an_axis(size: int, target: int, exact: bool) -> None:
    axis = sampling.nearest(size, target, None, exact)
    assume(axis is not None)
    assert axis is not None
    t = torch.eye(size)[:, None, None]
    expected = F.interpolate(t, (1, target), mode="nearest-exact" if exact else "nearest")[:, 0, 0].T
    assert torch.equal(matrix(axis).float(), expected)


def test_pixels_that_rounding_decides_are_refused() -> None:
    """And those of a ratio that is not that of the sizes."""
    assert sampling.nearest(4, 6, None, False) is not None
    assert sampling.nearest(4, 6, 1.7, False) is None
    assert sampling.nearest(2, 41, None, True) is None
    with pytest.raises(Misfit):
        Resize("resize", (0,), mode="nearest", size=(6, 6), scale=(1.7, 1.7)).shape((1, 1, 4, 4))


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        (Pad("pad", (0,), rows=(-3, 3)), (1, 1, 3, 4)),
        (Pad("pad", (0,), cols=(-2, -2)), (1, 1, 3, 4)),
        (WindowPool("pool", (0,), kernel=(4, 1)), (1, 1, 3, 4)),
        (WindowPool("pool", (0,), kernel=(2, 2), padding=(2, 0)), (1, 1, 3, 4)),
    ],
)
def test_what_does_not_fit_is_refused(op: Op, shape: tuple[int, int, int, int]) -> None:
    with pytest.raises(Misfit):
        op.shape(shape)


@st.composite
def cut(draw: st.DrawFn, size: int) -> Cuts:
    points = sorted(draw(st.lists(st.integers(0, size), min_size=2, max_size=5)))
    return Cuts(size, tuple(points))


def inside(cuts: Cuts) -> Tensor:
    """(patches, pixels): one where a pixel lies in a patch."""
    pixel = torch.arange(cuts.size)
    rows = [(pixel >= a) & (pixel < b) for a, b in zip(cuts.points, cuts.points[1:], strict=False)]
    return torch.stack(rows).double()


AXES = st.one_of(
    st.builds(sampling.padded, st.integers(4, 9), st.integers(-2, 3), st.integers(-1, 3)),
    POOLED.filter(lambda axis: sampling.pooled_size(*axis[:5]) >= 1).map(lambda axis: sampling.pooled(*axis)),
    st.builds(sampling.nearest, SIZES, SIZES, st.none(), st.booleans()).filter(lambda axis: axis is not None),
)


@given(data=st.data(), axis=AXES)
def test_patches_go_back_and_forth(data: st.DataObject, axis: Sampling) -> None:
    """On random patches: back is the transposed operation, forth what is zero outside of a patch is so behind it."""
    t = matrix(axis)
    cuts = data.draw(cut(axis.pixels))
    back = axis.back(cuts)
    if back is not None:
        spread = torch.zeros(back.cuts.patches, cuts.patches, dtype=torch.float64)
        weights = back.weights or (back.factor,) * back.cuts.patches
        for a, b, weight in zip(back.sums.in_a, back.sums.in_b, weights, strict=True):
            spread[a, b] += weight
        torch.testing.assert_close(inside(back.cuts).T @ spread, t.T @ inside(cuts).T)
    before = data.draw(cut(axis.size))
    image = axis.image(before)
    if image is not None:
        for patch, of_image in zip(inside(before), inside(image), strict=True):
            torch.testing.assert_close(t @ torch.diag(patch), torch.diag(of_image) @ t)


# Compiled


def calls_of(case: Case) -> list[Call]:
    """What the chains' backward passes get."""
    found: list[Call] = []
    true = run.backward

    def record(plan: Plan, kept: Packed, grads: Mapping[int, Tensor | None], function: Any) -> Any:
        exits = {value: None if grad is None else grad.detach() for value, grad in grads.items()}
        found.append((plan, tuple(tensor.detach() for tensor in kept.slots()), exits))
        return true(plan, kept, grads, function)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "backward", record)
        case.results(case.chained())
    return [call for call in found if call[0].backward is not None]


@compiling(8)
@given(seed=SEEDS)
def test_compiled_gradients(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    case = random_case(seed, torch.float32, smooth=True)
    assume(any(isinstance(step.op, lowering.Resampling) for plan in case.plans() for step in plan.forward))
    for call in calls_of(case):
        check(call, tmp_path_factory.mktemp("program"))


@pytest.mark.parametrize("steps", STAY)
def test_compiled_gradients_of_each(steps: str, tmp_path: Path) -> None:
    (call,) = calls_of(between(STAY[steps], dtype=torch.float32))
    check(call, tmp_path)


def test_compiled_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that segments hand to operations which move pixels, and grids that these have clipped."""
    regions = ("maxima", "means", "nearest", "padding", "cropping", "there and back")
    cases = [between(STAY[steps], dtype=torch.float32) for steps in regions]
    exact = [between(STAY[steps]) for steps in regions]
    found = {s.key: s for case in cases for plan in case.plans() for s in plan.segments}
    library = build(tmp_path / "all.gfb", list(found.values()))

    def poisoned(segment: Segment, *tensors: Tensor) -> None:
        MET["compiled segments"] += 1
        for t in tensors[inputs_of(segment) :]:
            t.fill_(torch.nan)
        function = library.program(segment.key)
        assert function is not None
        function(*tensors)

    def segments(plan: Plan, entries: Any, tensors: Any) -> dict[str, Callable[..., None]]:
        return {s.key: lambda *t, s=s: poisoned(s, *t) for s in plan.segments}

    expected = [case.results(case.plain()) for case in exact]
    monkeypatch.setattr(run, "_segments", segments)
    assert any(s.handed for s in found.values())
    for case, wanted in zip(cases, expected, strict=True):
        before = MET["compiled segments"]
        assert worst([t.double() for t in case.results(case.chained())], wanted) < TOLERANCE * 10
        assert MET["compiled segments"] > before

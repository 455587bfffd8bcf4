"""Comparing chains: rows, the check against float64, what is kept, limits, the kernels that are called."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chain_networks import BLOCKS, CHANNELS, Network
from fake_library import FakeLibrary, loaded
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gf_tvm
from gf_tvm.chains import chains_of
from gf_tvm.chains.compile import kernels
from gf_tvm.chains.piece import Bound, pieces_of
from gf_tvm.chains.run import run
from gf_tvm.comparison import chain_variants
from gf_tvm.comparison.chain_variants import VARIANTS
from gf_tvm.comparison.chains import ChainCase, chain_cases, measure_chains, workloads
from gf_tvm.comparison.convolutions import ComparisonError, relative_error
from gf_tvm.comparison.run import Comparison, check_request, compare
from gf_tvm.core import reference
from gf_tvm.errors import DeviceError, GeometryError, ModelError
from gf_tvm.machine import cpu

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def quick_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "copy_bandwidth", lambda: 30.0)
    monkeypatch.setattr(cpu, "sgemm_peak", lambda: 150.0)


class Tail(nn.Module):
    """A convolution, three more with a batch norm and ReLUs in place between them, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.first = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.norm, self.act = nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.second, self.third = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.first(torch.relu(self.stem(x)))))
        y = self.third(self.act(self.second(y)))
        logits: Tensor = self.head(self.pool(y).flatten(1))
        return logits


SHAPE = (2, 3, 8, 8)


def run_once(model: nn.Module | None = None, library: Any = None, **options: Any) -> Comparison:
    cases = chain_cases(model or Tail(), SHAPE, **{"last": 3, "patches": [2], **options})
    return compare([], library, repeats=5, seconds=0.0, chains=cases)


def test_rows_have_the_documented_fields() -> None:
    """The schema that other tools read, after a round trip through JSON."""
    result = run_once(patches=[2, 4])
    document = json.loads(json.dumps(result.to_dict()))
    assert (document["schema_version"], document["rows"], document["geometric_means"]) == (1, [], [])
    assert "operations of one chain" in document["conditions"]["chains"]
    assert document["conditions"]["unchained"] == {}
    assert [row["patch"] for row in document["chains"]] == [[2, 2], [4, 4]]
    for row, patches in zip(document["chains"], (16, 4), strict=True):
        expected = {
            "name": "first to third", "dtype": "float32", "input": [2, 3, 8, 8],
            "convolutions": ["first", "second", "third"], "entries": [[2, 4, 8, 8]], "exits": [[2, 6, 1, 1]],
            "schedule": "torch", "filtered_schedule": "torch",
            "kernels": {"filtered": {"torch": 3}, "chained": {"torch": 5}},  # nothing before the first is trained
        }  # fmt: skip
        assert {key: row[key] for key in expected} == expected
        assert len(row["ends"]) == 1
        for part in ("forward", "backward"):
            assert list(row[f"{part}_ms"]) == list(row[f"{part}_ms_quartiles"]) == list(VARIANTS)
            for variant in VARIANTS:
                lower, upper = row[f"{part}_ms_quartiles"][variant]
                assert 0 < lower <= row[f"{part}_ms"][variant] <= upper
        assert row["repeats"] == dict.fromkeys(VARIANTS, 5)
        assert 0 < row["max_rel_error"] < 1e-5
        # x~ of three convolutions, the means of two ReLUs, and the scales of the batch norm.
        chained = 4 * (2 * patches * (4 + 8 + 8 + 8 + 8) + 8)
        # The map before the batch norm and those behind the ReLUs, which the next convolution keeps, too; the input.
        maps = 4 * 2 * 64 * (8 + 8 + 8)
        filtered = maps + 4 * 2 * patches * (4 + 8 + 8)
        assert row["kept_bytes"] == {"exact": maps + 4 * 2 * 64 * 4, "filtered": filtered, "chained": chained}
        weights = [8 * 4 * 9, 8 * 8 * 9, 6 * 8]
        moved = chained + 4 * (sum(weights) + sum(weights[1:]) + 2 * 6)
        products = [2 * 2 * patches * a * b for a, b in ((8, 4), (8, 8), (6, 8))]
        assert row["moved_bytes"] == moved
        assert row["operations"] == sum(products) + sum(products[1:])
        times = {"bandwidth": moved / 30e6, "arithmetic": row["operations"] / 150e6}
        assert row["roofline_ms"] == pytest.approx(max(times.values()))
        assert row["roofline"] == max(times, key=times.__getitem__)
    (row, _) = result.chains
    assert row.speedup == row.backward_ms["exact"] / row.backward_ms["chained"]
    assert row.speedup_filtered == row.backward_ms["filtered"] / row.backward_ms["chained"]
    assert row.limit_fraction == row.roofline_ms / row.backward_ms["chained"]


def test_limits_of_chains_alone_are_the_best_of_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    bandwidths, peaks = iter((10.0, 20.0)), iter((200.0, 100.0))
    monkeypatch.setattr(cpu, "copy_bandwidth", lambda: next(bandwidths))
    monkeypatch.setattr(cpu, "sgemm_peak", lambda: next(peaks))
    result = run_once()
    assert (result.bandwidth_gbs, result.peak_gflops) == (20.0, 200.0)
    (row,) = result.chains
    assert row.roofline_ms == pytest.approx(max(row.moved_bytes / 20e6, row.operations / 200e6))
    assert result.conditions["limits"].endswith("best of start and end")


class Sized(nn.Module):
    """Sizes of maps inside and outside of the chain, and of a batch, which the comparison takes in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = F.avg_pool2d(x, 2)
        y = self.first(self.stem(x)).relu()
        image = y.mean((2, 3), keepdim=True)
        y = y + F.interpolate(image, size=half.shape[2:]) + F.interpolate(image, size=y.shape[2:])
        y = self.second(y).relu()
        y = y.mean((2, 3), keepdim=True)
        logits: torch.Tensor = self.head(y.view(y.size(0), -1))
        return logits


def test_sizes_of_maps_outside_of_the_chain() -> None:
    (row,) = run_once(Sized(), last=2).chains
    assert row.convolutions == ("first", "second")
    assert row.max_rel_error < 1e-5


def test_the_model_is_left_as_it_is() -> None:
    model = Tail().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cases = chain_cases(model, SHAPE, last=2, patches=[2, (4, 2)])
    measure_chains(cases[0], None, (5, 0.0), lambda part, what: None)
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not gf_tvm.filter_report(model).filtered
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    trained = {name for name, p in cases[0].model.named_parameters() if p.requires_grad}
    assert trained == {"second.weight", "second.bias", "third.weight", "third.bias", "head.weight", "head.bias"}
    assert [case.patch for case in cases] == [(2, 2), (4, 2)]


def wrong_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    right = run.grids.patch_means
    monkeypatch.setattr(run.grids, "patch_means", lambda t, grid: 1.01 * right(t, grid))


def wrong_product(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.weight_grad
    monkeypatch.setattr(kernels, "weight_grad", lambda *args: 1.001 * right(*args))


def wrong_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 alone, as a kernel would be."""
    right = reference.backward

    def wrong(grad_y: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
        x, w, b = right(grad_y, *args)
        return x, None if w is None else w * (1.001 if grad_y.dtype == torch.float32 else 1), b

    monkeypatch.setattr(reference, "backward", wrong)


def wrong_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a map that comes in, where an earlier convolution is trained in front of the chain."""
    right = run.grids.expand
    monkeypatch.setattr(run.grids, "expand", lambda t, grid: 1.001 * right(t, grid))


def wrong_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    right = run.elementwise.run

    def wrong(*args: Any) -> Any:
        y, derivative = right(*args)
        return 1.01 * y, derivative

    monkeypatch.setattr(run.elementwise, "run", wrong)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (wrong_mean, "the gradient of first.weight of the chained variant"),
        (wrong_product, "the gradient of first.weight of the chained variant"),
        (wrong_layer, "the gradient of first.weight of the filtered variant"),
        (wrong_forward, "the forward pass of the chained variant"),
    ],
)
def test_a_wrong_gradient_is_not_timed(
    spoil: Callable[[pytest.MonkeyPatch], None], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch)
    monkeypatch.setattr(chain_variants, "measure", lambda *args: pytest.fail("was timed"))
    with pytest.raises(ComparisonError, match=f"R2: {what} is wrong, so it was not timed: relative error"):
        run_once()


class TwoChains(nn.Module):
    """Two pairs of convolutions with max pooling between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.c, self.d = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.e = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.max_pool2d(self.b(torch.relu(self.a(x))), 3, 2, 1)
        y = torch.max_pool2d(self.d(nn.functional.silu(self.c(y))), 3, 2, 1)
        return self.e(y)


def test_a_row_for_each_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_once(TwoChains(), last=5)
    assert [row.convolutions for row in result.chains] == [("a", "b"), ("c", "d")]
    assert [row.entries for row in result.chains] == [((2, 3, 8, 8),), ((2, 4, 4, 4),)]
    assert set(result.conditions["unchained"]["R2"]) == {"e"}
    wrong_map(monkeypatch)  # the second chain hands its gradient on
    with pytest.raises(ComparisonError, match="chain of c, d R2: the gradient of map 1 of the chained variant"):
        run_once(TwoChains(), last=5)


def test_without_chains_there_is_a_reason() -> None:
    result = run_once(TwoChains(), last=1)
    assert result.chains == ()
    ((name, reason),) = result.conditions["unchained"]["R2"].items()
    assert name == "e"
    assert reason
    json.dumps(result.to_dict())


class Cancelling(nn.Module):
    """Maps that are zero but for rounding, before a ReLU: in float64 other pixels are positive."""

    def __init__(self) -> None:
        super().__init__()
        self.spread, self.cancel = nn.Conv2d(1, 3, 1, bias=False), nn.Conv2d(3, 4, 1, bias=False)
        self.last = nn.Conv2d(4, 4, 3, padding=1)
        with torch.no_grad():
            self.spread.weight.fill_(1.0)
            self.cancel.weight.copy_(torch.tensor([0.1, 0.2, -0.3]).view(1, 3, 1, 1).expand(4, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.cancel(self.spread(x)))).mean((2, 3))


def test_signs_are_those_of_the_float32_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = chain_cases(Cancelling(), (2, 1, 16, 16), last=3, patches=[2])
    (row,) = compare([], repeats=5, seconds=0.0, chains=[case]).chains
    assert row.max_rel_error < 1e-5
    # The test means nothing unless a forward pass in float64 sees other signs.
    monkeypatch.setattr(chain_variants._Pin, "apply", lambda value, instead: value)
    with pytest.raises(ComparisonError, match="is wrong"):
        compare([], repeats=5, seconds=0.0, chains=[case])


def test_the_reference_may_walk_through_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for values in (1, 1 << 23):
        monkeypatch.setattr(chain_variants, "_VALUES", values)
        (case,) = chain_cases(TwoChains(), (3, 3, 8, 8), last=3, patches=[2])
        model = gf_tvm.filter_model(copy.deepcopy(case.model), 2, layers=list(case.layers))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", gf_tvm.FallbackWarning)
            model(torch.zeros(case.input_shape))
            (piece,) = pieces_of(model)
            part = chain_variants.ChainVariants(piece, case.patch, case.dtype, dict.fromkeys(VARIANTS, model))
            found.append(chain_variants._gradients_in_float64(part.steps["filtered"], model))
    one_by_one, whole = found
    assert one_by_one.keys() == whole.keys() > set()
    for name in whole:
        assert relative_error(one_by_one[name], whole[name]) < 1e-12


@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    blocks=st.lists(BLOCKS, min_size=1, max_size=3),
    head=st.sampled_from(["pool", "mean", "map"]),
    size=st.tuples(st.integers(6, 13), st.integers(6, 13)),
    patch=st.sampled_from([2, 4, (2, 3)]),
)
def test_a_piece_is_the_chain_that_the_network_runs(
    blocks: list[nn.Module], head: str, size: tuple[int, int], patch: Any
) -> None:
    """Random networks in float64: the operations by themselves, chained and one by one, give the same."""
    torch.manual_seed(0)
    model = Network(copy.deepcopy(blocks), head).double()
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and not n.endswith("exact")]
    x = torch.randn(2, CHANNELS, *size, dtype=torch.float64)
    try:
        with torch.no_grad():
            copy.deepcopy(model).eval()(x)
    except (RuntimeError, ValueError):  # a map became too small for a kernel
        assume(False)
    assume(layers)
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gf_tvm.FallbackWarning)
        chained = gf_tvm.filter_model(copy.deepcopy(model), patch, layers=layers)
        plain = gf_tvm.filter_model(copy.deepcopy(model), patch, layers=layers, chain=False)
        chained(x)
        pieces = list(pieces_of(chained))
        assert [piece.convolutions for piece in pieces] == [c.convolutions for c in chains_of(chained).chains]
        for piece in pieces:
            results = []
            for copied, how in ((chained, "chained"), (plain, "one_by_one")):
                bound = Bound(piece, copied)
                torch.manual_seed(1)
                leaves = [torch.randn(s, dtype=torch.float64).requires_grad_(need) for s, need in piece.entries]
                exits = getattr(bound, how)([leaf.clone() for leaf in leaves])
                used = [y for y, v in zip(exits, piece.plan.exits, strict=True) if piece.step.situation.needs[v]]
                grads = torch.autograd.grad(
                    used,
                    [*(leaf for leaf in leaves if leaf.requires_grad), *bound.trained],
                    [torch.randn_like(y) for y in used],
                    allow_unused=True,
                )
                results.append([*exits, *(g for g in grads if g is not None)])
            assert len(results[0]) == len(results[1])
            scale = max(float(t.detach().norm()) for t in results[1])
            for a, b in zip(*results, strict=True):
                assert float((a - b).detach().norm()) <= 1e-10 * max(float(b.detach().norm()), 1e-4 * scale)


def test_kernels_are_those_that_run() -> None:
    """The workloads that a library is built of are the ones that both variants find in it."""
    chained = ("input_grad", "weight_grad")
    library = FakeLibrary(has=("filter_input", "backward", "backward_weight", *chained))
    with loaded(library), pytest.MonkeyPatch.context() as patch:
        patch.setattr("gf_tvm.nn.check_library", lambda found: None)
        patch.setattr("fake_library.FakeKernel.schedule", "tuned", raising=False)
        (case,) = chain_cases(Tail(), SHAPE, last=3, patches=[2])
        outcome = measure_chains(case, library, (5, 0.0), lambda part, what: None)  # type: ignore[arg-type]
    (measured,) = outcome.chains
    assert measured.row("host", (1.0, 1.0)).schedule == "tuned"
    assert measured.schedules == {"filtered": {"tuned": 3}, "chained": {"tuned": 5}}
    assert set(library.called) == set(library.has)
    assert {w.kernel for w in case.workloads()} == set(library.called)
    assert workloads([case, case]) == case.workloads()
    lacking = FakeLibrary(has=("filter_input", "backward", "weight_grad"), digest="lacking")
    with loaded(lacking), pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", gf_tvm.FallbackWarning)
        patch.setattr("gf_tvm.nn.check_library", lambda found: None)
        patch.setattr("fake_library.FakeKernel.schedule", "default", raising=False)
        outcome = measure_chains(case, lacking, (5, 0.0), lambda part, what: None)  # type: ignore[arg-type]
    row = outcome.chains[0].row("host", (1.0, 1.0))
    assert (row.schedule, row.filtered_schedule) == ("torch", "default")
    assert row.kernels["chained"] == {"default": 3, "torch": 2}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(dtype: str) -> None:
    (row,) = run_once(dtypes=[dtype]).chains
    assert row.dtype == dtype
    assert 0 < row.max_rel_error < 0.1
    assert row.kept_bytes["exact"] < run_once().chains[0].kept_bytes["exact"]


def test_requests_that_cannot_be_met() -> None:
    with pytest.raises(ComparisonError, match="there is nothing to compare"):
        compare([])
    (case,) = chain_cases(Tail(), SHAPE, last=2)
    with pytest.raises(DeviceError, match="chains are measured on CPUs, and 'jetson-nano' is a GPU"):
        check_request([], "jetson-nano", chains=[case])
    with pytest.raises(ModelError, match="last must be between 1 and 4"):
        chain_cases(Tail(), SHAPE, last=5)
    with pytest.raises(GeometryError, match="patches must be a non-empty list"):
        chain_cases(Tail(), SHAPE, last=2, patches=[])
    with pytest.raises(ModelError, match="the model works in float64; kernels store float32"):
        chain_cases(Tail().double(), SHAPE, last=2)
    wide = ChainCase(case.model, (2, 4, 8, 8), case.layers, case.patch, case.dtype)
    with pytest.raises(ModelError, match="Tail does not run on an input of shape 2x4x8x8: "):
        compare([], chains=[wide], seconds=0.0)


def test_a_gradient_that_lacks_is_not_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run._Backward, "_give", lambda *args: None)
    with pytest.raises(
        ComparisonError, match="of the chained variant is wrong, so it was not timed: relative error 1 "
    ):
        run_once()


def test_a_forward_pass_that_rounds_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a ReLU may see other signs at single pixels, which is no error; a mean that is 1 % off still is one."""
    right = run.elementwise.run

    def rounded(*args: Any) -> Any:
        y, derivative = right(*args)
        if derivative is not None:
            derivative = derivative.clone()
            derivative[0, 0, 0, 0] = 1 - derivative[0, 0, 0, 0]
        return y * (1 + 3e-7), derivative

    monkeypatch.setattr(run.elementwise, "run", rounded)
    case = chain_cases(Tail(), (64, 3, 24, 24), last=3, patches=[2])
    (row,) = compare([], repeats=5, seconds=0.0, chains=case).chains
    assert row.max_rel_error > 1e-4
    wrong_mean(monkeypatch)
    with pytest.raises(ComparisonError, match="of the chained variant is wrong"):
        compare([], repeats=5, seconds=0.0, chains=case)

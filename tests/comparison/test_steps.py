"""Whole steps: every variant is checked and measured, memory in processes of their own, limits by hand."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gf_tvm.comparison import step_memory, steps
from gf_tvm.comparison.chains import ChainCase, chain_cases
from gf_tvm.comparison.convolutions import ComparisonError
from gf_tvm.comparison.step_limits import step_limit
from gf_tvm.comparison.steps import VARIANTS, TrainingStep, measure_steps
from gf_tvm.models import build_model

SHAPE = (2, 3, 16, 16)
LIMITS = (100.0, 10.0)


def cases(patches: tuple[int, ...] = (2,)) -> list[ChainCase]:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = build_model("resnet18_025", 10, image_size=16)
    return chain_cases(model, SHAPE, last=2, patches=patches)


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its compiler takes tens of seconds."""
    eager = replace(VARIANTS["compiled"], make=lambda model, *_: torch.compile(model, backend="eager"))
    monkeypatch.setitem(VARIANTS, "compiled", eager)


@pytest.mark.usefixtures("without_inductor")
def test_every_variant_is_measured_for_every_patch() -> None:
    asked = []

    def memory(variant: steps.Variant, patch: tuple[int, int], case: ChainCase) -> dict[str, object]:
        asked.append((variant.name, patch if variant.filtered else None))
        return {"reason": "no"} if variant.name == "chained" else {"peak_bytes": 5, "step_peak_bytes": 4}

    both = cases((2, 4))
    model = both[0].model
    other = {"other": lambda: model(TrainingStep(model, SHAPE).x).detach()}
    rows = measure_steps("resnet", both, None, "host", (5, 0.0), LIMITS, memory=memory, forwards=other)
    assert [row.patch for row in rows] == [(2, 2), (4, 4)]
    for row in rows:
        for part in (row.forward_ms, row.backward_ms, row.update_ms, row.step_ms, row.limit_ms, row.kept_bytes):
            assert list(part) == list(VARIANTS)
        assert all(ms > 0 for ms in row.step_ms.values())
        assert all(row.step_ms[v] >= max(row.forward_ms[v], row.backward_ms[v]) for v in VARIANTS)
        assert all(count >= 3 for count in row.repeats.values())
        assert all(0 < error < 1e-5 for error in row.max_rel_error.values())
        assert row.kept_bytes["chained"] < row.kept_bytes["filtered"] < row.kept_bytes["exact"]
        assert set(row.forward_only_ms) == {"other"}
        assert row.peak_bytes == {v: None if v == "chained" else 5 for v in VARIANTS}
        assert row.unmeasured["memory of chained"] == "no"
        json.dumps(row.to_dict())
    assert rows[0].step_ms["exact"] == rows[1].step_ms["exact"]  # measured once
    assert len(asked) == len(set(asked))
    assert model.conv1.weight.grad is None  # the user's own is left alone


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("name", [*VARIANTS, "other"])
def test_what_is_wrong_is_not_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = cases()
    others = {}
    if name == "other":
        others["other"] = lambda: torch.zeros(2, 10)
    else:
        right = VARIANTS[name].make

        def wrong(model: nn.Module, *args: object) -> nn.Module:
            made = right(model, *args)  # type: ignore[arg-type]
            with torch.no_grad():
                model.get_submodule(case.layers[-1]).weight.mul_(1.01)
            return made

        monkeypatch.setitem(VARIANTS, name, replace(VARIANTS[name], make=wrong))
    monkeypatch.setattr(steps, "measure", lambda *_: pytest.fail("timed"))
    with pytest.raises(ComparisonError, match=f"{name}.* is wrong, so nothing was timed"):
        measure_steps("resnet", [case], None, "host", (5, 0.0), LIMITS, forwards=others)


def test_only_float32() -> None:
    (case,) = cases()
    with pytest.raises(ComparisonError, match="in float32, got bfloat16"):
        measure_steps("resnet", [replace(case, dtype="bfloat16")], None, "host", (5, 0.0), LIMITS)


def test_a_compiler_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> nn.Module:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setitem(VARIANTS, "compiled", replace(VARIANTS["compiled"], make=fails))
    (row,) = measure_steps("resnet", cases(), None, "host", (5, 0.0), LIMITS)
    assert row.unmeasured["compiled"] == "RuntimeError: no compiler"
    assert "compiled" not in row.step_ms


@settings(max_examples=5, deadline=None)
@given(
    n=st.integers(1, 3),
    ci=st.integers(1, 5),
    co=st.integers(1, 5),
    side=st.integers(3, 9),
    peak=st.sampled_from([1e-3, 1e6]),
)
def test_limits_of_one_convolution(n: int, ci: int, co: int, side: int, peak: float) -> None:
    convolution = nn.Conv2d(ci, co, 3, padding=1, bias=False)
    x, bandwidth = torch.randn(n, ci, side, side), 10.0

    def loss() -> tuple[torch.Tensor, torch.Tensor]:
        y = convolution(x)
        return y, y.sum()

    found = step_limit(loss, [convolution.weight], (peak, bandwidth), fused=True)
    operations = 2 * n * co * ci * side * side * 9
    moved = 4 * (n * ci * side * side + n * co * side * side + co * ci * 9)
    assert (found.forward_operations, found.forward_bytes) == (operations, moved)
    assert found.forward == pytest.approx(max(operations / peak, moved / bandwidth) / 1e6)
    assert found.backward_operations == operations  # grad_W alone
    # Unfused, the sum comes on top: y read, one number written.
    unfused = step_limit(loss, [convolution.weight], (peak, bandwidth))
    assert unfused.forward_bytes == moved + 4 * (n * co * side * side + 1)


def test_memory_of_a_process() -> None:
    """Of a step that keeps 64 MB more than another."""

    (case,) = cases()
    small = step_memory.peaks(VARIANTS["exact"], (2, 2), case, None)
    large = step_memory.peaks(VARIANTS["exact"], (2, 2), replace(case, input_shape=(512, *SHAPE[1:])), None)
    assert 0 < small["step_peak_bytes"] <= small["peak_bytes"]
    grown = large["step_peak_bytes"] - small["step_peak_bytes"]
    kept = 510 * 3 * 16 * 16 * 4  # the images alone
    assert grown > kept


def test_what_a_process_says_when_it_fails() -> None:
    (case,) = cases()
    model = copy.deepcopy(case.model)
    model.extra = lambda: None
    refused = step_memory.peaks(VARIANTS["exact"], (2, 2), replace(case, model=model), None)
    assert "cannot be pickled" in refused["reason"]
    wrong = step_memory.peaks(VARIANTS["exact"], (2, 2), replace(case, input_shape=(1, 5, 8, 8)), None)
    assert "channels" in wrong["reason"]


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_operations_of_a_grouped_convolution(groups: int) -> None:
    """Each product of the backward pass has as many terms as the forward pass."""
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=False)
    x = torch.randn(2, 8, 6, 6, requires_grad=True)

    def loss() -> tuple[torch.Tensor, torch.Tensor]:
        y = conv(x)
        return y, y.sum()

    found = step_limit(loss, [conv.weight], (100.0, 10.0))
    operations = 2 * 2 * 8 * 6 * 6 * (8 // groups) * 9
    assert found.forward_operations == operations
    assert found.backward_operations == 2 * operations

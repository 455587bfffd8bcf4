"""Comparing: checks before timing, rows, limits, geometric means. Kernels are played by the reference, so no TVM."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import known_limits
import pytest
import torch
from torch import Tensor

from gf_cuda import rounds
from gf_tvm.comparison import convolutions
from gf_tvm.comparison import cpu as backend
from gf_tvm.comparison.convolutions import (
    ComparisonError,
    Data,
    Variants,
    exact_backward,
    relative_error,
    tolerance,
)
from gf_tvm.comparison.limits import roofline, traffic
from gf_tvm.comparison.plot import plot
from gf_tvm.comparison.run import Comparison, compare, geometric_means
from gf_tvm.core import reference
from gf_tvm.core.geometry import Geometry
from gf_tvm.errors import DeviceError, GfTvmError
from gf_tvm.machine import cpu, profiles, timing
from gf_tvm.machine.timing import measure
from gf_tvm.shapes import Case

SMALL = Geometry(2, 4, 6, 9, 8, (3, 3), (2, 2), padding=(1, 1))

#: Everything that can go differently: oblong, strided, uncovered input, grouped, depthwise, dilated, one pixel.
GEOMETRIES = [
    SMALL,
    Geometry(1, 4, 4, 7, 7, (3, 3), (2, 3), (2, 2), (1, 1), groups=2),
    Geometry(3, 6, 6, 11, 5, (5, 3), (4, 2), padding=(0, 0)),
    Geometry(2, 5, 5, 8, 8, (3, 3), (2, 2), padding=(1, 1), groups=5),
    Geometry(2, 4, 4, 12, 12, (3, 3), (2, 2), padding=(4, 4), dilation=(4, 4)),
    Geometry(1, 1, 1, 1, 1, (1, 1), (7, 7)),
]


class FakeKernel:
    """A kernel of a library: the reference, with ``spoil`` applied to what it wrote."""

    def __init__(self, kernel: str, geometry: Geometry, spoil: Callable[..., None], schedule: str) -> None:
        self.kernel, self.geometry, self.spoil, self.schedule = kernel, geometry, spoil, schedule
        self.calls = 0

    def __call__(self, *tensors: Tensor) -> None:
        self.calls += 1
        assert all(t.is_contiguous() for t in tensors)
        geometry = self.geometry
        if self.kernel == "filter_input":
            x, saved = tensors
            assert saved.shape == geometry.saved_shape
            sums = reference.filter_input(x, geometry)
            saved.copy_(sums if geometry.depthwise else sums.permute(0, 2, 3, 1))
            self.spoil(saved)
            return
        grad_y, saved, weight, grad_x, grad_w, grad_b = tensors
        filtered = saved if geometry.depthwise else saved.permute(0, 3, 1, 2)
        results = reference.backward(grad_y, filtered, weight, geometry)
        inside = torch.ones(geometry.grid)[None, None]
        inside = reference.expand(inside.expand(1, geometry.ci, *geometry.grid), geometry) > 0
        assert results[0] is not None
        grad_x.copy_(torch.where(inside, results[0], grad_x))  # pixels outside of all patches are left alone
        for output, result in zip((grad_w, grad_b), results[1:], strict=True):
            assert result is not None
            output.copy_(result)
        self.spoil(grad_x, grad_w, grad_b)


class FakeLibrary:
    """Kernels for given cases; ``spoil`` by name of the kernel."""

    path, digest, device = Path("somewhere/fake.gfb"), "0" * 64, "x86-64-v4"

    def __init__(
        self, cases: list[Case], spoil: dict[str, Callable[..., None]] | None = None, schedule: str = "tuned"
    ) -> None:
        keep = dict.fromkeys(("filter_input", "backward"), lambda *tensors: None) | (spoil or {})
        self.kernels = {
            (name, c.geometry, c.dtype): FakeKernel(name, c.geometry, how, schedule)
            for c in cases
            for name, how in keep.items()
        }

    def find(self, kernel: str, geometry: Geometry, dtype: str) -> FakeKernel | None:
        return self.kernels.get((kernel, geometry, dtype))


@pytest.fixture(autouse=True)
def quick_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits are not what is tested here, and measuring them takes seconds."""
    known_limits.install(monkeypatch)


def run(cases: list[Case], library: Any = None, **options: Any) -> Comparison:
    return compare(cases, library, **{"repeats": 5, "seconds": 0.0, **options})


def test_rows_have_the_documented_fields() -> None:
    """The schema that other tools read: names and types, after a round trip through JSON."""
    case = Case("small", SMALL)
    document = json.loads(json.dumps(run([case], FakeLibrary([case])).to_dict()))
    assert {"schema_version", "machine", "threads", "versions", "peak_gflops", "bandwidth_gbs", "conditions"} <= set(
        document
    )
    assert document["schema_version"] == 1
    assert (document["peak_gflops"], document["bandwidth_gbs"]) == (150.0, 30.0)
    assert document["threads"] == torch.get_num_threads()
    assert document["versions"]["torch"] == torch.__version__
    assert document["conditions"]["library"] == {"file": "fake.gfb", "sha256": "0" * 64}
    (row,) = document["rows"]
    expected = {
        "name": "small", "device": profiles.get_profile("host").name, "dtype": "float32", "n": 2, "ci": 4, "co": 6,
        "h": 9, "w": 8, "kernel": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1,
        "patch": [2, 2], "baseline": "onednn" if cpu.has_onednn() else "torch",
        "schedule": "tuned", "filter_input_schedule": "tuned",
        "saved_bytes_baseline": 2 * 4 * 9 * 8 * 4, "saved_bytes_gf_tvm": 2 * 4 * 5 * 4 * 4,
    }  # fmt: skip
    assert {key: row[key] for key in expected} == expected
    for variant in ("baseline", "reference", "gf_tvm", "filter_input"):
        lower, upper = row[f"{variant}_ms_quartiles"]
        assert 0 < lower <= row[f"{variant}_ms"] <= upper
    assert row["gf_tvm_kernel_ms"] > 0
    assert row["roofline_ms"] > 0
    assert row["roofline"] in ("bandwidth", "arithmetic")
    assert 0 < row["max_rel_error"] < 1e-5
    assert row["repeats"] == {"baseline": 5, "reference": 5, "gf_tvm": 5}
    # The limits of the row's own rounds, as benchmarks/cpu.py has them.
    assert (row["peak_gflops"]["median"], row["bandwidth_gbs"]["median"]) == (150.0, 30.0)
    assert (row["limit_ms"], row["limit"]) == (row["roofline_ms"], row["roofline"])
    assert row["fraction_of_limit"] == row["limit_ms"] / row["gf_tvm_ms"]
    assert row["kernel_fraction_of_limit"] == row["limit_ms"] / row["gf_tvm_kernel_ms"]
    assert (row["moved_bytes"], row["operations"]) == traffic(SMALL, "float32")
    assert row["others"] == {}


def test_without_library_or_kernel_the_reference_counts() -> None:
    case, other = Case("small", SMALL), Case("other", GEOMETRIES[1])
    for library in (None, FakeLibrary([other])):
        (row,) = run([case], library).rows
        assert (row.schedule, row.filter_input_schedule) == ("torch", "torch")
        assert row.gf_tvm_ms == row.reference_ms
        assert row.gf_tvm_kernel_ms is None
        assert row.max_rel_error < 1e-5


def test_default_schedules_are_said() -> None:
    case = Case("small", SMALL)
    (row,) = run([case], FakeLibrary([case], schedule="default")).rows
    assert (row.schedule, row.filter_input_schedule) == ("default", "default")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda geometry: geometry.key)
def test_right_kernels_pass_the_check(geometry: Geometry, dtype: str) -> None:
    case = Case("case", geometry, dtype)
    data = Data.random(case)
    convolutions.check_baseline(case, data)
    with torch.no_grad():
        error = Variants(case, data, FakeLibrary([case])).check()  # type: ignore[arg-type]
    assert error <= tolerance(dtype, 1000)


def scale(*tensors: Tensor) -> None:
    for tensor in tensors:
        tensor.mul_(1.001)


def skip_one(grad_x: Tensor, grad_w: Tensor, grad_b: Tensor) -> None:
    """An element that was never written keeps whatever lay in memory."""
    grad_x.view(-1)[-1] = math.nan


def drop_a_term(grad_x: Tensor, grad_w: Tensor, grad_b: Tensor) -> None:
    grad_b.sub_(1e-3 * grad_b.abs().max())


def shift(grad_x: Tensor, grad_w: Tensor, grad_b: Tensor) -> None:
    grad_x.copy_(grad_x.roll(1, -1))


def one_tap(grad_x: Tensor, grad_w: Tensor, grad_b: Tensor) -> None:
    grad_w[..., 0] = 0


@pytest.mark.parametrize(
    ("kernel", "how", "output"),
    [
        ("backward", scale, "grad_x"),
        ("backward", skip_one, "grad_x"),
        ("backward", shift, "grad_x"),
        ("backward", one_tap, "grad_W"),
        ("backward", drop_a_term, "grad_b"),
        ("filter_input", scale, "x~"),
    ],
)
def test_a_wrong_kernel_is_refused_before_anything_is_timed(
    kernel: str, how: Callable[..., None], output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[Any] = []
    monkeypatch.setattr(backend, "measure", lambda *arguments: timed.append(arguments))
    case = Case("small", SMALL)
    with pytest.raises(ComparisonError, match=f"case small R2: {output} of gf_tvm is wrong") as caught:
        run([case], FakeLibrary([case], {kernel: how}))
    assert "\n" not in str(caught.value)
    assert not timed


def test_a_kernel_that_leaves_an_output_out_is_refused() -> None:
    case = Case("small", SMALL)
    library = FakeLibrary([case])
    library.kernels["backward", SMALL, "float32"].__class__ = type(
        "Lazy", (FakeKernel,), {"__call__": lambda self, *tensors: None}
    )
    with pytest.raises(ComparisonError, match="relative error inf"):
        run([case], library)


def test_a_wrong_baseline_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(grad_y: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        grad_x, grad_w = exact_backward(grad_y, x, weight, geometry)
        return grad_x, grad_w if x.dtype == torch.float64 else 1.01 * grad_w

    monkeypatch.setattr(convolutions, "exact_backward", wrong)
    with pytest.raises(ComparisonError, match="grad_W of the exact backward is wrong"):
        run([Case("small", SMALL)])


def test_the_baseline_is_the_exact_gradient() -> None:
    geometry = replace(SMALL, stride=(2, 1), dilation=(1, 2), groups=2)
    data = Data.random(Case("case", geometry))
    x, weight = data.x.double().requires_grad_(), data.weight.double().requires_grad_()
    y = torch.nn.functional.conv2d(
        x, weight, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    )
    expected = torch.autograd.grad(y, (x, weight), data.grad_y.double())
    found = exact_backward(data.grad_y, data.x, data.weight, geometry)
    assert max(relative_error(a, b) for a, b in zip(found, expected, strict=True)) < 1e-5


def test_the_check_in_pieces_sees_every_image() -> None:
    """Larger than one piece of the float64 check; the fault is in the last image only."""
    geometry = Geometry(3, 16, 16, 400, 400, (1, 1), (4, 4))
    case = Case("large", geometry)

    def last_image(grad_x: Tensor, grad_w: Tensor, grad_b: Tensor) -> None:
        grad_x[-1, 0, 0, 0] += 0.1

    data = Data.random(case)
    with torch.no_grad():
        assert Variants(case, data, FakeLibrary([case])).check() < 1e-4  # type: ignore[arg-type]
        with pytest.raises(ComparisonError, match="grad_x"):
            Variants(case, data, FakeLibrary([case], {"backward": last_image})).check()  # type: ignore[arg-type]


def test_relative_error() -> None:
    assert relative_error(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]).double()) == 0.25
    assert relative_error(torch.zeros(2), torch.zeros(2).double()) == 0
    assert relative_error(torch.ones(2), torch.zeros(2).double()) == math.inf
    assert relative_error(torch.tensor([math.nan, 1]), torch.ones(2).double()) == math.inf
    assert relative_error(torch.tensor([-math.inf, 1]), torch.ones(2).double()) == math.inf
    assert relative_error(torch.ones(2), torch.ones(3).double()) == math.inf


def test_tolerance_can_fail() -> None:
    """A term left out of a sum of that many random terms is seen; the dtypes are ordered by their precision."""
    for length in (1, 10, 1000, 100000):
        assert tolerance("float32", length) < 1 / (4 * math.sqrt(length))
        assert tolerance("float32", length) < tolerance("float16", length) < tolerance("bfloat16", length) < 0.01


def test_patches_of_one_convolution_share_a_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    monkeypatch.setattr(backend, "measure", lambda calls, *rest: runs.append(list(calls)) or measure(calls, *rest))
    cases = [Case("a", replace(SMALL, patch=patch)) for patch in ((2, 2), (4, 4))] + [Case("b", replace(SMALL, n=1))]
    rows = run(cases, FakeLibrary(cases)).rows
    assert [calls.count("baseline") for calls in runs] == [1, 1]
    assert [(row.name, row.patch) for row in rows] == [("a", (2, 2)), ("a", (4, 4)), ("b", (2, 2))]
    assert rows[0].baseline_ms == rows[1].baseline_ms
    assert rows[0].gf_tvm_ms != rows[1].gf_tvm_ms


def test_outputs_are_allocated_in_every_call() -> None:
    case = Case("small", SMALL)
    calls = Variants(case, Data.random(case), FakeLibrary([case]))  # type: ignore[arg-type]
    first, second = calls.kernel_backward(), calls.kernel_backward()
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(first, second, strict=True))


def test_measure_interleaves_and_varies_the_order() -> None:
    log: list[str] = []
    calls = {name: (lambda name=name: log.append(name)) for name in "abc"}
    times = measure(calls, 40, 60.0)
    assert {t.repeats for t in times.values()} == {40}
    rounds = ["".join(log[i : i + 3]) for i in range(9, len(log), 3)]  # 3 warm-up calls of each
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) == 6


def test_measure_gives_slow_calls_fewer_repeats_spread_over_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    clock = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def call(name: str, seconds: float) -> None:
        clock[0] += seconds
        log.append(name)

    parts: list[float] = []
    calls = {"slow": lambda: call("slow", 0.02), "fast": lambda: call("fast", 1e-6)}
    times = measure(calls, 100, 0.4, parts.append)
    assert times["fast"].repeats == 100
    assert 5 <= times["slow"].repeats <= 10
    assert times["slow"].median == pytest.approx(20)
    timed = log[6:]
    slow_at = [i for i, name in enumerate(timed) if name == "slow"]
    assert max(b - a for a, b in zip([0, *slow_at], [*slow_at, len(timed)], strict=True)) < 40
    assert parts[-1] == 1
    assert parts == sorted(parts)


def test_measure_makes_the_least_repeats_without_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure({"a": lambda: None}, 100, 0.0)["a"].repeats == 5
    monkeypatch.setattr(rounds, "SLOW_SECONDS", 0.0)
    assert measure({"a": lambda: None}, 100, 0.0)["a"].repeats == 3


def test_median_and_quartiles() -> None:
    found = timing.timing_of([0.001 * v for v in (5, 1, 3, 2, 4)])
    assert found.median == pytest.approx(3)
    assert found.quartiles == pytest.approx((2, 4))


def test_limits_are_the_best_of_all_rounds_and_a_row_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"copy": iter((10.0, 20.0)), "sgemm": iter((200.0, 100.0))}
    monkeypatch.setattr(backend.LimitCall, "rates", lambda self, timing: known_limits.rates_of(next(rates[self.name])))
    result = run([Case("small", SMALL), Case("other", replace(SMALL, n=1))])
    assert (result.bandwidth_gbs, result.peak_gflops) == (20.0, 200.0)
    assert result.rows[0].roofline_ms == roofline(SMALL, "float32", 200.0, 20.0)[0]
    for row, geometry, limits in zip(
        result.rows, (SMALL, replace(SMALL, n=1)), ((200.0, 10.0), (100.0, 20.0)), strict=True
    ):
        assert (row.limit_ms, row.limit) == roofline(geometry, "float32", *limits)
        assert row.fraction_of_limit == row.limit_ms / row.gf_tvm_ms
        assert row.limit_fraction == row.roofline_ms / row.gf_tvm_ms


def test_roofline_of_a_paper_case() -> None:
    """By hand: 512 channels, 14x14, R2: 2 products of 32*49 x 512 x 512 multiply-adds; 25.7 MB of gradients."""
    geometry = Geometry(32, 512, 512, 14, 14, (3, 3), (2, 2), padding=(1, 1))
    operations = 2 * 2 * 32 * 49 * 512 * 512
    assert roofline(geometry, "float32", 200.0, 1e6) == (pytest.approx(operations / 200e9 * 1e3), "arithmetic")
    moved = 4 * (2 * 32 * 512 * 14 * 14 + 32 * 512 * 49 + 2 * 512 * 512 * 9)
    assert roofline(geometry, "float32", 1e9, 35.0) == (pytest.approx(moved / 35e9 * 1e3), "bandwidth")
    half = moved / 2 + 2 * 32 * 512 * 49  # x~ is kept in float32
    assert roofline(geometry, "float16", 1e9, 35.0)[0] == pytest.approx(half / 35e9 * 1e3)
    grouped = roofline(replace(geometry, groups=4), "float32", 200.0, 1e6)[0]
    assert grouped == pytest.approx(operations / 4 / 200e9 * 1e3)


def test_geometric_means(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = run([Case("a", SMALL)]).rows
    rows = [
        replace(row, baseline_ms=8.0, reference_ms=4.0, gf_tvm_ms=2.0, roofline_ms=1.0, fraction_of_limit=0.9),
        replace(row, baseline_ms=2.0, reference_ms=1.0, gf_tvm_ms=2.0, roofline_ms=0.5, fraction_of_limit=0.4),
        replace(
            row, patch=(4, 4), baseline_ms=3.0, reference_ms=6.0, gf_tvm_ms=1.0, roofline_ms=0.1, fraction_of_limit=0.2
        ),
    ]
    assert geometric_means(rows) == [
        {
            "patch": (2, 2),
            "rows": 2,
            "speedup": pytest.approx(2.0),
            "speedup_reference": pytest.approx(1.0),
            "limit_fraction": pytest.approx(8**-0.5),
            "fraction_of_limit": pytest.approx(0.6),
        },
        {
            "patch": (4, 4),
            "rows": 1,
            "speedup": pytest.approx(3.0),
            "speedup_reference": pytest.approx(6.0),
            "limit_fraction": pytest.approx(0.1),
            "fraction_of_limit": pytest.approx(0.2),
        },
    ]


def test_threads_hold_for_the_run_only() -> None:
    before = torch.get_num_threads()
    seen = []
    case = Case("small", SMALL)
    library = FakeLibrary([case], {"backward": lambda *tensors: seen.append(torch.get_num_threads())})
    assert run([case], library, threads=1).threads == 1
    assert set(seen) == {1}
    assert torch.get_num_threads() == before
    with pytest.raises(DeviceError, match="threads must be at least 1, got 0"):
        run([case], threads=0)


def test_progress_only_grows_and_ends() -> None:
    seen: list[tuple[float, float, str]] = []
    run([Case("a", SMALL), Case("b", replace(SMALL, n=1))], progress=lambda *what: seen.append(what))
    done = [d for d, _, _ in seen]
    assert done == sorted(done)
    assert seen[-1][0] == seen[-1][1] > 0
    assert {"checking a", "timing a", "checking b", "timing b"} <= {what for _, _, what in seen}


def test_bad_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("small", SMALL)
    with pytest.raises(ComparisonError, match="no cases"):
        compare([])
    with pytest.raises(DeviceError, match="nonsense"):
        compare([case], device="nonsense")
    for seconds in (-1.0, math.nan, math.inf):
        with pytest.raises(ComparisonError, match="seconds"):
            compare([case], seconds=seconds)
    with pytest.raises(ComparisonError, match="repeats"):
        compare([case], repeats=2)
    other = "aarch64" if platform.machine() != "aarch64" else "x86-64-v4"
    with pytest.raises(DeviceError, match=f"device {other!r} .* is not this machine .*run it there"):
        compare([case], device=other)


def test_too_little_memory_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available_bytes", lambda: 10_000)
    with pytest.raises(ComparisonError, match=r"case huge needs about 10\.5 GB of memory"):
        run([Case("huge", Geometry(32, 128, 128, 250, 320, (3, 3), (2, 2), padding=(1, 1)))])


def test_machine_description() -> None:
    described = json.loads(json.dumps(cpu.describe()))
    assert described["cpu"]
    assert described["cores"] >= 1
    assert set(cpu.versions()) >= {"python", "torch", "apache-tvm", "gf-tvm"}


def test_other_load_is_what_this_process_did_not_use() -> None:
    """Two busy children against this process alone, in hundredths of a second of a clock that ticks at 100 Hz."""
    load = cpu.OtherLoad()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    alone = load.cores()
    if alone is None:
        pytest.skip("this system does not say")
    load = cpu.OtherLoad()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"], check=True, timeout=60)
    found = load.cores()
    assert found is not None
    assert found > 0.5


def test_limits_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(cpu, "available_bytes", lambda: 1 << 28)
    assert 0.1 < cpu.copy_bandwidth(0.01) < 10_000
    assert 0.1 < cpu.sgemm_peak(0.01) < 1_000_000


def test_the_peak_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = {name: product() for name, product in cpu.products(96).items()}
    assert set(found) == {"torch.mm", "oneDNN"} if cpu.has_onednn() else {"torch.mm"}
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(96, 96, generator=generator) for _ in range(2))
    assert torch.allclose(found["torch.mm"], a @ b, atol=1e-4)
    if "oneDNN" in found:  # the layer of a linear map: y = x W^T
        assert torch.allclose(found["oneDNN"].to_dense(), a @ b.T, atol=1e-4)
    monkeypatch.setattr(cpu, "sgemm_rates", lambda seconds=1.0: {"torch.mm": 10.0, "oneDNN": 20.0})
    assert cpu.sgemm_peak() == 20.0


def test_plot(tmp_path: Path) -> None:
    cases = [Case("a", replace(SMALL, patch=patch)) for patch in ((2, 2), (4, 4))]
    result = run(cases)
    for name in ("picture.png", "picture.svg"):
        plot(result, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(GfTvmError, match=r"cannot write .*picture\.png': No such file"):
        plot(result, tmp_path / "missing" / "picture.png")
    with pytest.raises(GfTvmError, match=r"cannot draw .*must end in \.png"):
        plot(result, tmp_path / "picture.nonsense")
    assert {p.name for p in tmp_path.iterdir()} == {"picture.png", "picture.svg"}

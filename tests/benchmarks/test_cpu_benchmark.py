"""benchmarks/cpu.py: whole runs on tiny convolutions, users' mistakes, and what the figures have to do with each other.

Nothing that is timed is expected to be fast or slow.
"""

from __future__ import annotations

import json
import math
import mmap
import statistics
from pathlib import Path
from typing import Any

import _cpu_libraries
import _cpu_memory
import _cpu_report
import _cpu_step
import cpu
import pytest
import torch
from _authors import published

from gf_cuda import rounds
from gf_tvm.bundle.library import load
from gf_tvm.comparison.convolutions import ComparisonError, Contender, Data, relative_error
from gf_tvm.comparison.cpu import CpuBackend
from gf_tvm.comparison.limits import roofline, traffic
from gf_tvm.comparison.rows import CpuRow
from gf_tvm.comparison.run import compare
from gf_tvm.core import reference
from gf_tvm.core.geometry import Geometry
from gf_tvm.errors import GfTvmError
from gf_tvm.machine import cpu as machine
from gf_tvm.machine.profiles import get_profile
from gf_tvm.report.roofline import roofline_plot
from gf_tvm.shapes import Case, workloads_of

pytestmark = [pytest.mark.early, pytest.mark.usefixtures("host")]

SHAPES = {
    "n": 2, "kernel": 3, "padding": 1, "patches": [2, 4],
    "cases": [
        {"name": "dense", "ci": 8, "co": 8, "h": 16, "w": 16},
        {"name": "depthwise", "ci": 8, "co": 8, "h": 9, "w": 8, "groups": 8},
    ],
}  # fmt: skip

SMALL = Geometry(2, 8, 8, 16, 16, (3, 3), (2, 2), padding=(1, 1))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small limits: what they are is not what is tested here."""
    monkeypatch.setattr(machine, "SGEMM_SIZE", 64)
    monkeypatch.setattr(machine, "available_bytes", lambda: 1 << 26)
    monkeypatch.setattr(cpu, "keep_freed_memory", lambda: True)  # it would hold for all tests that follow
    monkeypatch.chdir(tmp_path)
    Path("shapes.json").write_text(json.dumps(SHAPES))


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run with every column but stock MetaSchedule's."""
    folder = tmp_path_factory.mktemp("cpu")
    (folder / "shapes.json").write_text(json.dumps(SHAPES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "SGEMM_SIZE", 64)
        patch.setattr(machine, "available_bytes", lambda: 1 << 26)
        # One process is enough; what cannot be measured has a reason.
        requests: list[Any] = []

        def extra_bytes(*request: Any) -> dict[str, Any]:
            requests.append(request)
            unknown = {"extra_bytes": None, "reason": "not tried"}
            return unknown if len(requests) > 1 else _cpu_memory.extra_bytes(*request)

        patch.setattr(cpu, "extra_bytes", extra_bytes)
        patch.setattr(cpu, "keep_freed_memory", lambda: True)  # it would hold for all tests that follow
        command = ["--shapes", str(folder / "shapes.json"), "--seconds", "0", "--threads", "1"]
        files = ["--json", str(folder / "rows.json"), "--plot", str(folder / "roofline.png")]
        step = ["--step", "resnet18_025", "--input", "2x3x8x8", "--last", "2", "--patch", "2,4"]
        assert cpu.main([*command, *files, *step]) == 0
    assert (folder / "roofline.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in folder.iterdir()) == ["roofline.png", "rows.json", "shapes.json"]
    found: dict[str, Any] = json.loads((folder / "rows.json").read_text())
    return found


def fails(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """Run with a mistake; return the one line that is said about it."""
    before = sorted(Path().rglob("*"))
    assert cpu.main(command) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("cpu.py: error: ")
    assert sorted(Path().rglob("*")) == before
    return str(err)


def test_head_and_rows_have_the_documented_fields(document: dict[str, Any]) -> None:
    assert {"schema_version", "machine", "threads", "versions", "peak_gflops", "bandwidth_gbs", "conditions"} <= set(
        document
    )
    assert document["threads"] == 1
    assert [(row["name"], row["patch"]) for row in document["rows"]] == [
        (name, [patch, patch]) for name in ("dense", "depthwise") for patch in (2, 4)
    ]
    for row in document["rows"]:
        assert {"n", "ci", "co", "h", "w", "kernel", "stride", "padding", "dilation", "groups", "dtype"} <= set(row)
        assert row["schedule"] in ("tuned", "default")
        assert 0 < row["max_rel_error"] < 1e-5
        for name in ("baseline", "reference", "gf_tvm", "gf_tvm_kernel", "authors", "default"):
            lower, upper = row[f"{name}_ms_quartiles"]
            assert 0 < lower <= row[f"{name}_ms"] <= upper
        assert row["stock_ms"] is None
        assert set(row["others"]) == {"authors", "default"}
        assert row["others"]["default"]["schedule"] == "default"
        assert row["others"]["default"]["filter_input_ms"] == row["default_filter_input_ms"] > 0
        assert 0 < row["others"]["authors"]["max_rel_error"] < 1e-5


def test_fractions_follow_from_the_limits_of_the_row(document: dict[str, Any]) -> None:
    for row in document["rows"]:
        fields = ("n", "ci", "co", "h", "w", "kernel", "patch", "stride", "padding", "dilation", "groups")
        geometry = Geometry(*(tuple(v) if isinstance(v := row[name], list) else v for name in fields))
        assert (row["moved_bytes"], row["operations"]) == traffic(geometry, "float32")
        for kind, suffix in (("median", ""), ("best", "_best")):
            limits = row["peak_gflops"][kind], row["bandwidth_gbs"][kind]
            limit, _ = roofline(geometry, "float32", *limits)
            assert row[f"limit{suffix}_ms"] == pytest.approx(limit)
            time = row["gf_tvm_ms"] if kind == "median" else row["best_ms"]["gf_tvm"]
            assert row[f"fraction_of_limit{suffix}"] == pytest.approx(limit / time)
            time = row["gf_tvm_kernel_ms"] if kind == "median" else row["best_ms"]["kernel"]
            assert row[f"kernel_fraction_of_limit{suffix}"] == pytest.approx(limit / time)
        for rates in (row["peak_gflops"], row["bandwidth_gbs"]):
            low, high = rates["quartiles"]
            assert 0 < low <= rates["median"] <= high <= rates["best"]
        pooling = row["filter_input_limit_ms"] / row["filter_input_ms"]
        assert row["filter_input_fraction_of_limit"] == pytest.approx(pooling)
        moved = 4 * (math.prod(geometry.x_shape) + math.prod(geometry.saved_shape))
        assert row["filter_input_limit_ms"] == pytest.approx(moved / row["bandwidth_gbs"]["median"] / 1e6)
        assert row["default_of_tuned"] == pytest.approx(row["gf_tvm_ms"] / row["default_ms"])
    best = max(row["peak_gflops"]["best"] for row in document["rows"])
    assert document["peak_gflops"] == best


def test_patches_of_one_convolution_share_their_rounds(document: dict[str, Any]) -> None:
    first, second = document["rows"][:2]
    for name in ("baseline_ms", "peak_gflops", "bandwidth_gbs"):
        assert first[name] == second[name]


def test_summary_is_made_of_the_rows(document: dict[str, Any]) -> None:
    for summary, patch in zip(document["summary"], ([2, 2], [4, 4]), strict=True):
        rows = [row for row in document["rows"] if row["patch"] == patch]
        assert (summary["patch"], summary["rows"]) == (patch, 2)
        exact = {row["name"]: row["baseline_ms"] / row["gf_tvm_ms"] for row in rows}
        assert summary["speedup"] == pytest.approx(statistics.geometric_mean(exact.values()))
        worst = min(exact, key=exact.__getitem__)
        assert summary["speedup_worst"] == {"name": worst, "value": pytest.approx(exact[worst])}
        fractions = [row["fraction_of_limit"] for row in rows]
        assert summary["fraction_of_limit"] == pytest.approx(statistics.geometric_mean(fractions))
        assert summary["fraction_of_limit_worst"]["value"] == min(fractions)
        assert summary["speedup_stock"] is None
        assert summary["speedup_stock_worst"] is None


def test_memory_is_told_or_why_not(document: dict[str, Any]) -> None:
    assert [row["memory"].get("reason") for row in document["rows"][1:]] == ["not tried"] * 3
    for row in document["rows"]:
        assert row["grad_y_bytes"] == 4 * row["n"] * row["co"] * row["h"] * row["w"]
        if row["extra_bytes"] is None:
            assert row["memory"]["reason"]
        else:
            assert 0 <= row["extra_bytes"] < 64 << 20
            assert row["extra_of_grad_y"] == row["extra_bytes"] / row["grad_y_bytes"]


def test_memory_of_a_kernel_that_keeps_a_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement sees 32 MB that a call takes and gives back, and not the larger peak before."""

    def keep_a_map(*_: torch.Tensor) -> None:
        # From the system: what other tests have freed may still be resident in the allocator.
        torch.frombuffer(mmap.mmap(-1, 32 << 20), dtype=torch.uint8).fill_(1)

    class Greedy:
        def find(self, *_: Any) -> Any:
            return keep_a_map

    monkeypatch.setattr(_cpu_memory, "load", lambda path: Greedy())
    workload = workloads_of([Case("small", SMALL)])[1]
    torch.ones(256 << 20, dtype=torch.uint8).sum()
    found = _cpu_memory._measure({"library": "", "workload": workload.to_dict(), "threads": torch.get_num_threads()})
    if found["extra_bytes"] is None:
        pytest.skip(found["reason"])
    assert 30 << 20 < found["extra_bytes"] < 40 << 20
    assert found["output_bytes"] < found["argument_bytes"]


def test_memory_says_what_went_wrong(tmp_path: Path) -> None:
    workload = workloads_of([Case("small", SMALL)])[1]
    found = _cpu_memory.extra_bytes(tmp_path / "none.gfb", workload, 1)
    assert found["extra_bytes"] is None
    assert "none.gfb" in found["reason"]


def test_a_step_is_measured_beside_its_layers(document: dict[str, Any]) -> None:
    assert [step["patch"] for step in document["steps"]] == [[2, 2], [4, 4]]
    for step in document["steps"]:
        assert step["filtered"] == ["layer4.1.conv1", "layer4.1.conv2"]
        assert set(step["steps"]) == {"exact", "plain", "gf_tvm"}
        assert step["rounds"] == _cpu_step.ROUNDS_LEAST
        # Nothing before the first of them is trained, so its input needs no gradient.
        assert {name: layer["needs_grad_x"] for layer in step["layers"] for name in layer["names"]} == {
            "layer4.1.conv1": False,
            "layer4.1.conv2": True,
        }
        for gains in step["gains"].values():
            if gains["ratio"] is not None:
                assert gains["ratio"] == pytest.approx(gains["gain_in_step"]["ms"] / gains["gain_of_kernels"]["ms"])


def test_gains_are_differences_of_one_round() -> None:
    """The step gains 4 ms in every round, however the clock drifts; two equal layers gain 2 ms each."""
    case = Case("layer", SMALL, layers=("a", "b"))
    layer = _cpu_step.Layer(case, ("a", "b"), True)
    drift = (0.0, 50.0, 10.0)
    samples = {
        "step exact": [20 + d for d in drift],
        "step gf_tvm": [16 + d for d in drift],
        "exact 0": [5 + d for d in drift],
        "gf_tvm 0": [2.5 + d for d in drift],
        "gf_tvm filter_input 0": [0.5] * 3,
    }
    gains = _cpu_step._gains("gf_tvm", [layer], samples)
    assert gains["gain_in_step"]["ms"] == pytest.approx(4)
    assert gains["gain_of_kernels"] == {"ms": pytest.approx(4), "ms_quartiles": [pytest.approx(4)] * 2}
    assert gains["ratio"] == pytest.approx(1)


def test_a_step_needs_all_kernels(tmp_path: Path, document: dict[str, Any]) -> None:
    class Empty:
        path = Path("empty.gfb")

        def find(self, *_: Any) -> None:
            return None

    with pytest.raises(ComparisonError, match=r"empty\.gfb lacks filter_input_.*plain operators"):
        _cpu_step.measure_step("resnet18_025", (2, 3, 8, 8), 1, (2, 2), Empty(), 0.0, lambda part: None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "geometry",
    [
        SMALL,
        Geometry(2, 6, 4, 9, 7, (3, 3), (4, 4), padding=(1, 1)),
        Geometry(2, 4, 6, 14, 14, (3, 3), (2, 2), (2, 2), (1, 1)),
        Geometry(3, 5, 5, 11, 8, (3, 3), (2, 2), padding=(1, 1), groups=5),
    ],
    ids=lambda geometry: geometry.key,
)
def test_the_published_formulation_computes_the_same(geometry: Geometry) -> None:
    case = Case("case", geometry)
    data = Data.random(case)
    other = published(case, data)
    assert other is not None
    saved = reference.filter_input(data.x.double(), geometry)
    grad_x, grad_w, _ = reference.backward(data.grad_y.double(), saved, data.weight.double(), geometry)
    found = other.results()
    assert grad_x is not None
    assert grad_w is not None
    assert relative_error(found["grad_x"], grad_x) < 1e-5
    assert relative_error(found["grad_W"], grad_w) < 1e-5


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(2, 4, 4, 8, 8, (3, 3), (2, 4), padding=(1, 1)),
        Geometry(2, 4, 4, 8, 8, (3, 3), (2, 2), padding=(1, 1), groups=2),
        Geometry(2, 4, 4, 12, 12, (3, 3), (2, 2), padding=(4, 4), dilation=(4, 4)),
        Geometry(2, 4, 4, 11, 11, (5, 5), (2, 2)),
    ],
    ids=lambda geometry: geometry.key,
)
def test_the_published_formulation_is_left_out_where_it_is_not_defined(geometry: Geometry) -> None:
    case = Case("case", geometry)
    assert published(case, Data.random(case)) is None


def other_of(grad: float) -> Any:
    """A further implementation that returns ``grad`` times the right gradients."""

    def make(case: Case, data: Data) -> Contender:
        def results() -> dict[str, torch.Tensor]:
            saved = reference.filter_input(data.x, case.geometry)
            grad_x, grad_w, _ = reference.backward(data.grad_y, saved, data.weight, case.geometry)
            assert grad_x is not None
            assert grad_w is not None
            return {"grad_x": grad * grad_x, "grad_W": grad * grad_w}

        return Contender(results, results)

    return make


def test_a_wrong_implementation_is_refused_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "interleaved", lambda *_: pytest.fail("timed"))
    with pytest.raises(ComparisonError, match="case small R2: grad_x of mine is wrong, so it was not timed"):
        compare([Case("small", SMALL)], seconds=0.0, backend=CpuBackend({"mine": other_of(1.001)}))


def test_implementations_are_rows_others() -> None:
    makers = {"mine": other_of(1.0), "nobodys": lambda case, data: None}
    (row,) = compare([Case("small", SMALL)], repeats=5, seconds=0.0, backend=CpuBackend(makers)).rows
    assert isinstance(row, CpuRow)
    assert list(row.others) == ["mine"]
    assert row.others["mine"]["filter_input_ms"] is None
    assert (row.schedule, row.gf_tvm_kernel_ms, row.kernel_fraction_of_limit) == ("torch", None, None)
    assert row.fraction_of_limit == pytest.approx(row.limit_ms / row.reference_ms)
    plain = _cpu_report.plain_row(row)
    assert plain["authors_ms"] is plain["default_of_tuned"] is None


def test_names_that_are_taken() -> None:
    for name in ("copy", "reference", "two words"):
        with pytest.raises(ValueError, match=name):
            CpuBackend({name: other_of(1.0)})


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ((), "--shapes paper|FILE, --model M or --step M"),
        (("--shapes", "nowhere.json"), "nowhere.json: cannot read this shapes file"),
        (("--shapes", "shapes.json", "--patch", "0"), "patch must be"),
        (("--shapes", "shapes.json", "--seconds", "nan"), "--seconds must be a number"),
        (("--shapes", "shapes.json", "--threads", "0"), "--threads must be at least 1"),
        (("--shapes", "shapes.json", "--stock-trials", "-1"), "--stock-trials must be at least 0"),
        (("--shapes", "shapes.json", "--json", "no/where.json"), "cannot write 'no/where.json'"),
        (("--shapes", "shapes.json", "--plot", "roofline.txt"), "must end in .png"),
        (("--shapes", "shapes.json", "--logs", "nowhere"), "no folder of tuning logs"),
        (("--shapes", "shapes.json", "--library", "none.gfb"), "none.gfb"),
        (("--shapes", "shapes.json", "--device", "abacus"), "abacus"),
        (("--shapes", "shapes.json", "--nonsense"), "unrecognized arguments"),
        (("--model", "resnet18_025", "--input", "2x3x8x8", "--last", "99"), "last must be between 1 and 20"),
        (("--model", "resnet18_025"), "--model needs --input"),
        (("--step", "resnet18_025", "--input", "2x3x8x8", "--last", "99"), "last must be between 1 and 20"),
        (("--step", "resnet18_025"), "--step needs --input"),
        (("--step", "abacus", "--input", "2x3x8x8"), "unknown model 'abacus'"),
        (("--step", "resnet18_025", "--input", "2x3x8x8", "--plot", "x.svg"), "--plot draws cases"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_are_said_in_one_line(
    capsys: pytest.CaptureFixture[str], command: tuple[str, ...], words: str
) -> None:
    assert words in fails(capsys, *command)


def test_interrupted_runs_leave_files_as_they_were(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    Path("rows.json").write_text("old")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setattr(cpu, "compare", interrupt)
    command = ["--shapes", "shapes.json", "--cases", "2", "--patch", "2", "--threads", "1", "--no-default"]
    assert cpu.main([*command, "--json", "rows.json"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "cpu.py: interrupted"
    assert Path("rows.json").read_text() == "old"
    assert list(scratch.iterdir()) == []


def test_a_library_of_the_user_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that lacks some kernels: their rows say so, and the table has dashes."""
    from gf_tvm.building import build

    case = Case("depthwise", Geometry(2, 8, 8, 9, 8, (3, 3), (2, 2), padding=(1, 1), groups=8))
    report = build(workloads_of([case]), out=tmp_path / "own.gfb", shipped=False)
    assert {kernel.schedule for kernel in report.kernels} == {"default"}
    command = ["--shapes", "shapes.json", "--cases", "2", "--seconds", "0", "--threads", "1", "--no-default"]
    assert cpu.main([*command, "--no-memory", "--library", "own.gfb", "--json", "rows.json"]) == 0
    capsys.readouterr()
    document = json.loads(Path("rows.json").read_text())
    assert [row["schedule"] for row in document["rows"]] == ["default", "torch"]
    assert document["conditions"]["library"]["sha256"] == load("own.gfb").digest
    assert all("extra_bytes" not in row for row in document["rows"])


def test_default_schedules_are_built_whatever_the_logs_have(monkeypatch: pytest.MonkeyPatch) -> None:
    from gf_tvm.building import build

    monkeypatch.setattr("gf_tvm.tuning.log.shipped_logs", lambda: pytest.fail("looked at the shipped logs"))
    workload = workloads_of([Case("small", SMALL)])[0]
    (kernel,) = build([workload], out="default.gfb", shipped=False).kernels
    assert (kernel.schedule, kernel.log) == ("default", None)


def test_what_stock_metaschedule_cannot_schedule_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not replaced by the default schedule of our space."""
    monkeypatch.setattr(_cpu_libraries, "tune", lambda *_, **__: None)
    workloads = workloads_of([Case("small", SMALL)])
    profile = get_profile("host")
    assert _cpu_libraries.stock(workloads, profile, 1, 1, Path("no logs"), Path("stock.gfb")) is None
    assert f"found nothing that works for {workloads[0].key}" in capsys.readouterr().err
    assert not Path("stock.gfb").exists()


@pytest.mark.slow
def test_stock_metaschedule(capsys: pytest.CaptureFixture[str]) -> None:
    shapes = {**SHAPES, "cases": SHAPES["cases"][:1], "patches": [2]}  # type: ignore[index]
    Path("one.json").write_text(json.dumps(shapes))
    command = ["--shapes", "one.json", "--seconds", "0", "--threads", "1", "--no-default", "--no-memory"]
    stock = ["--stock-trials", "2", "--stock-logs", "stock"]
    assert cpu.main([*command, *stock, "--json", "rows.json"]) == 0
    capsys.readouterr()
    (row,) = json.loads(Path("rows.json").read_text())["rows"]
    assert row["stock_ms"] > 0
    assert row["others"]["stock"]["schedule"] == "tuned"
    assert len(list(Path("stock").rglob("*.jsonl"))) == 2


def test_roofline_of_one_row_and_of_equal_points(document: dict[str, Any], tmp_path: Path) -> None:
    row = document["rows"][0]
    for count in (1, 30):  # no place is free for thirty names
        roofline_plot({**document, "rows": [row] * count}, tmp_path / "picture.svg")
        assert (tmp_path / "picture.svg").stat().st_size > 5000
    rows = [{**row, "gf_tvm_kernel_ms": None}]
    roofline_plot({**document, "rows": rows}, tmp_path / "picture.png")
    with pytest.raises(GfTvmError, match="cannot draw"):
        roofline_plot(document, tmp_path / "picture.txt")
    assert math.isfinite(row["limit_ms"])

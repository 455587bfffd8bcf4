"""python3 -m gf_cuda bench: kernels on the emulated GPU, the exact backward pass by PyTorch on the CPU."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_bundles
import emulated_cuda
import pytest
import torch
from simulated_gpu import SimulatedGpu
from torch import Tensor

import gf_cuda
from gf_cuda import _bench as bench
from gf_cuda import bench as command
from gf_cuda import energy, exact, meters, reference, timing
from gf_cuda.bundle import Convolution
from gf_cuda.meters import Energy
from gf_tvm.comparison.limits import roofline, traffic
from gf_tvm.comparison.rows import GpuRow
from gf_tvm.core.geometry import Geometry
from gf_tvm.core.workload import Workload

GEOMETRIES = [
    Geometry(3, 4, 6, 9, 8, (3, 3), (2, 2), padding=(1, 1)),
    Geometry(2, 4, 4, 7, 7, (3, 3), (4, 4), (2, 2), (1, 1), groups=4),
]


class Ticking(SimulatedGpu):
    """Every event takes a millisecond, so that every time is one."""

    def record(self) -> Any:
        self.queue(1e-3)
        return super().record()


class Meter(meters.Meter):
    def rest(self, seconds: float = 2.0) -> float:
        self.idle_watts = {"all": 1.0}
        return 1.0

    def measure(self, run: Any) -> Energy:
        run()
        return Energy(3.0, 4.0, 1.0, 2, {})


@pytest.fixture(scope="module")
def emulated() -> Iterator[None]:
    library = str(emulated_cuda.build())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GF_CUDA_DRIVER", library)
        patch.setenv("GF_CUDA_NVRTC", library)
        yield


@pytest.fixture(scope="module")
def bundle(emulated: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workloads = [
        Workload(kernel, geometry, dtype)
        for dtype in ("float32", "float16")
        for geometry in GEOMETRIES
        for kernel in ("filter_input", "backward")
        if (kernel, dtype) != ("filter_input", "float16")
    ]
    return cuda_bundles.write_bundle(tmp_path_factory.mktemp("bench") / "small.gfb", workloads)


@pytest.fixture
def setup(emulated: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[bench.BenchSetup]:
    monkeypatch.setattr(timing, "copy_bandwidth", lambda gpu, l2_bytes: 25.0)
    monkeypatch.setattr(timing, "gemm_peak", lambda gpu: 230.0)
    monkeypatch.setattr(bench, "ENERGY_SECONDS", 0.0)
    device = gf_cuda.get_driver().device()
    with cuda_bundles.cuda_on_cpu():
        yield bench.BenchSetup(Ticking(), device, Meter("fake", "all"), "", 0.0, 5)


def test_the_document(bundle: Path, setup: bench.BenchSetup, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    document = bench.bench(gf_cuda.load(bundle), setup, say=said.append)
    document = json.loads(json.dumps(document))
    assert said[0] == "the GPU's limits"
    assert said[1].startswith("1/4 backward n3_ci4")
    rows = document["rows"]
    assert [row["dtype"] for row in rows] == ["float32", "float32", "float16", "float16"]
    fields = set(GpuRow.__dataclass_fields__)
    for row, geometry in zip(rows, GEOMETRIES * 2, strict=True):
        assert set(row) == fields  # what reads gf-tvm compare --json reads this
        assert Geometry(**{name: row[name] for name in geometry.__match_args__}) == geometry
        assert row["device"] == "jetson-nano"
        assert row["reference_ms"] is None
        assert row["baseline_ms"] == min(c["ms"] for c in row["baselines"].values() if c["ms"] is not None)
        assert row["baselines"]["contiguous tf32"] == {"ms": None, "reason": exact.NO_TF32}
        limit, which = roofline(geometry, row["dtype"], 230.0, 25.0)
        assert (row["roofline_ms"], row["roofline"]) == (pytest.approx(limit), which)
        assert (row["limit_ms"], row["limit"]) == (row["roofline_ms"], row["roofline"])
        assert row["fraction_of_limit"] == row["limit_ms"] / row["gf_tvm_ms"]
        assert (row["moved_bytes"], row["operations"]) == traffic(geometry, row["dtype"])
        assert 0 < row["max_rel_error"] < (1e-5 if row["dtype"] == "float32" else 2e-3)
        assert row["joules"]["baseline"] == 3.0
        pooled = row["dtype"] == "float32"
        assert (row["filter_input_ms"] is not None) == pooled
        assert (row["filter_input_schedule"] == "default") == pooled
    assert document["schema_version"] == 1
    assert document["machine"]["gpu"]["arch"] == "sm_53"
    assert document["conditions"]["library"]["file"] == "small.gfb"
    assert {(tuple(m["patch"]), m["dtype"]) for m in document["geometric_means"]} == {
        (patch, dtype) for patch in ((2, 2), (4, 4)) for dtype in ("float32", "float16")
    }
    (first, *_) = document["geometric_means"]
    assert first["speedup"] == pytest.approx(rows[0]["baseline_ms"] / rows[0]["gf_tvm_ms"])
    bench.report.show(document)
    out = capsys.readouterr().out
    for text in ("Emulated", "4-6x9x8", "2x2", "exact mJ", "above idle (1.00 W), by fake"):
        assert text in out, text
    document["conditions"]["energy"].update(meter=None, reason="no rails")
    bench.report.show(document)
    assert "Energy: not measured (no rails)" in capsys.readouterr().out


def test_only_some(bundle: Path, setup: bench.BenchSetup) -> None:
    document = bench.bench(gf_cuda.load(bundle), setup._replace(meter=None), "r4x4")
    assert len(document["rows"]) == 2
    assert document["rows"][0]["joules"] == {"baseline": None, "gf_tvm": None, "filter_input": None}
    with pytest.raises(gf_cuda.GfCudaError, match=r"small\.gfb has no backward kernel with 'r9' in its key"):
        bench.bench(gf_cuda.load(bundle), setup, "r9")


@pytest.mark.parametrize("output", [3, 4, 5])
@pytest.mark.parametrize("image", [0, -1])
def test_a_wrong_kernel_is_not_timed(
    bundle: Path, setup: bench.BenchSetup, monkeypatch: pytest.MonkeyPatch, output: int, image: int
) -> None:
    """The check in pieces sees every image and every output."""
    right = gf_cuda.tensors.TensorKernel.__call__

    def wrong(self: Any, *tensors: Tensor) -> None:
        right(self, *tensors)
        if self.kernel.name == "backward":
            tensors[output][image].mul_(1.01)

    monkeypatch.setattr(gf_cuda.tensors.TensorKernel, "__call__", wrong)
    monkeypatch.setattr(reference, "PIECE", 1)
    monkeypatch.setattr(timing, "measure", lambda *arguments: pytest.fail("was timed"))
    name = ("grad_x", "grad_w", "grad_b")[output - 3]
    with pytest.raises(exact.WrongResult, match=f"backward n3.*: {name} is wrong"):
        bench.bench(gf_cuda.load(bundle), setup, "r2x2")


def test_a_right_kernel_passes_in_pieces(
    bundle: Path, setup: bench.BenchSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bench.bench(gf_cuda.load(bundle), setup, "r2x2")["rows"][0]["max_rel_error"]
    monkeypatch.setattr(reference, "PIECE", 1)
    assert bench.bench(gf_cuda.load(bundle), setup, "r2x2")["rows"][0]["max_rel_error"] == pytest.approx(whole)


def test_out_of_memory(bundle: Path, setup: bench.BenchSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    right = exact.backward

    def backward(grad_y: Tensor, *rest: Any) -> Any:
        if not grad_y.is_contiguous():
            raise RuntimeError("CUDA out of memory. Tried to allocate 300.00 MiB")
        return right(grad_y, *rest)

    monkeypatch.setattr(exact, "backward", backward)
    (row, _) = bench.bench(gf_cuda.load(bundle), setup, "r2x2")["rows"]
    assert row["baselines"]["channels_last"] == {"ms": None, "reason": "out of memory"}
    assert row["baseline"] == "torch contiguous"  # on a CPU cuDNN is not chosen


AT = Convolution(2, 4, 6, 9, 8, (3, 3), (2, 2), (2, 1), (1, 1), (1, 2), 2)


@pytest.mark.parametrize("way", exact.WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize("form", ["_operator", "_autograd"])
def test_both_forms_of_the_exact_backward(form: str, way: exact.Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 1.10 has only the second; both are the gradient, in the format that was asked for."""
    monkeypatch.setattr(exact, "_has_operator", lambda: form == "_operator")
    x, weight = torch.randn(2, 4, 9, 8), torch.randn(6, 2, 3, 3)
    leaves = (x.double().requires_grad_(), weight.double().requires_grad_())
    y = torch.nn.functional.conv2d(*leaves, None, AT.stride, AT.padding, AT.dilation, AT.groups)
    grad_y = torch.randn(y.shape)
    expected = torch.autograd.grad(y, leaves, grad_y.double())
    tensors = [t.contiguous(memory_format=way.memory_format) for t in (grad_y, x, weight)]
    before = torch.backends.cudnn.allow_tf32
    with torch.no_grad():
        call = exact.backward(*tensors, AT, way.tf32)
        for found in (call(), call()):
            for a, b in zip(found, expected, strict=True):
                assert (a - b).abs().max() < 1e-4
        exact.check(tensors, AT, way, "key")
    assert torch.backends.cudnn.allow_tf32 is before


def test_a_wrong_exact_backward_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.randn(2, 6, 5, 6), torch.randn(2, 4, 9, 8), torch.randn(6, 2, 3, 3)]
    right = exact._operator

    def wrong(grad_y: Tensor, *rest: Any) -> Any:
        call = right(grad_y, *rest)
        return call if grad_y.dtype == torch.float64 else lambda: [1.02 * t for t in call()[:2]]

    monkeypatch.setattr(exact, "_operator", wrong)
    with pytest.raises(exact.WrongResult, match=r"key: grad_x of the exact backward pass \(contiguous tf32\) is wrong"):
        exact.check(tensors, AT, exact.WAYS[1], "key")


def test_whose_loops_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = torch.randn(2, 4, 9, 8), torch.randn(6, 2, 3, 3)
    for backend, said in (("ConvBackend.Cudnn", "cudnn"), ("ConvBackend.CudaDepthwise2d", "torch")):
        monkeypatch.setattr(torch._C, "_select_conv_backend", lambda *arguments, backend=backend: backend)
        assert exact.implementation(*tensors, AT) == said
    monkeypatch.delattr(torch._C, "_select_conv_backend")
    assert exact.implementation(*tensors, AT) == "cudnn"
    depthwise = AT._replace(groups=4, co=4)
    assert exact.implementation(*tensors, depthwise) == "torch"
    assert exact.implementation(tensors[0].half(), tensors[1], depthwise) == "cudnn"


def test_ways() -> None:
    assert exact.ways("float32", (8, 0)) == list(exact.WAYS)
    assert [way.name for way in exact.ways("float32", (5, 3))] == ["contiguous", "channels_last"]
    assert [way.name for way in exact.ways("float16", (9, 0))] == ["contiguous", "channels_last"]


def test_the_command(
    bundle: Path, setup: bench.BenchSetup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(bench, "open_setup", lambda *arguments: setup)
    out = tmp_path / "nano.json"
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["bench", str(bundle), "--only", "r2x2", "--json", str(out)])
    assert args.run(args) == 0
    assert len(json.loads(out.read_text())["rows"]) == 2
    assert "of limit" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [out]
    for words, said in (
        (["--json", str(tmp_path / "no" / "x.json")], "cannot write"),
        (["--seconds", "nan"], "seconds must be a number of at least 0, got nan"),
        (["--seconds", "-1"], "got -1"),
    ):
        with pytest.raises(gf_cuda.GfCudaError, match=said):
            command.main([str(bundle), *words])


def test_opening(bundle: Path, emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = gf_cuda.load(bundle)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(gf_cuda.NoDriverError, match=r"PyTorch .* \(no CUDA\) cannot use a GPU"):
        bench.open_setup(loaded, 0, True, 1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda ordinal: None)

    def no_meter(bus_id: str | None) -> None:
        raise meters.NotMeasured("no rails")

    monkeypatch.setattr(energy, "find_meter", no_meter)
    opened = bench.open_setup(loaded, 0, True, 1.0)
    assert (opened.meter, opened.no_meter) == (None, "no rails")
    assert opened.device.arch == "sm_53"
    assert opened.gpu.device == torch.device("cuda", 0)
    assert bench.open_setup(loaded, 0, False, 1.0).no_meter == "switched off"


def test_geometric_means_of_one_dtype() -> None:
    rows = [
        {"patch": (2, 2), "dtype": "float32", "baseline_ms": 8.0, "gf_tvm_ms": 2.0, "roofline_ms": 1.0},
        {"patch": (2, 2), "dtype": "float32", "baseline_ms": 2.0, "gf_tvm_ms": 2.0, "roofline_ms": 0.5},
    ]
    (mean,) = bench.report.geometric_means(rows)
    assert mean == {
        "patch": (2, 2), "rows": 2, "speedup_reference": None,
        "speedup": pytest.approx(2.0), "limit_fraction": pytest.approx(math.sqrt(1 / 8)),
    }  # fmt: skip

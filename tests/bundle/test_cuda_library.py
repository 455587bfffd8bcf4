"""From gf_tvm.build for a GPU to a training step: on the emulated GPU, whose tensors are CPU tensors."""

from __future__ import annotations

import copy
import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_bundles
import emulated_cuda
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gf_cuda
import gf_tvm
from gf_cuda.bundle import Kernel
from gf_tvm.bundle.cuda_library import CudaKernel
from gf_tvm.bundle.library import Library
from gf_tvm.core import verify
from gf_tvm.core.geometry import Geometry
from gf_tvm.core.workload import Workload
from gf_tvm.errors import BuildError, BundleError, DeviceError, GeometryError, ModelError
from gf_tvm.runners.cli import main

GEOMETRY = Geometry(2, 4, 6, 9, 8, 3, 2, padding=1)
BACKWARD = ("backward", "backward_input", "backward_weight")
WORKLOADS = [
    *(Workload(kernel, GEOMETRY) for kernel in ("filter_input", *BACKWARD)),
    *(Workload(kernel, GEOMETRY, "float16") for kernel in ("filter_input", "backward")),
]
LAUNCHING = {"cuLaunchKernel", "cuCtxGetCurrent", "cuCtxSetCurrent"}


@pytest.fixture(autouse=True)
def gpu() -> Iterator[emulated_cuda.Emulated]:
    # A context of its own: what a test patches by the fixture is then undone first, and the environment last.
    with emulated_cuda.environment() as emulated, pytest.MonkeyPatch.context() as patch:
        patch.setattr("gf_cuda.driver._drivers", {})
        patch.setattr("gf_cuda.bundle._loaded", {})
        patch.setattr("gf_tvm.bundle.library._loaded", {})
        patch.setattr("gf_tvm.ops.dispatch._said", set())
        yield emulated


@pytest.fixture
def cuda() -> Iterator[cuda_bundles.CudaOnCpu]:
    with cuda_bundles.cuda_on_cpu() as made:
        yield made


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "nano.gfb"
    with emulated_cuda.environment():
        report = gf_tvm.build(WORKLOADS, "jetson-nano", out=path)
    assert [kernel.schedule for kernel in report.kernels] == ["default"] * len(WORKLOADS)
    assert [path] == list(path.parent.iterdir()), "staging files were left behind"
    return path


@pytest.fixture
def library(file: Path, cuda: cuda_bundles.CudaOnCpu) -> Library:
    return gf_tvm.load(file)


def found(library: Library, kernel: str, dtype: str = "float32") -> CudaKernel:
    made = library.find(kernel, GEOMETRY, dtype)
    assert isinstance(made, CudaKernel)
    return made


# ---------------------------------------------------------------------------------------------------------- the bundle


def test_what_a_bundle_holds(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        manifest = json.loads(archive.read("manifest.json"))
        names = set(archive.namelist())
    assert {key: manifest[key] for key in ("schema", "kind", "device", "arch")} == {
        "schema": 2,
        "kind": "cuda",
        "device": "jetson-nano",
        "arch": "sm_53",
    }
    assert names == {"manifest.json", *manifest["sha256"]}
    assert len(names) == 1 + 2 * len(WORKLOADS)
    for entry, workload in zip(manifest["kernels"], WORKLOADS, strict=True):
        assert Workload.from_dict(entry["workload"]) == workload
        assert [argument["name"] for argument in entry["program"]["arguments"]] == [
            spec.name for spec in verify.argument_specs(workload)
        ]
        assert f"{entry['symbol']}.cu" in names


def test_kernels_compute_what_they_say(library: Library) -> None:
    assert library.workloads == tuple(WORKLOADS)
    assert (library.device, library.device_type) == ("jetson-nano", "cpu")
    for workload in WORKLOADS:
        kernel = found(library, workload.kernel, workload.dtype)
        inputs, outputs = verify.random_inputs(workload, 5), verify.poisoned_outputs(workload)
        kernel(*inputs, *outputs)
        assert verify.excess(outputs, verify.expected(workload, inputs)) <= 1
    assert library.find("backward", GEOMETRY, "bfloat16") is None


def test_bfloat16_is_not_built_for_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "none.gfb"
    with pytest.raises(BuildError, match="jetson-nano has no kernels of bfloat16, only of float32 and float16"):
        gf_tvm.build([Workload("backward", GEOMETRY, "bfloat16")], "jetson-nano", out=out)
    assert not out.exists()


def test_nothing_to_compile_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GF_CUDA_NVRTC", "/nowhere/libnvrtc.so")
    with pytest.raises(BuildError, match=r"NVRTC /nowhere/libnvrtc.so cannot be used"):
        gf_tvm.build(WORKLOADS[:1], "jetson-nano", out=tmp_path / "none.gfb")
    assert not list(tmp_path.iterdir())


def test_the_command_builds_for_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = tmp_path / "shapes.json"
    case = {"name": "one", "n": 2, "ci": 4, "co": 4, "h": 6, "w": 6, "kernel": 1, "patches": [2]}
    shapes.write_text(json.dumps({"cases": [case]}))
    out = tmp_path / "nano.gfb"
    code = main(["build", "--device", "jetson-nano", "--shapes", str(shapes), "--out", str(out)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert "kernels for jetson-nano (" in captured.out
    with cuda_bundles.cuda_on_cpu():
        assert gf_tvm.load(out).workloads
    shapes.write_text(json.dumps({"cases": [{**case, "dtype": "bfloat16"}]}))
    assert main(["build", "--device", "jetson-nano", "--shapes", str(shapes), "--out", str(out)]) == 2
    assert "error: jetson-nano has no kernels of bfloat16, only of float32 and float16" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- loading a bundle


def test_a_bundle_without_a_gpu(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GF_CUDA_DRIVER", "libnone.so.1")
    with pytest.raises(BundleError) as caught:
        gf_tvm.load(file)
    assert "nano.gfb: was built for GPUs of sm_53, but none can be used: no CUDA driver" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bundle_for_another_gpu(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GF_CUDA_NVRTC", "/nowhere/libnvrtc.so")
    with emulated_cuda.environment(arch="sm_72"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("GF_CUDA_NVRTC", "/nowhere/libnvrtc.so")
        with pytest.raises(BundleError, match=r"was built for sm_53 .* cannot run on .*sm_72"):
            gf_tvm.load(file)


def change_entry(source: Path, target: Path, **values: Any) -> Path:
    with zipfile.ZipFile(source) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(files.pop("manifest.json"))
    manifest["kernels"][1].update(values)
    return cuda_bundles.pack(target, manifest, files)


def test_a_foreign_bundle_is_refused(file: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        entry = json.loads(archive.read("manifest.json"))["kernels"][1]
    program = copy.deepcopy(entry["program"])
    program["arguments"][0]["shape"][0] += 1
    path = change_entry(file, tmp_path / "program.gfb", program=program)
    with pytest.raises(BundleError, match=r"program.gfb: the program of backward_.* does not have that kernel's arg"):
        gf_tvm.load(path)
    workload = {**entry["workload"], "layout": "nhwc"}
    with pytest.raises(BundleError, match=r"layout.gfb: the manifest does not fit its kernels \(unknown layout 'nhwc'"):
        gf_tvm.load(change_entry(file, tmp_path / "layout.gfb", workload=workload))
    with pytest.raises(BundleError, match=r"symbol.gfb: .*is no name"):
        gf_tvm.load(change_entry(file, tmp_path / "symbol.gfb", symbol="a b"))


def test_copies_and_pickles_are_the_library_itself(library: Library, file: Path) -> None:
    assert gf_tvm.load(str(file)) is library
    assert copy.deepcopy({"a": [library]})["a"][0] is library
    assert pickle.loads(pickle.dumps(library)) is library


# ------------------------------------------------------------------------------------------------- tensors and streams


def arguments(kernel: str = "backward_weight") -> list[torch.Tensor]:
    workload = Workload(kernel, GEOMETRY)
    return [*verify.random_inputs(workload, 0), *verify.poisoned_outputs(workload)]


def shifted(tensor: torch.Tensor, values: int) -> torch.Tensor:
    """A copy whose address is a multiple of 4 * ``values`` bytes, and of no more."""
    memory = torch.empty(tensor.numel() + 64)
    offset = -(memory.data_ptr() // 4) % 64 + values
    return memory[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor)


def test_tensors_that_do_not_fit_are_refused(library: Library, gpu: emulated_cuda.Emulated) -> None:
    kernel = found(library, "backward_weight")
    grad_y, saved, grad_w, grad_b = arguments()
    library.prepare()
    gpu.forget_calls()
    for given, message in (
        ((grad_y, saved, grad_w), r"takes 4 tensors \(grad_y, filtered_x, grad_w, grad_b\), got 3"),
        ((), "takes 4 tensors .* got 0"),
        ((grad_y[:1], saved, grad_w, grad_b), "grad_y must be torch.float32 of shape"),
        ((grad_y, saved.half(), grad_w, grad_b), "filtered_x must be torch.float32 of shape .* got torch.float16"),
        ((grad_y.transpose(2, 3).contiguous().transpose(2, 3), saved, grad_w, grad_b), "grad_y must be contiguous"),
        ((shifted(grad_y, 1), saved, grad_w, grad_b), "grad_y must be aligned to 16 bytes; clone this slice first"),
        ((grad_y, saved.to("meta"), grad_w, grad_b), "filtered_x: address 0x0"),
        ([tensor.to("meta") for tensor in arguments()], "grad_y is on meta; all must be on one cpu device"),
    ):
        with pytest.raises(GeometryError, match=message):
            kernel(*given)
    assert "cuLaunchKernel" not in gpu.calls()


def test_sixteen_bytes_are_aligned_enough(library: Library) -> None:
    grad_y, saved, grad_w, grad_b = arguments()
    grad_y = shifted(grad_y, 4)
    assert grad_y.data_ptr() % 64 == 16
    found(library, "backward_weight")(grad_y, saved, grad_w, grad_b)
    assert torch.isfinite(grad_w).all()


def test_the_current_stream_and_scratch_memory(
    library: Library, cuda: cuda_bundles.CudaOnCpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    call = Kernel.__call__

    def spy(self: Kernel, pointers: list[int], scratch: int, stream: int = 0, ordinal: int = 0) -> None:
        seen.append((stream, scratch % 256, bool(scratch), ordinal))
        call(self, pointers, scratch, 0, ordinal)

    monkeypatch.setattr(Kernel, "__call__", spy)
    for stream in (0, 7, 9):
        cuda.current_stream = stream
        found(library, "backward_weight")(*arguments())
    needed = found(library, "backward_weight").function.kernel.program.scratch_bytes
    assert seen == [(stream, 0, needed > 0, 0) for stream in (0, 7, 9)]
    assert cuda.scratch_sizes == [needed] * 3


def test_nothing_is_loaded_during_a_capture(library: Library, cuda: cuda_bundles.CudaOnCpu) -> None:
    kernel = found(library, "backward_weight")
    cuda.is_capturing = True
    with pytest.raises(GeometryError, match="cannot be loaded while a CUDA graph is captured; run a warm-up step"):
        kernel(*arguments())
    cuda.is_capturing = False
    library.prepare()
    cuda.is_capturing = True
    kernel(*arguments())


def test_prepare_loads_everything(library: Library, gpu: emulated_cuda.Emulated) -> None:
    library.prepare("cpu")
    assert gpu.calls().count("cuModuleLoadDataEx") == len(WORKLOADS)
    with pytest.raises(GeometryError, match="cannot be loaded onto meta; name a cpu device"):
        library.prepare("meta")


def test_a_launch_that_fails(library: Library, gpu: emulated_cuda.Emulated) -> None:
    gpu.fault("cuLaunchKernel:1:701")
    with pytest.raises(DeviceError, match=r"cuLaunchKernel: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES \(701\)"):
        found(library, "backward_weight")(*arguments())
    found(library, "backward_weight")(*arguments())
    gpu.fault("cuModuleLoadDataEx:1:2")
    with pytest.raises(DeviceError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        library.prepare()


# -------------------------------------------------------------------------------------------------------- the operator


def leaves(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = (GEOMETRY.x_shape, GEOMETRY.weight_shape, (GEOMETRY.co,))
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)
    return x, weight, bias


def gradients(library: Library | None, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    x, weight, bias = leaves(dtype)
    y = gf_tvm.functional.conv2d(x, weight, bias, padding=1, patch=2, library=library)
    assert torch.equal(y, F.conv2d(x, weight, bias, padding=1))
    return list(torch.autograd.grad(y.square().sum(), (x, weight, bias)))


@pytest.mark.filterwarnings("error::gf_tvm.FallbackWarning")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 2e-2)], ids=["float32", "float16"]
)
def test_the_operator_runs_the_kernels(
    library: Library, gpu: emulated_cuda.Emulated, dtype: torch.dtype, tolerance: float
) -> None:
    found(library, "backward", str(dtype).removeprefix("torch."))
    ours = gradients(library, dtype)
    gpu.forget_calls()
    again = gradients(library, dtype)
    assert set(gpu.calls()) <= LAUNCHING, "a step waits, copies or allocates"
    assert "cuLaunchKernel" in gpu.calls()
    for a, b in zip(ours, again, strict=True):
        assert torch.equal(a, b)
    with pytest.warns(gf_tvm.FallbackWarning):
        plain = gradients(None, dtype)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


@pytest.mark.filterwarnings("error::gf_tvm.FallbackWarning")
def test_each_gradient_alone(library: Library) -> None:
    wanted = leaves()
    for needs in ((0,), (1,), (2,), (0, 1), (1, 2)):
        x, weight, bias = leaves()
        inputs = [tensor if i in needs else tensor.detach() for i, tensor in enumerate((x, weight, bias))]
        y = gf_tvm.functional.conv2d(inputs[0], inputs[1], inputs[2], padding=1, patch=2, library=library)
        wanted = [gradients(library)[i] for i in needs]
        if needs == (2,):  # that of the bias alone is a sum of grad_y, for which no kernel is needed
            wanted = [2 * y.detach().sum(dim=(0, 2, 3))]
        for a, b in zip(torch.autograd.grad(y.square().sum(), [inputs[i] for i in needs]), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_fall_back(library: Library, gpu: emulated_cuda.Emulated, dtype: torch.dtype) -> None:
    with pytest.warns(gf_tvm.FallbackWarning, match=rf"nano.gfb.* lacks filter_input .* {str(dtype)[6:]} cpu"):
        gradients(library, dtype)
    assert "cuLaunchKernel" not in gpu.calls()


def test_tensors_elsewhere_fall_back(file: Path, gpu: emulated_cuda.Emulated) -> None:
    """A GPU bundle has nothing for tensors of the CPU; here it knows that they are, as it does outside of tests."""
    library = gf_tvm.load(file)
    assert library.device_type == "cuda"
    with pytest.warns(gf_tvm.FallbackWarning, match=r"lacks filter_input .* float32 cpu: plain PyTorch operators"):
        gradients(library)
    assert "cuLaunchKernel" not in gpu.calls()
    with pytest.raises(GeometryError, match="x is on cpu; all must be on one cuda device"):
        found(library, "filter_input")(*arguments("filter_input"))


@pytest.mark.filterwarnings("error::gf_tvm.FallbackWarning")
def test_autocast_runs_float16_kernels(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    call = Kernel.__call__

    def spy(self: Kernel, *args: Any) -> None:
        ran.append((self.name, self.dtype))
        call(self, *args)

    monkeypatch.setattr(Kernel, "__call__", spy)
    x, weight, bias = leaves()
    with torch.autocast("cpu", dtype=torch.float16):
        y = gf_tvm.functional.conv2d(x, weight, bias, padding=1, patch=2, library=library)
    assert y.dtype == torch.float16
    grads = torch.autograd.grad(y.float().square().sum(), (x, weight, bias))
    assert ran == [("filter_input", "float16"), ("backward", "float16")]
    assert [grad.dtype for grad in grads] == [torch.float32] * 3
    for a, b in zip(grads, gradients(library), strict=True):
        torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2 * float(b.abs().max()))


def test_a_board_s_library_is_another(file: Path) -> None:
    with pytest.raises(ModelError, match=r"library must be what gf_tvm.load\(FILE\) returned"):
        gf_tvm.filter_model(nn.Conv2d(1, 1, 1), patch=2, last=1, library=gf_cuda.load(file))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("error::gf_tvm.FallbackWarning")
def test_a_model_trains(library: Library, gpu: emulated_cuda.Emulated) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1))
    plain = copy.deepcopy(model)
    gf_tvm.filter_model(model, patch=2, last=1, library=library)
    gf_tvm.filter_model(plain, patch=2, last=1)
    x = torch.randn(2, 3, 9, 8)
    with pytest.warns(gf_tvm.FallbackWarning):
        plain(x).square().mean().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        gpu.forget_calls()
        loss = model(x).square().mean()
        loss.backward()
        if step == 0:
            for a, b in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
            first = loss.item()
        else:
            assert set(gpu.calls()) <= LAUNCHING
        optimizer.step()
    assert loss.item() < first

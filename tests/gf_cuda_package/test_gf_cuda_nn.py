"""FilteredConv2d for boards: gradients, dtypes, what needs no kernel, mistakes; and on the Pythons that boards have."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import cuda_bundles
import emulated_cuda
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gf_cuda
import gf_cuda.nn
import gf_tvm
from gf_cuda.nn import FilteredConv2d, ModelError, filter_model, unfilter_model
from gf_tvm.core.geometry import Geometry
from gf_tvm.core.workload import Workload
from gf_tvm.farm.wheel import build_runtime_wheel

GEOMETRY = Geometry(2, 4, 6, 9, 8, 3, 2, padding=1)
UNCOVERED = Geometry(2, 4, 6, 11, 9, 3, (5, 2), stride=2, groups=2)
WORKLOADS = [
    *(Workload(kernel, GEOMETRY) for kernel in ("filter_input", "backward", "backward_input")),
    *(Workload(kernel, UNCOVERED) for kernel in ("filter_input", "backward")),
    *(Workload(kernel, GEOMETRY, "float16") for kernel in ("filter_input", "backward")),
]
LAUNCHING = {"cuLaunchKernel", "cuCtxGetCurrent", "cuCtxSetCurrent"}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with emulated_cuda.environment():
        return cuda_bundles.write_bundle(tmp_path_factory.mktemp("bundle") / "nano.gfb", WORKLOADS)


@pytest.fixture(autouse=True)
def gpu() -> Iterator[emulated_cuda.Emulated]:
    # A context of its own: what a test patches by the fixture is then undone first, and the environment last.
    with emulated_cuda.environment() as emulated, pytest.MonkeyPatch.context() as patch:
        patch.setattr("gf_cuda.driver._drivers", {})
        patch.setattr("gf_cuda.bundle._loaded", {})
        yield emulated


@pytest.fixture
def cuda() -> Iterator[cuda_bundles.CudaOnCpu]:
    with cuda_bundles.cuda_on_cpu() as made:
        yield made


@pytest.fixture
def library(file: Path, cuda: cuda_bundles.CudaOnCpu) -> gf_cuda.Bundle:
    return gf_cuda.load(file)


def leaves(geometry: Geometry, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = (geometry.x_shape, geometry.weight_shape, (geometry.co,))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def apply(function: object, inputs: list[Tensor], geometry: Geometry, **more: object) -> Tensor:
    settings = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    y: Tensor = function(*inputs, *settings, patch=geometry.patch, **more)  # type: ignore[operator]
    return y


def close(ours: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


# ------------------------------------------------------------------------------------------------------ the Pythons


def pythons() -> list[str]:
    """This one, and those that GF_CUDA_OLD_PYTHONS names, separated by colons: each must have a PyTorch."""
    return [sys.executable, *filter(None, os.environ.get("GF_CUDA_OLD_PYTHONS", "").split(":"))]


@pytest.mark.parametrize("python", pythons())
def test_a_board(python: str, file: Path, tmp_path: Path) -> None:
    """Nothing but Python, PyTorch, gf_cuda's wheel and a bundle: trains, checks, explains."""
    wheel = build_runtime_wheel(tmp_path)  # a pure wheel can be imported from as it is
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(wheel), **emulated_cuda.variables()}
    script = Path(__file__).with_name("board_script.py").read_bytes()
    copied = tmp_path / "script.py"
    copied.write_bytes(script)
    command = [python, "-W", "error::DeprecationWarning:gf_cuda", str(copied), str(file)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    print(report)
    assert "lacks filter_input n1_ci4_co6_9x8" in report["missing"]


# --------------------------------------------------------------------------------------------------------- gradients


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Meanwhile what torch.empty allocates is full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("geometry", [GEOMETRY, UNCOVERED], ids=["covered", "uncovered"])
def test_gradients_are_those_of_gf_tvm(library: gf_cuda.Bundle, geometry: Geometry) -> None:
    assert geometry.covers_input == (geometry is GEOMETRY)
    inputs = leaves(geometry)
    y = apply(gf_cuda.nn.conv2d, inputs, geometry, library=library)
    plain = apply(gf_tvm.functional.conv2d, inputs, geometry)
    assert torch.equal(y, plain)
    close(*(list(torch.autograd.grad(out.square().sum(), inputs)) for out in (y, plain)))  # type: ignore[arg-type]


def test_each_gradient_alone(library: gf_cuda.Bundle, gpu: emulated_cuda.Emulated) -> None:
    inputs = leaves(GEOMETRY)
    y = apply(gf_cuda.nn.conv2d, inputs, GEOMETRY, library=library)
    wanted = torch.autograd.grad(y.square().sum(), inputs)
    for needs, launches in (((0,), 3), ((1,), 5), ((2,), 0), ((0, 1), 5), ((0, 2), 3)):
        given = [tensor if i in needs else tensor.detach() for i, tensor in enumerate(inputs)]
        gpu.forget_calls()
        y = apply(gf_cuda.nn.conv2d, given, GEOMETRY, library=library)
        close(list(torch.autograd.grad(y.square().sum(), [given[i] for i in needs])), [wanted[i] for i in needs])
        # backward_input has 3 launches; backward 4, and filter_input 1; that of the bias alone is a sum by PyTorch
        assert gpu.calls().count("cuLaunchKernel") == launches


def test_only_the_sums_of_x_are_kept(library: gf_cuda.Bundle) -> None:
    conv = filter_model(nn.Conv2d(4, 6, 3, padding=1), 2, last=1, library=library)
    x = torch.randn(GEOMETRY.x_shape)
    kept = weakref.ref(x)
    y = conv(x)
    sizes = [t.shape for t in y.grad_fn.saved_tensors]  # type: ignore[union-attr]
    del x
    gc.collect()
    assert kept() is None
    assert sizes == [torch.Size(GEOMETRY.saved_shape), conv.weight.shape]
    y.sum().backward()


def test_a_step_only_launches(library: gf_cuda.Bundle, gpu: emulated_cuda.Emulated) -> None:
    inputs = leaves(GEOMETRY)
    for step in range(2):
        gpu.forget_calls()
        apply(gf_cuda.nn.conv2d, inputs, GEOMETRY, library=library).sum().backward()
        assert step == 0 or set(gpu.calls()) == LAUNCHING - {"cuCtxSetCurrent"}


def test_strides_and_slices(library: gf_cuda.Bundle) -> None:
    x, weight, bias = leaves(GEOMETRY)
    wanted = torch.autograd.grad(
        apply(gf_cuda.nn.conv2d, [x, weight, bias], GEOMETRY, library=library).square().sum(), (x, weight, bias)
    )
    memory = torch.empty(x.numel() + 1)
    odd = memory[1:].view(x.shape).copy_(x.detach()).requires_grad_()
    last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    for other in (odd, last):
        y = apply(gf_cuda.nn.conv2d, [other, weight, bias], GEOMETRY, library=library)
        close(list(torch.autograd.grad(y.square().sum(), (other, weight, bias))), list(wanted))


def test_one_image_strings_and_modes(library: gf_cuda.Bundle) -> None:
    """The other ways of torch.nn.Conv2d to say the same."""
    x, weight, bias = leaves(GEOMETRY)
    for padding in ("same", 1, (1, 1)):
        y = gf_cuda.nn.conv2d(x, weight, bias, padding=padding, patch=(2, 2), library=library)
        assert torch.equal(y, F.conv2d(x, weight, bias, padding=1))
    same = filter_model(nn.Conv2d(4, 6, 3, padding="same"), 2, last=1, library=library)
    same(x).sum().backward()
    reflected = filter_model(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), 2, last=1, library=library)
    with pytest.raises(gf_cuda.MissingKernelError, match="lacks filter_input n2_ci4_co6_11x10"):
        reflected(x)  # the padding belongs to the map that is filtered
    with torch.no_grad():
        one = gf_cuda.nn.conv2d(x[0], weight, bias, padding="valid", library=library)
    assert torch.equal(one, F.conv2d(x[0], weight, bias))
    with pytest.raises(ModelError, match='with stride 1 "same"'):
        gf_cuda.nn.conv2d(x, weight, bias, stride=2, padding="same", library=library)


def test_an_empty_batch(library: gf_cuda.Bundle) -> None:
    x, weight, bias = leaves(GEOMETRY)
    y = gf_cuda.nn.conv2d(x[:0], weight, bias, padding=1, library=library)
    y.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_no_second_derivative(library: gf_cuda.Bundle) -> None:
    inputs = leaves(GEOMETRY)
    y = apply(gf_cuda.nn.conv2d, inputs, GEOMETRY, library=library)
    (grad,) = torch.autograd.grad(y.square().sum(), inputs[1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ------------------------------------------------------------------------------------------------- dtypes, no kernels


def test_float16_and_autocast(library: gf_cuda.Bundle, cuda: cuda_bundles.CudaOnCpu) -> None:
    inputs = leaves(GEOMETRY)
    wanted = torch.autograd.grad(apply(gf_cuda.nn.conv2d, inputs, GEOMETRY, library=library).square().sum(), inputs)
    cuda.half = True  # autocast is on
    y = apply(gf_cuda.nn.conv2d, inputs, GEOMETRY, library=library)
    assert y.dtype == torch.float16
    grads = torch.autograd.grad(y.float().square().sum(), inputs)
    assert [grad.dtype for grad in grads] == [torch.float32] * 3
    close(list(grads), list(wanted), 2e-2)
    double = [tensor.detach().double() for tensor in inputs]
    assert apply(gf_cuda.nn.conv2d, double, GEOMETRY, library=library).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_have_no_kernels(library: gf_cuda.Bundle, dtype: torch.dtype) -> None:
    has = r"\(of this convolution it has float16, float32 only\); kernels for GPUs exist for float32 and float16"
    with pytest.raises(gf_cuda.MissingKernelError, match=rf"lacks filter_input .* {str(dtype)[6:]} {has}"):
        apply(gf_cuda.nn.conv2d, leaves(GEOMETRY, dtype), GEOMETRY, library=library)


def test_what_needs_no_kernel(library: gf_cuda.Bundle, gpu: emulated_cuda.Emulated) -> None:
    conv = filter_model(nn.Conv2d(3, 5, 1), 2, last=1, library=library)
    x = torch.randn(7, 3, 5, 5)
    gpu.forget_calls()
    with torch.no_grad():
        conv(x)
    conv.eval().requires_grad_(False)
    conv(x)
    filter_model(conv, 2, last=1)(x)  # nor a library
    assert not gpu.calls()
    conv.requires_grad_()
    with pytest.raises(ModelError, match="no library was given"):
        conv(x)


def test_what_a_bundle_lacks_is_said_with_what_it_has(library: gf_cuda.Bundle) -> None:
    def message(x: Tensor, patch: int = 2) -> str:
        conv = filter_model(nn.Conv2d(4, 6, 3, padding=1), patch, last=1, library=library)
        with pytest.raises(gf_cuda.MissingKernelError) as caught:
            conv(x)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    x = torch.randn(GEOMETRY.x_shape)
    batch = message(torch.randn(5, 4, 9, 8))
    assert "(of this convolution it has batch size 2 only)" in batch
    assert (
        "gf-tvm build --device jetson-nano --model MODEL --input 5xCxHxW --last K --patch 2x2 --dtype float32" in batch
    )
    assert "(of this convolution it has patch 2x2 only)" in message(x, 4)
    assert "only" not in message(torch.randn(2, 4, 20, 20))


def test_tensors_of_the_cpu(file: Path) -> None:
    """Without the fixture that lets them pose as others."""
    conv = filter_model(nn.Conv2d(4, 6, 3, padding=1), 2, last=1, library=gf_cuda.load(file))
    with pytest.raises(ModelError, match="x is on cpu: the kernels train on cuda tensors only"):
        conv(torch.randn(GEOMETRY.x_shape))


# -------------------------------------------------------------------------------------------------------------- models


class Own(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), nn.Conv2d(4, 2, 1))


def test_the_model_stays_what_it_is(library: gf_cuda.Bundle) -> None:
    model = network()
    before = [*model.modules()], [*model.parameters()], [*model.state_dict()]
    assert filter_model(model, (2, 1), last=2, library=library) is model
    after = [*model.modules()], [*model.parameters()], [*model.state_dict()]
    assert all(a is b for one, two in zip(before[:2], after[:2], strict=True) for a, b in zip(one, two, strict=True))
    assert before[2] == after[2]
    assert [type(module) is FilteredConv2d for module in before[0] if isinstance(module, nn.Conv2d)] == [
        False,
        True,
        True,
    ]
    assert "patch=(2, 1), library=Bundle('nano.gfb', device='jetson-nano'" in repr(model[2])
    filter_model(model, 4, layers="1.0", library=library)
    assert (model[1][0].patch, model[2].patch) == ((4, 4), (2, 1))  # type: ignore[index]
    assert not any(type(module) is FilteredConv2d for module in unfilter_model(model).modules())
    assert str(model) == str(network())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"either last=K or layers=\[names\]"),
        ({"last": 1, "layers": ["2"]}, r"either last=K or layers=\[names\]"),
        ({"last": 4}, "last must be between 1 and 3, the number of convolutions; got 4"),
        ({"last": True}, "got True"),
        ({"layers": ["1"]}, "no convolution '1'; there are 0, 1.0, 2"),
        ({"layers": []}, "layers is empty"),
        ({"last": 1, "patch": 0}, "patch must be integers of at least 1, got 0"),
        ({"last": 1, "patch": (1, 2, 3)}, "patch must be one integer or a pair"),
        ({"last": 1, "patch": "a"}, "patch must be one integer or a pair"),
        ({"last": 1, "library": "nano.gfb"}, r"library must be what gf_cuda.load\(FILE\) returned, got 'nano.gfb'"),
    ],
)
def test_mistakes(arguments: dict[str, object], message: str) -> None:
    model = network()
    before = str(model)
    with pytest.raises(ModelError, match=message):
        filter_model(model, **{"patch": 2, **arguments})  # type: ignore[arg-type]
    assert str(model) == before


def test_what_cannot_be_filtered(library: gf_cuda.Bundle, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Own(4, 4, 1))
    with pytest.raises(ModelError, match="1 is a Own, not a plain Conv2d"):
        filter_model(model, 2, layers=["0", "1"], library=library)
    with pytest.raises(ModelError, match="1 is a Own"):
        filter_model(model, 2, last=1, library=library)
    assert [type(module) for module in model] == [nn.Conv2d, Own]
    filter_model(model, 2, last=2, library=library)
    assert [type(module) for module in model] == [FilteredConv2d, Own]
    assert caplog.messages == ["1 left alone: is a Own, not a plain Conv2d"]
    conv = nn.Conv2d(3, 4, 3)
    conv.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="the model itself has a forward of its own"):
        filter_model(conv, 2, last=1, library=library)


def test_a_module_of_its_own(library: gf_cuda.Bundle) -> None:
    conv = FilteredConv2d(4, 6, 3, padding=1, patch=2, library=library)
    x = torch.randn(GEOMETRY.x_shape)
    conv(x).sum().backward()
    again = copy.deepcopy(conv)
    assert again.library is library
    assert (again.patch, again.weight is conv.weight) == ((2, 2), False)

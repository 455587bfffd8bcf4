"""What a board does with a bundle, by any Python and PyTorch that a board may have (3.6, 1.10): run by
test_gf_cuda_nn.py with the interpreters that it is told of, on the emulated GPU. The argument is the bundle.

CPU tensors pose as those of the emulated GPU, whose memory is the process's own.
"""

import contextlib
import copy
import json
import pickle
import platform
import sys
import warnings

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch  # noqa: E402
from torch import nn  # noqa: E402

import gf_cuda  # noqa: E402
import gf_cuda.nn  # noqa: E402
import gf_cuda.tensors  # noqa: E402
from gf_cuda import reference  # noqa: E402
from gf_cuda.__main__ import main  # noqa: E402


class CudaOnCpu(gf_cuda.tensors.TorchCuda):
    device_type = "cpu"

    def ordinal(self, device):
        return 0

    def stream(self, device):
        return 0

    def guard(self, device):
        return contextlib.ExitStack()

    def capturing(self):
        return False

    def scratch(self, nbytes, device):
        memory = torch.empty(nbytes + 256, dtype=torch.uint8)
        return memory, -(-memory.data_ptr() // 256) * 256


def check_gradients(conv, x, kernel):
    """Gradients of one FilteredConv2d for a random gradient of y, compared in float64."""
    x = x.clone().requires_grad_()
    y = conv(x)
    exact = nn.functional.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    assert torch.equal(y, exact)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(y, (x, conv.weight, conv.bias), grad_y)
    at = kernel.convolution
    saved = reference.expected("filter_input", at, {"x": x.detach()})["filtered_x"].value
    inputs = {"grad_y": grad_y, "filtered_x": saved, "weight": conv.weight.detach()}
    wanted = reference.expected("backward", at, inputs)
    for name, grad in zip(("grad_x", "grad_w", "grad_b"), grads):  # noqa: B905 (Python 3.6)
        assert grad.dtype == torch.float32
        want = wanted[name].value
        assert float((grad.double() - want).abs().max()) < 1e-5 * (1 + float(want.abs().max())), name


def run(path):
    library = gf_cuda.load(path)
    torch.manual_seed(0)
    backward = [kernel for kernel in library.kernels if kernel.name == "backward" and kernel.dtype == "float32"]
    for kernel in backward:
        at = kernel.convolution
        conv = nn.Conv2d(at.ci, at.co, at.kernel, at.stride, at.padding, at.dilation, at.groups)
        keys = list(conv.state_dict())
        same = gf_cuda.nn.filter_model(conv, at.patch, last=1, library=library)
        assert same is conv
        assert list(conv.state_dict()) == keys
        for tried in (conv, copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
            check_gradients(tried, torch.randn(at.n, at.ci, at.h, at.w), kernel)
        assert "patch=" in repr(conv)
        assert type(gf_cuda.nn.unfilter_model(conv)) is nn.Conv2d

    at = backward[0].convolution
    model = nn.Sequential(nn.Conv2d(3, at.ci, 3, padding=1), nn.ReLU(), nn.Conv2d(at.ci, at.co, 3, padding=1))
    gf_cuda.nn.filter_model(model, at.patch, layers=["2"], library=library)
    x = torch.randn(at.n, 3, at.h, at.w)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(x).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True), losses
    with torch.no_grad():
        model(x[:1])  # no kernel has this batch size, and none is needed
    try:
        model(x[:1])
    except gf_cuda.MissingKernelError as error:
        missing = str(error)
    assert main(["check", path]) == 0
    return {"python": platform.python_version(), "torch": torch.__version__, "loss": losses[-1], "missing": missing}


gf_cuda.tensors.cuda = gf_cuda.nn.cuda = CudaOnCpu()
print(json.dumps(run(sys.argv[1])))

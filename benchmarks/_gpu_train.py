"""Training steps on a GPU without synchronisation, under CUDA graphs, with autocast: do they compute the same?"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gf_tvm
from gf_tvm.errors import GfTvmError
from gf_tvm.machine.profiles import DeviceProfile
from gf_tvm.models import build_model
from gf_tvm.shapes import model_cases, with_dtypes, workloads_of

SHAPE = (32, 3, 64, 64)
LAST, PATCH, STEPS = 4, 2, 5
#: Of parameters after a few steps, relative to how far these moved them. cuDNN's atomics do not add in a fixed order.
TOLERANCE = 1e-2

Step = Callable[[], Tensor]


def train(profile: DeviceProfile, device: torch.device, folder: Path) -> dict[str, Any]:
    """Steps of ResNet-18 with its last convolutions filtered, each variant from the same beginning.

    Raises:
        GfTvmError: plain operators ran in the kernels' place, a step waits for the GPU, or a graph computes something
            else.
    """
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes=10, in_channels=SHAPE[1], image_size=SHAPE[2])
    cases = with_dtypes(model_cases(model, SHAPE, last=LAST, patches=[PATCH]), ["float32", "float16"])
    report = gf_tvm.build(workloads_of(cases), profile, [], folder / "model.gfb")
    library = gf_tvm.load(report.path)
    library.prepare(device)
    model = model.to(device).train()
    images = torch.randn(SHAPE, device=device)
    labels = torch.randint(0, 10, (SHAPE[0],), device=device)

    def fresh(filtered: bool) -> nn.Module:
        made = copy.deepcopy(model)
        return gf_tvm.filter_model(made, patch=PATCH, last=LAST, library=library) if filtered else made

    with warnings.catch_warnings():
        warnings.simplefilter("error", gf_tvm.FallbackWarning)  # every filtered layer must run a kernel
        exact = _milliseconds(_step(fresh(False), images, labels))
        eager_model, graph_model = fresh(True), fresh(True)
        eager = _step(eager_model, images, labels)
        _run(eager)  # warms up: cuDNN's choice, the optimizer's state
        _without_synchronisation(eager)
        replay = _graph(graph_model, images, labels)
        difference = _compare(model, eager_model, graph_model, eager, replay)
        half = _step(fresh(True), images, labels, autocast=True)
        _run(half)
        _without_synchronisation(half)
        return {
            "model": f"resnet18, input {'x'.join(map(str, SHAPE))}, last {LAST}, R{PATCH}, SGD with momentum",
            "exact_ms": exact,
            "filtered_ms": _milliseconds(eager),
            "filtered_graph_ms": _milliseconds(replay),
            "filtered_autocast_ms": _milliseconds(half),
            "graph_difference": difference,
        }


def _step(model: nn.Module, images: Tensor, labels: Tensor, autocast: bool = False) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.float16, enabled=autocast):
            loss = nn.functional.cross_entropy(model(images), labels)
        # Without a scaler: what is looked at is how the step runs, not what it learns.
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _graph(model: nn.Module, images: Tensor, labels: Tensor) -> Step:
    """The same step, captured. As PyTorch asks for, it is run a few times on another stream before."""
    step = _step(model, images, labels)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _run(step)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def _run(step: Step, count: int = STEPS) -> None:
    for _ in range(count):
        step()


def _without_synchronisation(step: Step) -> None:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        raise GfTvmError(f"a training step waits for the GPU: {str(error).splitlines()[0]}") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _compare(start: nn.Module, eager_model: nn.Module, graph_model: nn.Module, eager: Step, replay: Step) -> float:
    """Difference of the parameters after as many steps both ways, relative to the way that they went.

    Eager has made STEPS warm-up steps and one more; the graph's capture computes nothing, so one replay is missing.
    """
    replay()
    _run(eager)
    _run(replay)
    torch.cuda.synchronize()
    moved = difference = 0.0
    for a, b, c in zip(start.parameters(), eager_model.parameters(), graph_model.parameters(), strict=True):
        moved += (b.detach() - a.detach()).double().square().sum().item()
        difference += (b.detach() - c.detach()).double().square().sum().item()
    relative = (difference / moved) ** 0.5
    if not relative <= TOLERANCE:
        raise GfTvmError(f"steps under a CUDA graph differ from eager ones by {relative:.3g} of the way they went")
    return relative


def _milliseconds(step: Step, repeats: int = 30) -> float:
    """Median wall time of a step, the host's part included: that is what a user waits for."""
    _run(step)
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(times)

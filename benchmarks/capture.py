"""What capturing a model costs: at its first step beyond Dynamo's own work, and in every later step.

    python benchmarks/capture.py --json capture.json

First steps are compared with those of ``torch.compile`` and a backend that returns the graph as it is, in turn, each
time from nothing. A later step is compared with calling what was put together without Dynamo: its guards and our own
code around it. No kernels are built meanwhile.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _bench import conditions, keep, new_parser, say, show, spread
from _real_models import NAMES, logits, real_model
from torch import nn

import gf_tvm
from gf_tvm.chains.capture.backend import Backend
from gf_tvm.chains.model import graphs_of
from gf_tvm.models import build_model

LAST = 4
#: Built-in networks whose later steps are measured.
STEPS = ("resnet18", "mobilenetv2")


def first_step(model: nn.Module, run: Callable[[torch.Tensor], Any], x: torch.Tensor) -> float:
    """Seconds of a model's first forward pass, when nothing is compiled."""
    torch._dynamo.reset()
    start = time.perf_counter()
    assert logits(run(x)).requires_grad
    return time.perf_counter() - start


def capture_times(model: nn.Module, x: torch.Tensor, rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of first steps: by Dynamo with a backend that does nothing, filtered, and their difference."""
    found: dict[str, list[float]] = {"dynamo": [], "filtered": [], "beyond": []}
    with torch.no_grad():
        model(x)
    for _ in range(rounds):
        plain, filtered = copy.deepcopy(model), gf_tvm.filter_model(copy.deepcopy(model), 4, last=LAST)
        found["dynamo"].append(first_step(plain, torch.compile(plain, backend="eager", dynamic=False), x))
        found["filtered"].append(first_step(filtered, filtered, x))
        found["beyond"].append(found["filtered"][-1] - found["dynamo"][-1])
    return {key: spread(values) for key, values in found.items()}


def step_overhead(name: str, shape: Sequence[int], seconds: float) -> dict[str, Any]:
    """Milliseconds of a forward pass: of the model, of what was put together, and what is between."""
    torch.manual_seed(0)
    model = gf_tvm.filter_model(build_model(name, 10, image_size=shape[-1]).eval(), 4, last=LAST)
    x = torch.randn(tuple(shape))
    inputs: list[tuple[Any, ...]] = []
    true = Backend.compile

    def spied(self: Backend, *arguments: Any) -> Callable[..., Any]:
        run = true(self, *arguments)

        def called(*given: Any) -> Any:
            inputs.append(given)
            return run(*given)

        return called

    Backend.compile = spied  # type: ignore[method-assign]
    try:
        model(x)
    finally:
        Backend.compile = true  # type: ignore[method-assign]
    (given,) = inputs
    ((_, graph),) = graphs_of(model)
    whole, inside = [], []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(whole) < 5:
        for times, call in ((whole, lambda: model(x)), (inside, lambda: graph.assembled.module(*given))):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
    between = statistics.median(whole) - statistics.median(inside)
    return {"model": spread(whole), "put_together": spread(inside), "between_ms": round(between, 3)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--models", default=",".join(NAMES), help="default: %(default)s")
    parser.add_argument("--size", type=int, default=224, help="pixels per side (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="first steps of each model (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="for the later steps of a model (default: 10)")
    args = parser.parse_args(arguments)
    os.environ["GF_TVM_ON_DEMAND"] = "0"
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {"conditions": conditions(), "size": args.size, "first_steps": {}, "later_steps": {}}
    rows = []
    for name in args.models.split(","):
        say(f"capturing {name}")
        torch.manual_seed(0)
        times = capture_times(real_model(name), torch.randn(1, 3, args.size, args.size), args.rounds)
        found["first_steps"][name] = times
        rows.append([name, *(show(times[key]) for key in ("dynamo", "filtered", "beyond")), ""])
    for name in STEPS:
        say(f"steps of {name}")
        step = step_overhead(name, (1, 3, 32, 32), args.seconds)
        found["later_steps"][name] = step
        rows.append([f"{name}, a step", "", "", "", f"{step['between_ms']:.2f}"])
    keep(found, ["model", "Dynamo s", "filtered s", "beyond s", "a later step ms"], rows, args.json)


if __name__ == "__main__":
    main()

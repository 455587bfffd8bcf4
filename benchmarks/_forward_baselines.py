"""The forward pass of a model by other programs: ONNX Runtime and OpenVINO, where they are installed."""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[], Tensor]


def exported(model: nn.Module, x: Tensor) -> bytes:
    """The model as ONNX, its parameters inside."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, of deprecations in PyTorch
        torch.onnx.export(model, (x,), file, dynamo=False, input_names=["x"], output_names=["y"])
    return file.getvalue()


def onnx_runtime(content: bytes, x: Tensor, threads: int) -> Forward:
    """With all of its rewriting of graphs, on that many threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    values = {"x": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, values)[0])


def openvino(content: bytes, x: Tensor, threads: int) -> Forward:
    """In float32 as the others, where it would choose bfloat16 by itself."""
    import openvino as ov

    core = ov.Core()
    settings: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(core.read_model(content), "CPU", settings)
    request, values = compiled.create_infer_request(), [x.numpy()]
    return lambda: torch.from_numpy(request.infer(values)[compiled.output(0)])


#: By name: the module that it needs, and what makes a forward pass.
PROGRAMS = {
    "ONNX Runtime": ("onnxruntime", onnx_runtime),
    "OpenVINO": ("openvino", openvino),
}


def missing() -> dict[str, str]:
    """Programs that are not installed, and what they need."""
    modules = {name: (module, "onnx") for name, (module, _) in PROGRAMS.items()}
    return {
        name: ", ".join(lacking)
        for name, needed in modules.items()
        if (lacking := [module for module in needed if importlib.util.find_spec(module) is None])
    }


def forwards(model: nn.Module, x: Tensor, threads: int, without: Sequence[str] = ()) -> dict[str, Forward]:
    """The forward pass on ``x`` by every program that is installed.

    Args:
        model: in evaluation mode. without: names of programs to leave out.
    """
    wanted = {name: make for name, (_, make) in PROGRAMS.items() if name not in missing() and name not in without}
    if not wanted:
        return {}
    content = exported(model, x)
    return {name: make(content, x, threads) for name, make in wanted.items()}

"""A forward pass of an ONNX file, asked for call by call: ``_forward_process.py PROGRAM FILE.onnx X.npy THREADS``.

Answers each line of standard input with one line, after one call; the first also writes the logits beside the input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def onnx_runtime(file: str, x: Any, threads: int) -> Callable[[], Any]:
    """With all of its rewriting of graphs, on that many threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x})[0]


def openvino(file: str, x: Any, threads: int) -> Callable[[], Any]:
    """In float32 as the others, where it would choose bfloat16 by itself."""
    import openvino as ov

    core = ov.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(core.read_model(file), "CPU", settings)
    request = compiled.create_infer_request()
    return lambda: request.infer([x])[compiled.output(0)]


#: By the name of the module that it needs.
PROGRAMS = {"onnxruntime": onnx_runtime, "openvino": openvino}


def main(program: str, file: str, input_file: str, threads: str) -> None:
    """Serve until standard input ends."""
    call = PROGRAMS[program](file, np.load(input_file), int(threads))
    np.save(Path(input_file).with_name(f"{program}.npy"), np.asarray(call()))
    print("ready", flush=True)
    for _ in sys.stdin:
        call()
        print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

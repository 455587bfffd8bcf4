"""The forward pass of a model by other programs: ONNX Runtime and OpenVINO, where they are installed.

Each in a process of its own that is asked for one call after another, so that they take part in the same rounds. ONNX
Runtime has the allocator of this process; OpenVINO frees what it did not allocate when jemalloc is preloaded, so it
has the system's. It allocates next to nothing in a call.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gf_tvm.comparison.convolutions import ComparisonError
from gf_tvm.machine.allocator import PRELOAD, environment_of_children

Forward = Callable[[], Any]

#: By name: the module that it needs, and whether it runs under any allocator.
PROGRAMS = {"ONNX Runtime": ("onnxruntime", True), "OpenVINO": ("openvino", False)}
_PROCESS = Path(__file__).with_name("_forward_process.py")


def missing() -> dict[str, str]:
    """Programs that are not installed, and the modules that they need."""
    return {
        name: ", ".join(lacking)
        for name, (module, _) in PROGRAMS.items()
        if (lacking := [needed for needed in (module, "onnx") if importlib.util.find_spec(needed) is None])
    }


class _Program:
    """One process; a call is one forward pass."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        module, any_allocator = PROGRAMS[name]
        environment = {**os.environ, **(environment_of_children() if any_allocator else {})}
        if not any_allocator:
            environment.pop(PRELOAD, None)
        self._name = name
        self.process = subprocess.Popen(
            [sys.executable, str(_PROCESS), module, str(folder / "model.onnx"), str(folder / "x.npy"), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self._answered("ready")
        self._logits: Tensor | None = torch.from_numpy(np.load(folder / f"{module}.npy"))

    def __call__(self) -> Tensor | None:
        """The first time, when it is checked, the logits."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self._answered("done")
        logits, self._logits = self._logits, None
        return logits

    def _answered(self, wanted: str) -> None:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():  # these programs may print what they like
            if line.strip() == wanted:
                return
        raise ComparisonError(f"{self._name}'s process ended with exit code {self.process.wait()}")


@contextmanager
def forwards(model: nn.Module, x: Tensor, threads: int, without: Sequence[str] = ()) -> Iterator[dict[str, Forward]]:
    """The forward pass on ``x`` by every program that is installed.

    Args:
        model: in evaluation mode. without: names of programs to leave out.

    Raises:
        ComparisonError: a program failed.
    """
    lacking = missing()
    wanted = [name for name in PROGRAMS if name not in lacking and name not in without]
    with ExitStack() as stack:
        programs: dict[str, Forward] = {}
        if wanted:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gf_tvm-forward-")))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the exporter's own, of deprecations in PyTorch
                names = {"input_names": ["x"], "output_names": ["y"]}
                torch.onnx.export(model, (x,), folder / "model.onnx", dynamo=False, **names)  # type: ignore[arg-type]
            np.save(folder / "x.npy", x.numpy())
            for name in wanted:
                program = _Program(name, folder, threads)
                stack.callback(_end, program.process)
                programs[name] = program
        yield programs


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()

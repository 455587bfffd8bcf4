"""A small task for a GPU, of kernels written by hand: a matrix product whose candidates fail in every way there is.

It is a module of its own because worker processes import it by name.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from toy_task import N, definition

from gf_cuda import Program, compile_source
from gf_tvm.tuning.log import Identity
from gf_tvm.tuning.task import Config, Task, WorkloadTask

#: Two launches; what the first leaves for the second lies in scratch memory.
SOURCE = """
extern "C" __global__ void product(const float* a, const float* b, float* between) {{
  int i = blockIdx.x, j = threadIdx.x;
  float sum = 0;
  for (int k = 0; k < {n}; ++k) sum += a[i * {n} + k] * b[k * {n} + j];
  {first}
}}
extern "C" __global__ void finish(float* between, float* a, float* c) {{
  int i = blockIdx.x, j = threadIdx.x;
  {second}
}}
"""

_STORE = f"between[i * {N} + j] = sum;"
_FINISH = f"c[i * {N} + j] = between[i * {N} + j];"

#: By what a candidate does: the body of each kernel.
ACTS = {
    "none": (_STORE, _FINISH),
    "wrong": (_STORE, f"c[i * {N} + j] = 1.01f * between[i * {N} + j];"),
    "leaves a hole": (_STORE, f"if (i != 3) {_FINISH}"),
    "reads scratch memory": (f"if (i != 3) {_STORE}", _FINISH),
    "writes its input": (_STORE, f"{_FINISH} if (i == 0) a[j] += 1;"),
    "writes outside": (_STORE, f"{_FINISH} if (i == 0 && j == 0) c[-1] = 0;"),
    "writes beyond scratch memory": (_STORE, f"{_FINISH} if (i == 0 && j == 0) between[{N * N}] = 0;"),
    "does not compile": (_STORE, "this is no C;"),
    "too many threads": (_STORE, _FINISH),
}


@dataclass
class GpuToySpace:
    """What the candidate does, and a number that only tells candidates apart."""

    acts: tuple[str, ...] = ("none",)
    knobs: dict[str, tuple[int | str, ...]] = field(init=False)
    default: Config = field(init=False)

    def __post_init__(self) -> None:
        self.knobs = {"act": self.acts, "number": (0, 1, 2, 3)}
        self.default = {"act": self.acts[0], "number": 0}

    def valid(self, config: Config) -> bool:
        return True

    def schedule(self, config: Config) -> Any:
        return config

    def sample(self, rng: random.Random) -> Config:
        return {name: rng.choice(values) for name, values in self.knobs.items()}

    def features(self, config: Config) -> list[float]:
        return [float(values.index(config[name])) for name, values in self.knobs.items()]


def program(arch: str = "sm_53", threads: int = N) -> Program:
    """See SOURCE."""
    shape = [N, N]
    first = {"function": "product", "arguments": [["argument", 0], ["argument", 1], ["scratch", 0]]}
    second = {"function": "finish", "arguments": [["scratch", 0], ["argument", 0], ["argument", 2]]}
    launch = {"grid": [N, 1, 1], "block": [threads, 1, 1], "shared": 0}
    return Program.from_dict(
        {
            "schema": 1,
            "arch": arch,
            "arguments": [
                {"name": name, "dtype": "float32", "shape": shape, "output": name == "c"} for name in ("a", "b", "c")
            ],
            "scratch_bytes": 4 * N * N,
            "launches": [{**launch, **first}, {**launch, **second}],
        }
    )


class GpuToyTask(Task):
    """See the module.

    Args:
        acts: of the space.
        key: the log's name.
    """

    def __init__(self, acts: tuple[str, ...] = ("none",), key: str = "toy") -> None:
        self._identity = Identity("toy-gpu", "cuda", key, {"n": N}, "0123456789abcdef")
        self._space = GpuToySpace(acts)

    @property
    def gpu(self) -> bool:
        return True

    @property
    def identity(self) -> Identity:
        return self._identity

    @property
    def space(self) -> GpuToySpace:
        return self._space

    def module(self) -> Any:
        return definition("none")

    def export(self, schedule: Any, path: Path) -> None:
        first, second = ACTS[schedule["act"]]
        made = program(threads=2048 if schedule["act"] == "too many threads" else N)
        source = SOURCE.format(n=N, first=first, second=second)
        image, kind, _ = compile_source(source, made.arch)
        made.save(str(path), source, image, kind)

    def load(self, path: Path) -> Callable[..., None]:
        raise NotImplementedError

    def inputs(self, seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(N, N, generator=generator) for _ in range(2)]

    def output_specs(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [((N, N), torch.float32)]

    def expected(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        return inputs[0].double() @ inputs[1].double()

    def excess(self, outputs: list[torch.Tensor], expected: torch.Tensor) -> float:
        error = float((outputs[0].double() - expected).abs().max() / expected.abs().max()) / 1e-4
        return error if error == error else float("inf")


#: What the points of a :class:`TreacherousGpuTask` do; each launches one kernel of this body in place of its own.
TREACHERY = {
    "right": "",
    "wrong": ";",
    "crash": "__builtin_abort();",
    # The context is lost.
    "illegal address": "*(volatile int*)0 = 1;",
    "hang": "for (volatile int k = 0;; k = 1) {}",
    "over the limits": "",
}


@dataclass
class Points:
    """A space of a few points, each a configuration of another space."""

    base: Any
    acts: tuple[str, ...]
    knobs: dict[str, tuple[int | str, ...]] = field(init=False)
    default: Config = field(init=False)

    def __post_init__(self) -> None:
        self.knobs = {"point": tuple(range(len(self.acts)))}
        self.default = {"point": 0}

    def valid(self, config: Config) -> bool:
        return True

    def schedule(self, config: Config) -> Any:
        return self.acts[config["point"]], self.base.schedule(self.base.default)

    def sample(self, rng: random.Random) -> Config:
        return {"point": rng.randrange(len(self.acts))}


class TreacherousGpuTask(WorkloadTask):
    """A workload of which only the first point is what it should be; the others are named by TREACHERY."""

    acts = tuple(TREACHERY)

    @property
    def space(self) -> Any:  # type: ignore[override]
        return Points(super().space, self.acts)

    def export(self, schedule: Any, path: Path) -> None:
        from gf_tvm.codegen.cuda import compile_program  # imports TVM, which those that measure do without

        act, schedule = schedule
        profile = self.profile
        if act == "over the limits":
            profile = replace(profile, gpu=replace(profile.gpu, threads=8))
        made = compile_program(schedule, profile)
        if not TREACHERY[act]:
            made.program.save(str(path), made.source, made.image, made.kind)
            return
        values = made.program.to_dict()
        launch = {"function": "act", "grid": [1, 1, 1], "block": [32, 1, 1], "shared": 0, "arguments": []}
        source = f'extern "C" __global__ void act() {{ {TREACHERY[act]} }}'
        image, kind, _ = compile_source(source, made.program.arch)
        Program.from_dict({**values, "launches": [launch]}).save(str(path), source, image, kind)

"""A small task for the tests of tuning: a matrix product whose space holds every way in which a candidate can fail.

It is a module of its own because worker processes import it by name.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gf_tvm.tuning.log import Identity
from gf_tvm.tuning.task import Config, Task

N = 16


@dataclass
class ToySpace:
    """Two tile sizes, and what the candidate does: "none" is a right kernel, all others fail in their own way."""

    acts: tuple[str, ...] = ("none",)
    tiles: tuple[int, ...] = (1, 2, 4, 8)
    knobs: dict[str, tuple[int | str, ...]] = field(init=False)
    default: Config = field(init=False)

    def __post_init__(self) -> None:
        self.knobs = {"i": self.tiles, "j": self.tiles, "act": self.acts}
        self.default = {"i": self.tiles[0], "j": self.tiles[0], "act": self.acts[0]}

    def valid(self, config: Config) -> bool:
        # A rule, so that not every combination exists.
        return int(config["i"]) * int(config["j"]) < 64

    def sample(self, rng: random.Random) -> Config:
        while True:
            config = {name: rng.choice(values) for name, values in self.knobs.items()}
            if self.valid(config):
                return config

    def features(self, config: Config) -> list[float]:
        return indices(self.knobs, config)

    def schedule(self, config: Config) -> Any:
        from tvm.s_tir import Schedule

        act = config["act"]
        if act == "refuse":
            raise ValueError("this tile does not divide\nand more lines that nobody needs")
        if act == "segfault while building":
            os.kill(os.getpid(), signal.SIGSEGV)
        if act == "hang while building":
            time.sleep(1000)
        if act == "full disk":
            raise OSError(28, "No space left on device")
        schedule = Schedule(definition(str(act)))
        block = schedule.get_sblock("c")
        i, j = schedule.get_loops(block)[:2]
        _, inner = schedule.split(i, [None, config["i"]])
        schedule.vectorize(schedule.split(j, [None, config["j"]])[1]) if act == "none" else schedule.unroll(inner)
        return schedule


def indices(knobs: Mapping[str, tuple[Any, ...]], config: Config) -> list[float]:
    """Features of a point: the place of each value among those of its knob."""
    return [float(values.index(config[name])) for name, values in knobs.items()]


def definition(act: str) -> Any:
    """C = A B; ``act`` says what goes wrong when it runs."""
    import tvm
    from tvm import te, tirx

    a = te.placeholder((N, N), "float32", name="a")
    b = te.placeholder((N, N), "float32", name="b")
    k = te.reduce_axis((0, N), "k")
    product = te.compute((N, N), lambda i, j: te.sum(a[i, k] * b[k, j], axis=k), name="p")

    def body(i: Any, j: Any) -> Any:
        if act == "wrong":
            return product[i, j] * tirx.const(1.01, "float32")
        if act == "right for trials only":
            first = tirx.const(float(ToyTask().inputs(0)[0][0, 0]), "float32")
            return product[i, j] + tirx.if_then_else(a[0, 0] == first, 0.0, 1.0).astype("float32")
        if act == "crash":
            return product[i, j] + tirx.call_extern("int32", "abort").astype("float32")
        if act == "hang":
            return product[i, j] + tirx.call_extern("int32", "pause").astype("float32")
        return product[i, j]

    c = te.compute((N, N), body, name="c")
    function = te.create_prim_func([a, b, c])
    return tvm.IRModule({"main": function.with_attr("global_symbol", "main")})


class ToyTask(Task):
    """See the module.

    Args:
        key: the log's name.
        acts, tiles: of the space.
        definition_hash: as if the kernel had changed.
        sneaky: what every loaded kernel does besides its work.
    """

    def __init__(
        self,
        key: str = "toy",
        acts: tuple[str, ...] = ("none",),
        tiles: tuple[int, ...] = (1, 2, 4, 8),
        definition_hash: str = "0123456789abcdef",
        sneaky: str = "",
    ) -> None:
        self._identity = Identity("toy-device", "llvm", key, {"n": N}, definition_hash)
        self._space = ToySpace(acts, tiles)
        self._sneaky = sneaky

    @property
    def identity(self) -> Identity:
        return self._identity

    @property
    def space(self) -> ToySpace:
        return self._space

    def module(self) -> Any:
        return definition("none")

    def export(self, schedule: Any, path: Path) -> None:
        import tvm

        # Builds hang while the file named by TOY_STALL exists; one that does so leaves another file.
        stall = os.environ.get("TOY_STALL", "")
        while stall and Path(stall).exists():
            Path(stall + ".reached").touch()
            time.sleep(0.1)
        tvm.compile(schedule.mod, target="llvm").export_library(str(path))

    def load(self, path: Path) -> Callable[..., None]:
        import tvm_ffi  # the rest of TVM would be imported within the limit of a call

        kernel = tvm_ffi.load_module(str(path))["main"]
        if self._sneaky == "writes its input":
            return lambda a, b, c: (kernel(a, b, c), a.add_(1))  # type: ignore[return-value]
        if self._sneaky == "writes outside":
            return lambda a, b, c: (kernel(a, b, c), c.as_strided((1,), (1,), c.storage_offset() - 1).fill_(0))  # type: ignore[return-value]
        if self._sneaky == "leaves a hole":
            return lambda a, b, c: (kernel(a, b, c), c[3].fill_(float("nan")))  # type: ignore[return-value]
        return kernel

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


class TaskOf(ToyTask):
    """A toy task with another space."""

    def __init__(self, space: Any) -> None:
        super().__init__()
        self._space = space


def workers_of(parent: int) -> list[int]:
    """Worker processes that ``parent`` has started and that still run, whoever their parent is now."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(b"gf_tvm.tuning.measuring.process" in word for word in words) and words[-3] == str(parent).encode():
            found.append(int(entry.name))
    return found


def wait_until(condition: Callable[[], Any], seconds: float = 120) -> bool:
    """Poll until ``condition`` holds; False if it does not in time (in which this process was not stopped)."""
    for _ in range(round(seconds / 0.02)):
        if condition():
            return True
        time.sleep(0.02)
    return False

"""A library whose kernels are the reference: to test how operators choose and call kernels, without a compiler."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import gf_tvm.bundle.library
from gf_tvm.core import reference
from gf_tvm.core.geometry import Geometry
from gf_tvm.core.workload import Workload

BACKWARD = ("backward", "backward_input", "backward_weight")


@dataclass(eq=False)
class FakeLibrary:
    """Has every workload of the kernels ``has``; as strict about its arguments as a compiled kernel.

    ``calls`` lists (kernel's name, data pointers of its arguments), in the order of the calls.
    """

    has: tuple[str, ...] = ("filter_input", *BACKWARD)
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    digest: str = "fake"
    device_type: str = "cpu"
    fingerprints: None = None
    calls: list[tuple[str, list[int]]] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock, repr=False)

    @property
    def called(self) -> list[str]:
        return [name for name, _ in self.calls]

    def find(self, kernel: str, geometry: Geometry, dtype: str) -> FakeKernel | None:
        assert geometry.n >= 1
        return FakeKernel(self, kernel, geometry, dtype) if kernel in self.has and dtype in self.dtypes else None

    @property
    def programs(self) -> tuple[str, ...]:
        return ()

    def program(self, key: str) -> None:
        """It has none."""

    # As the real one: copies share it, and unpickling finds the loaded one.
    def __deepcopy__(self, memo: dict[int, Any]) -> FakeLibrary:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return gf_tvm.bundle.library.get_library, (self.digest,)


@contextmanager
def loaded(*libraries: FakeLibrary) -> Iterator[None]:
    """``gf_tvm.bundle.library.get_library`` knows these libraries meanwhile."""
    registry: dict[str, Any] = gf_tvm.bundle.library._loaded
    for library in libraries:
        assert library.digest not in registry
        registry[library.digest] = library
    try:
        yield
    finally:
        for library in libraries:
            del registry[library.digest]


@dataclass(frozen=True)
class FakeKernel:
    library: FakeLibrary
    name: str
    geometry: Geometry
    dtype: str
    alignment: int = 64

    @property
    def workload(self) -> Workload:
        return Workload(self.name, self.geometry, self.dtype)

    def __call__(self, *tensors: Tensor) -> None:
        with self.library.lock:
            self.library.calls.append((self.name, [tensor.data_ptr() for tensor in tensors]))
        g = self.geometry
        shapes = {
            "x": g.x_shape, "xt": g.saved_shape, "w": g.weight_shape, "gy": g.y_shape, "gx": g.x_shape,
            "gw": g.weight_shape, "gb": (g.co,), "g~": (g.n, g.co, *g.grid), "gx~": (g.n, g.ci, *g.grid),
        }  # fmt: skip
        arguments = {
            "filter_input": ("x", "xt"),
            "backward": ("gy", "xt", "w", "gx", "gw", "gb"),
            "backward_input": ("gy", "w", "gx", "gb"),
            "backward_weight": ("gy", "xt", "gw", "gb"),
            "input_grad": ("g~", "w", "gx~"),
            "weight_grad": ("g~", "xt", "gw"),
        }[self.name]
        assert len(tensors) == len(arguments)
        named = dict(zip(arguments, (tensor.detach() for tensor in tensors), strict=True))
        for name, tensor in named.items():
            assert tensor.shape == shapes[name], name
            assert tensor.is_contiguous(), name
            assert tensor.data_ptr() % 64 == 0, name
            assert tensor.device.type == "cpu"
            assert tensor.dtype == (torch.float32 if name in ("xt", "g~", "gx~") else getattr(torch, self.dtype)), name
        if self.name == "filter_input":
            sums = reference.filter_input(named["x"], g)
            named["xt"].copy_(sums if g.depthwise else sums.permute(0, 2, 3, 1))
            return
        sums = named.get("xt")
        if sums is not None and not g.depthwise:
            sums = sums.permute(0, 3, 1, 2)
        if self.name == "input_grad":
            named["gx~"].copy_(reference.input_grad(named["g~"], named["w"], g))
            return
        if self.name == "weight_grad":
            assert sums is not None
            named["gw"].copy_(reference.weight_grad(named["g~"], sums, g))
            return
        weight = named.get("w", torch.zeros(g.weight_shape, dtype=named["gy"].dtype))
        needs = ("gx" in named, "gw" in named, True)
        grad_x, grad_w, grad_b = reference.backward(named["gy"], sums, weight, g, needs)
        if grad_x is not None:
            # A compiled kernel writes patches and nothing else; what it finds there must not matter to it.
            rows, cols = (
                slice(max(0, -axis.in_offset), max(0, axis.patches * axis.window - axis.in_offset))
                for axis in (g.rows, g.cols)
            )
            named["gx"][:, :, rows, cols] = grad_x[:, :, rows, cols]
        if grad_w is not None:
            named["gw"].copy_(grad_w)
        assert grad_b is not None
        named["gb"].copy_(grad_b)

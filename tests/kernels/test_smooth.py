"""exp, tanh and erf of vectors, and what chains make of them: against float64, on all of the range that counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from tvm.script.ir_builder import tirx as T

from gf_tvm.bundle.runtime import load_library, start_runtime
from gf_tvm.chains.compile import emit_functions
from gf_tvm.chains.plan import elementwise
from gf_tvm.codegen.compile import compile_module, export
from gf_tvm.kernels.cpu import emit, simd, smooth
from gf_tvm.machine.profiles import get_profile

#: Of float32, relative to one.
EPS = 2.0**-23
SETTINGS: dict[str, tuple[Any, ...]] = {"hardtanh": (-2.0, 1.0), "leaky_relu": (0.25,), "elu": (1.5,)}
#: tests/chains/test_elementwise.py has all that chains compile; here are those that most networks have.
COMPILED = {"relu", "relu6", "hardtanh", "leaky_relu", "hardswish", "hardsigmoid"} | {
    *("elu", "sigmoid", "tanh", "silu", "mish", "gelu")
}


def compiled(path: Path, of: Callable[[Any], Any], x: Tensor, lanes: int) -> Tensor:
    """``of``, which makes a vector of one, of every element of ``x``."""
    count = x.numel()
    assert count % lanes == 0
    with emit.function() as module:
        source, target = map(simd.flat, [T.arg(name, T.buffer((count,), "float32")) for name in ("x", "y")])
        with emit.loop(count // lanes) as k:
            simd.store(target, k * lanes, of(T.bind(simd.load(source, k * lanes, lanes))))
    host = get_profile("host")
    export([compile_module(module(), host, "f")], path, host)
    start_runtime()
    y = torch.full_like(x, torch.nan)
    load_library(path)["f"](x, y)
    return y


def values(largest: float) -> Tensor:
    """Of all sizes, more near zero; and zeros of both signs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1 << 16, generator=generator) * 2 - 1
    tiny = 1e-3 * x**7  # none so small that float32 has fewer digits
    return torch.cat(
        [
            largest * x,
            x,
            tiny[tiny.abs() > 1e-36][: 1 << 15],
            torch.tensor([0.0, -0.0]),
            torch.linspace(-largest, largest, 14),
        ]
    )


@pytest.mark.parametrize("lanes", [1, 4, 16])
@pytest.mark.parametrize(("name", "largest", "bound"), [("exp", 86.9, 2e-7), ("tanh", 12.0, 3e-7), ("erf", 6.0, 3e-7)])
def test_relative_error(name: str, largest: float, bound: float, lanes: int, tmp_path: Path) -> None:
    x = values(largest)
    expected = getattr(torch, name)(x.double())
    found = compiled(tmp_path / "f.so", getattr(smooth, name), x, lanes).double()
    assert torch.equal(found[expected == 0], expected[expected == 0])
    error = ((found - expected).abs() / expected.abs())[expected != 0]
    assert error.max() < bound


def test_beyond_the_range(tmp_path: Path) -> None:
    x = torch.tensor([-1e30, -200.0, -torch.inf, 200.0, 1e30, torch.inf, torch.nan, -torch.nan])
    e, t, r = (
        compiled(tmp_path / f"{name}.so", getattr(smooth, name), x, 8)[:6].double() for name in ("exp", "tanh", "erf")
    )
    assert (e[:3] < 1e-37).all()
    assert (e[3:] > 1e38).all()
    assert torch.equal(t, torch.tensor([-1.0] * 3 + [1.0] * 3).double())
    assert torch.equal(r, t)
    for name in ("exp", "tanh", "erf"):
        assert compiled(tmp_path / f"{name} of nan.so", getattr(smooth, name), x, 8)[6:].isnan().all()


@pytest.mark.parametrize("name", [*sorted(COMPILED - {"gelu"}), "gelu none", "gelu tanh"])
def test_functions_and_slopes(name: str, tmp_path: Path) -> None:
    kind, *how = name.split()
    settings = SETTINGS.get(kind, tuple(how))
    x = values(9.0)
    # Edges of pieces, and what PyTorch makes of NaN.
    x[:14] = torch.tensor([-6.0, -3.0, -2.0, 0.0, 1.0, 3.0, 6.0, -0.0, 20.0, 40.0, -20.0, -40.0, -100.0, 100.0])
    expected, slopes = elementwise.run(kind, settings, x.double(), False, True)
    assert slopes is not None
    y = compiled(tmp_path / "f.so", lambda z: emit_functions.function(kind, settings, z), x, 16)
    slope = compiled(tmp_path / "g.so", lambda z: emit_functions.slope(kind, settings, z), x, 16)
    # Of a product with z the error is relative to z where the other factor is a difference from one.
    scale = x.double().abs().clamp(min=1.0)
    assert ((y.double() - expected).abs() / scale).max() < 4 * EPS
    assert ((slope.double() - slopes).abs() / scale).max() < 4 * EPS
    x.fill_(torch.nan)
    assert compiled(tmp_path / "h.so", lambda z: emit_functions.function(kind, settings, z), x, 16).isnan().all()


@pytest.mark.parametrize("kind", ["sigmoid", "tanh"])
def test_slopes_from_results(kind: str, tmp_path: Path) -> None:
    x = values(9.0)
    y, slopes = elementwise.run(kind, (), x.double(), False, True)
    assert slopes is not None
    found = compiled(tmp_path / "f.so", lambda z: emit_functions.slope_of_result(kind, (), z), y.float(), 16)
    assert (found.double() - slopes).abs().max() < 4 * EPS


def test_a_wrong_coefficient_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = smooth._EXP
    monkeypatch.setattr(smooth, "_EXP", (first * (1 + 1e-5), *others))
    with pytest.raises(AssertionError):
        test_relative_error("exp", 86.9, 2e-7, 16, tmp_path)

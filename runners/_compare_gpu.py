"""What gf-tvm compare prints in addition for a GPU: every exact backward pass, pooling, memory, energy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._output import format_table
from ._rows import digits, label

if TYPE_CHECKING:
    from ..comparison.rows import GpuRow
    from ..comparison.run import Comparison


def print_gpu(result: Comparison) -> None:
    """Two tables and what has to be said about them."""
    from ..comparison.rows import GpuRow

    rows = [row for row in result.rows if isinstance(row, GpuRow)]
    _print_times(rows)
    _print_memory(rows, result.conditions["energy"])
    if waiting := sorted({f"{label(row)}: {name}" for row in rows for name in row.host_bound}):
        print(f"These wait for the GPU themselves, so their times include host time: {', '.join(waiting)}")
    if result.conditions["advice"]:
        print(f"Doubtful: {result.conditions['advice']}")


def _print_times(rows: list[GpuRow]) -> None:
    from ..shapes import format_patch

    ways = list(rows[0].baselines)
    print()
    print("Exact backward pass by memory format and precision, the kernel alone, pooling in the forward pass; ms:")
    headers = ("case", "patch", *(way.replace(" ", "\n") for way in ways), "kernel\nalone", "pooling", "pooling\nlimit")
    table = [
        (
            label(row),
            format_patch(row.patch),
            *(_or_dash(row.baselines[way]["ms"]) for way in ways),
            _or_dash(row.gf_tvm_kernel_ms),
            digits(row.filter_input_ms),
            digits(row.filter_input_roofline_ms),
        )
        for row in rows
    ]
    print(format_table(headers, table))
    reasons = {
        f"{way}: {column['reason']}" for row in rows for way, column in row.baselines.items() if column["ms"] is None
    }
    if reasons:
        print(f"Not measured: {', '.join(sorted(reasons))}")


def _print_memory(rows: list[GpuRow], meter: dict[str, Any]) -> None:
    from ..shapes import format_patch

    variants = ("baseline", "reference", "gf_tvm")
    print()
    said = f"joules above idle ({meter['meter']})" if meter["meter"] else f"energy not measured ({meter['reason']})"
    print(f"Per call of exact, plain and gf_tvm: peak memory allocated (MB); host time to queue it (us); {said}:")
    headers = ["case", "patch", *(f"{name}\nMB" for name in ("exact", "plain", "gf_tvm"))]
    headers += [f"{name}\nhost us" for name in ("exact", "plain", "gf_tvm")]
    if meter["meter"]:
        headers += [f"{name}\nmJ" for name in ("exact", "plain", "gf_tvm")]
    table = []
    for row in rows:
        cells = [label(row), format_patch(row.patch)]
        cells += [_or_dash(row.peak_bytes.get(name), 1e-6) for name in variants]
        cells += [_or_dash(row.host_us.get(name)) for name in variants]
        if meter["meter"]:
            cells += [_or_dash(row.joules.get(name), 1e3) for name in variants]
        table.append(cells)
    print(format_table(headers, table))


def _or_dash(value: float | None, scale: float = 1.0) -> str:
    return "-" if value is None else digits(scale * value)

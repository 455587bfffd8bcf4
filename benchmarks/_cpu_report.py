"""What benchmarks/cpu.py writes and prints: rows with all columns, means per patch, tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from gf_tvm.comparison.rows import CpuRow
from gf_tvm.runners._output import format_table
from gf_tvm.runners._rows import digits
from gf_tvm.shapes import format_patch

#: Times whose quotient with gf_tvm_ms is summed up: name of the mean, column.
_SPEEDUPS = (
    ("speedup", "baseline_ms"),
    ("speedup_reference", "reference_ms"),
    ("speedup_authors", "authors_ms"),
    ("speedup_stock", "stock_ms"),
)
_FRACTIONS = (
    "fraction_of_limit",
    "fraction_of_limit_best",
    "kernel_fraction_of_limit",
    "kernel_fraction_of_limit_best",
)

_QUOTIENTS = (*_FRACTIONS, "filter_input_fraction_of_limit", "default_of_tuned", "default_filter_input_of_tuned")

#: Columns of further implementations; null where one was not timed.
OTHERS = ("authors", "default", "stock")

#: What the columns mean that ``gf-tvm compare`` does not have.
COLUMNS = {
    "authors_ms": "the published formulation in plain PyTorch operators (benchmarks/_authors.py); null where undefined",
    "default_ms": "the default schedule of the same space, as an untuned workload gets it",
    "stock_ms": "the same definition, scheduled by stock MetaSchedule's space and search",
    "default_of_tuned": "gf_tvm_ms / default_ms: how much of the tuned kernel's speed the untuned one has",
    "default_filter_input_of_tuned": "likewise of the pooling",
    "stock_filter_input_ms, default_filter_input_ms": "the pooling of the forward pass, likewise",
    "extra_bytes": "peak of resident memory during a kernel's first call in a new process, beyond what its inputs and "
    "outputs and the process held before; extra_of_grad_y: as part of grad_y's bytes",
}


def plain_row(row: CpuRow) -> dict[str, Any]:
    """A row for JSON, with the further implementations as columns of their own as well."""
    found = asdict(row)
    for name in OTHERS:
        other = row.others.get(name, {})
        for column in ("ms", "ms_quartiles", "filter_input_ms", "filter_input_ms_quartiles"):
            found[f"{name}_{column}"] = other.get(column)
    for name, column in (("default_of_tuned", "ms"), ("default_filter_input_of_tuned", "filter_input_ms")):
        tuned, default = found["gf_tvm_ms" if column == "ms" else column], found[f"default_{column}"]
        found[name] = tuned / default if default else None
    return found


def with_memory(row: dict[str, Any], memory: dict[str, Any]) -> dict[str, Any]:
    """A row with what :func:`_cpu_memory.extra_bytes` found."""
    grad_y = row["grad_y_bytes"]
    extra = memory["extra_bytes"]
    return {
        **row,
        "extra_bytes": extra,
        "extra_of_grad_y": None if extra is None else extra / grad_y,
        "memory": memory,
    }


def summarize(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per patch: geometric means of the quotients, over the rows that have them, and the worst row of each."""
    by_patch: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for row in rows:
        by_patch.setdefault(tuple(row["patch"]), []).append(row)
    found = []
    for patch, group in by_patch.items():
        quotients = {
            name: [(row[column] / row["gf_tvm_ms"], row["name"]) for row in group if row[column]]
            for name, column in _SPEEDUPS
        }
        for name in _QUOTIENTS:
            quotients[name] = [(row[name], row["name"]) for row in group if row[name] is not None]
        summary: dict[str, Any] = {"patch": patch, "rows": len(group)}
        for name, values in quotients.items():
            worst = min(values, default=None)
            summary[name] = statistics.geometric_mean(value for value, _ in values) if values else None
            summary[f"{name}_worst"] = None if worst is None else {"name": worst[1], "value": worst[0]}
        found.append(summary)
    return found


#: What a limit is made of.
_LIMITS = {"bandwidth": "copy", "arithmetic": "sgemm"}


def print_rows(document: dict[str, Any]) -> None:
    """The table of the cases, and the means."""
    print(
        f"{document['machine']['cpu']}, threads: {document['threads']}, best of all rounds: copying "
        f"{document['bandwidth_gbs']:.1f} GB/s, sgemm {document['peak_gflops']:.0f} GFLOP/s"
    )
    print(
        "Backward pass, medians in ms. plain: gradient filtering by PyTorch operators; authors: as published; stock: "
        "MetaSchedule's\nown search; default: untuned; kernel: gf_tvm into existing outputs; limit: of the row's own "
        "rounds, median over median.\npool x: the forward pass's pooling by gf_tvm."
    )
    headers = (
        *("case", "patch", "exact", "plain", "authors", "stock", "default", "gf_tvm", "kernel", "limit"),
        *("exact /\ngf_tvm", "plain /\ngf_tvm", "limit /\ngf_tvm", "limit /\nkernel", "default's\nspeed", "pool x"),
        *("limit /\npool x", "extra\nMB", "schedule"),
    )
    print(format_table(headers, [_cells(row) for row in document["rows"]]))
    for summary in document["summary"]:
        print(_sentence(summary))
    _doubt(document["conditions"]["other_cores"])


def _cells(row: dict[str, Any]) -> Sequence[object]:
    columns = ("baseline_ms", "reference_ms", "authors_ms", "stock_ms", "default_ms", "gf_tvm_ms", "gf_tvm_kernel_ms")
    extra = row.get("extra_bytes")
    return (
        row["name"],
        format_patch(row["patch"]),
        *(None if row[column] is None else digits(row[column]) for column in columns),
        f"{digits(row['limit_ms'])} {_LIMITS[row['limit']]}",
        f"{row['baseline_ms'] / row['gf_tvm_ms']:.1f}",
        f"{row['reference_ms'] / row['gf_tvm_ms']:.2f}",
        *(_percent(row[name]) for name in ("fraction_of_limit", "kernel_fraction_of_limit", "default_of_tuned")),
        digits(row["filter_input_ms"]),
        _percent(row["filter_input_fraction_of_limit"]),
        None if extra is None else digits(extra / 1e6),
        row["schedule"],
    )


def _doubt(other_cores: float | None) -> None:
    if other_cores is not None and other_cores > 0.1:
        print(f"Doubtful: other programs kept {other_cores:.1f} cores busy meanwhile; measure on an idle machine")


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.0%}"


def _sentence(summary: dict[str, Any]) -> str:
    parts = []
    for name, text in (
        ("speedup", "{:.1f} x exact"),
        ("speedup_reference", "{:.2f} x plain"),
        ("speedup_authors", "{:.2f} x authors"),
        ("speedup_stock", "{:.2f} x stock"),
        ("fraction_of_limit", "{:.0%} of the limit"),
        ("kernel_fraction_of_limit", "kernel alone {:.0%}"),
        ("default_of_tuned", "untuned {:.0%} of tuned"),
        ("filter_input_fraction_of_limit", "pooling of x {:.0%} of copy speed"),
        ("default_filter_input_of_tuned", "pooling of x untuned {:.0%} of tuned"),
    ):
        if summary[name] is not None:
            worst = summary[f"{name}_worst"]
            number = text[text.index("{") : text.index("}") + 1].format(worst["value"])
            parts.append(f"{text.format(summary[name])} (worst {number}: {worst['name']})")
    mean = f"geometric mean of {summary['rows']} {format_patch(summary['patch'])} rows"
    return f"{mean}:\n  " + "\n  ".join(parts)


def print_step(step: dict[str, Any]) -> None:
    """The times of a training step, and how its gain compares with the kernels' own."""
    shape = "x".join(map(str, step["input"]))
    patch = format_patch(tuple(step["patch"]))
    print(f"Training step of {step['model']}, input {shape}, {len(step['filtered'])} convolutions filtered, {patch}:")
    rows = [
        (name, *(digits(figures[column]) for column in ("ms", "forward_ms", "backward_ms", "update_ms")))
        for name, figures in step["steps"].items()
    ]
    print(format_table(("filtered by", "step ms", "forward", "backward", "update"), rows))
    for name, gains in step["gains"].items():
        ratio = gains["ratio"]
        print(
            f"{name}: a step gains {digits(gains['gain_in_step']['ms'])} ms, its kernels alone "
            f"{digits(gains['gain_of_kernels']['ms'])} ms" + ("" if ratio is None else f": ratio {ratio:.2f}")
        )
    _doubt(step["other_cores"])

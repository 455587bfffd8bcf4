"""Convolution by convolution and chain by chain: how much faster, how much less memory, how near to the limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..comparison.plot import KERNEL_COLOR, PLAIN_COLOR, Bar, speedup_figure
from ..shapes.cases import format_patch
from . import exhibits
from .exhibits import Column, Exhibit, Section, Table
from .roofline import intensity, limits, roofline_figure, speed
from .sources import Source


def section(source: Source) -> Section:
    """The figures of one file of ``gf-tvm compare``."""
    document = source.document
    rows, chains = document["rows"], document["chains"]
    conditions = tuple(_conditions(source))
    basis = exhibits.basis_of(document["machine"])
    paragraphs = []
    other = document["conditions"].get("other_cores")
    if isinstance(other, int | float) and other > 0.1:
        paragraphs.append(
            f"Doubtful: other programs kept {other:.1f} cores busy meanwhile; read the times as ratios, or measure on "
            "an idle machine."
        )
    machine = dict(conditions)["Machine"].partition(",")[0]
    made: list[Exhibit] = []
    if rows:
        made += [
            _speed(rows, conditions, f"{basis}; the limit is estimated"),
            _memory(rows, conditions),
            _roofline(document, tuple(_conditions(source, medians=True)), f"{basis}; operations and bytes are counted"),
        ]
    if chains:
        how = document["conditions"].get("chains")
        own = (*conditions, ("Chains", how)) if isinstance(how, str) else conditions
        made += [_chain_speed(chains, own, f"{basis}; the limit is estimated"), _chain_memory(chains, own, basis)]
    what = " and ".join([*(["single convolutions"] if rows else []), *(["chains"] if chains else [])])
    return Section(
        f"Backward pass of {what}: {machine}, threads: {document['threads']}",
        tuple(made),
        tuple(paragraphs),
    )


def _conditions(source: Source, medians: bool = False) -> list[tuple[str, str]]:
    """``medians``: the limits that the roofline is drawn with; else the best that were seen, of ``roofline_ms``."""
    document = source.document
    found = exhibits.conditions_of([source], document)
    peak, bandwidth = limits(document) if medians else (document["peak_gflops"], document["bandwidth_gbs"])
    found.append(("Limits", f"{bandwidth:.1f} GB/s copying, {peak:.0f} GFLOP/s sgemm"))
    for name, title in (("date", "Date"), ("statistic", "Times"), ("outputs", "Outputs"), ("gradients", "Gradients")):
        value = document["conditions"].get(name)
        if isinstance(value, str):
            found.append((title, value))
    return found


def _label(row: Mapping[str, Any]) -> str:
    return str(row["name"]) if row["dtype"] == "float32" else f"{row['name']} {row['dtype']}"


def _speed(rows: Sequence[Mapping[str, Any]], conditions: tuple[tuple[str, str], ...], basis: str) -> Exhibit:
    panels: dict[str, list[Bar]] = {}
    cells = []
    for row in rows:
        exact, plain, own, limit = (row[f"{name}_ms"] for name in ("baseline", "reference", "gf_tvm", "roofline"))
        patch = format_patch(tuple(row["patch"]))
        panels.setdefault(patch, []).append(Bar(_label(row), exact / plain, exact / own, exact / limit))
        cells.append(
            (
                *(_label(row), patch, exact, plain, own, limit, exact / plain, exact / own),
                *(row["schedule"], row["max_rel_error"]),
            )
        )
    baselines = ", ".join(dict.fromkeys(row["baseline"] for row in rows))
    columns = (
        *(
            Column("convolution"),
            Column("patch"),
            Column("exact ms", exhibits.digits),
            Column("plain ms", exhibits.digits),
        ),
        *(Column("gf_tvm ms", exhibits.digits), Column("limit ms", exhibits.digits)),
        *(Column("speedup of plain", exhibits.times), Column("speedup of gf_tvm", exhibits.times), Column("schedule")),
        Column("error", lambda value: f"{value:.0e}"),
    )
    return Exhibit(
        "speedup",
        "Speed",
        f"Speedup of gradient filtering over the exact backward pass ({baselines}): with plain PyTorch "
        "operators and with gf_tvm's kernels. The mark is what the machine's bandwidth and arithmetic would allow.",
        speedup_figure(panels, narrow=True),
        Table(columns, tuple(cells)),
        conditions,
        basis,
    )


def _memory(rows: Sequence[Mapping[str, Any]], conditions: tuple[tuple[str, str], ...]) -> Exhibit:
    labels = list(dict.fromkeys(_label(row) for row in rows))
    patches = list(dict.fromkeys(format_patch(tuple(row["patch"])) for row in rows))
    exact: dict[str, float] = {}
    filtered: dict[tuple[str, str], float] = {}
    cells = []
    for row in rows:
        label, patch = _label(row), format_patch(tuple(row["patch"]))
        exact[label], filtered[label, patch] = row["saved_bytes_baseline"], row["saved_bytes_gf_tvm"]
        cells.append((label, patch, exact[label], filtered[label, patch], exact[label] / filtered[label, patch]))
    series: dict[str, tuple[str, Sequence[float | None]]] = {
        "exact": (exhibits.EXACT_COLOR, [exact[label] / 1e6 for label in labels])
    }
    for color, patch in zip(_cycle(len(patches)), patches, strict=True):
        values = [filtered.get((label, patch)) for label in labels]
        series[f"{patch} (plain and gf_tvm)"] = (color, [None if v is None else v / 1e6 for v in values])
    figure = exhibits.figure(1.3 + len(labels) * (0.18 + 0.17 * len(series)))
    axes = figure.subplots()
    exhibits.horizontal_bars(axes, labels, series, exhibits.digits)
    axes.set_xlabel("memory saved for backward, MB")
    figure.legend(loc="outside lower center", ncols=min(3, len(series)), frameon=False, fontsize=8)
    columns = (
        *(Column("convolution"), Column("patch"), Column("exact MB", exhibits.megabytes)),
        *(Column("filtered MB", exhibits.megabytes), Column("exact / filtered", exhibits.times)),
    )
    return Exhibit(
        "memory",
        "Memory",
        "The part of a convolution's input that autograd saves for backward: all of x, or one sum per "
        "patch. Megabytes of 1e6 bytes; the weights, which both save, are not counted.",
        figure,
        Table(columns, tuple(cells)),
        conditions,
        "counted from the shapes of the tensors",
    )


def _chain_label(row: Mapping[str, Any]) -> str:
    """In two lines, because names of layers are long."""
    return _label(row).replace(" to ", "\nto ")


def _chain_speed(chains: Sequence[Mapping[str, Any]], conditions: exhibits.Conditions, basis: str) -> Exhibit:
    panels: dict[str, list[Bar]] = {}
    cells = []
    for row in chains:
        (exact, filtered, chained), limit = _of_variants(row, "backward_ms"), row["roofline_ms"]
        patch = format_patch(tuple(row["patch"]))
        panels.setdefault(patch, []).append(Bar(_chain_label(row), exact / filtered, exact / chained, exact / limit))
        cells.append(
            (
                *(_label(row), len(row["convolutions"]), patch, exact, filtered, chained, limit),
                *(exact / chained, filtered / chained, *_of_variants(row, "forward_ms")),
                *(row["schedule"], row["max_rel_error"]),
            )
        )
    columns = (
        *(Column("chain"), Column("convolutions"), Column("patch"), Column("exact ms", exhibits.digits)),
        *(
            Column("filtered ms", exhibits.digits),
            Column("chained ms", exhibits.digits),
            Column("limit ms", exhibits.digits),
        ),
        *(Column("exact / chained", exhibits.times), Column("filtered / chained", exhibits.times)),
        *(Column(f"{variant} forward ms", exhibits.digits) for variant in ("exact", "filtered", "chained")),
        *(Column("schedule"), Column("error", lambda value: f"{value:.0e}")),
    )
    return Exhibit(
        "chain-speedup",
        "Speed of chains",
        "Speedup over exact of the backward pass of several convolutions and the batch norms and activations between "
        "them: filtered layer by layer, and in a chain whose gradients stay on the patch grid. "
        "The mark is what the machine would allow a chain. The forward passes, in which a chain does more work, are "
        "in the table.",
        speedup_figure(panels, narrow=True, series=("filtered layer by layer", "chained")),
        Table(columns, tuple(cells)),
        conditions,
        basis,
    )


def _chain_memory(chains: Sequence[Mapping[str, Any]], conditions: exhibits.Conditions, basis: str) -> Exhibit:
    several = len({tuple(row["patch"]) for row in chains}) > 1
    labels = [
        f"{_chain_label(row)}, {format_patch(tuple(row['patch']))}" if several else _chain_label(row) for row in chains
    ]
    kept = [_of_variants(row, "kept_bytes") for row in chains]
    colors = {"exact": exhibits.EXACT_COLOR, "filtered layer by layer": PLAIN_COLOR, "chained": KERNEL_COLOR}
    series: dict[str, tuple[str, Sequence[float | None]]] = {
        name: (color, [sizes[index] / 1e6 for sizes in kept]) for index, (name, color) in enumerate(colors.items())
    }
    figure = exhibits.figure(1.2 + 0.62 * len(labels))
    axes = figure.subplots()
    exhibits.horizontal_bars(axes, labels, series, exhibits.digits)
    axes.set_xlabel("memory saved for backward, MB")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    columns = (
        *(Column("chain"), Column("patch"), Column("exact MB", exhibits.megabytes)),
        *(Column("filtered MB", exhibits.megabytes), Column("chained MB", exhibits.megabytes)),
        Column("exact / chained", exhibits.times),
    )
    cells = [
        (_label(row), format_patch(tuple(row["patch"])), *sizes, sizes[0] / sizes[2])
        for row, sizes in zip(chains, kept, strict=True)
    ]
    return Exhibit(
        "chain-memory",
        "Memory of chains",
        "All memory that autograd saves for backward in a chain's operations, including batch norms and "
        "activations, without parameters. Megabytes of 1e6 bytes.",
        figure,
        Table(columns, tuple(cells)),
        conditions,
        basis,
    )


def _of_variants(row: Mapping[str, Any], name: str) -> tuple[Any, Any, Any]:
    values = row[name]
    return values["exact"], values["filtered"], values["chained"]


def _cycle(count: int) -> list[str]:
    colors = [color for color in exhibits.COLORS if color != exhibits.EXACT_COLOR]
    return [colors[index % len(colors)] for index in range(count)]


def _roofline(document: Mapping[str, Any], conditions: tuple[tuple[str, str], ...], basis: str) -> Exhibit:
    cells = [
        (
            *(_label(row), format_patch(tuple(row["patch"])), row["operations"], row["moved_bytes"], intensity(row)),
            *(speed(row, "reference_ms"), speed(row, "gf_tvm_ms")),
            None if row.get("gf_tvm_kernel_ms") is None else speed(row, "gf_tvm_kernel_ms"),
            row["roofline_ms"] / row["gf_tvm_ms"],
        )
        for row in document["rows"]
    ]
    columns = (
        *(Column("convolution"), Column("patch"), Column("GFLOP", exhibits.giga)),
        *(Column("MB moved", exhibits.megabytes), Column("FLOP / byte", exhibits.digits)),
        *(Column("plain GFLOP/s", exhibits.digits), Column("gf_tvm GFLOP/s", exhibits.digits)),
        Column("into existing outputs GFLOP/s", exhibits.digits),
        Column("share of the limit %", lambda value: f"{100 * value:.0f}"),
    )
    return Exhibit(
        "roofline",
        "Roofline",
        "Operations per second over operations per byte that must be moved. No point can lie above the lines, "
        "which are the machine's copy bandwidth and its fastest matrix product, except where its data lay in caches.",
        roofline_figure(document, stacked=True),
        Table(columns, tuple(cells)),
        conditions,
        basis,
    )

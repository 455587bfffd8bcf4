"""The table of whole training steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._output import format_table
from ._rows import digits

if TYPE_CHECKING:
    from ..comparison.steps import StepRow

HEADERS = (
    *("model", "input", "convs", "patch", "variant", "forward", "backward", "update", "step"),
    *("limit", "over exact", "over compiled", "saved MB", "peak MB"),
)


def step_cells(rows: Sequence[StepRow]) -> list[tuple[object, ...]]:
    """A line for each row and variant, and for each forward pass by another program; None: not measured.

    Exact variants do not depend on the patch, and have one line for all rows of a model.
    """
    from ..shapes import format_patch

    cells: list[tuple[object, ...]] = []
    seen: set[tuple[object, ...]] = set()
    for row in rows:
        case = (row.name, "x".join(map(str, row.input)), len(row.convolutions))
        bases = [row.step_ms.get(variant) for variant in ("exact", "compiled")]
        for variant, step in row.step_ms.items():
            exact = variant in ("exact", "compiled")
            if exact and (*case, variant) in seen:
                continue
            seen.add((*case, variant))
            limit, peak = row.limit_ms[variant], row.peak_bytes[variant]
            cells.append(
                (
                    *case,
                    None if exact else format_patch(row.patch),
                    variant,
                    *(digits(part[variant]) for part in (row.forward_ms, row.backward_ms, row.update_ms)),
                    digits(step),
                    digits(limit["forward"] + limit["backward"]),
                    *(None if base is None else f"{base / step:.2f}x" for base in bases),
                    digits(row.kept_bytes[variant] / 1e6),
                    None if peak is None else digits(peak / 1e6),
                )
            )
        for program, forward in row.forward_only_ms.items():
            if (*case, program) not in seen:
                seen.add((*case, program))
                cells.append((*case, None, program, digits(forward), *([None] * 8)))
    return cells


def print_steps(rows: Sequence[StepRow]) -> None:
    """The table, and what could not be measured."""
    print(
        "Whole training steps, medians in ms; limit: forward and backward pass at this machine's rates, operator by "
        "operator; saved: for the backward pass; peak: of the process above its start, compiling included."
    )
    print(format_table(HEADERS, step_cells(rows)))
    for what, reason in {key: value for row in rows for key, value in row.unmeasured.items()}.items():
        print(f"not measured: {what}: {reason}")

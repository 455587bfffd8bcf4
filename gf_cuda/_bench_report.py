"""What ``python3 -m gf_cuda bench`` makes of its measurements: limits, means, the table."""

import math
from typing import Any, Dict, List, Sequence, Tuple

from .bundle import Kernel


def limits(row: Dict[str, Any], kernel: Kernel, peak_gflops: float, bandwidth_gbs: float) -> Dict[str, Any]:
    """The shortest times (ms) that the limits allow; counted as ``gf_tvm.comparison.limits`` does."""
    at = kernel.convolution
    # Once each: grad_y, x~ and W read, grad_x and grad_W written.
    moved = sum(argument.nbytes for argument in kernel.program.arguments if argument.name != "grad_b")
    saved = row["saved_bytes_gf_tvm"] // 4 // at.ci  # patches of the batch
    product = 2 * saved * at.co * at.ci // at.groups
    dilated = all(d >= r and d > 1 for d, r in zip(at.dilation, at.patch))
    operations = product * (1 + (at.kernel[0] * at.kernel[1] if dilated else 1))
    times = {"bandwidth": moved / bandwidth_gbs / 1e6, "arithmetic": operations / peak_gflops / 1e6}
    limit = max(times, key=lambda name: times[name])
    pooled = (row["saved_bytes_baseline"] + row["saved_bytes_gf_tvm"]) / bandwidth_gbs / 1e6
    return {
        "roofline_ms": times[limit],
        "roofline": limit,
        "limit_ms": times[limit],
        "limit": limit,
        "fraction_of_limit": times[limit] / row["gf_tvm_ms"],
        "operations": operations,
        "moved_bytes": moved,
        "filter_input_roofline_ms": pooled,
    }


def geometric_means(rows: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Of the speed-ups and of the fraction of the limit, per patch; if there are several dtypes, also per dtype."""
    groups: Dict[Tuple[Any, str], List[Dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["patch"], row["dtype"]), []).append(row)
    several = len({row["dtype"] for row in rows}) > 1
    means = []
    for (patch, dtype), group in groups.items():
        mean: Dict[str, Any] = {"patch": patch, "rows": len(group), "speedup_reference": None}
        if several:
            mean["dtype"] = dtype
        for name, over in (("speedup", "baseline_ms"), ("limit_fraction", "roofline_ms")):
            mean[name] = math.exp(sum(math.log(row[over] / row["gf_tvm_ms"]) for row in group) / len(group))
        means.append(mean)
    return means


def show(document: Dict[str, Any]) -> None:
    """Print a table, and what has to be said about it."""
    gpu, meter = document["machine"]["gpu"], document["conditions"]["energy"]
    print(
        "{}, copying: {:.1f} GB/s, sgemm: {:.0f} GFLOP/s".format(
            gpu["name"], document["bandwidth_gbs"], document["peak_gflops"]
        )
    )
    headers = ["convolution", "patch", "dtype", "exact ms", "gf_tvm ms", "limit ms", "faster", "of limit", "schedule"]
    if meter["meter"]:
        headers += ["exact mJ", "gf_tvm mJ"]
    lines = [headers]
    for row in document["rows"]:
        line = [row["name"], "{}x{}".format(*row["patch"]), row["dtype"]]
        line += [f"{row[name]:.3g}" for name in ("baseline_ms", "gf_tvm_ms", "roofline_ms")]
        line += ["{:.1f}x".format(row["baseline_ms"] / row["gf_tvm_ms"])]
        line += ["{:.0%}".format(row["roofline_ms"] / row["gf_tvm_ms"]), row["schedule"]]
        if meter["meter"]:
            line += ["{:.3g}".format(1e3 * row["joules"][name]) for name in ("baseline", "gf_tvm")]
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    if meter["meter"]:
        print("Energy of a call above idle ({:.2f} W), by {}.".format(meter["idle_watts"], meter["meter"]))
    else:
        print("Energy: not measured ({}).".format(meter["reason"]))
    if document["conditions"]["advice"]:
        print("Doubtful: {}".format(document["conditions"]["advice"]))

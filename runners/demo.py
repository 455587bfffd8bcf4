"""Everything on this machine, in the commands a user would type: tune, build, train, compare; then one picture.

Run by ``make demo``, or ``python -m gf_tvm.runners.demo --out FOLDER``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from . import cli
from ._output import check_writable, format_table

# A narrow ResNet-18 on small images: trained in seconds, and the maps of its last convolutions, 8 x 8, are still
# large enough for patches of 4.
MODEL, LAST, BATCH, IMAGE = "resnet18_025", 4, 32, 16
PATCHES = "2,4"
PROTOCOL = ["--pretrain-epochs", "10", "--epochs", "20", "--lr", "0.05", "--pretrain-lr", "0.05", "--seed", "2"]


def _steps(out: Path, chain: bool) -> dict[str, list[str]]:
    """Command lines by what they show."""
    model = ["--model", MODEL, "--input", f"{BATCH}x3x{IMAGE}x{IMAGE}", "--last", str(LAST)]
    form = [] if chain else ["--no-chain"]
    logs, bundle = str(out / "logs"), str(out / "demo.gfb")
    tune = ["tune", "--device", "host", *model, "--patch", "4"]
    tune += [*form, "--kernels", "weight_grad" if chain else "backward_weight"]
    train = ["train", "--protocol", "paper", "--model", MODEL, "--data", "digits", "--last", str(LAST)]
    train += ["--batch", str(BATCH)]
    train += ["--image-size", str(IMAGE), *PROTOCOL, "--library", bundle, "--checkpoint", str(out / "checkpoints")]
    return {
        "Tune one kernel here; the others have shipped logs or default schedules": [
            *tune, "--trials", "12", "--minutes", "1", "--logs", logs,
        ],
        "Build the network's kernels": [
            "build", "--device", "host", *model, *form, "--patch", PATCHES, "--logs", logs, "--out", bundle,
        ],
        "Fine-tune on images of handwritten digits": [
            *train, *form, "--patch", f"exact,{PATCHES}", "--json", str(out / "train.json"),
        ],
        f"Compare the network's convolutions{' and their chain' if chain else ''}": [
            "compare", "--device", "host", *model, *form, "--patch", PATCHES, "--library", bundle, "--seconds", "1",
            "--json", str(out / "compare_model.json"),
        ],
        "Compare the paper's convolutions (the smaller four)": [
            "compare", "--device", "host", "--shapes", "paper", "--cases", "4-7", "--patch", PATCHES, "--seconds", "2",
            "--logs", logs, "--json", str(out / "compare_paper.json"),
        ],
    }  # fmt: skip


def run(out: Path, chain: bool = True) -> int:
    """Run the steps, with chains or without; results and the picture go to the folder ``out``.

    Returns the exit code of the first failure.
    """
    out.mkdir(parents=True, exist_ok=True)
    picture = out / "demo.png"
    check_writable(picture)
    started = time.monotonic()
    for number, (title, command) in enumerate(_steps(out, chain).items(), start=1):
        print(f"\n=== {number}. {title}\n$ {shlex.join(['gf-tvm', *command])}", flush=True)
        if code := cli.main(command):
            return code
    runs = json.loads((out / "train.json").read_text())["runs"]
    rows = [
        row
        for name in ("compare_model.json", "compare_paper.json")
        for row in json.loads((out / name).read_text())["rows"]
    ]
    print("\n=== Results")
    _print_summary(runs, rows)
    _draw(runs, rows, picture)
    print(f"\nPicture: {picture}    All results: {out}    {time.monotonic() - started:.0f} s")
    return 0


def _print_summary(runs: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    exact = runs[0]
    table: list[tuple[object, ...]] = []
    for entry in runs:
        step, last = entry["step_ms"], entry["rows"][-1]
        table.append(
            (
                entry["variant"],
                f"{100 * entry['test_accuracy']:.1f}",
                f"{100 * (entry['test_accuracy'] - exact['test_accuracy']):+.1f}",
                f"{step['backward']:.1f}",
                f"{exact['step_ms']['backward'] / step['backward']:.1f}x",
                f"{last['kept_bytes_convolutions'] / 1e6:.2f}",
                f"{last['kept_bytes'] / 1e6:.2f}",
            )
        )
    headers = ["backward", "accuracy %", "points vs exact", "backward ms per step", "speedup"]
    print(format_table([*headers, "saved by convolutions or chains MB", "memory saved for backward MB"], table))
    table = [
        (
            row["name"],
            f"R{row['patch'][0]}",
            row["baseline_ms"],
            row["gf_tvm_ms"],
            f"{row['baseline_ms'] / row['gf_tvm_ms']:.1f}x",
            f"{row['reference_ms'] / row['gf_tvm_ms']:.1f}x",
            row["schedule"],
        )
        for row in rows
    ]
    headers = [
        "convolution",
        "patch",
        "exact ms",
        "gf_tvm ms",
        "speedup over exact",
        "speedup over plain PyTorch",
        "schedule",
    ]
    print()
    print(format_table(headers, table))


def _draw(runs: list[dict[str, Any]], rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9.5), layout="constrained")
    panels: dict[str, Any] = figure.subplot_mosaic([["accuracy", "speed"], ["step", "speed"], ["kept", "speed"]])
    accuracy, step, kept, speed = panels["accuracy"], panels["step"], panels["kept"], panels["speed"]
    names = [entry["variant"].replace(" ", "\n") for entry in runs]
    colors = ["#999999", "#0072B2", "#56B4E9", "#0072B2", "#56B4E9"]

    values = [100 * entry["test_accuracy"] for entry in runs]
    bars = accuracy.bar(names, values, color=colors[: len(names)])
    accuracy.bar_label(bars, fmt="%.1f")
    before = 100 * runs[0]["initial_test_accuracy"]
    accuracy.axhline(before, color="black", linestyle=":")
    accuracy.set(ylim=(0, 110), title=f"Accuracy after fine-tuning, % (dotted: before, {before:.1f})")

    bottom = [0.0] * len(runs)
    for phase, color in (("forward", "#009E73"), ("backward", "#D55E00"), ("update", "#F0E442")):
        values = [entry["step_ms"][phase] for entry in runs]
        step.bar(names, values, bottom=bottom, color=color, label=phase)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    step.set_title("One training step, ms")
    step.margins(y=0.25)  # room for the legend
    step.legend(loc="upper right", ncols=3, frameon=False)

    bars = kept.bar(names, [entry["rows"][-1]["kept_bytes"] / 1e6 for entry in runs], color=colors[: len(names)])
    kept.bar_label(bars, fmt="%.2g")
    kept.margins(y=0.15)
    kept.set_title("Memory saved for backward, MB")

    labels = [f"{row['name']}  R{row['patch'][0]}" for row in rows]
    for shift, key, color, label in (
        (-0.2, "reference_ms", "#999999", "plain PyTorch operators"),
        (0.2, "gf_tvm_ms", "#0072B2", "gf_tvm"),
    ):
        speedups = [row["baseline_ms"] / row[key] for row in rows]
        at = [k + shift for k in range(len(rows))]
        speed.barh(at, speedups, 0.38, color=color, label=f"filtered, {label}")
    speed.axvline(1, color="black", linewidth=0.8)
    speed.set_xscale("log")
    speed.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    speed.set_yticks(range(len(rows)), labels)
    speed.invert_yaxis()
    speed.set_title("Backward pass of one convolution:\nspeedup over exact")
    speed.legend(loc="lower center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)
    for axes in (accuracy, step, kept, speed):
        axes.spines[["top", "right"]].set_visible(False)
    machine = runs[0]["machine"]
    figure.suptitle(f"Measured on {machine.get('cpu', 'this machine')}, {runs[0]['threads']} threads", fontsize=11)
    figure.savefig(path, dpi=130)


def main() -> int:
    """Entry point of ``python -m gf_tvm.runners.demo``."""
    parser = argparse.ArgumentParser(prog="gf_tvm.runners.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/demo"), metavar="FOLDER", help="default: build/demo")
    parser.add_argument("--no-chain", action="store_true", help="filter each convolution by itself, as in the paper")
    args = parser.parse_args()
    return run(args.out, not args.no_chain)


if __name__ == "__main__":
    sys.exit(main())

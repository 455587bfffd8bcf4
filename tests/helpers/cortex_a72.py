"""What can be said of code for a Cortex-A72 without one: its innermost loops, and llvm-mca's estimate of them."""

from __future__ import annotations

import re
import subprocess
from typing import Any

#: Fewest products of a loop that counts as one that does the work.
_HOT = 24


def hot_loops(module: Any) -> list[list[str]]:
    """The innermost loops of a compiled module (:func:`gf_tvm.codegen.compile.compile_module`) with many products."""
    loops, body, label = [], [], ""
    for line in module.inspect_source("asm").splitlines():
        if found := re.match(r"(\.L\w+):", line):
            label, body = found[1], []
        elif re.match(r"\s+[a-z]", line):
            body.append(line.split("//")[0].strip())
            if label and re.search(rf"\s{re.escape(label)}$", body[-1]):
                loops.append(body)
                label, body = "", []
    return [body for body in loops if sum(map(multiplies, body)) >= _HOT]


def multiplies(line: str) -> bool:
    """Whether an instruction is a product of vectors that is added to something."""
    return line.startswith("fmla") and ".4s" in line


def products_a_cycle(body: list[str]) -> float:
    """By llvm-mca's model of the core, where one is the most. Needs llvm-mca."""
    command = ["llvm-mca", "-mtriple=aarch64", "-mcpu=cortex-a72", "-iterations=100"]
    done = subprocess.run(command, input="\n".join(body), capture_output=True, text=True, check=True)
    cycles = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    assert cycles
    return sum(map(multiplies, body)) / (int(cycles[1]) / 100)

"""Large tensors that find their memory where the last ones left it."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource, sys
import torch
import gf_tvm

if sys.argv[1] == "keep":
    assert gf_tvm.keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept_when_asked() -> None:
    def second(mode: str) -> int:
        done = subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, text=True, check=True)
        return int(done.stdout)

    # 64 MB: a fault each page without it, be pages 4 KB or 2 MB large.
    assert second("return") >= 32
    assert second("keep") < 16

"""Fingerprints of memory: any change is noticed, on any number of threads and without OpenMP the result is the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gf_tvm.bundle.runtime import fingerprints_of
from gf_tvm.codegen.compile import SOURCES
from gf_tvm.codegen.linker import find_linker
from gf_tvm.machine.profiles import DeviceProfile

#: Of what threads share.
CHUNK = 1 << 18
SIZES = st.one_of(st.integers(1, 300), st.integers(1, 5000), st.integers(CHUNK - 200, 3 * CHUNK))

Of = Callable[..., bytes]


@pytest.fixture(scope="module")
def path(host: DeviceProfile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (source,) = (path for path in SOURCES if path.endswith("fingerprint.c"))
    library = tmp_path_factory.mktemp("fingerprint") / "fingerprint.so"
    subprocess.run([*find_linker(host), "-shared", "-fPIC", "-O2", "-o", library, "-x", "c", source], check=True)
    return library


@pytest.fixture(scope="module")
def of(path: Path) -> Of:
    """The fingerprints of arrays."""
    function = fingerprints_of(path)
    assert function is not None
    return lambda *arrays: function([a.ctypes.data for a in arrays], [a.nbytes for a in arrays])


def memory_of(size: int, start: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size + start, np.uint8)[start:]


@settings(max_examples=150)
@given(size=SIZES, start=st.integers(0, 17), seed=st.integers(0, 10**6), data=st.data())
def test_any_change_is_noticed(of: Of, size: int, start: int, seed: int, data: st.DataObject) -> None:
    memory = memory_of(size, start, seed)
    before, copy = of(memory), memory.copy()
    assert len(before) == 8
    assert of(copy) == before  # wherever it lies
    kind = data.draw(st.sampled_from(["bit", "byte", "swap", "move", "roll", "end"]))
    if kind == "bit":
        at = data.draw(st.integers(0, 8 * size - 1))
        copy[at // 8] ^= 1 << at % 8
    elif kind == "byte":
        copy[data.draw(st.integers(0, size - 1))] ^= data.draw(st.integers(1, 255))
    elif kind in ("swap", "move"):
        # Values, or blocks of them, that change places.
        length = min(size // 2, data.draw(st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128, 256, 4096])))
        a = data.draw(st.integers(0, size - 2 * length))
        b = data.draw(st.integers(a + length, size - length))
        copy[a : a + length], copy[b : b + length] = memory[b : b + length], memory[a : a + length]
    elif kind == "roll":
        copy = np.roll(copy, data.draw(st.integers(1, size)))
    else:
        copy = copy[: data.draw(st.integers(0, size - 1))]
    assert (of(copy) == before) == np.array_equal(memory, copy)


@pytest.mark.parametrize("elements", [3, 1000, CHUNK])
def test_regular_weights(of: Of, elements: int) -> None:
    """What random bytes do not show: numbers of a kind, and changes of all of them at once."""
    numbers = np.random.default_rng(2).standard_normal(elements).astype(np.float32)
    zeros, ones = np.zeros(elements, np.float32), np.ones(elements, np.float32)
    kinds = [
        zeros,
        ones,
        -ones,
        -zeros,
        2 * ones,
        numbers,
        -numbers,
        2 * numbers,
        np.sort(numbers),
        numbers[::-1].copy(),
    ]
    kinds += [np.where(np.arange(elements) % 2, -numbers, numbers), np.nextafter(numbers, np.float32(9))]
    assert len({of(kind) for kind in kinds}) == len(kinds)
    assert of(*kinds) == b"".join(map(of, kinds))


def test_one_value_at_any_place(of: Of) -> None:
    found = set()
    memory = np.zeros(6000, np.float32)
    for at in range(memory.size):
        memory[at] = 1
        found.add(of(memory))
        memory[at] = 0
    assert len(found) == memory.size


def test_nothing_and_little(of: Of) -> None:
    assert of() == b""
    sizes = [of(np.zeros(size, np.uint8)) for size in range(300)]
    assert len(set(sizes)) == 300


#: Prints the fingerprints in a process that has no OpenMP.
ALONE = """
import json, sys
from pathlib import Path
from gf_tvm.bundle.runtime import fingerprints_of
import numpy as np
arrays = [np.random.default_rng(k).integers(0, 256, size, np.uint8) for k, size in enumerate(json.loads(sys.argv[2]))]
found = fingerprints_of(Path(sys.argv[1]))([a.ctypes.data for a in arrays], [a.nbytes for a in arrays])
print("torch" in sys.modules, any("gomp" in line for line in open("/proc/self/maps")), found.hex())
"""


def test_any_number_of_threads(of: Of, path: Path) -> None:
    sizes = [0, 17, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 77, 1000, 9 * CHUNK]
    arrays = [memory_of(size, 0, k) for k, size in enumerate(sizes)]
    before = torch.get_num_threads()
    found = set()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.add(of(*arrays))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1
    command = [sys.executable, "-c", ALONE, str(path), json.dumps(sizes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", found.pop().hex()]

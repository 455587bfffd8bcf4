"""Bundles: what is built loads light and computes right; what is damaged or foreign is refused with one clear line."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import gf_tvm
from gf_tvm.bundle import library
from gf_tvm.bundle.format import LIBRARY, MANIFEST
from gf_tvm.core import verify
from gf_tvm.core.geometry import Geometry
from gf_tvm.core.workload import Workload
from gf_tvm.errors import BuildError, BundleError, GeometryError

GEOMETRY = Geometry(2, 8, 12, 10, 9, 3, 2, padding=1)
WORKLOADS = [Workload(kernel, GEOMETRY) for kernel in ("filter_input", "backward", "backward_weight")]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "small.gfb"
    report = gf_tvm.build(WORKLOADS, "host", out=path)
    assert [kernel.schedule for kernel in report.kernels] == ["default"] * 3
    assert [path] == list(path.parent.iterdir()), "staging files were left behind"
    return path


def test_kernels_compute_what_they_say(bundle: Path) -> None:
    loaded = gf_tvm.load(bundle)
    assert loaded.workloads == tuple(WORKLOADS)
    assert loaded.device_type == "cpu"
    loaded.prepare()  # a CPU's kernels are ready
    for workload in WORKLOADS:
        kernel = loaded.find(workload.kernel, GEOMETRY, "float32")
        assert kernel is not None
        inputs, outputs = verify.random_inputs(workload, 5), verify.poisoned_outputs(workload)
        kernel(*inputs, *outputs)
        assert verify.excess(outputs, verify.expected(workload, inputs)) <= 1
    assert loaded.find("backward", GEOMETRY, "float16") is None
    assert loaded.find("expand", GEOMETRY, "float32") is None


def test_an_unaligned_slice_is_refused(bundle: Path) -> None:
    kernel = gf_tvm.load(bundle).find("backward_weight", GEOMETRY, "float32")
    assert kernel is not None
    workload = WORKLOADS[2]
    grad_y, saved = verify.random_inputs(workload, 0)
    shifted = torch.empty(grad_y.numel() + 1)[1:].view(grad_y.shape).copy_(grad_y)
    with pytest.raises(GeometryError, match="aligned to 64 bytes"):
        kernel(shifted, saved, *verify.poisoned_outputs(workload))


def test_loading_needs_no_compiler(bundle: Path) -> None:
    code = f"""
import sys
import gf_tvm
assert "torch" not in sys.modules, "import gf_tvm loads torch"
library = gf_tvm.load({str(bundle)!r})
heavy = [name for name in sys.modules if name in ("tvm", "xgboost", "sklearn") or "meta_schedule" in name]
assert not heavy, heavy
print(len(library.workloads))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


def test_building_again_gives_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.gfb"
    gf_tvm.build(WORKLOADS, "host", out=again)
    first, second = (json.loads(zipfile.ZipFile(path).read(MANIFEST)) for path in (bundle, again))
    assert first == second


def test_copies_and_pickles_are_the_library_itself(bundle: Path) -> None:
    loaded = gf_tvm.load(bundle)
    assert gf_tvm.load(str(bundle)) is loaded
    assert copy.copy(loaded) is loaded
    assert copy.deepcopy({"a": [loaded]})["a"][0] is loaded
    assert pickle.loads(pickle.dumps(loaded)) is loaded
    assert library.get_library(loaded.digest) is loaded


def test_a_pickle_loads_the_bundle_in_another_process(bundle: Path) -> None:
    data = pickle.dumps(gf_tvm.load(bundle)).hex()
    code = f"import pickle; print(pickle.loads(bytes.fromhex({data!r})).digest)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hashlib.sha256(bundle.read_bytes()).hexdigest()


def test_one_library_called_from_two_threads(bundle: Path) -> None:
    loaded = gf_tvm.load(bundle)
    workload = WORKLOADS[1]
    kernel = loaded.find("backward", GEOMETRY, "float32")
    assert kernel is not None
    errors: list[float] = []

    def work(seed: int) -> None:
        inputs = verify.random_inputs(workload, seed)
        wanted = verify.expected(workload, inputs)
        for _ in range(100):
            outputs = verify.poisoned_outputs(workload)
            kernel(*inputs, *outputs)
            errors.append(verify.excess(outputs, wanted))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 300
    assert max(errors) <= 1


def test_kernels_run_on_the_threads_of_torch(tmp_path: Path) -> None:
    """Not on ones of their own, which would share the cores with OpenMP's spinning workers."""
    workload = Workload("backward", Geometry(8, 32, 32, 28, 28, 3, 2, padding=1))
    gf_tvm.build([workload], "host", out=tmp_path / "one.gfb", shipped=False)
    code = f"""
import os, time
from pathlib import Path
import torch
import gf_tvm
from gf_tvm.core import verify

def busy(call):
    def ticks():
        return {{task.name: sum(map(int, (task / "stat").read_text().rpartition(")")[2].split()[11:13]))
                for task in Path("/proc/self/task").iterdir()}}
    before, end = ticks(), time.monotonic() + 10
    while True:
        for _ in range(50):
            call()
        found = {{task for task, count in ticks().items() if count - before.get(task, 0) >= 5}}
        if len(found) >= 2 or time.monotonic() > end:
            return found

torch.set_num_threads(2)
kernel, = gf_tvm.load({str(tmp_path / "one.gfb")!r})._kernels.values()
tensors = [*verify.random_inputs(kernel.workload, 0), *verify.poisoned_outputs(kernel.workload)]
kernel(*tensors)
ours = busy(lambda: kernel(*tensors))
a = torch.rand(512, 512)
theirs = busy(lambda: torch.mm(a, a))
assert len(ours) == 2, ours
assert ours == theirs, (ours, theirs)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_threads_follow_torch(bundle: Path) -> None:
    import tvm_ffi

    kernel = gf_tvm.load(bundle).find("backward", GEOMETRY, "float32")
    assert kernel is not None
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            kernel(*verify.random_inputs(WORKLOADS[1], 0), *verify.poisoned_outputs(WORKLOADS[1]))
            assert tvm_ffi.get_global_func("runtime.NumThreads")() == count
    finally:
        torch.set_num_threads(before)


def test_the_torch_operator_uses_the_bundle(bundle: Path, recwarn: pytest.WarningsRecorder) -> None:
    loaded = gf_tvm.load(bundle)
    x = torch.randn(GEOMETRY.x_shape, requires_grad=True)
    weight = torch.randn(GEOMETRY.weight_shape, requires_grad=True)
    bias = torch.randn(GEOMETRY.co, requires_grad=True)
    grads = []
    for lib in (loaded, None):
        y = gf_tvm.functional.conv2d(x, weight, bias, padding=1, patch=2, library=lib)
        assert torch.equal(y, F.conv2d(x, weight, bias, padding=1))
        grads.append(torch.autograd.grad(y.square().sum(), (x, weight, bias)))
        if lib is not None:
            assert not recwarn.list, "the bundle has this workload, and still something else ran"
    for with_library, reference in zip(*grads, strict=True):
        torch.testing.assert_close(with_library, reference, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ damaged or foreign


def rewrite(source: Path, target: Path, change: Callable[[dict[str, Any], dict[str, bytes]], None]) -> Path:
    """Copy a bundle, its manifest and entries changed by ``change``, the library's checksum kept right."""
    with zipfile.ZipFile(source) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(entries[MANIFEST])
    change(manifest, entries)
    entries[MANIFEST] = json.dumps(manifest).encode()
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return target


def set_field(**values: Any) -> Callable[[dict[str, Any], dict[str, bytes]], None]:
    return lambda manifest, entries: manifest.update(values)


def other_library(data: bytes) -> Callable[[dict[str, Any], dict[str, bytes]], None]:
    def change(manifest: dict[str, Any], entries: dict[str, bytes]) -> None:
        entries[LIBRARY] = data
        manifest["sha256"] = {LIBRARY: hashlib.sha256(data).hexdigest()}

    return change


def rename_symbol(manifest: dict[str, Any], entries: dict[str, bytes]) -> None:
    manifest["kernels"][0]["symbol"] = "no_such_function"


POISONS: dict[str, tuple[Callable[[dict[str, Any], dict[str, bytes]], None], str]] = {
    "another schema": (set_field(schema=99), "has schema 99, this gf_tvm reads 1"),
    "another architecture": (set_field(arch="riscv64"), "was built for riscv64, this machine is"),
    "a CPU without the instructions": (set_field(cpu_flags=["amx_tile9"]), "lacks: amx_tile9"),
    "another TVM": (set_field(versions={"tvm": "0.19.0"}), "was built with TVM 0.19.0, installed is"),
    "no versions": (set_field(versions=None), "the manifest lacks"),
    "a wrong checksum": (set_field(sha256={LIBRARY: "0" * 64}), "wrong checksum of kernels.so"),
    "a path that leaves the archive": (lambda m, e: e.update({"../evil.so": b"x"}), "would leave the archive"),
    "an absolute path": (lambda m, e: e.update({"/etc/evil": b"x"}), "would leave the archive"),
    "an unknown entry": (lambda m, e: e.update({"extra.txt": b"x"}), "has entries"),
    "no library": (lambda m, e: e.pop(LIBRARY) and None, "has entries"),
    "a library that is none": (other_library(b"not an ELF file"), "the kernels do not load"),
    "a missing symbol": (rename_symbol, "the manifest does not fit its kernels"),
    "kernels that are none": (set_field(kernels=[{"key": 1}]), "the manifest does not fit its kernels"),
}


@pytest.mark.parametrize("poison", POISONS)
def test_a_foreign_bundle_is_refused(bundle: Path, tmp_path: Path, poison: str) -> None:
    change, message = POISONS[poison]
    path = rewrite(bundle, tmp_path / "poisoned.gfb", change)
    with pytest.raises(BundleError) as caught:
        gf_tvm.load(path)
    assert message in str(caught.value)
    assert "poisoned.gfb" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.9, -1])
def test_a_truncated_bundle_is_refused(bundle: Path, tmp_path: Path, keep: float) -> None:
    data = bundle.read_bytes()
    path = tmp_path / "short.gfb"
    path.write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(BundleError, match=r"short.gfb: truncated, damaged or not a gf_tvm bundle"):
        gf_tvm.load(path)


def test_every_flipped_byte_is_noticed_or_harmless(bundle: Path, tmp_path: Path) -> None:
    """A bundle with one byte flipped is refused, or the flip lies in bytes that zip ignores and all loads equal."""
    data, path = bundle.read_bytes(), tmp_path / "flipped.gfb"
    refused = 0
    for position in range(0, len(data), max(1, len(data) // 150)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :])
        try:
            assert gf_tvm.load(path).workloads == tuple(WORKLOADS)
        except BundleError:
            refused += 1
    assert refused > 140


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"cannot read bundle .*: No such file"):
        gf_tvm.load(tmp_path / "none.gfb")
    with pytest.raises(BundleError, match=r"cannot read bundle .*: Is a directory"):
        gf_tvm.load(tmp_path)


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "old.gfb"
    out.write_text("the old one")
    with pytest.raises(BuildError, match="nothing to build"):
        gf_tvm.build([], "host", out=out)

    def fail(*_: object) -> None:
        raise BuildError("linking failed")

    monkeypatch.setattr("gf_tvm.codegen.compile.export", fail)
    with pytest.raises(BuildError, match="linking failed"):
        gf_tvm.build(WORKLOADS[:1], "host", out=out)
    assert out.read_text() == "the old one"
    assert list(tmp_path.iterdir()) == [out]

"""GPU bundles without gf_tvm: what is damaged or foreign is refused, code is loaded once and late, results agree."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import random
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuda_bundles
import emulated_cuda
import pytest
import torch
from torch import Tensor

import gf_cuda
from gf_cuda import BundleError, DriverError, NoDriverError, reference
from gf_cuda.__main__ import main
from gf_cuda.bundle import Bundle, Convolution, Kernel, read
from gf_tvm.core import verify
from gf_tvm.core.geometry import Geometry
from gf_tvm.core.workload import KERNELS, Workload
from gf_tvm.errors import GeometryError

GEOMETRY = Geometry(2, 6, 8, 11, 9, 3, (5, 2), stride=2, groups=2)  # not every pixel of x is in a patch
WORKLOADS = [Workload(kernel, GEOMETRY) for kernel in ("filter_input", "backward", "backward_weight")]
HALF = Workload("backward_input", Geometry(3, 4, 4, 7, 7, 3, 2, padding=1, groups=4), "float16")
AT = Convolution.from_dict(GEOMETRY.to_dict())


@pytest.fixture(autouse=True)
def gpu() -> Iterator[emulated_cuda.Emulated]:
    # A context of its own: what a test patches by the fixture is then undone first, and the environment last.
    with emulated_cuda.environment() as emulated, pytest.MonkeyPatch.context() as patch:
        afresh(patch)
        yield emulated


def afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this process had just begun: no driver, no bundle, nothing said."""
    monkeypatch.setattr("gf_cuda.driver._drivers", {})
    monkeypatch.setattr("gf_cuda.bundle._loaded", {})
    monkeypatch.setattr("gf_cuda.bundle._said", set())


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with emulated_cuda.environment():
        return cuda_bundles.write_bundle(tmp_path_factory.mktemp("bundle") / "nano.gfb", [*WORKLOADS, HALF])


def find(bundle: Bundle, workload: Workload) -> Kernel:
    kernel = bundle.find(workload.kernel, Convolution.from_dict(workload.geometry.to_dict()), workload.dtype)
    assert kernel is not None
    return kernel


def excess(kernel: Kernel, workload: Workload, ordinal: int = 0, seed: int = 1) -> float:
    """Run on CPU tensors, whose memory the emulated GPU shares."""
    inputs, outputs = verify.random_inputs(workload, seed), verify.poisoned_outputs(workload)
    scratch = torch.full((kernel.program.scratch_bytes + 256,), 255, dtype=torch.uint8)
    kernel([t.data_ptr() for t in [*inputs, *outputs]], -(-scratch.data_ptr() // 256) * 256, 0, ordinal)
    return verify.excess(outputs, verify.expected(workload, inputs))


# ------------------------------------------------------------------------------------------------------ loading, once


def test_kernels_are_found_and_right(file: Path) -> None:
    assert not GEOMETRY.covers_input
    bundle = gf_cuda.load(file)
    assert (bundle.device, bundle.arch, len(bundle.kernels)) == ("jetson-nano", "sm_53", 4)
    for workload in (*WORKLOADS, HALF):
        assert excess(find(bundle, workload), workload) <= 1
    assert bundle.find("backward_input", AT, "float32") is None
    assert bundle.find("backward", AT._replace(n=3), "float32") is None
    assert bundle.find("backward", AT, "float16") is None


def test_code_is_loaded_at_its_first_use_and_once(file: Path, gpu: emulated_cuda.Emulated) -> None:
    bundle = gf_cuda.load(file)
    assert "cuModuleLoadDataEx" not in gpu.calls()
    kernel = find(bundle, WORKLOADS[0])
    assert not kernel.is_loaded()
    for _ in range(3):
        excess(kernel, WORKLOADS[0])
    assert gpu.calls().count("cuModuleLoadDataEx") == 1
    assert kernel.is_loaded()
    bundle.prepare()
    assert gpu.calls().count("cuModuleLoadDataEx") == 4
    gpu.forget_calls()
    bundle.prepare()
    excess(kernel, WORKLOADS[0])
    assert set(gpu.calls()) <= {"cuLaunchKernel", "cuCtxGetCurrent", "cuCtxSetCurrent"}


def test_threads_share_what_one_of_them_loads(
    file: Path, gpu: emulated_cuda.Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(*arguments: Any) -> gf_cuda.Executable:
        time.sleep(0.05)  # long enough for the others to come
        return gf_cuda.Executable(*arguments)

    monkeypatch.setattr("gf_cuda.bundle.Executable", slowly)
    kernel = find(gf_cuda.load(file), WORKLOADS[1])
    start = threading.Barrier(6)
    errors: list[float] = []

    def work(seed: int) -> None:
        start.wait()
        errors.extend(excess(kernel, WORKLOADS[1], seed=seed) for _ in range(5))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 30
    assert max(errors) <= 1
    assert gpu.calls().count("cuModuleLoadDataEx") == 1


def test_each_gpu_has_its_own_code(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with emulated_cuda.environment(devices=2) as gpu:
        kernel = find(gf_cuda.load(file), WORKLOADS[1])
        for ordinal in (1, 0, 1):
            assert excess(kernel, WORKLOADS[1], ordinal) <= 1
            assert kernel.prepare(ordinal).device.ordinal == ordinal
        driver = gf_cuda.get_driver()
        driver.device(0).activate()
        chosen = driver.current_context()
        find(gf_cuda.load(file), WORKLOADS[0]).prepare(1)
        assert driver.current_context() == chosen, "another device is current than the one that this thread chose"
        assert gpu.calls().count("cuModuleLoadDataEx") == 3
        with pytest.raises(NoDriverError, match="no CUDA device 2: this machine has 2"):
            kernel.prepare(2)


def test_a_failed_load_is_tried_again(file: Path, gpu: emulated_cuda.Emulated) -> None:
    kernel = find(gf_cuda.load(file), WORKLOADS[0])
    gpu.fault("cuModuleLoadDataEx:1:2")
    with pytest.raises(DriverError, match=r"cuModuleLoadDataEx: CUDA_ERROR_OUT_OF_MEMORY \(2\)"):
        kernel.prepare()
    assert not kernel.is_loaded()
    assert excess(kernel, WORKLOADS[0]) <= 1


def test_copies_and_pickles_are_the_bundle_itself(file: Path) -> None:
    bundle = gf_cuda.load(file)
    assert gf_cuda.load(str(file)) is bundle
    assert copy.deepcopy({"a": [bundle]})["a"][0] is bundle
    assert pickle.loads(pickle.dumps(bundle)) is bundle


def test_a_pickle_finds_its_own_bundle_only(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "moved.gfb"
    path.write_bytes(file.read_bytes())
    pickled = pickle.dumps(gf_cuda.load(path))
    afresh(monkeypatch)
    assert pickle.loads(pickled).digest == gf_cuda.load(path).digest
    afresh(monkeypatch)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"another file"
    with pytest.raises(BundleError, match="is not the bundle that was in use"):
        pickle.loads(pickled)


def test_loading_needs_neither_torch_nor_gf_tvm(file: Path) -> None:
    code = f"""
import sys
import gf_cuda
bundle = gf_cuda.load({str(file)!r})
bundle.prepare()
heavy = [name for name in ("torch", "numpy", "gf_tvm", "tvm", "tvm_ffi") if name in sys.modules]
assert not heavy, heavy
print(len(bundle.kernels))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr


# ------------------------------------------------------------------------------------------------------- another GPU


def test_a_gpu_of_another_generation_needs_a_compiler(file: Path, tmp_path: Path) -> None:
    with emulated_cuda.environment(arch="sm_72", name="Xavier"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("GF_CUDA_NVRTC", str(tmp_path / "libnvrtc.so"))
        with pytest.raises(BundleError) as caught:
            gf_cuda.load(file)
    message = str(caught.value)
    assert "nano.gfb: was built for sm_53" in message
    assert "cannot run on Xavier (sm_72)" in message
    assert "gf-tvm build --device sm_72" in message
    assert "\n" not in message


@pytest.mark.parametrize("arch", ["sm_50", "sm_61"])
def test_source_is_compiled_for_another_gpu_and_it_says_so_once(
    file: Path, caplog: pytest.LogCaptureFixture, arch: str
) -> None:
    with emulated_cuda.environment(arch=arch), caplog.at_level(logging.WARNING, "gf_cuda"):
        bundle = gf_cuda.load(file)
        for workload in WORKLOADS[:2]:
            assert excess(find(bundle, workload), workload) <= 1
    assert len(caplog.messages) == 1
    assert f"nano.gfb was built for sm_53 (machine code of sm_53, the GPU is {arch})" in caplog.messages[0]


@pytest.mark.parametrize(
    ("arch", "kind", "present", "fits"),
    [
        ("sm_53", "cubin", "sm_53", True),
        ("sm_53", "ptx", "sm_90", True),
        ("sm_53", "ptx", "sm_52", False),
        ("sm_52", "cubin", "sm_53", False),  # integrated GPUs have machine code of their own
        ("sm_50", "cubin", "sm_52", True),
        ("sm_52", "cubin", "sm_50", False),
        ("sm_80", "cubin", "sm_86", True),
        ("sm_80", "cubin", "sm_90", False),
        ("sm_100", "cubin", "sm_120", False),
        ("sm_100", "ptx", "sm_120", True),
    ],
)
def test_what_code_runs_where(file: Path, arch: str, kind: str, present: str, fits: bool) -> None:
    kernel = read(file).kernels[0]
    kernel.program.arch, kernel.image_kind = arch, kind
    with emulated_cuda.environment(arch=present):
        why = kernel.misfit(gf_cuda.get_driver().device())
    assert (why is None) == fits
    assert fits or (arch in str(why) and present in str(why))


def test_ptx_is_for_the_driver(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = cuda_bundles.write_bundle(tmp_path / "ptx.gfb", WORKLOADS[:1], arch="sm_50", kind="ptx")
    assert excess(gf_cuda.load(path).kernels[0], WORKLOADS[0]) <= 1
    assert not caplog.messages


@pytest.mark.parametrize("code", [200, 209, 218, 221, 222])
def test_an_image_that_the_driver_refuses_is_made_again(
    file: Path, gpu: emulated_cuda.Emulated, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    """As PTX of CUDA 11.8 by the driver of CUDA 10.2."""
    gpu.fault(f"cuModuleLoadDataEx:1:{code}")
    assert excess(find(gf_cuda.load(file), WORKLOADS[0]), WORKLOADS[0]) <= 1
    assert f"({code})" in caplog.messages[0] or "cannot compile this PTX" in caplog.messages[0]


def test_source_that_does_not_compile_here(file: Path, tmp_path: Path) -> None:
    def spoil(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
        files.update({name: b"no C at all" for name in files if name.endswith(".cu")})

    path = rewrite(file, tmp_path / "bad.gfb", spoil)
    with emulated_cuda.environment(arch="sm_72"):
        kernel = gf_cuda.load(path).kernels[0]
        with pytest.raises(BundleError, match=r"bad.gfb: filter_input .* does not compile for .*sm_72"):
            kernel.prepare()


def test_a_bundle_for_other_gpus_than_the_first(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load asks whether any GPU can run it, check_device whether this one can."""
    monkeypatch.setenv("GF_CUDA_NVRTC", "/nowhere/libnvrtc.so")
    with emulated_cuda.environment(devices=2), pytest.MonkeyPatch.context() as patch:
        patch.setenv("GF_CUDA_NVRTC", "/nowhere/libnvrtc.so")
        gf_cuda.get_driver().device(0).capability = (7, 2)
        bundle = gf_cuda.load(file)
        bundle.check_device(1)
        with pytest.raises(BundleError, match="cannot run on"):
            bundle.check_device(0)


def test_without_a_gpu(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GF_CUDA_DRIVER", "libnone.so.1")
    with pytest.raises(NoDriverError, match="no CUDA driver"):
        gf_cuda.load(file)
    assert len(read(file).kernels) == 4


# ------------------------------------------------------------------------------------------------ damaged or foreign


def rewrite(source: Path, target: Path, change: Callable[[dict[str, Any], dict[str, bytes]], None]) -> Path:
    """Copy a bundle, its manifest and files changed by ``change``, checksums made right unless that sets them."""
    with zipfile.ZipFile(source) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(files.pop("manifest.json"))
    del manifest["sha256"]
    change(manifest, files)
    return cuda_bundles.pack(target, manifest, files)


def set_field(**values: Any) -> Callable[[dict[str, Any], dict[str, bytes]], None]:
    return lambda manifest, files: manifest.update(values)


def set_kernel(**values: Any) -> Callable[[dict[str, Any], dict[str, bytes]], None]:
    return lambda manifest, files: manifest["kernels"][0].update(values)


def change_program(**values: Any) -> Callable[[dict[str, Any], dict[str, bytes]], None]:
    return lambda manifest, files: manifest["kernels"][0]["program"].update(values)


def twice(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    manifest["kernels"].append(manifest["kernels"][0])


def rename(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    files["another.cu"] = files.pop(next(name for name in files if name.endswith(".cu")))


def without_source(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    del files[manifest["kernels"][0]["symbol"] + ".cu"]


def two_images(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    files[manifest["kernels"][0]["symbol"] + ".ptx"] = b""


POISONS: dict[str, tuple[Callable[[dict[str, Any], dict[str, bytes]], None], str]] = {
    "another schema": (set_field(schema=3), "has schema 3 of kind 'cuda', this gf_cuda reads 2"),
    "another kind": (set_field(kind="metal"), "has schema 2 of kind 'metal'"),
    "a CPU bundle": (lambda m, f: (m.update(schema=1), m.pop("kind"))[0], "was built for CPUs (jetson-nano)"),
    "another architecture than its kernels": (set_field(arch="sm_60"), "has kernels of other architectures than sm_60"),
    "no architecture": (lambda m, f: m.pop("arch") and None, "does not fit its kernels (lacks 'arch')"),
    "wrong checksums": (set_field(sha256={}), "its entries are not those that the manifest lists"),
    "a path that leaves the archive": (lambda m, f: f.update({"../evil.so": b"x"}), "would leave the archive"),
    "an absolute path": (lambda m, f: f.update({"/etc/evil": b"x"}), "would leave the archive"),
    "an entry of no kernel": (lambda m, f: f.update({"extra.cu": b"x"}), "entries that belong to no kernel: extra.cu"),
    "an entry by another name": (rename, "does not fit its kernels"),
    "a missing source": (without_source, "has no source, or not one image"),
    "two images": (two_images, "has no source, or not one image"),
    "a kernel twice": (twice, "has a kernel twice"),
    "kernels that are none": (set_field(kernels=[{"key": 1}]), "the manifest does not fit its kernels"),
    "no list of kernels": (set_field(kernels=None), "the manifest does not fit its kernels"),
    "a geometry that is none": (set_kernel(workload={"kernel": "backward", "geometry": {"n": "many"}}), "does not fit"),
    "no settings": (set_kernel(settings={}), "lacks 'covers_input'"),
    "a symbol that is no name": (set_kernel(symbol="../gf"), "is no name"),
    "a program of another schema": (change_program(schema=9), "program of schema 9"),
    "a launch of too many": (change_program(launches=[]), "launches"),
}


@pytest.mark.parametrize("poison", POISONS)
def test_a_foreign_bundle_is_refused(file: Path, tmp_path: Path, poison: str) -> None:
    change, message = POISONS[poison]
    path = rewrite(file, tmp_path / "poisoned.gfb", change)
    with pytest.raises(BundleError) as caught:
        gf_cuda.load(path)
    assert message in str(caught.value)
    assert "poisoned.gfb" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_checksum_is_refused(file: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        sums = json.loads(archive.read("manifest.json"))["sha256"]
    name = next(iter(sums))
    path = rewrite(file, tmp_path / "changed.gfb", set_field(sha256={**sums, name: "0" * 64}))
    with pytest.raises(BundleError, match=rf"changed.gfb: wrong checksum of {name}; the file is damaged"):
        gf_cuda.load(path)


@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.9, -1])
def test_a_truncated_bundle_is_refused(file: Path, tmp_path: Path, keep: float) -> None:
    data = file.read_bytes()
    path = tmp_path / "short.gfb"
    path.write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(BundleError, match=r"short.gfb: truncated, damaged or not a gf_tvm bundle"):
        gf_cuda.load(path)


def test_every_flipped_byte_is_noticed_or_harmless(file: Path, tmp_path: Path) -> None:
    data, path = file.read_bytes(), tmp_path / "flipped.gfb"
    keys = [kernel.key for kernel in read(file).kernels]
    refused = 0
    for position in range(0, len(data), max(1, len(data) // 150)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :])
        try:
            assert [kernel.key for kernel in read(path).kernels] == keys
        except BundleError:
            refused += 1
    assert refused > 140


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"cannot read bundle .*: No such file"):
        gf_cuda.load(tmp_path / "none.gfb")
    with pytest.raises(BundleError, match=r"cannot read bundle .*: Is a directory"):
        gf_cuda.load(tmp_path)


# -------------------------------------------------------------------------------------------- the check, its reference


def random_geometries(count: int, seed: int) -> Iterator[Geometry]:
    draw = random.Random(seed)

    def pair(low: int, high: int) -> tuple[int, int]:
        return draw.randint(low, high), draw.randint(low, high)

    while count:
        groups = draw.choice([1, 1, 2, 4])
        ci = groups * draw.randint(1, 3)
        co = draw.choice([ci, groups * draw.randint(1, 3)])
        dilation = draw.choice([(1, 1), pair(1, 6), (4, 4)])
        sizes = (draw.randint(1, 3), ci, co, *pair(1, 13), pair(1, 4), pair(1, 5), pair(1, 3), pair(0, 3))
        try:
            yield Geometry(*sizes, dilation, groups)
        except GeometryError:
            continue
        count -= 1


def test_the_reference_is_that_of_gf_tvm(one_thread: None) -> None:
    seen = {"dilated": 0, "depthwise": 0, "uncovered": 0}
    for geometry in random_geometries(20, 5):
        at = Convolution.from_dict(geometry.to_dict())
        assert at.key == geometry.key
        seen["dilated"] += geometry.dilated
        seen["depthwise"] += geometry.depthwise
        seen["uncovered"] += not geometry.covers_input
        assert bool(reference.covered(at).all()) == geometry.covers_input
        for name in KERNELS:
            workload = Workload(name, geometry)
            inputs, specs = verify.random_inputs(workload, 0), verify.argument_specs(workload)
            names = [spec.name for spec in specs]
            ours = reference.expected(name, at, dict(zip(names, inputs, strict=False)))
            theirs = verify.expected(workload, inputs)
            assert sorted(ours) == sorted(names[len(inputs) :])
            for key, want in zip(names[len(inputs) :], theirs, strict=True):
                assert ours[key].terms == want.terms
                for a, b in ((ours[key].value, want.value), (ours[key].magnitude, want.magnitude)):
                    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
                wrong = want.value.float().contiguous()
                assert reference.excess(wrong, ours[key]) <= 1
                wrong.view(-1)[-1] += 1 + abs(float(wrong.view(-1)[-1]))
                assert reference.excess(wrong, ours[key]) > 1 or float(want.magnitude.flatten()[-1]) > 1e4
    assert all(count > 1 for count in seen.values()), seen


def test_check_says_what_is_right(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(file)]) == 0
    out = capsys.readouterr().out
    assert "4 of 4 kernels are right" in out
    for word in ("driver    CUDA 10.2, emulated", "Emulated Maxwell (sm_53)", "4.0 GiB", "PyTorch", "built by"):
        assert word in out
    assert main(["check", str(file), "--kernel", "backward"]) == 0
    assert "1 of 1 kernels are right" in capsys.readouterr().out


def test_check_finds_a_wrong_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = cuda_bundles._SOURCE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_bundles, "_SOURCE", source.replace("sum / count", "sum / (count + 1)"))
        path = cuda_bundles.write_bundle(tmp_path / "wrong.gfb", WORKLOADS[:2])
    assert main(["check", str(path)]) == 1
    out = capsys.readouterr().out
    assert "1 of 2 kernels are right, 1 are not" in out
    assert [line.split()[0] for line in out.splitlines() if "WRONG" in line] == ["backward"]


def test_check_goes_on_after_a_launch_that_fails(
    file: Path, gpu: emulated_cuda.Emulated, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.fault("cuLaunchKernel:1:701")
    assert main(["check", str(file)]) == 1
    out = capsys.readouterr().out
    assert "FAILED: cuLaunchKernel: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES (701)" in out
    assert "3 of 4 kernels are right" in out
    gpu.fault("cuLaunchKernel:1:700")  # the context is lost: nothing more can be said
    assert main(["check", str(file)]) == 2
    assert "error: cuLaunchKernel: CUDA_ERROR_ILLEGAL_ADDRESS" in capsys.readouterr().err


def test_check_gives_all_memory_back(file: Path, gpu: emulated_cuda.Emulated) -> None:
    before = gpu.memory_used()
    main(["check", str(file)])
    assert gpu.memory_used() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "none.gfb"], "cannot read bundle"),
        (["check", "FILE", "--kernel", "forward"], "has no kernel 'forward'; it has backward, backward_input"),
        (["check", "FILE", "--gpu", "5"], "no CUDA device 5"),
        (["info", "FILE", "--kernel", "forward"], "has no kernel 'forward'"),
        (["bench", "FILE", "--seconds", "-1"], "seconds must be a number of at least 0"),
    ],
)
def test_mistakes_are_one_line(
    file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([str(file) if word == "FILE" else word for word in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "name a command: info, check or bench" in capsys.readouterr().err


def test_info_needs_no_gpu(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GF_CUDA_DRIVER", "libnone.so.1")
    assert main(["info", str(file)]) == 0
    out = capsys.readouterr().out
    assert "nano.gfb: 4 kernels for jetson-nano (sm_53, cubin)" in out
    assert GEOMETRY.key in out
    assert main(["check", str(file)]) == 2
    assert "no CUDA driver" in capsys.readouterr().err


def test_poisoned_outputs_are_those_of_gf_tvm() -> None:
    from gf_cuda.__main__ import _poisoned

    entry, _ = cuda_bundles.entry_of(WORKLOADS[1])
    kernel = Kernel(entry, lambda name: b"", [entry["symbol"] + ".cu", entry["symbol"] + ".ptx"], "x")
    wanted: list[Tensor] = verify.poisoned_outputs(WORKLOADS[1])
    shape = wanted[0].shape
    torch.testing.assert_close(
        _poisoned(kernel, "grad_x", (tuple(shape), torch.float32), reference), wanted[0], equal_nan=True, rtol=0, atol=0
    )

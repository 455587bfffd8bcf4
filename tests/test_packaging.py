"""The wheel: complete, tidy, and working outside the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from checkout import FOLDERS, ROOT

import gf_tvm

#: What a package is made of: code (in C, too), its type marker, data, a template, and shipped tuning logs.
SUFFIXES = {".py", ".json", ".jsonl", ".typed", ".html", ".c"}
#: What a board that trains with a bundle must not import.
COMPILER = {"tvm", "tvm.te", "tvm.s_tir", "xgboost", "sklearn", "matplotlib", "transformers"}


def sources() -> dict[str, Path]:
    """Where each file of the checkout belongs in the wheel."""
    return {
        f"{package}/{file.relative_to(ROOT / folder).as_posix()}": file
        for folder, package in FOLDERS.items()
        for file in sorted((ROOT / folder).rglob("*"))
        if file.suffix in SUFFIXES and "__pycache__" not in file.parts
    }


def run(command: list[str | Path], **kwargs: object) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **kwargs)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout
    return str(done.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools leaves its working files beside the sources, and packs old ones."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    # Without isolation nothing is downloaded; setuptools is in the "test" extra for that.
    run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, copy])
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel is installed, found before the checkout by whoever has it in PYTHONPATH."""
    target = tmp_path_factory.mktemp("site")
    run([sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel])
    return target


def run_installed(site: Path, command: list[str | Path], cwd: Path) -> str:
    return run(command, cwd=cwd, env={**os.environ, "PYTHONPATH": str(site)})


def test_wheel_holds_every_source_file_and_nothing_else(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == set(sources())
    assert {name.split("/")[0] for name in packed} == {"gf_cuda", "gf_tvm"}


def test_wheel_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA")).rpartition("/")[0]
    assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert "gf-tvm = gf_tvm.runners.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    text = archive.read(f"{info}/METADATA").decode()
    assert f"\nVersion: {gf_tvm.__version__}\n" in text
    assert metadata.version("gf-tvm") == gf_tvm.__version__
    # What only tuning needs must not reach a board.
    base = [line for line in text.splitlines() if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    assert not [line for line in base if "xgboost" in line or "scikit" in line or "transformers" in line]
    assert any(line.startswith("Requires-Dist: apache-tvm-ffi<0.1.15") for line in base)


def test_every_module_imports_outside_the_checkout(site: Path, tmp_path: Path) -> None:
    code = f"""
import importlib, pkgutil, gf_cuda, gf_tvm
names = ["gf_cuda", *(m.name for m in pkgutil.walk_packages(gf_cuda.__path__, "gf_cuda."))]
names += ["gf_tvm", *(m.name for m in pkgutil.walk_packages(gf_tvm.__path__, "gf_tvm."))]
for name in names:
    file = importlib.import_module(name).__file__
    assert file.startswith({str(site)!r}), file
print(*names)
"""
    names = set(run_installed(site, [sys.executable, "-c", code], tmp_path).split())
    expected = {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in sources()
        if name.endswith(".py")
    }
    assert names == expected


def test_shipped_data_is_found_outside_the_checkout(site: Path, tmp_path: Path) -> None:
    code = """
import importlib.resources as r
folders = [f for f in r.files("gf_tvm.tuning_logs").iterdir() if f.is_dir()]
print(sum(f.name.endswith(".jsonl") for folder in folders for f in folder.iterdir()))
from gf_tvm.shapes import paper_cases
print(len(paper_cases([2])))
"""
    logs, cases = run_installed(site, [sys.executable, "-c", code], tmp_path).split()
    assert int(logs) == len(list((ROOT / "tuning_logs").glob("*/*.jsonl")))
    assert int(cases) == 7


def test_import_is_light(site: Path, tmp_path: Path) -> None:
    """What a board imports to train: not even TVM's Python package, which is mostly compiler."""
    code = f"""
import sys, gf_tvm, gf_tvm.bundle.library, gf_tvm.nn, gf_tvm.functional
print(*sorted({COMPILER} & set(sys.modules)))
"""
    assert run_installed(site, [sys.executable, "-c", code], tmp_path).split() == []


def test_default_schedules_build_and_run_outside_the_checkout(site: Path, tmp_path: Path) -> None:
    command = shutil.which("gf-tvm", path=site / "bin")
    assert command is not None
    shapes = {"n": 2, "kernel": 3, "stride": 1, "padding": 1, "dtype": "float32", "patches": [2]}
    (tmp_path / "shapes.json").write_text(json.dumps({**shapes, "cases": [{"ci": 8, "co": 8, "h": 6, "w": 6}]}))
    # The script's first line names the interpreter that runs this test.
    run_installed(site, [command, "build", "--shapes", "shapes.json", "--out", "host.gfb"], tmp_path)
    code = f"""
import sys, torch, gf_tvm
library = gf_tvm.load("host.gfb")
generator = torch.Generator().manual_seed(0)
x, w = (torch.randn(*s, generator=generator, requires_grad=True) for s in ((2, 8, 6, 6), (8, 8, 3, 3)))
def grads(library):
    y = gf_tvm.functional.conv2d(x, w, padding=1, patch=2, library=library)
    return torch.autograd.grad(y, (x, w), torch.arange(y.numel()).reshape(y.shape) / y.numel())
for a, b in zip(grads(library), grads(None)):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
print(len(library.workloads), *sorted({COMPILER} & set(sys.modules)))
"""
    kernels, *compiler = run_installed(site, [sys.executable, "-W", "ignore", "-c", code], tmp_path).split()
    assert int(kernels) >= 2
    assert compiler == []

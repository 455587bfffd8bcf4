"""gf_cuda's wheel for boards: complete, for Python 3.6, written where --runtime says."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import emulated_cuda
import pytest
from checkout import ROOT

import gf_tvm
from gf_tvm.farm.wheel import build_runtime_wheel, runtime_name
from gf_tvm.runners.cli import main

NAME = f"gf_cuda-{gf_tvm.__version__}-py3-none-any.whl"
INFO = f"gf_cuda-{gf_tvm.__version__}.dist-info"
PACKAGE = ROOT / "gf_cuda"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_runtime_wheel(tmp_path_factory.mktemp("wheel"))


def test_what_it_holds(wheel: Path, tmp_path: Path) -> None:
    assert wheel.name == NAME == runtime_name()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        text = archive.read(f"{INFO}/METADATA").decode()
        record = archive.read(f"{INFO}/RECORD").decode().splitlines()
        sources = {f"gf_cuda/{file.name}" for file in PACKAGE.iterdir() if file.suffix in (".py", ".typed")}
        assert all(archive.read(name) == (PACKAGE.parent / name).read_bytes() for name in sources)
    kept = {f"{INFO}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
    assert names == sources | kept
    assert "Requires-Python: >=3.6\n" in text
    assert "Requires-Dist" not in text
    assert sorted(line.split(",")[0] for line in record) == sorted(names)
    assert build_runtime_wheel(tmp_path).read_bytes() == wheel.read_bytes()


def test_pip_installs_it(wheel: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(tmp_path), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    code = f"import gf_cuda; assert gf_cuda.__file__.startswith({str(tmp_path)!r}); print(gf_cuda.load.__name__)"
    environment = {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "load\n"), done.stderr


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    file = tmp_path / "shapes.json"
    case = {"name": "one", "n": 1, "ci": 2, "co": 2, "h": 4, "w": 4, "kernel": 1, "patches": [2]}
    file.write_text(json.dumps({"cases": [case]}))
    return file


def build(shapes: Path, *options: str, device: str = "jetson-nano") -> int:
    out = str(shapes.with_name("nano.gfb"))
    with emulated_cuda.environment():
        return main(["build", "--device", device, "--shapes", str(shapes), "--out", out, *options])


def test_the_command_writes_it(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(shapes, "--runtime", str(shapes.parent)) == 0
    assert f"for the board: pip3 install {NAME}; python3 -m gf_cuda check nano.gfb" in capsys.readouterr().out
    (shapes.parent / NAME).unlink()
    assert build(shapes, "--runtime", str(shapes.parent / NAME)) == 0
    assert (shapes.parent / NAME).exists()
    capsys.readouterr()
    assert build(shapes) == 0
    assert "--runtime DIR writes gf_cuda's wheel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "device", "message"),
    [
        ("board.whl", "jetson-nano", f"pip takes this wheel under the name {NAME} only, not board.whl"),
        ("nowhere/", "jetson-nano", "there is no folder"),
        (".", "host", "is loaded by gf_tvm; gf_cuda is for GPUs"),
    ],
)
def test_mistakes_are_found_before_building(
    shapes: Path, capsys: pytest.CaptureFixture[str], option: str, device: str, message: str
) -> None:
    assert build(shapes, "--runtime", str(shapes.parent / option), device=device) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(shapes.parent.glob("*.gfb"))

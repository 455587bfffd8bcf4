"""What a board imports runs with the Python of a Jetson Nano (3.6), and needs no more than it says."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import emulated_cuda
import pytest
from checkout import ROOT

from gf_cuda.program import Program

_PACKAGE = ROOT / "gf_cuda"
_MODULES = sorted(_PACKAGE.glob("*.py"))
#: These are of use without torch: a server measures kernels with them, and a build machine checks them.
_WITHOUT_TORCH = {"__init__", "errors", "api", "driver", "handles", "nvrtc", "program", "bundle", "rounds", "meters"}


def _pythons() -> dict[str, str]:
    """This Python, and those of a Jetson Nano that are here: JetPack's own (3.6), and what people install (3.8)."""
    found = {"this": sys.executable}
    for name in ("python3.6", "python3.8"):
        version = name[len("python") :]
        paths = [shutil.which(name), *map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/{name}"))]
        # pyenv's placeholder may stand for nothing.
        real = next((path for path in paths if path and Path(path).parent.name != "shims"), None)
        if real:
            found[name] = real
    return found


def test_nothing_is_newer_than_python_3_6() -> None:
    """Syntax and library, told by vermin."""
    command = [sys.executable, "-c", "import vermin; vermin.main()"]
    command += ["-t=3.6-", "--violations", "--eval-annotations", "--no-tips", "--no-parse-comments", str(_PACKAGE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "could not be combined" not in done.stdout, done.stdout


@pytest.mark.parametrize("path", _MODULES, ids=lambda path: path.stem)
def test_what_it_imports(path: Path) -> None:
    """The standard library, itself, and torch where tensors are; never gf_tvm or TVM."""
    allowed = sys.stdlib_module_names if path.stem in _WITHOUT_TORCH else {*sys.stdlib_module_names, "torch"}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""] if node.level == 0 else []
        else:
            continue
        for name in names:
            assert name.split(".")[0] in allowed, f"{path.name}:{node.lineno} imports {name}"
            assert name != "__future__", f"{path.name}:{node.lineno}: Python 3.6 has no postponed annotations"


_RUN = """
import sys
sys.path.insert(0, sys.argv[1])
import array, struct
import gf_cuda
from gf_cuda.program import Program, load_file

assert not {"torch", "numpy", "gf_tvm"} & set(sys.modules), sorted(sys.modules)
driver = gf_cuda.get_driver()
assert driver.emulated
device = driver.device()

# A file that was made elsewhere, then source that is compiled here, as finished code and as PTX.
program, source, image, kind = load_file(sys.argv[2])
for kind in ("as it is", None, "ptx"):
    if kind != "as it is":
        image, kind, _ = gf_cuda.compile_source(source, device.arch, kind=kind)
    executable = gf_cuda.Executable(device, program, image)
    stream = device.new_stream()
    with device.alloc(32) as x, device.alloc(32) as y, device.alloc(program.scratch_bytes) as scratch:
        device.upload(x.pointer, array.array("f", range(8)))
        with device.event() as begin, device.event() as end:
            begin.record(stream)
            executable([x.pointer, y.pointer], scratch.pointer, stream)
            end.record(stream)
            end.synchronize()
            assert end.elapsed_ms(begin) >= 0
        assert struct.unpack("8f", device.download(y.pointer, 32)) == (1, 3, 5, 7, 9, 11, 13, 15)
        try:
            executable([x.pointer, 0], scratch.pointer, stream)
        except gf_cuda.ProgramError as error:
            assert "y: address 0x0" in str(error)
        else:
            raise AssertionError("a null pointer was accepted")
    executable.unload()
print(sys.version_info[:2], program.arguments[1].nbytes)
"""
_SOURCE = """
extern "C" __global__ void twice(float* __restrict__ x, float* __restrict__ t) {
  t[threadIdx.x] = x[threadIdx.x] * 2.0f;
}
extern "C" __global__ void more(float* __restrict__ t, float* __restrict__ y) {
  y[threadIdx.x] = t[threadIdx.x] + 1.0f;
}
"""


@pytest.mark.parametrize("python", _pythons().values(), ids=_pythons().keys())
def test_a_launch_with_an_old_python(python: str, tmp_path: Path) -> None:
    """End to end, without any package but gf_cuda and with every warning an error."""
    launch = {"grid": [1, 1, 1], "block": [8, 1, 1], "shared": 0}
    program = Program.from_dict(
        {
            "schema": 1,
            "arch": "sm_53",
            "arguments": [
                {"name": name, "dtype": "float32", "shape": [8], "output": name == "y"} for name in ("x", "y")
            ],
            "scratch_bytes": 32,
            "launches": [
                {"function": "twice", **launch, "arguments": [["argument", 0], ["scratch", 0]]},
                {"function": "more", **launch, "arguments": [["scratch", 0], ["argument", 1]]},
            ],
        }
    )
    with emulated_cuda.environment():
        from gf_cuda import compile_source

        image, kind, _ = compile_source(_SOURCE, "sm_53")
    program.save(str(tmp_path / "candidate"), _SOURCE, image, kind)
    script = tmp_path / "run.py"
    script.write_text(_RUN)
    done = subprocess.run(
        [python, "-S", "-W", "error", str(script), str(_PACKAGE.parent), str(tmp_path / "candidate")],
        env={"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", **emulated_cuda.variables()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(") 32\n")

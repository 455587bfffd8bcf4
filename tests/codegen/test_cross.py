"""Building for a Raspberry Pi 4 on another machine: spaces, linking, and what the bundle says and needs."""

from __future__ import annotations

import importlib.util
import json
import platform
import random
import re
import shutil
import sys
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cortex_a72 import hot_loops, products_a_cycle
from elf import AARCH64, X86_64, read_elf
from hypothesis import HealthCheck, Phase, given, settings
from strategies import SEEDS, geometries

import gf_tvm
from gf_tvm.bundle.format import LIBRARY, MANIFEST
from gf_tvm.codegen.compile import compile_module, export
from gf_tvm.codegen.linker import find_linker
from gf_tvm.core import verify
from gf_tvm.core.geometry import Geometry
from gf_tvm.core.workload import Workload
from gf_tvm.errors import BuildError, BundleError
from gf_tvm.machine.profiles import get_profile
from gf_tvm.runners import cli
from gf_tvm.schedules import get_space

RPI4 = get_profile("rpi4")
GEOMETRY = Geometry(2, 16, 24, 14, 14, 3, 2, padding=1)
KERNELS = ("filter_input", "backward", "backward_weight")

foreign = pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine is what it would be built for")
cross_gcc = pytest.mark.skipif(shutil.which("aarch64-linux-gnu-gcc") is None, reason="needs Debian's cross compiler")
# Its first link compiles parts of libc, which takes it half a minute.
ziglang = pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs ziglang")


@pytest.fixture(params=[pytest.param("gcc", marks=cross_gcc), pytest.param("zig", marks=[ziglang, pytest.mark.slow])])
def linker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes one of the two linkers the one that is found."""
    if request.param == "zig":
        monkeypatch.setattr("shutil.which", lambda name: None)
    return str(request.param)


# -------------------------------------------------------------------------------------------------------------- linking


def check_library(data: bytes) -> None:
    """It is for a 64-bit Arm machine, and asks for no library but libc and libm, and for nothing new of them."""
    elf = read_elf(data)
    assert elf.machine == AARCH64
    assert set(elf.needed) <= {"libc.so.6", "libm.so.6"}
    for name in (name for names in elf.versions.values() for name in names):
        version = re.fullmatch(r"GLIBC_(\d+)\.(\d+)", name)
        assert version, name
        assert tuple(map(int, version.groups())) <= (2, 27)


@foreign
def test_a_bundle_for_the_board(linker: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, shapes = tmp_path / "rpi4.gfb", tmp_path / "shapes.json"
    case = {"name": "a", "n": 2, "ci": 16, "co": 24, "h": 14, "w": 14, "kernel": 3, "padding": 1, "patches": [2]}
    shapes.write_text(json.dumps({"cases": [case]}))
    assert find_linker(RPI4)[0] == (sys.executable if linker == "zig" else shutil.which("aarch64-linux-gnu-gcc"))
    assert cli.main(["build", "--device", "rpi4", "--shapes", str(shapes), "--out", str(out)]) == 0
    assert "kernels for rpi4" in capsys.readouterr().out
    with zipfile.ZipFile(out) as archive:
        manifest, library = json.loads(archive.read(MANIFEST)), archive.read(LIBRARY)
    check_library(library)
    assert (manifest["device"], manifest["arch"], manifest["target"]) == ("rpi4", "aarch64", RPI4.target)
    assert manifest["cpu_flags"] == ["asimd"]
    with pytest.raises(BundleError, match=f"rpi4.gfb: was built for aarch64, this machine is {platform.machine()}"):
        gf_tvm.load(out)


@foreign
def test_several_links_at_the_same_time(linker: str, tmp_path: Path) -> None:
    """As many builders do; each link is a process of its own, so threads are enough to start them."""

    def link(number: int) -> bytes:
        workload = Workload("filter_input", GEOMETRY)
        space = get_space(workload, RPI4)
        path = tmp_path / f"{number}.so"
        export([compile_module(space.schedule(space.default), RPI4)], path, RPI4)
        return path.read_bytes()

    with ThreadPoolExecutor(3) as pool:
        for data in pool.map(link, range(6)):
            check_library(data)


def test_what_to_install_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for machine, profile, words in (
        ("x86_64", "rpi4", ("link for aarch64", "apt-get install g++-aarch64-linux-gnu", "gf-tvm[cross]")),
        ("aarch64", "rpi4", ("apt-get install g++)", "gf-tvm[cross]")),
        ("aarch64", "x86-64-v3", ("link for x86_64", "apt-get install g++-x86-64-linux-gnu", "gf-tvm[cross]")),
    ):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        with pytest.raises(BuildError) as error:
            find_linker(get_profile(profile))
        assert "\n" not in str(error.value)
        for word in words:
            assert word in str(error.value)
        # Found out before anything is compiled.
        with pytest.raises(BuildError, match="to link"):
            gf_tvm.build([Workload("backward", GEOMETRY)], profile, out=tmp_path / "x.gfb")
    assert list(tmp_path.iterdir()) == []


@ziglang
@pytest.mark.slow
def test_a_machine_without_a_compiler_links_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    workload = Workload("backward", GEOMETRY)
    gf_tvm.build([workload], "host", out=tmp_path / "host.gfb")
    kernel = gf_tvm.load(tmp_path / "host.gfb").find("backward", GEOMETRY, "float32")
    assert kernel is not None
    inputs, outputs = verify.random_inputs(workload, 1), verify.poisoned_outputs(workload)
    kernel(*inputs, *outputs)
    assert verify.excess(outputs, verify.expected(workload, inputs)) <= 1


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'ld: No space left on device'; echo 'collect2: error: ld returned 1 exit status'", "No space left"),
        ("true", "exit code 3"),
    ],
)
def test_a_linker_that_fails_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    fake = tmp_path / "linker"
    fake.write_text(f"#!/bin/sh\n{script}\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name: str(fake))
    workload = Workload("filter_input", GEOMETRY)
    space = get_space(workload, RPI4)
    with pytest.raises(BuildError, match=f"linking k.so failed: .*{words}"):
        export([compile_module(space.schedule(space.default), RPI4)], tmp_path / "k.so", RPI4)


def test_reading_elf() -> None:
    elf = read_elf(Path(sys.executable).resolve().read_bytes())
    assert elf.machine == {"x86_64": X86_64, "aarch64": AARCH64}[platform.machine()]
    assert "libc.so.6" in elf.needed
    assert any(name.startswith("GLIBC_2.") for name in elf.versions["libc.so.6"])


# ----------------------------------------------------------------------------------------------------- profile and host


def test_the_target_is_tvms_tag() -> None:
    import tvm

    wanted, ours = tvm.target.Target("raspberry-pi/4b-aarch64"), tvm.target.Target(json.loads(RPI4.target))
    assert ours.kind.name == wanted.kind.name
    for name in ("mtriple", "mcpu", "mattr", "num-cores"):
        assert str(ours.attrs[name]) == str(wanted.attrs[name])


def test_host_on_an_arm_machine_is_not_a_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr(
        "gf_tvm.machine.profiles.cpu_flags", lambda: frozenset({"fp", "asimd", "evtstrm", "crc32", "cpuid"})
    )
    assert get_profile("host").name == "aarch64"
    assert gf_tvm.machine.profiles.runs_here(RPI4)


# --------------------------------------------------------------------------------------------------------------- spaces


def as_on_the_board() -> Any:
    """The spaces of rpi4 with this machine's code generator: what they compute can be checked anywhere."""
    host = get_profile("host")
    return replace(RPI4, arch=host.arch, target=host.target, cpu_flags=host.cpu_flags)


def excess(workload: Workload, config: dict[str, int], seed: int) -> float:
    profile = as_on_the_board()
    module = compile_module(get_space(workload, profile).schedule(config), profile)
    inputs, outputs = verify.random_inputs(workload, seed), verify.poisoned_outputs(workload)
    module["main"](*inputs, *outputs)
    return verify.excess(outputs, verify.expected(workload, inputs))


@pytest.mark.slow
@settings(
    max_examples=16,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(geometries(smallest_n=1, largest_out=20, largest_channels=40), SEEDS)
def test_any_geometry_has_right_kernels(geometry: Geometry, seed: int) -> None:
    rng = random.Random(seed)
    for kernel in ("backward", rng.choice(("filter_input", "backward_input", "backward_weight"))):
        workload = Workload(kernel, geometry)
        space = get_space(workload, RPI4)
        assert space.valid(space.default)
        for config in (space.default, space.sample(rng)):
            assert excess(workload, config, seed) <= 1, (workload.key, config)


def test_the_default_has_work_for_every_core() -> None:
    for geometry in (
        Geometry(8, 96, 24, 14, 14, 1, 2),
        Geometry(8, 32, 192, 28, 28, 1, 2),
        Geometry(8, 160, 960, 7, 7, 1, 2),
        Geometry(32, 256, 256, 14, 14, 3, 4, padding=1),
    ):
        config = get_space(Workload("backward", geometry), RPI4).default
        if not config["rows"]:
            # By channels: each thread has some tiles of input channels.
            assert -(-geometry.ci_group // config["together"]) >= 4, (geometry, config)
            continue
        blocks = geometry.n * geometry.grid[0] // config["rows"]
        # Two of three rounds with four threads each would leave a third of the cores' time unused.
        assert blocks / (-(-blocks // 4) * 4) > 0.8, (geometry, config)


CASES = {
    "512 channels R2": Geometry(32, 512, 512, 14, 14, 3, 2, padding=1),
    # 98 patches, which no tile of 8 divides.
    "256 channels R2": Geometry(32, 256, 256, 14, 14, 3, 2, padding=1),
    "64 channels R4": Geometry(32, 64, 64, 56, 56, 3, 4, padding=1),
    "1x1": Geometry(8, 96, 576, 14, 14, 1, 2),
}


def loops_of(geometry: Geometry) -> list[list[str]]:
    """The loops that do the products, as Cortex-A72 code: those of full tiles."""
    workload = Workload("backward", geometry)
    space = get_space(workload, RPI4)
    return hot_loops(compile_module(space.schedule(space.default), RPI4))


@pytest.mark.parametrize("case", CASES)
def test_products_stay_in_registers(case: str) -> None:
    loops = loops_of(CASES[case])
    assert len(loops) >= 2, "the products of grad_x and of grad_W"
    for body in loops:
        kinds = Counter(line.split()[0] for line in body)
        # Nothing is spilled, no product is scalar or apart from its sum, and loads hide behind the products.
        assert not [line for line in body if "[sp" in line or line.startswith("st")]
        assert not set(kinds) & {"fmul", "fadd", "fmadd"}
        assert sum(n for name, n in kinds.items() if name.startswith("ld")) < kinds["fmla"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.skipif(shutil.which("llvm-mca") is None, reason="needs llvm-mca")
def test_estimate_of_the_products_rate(case: str) -> None:
    """llvm-mca's model of the core: at least 0.95 multiply-adds a cycle, where one is the most."""
    for body in loops_of(CASES[case]):
        assert products_a_cycle(body) >= 0.95

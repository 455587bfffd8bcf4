"""Disks that are full or run nothing, and readers that go away: one line, nothing half-written, no result lost."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from farm_helpers import small_workload
from training_models import patterns

import gf_tvm
from gf_tvm.errors import BuildError
from gf_tvm.runners import cli

Mount = Callable[[str], Path]

#: The least that `gf-tvm build` takes.
SHAPES = [{"name": "small", "n": 1, "ci": 8, "co": 8, "h": 8, "w": 8, "kernel": 3, "padding": 1, "patches": [2]}]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts a small disk with these options -> where."""
    mounted: list[Path] = []

    def make(options: str) -> Path:
        disk = tmp_path / f"disk{len(mounted)}"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(disk)]
        if os.geteuid() != 0 or subprocess.run(command, check=False).returncode:
            pytest.skip("a small disk to fill needs the right to mount one")
        mounted.append(disk)
        return disk

    yield make
    for disk in mounted:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps({"cases": SHAPES}))
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "small.gfb"
    gf_tvm.build([small_workload()], "host", out=path, shipped=False)
    return path


def build(shapes: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gf_tvm.runners.cli", "build", "--shapes", str(shapes), "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_building_where_the_disk_fills_up(mount: Mount, shapes: Path) -> None:
    rng = random.Random(3)
    full = 0
    for size in [4, 8, *(rng.randrange(12, 120, 4) for _ in range(4)), 1000]:
        disk = mount(f"size={size}k")
        done = build(shapes, disk / "a.gfb")
        if done.returncode == 0:
            assert gf_tvm.load(disk / "a.gfb").workloads
            continue
        full += 1
        assert done.returncode == 2, done.stderr
        assert list(disk.iterdir()) == []
        (line,) = [line for line in done.stderr.splitlines() if not line.startswith("building:")]
        assert line.startswith("gf-tvm: error: ")
        assert "No space left on device" in line
    assert 2 <= full <= 6


@pytest.mark.parametrize("size", ["4k", "40k"])
def test_building_with_a_full_temporary_folder(mount: Mount, shapes: Path, tmp_path: Path, size: str) -> None:
    temporary = mount(f"size={size}")
    done = build(shapes, tmp_path / "a.gfb", TMPDIR=str(temporary))
    assert done.returncode == 0, done.stderr  # all of it lies beside the bundle
    assert list(temporary.iterdir()) == []


def test_an_existing_bundle_survives_a_full_disk(mount: Mount) -> None:
    disk = mount("size=64k")
    (disk / "a.gfb").write_bytes(b"old")
    (disk / "filler").write_bytes(bytes(48 << 10))
    with pytest.raises(BuildError, match="No space left on device"):
        gf_tvm.build([small_workload()], "host", out=disk / "a.gfb", shipped=False)
    assert (disk / "a.gfb").read_bytes() == b"old"
    assert len(list(disk.iterdir())) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("size=1m,noexec", "cannot be mapped from {}, which is mounted noexec; set TMPDIR to a folder that is not"),
        ("size=4k", "No space left on device ({}); set TMPDIR to a folder that has room"),
        ("size=1m,nr_inodes=1", "No space left on device ({}"),
        ("size=1m,ro", "{}"),
    ],
)
def test_a_temporary_folder_that_holds_no_kernels(mount: Mount, bundle: Path, options: str, says: str) -> None:
    disk = mount(options)
    code = (
        "import sys, tempfile, gf_tvm\n"
        "from gf_tvm.errors import BundleError\n"
        f"tempfile.tempdir = {str(disk)!r}\n"  # TMPDIR, but without another folder where nothing can be written
        "try:\n    gf_tvm.load(sys.argv[1])\n"
        "except BundleError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert says.format(disk) in done.stdout
    assert "TMPDIR" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert list(disk.iterdir()) == []


def test_no_temporary_folder_at_all(bundle: Path) -> None:
    code = (
        "import sys, tempfile, gf_tvm\n"
        "from gf_tvm.errors import BundleError\n"
        "tempfile._candidate_tempdir_list = lambda: ['/none']\n"
        "try:\n    gf_tvm.load(sys.argv[1])\n"
        "except BundleError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert "No usable temporary directory found in ['/none']; set TMPDIR" in done.stdout


@pytest.mark.parametrize("command", ["devices", "logs show", "build", "train", "compare", "evaluate", "tune"])
def test_results_are_written_where_nobody_reads_the_output(
    command: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--model", "training_models:tiny", "--data", patterns(tmp_path / "p.npz"), "--image-size", "8"]
    training = ["--batch", "8", "--epochs", "1", "--pretrain-epochs", "1"]
    options = {
        "devices": [],
        "logs show": [str(gf_tvm.tuning.shipped_logs())],
        "build": ["--shapes", str(shapes), "--out", str(tmp_path / "a.gfb")],
        "train": ["--protocol", "paper", *data, *training, "--last", "1", "--patch", "2"],
        "compare": ["--shapes", str(shapes), "--seconds", "0"],
        "evaluate": [*data, *training, "--last", "1", "--patch", "2", "--out", str(tmp_path / "out")],
        "tune": ["--shapes", str(shapes), "--trials", "1", "--logs", str(tmp_path / "logs")],
    }[command]
    results = tmp_path / "results.json"
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1, encoding="utf-8") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        assert cli.main([*command.split(), *options, "--json", str(results)]) == cli.EXIT_BROKEN_PIPE
    assert json.loads(results.read_text())
    assert "Traceback" not in capsys.readouterr().err

"""The wheel that boards are given: complete, accepted by pip, the same every time."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from test_packaging import sources

import gf_tvm
from gf_tvm.errors import FarmError
from gf_tvm.farm.wheel import build_wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_holds_every_source_file_and_nothing_else(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    packed = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    assert set(packed) == set(sources())
    assert all(packed[name] == file.read_bytes() for name, file in sources().items())


def test_record_has_every_file_with_its_hash(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"gf_tvm-{gf_tvm.__version__}.dist-info"
    rows = [line.split(",") for line in archive.read(f"{info}/RECORD").decode().splitlines()]
    assert sorted(name for name, *_ in rows) == sorted(archive.namelist())
    for name, digest, size in rows:
        if name == f"{info}/RECORD":
            assert (digest, size) == ("", "")
            continue
        data = archive.read(name)
        assert digest == "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        assert int(size) == len(data)


def test_metadata_is_the_installations(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"gf_tvm-{gf_tvm.__version__}.dist-info"
    assert "gf-tvm = gf_tvm.runners.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    text = archive.read(f"{info}/METADATA").decode()
    assert f"\nVersion: {gf_tvm.__version__}\n" in text
    assert all(f"Requires-Dist: {line}\n" in text for line in metadata.requires("gf-tvm") or [])
    assert f"{info}/licenses/LICENSE" in archive.namelist()


def test_same_code_gives_the_same_bytes(wheel: Path, tmp_path: Path) -> None:
    assert build_wheel(tmp_path).read_bytes() == wheel.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == [wheel.name]


def test_pip_installs_it(wheel: Path, tmp_path: Path) -> None:
    def run(*command: str | Path, check: bool = True) -> str:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, cwd=tmp_path
        )
        assert not check or done.returncode == 0, done.stdout
        return done.stdout

    # An environment of its own that sees this one's packages, so that "pip check" finds what gf-tvm depends on.
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    here = [path for path in sys.path if path.endswith("site-packages")]
    (site / "outer.pth").write_text("\n".join(here) + "\n")
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", "--ignore-installed", wheel)
    # Other packages may disagree among themselves; that is not this test's business.
    assert "gf-tvm" not in run(python, "-m", "pip", "check", check=False)
    assert "Location: " + str(site) in run(python, "-m", "pip", "show", "gf-tvm")
    code = f"import gf_tvm.runners.cli as m; assert m.__file__.startswith({str(site)!r}), m.__file__"
    run(python, "-P" if sys.version_info >= (3, 11) else "-s", "-c", code)
    assert gf_tvm.__version__ in run(tmp_path / "venv/bin/gf-tvm", "--version")


def test_an_installation_without_metadata_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "distributions", lambda **_: iter(()))
    with pytest.raises(FarmError, match="not installed"):
        build_wheel(tmp_path)
    assert not list(tmp_path.iterdir())

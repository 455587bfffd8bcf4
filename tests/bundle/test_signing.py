"""Signed bundles: with ``trusted``, nothing is loaded that someone else made or that was altered since."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from farm_helpers import small_workload

import gf_cuda.bundle
import gf_tvm
from gf_tvm.bundle import cpu_library, library, signing
from gf_tvm.bundle.format import LIBRARY, MANIFEST
from gf_tvm.errors import BuildError, BundleError
from gf_tvm.runners import cli


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return signing.make_key(tmp_path_factory.mktemp("keys") / "key.pem")


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory, keys: tuple[Path, Path]) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "signed.gfb"
    gf_tvm.build([small_workload()], "host", out=path, shipped=False, sign=keys[0])
    return path


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """No code is mapped while a test runs."""

    def refuse(*_: Any) -> None:
        raise AssertionError("code of a bundle that is not trusted was loaded")

    monkeypatch.setattr(cpu_library, "load_library", refuse)
    monkeypatch.setattr(library, "_loaded", {})


def entries(path: Path) -> tuple[dict[str, Any], bytes]:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(MANIFEST)), archive.read(LIBRARY)


def write(path: Path, manifest: dict[str, Any], code: bytes, **spelling: Any) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MANIFEST, json.dumps(manifest, **spelling))
        archive.writestr(LIBRARY, code)
    return path


def test_what_is_signed_is_loaded(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    for trusted in ([keys[1]], [str(keys[1])], [signing.make_key(tmp_path / "b.pem")[1], keys[1]]):
        assert gf_tvm.load(signed, trusted=trusted).workloads == (small_workload(),)
    assert gf_tvm.load(signed).workloads  # and where nobody asks
    respelled = write(tmp_path / "a.gfb", *entries(signed), indent=7)  # the values are signed
    assert gf_tvm.load(respelled, trusted=[keys[1]]).workloads


def test_equal_kernels_and_keys_give_equal_bundles(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    gf_tvm.build([small_workload()], "host", out=tmp_path / "again.gfb", shipped=False, sign=keys[0])
    assert entries(tmp_path / "again.gfb")[0].keys() == entries(signed)[0].keys()
    assert entries(tmp_path / "again.gfb")[0]["signature"]["key"] == entries(signed)[0]["signature"]["key"]


def changes(manifest: dict[str, Any], rng: random.Random) -> list[dict[str, Any]]:
    """The manifest with one value changed, removed or added, at every place."""
    found: list[dict[str, Any]] = []

    def visit(value: Any, path: tuple[Any, ...]) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in items:
            for new in (rng.randint(0, 9), "x", None, "gone"):
                changed = json.loads(json.dumps(manifest))
                at = changed
                for step in path:
                    at = at[step]
                if new == "gone":
                    del at[key]
                else:
                    at[key] = new
                if changed != manifest:
                    found.append(changed)
            visit(item, (*path, key))

    visit(manifest, ())
    found.append({**manifest, "more": 1})
    return found


@pytest.mark.usefixtures("untouched")
def test_every_alteration_is_found(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    manifest, code = entries(signed)
    altered = changes(manifest, random.Random(2))
    assert len(altered) > 150
    for values in altered:
        with pytest.raises(BundleError):
            gf_tvm.load(write(tmp_path / "a.gfb", values, code), trusted=[keys[1]])
    other = bytearray(code)
    other[len(other) // 2] ^= 1
    with pytest.raises(BundleError, match="wrong checksum"):
        gf_tvm.load(write(tmp_path / "a.gfb", manifest, bytes(other)), trusted=[keys[1]])
    sums = gf_tvm.bundle.format.checksums({LIBRARY: bytes(other)})
    with pytest.raises(BundleError, match="was altered after it was signed"):
        gf_tvm.load(write(tmp_path / "a.gfb", {**manifest, "sha256": sums}, bytes(other)), trusted=[keys[1]])


@pytest.mark.usefixtures("untouched")
def test_what_nobody_or_somebody_else_signed_is_refused(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    manifest, code = entries(signed)
    stranger, known = signing.make_key(tmp_path / "stranger.pem")
    bare = {name: value for name, value in manifest.items() if name != "signature"}
    with pytest.raises(BundleError, match="is not signed"):
        gf_tvm.load(write(tmp_path / "a.gfb", bare, code), trusted=[keys[1]])
    theirs = signing.signed(bare, signing.private_key(stranger))
    with pytest.raises(BundleError, match="none of the trusted ones"):
        gf_tvm.load(write(tmp_path / "a.gfb", theirs, code), trusted=[keys[1]])
    # Their signature under our key's name.
    theirs["signature"]["key"] = manifest["signature"]["key"]
    with pytest.raises(BundleError, match="was altered after it was signed"):
        gf_tvm.load(write(tmp_path / "a.gfb", theirs, code), trusted=[keys[1]])
    for trusted in ([known], []):
        with pytest.raises(BundleError, match="none of the trusted ones"):
            gf_tvm.load(signed, trusted=trusted)


def test_bundles_for_gpus_are_signed_too(keys: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "nano.gfb"
    gf_tvm.build([small_workload()], "jetson-nano", out=path, shipped=False, sign=keys[0])
    manifest = gf_cuda.bundle.read(path).manifest  # gf_cuda needs no cryptography, and reads it as any other
    signing.check("nano.gfb", manifest, signing.public_keys([keys[1]]))
    with pytest.raises(BundleError, match="none of the trusted ones"):  # said before a GPU is looked for
        gf_tvm.load(path, trusted=[signing.make_key(tmp_path / "b.pem")[1]])


def test_a_library_that_is_loaded_already_is_checked_too(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    loaded = gf_tvm.load(signed)
    with pytest.raises(BundleError, match="none of the trusted ones"):
        gf_tvm.load(signed, trusted=[signing.make_key(tmp_path / "b.pem")[1]])
    assert gf_tvm.load(signed, trusted=[keys[1]]) is loaded


def test_keys_are_kept_and_never_replaced(tmp_path: Path) -> None:
    private, public = signing.make_key(tmp_path / "key.pem")
    assert (private.name, public.name) == ("key.pem", "key.pub.pem")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    before = private.read_bytes()
    with pytest.raises(BuildError, match="File exists"):
        signing.make_key(private)
    assert private.read_bytes() == before
    (tmp_path / "link.pem").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BuildError, match="File exists"):
        signing.make_key(tmp_path / "link.pem")
    with pytest.raises(BuildError, match="No such file"):
        signing.make_key(tmp_path / "none" / "key.pem")


def test_files_that_are_no_keys(tmp_path: Path, keys: tuple[Path, Path], signed: Path) -> None:
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    locked = ed25519.Ed25519PrivateKey.generate().private_bytes(pem, pkcs8, serialization.BestAvailableEncryption(b"x"))
    other = ec.generate_private_key(ec.SECP256R1()).private_bytes(pem, pkcs8, serialization.NoEncryption())
    for content in (b"", b"\xff" * 99, b"-----BEGIN PRIVATE KEY-----\n", locked, other, keys[1].read_bytes()):
        (tmp_path / "k").write_bytes(content)
        with pytest.raises(BuildError, match="is not an Ed25519 private key"):
            gf_tvm.build([small_workload()], "host", out=tmp_path / "a.gfb", sign=tmp_path / "k")
        if content != keys[1].read_bytes():
            with pytest.raises(BundleError, match="is not an Ed25519 public key"):
                gf_tvm.load(signed, trusted=[tmp_path / "k"])
    with pytest.raises(BundleError, match="is not an Ed25519 public key"):
        gf_tvm.load(signed, trusted=[keys[0]])
    for path, reason in ((tmp_path / "none", "No such file"), (Path("/dev/zero"), "it has more than")):
        with pytest.raises(BuildError, match=reason):
            gf_tvm.build([small_workload()], "host", out=tmp_path / "a.gfb", sign=path)
        with pytest.raises(BundleError, match=reason):
            gf_tvm.load(signed, trusted=[path])
    assert not (tmp_path / "a.gfb").exists()


def test_openssls_keys(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl")
    private, public = tmp_path / "a.pem", tmp_path / "a.pub.pem"
    subprocess.run([openssl, "genpkey", "-algorithm", "ed25519", "-out", private], check=True, capture_output=True)
    subprocess.run([openssl, "pkey", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
    manifest = signing.signed({"a": 1}, signing.private_key(private))
    signing.check("x", manifest, signing.public_keys([public]))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = tmp_path / "shapes.json"
    case = {"name": "small", "n": 1, "ci": 8, "co": 8, "h": 8, "w": 8, "kernel": 3, "padding": 1, "patches": [2]}
    shapes.write_text(json.dumps({"cases": [case]}))
    assert cli.main(["build", "--make-key", str(tmp_path / "k.pem")]) == 0
    assert "k.pub.pem: for gf_tvm.load" in capsys.readouterr().out
    assert cli.main(["build", "--make-key", str(tmp_path / "k.pem")]) == 2
    assert "gf-tvm: error: cannot write the key" in capsys.readouterr().err
    command = ["build", "--shapes", str(shapes), "--out", str(tmp_path / "a.gfb"), "--sign"]
    assert cli.main([*command, str(tmp_path / "k.pem")]) == 0
    assert gf_tvm.load(tmp_path / "a.gfb", trusted=[tmp_path / "k.pub.pem"]).workloads
    assert cli.main([*command, str(tmp_path / "k.pub.pem")]) == 2


def test_without_cryptography(signed: Path, keys: tuple[Path, Path]) -> None:
    code = (
        "import sys; sys.modules['cryptography'] = None; import gf_tvm\n"
        "from gf_tvm.errors import GfTvmError\n"
        "gf_tvm.load(sys.argv[1])\n"
        "try:\n    gf_tvm.load(sys.argv[1], trusted=[sys.argv[2]])\n"
        "except GfTvmError as error:\n    print(error)"
    )
    command = [sys.executable, "-c", code, str(signed), str(keys[1])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    assert done.stdout == "signatures need cryptography: pip install 'gf-tvm[sign]'\n"

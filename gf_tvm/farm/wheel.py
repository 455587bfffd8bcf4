"""This installation of gf_tvm as a wheel, to be installed on boards.

A board must run the code that the host runs, whether that came from a package index or is a checkout somebody works
in. So the wheel is made of the imported packages themselves; no build tool and no source tree are needed.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import os
import zipfile
from importlib import metadata
from pathlib import Path

from ..errors import FarmError

#: Where the files lie: in a checkout these packages are folders beside gf_tvm's, in an installation below it.
_PACKAGES = ("gf_tvm", "gf_tvm.schedules", "gf_tvm.runners", "gf_tvm.tuning_logs")
#: Code, the type marker, data and tuning logs; not bytecode, nor what editors leave.
_SUFFIXES = frozenset({".py", ".typed", ".json", ".jsonl"})
#: The earliest date that a zip file can have: the same code gives the same bytes.
_DATE = (1980, 1, 1, 0, 0, 0)


def build_wheel(folder: Path) -> Path:
    """Write the running installation of gf_tvm as a pure-Python wheel into ``folder`` and return its path.

    The same code gives the same bytes. ``folder`` must exist.

    Raises:
        FarmError: gf_tvm was imported from somewhere but is not installed, so its version and what it depends on are
            not known.
        OSError: a file cannot be read or written.
    """
    version, files = _dist_info()
    files.update(_code())
    info = f"gf_tvm-{version}.dist-info"
    record = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in sorted(files.items())]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        # Installers read the wheel from its end, and by custom the .dist-info comes last.
        for name in sorted(files, key=lambda name: (name.startswith(info), name)):
            entry = zipfile.ZipInfo(name, _DATE)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, files[name])
    target = folder / f"gf_tvm-{version}-py3-none-any.whl"
    stage = folder / f".{target.name}.{os.getpid()}.tmp"
    try:
        stage.write_bytes(buffer.getvalue())
        stage.replace(target)
    finally:
        stage.unlink(missing_ok=True)
    return target


def _code() -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise FarmError(f"the package {package} is missing from this installation of gf_tvm; install it again")
        for location in spec.submodule_search_locations:
            for file in Path(location).rglob("*"):
                parts = file.relative_to(location).parts
                if file.suffix in _SUFFIXES and not any(part.startswith(".") for part in parts) and file.is_file():
                    files["/".join([*package.split("."), *parts])] = file.read_bytes()
    return files


def _dist_info() -> tuple[str, dict[str, bytes]]:
    """The version, and the files of the .dist-info folder but for RECORD."""
    found = list(metadata.distributions(name="gf-tvm"))
    # In a checkout, setuptools' working folder may be found first; it lacks the licence and may be old.
    found.sort(key=lambda distribution: distribution.read_text("METADATA") is None)
    for distribution in found:
        text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO")
        if text:
            break
    else:
        raise FarmError("gf_tvm is not installed here, only imported; install it first (pip install -e .)")
    version = distribution.version
    info = f"gf_tvm-{version}.dist-info"
    wheel = "Wheel-Version: 1.0\nGenerator: gf_tvm\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {f"{info}/METADATA": text.encode(), f"{info}/WHEEL": wheel.encode()}
    if points := distribution.read_text("entry_points.txt"):
        files[f"{info}/entry_points.txt"] = points.encode()
    for name in distribution.metadata.get_all("License-File") or []:
        if licence := distribution.read_text(f"licenses/{name}"):
            files[f"{info}/licenses/{name}"] = licence.encode()
    return version, files


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()

"""This installation of gf_tvm, or its part gf_cuda, as a wheel to be installed on boards.

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
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from ..errors import FarmError

#: Where the files lie: in a checkout these packages are folders side by side, in an installation most are in gf_tvm's.
_PACKAGES = ("gf_cuda", "gf_tvm", "gf_tvm.schedules", "gf_tvm.runners", "gf_tvm.tuning_logs")
#: Code, the type marker, data and tuning logs; not bytecode, nor what editors leave.
_SUFFIXES = frozenset({".c", ".html", ".py", ".typed", ".json", ".jsonl"})
#: The earliest date that a zip file can have: the same code gives the same bytes.
_DATE = (1980, 1, 1, 0, 0, 0)

_WHEEL = b"Wheel-Version: 1.0\nGenerator: gf_tvm\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
# No dependencies: PyTorch for a Jetson is no package of an index, and pip would replace it by one that is not for it.
_RUNTIME_METADATA = """\
Metadata-Version: 2.1
Name: gf-cuda
Version: {version}
Summary: Runs gradient filtering kernels that gf-tvm compiled for NVIDIA GPUs
License: Apache-2.0
Requires-Python: >=3.6
Description-Content-Type: text/markdown

Made by gf-tvm for the boards that run its bundles:

    python3 -m gf_cuda check nano.gfb

    import gf_cuda.nn
    library = gf_cuda.load("nano.gfb")
    gf_cuda.nn.filter_model(model, patch=2, last=4, library=library)
"""


def build_wheel(folder: Path) -> Path:
    """Write the running installation of gf_tvm as a pure-Python wheel into ``folder`` and return its path.

    The same code gives the same bytes. ``folder`` must exist.

    Raises:
        FarmError: gf_tvm was imported from somewhere but is not installed, so its version and what it depends on are
            not known.
        OSError: a file cannot be read or written.
    """
    version, files = _dist_info()
    files.update(code_of(_PACKAGES))
    return write_wheel(folder, "gf_tvm", version, files)


def build_runtime_wheel(folder: Path) -> Path:
    """Write a wheel of gf_cuda alone into ``folder`` and return its path.

    It is all that a board with a GPU needs besides its Python (3.6 and newer) and PyTorch to train with a bundle. It
    and the wheel of gf_tvm, which has gf_cuda as well, are not for one environment. ``folder`` must exist.

    Raises:
        FarmError, OSError: as :func:`build_wheel`.
    """
    version, own = _dist_info()
    info = f"gf_cuda-{version}.dist-info"
    files = {name.replace("gf_tvm-", "gf_cuda-", 1): data for name, data in own.items() if "/licenses/" in name}
    files[f"{info}/METADATA"] = _RUNTIME_METADATA.format(version=version).encode()
    files[f"{info}/WHEEL"] = _WHEEL
    files.update(code_of(("gf_cuda",)))
    return write_wheel(folder, "gf_cuda", version, files)


def runtime_name() -> str:
    """The name of :func:`build_runtime_wheel`'s file; pip takes a wheel under no other. Raises FarmError."""
    return f"gf_cuda-{_dist_info()[0]}-py3-none-any.whl"


def write_wheel(folder: Path, package: str, version: str, files: dict[str, bytes]) -> Path:
    """Write a wheel of ``files``, which get their RECORD, into ``folder``. Raises OSError."""
    info = f"{package}-{version}.dist-info"
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
    target = folder / f"{package}-{version}-py3-none-any.whl"
    stage = folder / f".{target.name}.{os.getpid()}.tmp"
    try:
        stage.write_bytes(buffer.getvalue())
        stage.replace(target)
    finally:
        stage.unlink(missing_ok=True)
    return target


def code_of(packages: Iterable[str]) -> dict[str, bytes]:
    """The files of packages, by their places in a wheel. Raises FarmError and OSError."""
    files: dict[str, bytes] = {}
    for package in packages:
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
    files = {f"{info}/METADATA": text.encode(), f"{info}/WHEEL": _WHEEL}
    if points := distribution.read_text("entry_points.txt"):
        files[f"{info}/entry_points.txt"] = points.encode()
    for name in distribution.metadata.get_all("License-File") or []:
        if licence := distribution.read_text(f"licenses/{name}"):
            files[f"{info}/licenses/{name}"] = licence.encode()
    return version, files


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()

"""The file format of bundles: a zip archive of a manifest, the code, and checksums in the manifest.

A CPU bundle holds one shared library. A bundle for GPUs holds the source and the binary of each kernel; its inside is
read by :mod:`gf_cuda.bundle`, which needs nothing of gf_tvm.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gf_cuda.archives import MANIFEST_BYTES, check_sizes, read_entry

from ..errors import BundleError

#: Of bundles for CPUs and for GPUs.
SCHEMA, CUDA_SCHEMA = 1, 2
MANIFEST = "manifest.json"
LIBRARY = "kernels.so"
#: Of a whole bundle; a kernel takes 10 to 50 kB.
MAX_BYTES = 1 << 30


def checksums(files: Mapping[str, bytes]) -> dict[str, str]:
    """SHA-256 by entry, as manifests have them under "sha256"."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def unpack(path: Path, data: bytes) -> tuple[dict[str, Any], bytes | None]:
    """The manifest and the shared library; None for that if it is a bundle for GPUs, which is not checked here.

    Args:
        path: for messages.
        data: the file's bytes.

    Raises:
        BundleError: it is truncated or altered, unpacks to more than bundles do, has entries that it should not have,
            or another schema.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            for name in names:
                if "/" in name or "\\" in name or ".." in name:
                    raise BundleError(f"{path.name}: entry {name!r} would leave the archive; not a gf_tvm bundle")
            check_sizes(archive, len(data))
            manifest = (
                json.loads(read_entry(archive, MANIFEST, MANIFEST_BYTES).decode("utf-8")) if MANIFEST in names else None
            )
            if isinstance(manifest, dict) and manifest.get("schema") == CUDA_SCHEMA:
                return manifest, None
            if sorted(names) != sorted({MANIFEST, LIBRARY}):
                raise BundleError(f"{path.name}: has entries {names}, a bundle has {MANIFEST} and {LIBRARY}")
            library = read_entry(archive, LIBRARY)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError, OSError) as error:
        raise BundleError(f"{path.name}: truncated, damaged or not a gf_tvm bundle ({error})") from None
    if not isinstance(manifest, dict):
        raise BundleError(f"{path.name}: the manifest is not a JSON object")
    if manifest.get("schema") != SCHEMA:
        raise BundleError(
            f"{path.name}: has schema {manifest.get('schema')!r}, this gf_tvm reads {SCHEMA} (CPUs) and "
            f"{CUDA_SCHEMA} (GPUs); build it again"
        )
    if manifest.get("sha256") != checksums({LIBRARY: library}):
        raise BundleError(f"{path.name}: wrong checksum of {LIBRARY}; the file is damaged, copy or build it again")
    return manifest, library


def write(path: Path, manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    """Write the archive and flush it to the disk; no time stamps, so equal kernels give equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {MANIFEST: json.dumps(manifest, indent=1).encode(), **files}.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    with path.open("wb") as file:
        file.write(buffer.getvalue())
        file.flush()
        os.fsync(file.fileno())

"""What a small file unpacks or parses to is bounded before it takes memory: one line, not gigabytes."""

from __future__ import annotations

import io
import json
import resource
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import gf_cuda
import gf_tvm
from gf_cuda.archives import check_sizes, read_entry
from gf_cuda.bundle import read as read_gpu
from gf_cuda.program import load_file
from gf_tvm.errors import GfTvmError
from gf_tvm.evaluation.store import Store
from gf_tvm.files import MAX_JSON, read_limited
from gf_tvm.report.sources import read as read_results
from gf_tvm.shapes import load_cases
from gf_tvm.training import checkpoint, data, feature_files
from gf_tvm.tuning.log import MAX_LINE, _encode, read_log

#: What a bomb unpacks to, and what reading it may take beyond what the process had.
BOMB, ALLOWED = 5 << 28, 500 << 20

ERRORS = (GfTvmError, gf_cuda.GfCudaError, feature_files.Refused, OSError)


def zeros(size: int, prefix: bytes = b"", suffix: bytes = b"") -> Iterator[bytes]:
    yield prefix
    for _ in range(size >> 24):
        yield bytes(1 << 24)
    yield suffix


def pack(path: Path, entries: dict[str, Iterator[bytes] | bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method, compresslevel=1) as archive:
        for name, content in entries.items():
            with archive.open(name, "w", force_zip64=True) as file:
                for part in [content] if isinstance(content, bytes) else content:
                    file.write(part)
    return path


def lying(path: Path, name: str, claimed: int, size: int) -> Path:
    """An archive with one entry of ``size`` zeros whose headers say ``claimed``."""
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    packed = b"".join([*(packer.compress(part) for part in zeros(size)), packer.flush()])
    label = name.encode()
    fields = struct.pack("<HHHHIIIHH", 0, 8, 0, 0, zlib.crc32(b""), len(packed), claimed, len(label), 0)
    local = b"PK\x03\x04" + struct.pack("<H", 20) + fields + label
    central = b"PK\x01\x02" + struct.pack("<HH", 20, 20) + fields + struct.pack("<HHHII", 0, 0, 0, 0, 0) + label
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local) + len(packed), 0)
    path.write_bytes(local + packed + central + end)
    return path


def npy(shape: tuple[int, ...], dtype: type) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape})
    return file.getvalue()


CPU = json.dumps({"schema": 1, "sha256": {}, "kernels": []}).encode()
GPU = json.dumps({"schema": 2, "kind": "cuda", "sha256": {"a.cu": ""}, "kernels": []}).encode()
LABELS = npy((4,), np.int64) + np.arange(4).tobytes()
MANY = (BOMB // 64, 8, 8)
HEADER = _encode(
    {"gf_tvm_log": 1, "device": "d", "target": "t", "key": "k", "definition": "0", "workload": {}, "made": {}}
)
PICKLE = b"\x80\x02r\xff\xff\xff\x3f."  # "the value with number 2**30"


def images(path: Path) -> None:
    data.load_images(str(path), 8)


def train_state(path: Path) -> None:
    assert checkpoint.load(path) is not None


def store(path: Path) -> None:
    place = Store(path.parent)
    path.rename(place._path("x", {}))
    place.get("x", {})


def cifar(path: Path) -> None:
    (path.parent / "test_batch").write_bytes(b"")
    path.rename(path.parent / "batches.meta")
    data.load_images(str(path.parent), 32)


def features(path: Path) -> None:
    feature_files.read(path.with_suffix(".bin"), {}, [])


def results(path: Path) -> None:
    read_results(path)


def hole(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(BOMB)


Write = Callable[[Path], object]


def text(path: Path, part: bytes, size: int, head: bytes = b"", end: bytes = b"") -> None:
    path.write_bytes(head + part * (size // len(part)) + end)


BOMBS: dict[str, tuple[str, Write, Callable[[Path], object]]] = {
    "the kernels of a bundle": (
        "a.gfb",
        lambda path: pack(path, {"manifest.json": CPU, "kernels.so": zeros(BOMB)}),
        gf_tvm.load,
    ),
    "the manifest of a bundle": (
        "a.gfb",
        lambda path: pack(path, {"manifest.json": zeros(BOMB, b'{"schema": 1, "x": "', b'"}'), "kernels.so": b""}),
        gf_tvm.load,
    ),
    "a manifest of many lists": (
        "a.gfb",
        lambda path: pack(path, {"manifest.json": b"[" + b"[]," * (40 << 20) + b"0]", "kernels.so": b""}),
        gf_tvm.load,
    ),
    "a manifest that lies": ("a.gfb", lambda path: lying(path, "manifest.json", 100, BOMB), gf_tvm.load),
    "kernels packed by bzip2": (
        "a.gfb",
        lambda path: pack(path, {"manifest.json": CPU, "kernels.so": zeros(600 << 20)}, zipfile.ZIP_BZIP2),
        gf_tvm.load,
    ),
    "many kernels": (
        "a.gfb",
        lambda path: pack(path, {"manifest.json": GPU, **{f"{n}.cu": zeros(48 << 20) for n in range(27)}}),
        gf_tvm.load,
    ),
    "a bundle for GPUs": ("a.gfb", lambda path: pack(path, {"manifest.json": GPU, "a.cu": zeros(BOMB)}), read_gpu),
    "a program for GPUs": ("a.zip", lambda path: pack(path, {"kernels.cu": zeros(BOMB)}), lambda p: load_file(str(p))),
    "a hole for a bundle": ("a.gfb", hole, gf_tvm.load),
    "images": (
        "a.npz",
        lambda path: pack(path, {"x.npy": zeros(BOMB, npy(MANY, np.uint8)), "y.npy": LABELS}),
        images,
    ),
    "images and as many labels": (
        "a.npz",
        lambda path: pack(
            path, {"x.npy": zeros(BOMB, npy(MANY, np.uint8)), "y.npy": zeros(BOMB, npy(MANY[:1], np.int64))}
        ),
        images,
    ),
    "labels": (
        "a.npz",
        lambda path: pack(
            path,
            {"x.npy": npy((4, 8, 8), np.uint8) + bytes(256), "y.npy": zeros(800 << 20, npy((100 << 20,), np.int64))},
        ),
        images,
    ),
    "images that are not there": (
        "a.npz",
        lambda path: pack(path, {"x.npy": npy((1 << 40, 8, 8), np.uint8), "y.npy": LABELS}),
        images,
    ),
    "a single array": ("a.npz", lambda path: path.write_bytes(npy((1 << 40,), np.uint8)), images),
    "a packed checkpoint": (
        "a.pt",
        lambda path: pack(path, {"a/data.pkl": b"\x80\x02}.", "a/version": b"3\n", "a/data/0": zeros(BOMB)}),
        train_state,
    ),
    "a pickle of CIFAR": ("x", lambda path: path.write_bytes(PICKLE), cifar),
    "a hole for a pickle of CIFAR": ("x", hole, cifar),
    "shapes": ("a.json", lambda path: text(path, b"[],", MAX_JSON + 9, b"[", b"0]"), load_cases),
    "results": ("a.json", lambda path: text(path, b"[],", MAX_JSON + 9, b"[", b"0]"), results),
    "results that never end": ("a.json", lambda path: path.symlink_to("/dev/zero"), results),
    "a part of an evaluation": ("a.json", lambda path: text(path, b"[],", MAX_JSON + 9, b"[", b"0]"), store),
    "features": ("a.json", lambda path: text(path, b"[],", MAX_JSON + 9, b"[", b"0]"), features),
    "a log": ("a.jsonl", hole, read_log),
    "a line of a log": ("a.jsonl", lambda path: text(path, b"[],", 2 * MAX_LINE, HEADER + b"[", b"0]\n"), read_log),
}


#: Where memory that runs out would be one line, too; or only time is taken.
SAYS = {
    "many kernels": "would unpack to",
    "a program for GPUs": "would unpack to",
    "labels": "its labels must have shape (4,)",
    "a packed checkpoint": "its entries are compressed",
    "a pickle of CIFAR": "it numbers a value",
    "a hole for a pickle of CIFAR": "it has more than",
    "a line of a log": "line 2: damaged: it has more than",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_one_line(tmp_path: Path, name: str) -> None:
    suffix, write, read = BOMBS[name]
    path = tmp_path / "folder" / suffix
    path.parent.mkdir()
    write(path)
    assert path.is_symlink() or path.stat().st_blocks < 300 << 11
    # Memory is taken in vain where the limit is on addresses, and then nothing of it is used: a limit beyond what the
    # process has now, so that what it takes is an error here and not the machine's end.
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ALLOWED, before[1]))
    try:
        with pytest.raises(ERRORS) as error:
            read(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(path))
    assert SAYS.get(name, "") in str(error.value)


def test_the_command_line_says_it_in_one_line(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.npz", {"x.npy": zeros(BOMB, npy(MANY, np.uint8)), "y.npy": LABELS})
    command = [sys.executable, "-m", "gf_tvm.runners.cli", "train", "--protocol", "paper", "--model", "resnet18"]
    command += ["--data", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("gf-tvm: error: cannot read ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("size", [0, 1, 70_000, 3_000_000])
def test_what_is_sound_is_read_whole(tmp_path: Path, size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    path = pack(tmp_path / "a.zip", {"a": content, "b": bytes(10 * size)})
    with zipfile.ZipFile(path) as archive:
        check_sizes(archive, path.stat().st_size)
        assert read_entry(archive, "a") == content
        assert read_entry(archive, "b", 10 * size) == bytes(10 * size)
        with pytest.raises(ValueError, match="MB allowed"):
            read_entry(archive, "a", size - 1)
    (tmp_path / "b").write_bytes(content)
    assert read_limited(tmp_path / "b", size) == content
    with pytest.raises(OSError, match="it has more than"):
        read_limited(tmp_path / "b", size - 1)


def test_pictures_and_black_ones_are_read(tmp_path: Path) -> None:
    x = np.zeros((64, 32, 32), np.uint8)
    np.savez_compressed(tmp_path / "a.npz", x=x, y=np.arange(64) % 2)
    assert data.load_images(str(tmp_path / "a.npz"), 8).x.shape == (64, 3, 8, 8)


def test_checkpoints_are_read_as_before(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a.pt", {"state": {"w": torch.arange(9.0)}})
    loaded = checkpoint.load(tmp_path / "a.pt")
    assert loaded is not None
    assert loaded["state"]["w"].tolist() == list(range(9))

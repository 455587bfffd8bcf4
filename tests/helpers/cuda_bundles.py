"""Bundles for the emulated GPU, of kernels written by hand in the plainest CUDA C: one thread a value, no TVM."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gf_cuda.tensors
from gf_cuda import nvrtc
from gf_tvm.core import verify
from gf_tvm.core.workload import Workload

_SOURCE = """
#ifdef HALF
struct T { unsigned short bits; };
__device__ float get(T value) { return gf_cuda_half_value(value.bits); }
__device__ T put(float value) { T made; made.bits = gf_cuda_half_bits(value); return made; }
#else
typedef float T;
__device__ float get(T value) { return value; }
__device__ T put(float value) { return value; }
#endif
#define THREAD int t = blockIdx.x * blockDim.x + threadIdx.x

__device__ int saved_at(int n, int c, int i, int j) {
  return DEPTHWISE ? ((n * CI + c) * PH + i) * PW + j : ((n * PH + i) * PW + j) * CI + c;
}

extern "C" __global__ void PREFIX_pool(const T* x, float* filtered_x) {
  THREAD;
  if (t >= N * CI * PH * PW) return;
  int j = t % PW, i = t / PW % PH, c = t / (PW * PH) % CI, n = t / (PW * PH * CI);
  float sum = 0;
  for (int a = i * WH - TOP_X; a < (i + 1) * WH - TOP_X; ++a)
    for (int b = j * WW - LEFT_X; b < (j + 1) * WW - LEFT_X; ++b)
      if (a >= 0 && a < H && b >= 0 && b < W) sum += get(x[((n * CI + c) * H + a) * W + b]);
  filtered_x[saved_at(n, c, i, j)] = sum;
}

extern "C" __global__ void PREFIX_mean(const T* grad_y, float* g) {
  THREAD;
  if (t >= N * CO * PH * PW) return;
  int j = t % PW, i = t / PW % PH, plane = t / (PW * PH), count = 0;
  float sum = 0;
  for (int a = i * RH - TOP_Y; a < (i + 1) * RH - TOP_Y; ++a)
    for (int b = j * RW - LEFT_Y; b < (j + 1) * RW - LEFT_Y; ++b)
      if (a >= 0 && a < HY && b >= 0 && b < WY) { sum += get(grad_y[(plane * HY + a) * WY + b]); ++count; }
  g[t] = sum / count;
}

extern "C" __global__ void PREFIX_bias(const T* grad_y, T* grad_b) {
  THREAD;
  if (t >= CO) return;
  float sum = 0;
  for (int n = 0; n < N; ++n)
    for (int p = 0; p < HY * WY; ++p) sum += get(grad_y[(n * CO + t) * HY * WY + p]);
  grad_b[t] = put(sum);
}

extern "C" __global__ void PREFIX_input(const float* g, const T* weight, T* grad_x) {
  THREAD;
  if (t >= N * CI * H * W) return;
  int b = t % W + LEFT_X, a = t / W % H + TOP_X, c = t / (W * H) % CI, n = t / (W * H * CI);
  if (a < 0 || a >= PH * WH || b < 0 || b >= PW * WW) return;
  float sum = 0;
  for (int o = c / CIG * COG; o < (c / CIG + 1) * COG; ++o) {
    float taps = 0;
    for (int k = 0; k < KK; ++k) taps += get(weight[(o * CIG + c % CIG) * KK + k]);
    sum += taps * g[((n * CO + o) * PH + a / WH) * PW + b / WW];
  }
  grad_x[t] = put(sum);
}

extern "C" __global__ void PREFIX_weight(const float* g, const float* filtered_x, T* grad_w) {
  THREAD;
  if (t >= CO * CIG) return;
  int o = t / CIG, c = o / COG * CIG + t % CIG;
  float sum = 0;
  for (int n = 0; n < N; ++n)
    for (int i = 0; i < PH; ++i)
      for (int j = 0; j < PW; ++j) sum += g[((n * CO + o) * PH + i) * PW + j] * filtered_x[saved_at(n, c, i, j)];
  for (int k = 0; k < KK; ++k) grad_w[t * KK + k] = put(sum);
}
"""
_THREADS = 64


def entry_of(workload: Workload, arch: str = "sm_53") -> tuple[dict[str, Any], str]:
    """A manifest's entry for a workload, and the source."""
    geometry, dtype = workload.geometry, workload.dtype
    assert not geometry.dilated
    rows, cols = geometry.rows, geometry.cols
    (ph, pw), n = geometry.grid, geometry.n
    symbol = f"gf_{hashlib.sha256(workload.key.encode()).hexdigest()[:16]}"
    constants = {
        "N": n, "CI": geometry.ci, "CO": geometry.co, "CIG": geometry.ci_group, "COG": geometry.co_group,
        "H": geometry.h, "W": geometry.w, "HY": rows.out, "WY": cols.out, "PH": ph, "PW": pw,
        "KK": geometry.kernel[0] * geometry.kernel[1], "RH": geometry.patch[0], "RW": geometry.patch[1],
        "WH": rows.window, "WW": cols.window, "TOP_X": rows.in_offset, "LEFT_X": cols.in_offset,
        "TOP_Y": rows.out_offset, "LEFT_Y": cols.out_offset, "DEPTHWISE": int(geometry.depthwise),
    }  # fmt: skip
    half = "#define HALF\n" if dtype == "float16" else ""
    defines = half + "".join(f"#define {name} ({value})\n" for name, value in constants.items())
    specs = verify.argument_specs(workload)
    at = {spec.name: ["argument", index] for index, spec in enumerate(specs)}
    at["g"] = ["scratch", 256]  # not the first: an offset that is forgotten must show
    launches = []

    def launch(name: str, values: int, *arguments: str) -> None:
        launches.append(
            {
                "function": f"{symbol}_{name}",
                "grid": [-(-values // _THREADS), 1, 1],
                "block": [_THREADS, 1, 1],
                "shared": 0,
                "arguments": [at[argument] for argument in arguments],
            }
        )

    if workload.kernel == "filter_input":
        launch("pool", n * geometry.ci * ph * pw, "x", "filtered_x")
    else:
        launch("mean", n * geometry.co * ph * pw, "grad_y", "g")
        launch("bias", geometry.co, "grad_y", "grad_b")
    if "grad_x" in at:
        launch("input", n * geometry.ci * geometry.h * geometry.w, "g", "weight", "grad_x")
    if "grad_w" in at:
        launch("weight", geometry.co * geometry.ci_group, "g", "filtered_x", "grad_w")
    program = {
        "schema": 1,
        "arch": arch,
        "arguments": [
            {"name": s.name, "dtype": str(s.dtype).removeprefix("torch."), "shape": list(s.shape), "output": s.output}
            for s in specs
        ],
        "scratch_bytes": 0 if workload.kernel == "filter_input" else 256 + 4 * n * geometry.co * ph * pw,
        "launches": launches,
    }
    entry = {
        "key": workload.key,
        "workload": workload.to_dict(),
        "symbol": symbol,
        "schedule": "default",
        "config": None,
        "log": None,
        "program": program,
        "settings": {"covers_input": geometry.covers_input},
    }
    return entry, defines + _SOURCE.replace("PREFIX", symbol)


def write_bundle(
    path: Path, workloads: Iterable[Workload], arch: str = "sm_53", device: str = "jetson-nano", kind: str = "cubin"
) -> Path:
    """Compile with the emulated NVRTC and write the bundle."""
    entries, files = [], {}
    for workload in workloads:
        entry, source = entry_of(workload, arch)
        image, _, _ = nvrtc.compile_source(source, arch, kind=kind)
        files |= {f"{entry['symbol']}.cu": source.encode(), f"{entry['symbol']}.{kind}": image}
        entries.append(entry)
    manifest = {"schema": 2, "kind": "cuda", "device": device, "arch": arch, "target": "", "versions": {"gf_tvm": "0"}}
    return pack(path, {**manifest, "kernels": entries}, files)


def pack(path: Path, manifest: dict[str, Any], files: dict[str, bytes]) -> Path:
    """Write the zip, its checksums made right."""
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", json.dumps({"sha256": sums, **manifest}))
        for name, data in files.items():
            archive.writestr(name, data)
    return path


class CudaOnCpu(gf_cuda.tensors.TorchCuda):
    """CPU tensors pose as those of the emulated GPU, whose memory is the process's own."""

    device_type = "cpu"

    def __init__(self) -> None:
        self.current_stream = 0
        self.is_capturing = False
        self.half = False  # autocast is on
        self.scratch_sizes: list[int] = []

    def ordinal(self, device: torch.device) -> int:
        return device.index or 0

    def stream(self, device: torch.device) -> int:
        return self.current_stream

    def guard(self, device: torch.device) -> AbstractContextManager[None]:
        return nullcontext()

    def capturing(self) -> bool:
        return self.is_capturing

    def autocast_dtype(self, x: Tensor) -> torch.dtype | None:
        return torch.float16 if self.half else None

    def scratch(self, nbytes: int, device: torch.device) -> tuple[Tensor | None, int]:
        self.scratch_sizes.append(nbytes)
        memory = torch.full((nbytes + 256,), 255, dtype=torch.uint8)  # NaN, as float32
        return memory, -(-memory.data_ptr() // 256) * 256


@contextmanager
def cuda_on_cpu() -> Iterator[CudaOnCpu]:
    """Meanwhile CPU tensors go to the emulated GPU."""
    with pytest.MonkeyPatch.context() as patch:
        made = CudaOnCpu()
        patch.setattr(gf_cuda.tensors, "cuda", made)
        patch.setattr("gf_cuda.nn.cuda", made)
        yield made

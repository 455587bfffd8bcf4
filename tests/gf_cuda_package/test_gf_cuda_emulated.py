"""The emulated GPU runs CUDA C: what the tests of everything above it rest on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import emulated_cuda
import numpy as np
import pytest

import gf_cuda

_PRELUDE = """
struct __align__(2) half {
  unsigned short bits;
  __device__ half() {}
  __device__ explicit half(float value) { bits = gf_cuda_half_bits(value); }
  __device__ operator float() const { return gf_cuda_half_value(bits); }
};
struct __align__(8) half4 { half x, y, z, w; };
"""


@pytest.fixture(autouse=True)
def gpu() -> Iterator[emulated_cuda.Emulated]:
    with emulated_cuda.environment() as emulated:
        yield emulated


def launch(
    source: str,
    grid: Sequence[int],
    block: Sequence[int],
    *arrays: np.ndarray,
    shared: int = 0,
    name: str = "main_kernel",
) -> None:
    """Compiles and runs one kernel on NumPy arrays, whose memory is the emulated device's."""
    device = gf_cuda.get_driver().device()
    image, _, _ = gf_cuda.compile_source(source, "sm_53")
    module = device.load_module(image)
    try:
        module.function(name).launch(grid, block, shared, 0, [array.ctypes.data for array in arrays])
        device.synchronize()
    finally:
        module.unload()


def test_matrix_product_through_shared_memory_with_barriers() -> None:
    """In the form that TVM prints: tiles in shared memory, vector loads, a register tile, launch bounds."""
    source = r"""
extern "C" __global__ void __launch_bounds__(64) main_kernel(float* __restrict__ A, float* __restrict__ B, float* __restrict__ C);
extern "C" __global__ void __launch_bounds__(64) main_kernel(float* __restrict__ A, float* __restrict__ B, float* __restrict__ C) {
  alignas(64) float C_local[4];
  __shared__ alignas(64) float A_shared[256];
  alignas(64) __shared__ float B_shared[256];
  *(float4*)(C_local + 0) = make_float4(0.000000e+00f, 0.000000e+00f, 0.000000e+00f, 0.000000e+00f);
  for (int k_0 = 0; k_0 < 3; ++k_0) {
    __syncthreads();
    *(float4*)(A_shared + (((int)threadIdx.x) * 4)) = *(float4*)(A + (((((int)blockIdx.y) * 768) + ((((int)threadIdx.x) >> 2) * 48)) + (k_0 * 16) + ((((int)threadIdx.x) & 3) * 4)));
    *(float4*)(B_shared + (((int)threadIdx.x) * 4)) = *(float4*)(B + ((((k_0 * 16) + (((int)threadIdx.x) >> 2)) * 32) + (((int)blockIdx.x) * 16) + ((((int)threadIdx.x) & 3) * 4)));
    __syncthreads();
    #pragma unroll
    for (int k_1 = 0; k_1 < 16; ++k_1) {
      for (int j = 0; j < 4; ++j) {
        C_local[j] = (C_local[j] + (A_shared[((((int)threadIdx.x) >> 2) * 16) + k_1] * B_shared[(k_1 * 16) + ((((int)threadIdx.x) & 3) * 4) + j]));
      }
    }
  }
  *(float4*)(C + ((((((int)blockIdx.y) * 16) + (((int)threadIdx.x) >> 2)) * 32) + (((int)blockIdx.x) * 16) + ((((int)threadIdx.x) & 3) * 4))) = *(float4*)(C_local + 0);
}
"""  # noqa: E501
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((32, 48), np.float32), rng.standard_normal((48, 32), np.float32)
    c = np.full((32, 32), np.nan, np.float32)
    launch(source, (2, 2, 1), (64, 1, 1), a, b, c)
    np.testing.assert_allclose(c, a.astype(np.float64) @ b, atol=48 * 2**-24 * 16)


_SUM = """
extern "C" __global__ void main_kernel(float* x, float* y) {
  %s
  int i = threadIdx.x + blockDim.x * threadIdx.y;
  red[i] = x[blockIdx.z * 128 + i];
  for (int step = 64; step > 0; step >>= 1) {
    %s
    if (i < step) red[i] += red[i + step];
  }
  if (i == 0) y[blockIdx.z] = red[0];
}
"""


@pytest.mark.parametrize(
    ("declaration", "shared"),
    [
        ("__shared__ float red[128];", 0),
        ("extern __shared__ uchar buf_dyn_shmem[]; float* red = (float*)(buf_dyn_shmem + 64);", 64 + 128 * 4),
        ("extern __shared__ __align__(64) float red[];", 128 * 4),
    ],
)
def test_reduction_in_shared_memory(declaration: str, shared: int) -> None:
    x = np.arange(3 * 128, dtype=np.float32)
    y = np.full(3, np.nan, np.float32)
    source = "typedef unsigned char uchar;" + _SUM % (declaration, "__syncthreads();")
    launch(source, (1, 1, 3), (32, 4, 1), x, y, shared=shared)
    assert y.tolist() == x.reshape(3, 128).sum(1).tolist()


def test_a_forgotten_barrier_shows() -> None:
    x, y = np.ones(128, np.float32), np.full(1, np.nan, np.float32)
    launch(_SUM % ("__shared__ float red[128];", ""), (1, 1, 1), (128, 1, 1), x, y)
    assert y[0] != 128


def test_shared_memory_that_nobody_wrote_shows() -> None:
    """Of an earlier block, too."""
    source = """
extern "C" __global__ void main_kernel(float* y) {
  __shared__ float s[2];
  if (blockIdx.x == 0) s[threadIdx.x] = 1.0f;
  y[blockIdx.x * 2 + threadIdx.x] = s[threadIdx.x];
}"""
    y = np.zeros(4, np.float32)
    launch(source, (2, 1, 1), (2, 1, 1), y)
    assert y[:2].tolist() == [1, 1]
    assert np.isnan(y[2:]).all()


@pytest.mark.parametrize(
    "body",
    [
        "if (threadIdx.x < 16) __syncthreads();",
        "if (threadIdx.x < 16) __syncthreads();\n else __syncthreads();",
    ],
    ids=["some", "others"],
)
def test_threads_that_do_not_meet_at_a_barrier_are_an_error(
    body: str, gpu: emulated_cuda.Emulated, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(gf_cuda.DriverError, match="CUDA_ERROR_LAUNCH_FAILED") as caught:
        launch(f'extern "C" __global__ void main_kernel(float* y) {{ {body} }}', (1, 1, 1), (32, 1, 1), np.zeros(1))
    assert caught.value.sticky
    words = capfd.readouterr().err.splitlines()
    assert words[-2:] == [
        "emulated CUDA: the threads do not meet at the same barriers",
        "emulated CUDA: main_kernel, block (0, 0, 0)",
    ]
    gpu.fault()


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("*(float4*)(y + threadIdx.x) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);", "MISALIGNED_ADDRESS"),
        ("__shared__ float s[4]; s[threadIdx.x] = 1.0f;", "MISALIGNED_ADDRESS"),
        ("if (threadIdx.x == 7) *(float*)(16) = y[0];", "ILLEGAL_ADDRESS"),
    ],
    ids=["vector", "array", "null"],
)
def test_bad_addresses_are_the_errors_of_a_gpu(body: str, name: str, gpu: emulated_cuda.Emulated) -> None:
    source = f'extern "C" __global__ void main_kernel(float* y) {{ {body} }}'
    y = np.zeros(64, np.float32)
    with pytest.raises(gf_cuda.DriverError, match=f"CUDA_ERROR_{name}") as caught:
        launch(source, (1, 1, 1), (8, 1, 1), y[-y.ctypes.data // 4 % 4 :])
    assert caught.value.sticky
    # A process that has made such a mistake is at its end; these tests go on.
    gpu.fault()
    launch(source.replace(body, "y[threadIdx.x] = 2.0f;"), (1, 1, 1), (8, 1, 1), y)
    assert y[:8].tolist() == [2] * 8


def test_indices_and_integers() -> None:
    source = """
extern "C" __global__ void main_kernel(int* y) {
  int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  uint2 pair = make_uint2(((unsigned)thread), 1u);
  int4 v = make_int4(min(((int)pair.x), 5), max(((int)pair.x), 5), ((int)pair.y), block);
  *(int4*)(y + (block * (blockDim.x * blockDim.y * blockDim.z) + thread) * 4) = v;
}"""
    y = np.zeros((2 * 3 * 4, 2 * 3 * 5, 4), np.int32)
    launch(source, (2, 3, 4), (5, 3, 2), y)
    thread = np.arange(30)
    for block in range(24):
        expected = [np.minimum(thread, 5), np.maximum(thread, 5), np.full(30, 1), np.full(30, block)]
        assert (y[block] == np.stack(expected, 1)).all()


def test_float16_is_converted_as_numpy_does() -> None:
    source = (
        _PRELUDE
        + """
extern "C" __global__ void main_kernel(float* __restrict__ x, half* __restrict__ h, float* __restrict__ back) {
  __shared__ half tile[256];
  int i = (int)blockIdx.x * 256 + (int)threadIdx.x * 4;
  float4 v = *(float4*)(x + i);
  half4 q;
  q.x = (half)(v.x); q.y = (half)(v.y); q.z = (half)(v.z); q.w = (half)(v.w);
  *(half4*)(tile + (int)threadIdx.x * 4) = q;
  __syncthreads();
  for (int j = 0; j < 4; ++j) {
    h[i + j] = tile[(int)threadIdx.x * 4 + j];
    back[i + j] = ((float)tile[(int)threadIdx.x * 4 + j]);
  }
}"""
    )
    # All halves, what lies between two of them and near to that, both ends of the range; signs.
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (halves[:-1] + halves[1:]) / 2
    x = np.concatenate([halves, between, np.nextafter(between, np.float32(0)), np.nextafter(between, np.float32(9e9))])
    x = np.concatenate([x, np.float32([65504, 65519.99, 65520, 1e9, np.inf, 1e-30, 0])])
    x = np.concatenate([x, -x, np.zeros(-2 * len(x) % 256, np.float32)])
    h, back = np.full(x.shape, -1, np.float16), np.full(x.shape, np.nan, np.float32)
    launch(source, (len(x) // 256, 1, 1), (64, 1, 1), x, h, back)
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    assert (h.view(np.uint16) == expected.view(np.uint16)).all()
    assert (back.view(np.uint32) == expected.astype(np.float32).view(np.uint32)).all()


def test_all_threads_of_a_large_block_and_the_sizes_of_two_kernels() -> None:
    source = """
extern "C" __global__ void first(float* y) {
  __shared__ float a[12000];
  a[threadIdx.x] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = a[1023 - threadIdx.x];
}
extern "C" __global__ void __launch_bounds__(32) second(float* y) {
  __shared__ float a[8];
  __shared__ int b[2];
  a[threadIdx.x & 7] = 0.0f; b[threadIdx.x & 1] = 3;
  __syncthreads();
  y[threadIdx.x] = a[7 - (threadIdx.x & 7)] + b[1];
}"""
    y = np.zeros(1024, np.float32)
    launch(source, (3, 1, 1), (1024, 1, 1), y, name="first")
    assert y.tolist() == list(range(1023, -1, -1))
    device = gf_cuda.get_driver().device()
    module = device.load_module(gf_cuda.compile_source(source, "sm_53")[0])
    functions = [module.function(name) for name in ("first", "second")]
    sizes = {function.name: (function.shared_bytes, function.max_threads) for function in functions}
    assert sizes == {"first": (48000, 1024), "second": (40, 32)}
    module.unload()

// CUDA C on a CPU: what stands before a kernel's source when the emulated NVRTC compiles it as C++14.
// The emulator runs one block at a time, whose threads are fibers that take turns at barriers.
#pragma once
#define GF_CUDA_EMULATED 1

#include <math.h>
#include <string.h>
#include <stddef.h>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __constant__ const
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// One block at a time: what its threads share may be static. The emulator finds it by its section.
#define __shared__ static __attribute__((section("gf_shared")))

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; };

// What the emulator sets for each thread.
extern "C" {
uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
void* gf_cuda_dynamic_shared;
void (*gf_cuda_barrier)(int line);
}
#define warpSize 32
#define __syncthreads() gf_cuda_barrier(__LINE__)
#define __threadfence()
#define __threadfence_block()

#define GF_VECTOR(type, name, bytes1, bytes2, bytes4)                                              \
  struct __align__(bytes1) name##1 { type x; };                                                    \
  struct __align__(bytes2) name##2 { type x, y; };                                                 \
  struct name##3 { type x, y, z; };                                                                \
  struct __align__(bytes4) name##4 { type x, y, z, w; };                                           \
  inline name##1 make_##name##1(type x) { return {x}; }                                            \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                 \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
#define uint3 gf_vector_uint3
GF_VECTOR(float, float, 4, 8, 16)
GF_VECTOR(double, double, 8, 16, 16)
GF_VECTOR(int, int, 4, 8, 16)
GF_VECTOR(unsigned, uint, 4, 8, 16)
GF_VECTOR(short, short, 2, 4, 8)
GF_VECTOR(unsigned short, ushort, 2, 4, 8)
GF_VECTOR(signed char, char, 1, 2, 4)
GF_VECTOR(unsigned char, uchar, 1, 2, 4)
GF_VECTOR(long, longlong, 8, 16, 16)
GF_VECTOR(unsigned long, ulonglong, 8, 16, 16)
#undef uint3
#undef GF_VECTOR
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline long max(long a, long b) { return a > b ? a : b; }
inline long min(long a, long b) { return a < b ? a : b; }
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
template <class T> inline T __ldg(const T* address) { return *address; }
template <class T> inline T atomicAdd(T* address, T value) { T old = *address; *address += value; return old; }

// float16 as cvt.rn.f16.f32 and cvt.f32.f16 convert it: to the nearest, ties to even; a NaN becomes the one NaN.
inline unsigned short gf_cuda_half_bits(float value) {
  unsigned bits;
  memcpy(&bits, &value, 4);
  unsigned sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return 0x7fff;
  if (size >= 0x477ff000u) return sign | 0x7c00;  // from 65520 on
  if (size < 0x38800000u) {                       // below 2**-14: the last bit of 0.5 is half's smallest step
    float shifted;
    memcpy(&shifted, &size, 4);
    shifted += 0.5f;
    memcpy(&bits, &shifted, 4);
    return sign | (bits - 0x3f000000u);
  }
  size += 0xfffu + (size >> 13 & 1);
  return sign | ((size - 0x38000000u) >> 13);
}

inline float gf_cuda_half_value(unsigned short half) {
  unsigned sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, fraction = half & 0x3ffu, bits;
  float value = fraction * 5.9604644775390625e-8f;  // 2**-24
  if (exponent == 0) return sign ? -value : value;
  bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  memcpy(&value, &bits, 4);
  return value;
}

template <class... T, size_t... I>
inline void gf_cuda_apply(void (*kernel)(T...), void** parameters, std::index_sequence<I...>) {
  kernel(*reinterpret_cast<T*>(parameters[I])...);
}
template <class... T>
inline void gf_cuda_call(void (*kernel)(T...), void** parameters) {
  gf_cuda_apply(kernel, parameters, std::index_sequence_for<T...>());
}

// Behind __shared__, where CUDA takes alignas and the standard does not take it behind "static".
#define alignas(n) __attribute__((aligned(n)))

struct gf_cuda_kernel {
  const char* name;
  void (*call)(void** parameters);
  int bound;  // __launch_bounds__
};

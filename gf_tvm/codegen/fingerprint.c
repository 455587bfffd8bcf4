/* Fingerprints of memory: whether parameters are still those that were packed.
 *
 * A compiled forward pass works on packed copies of frozen parameters. PyTorch counts changes of a tensor, but not those
 * through ``.data`` or another process's shared memory, so what the tensors hold is read again in every step, as fast
 * as memory gives it, in 64 bits a tensor.
 *
 * Compiled into the shared library of every CPU bundle as it is linked; see openmp.c about OpenMP.
 */
#include <stdint.h>
#include <string.h>

typedef uint32_t Lanes __attribute__((vector_size(16)));

enum { CHUNK = 1 << 18, WAYS = 8, LANES = 4 };

__attribute__((weak)) void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
__attribute__((weak)) int omp_get_thread_num(void);
__attribute__((weak)) int omp_get_num_threads(void);

static uint64_t mixed(uint64_t value) {
  value = (value ^ (value >> 31)) * 0x9e3779b97f4a7c15ull;
  return value ^ (value >> 29);
}

/* Addition and exclusive or in turn, and a number that counts: values that change places change the result. */
static uint64_t fingerprint(const char* memory, int64_t bytes, uint64_t seed) {
  Lanes ways[WAYS] = {{1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}};
  Lanes number = {0x9e3779b9u, 0x85ebca6bu, 0xc2b2ae35u, 0x27d4eb2fu};
  int64_t at = 0;
  for (; at + WAYS * 16 <= bytes; at += WAYS * 16) {
    for (int k = 0; k < WAYS; ++k) {
      Lanes data;
      memcpy(&data, memory + at + k * 16, 16);
      ways[k] += data;
      ways[k] = ((ways[k] << 7) | (ways[k] >> 25)) ^ number;
    }
    number += number << 3;
  }
  uint64_t result = mixed(seed + (uint64_t)bytes);
  for (int k = 0; k < WAYS; ++k)
    for (int lane = 0; lane < LANES; ++lane) result = mixed(result + ways[k][lane]);
  for (; at < bytes; ++at) result = mixed(result + (unsigned char)memory[at]);
  return result;
}

typedef struct {
  const char* const* memory;
  const int64_t* bytes;
  int64_t count;
  uint64_t* results;
} Work;

static void share(const Work* work, int64_t part, int64_t parts) {
  int64_t turn = 0;
  for (int64_t k = 0; k < work->count; ++k)
    for (int64_t at = 0; at < work->bytes[k]; at += CHUNK, ++turn) {
      if (turn % parts != part) continue;
      int64_t size = work->bytes[k] - at < CHUNK ? work->bytes[k] - at : CHUNK;
      uint64_t own = fingerprint(work->memory[k] + at, size, (uint64_t)at);
      __atomic_fetch_add(&work->results[k], own, __ATOMIC_RELAXED);
    }
}

static void share_of_thread(void* work) { share((const Work*)work, omp_get_thread_num(), omp_get_num_threads()); }

/* One number for each of ``count`` pieces of memory. */
__attribute__((visibility("default"))) void gf_tvm_fingerprints(const char* const* memory, const int64_t* bytes,
                                                                 int64_t count, uint64_t* results) {
  Work work = {memory, bytes, count, results};
  int64_t all = 0;
  for (int64_t k = 0; k < count; ++k) all += bytes[k], results[k] = 0;
  if (all > 2 * CHUNK && GOMP_parallel && omp_get_thread_num && omp_get_num_threads)
    GOMP_parallel(share_of_thread, &work, 0, 0);
  else
    share(&work, 0, 1);
}

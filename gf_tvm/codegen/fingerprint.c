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

enum { CHUNK = 1 << 18, WAYS = 8, WORD = 8 };

__attribute__((weak)) void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
__attribute__((weak)) int omp_get_thread_num(void);
__attribute__((weak)) int omp_get_num_threads(void);

static uint64_t mixed(uint64_t value) {
  value = (value ^ (value >> 31)) * 0x9e3779b97f4a7c15ull;
  return value ^ (value >> 29);
}

static uint64_t word_at(const char* memory) {
  uint64_t word;
  memcpy(&word, memory, WORD);
  return word;
}

/* Several chains of words, so that one product need not wait for the other. A link is reversible: whatever follows, a
 * changed word changes the result. Sums and rotations alone would not do: a weight that moves among zeros would come
 * out as before. */
static uint64_t fingerprint(const char* memory, int64_t bytes, uint64_t seed) {
  uint64_t ways[WAYS] = {1, 2, 3, 4, 5, 6, 7, 8};
  int64_t at = 0;
  for (; at + WAYS * WORD <= bytes; at += WAYS * WORD)
#pragma GCC unroll 8 /* in registers, which takes half the time */
    for (int k = 0; k < WAYS; ++k) {
      uint64_t sum = ways[k] + word_at(memory + at + k * WORD);
      ways[k] = ((sum << 29) | (sum >> 35)) * 0x9e3779b97f4a7c15ull;
    }
  uint64_t result = mixed(seed + (uint64_t)bytes);
  for (int k = 0; k < WAYS; ++k) result = mixed(result + ways[k]);
  for (; at + WORD <= bytes; at += WORD) result = mixed(result + word_at(memory + at));
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

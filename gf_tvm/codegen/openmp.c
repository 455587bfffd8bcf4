/* Kernels on PyTorch's own threads.
 *
 * A worker of OpenMP spins for some milliseconds after each of PyTorch's operators, in case another one follows. A
 * kernel on a second pool of threads would share its core with that worker: in a training step a call would take up to
 * twice its time. So a bundle brings a replacement for TVM's parallel launch that runs a loop on OpenMP's threads:
 * those that PyTorch has, as many as torch.set_num_threads says, awake already.
 *
 * Compiled into the shared library of every CPU bundle as it is linked. OpenMP's functions are weak: where a process
 * has none (TVM's RPC server on a board) the library loads as well, and TVM's pool stays in use.
 */
#include <stdint.h>

typedef struct {
  void* sync;
  int32_t num_task;
} ParallelGroup; /* TVMParallelGroupEnv of tvm/runtime/c_backend_api.h */

typedef int (*Body)(int task_id, ParallelGroup* group, void* data);

/* Compiled code finds its parallel launch here; TVM's runtime fills it when it loads the library. Kernels without a
 * parallel loop do not define it. */
__attribute__((weak)) int (*__TVMBackendParallelLaunch)(Body body, void* data, int num_task);

/* What compilers call for "#pragma omp parallel"; the runtimes of LLVM and Intel have it too. */
__attribute__((weak)) void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
__attribute__((weak)) int omp_get_thread_num(void);
__attribute__((weak)) int omp_get_num_threads(void);

typedef struct {
  Body body;
  void* data;
  int error;
} Launch;

static void run_task(void* argument) {
  Launch* launch = (Launch*)argument;
  /* A region inside of another one gets fewer threads than were asked for; TVM's loops take any number. */
  ParallelGroup group = {0, omp_get_num_threads()};
  int error = launch->body(omp_get_thread_num(), &group, launch->data);
  if (error) __atomic_store_n(&launch->error, error, __ATOMIC_RELAXED);
}

static int launch_on_openmp(Body body, void* data, int num_task) {
  Launch launch = {body, data, 0};
  GOMP_parallel(run_task, &launch, (unsigned)num_task, 0);
  return launch.error;
}

/* Whether this library's loops run on OpenMP's threads from now on. */
__attribute__((visibility("default"))) int gf_tvm_use_openmp(void) {
  if (!GOMP_parallel || !omp_get_thread_num || !omp_get_num_threads) return 0;
  __TVMBackendParallelLaunch = launch_on_openmp;
  return 1;
}

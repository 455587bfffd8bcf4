/* How much of its memory's time a core hides behind products: what the kernels' limit takes for granted.
 *
 *     gcc -O3 -march=native -pthread benchmarks/overlap.c -o overlap && ./overlap 2
 *
 * Each thread goes through an array in chunks of 512 KiB. A round is STEPS steps of a 12 x 2 tile of AVX-512 registers,
 * out of the first-level cache, during which the next chunk is prefetched line by line, and then the sum of a chunk. The
 * argument is the number of threads. Time without prefetching is products + reading; with it, at best the longer one.
 */
#include <immintrin.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { LINE = 64, CHUNK = 1 << 19, FLOATS = CHUNK / 4, CHUNKS = 384, ROWS = 12, DEPTH = 128, REPEATS = 4, MOST = 64 };
enum hint { NONE, TO_L1, TO_L2, PAST };
static const char *const names[] = {"none", "into L1", "into L2", "past the caches"};

struct job {
    const float *data, *scalars, *vectors;
    int steps;
    enum hint hint;
    double seconds;
    volatile float result;
};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static void ask(const char *line, enum hint hint) {
    if (hint == TO_L1) _mm_prefetch(line, _MM_HINT_T0);
    else if (hint == TO_L2) _mm_prefetch(line, _MM_HINT_T1);
    else if (hint == PAST) _mm_prefetch(line, _MM_HINT_NTA);
}

static __m512 products(const struct job *job, const char *next) {
    const size_t lines = CHUNK / LINE;
    const size_t at_once = job->steps ? (lines + job->steps - 1) / job->steps : 0;
    const size_t every = job->steps > (int)lines ? job->steps / lines : 1;
    __m512 sums[ROWS][2];
    size_t line = 0;
    memset(sums, 0, sizeof sums);
    for (int step = 0; step < job->steps; step++) {
        if (job->hint != NONE && step % every == 0)
            for (size_t k = 0; k < at_once && line < lines; k++) ask(next + LINE * line++, job->hint);
        const float *scalars = job->scalars + step % DEPTH * ROWS, *vectors = job->vectors + step % DEPTH * 32;
        const __m512 first = _mm512_load_ps(vectors), second = _mm512_load_ps(vectors + 16);
        for (int row = 0; row < ROWS; row++) {
            const __m512 scalar = _mm512_set1_ps(scalars[row]);
            sums[row][0] = _mm512_fmadd_ps(scalar, first, sums[row][0]);
            sums[row][1] = _mm512_fmadd_ps(scalar, second, sums[row][1]);
        }
    }
    for (int row = 1; row < ROWS; row++)
        for (int v = 0; v < 2; v++) sums[0][v] = _mm512_add_ps(sums[0][v], sums[row][v]);
    return _mm512_add_ps(sums[0][0], sums[0][1]);
}

static void *run(void *argument) {
    struct job *job = argument;
    __m512 total[4];
    memset(total, 0, sizeof total);
    const double start = now();
    for (int chunk = 0; chunk + 1 < CHUNKS; chunk++) {
        const float *data = job->data + (size_t)chunk * FLOATS;
        total[0] = _mm512_add_ps(total[0], products(job, (const char *)(data + FLOATS)));
        for (int k = 0; k < FLOATS; k += 64)
            for (int v = 0; v < 4; v++) total[v] = _mm512_add_ps(total[v], _mm512_load_ps(data + k + 16 * v));
    }
    job->seconds = now() - start;
    job->result = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(total[0], total[1]), _mm512_add_ps(total[2], total[3])));
    return NULL;
}

static float *filled(size_t count, float value) {
    float *memory = aligned_alloc(LINE, count * sizeof *memory);
    if (memory == NULL) exit(1);
    for (size_t k = 0; k < count; k++) memory[k] = value;
    return memory;
}

int main(int argc, char **argv) {
    const int threads = argc > 1 ? atoi(argv[1]) : 1, steps[] = {0, 2000, 4000, 8000, 16000};
    if (threads < 1 || threads > MOST) {
        fprintf(stderr, "threads must be 1 to %d\n", MOST);
        return 2;
    }
    struct job jobs[MOST];
    pthread_t handles[MOST];
    for (int t = 0; t < threads; t++)
        jobs[t] = (struct job){.data = filled((size_t)CHUNKS * FLOATS, 1e-9f),
                               .scalars = filled(DEPTH * ROWS, 1e-9f),
                               .vectors = filled(DEPTH * 32, 1e-9f)};
    for (size_t s = 0; s < sizeof steps / sizeof *steps; s++)
        for (enum hint hint = NONE; hint <= (steps[s] ? PAST : NONE); hint++) {
            double best = 1e9;
            for (int repeat = 0; repeat < REPEATS; repeat++) {
                double longest = 0;
                for (int t = 0; t < threads; t++) {
                    jobs[t].steps = steps[s], jobs[t].hint = hint;
                    if (pthread_create(handles + t, NULL, run, jobs + t)) return 1;
                }
                for (int t = 0; t < threads; t++) {
                    pthread_join(handles[t], NULL);
                    if (jobs[t].seconds > longest) longest = jobs[t].seconds;
                }
                if (longest < best) best = longest;
            }
            const double round = best / (CHUNKS - 1);
            printf("%5d steps, prefetch %-15s: %5.2f us a round, %4.1f GB/s in all\n", steps[s], names[hint],
                   round * 1e6, threads * CHUNK / round / 1e9);
        }
    return 0;
}

/* Read bandwidth of this machine, on its own: what the package's probe is held against.
 *
 *     cc -O3 -pthread benchmarks/probe.c -o probe && ./probe [THREADS] [SECONDS] [MIB]
 *
 * Memory in huge pages where they can be had, every page written first; each thread sums its share, whole 64-byte
 * lines at a time, over and over; the sums are printed so that no read can be left out. Plain loads, loads that are
 * prefetched, those that are prefetched twice, and these in two streams side by side take turns of a fifth of a second;
 * the line gives the best median of the four, in GB/s of 1e9 bytes.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { MAX_THREADS = 256, MAX_TURNS = 1000, PIECE = 1 << 20, HUGE_PAGE = 2 << 20 };

/* Streams, and bytes that a load is prefetched early, into the second level of caches and into the first; 0: not. */
typedef struct {
  size_t streams, far, near;
} Mode;
enum { N_MODES = 4 };
static const Mode MODES[N_MODES] = {{1, 0, 0}, {1, 0, 4096}, {1, 4096, 2048}, {2, 3072, 1536}};

/* Eight words of one cache line; the compiler turns the arithmetic into vector instructions. */
typedef uint64_t Line __attribute__((vector_size(64)));

typedef struct {
  const Line *begin;
  size_t lines;
  Mode mode;
  double seconds;
  double rate; /* bytes per second */
  uint64_t sum;
} Share;

static pthread_barrier_t start;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#if defined(__x86_64__) && defined(__GNUC__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif

CLONES static uint64_t sum_lines(const Line *line, size_t n, Mode mode) {
  Line a = {0}, b = {0}, c = {0}, d = {0};
  const size_t stream = n / mode.streams;
  for (size_t i = 0; i + 4 <= stream; i += 4) {
    for (size_t s = 0; s < mode.streams; ++s) {
      const Line *at = line + s * stream + i;
      for (int j = 0; mode.far && j < 4; ++j) __builtin_prefetch((const char *)(at + j) + mode.far, 0, 2);
      for (int j = 0; mode.near && j < 4; ++j) __builtin_prefetch((const char *)(at + j) + mode.near, 0, 3);
      a += at[0], b += at[1], c += at[2], d += at[3];
    }
  }
  a += b + c + d;
  uint64_t total = 0;
  for (int j = 0; j < 8; ++j) total += a[j];
  return total;
}

static void *run(void *argument) {
  Share *share = argument;
  const size_t piece = PIECE / sizeof(Line);
  size_t done = 0;
  uint64_t sum = 0;
  pthread_barrier_wait(&start);
  const double begin = now();
  double passed = 0;
  while (passed < share->seconds) {
    for (size_t at = 0; at < share->lines && passed < share->seconds; at += piece) {
      const size_t n = share->lines - at < piece ? share->lines - at : piece;
      sum += sum_lines(share->begin + at, n, share->mode);
      done += n;
      passed = now() - begin;
    }
  }
  share->rate = (double)done * sizeof(Line) / passed;
  share->sum = sum;
  return NULL;
}

static double turn(const Line *lines, size_t n_lines, int n_threads, Mode mode, double seconds, uint64_t *sum) {
  static Share shares[MAX_THREADS];
  pthread_t threads[MAX_THREADS];
  const size_t each = n_lines / (size_t)n_threads / 4 * 4;
  pthread_barrier_init(&start, NULL, (unsigned)n_threads);
  for (int t = 0; t < n_threads; ++t) {
    shares[t] = (Share){lines + (size_t)t * each, each, mode, seconds, 0, 0};
    if (t && pthread_create(&threads[t], NULL, run, &shares[t])) {
      perror("pthread_create");
      exit(1);
    }
  }
  run(&shares[0]);
  double rate = shares[0].rate;
  *sum += shares[0].sum;
  for (int t = 1; t < n_threads; ++t) {
    pthread_join(threads[t], NULL);
    rate += shares[t].rate;
    *sum += shares[t].sum;
  }
  pthread_barrier_destroy(&start);
  return rate / 1e9;
}

static int ascending(const void *a, const void *b) {
  const double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

int main(int argc, char **argv) {
  const int n_threads = argc > 1 ? atoi(argv[1]) : (int)sysconf(_SC_NPROCESSORS_ONLN);
  const double seconds = argc > 2 ? atof(argv[2]) : 4;
  const long mib = argc > 3 ? atol(argv[3]) : 1024;
  if (n_threads < 1 || n_threads > MAX_THREADS || !(seconds > 0) || mib < n_threads) {
    fprintf(stderr, "usage: probe [THREADS 1..%d] [SECONDS] [MIB]\n", MAX_THREADS);
    return 2;
  }
  const size_t n_bytes = (size_t)mib << 20;
  char *memory = mmap(NULL, n_bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    perror("mmap");
    return 1;
  }
  char *begin = memory + (HUGE_PAGE - (uintptr_t)memory % HUGE_PAGE) % HUGE_PAGE;
#ifdef MADV_HUGEPAGE
  madvise(begin, n_bytes, MADV_HUGEPAGE);
#endif
  uint64_t *words = (uint64_t *)begin;
  for (size_t i = 0; i < n_bytes / 8; ++i) words[i] = i * 0x9E3779B97F4A7C15u;

  static double rates[N_MODES][MAX_TURNS];
  int n_turns = (int)(seconds / 0.2 / N_MODES);
  n_turns = n_turns < 1 ? 1 : n_turns > MAX_TURNS ? MAX_TURNS : n_turns;
  uint64_t sum = 0;
  for (int i = 0; i < n_turns; ++i) {
    for (int mode = 0; mode < N_MODES; ++mode) {
      rates[mode][i] = turn((const Line *)begin, n_bytes / sizeof(Line), n_threads, MODES[mode], 0.2, &sum);
    }
  }
  double medians[N_MODES], best = 0;
  for (int mode = 0; mode < N_MODES; ++mode) {
    qsort(rates[mode], (size_t)n_turns, sizeof(double), ascending);
    medians[mode] = rates[mode][n_turns / 2];
    if (medians[mode] > best) best = medians[mode];
  }
  printf("%.2f GB/s (plain %.2f, prefetched %.2f, twice %.2f, in two streams %.2f), %d threads, %ld MiB, sum %016llx\n",
         best, medians[0], medians[1], medians[2], medians[3], n_threads, mib, (unsigned long long)sum);
  return 0;
}

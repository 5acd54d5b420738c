#include "probe.h"

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace flashformer {

double read_bandwidth(const char* begin, int64_t n_bytes, int n_threads, const Reading& how, double min_seconds,
                      SumOf sum) {
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kPiece = 1 << 20;
  const int64_t share = n_bytes / n_threads / 512 * 512;
  std::atomic<int> ready{0};
  std::atomic<uint64_t> used{0};  // the result, so that no read is optimised away
  std::vector<double> rates(static_cast<std::size_t>(n_threads));
  auto read = [&](int t) {
    const char* mine = begin + t * share;
    uint64_t total = 0;
    int64_t done = 0;
    ready.fetch_add(1);
    while (ready.load() < n_threads) std::this_thread::yield();
    const auto start = Clock::now();
    double seconds = 0;
    while (seconds < min_seconds) {
      for (int64_t at = 0; at < share && seconds < min_seconds; at += kPiece) {
        const int64_t n = share - at < kPiece ? share - at : kPiece;
        total += sum(mine + at, n, how);
        done += n;
        seconds = std::chrono::duration<double>(Clock::now() - start).count();
      }
    }
    used.fetch_add(total);
    rates[static_cast<std::size_t>(t)] = static_cast<double>(done) / seconds / 1e9;
  };
  if (share == 0) return 0;
  std::vector<std::jthread> threads;
  try {
    for (int t = 1; t < n_threads; ++t) threads.emplace_back(read, t);
  } catch (...) {
    ready.store(n_threads);  // those that were started wait for nobody
    throw;
  }
  read(0);
  threads.clear();  // joins
  double rate = used.load() == 0x5EED ? 1e-9 : 0;
  for (double r : rates) rate += r;
  return rate;
}

}  // namespace flashformer

// The thread team: persistent workers that meet at one arrival counter. Worker 0 is the caller.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "simd/thread.h"

namespace flashformer {

// A 32-bit count that only grows (and wraps); waiters spin, then sleep in the kernel.
class alignas(64) Counter {
 public:
  // Tests and every run begin just below the wrap.
  static constexpr uint32_t kStart = 0xFFFFFF00u;

  uint32_t load() const { return value_.load(std::memory_order_acquire); }
  void add_one();
  void wake_all();

  // Waits until the count has reached `target`, in the signed sense. While spinning, calls idle() between looks.
  // false: `give_up` was set, or nothing arrived during `kLimitSlices` sleeps of 100 ms.
  template <class Idle>
  bool wait(uint32_t target, uint32_t spins, const std::atomic<bool>& give_up, Idle idle) {
    for (uint32_t i = 0; i < spins; ++i) {
      if (reached(target)) return true;
      idle();
      pause();
    }
    return sleep(target, give_up, kLimitSlices);
  }
  // As above without a limit: for workers between forwards.
  bool wait_idle(uint32_t target, uint32_t spins, const std::atomic<bool>& give_up);

 private:
  static constexpr int64_t kLimitSlices = 600;  // 60 s without an arrival; a stopped process does not use it up

  bool reached(uint32_t target) const { return static_cast<int32_t>(load() - target) >= 0; }
  bool sleep(uint32_t target, const std::atomic<bool>& give_up, int64_t limit);  // slices; negative: none

  std::atomic<uint32_t> value_{kStart};
  alignas(64) std::atomic<uint32_t> sleepers_{0};
};

// What a worker was waiting for when the team gave up.
struct Stall {
  int64_t worker, phase;
  uint32_t expected, seen;  // arrivals since the start of the forward
};

class Team {
 public:
  // cpus: where helper threads are pinned, by worker; the caller is moved to the first, but not pinned. Empty: nowhere.
  // work(worker) runs in every worker per run().
  Team(int n_workers, uint32_t spins, const std::vector<int>& cpus, std::function<void(int)> work);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // Starts all workers and works as worker 0. Returns when worker 0's work has returned; it is up to the work to wait
  // for the others. No thread of the team is running its work when none is inside run().
  void run();
  bool belongs_to_this_process() const;

  // The arrival counter. A forward counts from its base.
  void arrive() { arrivals_.add_one(); }
  template <class Idle>
  bool wait_arrivals(uint32_t count, Idle idle) {
    return arrivals_.wait(base_ + count, spins_, broken_, idle);
  }
  void begin_forward() { base_ = arrivals_.load(); }

  void give_up(const Stall& stall);
  bool broken() const { return broken_.load(std::memory_order_acquire); }
  const Stall& stall() const { return stall_; }
  uint32_t seen() const { return arrivals_.load() - base_; }

 private:
  void loop(int worker, int cpu);
  void move_caller() const;
  void end_threads();

  const int n_workers_;
  const uint32_t spins_;
  const int process_;
  const int caller_cpu_;  // -1: wherever the caller is
  std::function<void(int)> work_;
  Counter jobs_, arrivals_;
  uint32_t base_ = Counter::kStart;
  std::atomic<bool> stop_{false}, broken_{false};
  std::mutex stall_lock_;
  Stall stall_{};
  std::vector<std::thread> threads_;
};

}  // namespace flashformer

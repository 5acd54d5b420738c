#include "team.h"

#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>

namespace flashformer {

namespace {

constexpr int64_t kSliceNs = 100'000'000;

// Sleeps while *value == seen; true once a whole slice has passed. A signal ends the sleep early.
bool futex_wait(std::atomic<uint32_t>* value, uint32_t seen) {
  timespec slice{0, kSliceNs};
  const auto* word = reinterpret_cast<uint32_t*>(value);
  return syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, &slice, nullptr, 0) != 0 && errno == ETIMEDOUT;
}

void futex_wake_all(std::atomic<uint32_t>* value) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(value), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}

}  // namespace

// The increment and the look at sleepers_ are sequentially consistent, as are a sleeper's entry into sleepers_ and its
// look at value_: one of the two sees the other, so no wake-up is lost.
void Counter::add_one() {
  value_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) != 0) futex_wake_all(&value_);
}

void Counter::wake_all() { futex_wake_all(&value_); }

bool Counter::sleep(uint32_t target, const std::atomic<bool>& give_up, int64_t limit) {
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  bool done = false;
  uint32_t last = value_.load(std::memory_order_seq_cst);
  for (int64_t slices = 0; slices != limit && !give_up.load(std::memory_order_acquire);) {
    const uint32_t seen = value_.load(std::memory_order_seq_cst);
    done = static_cast<int32_t>(seen - target) >= 0;
    if (done) break;
    if (seen != last) slices = 0;
    last = seen;
    if (futex_wait(&value_, seen)) ++slices;
  }
  sleepers_.fetch_sub(1, std::memory_order_seq_cst);
  return done;
}

bool Counter::wait_idle(uint32_t target, uint32_t spins, const std::atomic<bool>& give_up) {
  for (uint32_t i = 0; i < spins; ++i) {
    if (reached(target)) return true;
    if (give_up.load(std::memory_order_relaxed)) return false;
    pause();
  }
  return sleep(target, give_up, -1);
}

Team::Team(int n_workers, uint32_t spins, const std::vector<int>& cpus, std::function<void(int)> work)
    : n_workers_(n_workers),
      spins_(spins),
      process_(getpid()),
      caller_cpu_(cpus.empty() ? -1 : cpus[0]),
      work_(std::move(work)) {
  sigset_t helpers, before;  // signals belong to the caller's threads, but a crash to the thread that crashes
  sigfillset(&helpers);
  for (int crash : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&helpers, crash);
  pthread_sigmask(SIG_SETMASK, &helpers, &before);
  try {
    for (int w = 1; w < n_workers; ++w) {
      const int cpu = static_cast<std::size_t>(w) < cpus.size() ? cpus[static_cast<std::size_t>(w)] : -1;
      threads_.emplace_back([this, w, cpu] { loop(w, cpu); });
    }
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    end_threads();
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Team::~Team() {
  if (belongs_to_this_process()) {
    end_threads();
  } else {
    // A forked child has these handles but not the threads, and the memory they name may be another thread's by now.
    new std::vector<std::thread>(std::move(threads_));
  }
}

void Team::end_threads() {
  stop_.store(true, std::memory_order_seq_cst);
  jobs_.wake_all();
  for (std::thread& t : threads_) t.join();
}

bool Team::belongs_to_this_process() const { return getpid() == process_; }

void Team::loop(int worker, int cpu) {
  if (cpu >= 0) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    sched_setaffinity(0, sizeof set, &set);  // not allowed: the thread runs where it may
  }
  for (uint32_t job = Counter::kStart + 1; jobs_.wait_idle(job, spins_, stop_); ++job) work_(worker);
}

// A caller on a helper's CPU would halve both. It is moved away and its mask restored, so that its owner's choice
// stays.
void Team::move_caller() const {
  if (caller_cpu_ < 0 || sched_getcpu() == caller_cpu_) return;
  cpu_set_t before, there;
  CPU_ZERO(&there);
  CPU_SET(caller_cpu_, &there);
  if (sched_getaffinity(0, sizeof before, &before) != 0 || !CPU_ISSET(caller_cpu_, &before)) return;
  if (sched_setaffinity(0, sizeof there, &there) == 0) sched_setaffinity(0, sizeof before, &before);
}

void Team::run() {
  move_caller();
  begin_forward();
  if (n_workers_ > 1) jobs_.add_one();
  work_(0);
}

void Team::give_up(const Stall& stall) {
  {
    std::lock_guard<std::mutex> first(stall_lock_);
    if (broken_.load(std::memory_order_relaxed)) return;
    stall_ = stall;
    broken_.store(true, std::memory_order_release);
  }
  arrivals_.wake_all();
}

}  // namespace flashformer

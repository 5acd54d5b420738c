// The CPU kernel: a Program as flat arrays, its memory, and a team that runs one forward per call.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "forward.h"
#include "region.h"
#include "team.h"

namespace flashformer {

struct KernelArrays {  // copied
  Model model;
  std::vector<Phase> phases;
  std::vector<Span> schedule;
  std::vector<TapeItem> tapes;
  std::vector<int64_t> tape_begin;
};

struct KernelOptions {
  uint32_t spins;         // looks at the counter before a waiter sleeps
  std::vector<int> cpus;  // see Team
  uint64_t delay_seed;    // 0: no delays
  int64_t log_capacity;   // entries per worker; 0: not recording
  int64_t n_adjustments;  // length of the adjust columns
  Asks asks;
};

enum class Outcome { kDone, kBadRow, kNotFinite, kStalled, kForked, kBusy };

struct Result {
  Outcome outcome;
  int64_t detail;  // kBadRow: the row; kNotFinite: the place, see forward.h
};

class Kernel {
 public:
  Kernel(KernelArrays arrays, const PhaseTable& table, const KernelOptions& options, char* weights, char* kv,
         char* work);

  // Runs the first n_rows of `rows`. The rows are checked here whatever the caller did.
  Result forward(const RowArrays& rows, int64_t n_rows);

  const Stall& stall() const { return team_.stall(); }
  // What worker w did in the forwards since the log was last cleared.
  const Log& log(int worker) const { return logs_[static_cast<std::size_t>(worker)]; }
  void clear_logs();

  // From now on every forward notes when each worker entered a phase, its wait over, and when it left it.
  void keep_times();
  void forget_times() { times_.clear(); }
  // Of the last forward, ns of the monotonic clock: (n_workers, n_phases, 2), 0 for phases that were not run; then when
  // the forward began and ended. Empty unless they are kept.
  const std::vector<int64_t>& times() const { return times_; }

 private:
  Result checked_forward(const RowArrays& rows, int64_t n_rows);
  int64_t find_bad_row(const RowArrays& rows, int64_t n_rows) const;
  bool can_sample(const RowArrays& rows, int64_t r) const;
  void place_rows(const RowArrays& rows, int64_t n_rows);
  void work(int worker);

  std::atomic_flag busy_;  // a forward is under way
  KernelArrays arrays_;
  PhaseTable table_;
  int64_t n_adjustments_;
  Forward forward_;
  std::vector<Share> shares_;
  int64_t n_phases_ = 0;  // of the forward under way
  std::vector<std::vector<LogEntry>> log_entries_;
  std::vector<Log> logs_;
  std::vector<int64_t> times_;
  std::vector<Worker> workers_;
  Team team_;
};

}  // namespace flashformer

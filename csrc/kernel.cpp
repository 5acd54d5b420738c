#include "kernel.h"

#include <algorithm>
#include <cfloat>
#include <chrono>

#include "simd/thread.h"

// A test's allocation counter may define this to learn when a forward is under way.
extern "C" void flashformer_in_forward(int entered) __attribute__((weak));

namespace flashformer {

Kernel::Kernel(KernelArrays arrays, const PhaseTable& table, const KernelOptions& options, char* weights, char* kv,
               char* work)
    : arrays_(std::move(arrays)),
      table_(table),
      n_adjustments_(options.n_adjustments),
      forward_{},
      shares_(static_cast<std::size_t>(arrays_.model.n_workers)),
      team_(static_cast<int>(arrays_.model.n_workers), options.spins, options.cpus, [this](int w) { this->work(w); }) {
  forward_.model = arrays_.model;
  forward_.phases = arrays_.phases.data();
  forward_.schedule = arrays_.schedule.data();
  forward_.tapes = arrays_.tapes.data();
  forward_.tape_begin = arrays_.tape_begin.data();
  forward_.weights = weights;
  forward_.kv = kv;
  forward_.work = work;
  forward_.shares = shares_.data();
  forward_.asks = options.asks;
  const std::size_t n = static_cast<std::size_t>(arrays_.model.n_workers);
  log_entries_.resize(n);
  logs_.resize(n);
  workers_.resize(n);
  for (std::size_t w = 0; w < n; ++w) {
    log_entries_[w].resize(static_cast<std::size_t>(options.log_capacity));
    logs_[w] = {log_entries_[w].data(), 0, options.log_capacity};
    workers_[w].forward = &forward_;
    workers_[w].index = static_cast<int64_t>(w);
    workers_[w].log = options.log_capacity > 0 ? &logs_[w] : nullptr;
    workers_[w].delays.state = options.delay_seed ? options.delay_seed * 0x9E3779B97F4A7C15ull + w + 1 : 0;
  }
}

namespace {

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

void Kernel::keep_times() {
  times_.assign(static_cast<std::size_t>(arrays_.model.n_workers * arrays_.model.n_phases * 2 + 2), 0);
}

void Kernel::clear_logs() {
  for (Log& log : logs_) log.size = 0;
}

bool Kernel::can_sample(const RowArrays& rows, int64_t r) const {
  const bool in_range = rows.temperature[r] >= 0 && rows.temperature[r] <= FLT_MAX && rows.choice[r] >= 0 &&
                        rows.top_k[r] >= 0 && rows.top_p[r] > 0 && rows.top_p[r] <= 1 && rows.min_p[r] >= 0 &&
                        rows.min_p[r] <= 1 && 0 <= rows.adjust_begin[r] && rows.adjust_begin[r] <= rows.adjust_end[r] &&
                        rows.adjust_end[r] <= n_adjustments_;
  if (!in_range) return false;
  for (int32_t a = rows.adjust_begin[r]; a < rows.adjust_end[r]; ++a) {
    const bool sound = rows.adjust_token[a] >= 0 && rows.adjust_token[a] < arrays_.model.vocab_size &&
                       rows.adjust_penalty[a] > 0 && rows.adjust_penalty[a] <= FLT_MAX &&
                       rows.adjust_bias[a] >= -FLT_MAX && rows.adjust_bias[a] <= FLT_MAX;
    if (!sound) return false;
  }
  return true;
}

int64_t Kernel::find_bad_row(const RowArrays& rows, int64_t n_rows) const {
  const Model& m = arrays_.model;
  if (n_rows < 1 || n_rows > m.rows) return 0;
  uint32_t slots_seen = 0;
  int64_t wanting = 0, adjusted = 0;  // adjustments of the rows before
  for (int64_t r = 0; r < n_rows; ++r) {
    const int32_t slot = rows.slot[r], pos = rows.pos[r];
    const bool in_range = rows.token[r] >= 0 && rows.token[r] < m.vocab_size && slot >= 0 && slot < m.streams &&
                          pos >= 0 && pos < m.ctx && rows.want[r] >= kWantNothing && rows.want[r] <= kWantLogits;
    if (!in_range) return r;
    if (rows.want[r] != kWantNothing && !can_sample(rows, r)) return r;
    if (rows.want[r] != kWantNothing && rows.adjust_begin[r] < rows.adjust_end[r]) {
      if (rows.adjust_begin[r] < adjusted) return r;  // rows may be at work at once: what they keep must not overlap
      adjusted = rows.adjust_end[r];
    }
    const bool continues = r > 0 && rows.slot[r - 1] == slot;
    if (continues ? pos != rows.pos[r - 1] + 1 : (slots_seen >> slot & 1) != 0) return r;
    slots_seen |= 1u << slot;
    wanting += rows.want[r] != kWantNothing;
    if (wanting > kMaxHeadRows) return r;
  }
  return -1;
}

void Kernel::place_rows(const RowArrays& rows, int64_t n_rows) {
  forward_.row = rows;
  forward_.n_rows = static_cast<int32_t>(n_rows);
  forward_.n_groups = forward_.n_head_rows = 0;
  for (int32_t r = 0; r < n_rows; ++r) {
    if (r == 0 || rows.slot[r] != rows.slot[r - 1]) {
      forward_.groups[forward_.n_groups++] = {r, r, rows.slot[r], rows.pos[r]};
    }
    forward_.groups[forward_.n_groups - 1].row_end = r + 1;
    if (rows.want[r] != kWantNothing) forward_.head_row[forward_.n_head_rows++] = r;
  }
  forward_.first_bad_place = kNoPlace;
  for (Share& share : shares_) share.clear();
  n_phases_ = forward_.n_head_rows ? arrays_.model.n_phases : arrays_.model.head_begin;
}

Result Kernel::forward(const RowArrays& rows, int64_t n_rows) {
  if (!team_.belongs_to_this_process()) return {Outcome::kForked, 0};
  if (busy_.test_and_set(std::memory_order_acquire)) return {Outcome::kBusy, 0};
  const Result result = checked_forward(rows, n_rows);
  busy_.clear(std::memory_order_release);
  return result;
}

Result Kernel::checked_forward(const RowArrays& rows, int64_t n_rows) {
  if (team_.broken()) return {Outcome::kStalled, 0};
  if (const int64_t bad = find_bad_row(rows, n_rows); bad >= 0) return {Outcome::kBadRow, bad};
  if (flashformer_in_forward) flashformer_in_forward(1);
  place_rows(rows, n_rows);
  if (!times_.empty()) {
    std::fill(times_.begin(), times_.end(), 0);
    *(times_.end() - 2) = now_ns();
  }
  team_.run();
  if (!times_.empty()) times_.back() = now_ns();
  if (flashformer_in_forward) flashformer_in_forward(0);
  if (team_.broken()) return {Outcome::kStalled, 0};
  if (forward_.first_bad_place != kNoPlace) return {Outcome::kNotFinite, forward_.first_bad_place};
  return {Outcome::kDone, 0};
}

// One worker's way through the phases: wait, execute units, arrive. All of it comes from the arrays, but for who
// executes a unit that changes hands.
void Kernel::work(int index) {
  const DefaultRounding rounding;
  Worker& worker = workers_[static_cast<std::size_t>(index)];
  worker.tape = forward_.tapes + forward_.tape_begin[index];
  worker.tape_end = forward_.tapes + forward_.tape_begin[index + 1];

  // While it waits, a worker draws the weights that it reads next into its cache.
  constexpr int64_t kAheadBytes = 64 << 10;
  const char* drawn = nullptr;  // the item being drawn, and how far
  int64_t drawn_bytes = 0;
  auto wait = [&](int64_t phase, int64_t count) {
    const char* item = worker.tape_ahead();
    if (item != drawn) drawn = item, drawn_bytes = 0;
    worker.delays.maybe();
    const bool reached = team_.wait_arrivals(static_cast<uint32_t>(count), [&] {
      for (int line = 0; line < 4 && drawn_bytes < kAheadBytes; ++line, drawn_bytes += 64)
        __builtin_prefetch(item + drawn_bytes, 0, 2);
    });
    if (!reached && !team_.broken()) team_.give_up({index, phase, static_cast<uint32_t>(count), team_.seen()});
    return reached;
  };

  const int64_t n_workers = arrays_.model.n_workers;
  int64_t* times = times_.empty() ? nullptr : times_.data() + index * arrays_.model.n_phases * 2;
  const int64_t n_phases = n_phases_;  // read now: with the last arrival the caller may begin the next forward
  for (int64_t p = 0; p < n_phases; ++p) {
    const Phase& phase = forward_.phases[p];
    const Span& span = forward_.schedule[p * n_workers + index];
    worker.phase = p;
    if (span.wait > 0 && !wait(p, span.wait)) return;
    if (worker.log) worker.log->add(static_cast<int32_t>(p), kLogWait, span.wait);
    if (times) times[2 * p] = now_ns();
    table_.functions[phase.op](worker, phase, span);
    if (times) times[2 * p + 1] = now_ns();
    team_.arrive();
  }
  if (index == 0) wait(n_phases, n_workers * n_phases);
}

}  // namespace flashformer

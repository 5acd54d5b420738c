// One forward as plain data: what every phase function sees. Shapes: rows are padded to the strides in Model.
#pragma once

#include <algorithm>
#include <cstdint>

#include "generated/program.h"
#include "share.h"
#include "simd/thread.h"

namespace flashformer {

constexpr int kMaxStreams = 16;
constexpr int64_t kBlockBytes = 8192;  // of a tile: computed while the next such block is prefetched
// Where NaN or Inf was first seen: 2 * layer after its attention, 2 * layer + 1 after its feed-forward, -1 after the
// embedding, 2 * n_layers in the logits.
constexpr int64_t kNoPlace = INT64_MAX;

// A run of rows of one slot: rows [row_begin, row_end), positions from first_pos.
struct Group {
  int32_t row_begin, row_end, slot, first_pos;
};

enum Want : int32_t { kWantNothing = 0, kWantToken = 1, kWantLogits = 2 };

struct Candidate {
  float score;
  int32_t token;
};

// How often what is read in one pass is asked for before, on this CPU. Once: by one row, of codes of 4 bits; a few rows
// of codes ask once at least.
enum class Asks : int32_t { kNever, kOnce, kTwice };

struct Forward {
  Model model;
  const Phase* phases;        // (n_phases)
  const Span* schedule;       // (n_phases, n_workers)
  const TapeItem* tapes;      // worker 0's items, worker 1's, ...
  const int64_t* tape_begin;  // (n_workers + 1)
  char* weights;
  char* kv;
  char* work;     // buffers, rope table, scratch
  Share* shares;  // (n_workers)
  Asks asks;
  RowArrays row;
  int32_t n_rows, n_groups, n_head_rows;
  Group groups[kMaxStreams];
  int32_t head_row[kMaxHeadRows];  // the rows that want something, in order
  int64_t first_bad_place;         // lowered by any worker

  float* residual() const { return reinterpret_cast<float*>(work + model.residual); }  // (rows, d_model_stride)
  float* qkv() const { return reinterpret_cast<float*>(work + model.qkv); }            // (rows, qkv_stride)
  float* hidden() const { return reinterpret_cast<float*>(work + model.hidden); }      // (rows, hidden_stride)
  float* logits() const { return reinterpret_cast<float*>(work + model.logits); }      // (kMaxHeadRows, logits_stride)
  float* branch(int64_t offset) const { return reinterpret_cast<float*>(work + offset); }  // (rows, d_model_stride)
  const float* rope(int64_t offset) const {                                                // (ctx, 2, rotary_dim/2)
    return reinterpret_cast<const float*>(work + offset);
  }
  int32_t* tokens() const { return reinterpret_cast<int32_t*>(work + model.tokens); }
  Candidate* candidates(int64_t worker) const {  // (kMaxHeadRows)
    return reinterpret_cast<Candidate*>(work + model.candidates) + worker * kMaxHeadRows;
  }
  // Attention results of one (row, head): (chunks, partial_stride) values, and (chunks, 2) maximum and sum.
  int64_t partial_index(int64_t row, int64_t head) const { return (row * model.n_heads_max + head) * model.chunks; }
  float* partial_values(int64_t index) const {
    return reinterpret_cast<float*>(work + model.partial) + index * model.partial_stride;
  }
  float* partial_sums(int64_t index) const {
    return partial_values(model.rows * model.n_heads_max * model.chunks) + index * 2;
  }
  const float* vector(int64_t offset) const { return reinterpret_cast<const float*>(weights + offset); }

  void report_bad(int64_t place) {
    int64_t seen = __atomic_load_n(&first_bad_place, __ATOMIC_RELAXED);
    while (place < seen &&
           !__atomic_compare_exchange_n(&first_bad_place, &seen, place, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }
};

// What the recording keeps of a forward: a wait that was passed, or a unit that was executed.
struct LogEntry {
  int32_t phase;
  int32_t kind;  // 0: wait, value = arrivals waited for; 1: unit, value = its index; 2: tape, value = bytes from begin
  int64_t value;
  int64_t begin;  // of a tape item
};
enum LogKind : int32_t { kLogWait = 0, kLogUnit = 1, kLogTape = 2 };

struct Log {
  LogEntry* entries;
  int64_t size, capacity;

  void add(int32_t phase, int32_t kind, int64_t value, int64_t begin = 0) {
    if (size < capacity) entries[size] = {phase, kind, value, begin};
    ++size;  // beyond capacity: the reader sees that entries are missing
  }
};

// Random stalls, to shake out orders that rarely happen.
struct Delays {
  uint64_t state;  // 0: none

  void maybe() {
    if (state == 0) return;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    if ((state & 7) == 0) {
      for (uint64_t i = state >> 8 & 0xFFF; i > 0; --i) pause();
    }
  }
};

// A worker on its way through one forward.
struct Worker {
  Forward* forward;
  int64_t index;
  int64_t phase;         // index of the phase being executed
  const TapeItem* tape;  // the next item of this worker's tape
  const TapeItem* tape_end;
  Log* log;  // nullptr: not recording
  Delays delays;

  char* scratch() const { return forward->work + forward->model.scratch + index * forward->model.scratch_bytes; }
  // The input of a product, (rows, input_stride) of 2- or 4-byte elements.
  template <class T>
  T* input() const {
    return reinterpret_cast<T*>(scratch());
  }
  // Sums of one tile, (rows, 64), or of several tiles of one row, which run on into scores.
  float* sums() const {
    return reinterpret_cast<float*>(scratch()) + forward->model.rows * forward->model.input_stride;
  }
  // Scores of attention, (kScoreRows, kKeyChunk).
  float* scores() const { return sums() + forward->model.rows * 64; }
  // A row of the residual with its fold, (d_model_stride).
  float* folded() const { return scores() + kScoreRows * kKeyChunk; }
  // Heads as attention takes them, (kScoreRows, partial_stride).
  float* heads() const { return folded() + forward->model.d_model_stride; }
  // Factors of norms, (rows, 2).
  float* scales() const { return heads() + kScoreRows * forward->model.partial_stride; }
  // Of quantized inputs: scales and sums of groups, (rows, group_stride).
  float* group_scales() const { return scales() + forward->model.rows * 2; }
  int32_t* group_sums() const {
    return reinterpret_cast<int32_t*>(group_scales() + forward->model.rows * forward->model.group_stride);
  }

  void begin_unit(int64_t unit) {
    delays.maybe();
    if (log) log->add(static_cast<int32_t>(phase), kLogUnit, unit);
  }
  // Calls each(owner, i, n) for units of this phase until nobody has any: n from the i-th on of those dealt to `owner`,
  // of n_units(owner). n is `most`, or less where fewer are left.
  template <class Count, class Each>
  void each_unit(Count n_units, int64_t most, Each each) {
    Share& own = forward->shares[index];
    Dealt mine = {index, 0, n_units(index)};
    const auto take = [&](Dealt& units) {
      if (forward->model.shared) return own.take_first(phase, mine, most, units) || take_over(n_units, most, units);
      units = {index, mine.begin, std::min(mine.begin + most, mine.end)};
      mine.begin = units.end;
      return units.begin < units.end;
    };
    for (Dealt units; take(units);) each(units.owner, units.begin, units.end - units.begin);
  }
  // Half of what the worker with most left has becomes this one's, which has nothing left: `most` units or fewer to
  // execute at once, so that none goes from hand to hand, and the rest. false: nobody has any.
  template <class Count>
  bool take_over(Count n_units, int64_t most, Dealt& units) {
    Share* shares = forward->shares;
    while (true) {
      Dealt from = {0, 0, 0};
      int64_t has = 0;
      for (int64_t w = 0; w < forward->model.n_workers; ++w) {
        const Dealt dealt = {w, 0, n_units(w)};
        const int64_t left = shares[w].left(phase, dealt);
        if (left > has) has = left, from = dealt;
      }
      if (has == 0) return false;
      if (Dealt half; shares[from.owner].take_half(phase, from, half)) {
        units = {half.owner, half.begin, std::min(half.begin + most, half.end)};
        shares[index].put(phase, {half.owner, units.end, half.end});
        return true;
      }
    }
  }
  const Span& span_of(int64_t w) const { return forward->schedule[phase * forward->model.n_workers + w]; }
  // The worker's byte range of this phase.
  const char* take_tape_item() {
    const TapeItem& item = *tape++;
    if (log) log->add(static_cast<int32_t>(phase), kLogTape, item.end - item.begin, item.begin);
    return forward->weights + item.begin;
  }
  // Where this worker reads next, after the item it is in; the start of the tape once that was the last.
  const char* tape_ahead() const {
    const TapeItem* first = forward->tapes + forward->tape_begin[index];
    if (first == tape_end) return forward->weights;  // a worker without tiles
    return forward->weights + (tape < tape_end ? tape : first)->begin;
  }
};

using PhaseFunction = void (*)(Worker&, const Phase&, const Span&);

// The phase functions of one instruction set, for one weight format, KV format and width of activations; by Op.
struct PhaseTable {
  PhaseFunction functions[8];
};

}  // namespace flashformer

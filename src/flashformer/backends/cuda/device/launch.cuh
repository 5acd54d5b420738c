// The kernel's argument: where everything lies and which rows are computed. Passed by value, constant during the
// launch.
//
// The host fills it as a record of the same layout (launch.py); offsets are asserted below. Pointers are device
// addresses. Arrays of kMaxRows hold one entry per row, but groups one per run of rows and head_row one per row that
// wants something, in order.
#pragma once

#include "program.cuh"
#include "ptx.cuh"
#include "specialization.h"

namespace flashformer {

constexpr u32 kMaxRows = 16;

// Records in use are copied to the end of shared memory: of the L1 cache nothing is left after an acquire, so their
// first use in every phase would be a way to L2 and back, one after another.
constexpr u32 kSmemRecords = kSmemSmall + kSmallBytes - 784;
constexpr u32 kSmemModel = kSmemRecords;      // Model,
constexpr u32 kSmemPhase = kSmemModel + 288;  // Phase and
constexpr u32 kSmemSpan = kSmemPhase + 336;   // Span of the phase that is executed,
constexpr u32 kSmemAhead = kSmemSpan + 32;    // second half of the Span of the next one and first 16 bytes of the Phase
                                              // after that, in turns of two,
constexpr u32 kSmemTokens = kSmemAhead + 64;  // (kMaxRows) i32, the rows' tokens; -1 where there is none to go on with
static_assert(sizeof(Model) <= 288 && sizeof(Phase) == 336 && sizeof(Span) == 32 && kSmemPhase % 16 == 0);
static_assert(kSmemTokens + 4 * kMaxRows == kSmemSmall + kSmallBytes);

constexpr f32 kLargestF32 = 3.402823466e+38f;

enum Want : i32 { kWantNothing = 0, kWantToken = 1, kWantLogits = 2 };

// The best token of a block for one row; token -1: none.
struct alignas(8) Candidate {
  f32 score;
  i32 token;
};

// Words of the report region. A launch that was aborted wrote 1..5 once; kReportBad + block holds 2 + the first place
// where the block saw NaN or Inf, 0 if nowhere. Places: -1 after the embedding, 2 * layer after its attention,
// 2 * layer + 1 after its feed-forward, 2 * n_layers in the logits.
enum Report : u32 {
  kReportFlag = 0,
  kReportBlock = 1,
  kReportPhase = 2,
  kReportSite = 3,
  kReportSeen = 4,
  kReportExpected = 5,
  kReportClaim = 6,
  kReportBad = 8,
};

struct Launch {
  const u8* weights;          // packed tiles, embedding rows unless tied, fp32 vectors
  u8* kv;                     // the KV cache
  u8* work;                   // buffers, rope tables
  const Model* model;         // (1)
  const Phase* phases;        // (model.n_phases)
  const Span* schedule;       // (model.n_phases, kWorkers)
  const TapeItem* tapes;      // block 0's items, block 1's, ...
  const i64* tape_begin;      // (kWorkers + 1)
  u32* counter;               // (1) arrivals of all blocks of all launches, wraps around
  u32* report;                // (kReportBad + kWorkers), see Report
  f32* accumulators;          // (kWorkers, kMoreAccTiles, kRows, 16) of tiles beyond kAccTiles
  u64* times;                 // (kWorkers, model.n_phases, 2) ns: entered, left; used if kTimes
  const i32* adjust_token;    // (adjustments) see choose.cuh
  const f32* adjust_penalty;  // (adjustments)
  const f32* adjust_bias;     // (adjustments)
  f32* adjust_kept;           // (adjustments)
  i32* results;               // (kMaxHeadRows) the tokens, in memory of the host
  u32* failed;                // (1) not 0 if the report says something, in memory of the host
  u64 spin_limit;             // cycles that a wait may take
  u64 seed[kMaxRows];
  u32 base;      // arrivals counted before this launch
  u32 n_rows;    // 1 .. kRows
  u32 n_phases;  // all, or model.head_begin where no row wants anything
  u32 n_groups;
  u32 n_head_rows;
  u32 n_stops;
  i32 group_slot[kMaxRows];   // a run of rows of one slot:
  i32 group_begin[kMaxRows];  // rows [begin, end)
  i32 group_end[kMaxRows];
  i32 group_pos[kMaxRows];  // position of the first
  i32 head_row[kMaxRows];   // the rows that want something
  i32 token[kMaxRows];      // -1 - i: the i-th of those that the launch before chose
  i32 slot[kMaxRows];
  i32 pos[kMaxRows];
  i32 want[kMaxRows];  // Want
  f32 temperature[kMaxRows];
  i32 top_k[kMaxRows];
  f32 top_p[kMaxRows];
  f32 min_p[kMaxRows];
  i32 choice[kMaxRows];
  i32 adjust_begin[kMaxRows];
  i32 adjust_end[kMaxRows];
  i32 stops[kMaxRows];  // (n_stops) there is nothing to do where the launch before chose one of these

  DEVICE const Model& records() const { return shared_record(kSmemModel, model[0]); }
  DEVICE f32* residual() const { return reinterpret_cast<f32*>(work + records().residual); }  // (rows, d_model_stride)
  DEVICE f32* qkv() const { return reinterpret_cast<f32*>(work + records().qkv); }            // (rows, qkv_stride)
  DEVICE f32* hidden() const { return reinterpret_cast<f32*>(work + records().hidden); }      // (rows, hidden_stride)
  DEVICE f32* logits() const {
    return reinterpret_cast<f32*>(work + records().logits);
  }  // (kMaxHeadRows, logits_stride)
  DEVICE i32* tokens() const { return reinterpret_cast<i32*>(work + records().tokens); }  // (kMaxHeadRows)
  DEVICE f32* branch(i64 offset) const { return reinterpret_cast<f32*>(work + offset); }  // (rows, d_model_stride)
  DEVICE const f32* rope(i64 offset) const {
    return reinterpret_cast<const f32*>(work + offset);
  }  // (ctx, 2, rotary / 2)
  DEVICE const f32* vector(i64 offset) const { return reinterpret_cast<const f32*>(weights + offset); }
  DEVICE Candidate* candidates(u32 block) const {  // (kMaxHeadRows)
    return reinterpret_cast<Candidate*>(work + records().candidates) + block * u32{kMaxHeadRows};
  }
  // Attention results of one (row, head): (chunks, partial_stride) values, and (chunks, 2) maximum and sum.
  DEVICE i64 partial_index(u32 row, u32 head) const { return (row * records().n_heads_max + head) * records().chunks; }
  DEVICE f32* partial_values(i64 index) const {
    return reinterpret_cast<f32*>(work + records().partial) + index * records().partial_stride;
  }
  DEVICE f32* partial_sums(i64 index) const {
    return partial_values(records().rows * records().n_heads_max * records().chunks) + index * 2;
  }
  // Whether a row needs all its logits to choose a token.
  DEVICE bool chooses_from_logits(u32 row) const {
    const bool filters = top_k[row] > 0 || top_p[row] < 1.0f || min_p[row] > 0.0f;
    return adjust_begin[row] < adjust_end[row] || (temperature[row] > 0.0f && filters);
  }
};
static_assert(sizeof(Launch) == 1392);
#ifdef FF_HOST  // NVRTC 13.0 has no __builtin_offsetof
static_assert(__builtin_offsetof(Launch, spin_limit) == 144 && __builtin_offsetof(Launch, base) == 280);
static_assert(__builtin_offsetof(Launch, group_slot) == 304 && __builtin_offsetof(Launch, token) == 624);
#endif

}  // namespace flashformer

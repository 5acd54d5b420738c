// sample: unit = a row that wants something. Its token is the best of all blocks' candidates, ties to the lower id, or
// is chosen from its logits (choose.cuh).
//
// candidates (n_workers, 16) {f32 score, i32 token}, logits (16, logits_stride) f32, tokens (16) i32. One block takes
// a unit; it reads 8 bytes of every block, or the row's logits a few times. Logits are left as they were found.
#pragma once

#include "choose.cuh"

namespace flashformer {

// The best candidate of all blocks for head row `unit`.
inline DEVICE Candidate best_candidate(const Context& ctx, u32 unit) {
  Candidate found = {0.0f, -1};
  for (u32 block = ctx.thread; block < kWorkers; block += kConsumers) {
    found = better_of(found, ld_global<Candidate>(ctx.launch.candidates(block) + unit));
  }
  return Reducer{ctx}.best(found);
}

// Penalty and bias of row r into its logits, the old ones kept aside.
inline DEVICE void adjust(const Context& ctx, u32 r, f32* logits) {
  const Launch& launch = ctx.launch;
  const i32 *tokens = launch.adjust_token, end = launch.adjust_end[r];
  const f32 *penalties = launch.adjust_penalty, *biases = launch.adjust_bias;
  for (i32 a = launch.adjust_begin[r] + static_cast<i32>(ctx.thread); a < end; a += kConsumers) {
    f32* at = logits + ld_const<i32>(tokens + a);
    const f32 logit = ld_global<f32>(at), penalty = ld_const<f32>(penalties + a);
    st_global<f32>(launch.adjust_kept + a, logit);
    st_global<f32>(at, (logit > 0.0f ? logit / penalty : logit * penalty) + ld_const<f32>(biases + a));
  }
}

inline DEVICE void restore(const Context& ctx, u32 r, f32* logits) {
  const Launch& launch = ctx.launch;
  const i32 *tokens = launch.adjust_token, end = launch.adjust_end[r];
  for (i32 a = launch.adjust_begin[r] + static_cast<i32>(ctx.thread); a < end; a += kConsumers) {
    st_global<f32>(logits + ld_const<i32>(tokens + a), ld_global<f32>(launch.adjust_kept + a));
  }
}

// The token of row r, head row `unit`, chosen from its logits.
inline DEVICE Candidate choose(const Context& ctx, u32 unit, u32 r) {
  const Launch& launch = ctx.launch;
  f32* logits = launch.logits() + unit * ctx.model.logits_stride;
  const bool adjusted = launch.adjust_begin[r] < launch.adjust_end[r];
  if (adjusted) {
    adjust(ctx, r, logits);
    bar_sync(Site::kSampleAdjusted, kConsumerBarrier, kConsumers);
  }
  Chooser chooser(ctx, logits, launch.temperature[r]);
  const Candidate found = launch.temperature[r] > 0.0f ? chooser.sampled(r) : chooser.greedy();
  if (adjusted) restore(ctx, r, logits);  // all have read them: they met in the last reduction
  return found;
}

inline DEVICE void sample(Context& ctx, const Phase&, const Span& span) {
  const Launch& launch = ctx.launch;
  for (u32 unit = span.begin; unit < launch.n_head_rows && unit < span.end; unit += span.step) {
    const u32 r = static_cast<u32>(launch.head_row[unit]);
    const Candidate found = launch.chooses_from_logits(r) ? choose(ctx, unit, r) : best_candidate(ctx, unit);
    if (ctx.thread == 0) {
      st_global<i32>(launch.tokens() + unit, found.token);
      st_global<i32>(launch.results + unit, found.token);
    }
    bar_sync(Site::kSampleUnit, kConsumerBarrier, kConsumers);  // the next unit reduces in the same memory
  }
}

}  // namespace flashformer

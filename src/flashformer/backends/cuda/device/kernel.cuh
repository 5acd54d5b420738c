// One forward in one launch: kWorkers blocks of 288 threads, one per multiprocessor, all resident.
//
// One token (1 row, bf16, a layer of d_model 2048) on its way through a block:
//
//   1  Thread 0 sets up the ring's mbarriers; the block meets once; then warps 0..7 compute and warp 8 loads.
//   2  Warp 8, one lane: for every item of the block's tape, slot by slot: wait until the slot is empty, announce the
//      bytes, start the copy. It runs ahead through phases and layers until the ring is full (ring.cuh).
//   3  Thread 0 polls the counter of arrivals until what qkv needs is counted; the others wait at a barrier
//      (handoff.cuh). Meanwhile warp 7 copies the records of the phase to shared memory.
//   4  qkv: all 256 threads read the residual (8 KB), add up its squares and make the factor of the norm; then they
//      put factor * x * weight, rounded to bf16, into shared memory (row.cuh; several rows are read twice, stage.cuh).
//   5  For every tile of the block (16 outputs x 2048 k, 64 KB, 4 slots): each warp waits for the slot, multiplies its
//      units by tensor cores into 16 x 8 sums in registers and gives the slot back (product.cuh, weights.cuh).
//   6  The warps store their sums, meet, and 16 threads add the eight of them in order, add the bias and store the
//      output in global memory (epilogue.cuh); the other warps are in the next tile by then.
//   7  The block meets, thread 0 fences and counts the block's arrival; on to the next phase.
//   8  attend: norm, rope and KV append, scores and weighted values of 256 keys (attend.cuh). o_proj takes the result
//      as 4 took the residual and adds its outputs to the residual. gate_up is like qkv and leaves
//      activation(gate) * up in hidden; down takes that, slice by slice of 2048.
//   9  After the last layer lm_head leaves the block's best token; sample takes the best of all blocks.
//  10  What is not finite was noted on the way, by place; each block stores the first one it saw.
//
// Phases, units, waits and tapes are data (program.cuh); nothing here decides who does what. Bytes moved: the weights
// once, over all blocks; the activations once per block; 400 bytes of records per block and phase.
#pragma once

#include "attend.cuh"
#include "embed.cuh"
#include "handoff.cuh"
#include "product.cuh"
#include "ring.cuh"
#include "sample.cuh"
#include "tokens.cuh"

namespace flashformer {

// ---- records

inline DEVICE const Span& span_of(const Context& ctx, u32 phase) {
  return ctx.launch.schedule[phase * kWorkers + ctx.block];
}

// What was known of phase `phase` in the one before it: {its step, arrivals before it}, {op of the phase after it,
// layer}.
inline DEVICE u32 ahead_address(const Context& ctx, u32 phase) { return ctx.at(kSmemAhead + phase % 2 * 32); }

// By one warp, while thread 0 waits for the other blocks: the records of this phase, how long to wait for the next, and
// what comes after that. Nobody reads those of the phase before any more. A lane takes 16 bytes.
inline DEVICE void copy_records(const Context& ctx) {
  constexpr u32 kOfPhase = sizeof(Phase) / 16, kOfBoth = kOfPhase + sizeof(Span) / 16;
  static_assert(kSmemSpan == kSmemPhase + 16 * kOfPhase && kOfBoth + 1 < 32);
  const u32 beyond = ctx.lane < kOfBoth ? 0 : ctx.lane - kOfBoth + 1;  // the phase, counted from this one
  if (ctx.lane > kOfBoth + 1 || ctx.phase + beyond >= ctx.launch.n_phases) return;
  const u8* from = reinterpret_cast<const u8*>(ctx.launch.phases + ctx.phase + beyond);
  u32 to = ctx.at(kSmemPhase) + 16 * ctx.lane;
  if (ctx.lane < kOfPhase) {
    from += 16 * ctx.lane;
  } else if (ctx.lane < kOfBoth) {
    from = reinterpret_cast<const u8*>(&span_of(ctx, ctx.phase)) + 16 * (ctx.lane - kOfPhase);
  } else {
    if (beyond == 1) from = reinterpret_cast<const u8*>(&span_of(ctx, ctx.phase + 1).step);
    to = ahead_address(ctx, ctx.phase + 1) + 16 * (beyond - 1);
  }
  st_shared(to, ld_const(reinterpret_cast<const u32x4*>(from)));
}

inline DEVICE void copy_model(const Launch& launch, u32 smem) {
  const u32 at = thread_index();
  if (at >= sizeof(Model) / 8) return;
  st_shared(smem + kSmemModel + 8 * at, ld_const(reinterpret_cast<const u64*>(launch.model) + at));
}

// Arrivals before this phase.
inline DEVICE u32 arrivals_before(const Context& ctx) {
  if (ctx.phase == 0) return static_cast<u32>(span_of(ctx, 0).wait);
  return ld_shared<u32>(ahead_address(ctx, ctx.phase) + 8);
}

// ---- phases

inline DEVICE void run_phase(Context& ctx) {
  const Phase& phase = shared_record(kSmemPhase, ctx.launch.phases[ctx.phase]);
  const Span& span = shared_record(kSmemSpan, span_of(ctx, ctx.phase));
  switch (static_cast<Op>(ld_shared<i64>(ctx.at(kSmemPhase)))) {
    case Op::kEmbed:
      return embed(ctx, phase, span);
    case Op::kAttend:
      return attend(ctx, phase, span);
    case Op::kSample:
      return sample(ctx, phase, span);
    default:
      return product(ctx, phase, span);
  }
}

// When this block came to a phase, its wait over (which = 0), and when it left (1).
inline DEVICE void note_time(const Context& ctx, u32 which) {
  if (kTimes == 0 || ctx.thread != 0) return;
  const u64 phase = static_cast<u64>(ctx.block) * static_cast<u64>(ctx.model.n_phases) + ctx.phase;
  st_global(ctx.launch.times + 2 * phase + which, clock_ns());
}

// The first bad place that any thread of this block saw.
inline DEVICE void store_bad(const Context& ctx) {
  u32 first = ctx.bad;
  UNROLL(1)
  for (u32 mask = 16; mask; mask /= 2) {
    const u32 other = shfl_xor_u32(first, mask);
    first = other < first ? other : first;
  }
  if (ctx.lane == 0) st_shared<u32>(ctx.at(kSmemReduce) + 4 * ctx.warp, first);
  bar_sync(Site::kBadBar, kConsumerBarrier, kConsumers);
  if (ctx.thread != 0) return;
  UNROLL(1)
  for (u32 w = 1; w < kWarps; ++w) {
    const u32 other = ld_shared<u32>(ctx.at(kSmemReduce) + 4 * w);
    first = other < first ? other : first;
  }
  if (first == kNothingBad) return;
  st_global(ctx.launch.report + kReportBad + ctx.block, first);
  st_relaxed(ctx.launch.failed, 1);
}

// What phases compute from these shall not be kept in registers over all phases, where attend needs every one.
inline DEVICE void forget(Context& ctx) {
  ctx.smem = opaque(ctx.smem);
  ctx.thread = opaque(ctx.thread);
  ctx.warp = opaque(ctx.warp);
  ctx.lane = opaque(ctx.lane);
  ctx.block = opaque(ctx.block);
  ctx.phase = opaque(ctx.phase);
}

// Old keys and values are on their way to L2 while qkv, which is never the first phase, waits and multiplies.
inline DEVICE void look_ahead(const Context& ctx) {
  const u32 next = ctx.phase + 1;
  if (ctx.lane != 0 || ctx.phase == 0 || next >= ctx.launch.n_phases) return;
  if (ld_shared<i64>(ahead_address(ctx, ctx.phase) + 16) != static_cast<i64>(Op::kAttend)) return;
  attend_ahead(ctx.launch, ctx.launch.phases[next], span_of(ctx, next));
}

// The walk of a consumer thread through all phases.
inline DEVICE void consume(Context& ctx) {
  for (; ctx.phase < ctx.launch.n_phases; ++ctx.phase) {
    forget(ctx);
    if (ctx.warp == kWarps - 1) copy_records(ctx);
    if (ctx.warp == kWarps - 2) look_ahead(ctx);
    await_arrivals(ctx, ctx.thread == 0 ? arrivals_before(ctx) : 0);
    forget(ctx);
    note_time(ctx, 0);
    run_phase(ctx);
    arrive(ctx);
    note_time(ctx, 1);
  }
  store_bad(ctx);
}

// What one of the kThreads threads of a block does.
inline DEVICE void run_thread(const Launch& launch, u32 smem) {
  const u32 warp = warp_index(), lane = lane_index();
  if (thread_index() == 0) init_ring(smem);
  copy_model(launch, smem);
  if (warp == kWarps) copy_tokens(launch, smem, lane);
  bar_sync(Site::kInitBar, 0, kThreads);
  if (is_over(launch, smem)) return;
  if (warp == kWarps) {
    if (lane == 0) produce(launch, smem, block_index());
    return;
  }
  Context ctx = {launch, launch.records(), smem, thread_index(), warp, lane, block_index()};
  consume(ctx);
}

}  // namespace flashformer

#ifndef FF_HOST
extern "C" __global__ void __launch_bounds__(flashformer::kThreads, 1)
    flashformer_forward(const __grid_constant__ flashformer::Launch launch) {
  flashformer::run_thread(launch, flashformer::shared_base());
}
#endif

// The hand-off between phases: every block arrives once at the end of every phase, whether it had units or not, and
// waits before a phase until as many arrivals are counted as its span says.
//
// One counter in global memory for all blocks; it only grows and wraps around, so it is compared by signed difference.
// Arrive: all stores of the block, consumer barrier, one thread fences and adds, which is a release. Wait: one
// thread polls with acquire, consumer barrier. 1 atomic and about 2 polls of 4 bytes per block and phase.
#pragma once

#include "abort.cuh"
#include "context.cuh"

namespace flashformer {

// Returns when launch.base + `arrivals` are counted, or the launch was aborted.
inline DEVICE void await_arrivals(Context& ctx, u32 arrivals) {
  if (ctx.thread == 0 && !ctx.aborted) {
    const u32 expected = ctx.launch.base + arrivals;
    // A look at the flag is a way to L2 by which an arrival may be seen later: 256 polls are about 0.1 ms.
    const Waiter waiter = {ctx.launch, ctx.block, ctx.phase, Site::kHandoffPoll, 1, 256};
    Spin spin;
    for (;;) {
      const u32 seen = ld_acquire(Site::kHandoffPoll, ctx.launch.counter);
      if (static_cast<i32>(seen - expected) >= 0 || spin.give_up(waiter, seen, expected)) break;
    }
  }
  bar_sync(Site::kHandoffBar, kConsumerBarrier, kConsumers);
}

inline DEVICE void arrive(Context& ctx) {
  bar_sync(Site::kPhaseBar, kConsumerBarrier, kConsumers);
  if (ctx.thread != 0) return;
  fence_gpu(Site::kHandoffFence);
  red_relaxed_add(Site::kHandoffArrive, ctx.launch.counter, 1);
}

}  // namespace flashformer

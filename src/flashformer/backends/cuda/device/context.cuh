// What every phase function sees: the launch, who it is in the block, and what it carries from phase to phase.
//
// A phase function is `void name(Context& ctx, const Phase& phase, const Span& span)`, called by the kConsumers threads
// of all consumer warps at once, after the hand-off before the phase. All stores of a phase lie before the barrier that
// ends it (handoff.cuh). Model, Phase and Span are copies in shared memory (launch.cuh), TapeItems are global memory;
// both are read as plain C++. Everything that changes goes through the wrappers of ptx.cuh.
#pragma once

#include "launch.cuh"
#include "specialization.h"

namespace flashformer {

constexpr u32 kConsumers = 256;            // threads 0 .. 255 compute
constexpr u32 kThreads = kConsumers + 32;  // and warp 8 loads weights
constexpr u32 kConsumerBarrier = 1;        // id of the named barrier of the consumers; 0 is of the whole block
constexpr u32 kNothingBad = 0xFFFFFFFF;
constexpr bool kOneFormat =  // of all products
    kBodyFormat == kHeadFormat && kBodyGroup == kHeadGroup && kBodyZeroPoints == kHeadZeroPoints;

// The last kSmallBytes of shared memory but for the records, as addresses. Owned by whoever runs; between phases they
// hold nothing.
constexpr u32 kSmemReduce = kSmemSmall;                 // (kMaxRows, 8) f32, one value per row and warp
constexpr u32 kSmemFactors = kSmemReduce + 16 * 8 * 4;  // (kMaxRows) f32 factors of the norm
constexpr u32 kSmemFolds = kSmemFactors + 16 * 4;       // (kMaxRows) f32 factors of the fold's norm
constexpr u32 kSmemUnscale = kSmemFolds + 16 * 4;       // (kMaxRows) f32 what undoes the scale of the x slice
constexpr u32 kSmemSmallFree = kSmemUnscale + 16 * 4;   // from here on free for other phases
static_assert(kSmemSmallFree <= kSmemRecords);

// Where one side stands in the ring of slots (ring.cuh).
struct RingPlace {
  u32 slot = 0;
  u32 parity = 0;  // of how often the slot was used before

  DEVICE void advance() {
    const bool wraps = slot + 1 == kSlots;
    slot = wraps ? 0 : slot + 1;
    parity ^= wraps ? 1 : 0;
  }
};

struct Context {
  const Launch& launch;
  const Model& model;
  u32 smem;    // where the block's shared memory begins; kSmem* count from here
  u32 thread;  // 0 .. 255
  u32 warp;    // 0 .. 7
  u32 lane;
  u32 block;
  u32 phase = 0;          // index of the phase being executed
  RingPlace ring = {};    // the slot to be read next
  bool aborted = false;   // waits return at once from now on; the same in all lanes of a warp
  u32 bad = kNothingBad;  // 2 + the first place where this thread saw a value that is not finite

  DEVICE u32 at(u32 offset) const { return smem + offset; }
  DEVICE void report_bad(i32 place) {
    const u32 code = static_cast<u32>(place + 2);
    bad = code < bad ? code : bad;
  }
};

}  // namespace flashformer

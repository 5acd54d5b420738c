// The skeleton of the real kernel on one page: a ring of slots filled by a producer warp, phases handed over by a
// counter. Integers, so that any order of sums gives the same result.
//
// Phase p: x (n_blocks * kOutputs) u32 of the phase before; y[block * kOutputs + t] = sum over the block's slots s and
// their words w of weight[s][w] * x[(w + t) % n] for t < kOutputs. Each of the kWarps consumer warps reads a quarter of
// a slot; their partial sums meet in shared memory.
#include "ptx.h"

namespace flashformer {

constexpr u32 kWarps = 4, kConsumers = 128, kThreads = 160, kOutputs = 8;
constexpr u32 kSlots = 3, kSlotBytes = 2048;
constexpr u32 kRing = 0, kFull = kSlots * kSlotBytes, kEmpty = kFull + 8 * kSlots, kX = kEmpty + 8 * kSlots + 16,
              kPartial = kX + 256, kLast = kPartial + kWarps * 32 * kOutputs * 4;

enum Variation : u32 {
  kSound = 0,
  kReleasePerGroup = 1,  // one arrival for all warps, by the first
  kCachedX = 2,          // x through ld_const
  kLateFence = 3,        // every thread fences, then the block meets, then thread 0 releases: sound
};

struct Launch {
  const u32* weights;  // (n_blocks, n_phases, n_slots, kSlotBytes / 4)
  u32* x;              // (2, n_blocks * kOutputs), x[0] given
  u32* counter;
  u32 base, n_phases, n_slots, variation;
};

void produce(const Launch& launch, u32 smem) {
  const u32 total = launch.n_phases * launch.n_slots;
  const u32* from = launch.weights + block_index() * total * (kSlotBytes / 4);
  for (u32 i = 0; i < total; ++i) {
    const u32 slot = i % kSlots, use = i / kSlots, full = smem + kFull + 8 * slot;
    while (!mbar_try_wait(Site::kWaitEmpty, smem + kEmpty + 8 * slot, ~use & 1)) {
    }
    fence_proxy_async(Site::kProducerFence);
    mbar_arrive_expect_tx(Site::kExpect, full, kSlotBytes);
    bulk_copy(smem + kRing + slot * kSlotBytes, from + i * (kSlotBytes / 4), kSlotBytes, full);
  }
}

void consume_slot(const Launch& launch, u32 smem, u32 i, u32 (&sums)[kOutputs]) {
  const u32 slot = i % kSlots, thread = thread_index(), n = n_blocks() * kOutputs;
  while (!mbar_try_wait(Site::kWaitFull, smem + kFull + 8 * slot, i / kSlots & 1)) {
  }
  const u32x4 w = ld_shared<u32x4>(smem + kRing + slot * kSlotBytes + 16 * thread);
  const u32 words[4] = {w.x, w.y, w.z, w.w};
  warp_sync(Site::kSlotWarp);
  const bool arrives = launch.variation == kReleasePerGroup ? thread == 0 : lane_index() == 0;
  if (arrives) mbar_arrive(Site::kSlotRelease, smem + kEmpty + 8 * slot);
  for (u32 t = 0; t < kOutputs; ++t)
    for (u32 j = 0; j < 4; ++j) sums[t] += words[j] * ld_shared<u32>(smem + kX + 4 * ((4 * thread + j + t) % n));
}

void run_phase(const Launch& launch, u32 smem, u32 phase) {
  const u32 thread = thread_index(), n = n_blocks() * kOutputs;
  if (thread == 0) {
    const u32 expected = launch.base + phase * n_blocks();
    while (static_cast<i32>(ld_acquire(Site::kHandoffPoll, launch.counter) - expected) < 0) nanosleep(20);
  }
  bar_sync(Site::kHandoffBar, 1, kConsumers);
  const u32* x = launch.x + phase % 2 * n;
  if (thread < n) {
    const u32 value = launch.variation == kCachedX ? ld_const(x + thread) : ld_global(x + thread);
    st_shared(smem + kX + 4 * thread, value);
  }
  bar_sync(Site::kStageBar, 1, kConsumers);
  u32 sums[kOutputs] = {};
  for (u32 s = 0; s < launch.n_slots; ++s) consume_slot(launch, smem, phase * launch.n_slots + s, sums);
  for (u32 t = 0; t < kOutputs; ++t) st_shared(smem + kPartial + 4 * (thread * kOutputs + t), sums[t]);
  bar_sync(Site::kPartialBar, 1, kConsumers);
  if (thread < kOutputs) {
    u32 sum = 0;
    for (u32 i = 0; i < kConsumers; ++i) sum += ld_shared<u32>(smem + kPartial + 4 * (i * kOutputs + thread));
    st_global(launch.x + (phase + 1) % 2 * n + block_index() * kOutputs + thread, sum);
  }
  if (launch.variation == kLateFence) fence_gpu(Site::kMergeFence);
  bar_sync(Site::kPhaseBar, 1, kConsumers);
  if (thread != 0) return;
  if (launch.variation != kLateFence) fence_gpu(Site::kHandoffFence);
  red_relaxed_add(Site::kHandoffArrive, launch.counter, 1);
}

}  // namespace flashformer

extern "C" void ff_thread(const void* argument, flashformer::u32 smem) {
  using namespace flashformer;
  const Launch& launch = *static_cast<const Launch*>(argument);
  if (thread_index() == 0) {
    for (u32 slot = 0; slot < kSlots; ++slot) {
      mbar_init(smem + kFull + 8 * slot, 1);
      mbar_init(smem + kEmpty + 8 * slot, launch.variation == kReleasePerGroup ? 1 : kWarps);
    }
    fence_mbar_init(Site::kInitFence);
  }
  bar_sync(Site::kInitBar, 0, kThreads);
  if (thread_index() == kConsumers) produce(launch, smem);
  if (thread_index() >= kConsumers) return;
  for (u32 phase = 0; phase < launch.n_phases; ++phase) run_phase(launch, smem, phase);
}

// One small mistake each, and next to it what is right. Two blocks of two warps; `fault` says which.
#include "ptx.h"

namespace flashformer {

struct Launch {
  u32* data;         // (256), changes, initialised
  u32* fresh;        // (256), changes, not initialised
  const u32* fixed;  // (256), constant
  u32* counter;      // (4)
  u32 fault;
  u32 spin_limit;
};

enum Fault : u32 {
  kNothing,
  kSharedBeyond,
  kSharedBelow,
  kGlobalBeyond,
  kConstBeyond,
  kPrefetchBeyond,
  kMisaligned,
  kFreshShared,
  kFreshGlobal,
  kFreshCounter,
  kWriteConstant,
  kLdConstOfChanging,
  kCopyOfChanging,
  kCopyMisaligned,
  kCopyUnwaited,
  kLanesUnordered,
  kLanesThroughShuffle,
  kLanesThroughWarpSync,
  kSameValueTwice,
  kHalvesOfAWord,
  kHalfRead,
  kWarpsThroughMbarrier,
  kWarpsUnordered,
  kReadersUnordered,
  kBlocksUnordered,
  kDifferentMeetings,
  kBarrierCount,
  kBarrierNotWarps,
  kBarrierLonely,
  kMbarOverwritten,
  kMbarRead,
  kMbarTwice,
  kMbarMissing,
  kArriveTooOften,
  kCounterNever,
  kSpinLimit,
  kRelaxedRelease,
  kRelaxedNoFence,
  kLastArriver,
  kLastArriverNoFence,
  kLastArriverRelaxed,
  kLastArriverRelaxedNoFence,
  kLastArriverNoFenceAfter,
  kCounterReset,
  kPlainOverAtomic,
  kLaneGone,
  kGenericBeforeCopy,
  kBarrierPlaces,
  kAroundWrappers,
  kAfterAbort,
  kPlainSpin,
};

struct Thread {
  const Launch& launch;
  u32 smem, thread, warp, lane, block;

  void lanes(bool shuffle, bool sync) const {
    if (warp) return;
    st_shared(smem + 4 * lane, lane);
    if (shuffle) shfl_xor_u32(lane, 1);
    if (sync) warp_sync(Site::kSlotWarp);
    ld_shared<u32>(smem + 4 * (lane ^ 1));
  }

  // Thread 0 of block 0 writes, block 1 reads after it has seen the flag.
  void relaxed_message(bool fence) const {
    if (thread) return;
    if (block == 0) {
      st_global(launch.data, 5u);
      if (fence) fence_gpu(Site::kHandoffFence);
      st_relaxed(launch.counter, 1);
    } else {
      while (ld_relaxed(launch.counter) == 0) {
      }
      fence_gpu(Site::kMergeFence);
      st_global(launch.data + 1, ld_global(launch.data));
    }
  }

  // Both blocks store, the last to arrive adds up: it fences before and after it has arrived.
  void last_arriver(bool fence, bool relaxed = false, bool fence_after = false) const {
    st_global(launch.data + 64 * block + thread, block + thread);
    bar_sync(Site::kMergeStored, 0, 64);
    if (thread) return;
    if (fence) fence_gpu(Site::kMergeFence);
    const u32 before = relaxed ? atom_add_relaxed(Site::kMergeArrive, launch.counter, 1)
                               : atom_add_acq_rel(Site::kMergeArrive, launch.counter, 1);
    if (before != 1) return;
    if (fence_after) fence_gpu(Site::kMergeSeen);
    u32 sum = 0;
    for (u32 i = 0; i < 128; ++i) sum += ld_global(launch.data + i);
    st_global(launch.data + 128, sum);
    st_relaxed(launch.counter, 0);
  }

  void mbar(u32 address, u32 count) const {
    if (thread == 0) {
      mbar_init(address, count);
      fence_mbar_init(Site::kInitFence);
    }
    bar_sync(Site::kInitBar, 0, 64);
  }

  void through_mbarrier() const {
    mbar(smem, 1);
    if (thread == 0) {
      st_shared(smem + 64, 7u);
      mbar_arrive(Site::kSlotRelease, smem);
    }
    if (warp == 0) return;
    while (!mbar_try_wait(Site::kWaitFull, smem, 0)) {
    }
    ld_shared<u32>(smem + 64);
  }

  void copy(const u32* from, u32 bytes, bool wait) const {
    mbar(smem, 1);
    if (thread) return;
    fence_proxy_async(Site::kProducerFence);
    mbar_arrive_expect_tx(Site::kExpect, smem, bytes);
    bulk_copy(smem + 64, from, bytes, smem);
    while (wait && !mbar_try_wait(Site::kWaitFull, smem, 0)) {
    }
  }

  void spin() const {
    if (thread) return;
    const u64 begin = clock_cycles();
    while (ld_acquire(Site::kHandoffPoll, launch.counter) == 0) {
      if (ld_relaxed(launch.counter + 1)) return;
      if (clock_cycles() - begin < launch.spin_limit) continue;
      st_relaxed(launch.counter + 2, 100 + block);
      st_relaxed(launch.counter + 1, 1);
      return;
    }
  }

  void run() const {
    switch (launch.fault) {
      case kSharedBeyond:
        return st_shared(smem + 1024, 1u);
      case kSharedBelow:
        ld_shared<u32>(smem - 4);
        return;
      case kGlobalBeyond:
        return st_global(launch.data + 256, 1u);
      case kConstBeyond:
        ld_const(launch.fixed + 256);
        return;
      case kPrefetchBeyond:
        return prefetch_l2_bulk(launch.fixed + 192, 320);
      case kMisaligned:
        return st_shared(smem + 8, u32x4{});
      case kFreshShared:
        ld_shared<u32>(smem + 12);
        return;
      case kFreshGlobal:
        ld_global(launch.fresh + 3);
        return;
      case kFreshCounter:
        return red_relaxed_add(Site::kHandoffArrive, launch.fresh, 1);
      case kWriteConstant:
        return st_global(const_cast<u32*>(launch.fixed), 1u);
      case kLdConstOfChanging:
        ld_const(const_cast<const u32*>(launch.data));
        return;
      case kCopyOfChanging:
        return copy(launch.data, 64, true);
      case kCopyMisaligned:
        return copy(launch.fixed + 1, 64, true);
      case kCopyUnwaited:
        return copy(launch.fixed, 64, false);
      case kLanesUnordered:
        return lanes(false, false);
      case kLanesThroughShuffle:
        return lanes(true, false);
      case kLanesThroughWarpSync:
        return lanes(true, true);
      case kSameValueTwice:
        if (warp == 0) st_shared(smem, 3u);
        return;
      case kHalvesOfAWord:
        st_shared(smem + 2 * thread, static_cast<u16>(thread));
        if (ld_shared<u16>(smem + 2 * thread) == thread) st_global(launch.data + 64 * block + thread, 1u);
        return;
      case kHalfRead:
        if (warp == 0) st_shared(smem + 2 * thread, static_cast<u16>(thread));
        if (lane == 0) ld_shared<u32>(smem);
        return;
      case kWarpsThroughMbarrier:
        return through_mbarrier();
      case kWarpsUnordered:
        if (thread == 0) st_shared(smem, 1u);
        if (thread == 32) st_shared(smem, 2u);
        return;
      case kReadersUnordered:
        if (thread == 0) st_shared(smem, 1u);
        bar_sync(Site::kInitBar, 0, 64);
        if (thread != 33) ld_shared<u32>(smem);
        warp_sync(Site::kSlotWarp);
        if (thread == 33) st_shared(smem, 2u);
        return;
      case kBlocksUnordered:
        if (thread == 0) st_global(launch.data, block);
        return;
      case kDifferentMeetings:
        if (lane < 16) {
          ballot(true);
        } else {
          shfl_xor_u32(lane, 1);
        }
        return;
      case kBarrierCount:
        return bar_sync(Site::kPhaseBar, 1, warp ? 64 : 32);
      case kBarrierNotWarps:
        return bar_sync(Site::kPhaseBar, 1, 48);
      case kBarrierLonely:
        if (warp) bar_sync(Site::kPhaseBar, 3, 64);
        return;
      case kMbarOverwritten:
        mbar(smem, 1);
        if (thread == 0) st_shared(smem + 4, 0u);
        return;
      case kMbarRead:
        mbar(smem, 1);
        ld_shared<u32>(smem);
        return;
      case kMbarTwice:
        mbar(smem, 1);
        return mbar(smem, 1);
      case kMbarMissing:
        return mbar_arrive(Site::kSlotRelease, smem + 8);
      case kArriveTooOften:
        mbar(smem, 1);
        if (thread) return;
        mbar_arrive_expect_tx(Site::kExpect, smem, 16);
        return mbar_arrive(Site::kSlotRelease, smem);
      case kCounterNever:
        if (thread == 0) {
          while (ld_acquire(Site::kHandoffPoll, launch.counter) < 2) nanosleep(20);
        }
        return;
      case kSpinLimit:
        return spin();
      case kRelaxedRelease:
        return relaxed_message(true);
      case kRelaxedNoFence:
        return relaxed_message(false);
      case kLastArriver:
        return last_arriver(true);
      case kLastArriverNoFence:
        return last_arriver(false);
      case kLastArriverRelaxed:
        return last_arriver(true, true, true);
      case kLastArriverRelaxedNoFence:
        return last_arriver(false, true, true);
      case kLastArriverNoFenceAfter:
        return last_arriver(true, true, false);
      case kCounterReset:
        if (thread == 0) atom_add_acq_rel(Site::kMergeArrive, launch.counter + 3, 1);
        return;
      case kPlainOverAtomic:
        if (thread == 0 && block == 0) red_relaxed_add(Site::kHandoffArrive, launch.counter, 1);
        if (thread == 0 && block == 1) st_global(launch.counter, 0u);
        return;
      case kLaneGone:
        if (lane == 5) return;
        return warp_sync(Site::kSlotWarp);
      case kGenericBeforeCopy:
        if (thread == 0) st_shared(smem + 64, 1u);
        return copy(launch.fixed, 64, true);
      case kBarrierPlaces:
        if (lane < 8) {
          bar_sync(Site::kPhaseBar, 1, 64);
        } else {
          bar_sync(Site::kPhaseBar, 1, 64);
        }
        return;
      case kAroundWrappers:
        if (thread == 9 && launch.data[3] == 0xFFFFFFFF) launch.data[3] = 7;
        return;
      case kAfterAbort:
        if (thread) return;
        st_relaxed(launch.counter, 1);
        return st_global(launch.data, block);
      case kPlainSpin:
        while (thread == 0 && ld_global(launch.data) == 0) {
        }
        return;
      default:
        return;
    }
  }
};

}  // namespace flashformer

extern "C" void ff_thread(const void* argument, flashformer::u32 smem) {
  using namespace flashformer;
  Thread{*static_cast<const Launch*>(argument), smem, thread_index(), warp_index(), lane_index(), block_index()}.run();
}

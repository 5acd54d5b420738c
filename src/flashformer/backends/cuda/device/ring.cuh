// The ring: kSlots slots of kSlotBytes through which a block's weights come, in the order of its tape.
//
// The producer, one lane of its own warp, copies the tape slot by slot with bulk copies, through phases and layers,
// and waits for nothing but empty slots: while the consumers wait at a hand-off, the weights of what comes next arrive.
// Both sides count slots in the same way, so neither tells the other what is where: a tape item is one slice of a
// phase's tiles; of every tile come ceil(units / slot_units) slots, the last one shorter; no slot holds two tiles.
//
// Slot s has two mbarriers. full[s]: one arrival, of the producer, and the bytes of the copy. empty[s]: one arrival of
// every consumer warp. Use u of a slot is phase u of both; a wait for phase u names its parity, u & 1. Of a fresh
// mbarrier the phase before the first counts as over, so the first wait for an empty slot returns at once.
#pragma once

#include "abort.cuh"
#include "context.cuh"

namespace flashformer {

static_assert(kSlotBytes % 16 == 0 && kSlots >= 1);
static_assert(kBodySlotUnits * kBodyUnitBytes <= kSlotBytes && kHeadSlotUnits * kHeadUnitBytes <= kSlotBytes);

inline DEVICE u32 slot_address(u32 smem, u32 slot) { return smem + kSmemRing + slot * kSlotBytes; }
inline DEVICE u32 full_barrier(u32 smem, u32 slot) { return smem + kSmemFull + slot * 8; }
inline DEVICE u32 empty_barrier(u32 smem, u32 slot) { return smem + kSmemEmpty + slot * 8; }

// By one thread, before the block's first barrier.
inline DEVICE void init_ring(u32 smem) {
  UNROLL(1)
  for (u32 slot = 0; slot < kSlots; ++slot) {
    mbar_init(full_barrier(smem, slot), 1);
    mbar_init(empty_barrier(smem, slot), static_cast<u32>(kWarps));
  }
  fence_mbar_init(Site::kInitFence);
}

// Units of one tile in slice `slice` of its k.
inline DEVICE u32 units_in_slice(const Phase& phase, u32 slice) {
  const u32 left = static_cast<u32>(phase.k_padded) - slice * static_cast<u32>(kSliceK);
  const u32 unit_k = kOneFormat ? kBodyUnitK : static_cast<u32>(phase.unit_k);
  return (left < kSliceK ? left : static_cast<u32>(kSliceK)) / unit_k;
}

// ---- consumers

// All lanes of a warp, together: waits for the next slot and gives its address. Worthless if ctx.aborted afterwards.
inline DEVICE u32 take_slot(Context& ctx) {
  const u32 bar = full_barrier(ctx.smem, ctx.ring.slot);
  Spin spin;
  while (!ctx.aborted && ballot(mbar_try_wait(Site::kWaitFull, bar, ctx.ring.parity)) != 0xFFFFFFFFu) {
    const Waiter waiter = {ctx.launch, ctx.block, ctx.phase, Site::kWaitFull};
    const bool ends = ctx.lane == 0 && spin.give_up(waiter, ctx.ring.slot, ctx.ring.parity);
    ctx.aborted = ballot(ends) != 0;
  }
  return slot_address(ctx.smem, ctx.ring.slot);
}

// All lanes of a warp, when they have read what they want of the slot. After an abort nobody gives a slot back: nobody
// has waited for its bytes, which may be under way, and the producer would announce others for the same phase of full.
inline DEVICE void release_slot(Context& ctx) {
  warp_sync(Site::kSlotWarp);
  if (ctx.lane == 0 && !ctx.aborted) mbar_arrive(Site::kSlotRelease, empty_barrier(ctx.smem, ctx.ring.slot));
  ctx.ring.advance();
}

// ---- producer

constexpr u64 kDrainCycles = u64{1} << 34;  // seconds: copies end by themselves

struct Producer {
  const Launch& launch;
  u32 smem, block;
  RingPlace ring = {};
  u32 phase = 0;
  u32 copies = 0;  // under way or done

  // False: the launch was aborted. Consumers in a hand-off that never ends keep the slots from it: they know more, and
  // give up first.
  DEVICE bool wait_empty() {
    const Waiter waiter = {launch, block, phase, Site::kWaitEmpty, 2};
    Spin spin;
    while (!mbar_try_wait(Site::kWaitEmpty, empty_barrier(smem, ring.slot), ring.parity ^ 1)) {
      if (spin.give_up(waiter, ring.slot, copies / kSlots)) return false;
    }
    return true;
  }

  DEVICE bool copy(const u8* from, u32 bytes) {
    if (!wait_empty()) return false;
    const u32 full = full_barrier(smem, ring.slot);
    fence_proxy_async(Site::kProducerFence);
    mbar_arrive_expect_tx(Site::kExpect, full, bytes);
    bulk_copy(slot_address(smem, ring.slot), from, bytes, full);
    ring.advance();
    ++copies;
    return true;
  }

  // One slice of all tiles of this block.
  DEVICE bool copy_item(const TapeItem& item, u32 slice) {
    const Phase& now = launch.phases[item.phase];
    const u32 units = units_in_slice(now, slice);
    const u32 unit_bytes = kOneFormat ? kBodyUnitBytes : static_cast<u32>(now.unit_bytes);
    const u32 slot_units = kOneFormat ? kBodySlotUnits : static_cast<u32>(now.slot_units);
    const u8* end = launch.weights + item.end;
    for (const u8* at = launch.weights + item.begin; at < end;) {
      for (u32 done = 0; done < units; done += slot_units) {
        const u32 n = units - done < slot_units ? units - done : slot_units;
        if (!copy(at, n * unit_bytes)) return false;
        at += n * unit_bytes;
      }
    }
    return true;
  }

  // The whole tape, as far as this launch goes, unless it is aborted.
  DEVICE void copy_tape() {
    u32 slice = 0;
    for (i64 i = launch.tape_begin[block]; i < launch.tape_begin[block + 1]; ++i) {
      const TapeItem& item = launch.tapes[i];
      if (item.phase >= launch.n_phases) break;
      slice = copies > 0 && item.phase == phase ? slice + 1 : 0;
      phase = static_cast<u32>(item.phase);
      if (!copy_item(item, slice)) return;
    }
  }

  // A block must not end while copies into its shared memory are under way, and consumers that saw an abort wait for
  // none. Of every slot the last use is waited for.
  DEVICE void drain() {
    const Waiter waiter = {launch, block, phase, Site::kDrain};
    for (u32 back = copies < kSlots ? copies : kSlots; back > 0; --back) {
      const u32 use = copies - back, slot = use % kSlots;
      const u64 begin = clock_cycles();
      while (!mbar_try_wait(Site::kDrain, full_barrier(smem, slot), use / kSlots & 1)) {
        if (clock_cycles() - begin > kDrainCycles) return write_abort(waiter, use, copies);
      }
    }
  }
};

// The walk of the producer lane.
inline DEVICE void produce(const Launch& launch, u32 smem, u32 block) {
  Producer producer = {launch, smem, block};
  producer.copy_tape();
  producer.drain();
}

}  // namespace flashformer

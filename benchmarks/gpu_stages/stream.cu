// A ring of bulk copies as the kernel has it, of any slot size and depth: what memory gives, and what hand-offs take.
//
// A block reads its items round by round: in a round n_items, or n_items +- uneven in turns. Item i of block b lies at
// (b * capacity + i) * slot_bytes, or interleaved at (i * n_blocks + b) * slot_bytes. Consumers add up all words. After
// each round they may meet all other blocks, or stand still for some cycles, while the producer goes on.
#include "ptx.cuh"

namespace flashformer {

constexpr Site kAny = static_cast<Site>(0);
constexpr u64 kPatience = u64{1} << 30;  // cycles that a wait may take
constexpr u64 kSoon = u64{1} << 22;      // once one was in vain

struct Stream {
  const u8* data;
  u32* sums;     // (n_blocks) of the words read
  u32* counter;  // (2) arrivals, waits in vain
  u64* clock;    // (2) cycles and ns that block 0 took
  u32 slot_bytes, n_slots;
  u32 n_items, uneven, rounds;
  u32 capacity;  // items of a block; 0: interleaved
  u32 barriers;  // whether blocks meet after each round
  u32 bubble;    // cycles
};

inline DEVICE u32 items_in(const Stream& stream, u32 round) {
  return (block_index() + round) % 2 ? stream.n_items + stream.uneven : stream.n_items - stream.uneven;
}

inline DEVICE void patient_wait(const Stream& stream, u32 bar, u32 parity) {
  const u64 begin = clock_cycles();
  while (!mbar_try_wait(kAny, bar, parity)) {
    const u64 waited = clock_cycles() - begin;
    if (waited > kPatience) return red_relaxed_add(kAny, stream.counter + 1, 1);
    if (waited > kSoon && ld_relaxed(stream.counter + 1) != 0) return;
  }
}

struct Place {
  u32 slot = 0, parity = 0;

  DEVICE void advance(u32 n_slots) {
    const bool wraps = slot + 1 == n_slots;
    slot = wraps ? 0 : slot + 1;
    parity ^= wraps ? 1 : 0;
  }
};

inline DEVICE void copy_all(const Stream& stream, u32 smem, u32 full, u32 empty) {
  Place at;
  u64 item = 0;
#pragma unroll 1
  for (u32 round = 0; round < stream.rounds; ++round) {
    const u32 n = items_in(stream, round);
#pragma unroll 1
    for (u32 i = 0; i < n; ++i, ++item) {
      const u64 place =
          stream.capacity ? u64{block_index()} * stream.capacity + item : item * n_blocks() + block_index();
      patient_wait(stream, empty + 8 * at.slot, at.parity ^ 1);
      fence_proxy_async(kAny);
      mbar_arrive_expect_tx(kAny, full + 8 * at.slot, stream.slot_bytes);
      bulk_copy(smem + at.slot * stream.slot_bytes, stream.data + place * stream.slot_bytes, stream.slot_bytes,
                full + 8 * at.slot);
      at.advance(stream.n_slots);
    }
  }
}

inline DEVICE void meet(const Stream& stream, u32 round) {
  bar_sync(kAny, 1, 256);
  if (thread_index() == 0) {
    fence_gpu(kAny);
    red_relaxed_add(kAny, stream.counter, 1);
    const u32 target = n_blocks() * (round + 1);
    const u64 begin = clock_cycles();
    while (static_cast<i32>(ld_acquire(kAny, stream.counter) - target) < 0) {
      const u64 waited = clock_cycles() - begin;
      if (waited > kPatience) red_relaxed_add(kAny, stream.counter + 1, 1);
      if (waited > kSoon && ld_relaxed(stream.counter + 1) != 0) break;
    }
  }
  bar_sync(kAny, 1, 256);
}

inline DEVICE u32 add_all(const Stream& stream, u32 smem, u32 full, u32 empty) {
  Place at;
  u32 sum = 0;
#pragma unroll 1
  for (u32 round = 0; round < stream.rounds; ++round) {
    const u32 n = items_in(stream, round);
#pragma unroll 1
    for (u32 i = 0; i < n; ++i) {
      patient_wait(stream, full + 8 * at.slot, at.parity);
#pragma unroll 4
      for (u32 byte = 16 * thread_index(); byte < stream.slot_bytes; byte += 16 * 256) {
        const u32x4 v = ld_shared<u32x4>(smem + at.slot * stream.slot_bytes + byte);
        sum += v.x + v.y + v.z + v.w;
      }
      warp_sync(kAny);
      if (lane_index() == 0) mbar_arrive(kAny, empty + 8 * at.slot);
      at.advance(stream.n_slots);
    }
    if (stream.bubble != 0) {
      const u64 begin = clock_cycles();
      while (clock_cycles() - begin < stream.bubble) {
      }
    }
    if (stream.barriers != 0) meet(stream, round);
  }
  return sum;
}

}  // namespace flashformer

extern "C" __global__ void __launch_bounds__(288, 1) stream_read(const __grid_constant__ flashformer::Stream stream) {
  using namespace flashformer;
  const u32 smem = shared_base(), full = smem + stream.n_slots * stream.slot_bytes, empty = full + 8 * stream.n_slots;
  if (thread_index() == 0) {
    for (u32 s = 0; s < stream.n_slots; ++s) {
      mbar_init(full + 8 * s, 1);
      mbar_init(empty + 8 * s, 8);
    }
    fence_mbar_init(kAny);
  }
  bar_sync(kAny, 0, 288);
  if (warp_index() == 8) {
    if (lane_index() == 0) copy_all(stream, smem, full, empty);
  } else {
    const u64 cycles = clock_cycles(), ns = clock_ns();
    const u32 sum = add_all(stream, smem, full, empty);
    red_relaxed_add(kAny, stream.sums + block_index(), sum);
    if (block_index() == 0 && thread_index() == 0) {
      st_global(stream.clock, clock_cycles() - cycles);
      st_global(stream.clock + 1, clock_ns() - ns);
    }
  }
}

extern "C" __global__ void __launch_bounds__(288, 1) nothing(const __grid_constant__ flashformer::Stream stream) {
  if (stream.rounds == 0xFFFFFFFFu) flashformer::st_global(stream.sums, 1u);
}

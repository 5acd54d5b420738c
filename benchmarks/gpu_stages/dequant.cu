// How fast a multiprocessor turns packed weights in shared memory into sums: the kernel's own inner loop, without
// copies, hand-offs or anything else. The 8 warps take the units of a slot in turns, as in product.cuh.
//
// launch.spin_limit: passes over all slots. launch.times (n_blocks) u64: cycles. launch.accumulators: (n_blocks, 256).
#include "weights.cuh"

extern "C" __global__ void __launch_bounds__(288, 1) dequant(const __grid_constant__ flashformer::Launch launch) {
  using namespace flashformer;
  constexpr u32 kPerWarp = kBodySlotUnits / u32{kWarps};
  const u32 smem = shared_base(), thread = thread_index();
  if (warp_index() == 8) return;
  for (u32 at = 4 * thread; at < kSmemBytes; at += 4 * kConsumers) st_shared<u32>(smem + at, 0x2C012C01u);
  bar_sync(Site::kInitBar, kConsumerBarrier, kConsumers);
  const Context ctx = {launch, *launch.model, smem, thread, warp_index(), lane_index(), block_index()};
  const Rows rows(ctx, kCols);
  TileSums sums;
  const u64 begin = clock_cycles();
  UNROLL(1)
  for (u64 pass = 0; pass < launch.spin_limit; ++pass) {
    UNROLL(1)
    for (u32 slot = 0; slot < kSlots; ++slot) {
      const u32 at = smem + kSmemRing + slot * kSlotBytes;
      UNROLL(kPerWarp)
      for (u32 i = 0; i < kPerWarp; ++i) {
        const u32 u = ctx.warp + i * u32{kWarps};
        BodyWeights::add(sums, at + u * kBodyUnitBytes, ctx.lane, rows, u * kBodyUnitK);
      }
      warp_sync(Site::kSlotWarp);
    }
  }
  bar_sync(Site::kPartialBar, kConsumerBarrier, kConsumers);
  if (thread == 0) st_global(launch.times + ctx.block, clock_cycles() - begin);
  f32 sum = 0;
  for (u32 n = 0; n < kBlocks; ++n) sum = sum + (sums.at[n][0] + sums.at[n][1]) + (sums.at[n][2] + sums.at[n][3]);
  st_global(launch.accumulators + u64{ctx.block} * kConsumers + thread, sum);
}

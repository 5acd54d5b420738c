// The input of a product of one row, where a wait is not shared by many: fp32 in global memory -> a slice of 2048
// elements in shared memory in two steps, so that a slice is under way in registers while the one before is multiplied.
//
// Elements, sums and bits are those of stage.cuh: thread t owns elements 4 t .. 4 t + 3 of every 1024. The first slice
// is read once, for the sum of squares and for itself; 4 k bytes, and as much again of what a norm has beyond it.
#pragma once

#include "stage.cuh"

namespace flashformer {

struct RowSlice {
  Norm norm;
  f32x4 v[kRowsAtOnce][kSteps] = {};  // of the first row

  // Elements of the input from `begin` on.
  DEVICE RowSlice(const Context& ctx, const Phase& phase, u32 begin) : norm(ctx, phase, begin) {
    const Input input(ctx, phase, 1, begin);
    for (u32 i = 0; i < kSteps; ++i) {
      const bool there = begin + 4 * ctx.thread + i * kStep < static_cast<u32>(phase.k);
      v[0][i] = there ? input.load(input.places.of(0), i) : f32x4{};
    }
  }

  DEVICE f32 square_sum(f32 sum) const {
    for (u32 i = 0; i < kSteps; ++i) {
      const f32x4& x = v[0][i];
      sum = fma_f32(x.w, x.w, fma_f32(x.z, x.z, fma_f32(x.y, x.y, fma_f32(x.x, x.x, sum))));
    }
    return sum;
  }

  // They are in shared memory when this returns.
  DEVICE void put(const Context& ctx, const Phase& phase, u32 begin) {
    put_columns(ctx, phase, norm, 1, begin, 0, {}, v);
    bar_sync(Site::kStageBar, kConsumerBarrier, kConsumers);
  }
};

// The factor of the norm of a row, of which `slice` is the first: added up as by square_sums, and every thread works
// the factor out. 1 where there is no norm.
inline DEVICE f32 row_factor(Context& ctx, const Phase& phase, const RowSlice& slice) {
  constexpr u32 kColumn = 1;  // of kSmemReduce; column 0 is for scale_rows, which comes next
  if (!slice.norm.normed) return 1.0f;
  f32 sum[1] = {slice.square_sum(0.0f)};
  UNROLL(1)
  for (u32 begin = u32{kSliceK}; begin < static_cast<u32>(phase.k); begin += u32{kSliceK}) {
    sum[0] = RowSlice(ctx, phase, begin).square_sum(sum[0]);
  }
  warp_sums(sum);
  if (ctx.lane == 0) st_shared<f32>(reduce_address(ctx, kColumn) + 4 * ctx.warp, sum[0]);
  bar_sync(Site::kSumsBar, kConsumerBarrier, kConsumers);
  const f32 all = square_sum(ctx, kColumn);
  if (!(all <= kLargestF32)) ctx.report_bad(place_of(ctx, phase));
  return rms_factor(all, static_cast<i32>(ctx.model.d_model), static_cast<f32>(phase.norm_eps));
}

}  // namespace flashformer

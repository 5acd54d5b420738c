// Products: every output of this block's tiles for all rows, sums[output][row] = sum over k of w[output][k] *
// x[row][k].
//
// k is cut into slices of 2048: slices outermost, tiles inside, so that shared memory holds one slice of x whatever k
// is. The units of an item are dealt to the 8 warps, unit u to warp u % 8; a warp keeps its sums in registers over the
// slots of an item. Then the 8 partial sums of every output are added in warp order by the thread that owns the output,
// and slices in the order of k. So the order of addition is fixed by the matrix alone: not by the rows, nor by the
// number of blocks.
//
// From the ring: every byte of the tiles once. From shared memory besides: the rows once per tile.
#pragma once

#include "epilogue.cuh"
#include "ring.cuh"
#include "row.cuh"
#include "weights.cuh"

namespace flashformer {

constexpr u32 kPartialStride = 20;  // floats between columns of partial sums: 16 outputs, and no bank conflict
static_assert(kPartialBytes == kWarps * kRows * kPartialStride * 4);

// This warp's share of an item of `units` units. A full slot is laid out without branches, so that loads, conversions
// and mma of its units overlap.
template <class W>
inline DEVICE TileSums multiply_item(Context& ctx, const Rows& rows, u32 units) {
  constexpr u32 kPerWarp = W::kSlotUnits / u32{kWarps};
  TileSums sums;
  UNROLL(1)
  for (u32 done = 0; done < units; done += W::kSlotUnits) {
    const u32 n = units - done < W::kSlotUnits ? units - done : W::kSlotUnits;
    const u32 slot = take_slot(ctx);
    const auto add = [&](u32 u) { W::add(sums, slot + u * W::kUnitBytes, ctx.lane, rows, (done + u) * W::kUnitK); };
    if (!ctx.aborted && n == W::kSlotUnits) {
      UNROLL(kPerWarp)
      for (u32 i = 0; i < kPerWarp; ++i) add(ctx.warp + i * u32{kWarps});
    } else if (!ctx.aborted) {
      UNROLL(1)
      for (u32 u = ctx.warp; u < n; u += u32{kWarps}) add(u);
    }
    release_slot(ctx);
  }
  return sums;
}

inline DEVICE u32 partial_address(const Context& ctx, u32 buffer, u32 warp, u32 column, u32 output) {
  const u32 place = (warp * kRows + column) * kPartialStride + output;
  return ctx.at(kSmemPartial) + buffer * kPartialBytes + 4 * place;
}

inline DEVICE void store_partials(const Context& ctx, const TileSums& sums, u32 buffer) {
  const u32 output = ctx.lane / 4, first = ctx.lane % 4 * 2;
  for (u32 n = 0; n < kBlocks; ++n) {
    for (u32 i = 0; i < 4; ++i) {
      const u32 column = 8 * n + first + i % 2;
      if (column < kRows)
        st_shared<f32>(partial_address(ctx, buffer, ctx.warp, column, output + i / 2 * 8), sums.at[n][i]);
    }
  }
}

// The sum of all warps for this thread's output.
inline DEVICE f32 sum_partials(const Context& ctx, u32 buffer) {
  const u32 column = kRows == 1 ? 0 : ctx.thread / kOutputs;  // of one row a whole warp comes here
  f32 part[kWarps];
  for (u32 w = 0; w < kWarps; ++w) {
    part[w] = ld_shared<f32>(partial_address(ctx, buffer, w, column, ctx.thread % kOutputs));
  }
  f32 sum = part[0];
  for (u32 w = 1; w < kWarps; ++w) sum = sum + part[w];
  return sum;
}

// The sum over the slices before, of tile `index` of this block; one thread owns an element throughout. A block's first
// tiles are in shared memory, those for which there is no room in global memory.
struct Accumulator {
  const Context& ctx;
  u32 index;

  DEVICE bool in_shared() const { return index < kAccTiles; }
  DEVICE u32 shared() const { return ctx.at(kSmemAccumulators) + 4 * (index * kFinishers + ctx.thread); }
  DEVICE f32* global() const {
    const u64 tile = static_cast<u64>(ctx.block) * kMoreAccTiles + index - kAccTiles;
    return ctx.launch.accumulators + tile * kFinishers + ctx.thread;
  }
  DEVICE f32 get() const { return in_shared() ? ld_shared<f32>(shared()) : ld_global(global()); }
  DEVICE void put(f32 sum) const { in_shared() ? st_shared<f32>(shared(), sum) : st_global(global(), sum); }
};

// A slice as the tiles see it.
struct Slice {
  u32 index, n_slices;
  u32 units;  // of a tile

  DEVICE bool is_last() const { return index + 1 == n_slices; }
};

// This warp's share of an item, by the format of the phase.
inline DEVICE TileSums multiply(Context& ctx, const Phase& phase, const Rows& rows, u32 units) {
  if constexpr (!kOneFormat) {
    if (is(phase, Op::kLmHead)) return multiply_item<HeadWeights>(ctx, rows, units);
  }
  return multiply_item<BodyWeights>(ctx, rows, units);
}

// All tiles of this block for one slice. `tiles`: how many were done in this phase, which says which buffer of partial
// sums is free: the one before is still being read, by threads that meet at the next barrier.
inline DEVICE void multiply_tiles(Context& ctx, const Phase& phase, const Span& span, Epilogue& epilogue, u32 columns,
                                  const Slice& slice, u32& tiles) {
  const Rows rows(ctx, columns);
  const u32 begin = static_cast<u32>(span.begin), end = static_cast<u32>(span.end);
  UNROLL(1)
  for (u32 tile = begin; tile < end; ++tile, ++tiles) {
    if (slice.is_last()) epilogue.fetch(tile);
    const TileSums sums = multiply(ctx, phase, rows, slice.units);
    store_partials(ctx, sums, tiles % 2);
    bar_sync(Site::kPartialBar, kConsumerBarrier, kConsumers);
    if (!epilogue.busy()) continue;
    f32 sum = sum_partials(ctx, tiles % 2);
    if (!takes_bf16(phase) && epilogue.live()) {
      sum = sum * ld_shared<f32>(unscale_address(ctx, ctx.thread / kOutputs));
    }
    const Accumulator accumulator = {ctx, tile - begin};
    if (slice.index > 0 && epilogue.live()) sum = accumulator.get() + sum;
    if (slice.is_last()) {
      epilogue.finish(tile, sum);
    } else if (epilogue.live()) {
      accumulator.put(sum);
    }
  }
}

// All slices of the only row.
inline DEVICE void product_of_row(Context& ctx, const Phase& phase, const Span& span, Epilogue& epilogue) {
  const u32 n_slices = static_cast<u32>(phase.n_slices);
  RowSlice row(ctx, phase, 0);
  const f32 factor = row_factor(ctx, phase, row);
  u32 tiles = 0;
  UNROLL(1)
  for (u32 s = 0; s < n_slices; ++s) {
    row.norm.of_row = factor;
    row.put(ctx, phase, s * u32{kSliceK});
    if (s + 1 < n_slices) row = RowSlice(ctx, phase, (s + 1) * u32{kSliceK});
    multiply_tiles(ctx, phase, span, epilogue, 1, {s, n_slices, units_in_slice(phase, s)}, tiles);
  }
}

// All slices of all rows.
inline DEVICE void product_of_rows(Context& ctx, const Phase& phase, const Span& span, Epilogue& epilogue,
                                   u32 columns) {
  const u32 n_slices = static_cast<u32>(phase.n_slices);
  prepare_norms(ctx, phase, columns);
  u32 tiles = 0;
  UNROLL(1)
  for (u32 s = 0; s < n_slices; ++s) {
    const Slice slice = {s, n_slices, units_in_slice(phase, s)};
    stage_slice(ctx, phase, columns, s * u32{kSliceK});
    multiply_tiles(ctx, phase, span, epilogue, columns, slice, tiles);
  }
}

// The phases qkv, o_proj, gate_up, down and lm_head; span: tiles.
inline DEVICE void product(Context& ctx, const Phase& phase, const Span& span) {
  const u32 columns = column_count(ctx, phase);
  Epilogue epilogue(ctx, phase, columns);
  if (span.begin < span.end) {
    if constexpr (kOneRow) {
      product_of_row(ctx, phase, span, epilogue);
    } else {
      product_of_rows(ctx, phase, span, epilogue, columns);
    }
  }
  epilogue.end();
}

}  // namespace flashformer

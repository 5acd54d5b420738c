// Inputs of products: fp32 rows in global memory -> slices of 2048 elements in shared memory, bf16 or f16, one row per
// column of the product.
//
//   qkv gate_up lm_head   norm(residual + fold), normalised first, then rounded
//   o_proj                attention results, merged already, gathered head by head
//   down                  hidden
//
// Every block makes the whole input for itself: rows * d_model * 4 bytes from L2 for the sums of squares, and the same
// again for the slices. All 256 threads work on every row: thread t owns elements 4 t .. 4 t + 3 of every 1024, lanes
// are added by a butterfly and warps in order, so a row's bits do not depend on its company. f16 slices carry a power
// of two per row and slice that brings the largest element into [2^14, 2^15); it is taken out of the sums again.
#pragma once

#include "context.cuh"
#include "math.cuh"
#include "ptx.cuh"

namespace flashformer {

constexpr u32 kRowsAtOnce = kRows < 4 ? kRows : 4;  // rows whose loads are in flight together
constexpr bool kOneRow = kRows == 1 && kUsesFolds == 0;
constexpr u32 kStep = 4 * kConsumers;         // elements between two of a thread's four
constexpr u32 kSteps = u32{kSliceK} / kStep;  // of a slice
static_assert(kSliceK % kStep == 0 && kSliceK * 2 <= kXStride && kXStride % 16 == 0 && kRows <= kMaxRows);
static_assert(kWarps * 32 == kConsumers);

inline DEVICE bool is(const Phase& phase, Op op) { return phase.op == static_cast<i64>(op); }

// Columns of a product are the rows of the forward, for lm_head only those that want something.
inline DEVICE u32 column_count(const Context& ctx, const Phase& phase) {
  return is(phase, Op::kLmHead) ? ctx.launch.n_head_rows : ctx.launch.n_rows;
}
inline DEVICE u32 row_of(const Context& ctx, const Phase& phase, u32 column) {
  return is(phase, Op::kLmHead) ? static_cast<u32>(ctx.launch.head_row[column]) : column;
}

inline DEVICE f32x4 scaled(const f32x4& v, f32 by) { return {v.x * by, v.y * by, v.z * by, v.w * by}; }
inline DEVICE f32x4 product_of(const f32x4& a, const f32x4& b) { return {a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w}; }
inline DEVICE f32x4 sum_of(const f32x4& a, const f32x4& b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

// ---- sums of squares and factors of norms

// The eight values of a column in kSmemReduce, one per warp.
struct PerWarp {
  f32x4 low, high;
};
inline DEVICE u32 reduce_address(const Context& ctx, u32 column) { return ctx.at(kSmemReduce) + column * 32; }
inline DEVICE PerWarp per_warp(const Context& ctx, u32 column) {
  const u32 at = reduce_address(ctx, column);
  return {ld_shared<f32x4>(at), ld_shared<f32x4>(at + 16)};
}

// Where the rows of a product's columns begin: lane c knows it of column c.
struct RowPlaces {
  u32 mine;

  // The last lanes repeat the last column.
  static DEVICE u32 column_of(const Context& ctx, u32 columns) { return ctx.lane < columns ? ctx.lane : columns - 1; }
  // Whole warps.
  DEVICE u32 of(u32 column) const { return kRows == 1 ? mine : shfl_idx_u32(mine, column); }
};

// Of rows that lie `stride` apart.
inline DEVICE RowPlaces row_places(const Context& ctx, const Phase& phase, u32 columns, u32 stride) {
  return {row_of(ctx, phase, RowPlaces::column_of(ctx, columns)) * stride};
}

// Sums of squares of `width` elements (a multiple of 4) of every column, one per warp, into kSmemReduce.
// load(column, row, k) gives four elements, `row` being the place of the row.
template <class Load>
inline DEVICE void square_sums(const Context& ctx, u32 columns, const RowPlaces& places, u32 width, Load load) {
  constexpr u32 kTogether = kUsesFolds ? 1 : kRowsAtOnce == 1 ? 4 : 2;
  UNROLL(1)
  for (u32 first = 0; first < columns; first += kRowsAtOnce) {
    u32 place[kRowsAtOnce];
    f32 sum[kRowsAtOnce] = {};
    for (u32 j = 0; j < kRowsAtOnce; ++j) place[j] = places.of(first + j);
    UNROLL(1)
    for (u32 k = 4 * ctx.thread; k < width; k += kTogether * kStep) {
      f32x4 v[kTogether][kRowsAtOnce];
      for (u32 i = 0; i < kTogether; ++i) {
        for (u32 j = 0; j < kRowsAtOnce; ++j) {
          const bool there = first + j < columns && k + i * kStep < width;
          v[i][j] = there ? load(first + j, place[j], k + i * kStep) : f32x4{};
        }
      }
      for (u32 i = 0; i < kTogether; ++i) {
        for (u32 j = 0; j < kRowsAtOnce; ++j) {
          sum[j] = fma_f32(v[i][j].x, v[i][j].x, sum[j]);
          sum[j] = fma_f32(v[i][j].y, v[i][j].y, sum[j]);
          sum[j] = fma_f32(v[i][j].z, v[i][j].z, sum[j]);
          sum[j] = fma_f32(v[i][j].w, v[i][j].w, sum[j]);
        }
      }
    }
    warp_sums(sum);
    for (u32 j = 0; j < kRowsAtOnce; ++j) {
      if (ctx.lane == 0 && first + j < columns) st_shared<f32>(reduce_address(ctx, first + j) + 4 * ctx.warp, sum[j]);
    }
  }
  bar_sync(Site::kSumsBar, kConsumerBarrier, kConsumers);
}

inline DEVICE f32 square_sum(const Context& ctx, u32 column) {
  const PerWarp sums = per_warp(ctx, column);
  f32 sum = sums.low.x + sums.low.y;
  sum = sum + sums.low.z;
  sum = sum + sums.low.w;
  sum = sum + sums.high.x;
  sum = sum + sums.high.y;
  sum = sum + sums.high.z;
  return sum + sums.high.w;
}

// Where a phase that finds NaN or Inf in the residual says it was.
inline DEVICE i32 place_of(const Context& ctx, const Phase& phase) {
  if (is(phase, Op::kLmHead)) return 2 * static_cast<i32>(ctx.model.n_layers) - 1;
  return 2 * static_cast<i32>(phase.layer) - (is(phase, Op::kQkv) ? 1 : 0);
}

// The residual as phases see it: with the branch that is not in it yet, fold_scale * branch * factor * weight.
struct Residual {
  const f32* rows;         // (rows, stride)
  const f32* branch;       // (rows, stride), used if `folds`
  const f32* fold_weight;  // (stride)
  f32 fold_scale;
  u32 stride;
  bool folds;

  DEVICE Residual(const Context& ctx, const Phase& phase)
      : rows(ctx.launch.residual()),
        branch(ctx.launch.branch(phase.fold)),
        fold_weight(ctx.launch.vector(phase.fold_norm)),
        fold_scale(static_cast<f32>(phase.fold_scale)),
        stride(static_cast<u32>(ctx.model.d_model_stride)),
        folds(kUsesFolds && phase.fold >= 0) {}

  // Elements k .. k + 3 of the branch of a column whose row begins at `row`.
  DEVICE f32x4 fold(const Context& ctx, u32 column, u32 row, u32 k) const {
    const f32 factor = ld_shared<f32>(ctx.at(kSmemFolds) + 4 * column);
    const f32x4 x = ld_global(reinterpret_cast<const f32x4*>(branch + row + k));
    const f32x4 weight = ld_const(reinterpret_cast<const f32x4*>(fold_weight + k));
    return scaled(product_of(scaled(x, factor), weight), fold_scale);
  }
  DEVICE f32 one(const Context& ctx, u32 column, u32 row, u32 k) const {
    const f32 x = ld_global(rows + row * stride + k);
    if (!folds) return x;
    const f32 factor = ld_shared<f32>(ctx.at(kSmemFolds) + 4 * column);
    return x + ld_global(branch + row * stride + k) * factor * ld_const(fold_weight + k) * fold_scale;
  }
};

// kSmemReduce -> the factor of an RMS norm for every column, at `factors`.
inline DEVICE void norm_factors(Context& ctx, u32 columns, u32 factors, f64 eps, bool reports, i32 place) {
  if (ctx.thread < columns) {
    const f32 sum = square_sum(ctx, ctx.thread);
    if (reports && !(sum <= kLargestF32)) ctx.report_bad(place);
    const f32 factor = rms_factor(sum, static_cast<i32>(ctx.model.d_model), static_cast<f32>(eps));
    st_shared<f32>(ctx.at(factors) + 4 * ctx.thread, factor);
  }
  bar_sync(Site::kFactorsBar, kConsumerBarrier, kConsumers);
}

// Factors of the fold's norm, where there is a fold, then of the phase's own.
inline DEVICE void prepare_norms(Context& ctx, const Phase& phase, u32 columns) {
  const Residual residual(ctx, phase);
  const u32 end = is(phase, Op::kOProj) || is(phase, Op::kDown) ? 1 : 2;
  const RowPlaces places = row_places(ctx, phase, columns, residual.stride);
  UNROLL(1)
  for (u32 pass = residual.folds ? 0 : 1; pass < end; ++pass) {
    const bool own = pass == 1;
    const f32* base = own ? residual.rows : residual.branch;
    square_sums(ctx, columns, places, residual.stride, [&](u32 column, u32 row, u32 k) {
      const f32x4 x = ld_global(reinterpret_cast<const f32x4*>(base + row + k));
      return own && residual.folds ? sum_of(x, residual.fold(ctx, column, row, k)) : x;
    });
    norm_factors(ctx, columns, own ? kSmemFactors : kSmemFolds, own ? phase.norm_eps : phase.fold_eps, own,
                 place_of(ctx, phase));
  }
}

// ---- where elements come from

// The rows of a product's input: element k of a column is at the place of its row + offset of k.
struct Input {
  const f32* base;
  RowPlaces places;
  u32 pair[kSteps];  // offsets of this thread's elements: the first two,
  u32 next[kSteps];  // and the other two, which are their neighbours if kFours

  // Attention leaves the values of a (row, head), head_dim of them, in the place of the first chunk that the row sees.
  DEVICE Input(const Context& ctx, const Phase& phase, u32 columns, u32 begin) {
    const Model& model = ctx.model;
    const bool gathers = is(phase, Op::kOProj);
    const u32 head_dim = static_cast<u32>(phase.head_dim), stride = static_cast<u32>(model.partial_stride);
    const u32 head_stride = static_cast<u32>(model.chunks) * stride;
    for (u32 i = 0; i < kSteps; ++i) {
      const u32 k = begin + i * kStep + 4 * ctx.thread;
      pair[i] = gathers ? k / head_dim * head_stride + k % head_dim : k;
      if (!kFours) next[i] = gathers ? (k + 2) / head_dim * head_stride + (k + 2) % head_dim : k + 2;
    }
    if (gathers) {
      const u32 row = RowPlaces::column_of(ctx, columns);
      const i64 pos = ctx.launch.pos[row], beyond = pos - phase.window + 1;
      const u32 chunk = beyond > 0 ? static_cast<u32>(beyond) / u32{kKeyChunk} : 0;
      base = ctx.launch.partial_values(0);
      places.mine = row * static_cast<u32>(model.n_heads_max) * head_stride + chunk * stride;
    } else {
      const bool is_down = is(phase, Op::kDown);
      base = is_down ? ctx.launch.hidden() : ctx.launch.residual();
      places = row_places(ctx, phase, columns, static_cast<u32>(is_down ? model.hidden_stride : model.d_model_stride));
    }
  }

  DEVICE f32x4 load(u32 row, u32 step) const {
    const f32* at = base + row;
    if (kFours) return ld_global(reinterpret_cast<const f32x4*>(at + pair[step]));
    const f32x2 two = ld_global(reinterpret_cast<const f32x2*>(at + pair[step]));
    const f32x2 more = ld_global(reinterpret_cast<const f32x2*>(at + next[step]));
    return {two.x, two.y, more.x, more.y};
  }
};

// What is done to a row before it is rounded: the fold is added, the norm applied. Where there is none, factor and
// weights are 1, which changes no bit.
struct Norm {
  Residual residual;
  f32x4 weight[kSteps];
  f32 of_row = 1.0f;  // the factor, if kOneRow
  bool folds, normed;

  DEVICE Norm(const Context& ctx, const Phase& phase, u32 begin) : residual(ctx, phase) {
    const bool takes_residual = !is(phase, Op::kOProj) && !is(phase, Op::kDown);
    folds = residual.folds && takes_residual;
    normed = takes_residual && phase.norm >= 0;
    for (u32 i = 0; i < kSteps; ++i) {
      const u32 k = begin + i * kStep + 4 * ctx.thread;
      const f32* at = ctx.launch.vector(phase.norm) + k;
      weight[i] = {1.0f, 1.0f, 1.0f, 1.0f};
      if (normed && k < residual.stride) weight[i] = ld_const(reinterpret_cast<const f32x4*>(at));
    }
  }
  DEVICE f32 factor(const Context& ctx, u32 column) const {
    if constexpr (kOneRow) return of_row;
    return normed ? ld_shared<f32>(ctx.at(kSmemFactors) + 4 * column) : 1.0f;
  }
  DEVICE f32x4 apply(const Context& ctx, const f32x4& x, f32 factor, u32 column, u32 row, u32 k, u32 step) const {
    const f32x4 folded = folds ? sum_of(x, residual.fold(ctx, column, row, k)) : x;
    return product_of(scaled(folded, factor), weight[step]);
  }
};

// ---- slices

inline DEVICE f32 magnitude(f32 x) { return bit_copy<f32>(bit_copy<u32>(x) & 0x7FFFFFFFu); }
inline DEVICE f32 largest_of(const f32x4& v, f32 most) {  // keeps `most` where an element is NaN
  most = max_f32(magnitude(v.x), most);
  most = max_f32(magnitude(v.y), most);
  most = max_f32(magnitude(v.z), most);
  return max_f32(magnitude(v.w), most);
}

// The power of two that brings `largest` into [2^14, 2^15), at most 2^126 so that its inverse is normal too.
inline DEVICE i32 scale_exponent(f32 largest) {
  const i32 exponent = 141 - static_cast<i32>(bit_copy<u32>(largest) >> 23);
  return exponent < 126 ? exponent : 126;
}
inline DEVICE f32 power_of_two(i32 exponent) { return bit_copy<f32>(static_cast<u32>(exponent + 127) << 23); }

inline DEVICE u32 unscale_address(const Context& ctx, u32 column) { return ctx.at(kSmemUnscale) + 4 * column; }

// Columns [first, first + kRowsAtOnce): brings each into the range of f16, and keeps what undoes that.
inline DEVICE void scale_rows(const Context& ctx, u32 columns, u32 first, f32x4 (&v)[kRowsAtOnce][kSteps]) {
  f32 largest[kRowsAtOnce] = {};
  for (u32 j = 0; j < kRowsAtOnce; ++j) {
    for (u32 i = 0; i < kSteps; ++i) largest[j] = largest_of(v[j][i], largest[j]);
  }
  warp_maxima(largest);
  for (u32 j = 0; j < kRowsAtOnce; ++j) {
    if (ctx.lane == 0 && first + j < columns) st_shared<f32>(reduce_address(ctx, first + j) + 4 * ctx.warp, largest[j]);
  }
  bar_sync(Site::kScaleBar, kConsumerBarrier, kConsumers);
  UNROLL(kRowsAtOnce)
  for (u32 j = 0; j < kRowsAtOnce; ++j) {
    if (first + j >= columns) continue;
    const PerWarp most = per_warp(ctx, first + j);
    const i32 exponent = scale_exponent(largest_of(most.high, largest_of(most.low, 0.0f)));
    for (u32 i = 0; i < kSteps; ++i) v[j][i] = scaled(v[j][i], power_of_two(exponent));
    if (ctx.thread == 0) st_shared<f32>(unscale_address(ctx, first + j), power_of_two(-exponent));
  }
}

// Whether the rows of a phase are rounded to bf16, as its weights are; else to f16.
inline DEVICE bool takes_bf16(const Phase& phase) {
  constexpr bool kBody = kBodyFormat == static_cast<u32>(Format::kBf16);
  constexpr bool kHead = kHeadFormat == static_cast<u32>(Format::kBf16);
  if constexpr (kBody == kHead) return kBody;
  return is(phase, Op::kLmHead) ? kHead : kBody;
}

inline DEVICE u32x2 rounded(const f32x4& v, bool bf16) {
  if (bf16) return {cvt_bf16x2(v.x, v.y), cvt_bf16x2(v.z, v.w)};
  return {cvt_f16x2(v.x, v.y), cvt_f16x2(v.z, v.w)};
}

// Columns [first, first + kRowsAtOnce) of a slice from element `begin` on: what was loaded of them is normed, cut off
// at phase.k, rounded and put into shared memory. `row`: where they begin.
inline DEVICE void put_columns(const Context& ctx, const Phase& phase, const Norm& norm, u32 columns, u32 begin,
                               u32 first, const u32 (&row)[kRowsAtOnce], f32x4 (&v)[kRowsAtOnce][kSteps]) {
  const bool bf16 = takes_bf16(phase);
  const u32 end = static_cast<u32>(phase.k), mine = begin + 4 * ctx.thread;
  for (u32 j = 0; j < kRowsAtOnce; ++j) {
    if (first + j >= columns) continue;
    const f32 factor = norm.factor(ctx, first + j);
    for (u32 i = 0; i < kSteps; ++i) {
      const u32 k = mine + i * kStep;
      if (k < end) v[j][i] = norm.apply(ctx, v[j][i], factor, first + j, row[j], k, i);
      if (kFours) continue;
      if (k + 1 >= end) v[j][i].y = 0.0f;
      if (k + 2 >= end) v[j][i].z = 0.0f;
      if (k + 3 >= end) v[j][i].w = 0.0f;
    }
  }
  if (!bf16) scale_rows(ctx, columns, first, v);
  for (u32 j = 0; j < kRowsAtOnce; ++j) {
    if (first + j >= columns) continue;
    const u32 at = ctx.at(kSmemX) + (first + j) * kXStride + 8 * ctx.thread;
    for (u32 i = 0; i < kSteps; ++i) st_shared(at + 2 * i * kStep, rounded(v[j][i], bf16));
  }
}

// Elements [begin, begin + kSliceK) of all columns of the input, zero from phase.k on. They are there when this
// returns. The slice before is not read any more: its last products came before the barrier of their partial sums, and
// what undid its scale was read before kScaleBar.
inline DEVICE void stage_slice(const Context& ctx, const Phase& phase, u32 columns, u32 begin) {
  const Input input(ctx, phase, columns, begin);
  const Norm norm(ctx, phase, begin);
  const u32 end = static_cast<u32>(phase.k), mine = begin + 4 * ctx.thread;
  UNROLL(1)
  for (u32 first = 0; first < columns; first += kRowsAtOnce) {
    u32 row[kRowsAtOnce];
    f32x4 v[kRowsAtOnce][kSteps];
    for (u32 j = 0; j < kRowsAtOnce; ++j) row[j] = input.places.of(first + j);
    for (u32 j = 0; j < kRowsAtOnce; ++j) {
      for (u32 i = 0; i < kSteps; ++i) {
        v[j][i] = first + j < columns && mine + i * kStep < end ? input.load(row[j], i) : f32x4{};
      }
    }
    put_columns(ctx, phase, norm, columns, begin, first, row, v);
  }
  bar_sync(Site::kStageBar, kConsumerBarrier, kConsumers);
}

}  // namespace flashformer

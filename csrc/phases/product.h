// Products of packed tiles with rows of activations: sums[row][output] = sum over k of w[output][k] * x[row][k].
//
// A lane owns an output, the activation is broadcast, and every sum walks k from 0 upwards whatever the number of
// rows, so a row's bits do not depend on its company. A tile (vectors * 16 outputs, all of k) is cut into blocks of
// k that stay in the first-level cache while all rows pass over them; sums rest in scratch between blocks.
// While a block is computed, the block that this worker reads next is prefetched, across tiles and phases.
#pragma once

#include "../forward.h"

namespace flashformer {

// The weight policies: what one step (one 64-byte vector of weights, k_group consecutive k) adds to a sum.
template <class V>
struct WeightsF32 {  // fp32 weights x fp32 activations
  using X = float;
  static constexpr int kGroup = 1;
  static constexpr Format kFormat = Format::kF32;
  static typename V::F add(typename V::F sum, typename V::Raw w, const X* x) {
    return V::fma(V::as_f32(w), V::set1(x[0]), sum);
  }
};

template <class V>
struct WeightsBf16 {  // bf16 weights x fp32 activations
  using X = float;
  static constexpr int kGroup = 2;
  static constexpr Format kFormat = Format::kBf16;
  static typename V::F add(typename V::F sum, typename V::Raw w, const X* x) {
    return V::fma(V::odd_bf16(w), V::set1(x[1]), V::fma(V::even_bf16(w), V::set1(x[0]), sum));
  }
};

template <class V>
struct WeightsF16 {  // f16 weights x fp32 activations
  using X = float;
  static constexpr int kGroup = 2;
  static constexpr Format kFormat = Format::kF16;
  static typename V::F add(typename V::F sum, typename V::Raw w, const X* x) {
    return V::fma(V::odd_f16(w), V::set1(x[1]), V::fma(V::even_f16(w), V::set1(x[0]), sum));
  }
};

template <class V>
struct WeightsBf16Dot {  // bf16 weights x bf16 activations, by the dot-product instruction
  using X = uint16_t;
  static constexpr int kGroup = 2;
  static constexpr Format kFormat = Format::kBf16;
  static typename V::F add(typename V::F sum, typename V::Raw w, const X* x) { return V::dot_bf16(sum, w, x); }
};

// VS vectors of R rows over `steps` steps. w: first vector of the first step; a step is tile_step bytes long.
template <class V, class W, int VS, int R>
inline void product_block(float* sums, const char* w, int64_t tile_step, const typename W::X* x, int64_t x_stride,
                          int64_t steps, const char* ahead) {
  typename V::F sum[R][VS];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < VS; ++v) sum[r][v] = V::load(sums + r * kPad + v * kLanes);
  }
  for (int64_t s = 0; s < steps; ++s) {
    typename V::Raw weight[VS];
    for (int v = 0; v < VS; ++v) {
      weight[v] = V::load_raw(w + v * 64);
      V::prefetch(ahead + v * 64);
    }
    for (int r = 0; r < R; ++r) {
      const typename W::X* xs = x + r * x_stride + s * W::kGroup;
      for (int v = 0; v < VS; ++v) sum[r][v] = W::add(sum[r][v], weight[v], xs);
    }
    w += tile_step;
    ahead += tile_step;
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < VS; ++v) V::store(sums + r * kPad + v * kLanes, sum[r][v]);
  }
}

// All vectors of a tile for R rows.
template <class V, class W, int TILE, int R>
inline void product_rows(float* sums, const char* w, const typename W::X* x, int64_t x_stride, int64_t steps,
                         const char* ahead) {
  constexpr int most = R == 1 ? V::kVectorsOneRow : V::kVectorsManyRows;
  constexpr int VS = TILE < most ? TILE : most;
  for (int v = 0; v < TILE; v += VS) {
    product_block<V, W, VS, R>(sums + v * kLanes, w + v * 64, TILE * 64, x, x_stride, steps, ahead + v * 64);
  }
}

template <class V, class W, int TILE>
inline void product_remainder(int64_t rows, float* sums, const char* w, const typename W::X* x, int64_t x_stride,
                              int64_t steps, const char* ahead) {
  if constexpr (V::kRowsAtOnce > 4) {
    if (rows == 5) return product_rows<V, W, TILE, 5>(sums, w, x, x_stride, steps, ahead);
    if (rows == 4) return product_rows<V, W, TILE, 4>(sums, w, x, x_stride, steps, ahead);
    if (rows == 3) return product_rows<V, W, TILE, 3>(sums, w, x, x_stride, steps, ahead);
    if (rows == 2) return product_rows<V, W, TILE, 2>(sums, w, x, x_stride, steps, ahead);
  }
  if (rows == 1) return product_rows<V, W, TILE, 1>(sums, w, x, x_stride, steps, ahead);
}

// One tile for all rows. `next`: where this worker reads after this tile.
template <class V, class W, int TILE>
void product_tile(float* sums, const char* w, const typename W::X* x, int64_t x_stride, int64_t n_rows,
                  int64_t k_padded, const char* next) {
  constexpr int R = V::kRowsAtOnce;
  constexpr int64_t step_bytes = TILE * 64;
  const int64_t block_steps = (n_rows <= R ? kBlockBytes : 4 * kBlockBytes) / step_bytes;
  const int64_t steps = k_padded / W::kGroup;
  for (int64_t i = 0; i < n_rows * kPad; i += kLanes) V::store(sums + i, V::zero());
  for (int64_t s = 0; s < steps; s += block_steps) {
    const int64_t count = steps - s < block_steps ? steps - s : block_steps;
    const char* block = w + s * step_bytes;
    const char* ahead = s + count < steps ? block + count * step_bytes : next;
    const typename W::X* xs = x + s * W::kGroup;
    int64_t r = 0;
    for (; r + R <= n_rows; r += R) {
      product_rows<V, W, TILE, R>(sums + r * kPad, block, xs + r * x_stride, x_stride, count, ahead);
      ahead = block;  // later rows find everything in the cache
    }
    product_remainder<V, W, TILE>(n_rows - r, sums + r * kPad, block, xs + r * x_stride, x_stride, count, ahead);
  }
}

// All tiles of a worker's span. finish(first output, sums (n_rows, kPad)) is called after each tile.
template <class V, class W, class Finish>
inline void product(Worker& worker, const Phase& phase, const Span& span, const typename W::X* x, int64_t x_stride,
                    int64_t n_rows, Finish finish) {
  if (span.begin >= span.end) return;
  const char* tile = worker.take_tape_item();
  float* sums = worker.sums();
  for (int64_t unit = span.begin; unit < span.end; unit += span.step) {
    worker.begin_unit(unit);
    const char* next = unit + span.step < span.end ? tile + phase.tile_bytes : worker.tape_ahead();
    switch (phase.vectors) {
      case 1:
        product_tile<V, W, 1>(sums, tile, x, x_stride, n_rows, phase.k_padded, next);
        break;
      case 2:
        product_tile<V, W, 2>(sums, tile, x, x_stride, n_rows, phase.k_padded, next);
        break;
      default:
        product_tile<V, W, 4>(sums, tile, x, x_stride, n_rows, phase.k_padded, next);
    }
    finish(unit * phase.vectors * kLanes, sums);
    tile += phase.tile_bytes;
  }
}

}  // namespace flashformer

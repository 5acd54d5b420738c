// Products by a matrix unit (V::configure, load_tile, multiply_...): the weights of a tile are its operand as they lie
// packed, 16 outputs by 64 bytes of k; up to 16 rows of activations are the other. Few rows, which it would not serve
// at the speed of memory, take loops that give the same bits: QuantNarrow, as sums of bytes are exact, and for one row
// of bf16 FMAs in the unit's order.
#pragma once

#include <cstring>
#include <type_traits>

#include "../simd/amx.h"
#include "../simd/isa.h"
#include "product.h"
#include "quant.h"

namespace flashformer {

template <class V, int TILE>
inline void load_sums(const float* sums) {
  for_each_tile<TILE>([&]<int T>() { V::template load_tile<T>(sums + T * kLanes, kPad * sizeof(float)); });
}
template <class V, int TILE>
inline void store_sums(float* sums) {
  for_each_tile<TILE>([&]<int T>() { V::template store_tile<T>(sums + T * kLanes, kPad * sizeof(float)); });
}

// bf16 weights x bf16 activations. A block is counted in steps of 2 k; the unit takes 16 of them at once.
template <class V>
struct MatrixBf16 {
  using X = uint16_t;
  struct In {
    Input<uint16_t> rows;
    Shape<V> shape;
  };
  static constexpr bool kMatrix = true;
  static constexpr AtOnce kAtOnce = {V::kMatrixRows, V::kPlain.vectors_one_row, 4};
  static constexpr int64_t kBlock = 2 * kBlockBytes;  // sums go to memory and back between blocks
  static constexpr int64_t kAhead = 0;
  static constexpr int64_t kSteps = 16;
  static_assert(kBlock % (kSteps * kPad * 4) == 0, "only the end of k may be less than a product");

  static In take(Worker&, const Phase&, const Input<X>& rows, int64_t) { return {rows, {}}; }

  template <int TILE, int R, class A>
  static void rows(const Phase& phase, float* sums, const char* w, const In& in, int64_t row, int64_t step,
                   int64_t steps, A ahead) {
    static_assert(R == 1);
    const typename V::UnitArithmetic as_the_unit;
    one_row<TILE>(phase, sums, w, in.rows.x + row * in.rows.stride + step * 2, steps, ahead);
  }
  template <int TILE, class A>
  static void some_rows(const Phase& phase, int64_t n_rows, float* sums, const char* w, const In& in, int64_t row,
                        int64_t step, int64_t steps, A ahead) {
    if (n_rows == 1) return rows<TILE, 1>(phase, sums, w, in, row, step, steps, ahead);
    const uint16_t* x = in.rows.x + row * in.rows.stride + step * 2;
    in.shape.set(n_rows, V::kMatrixBytes);
    load_sums<V, TILE>(sums);
    for (; steps >= kSteps; steps -= kSteps, w += kSteps * TILE * 64, x += kSteps * 2) {
      ahead.template pass<V>(kSteps * TILE);
      multiply<TILE>(w, TILE * 64, x, in.rows.stride * 2);
    }
    if (steps > 0) last_steps<TILE>(w, x, in.rows.stride, n_rows, steps);
    store_sums<V, TILE>(sums);
  }

 private:
  template <int TILE>
  static void multiply(const char* w, int64_t w_stride, const uint16_t* x, int64_t x_stride) {
    V::template load_tile<V::kActivations>(x, x_stride);
    for_each_tile<TILE>([&]<int T>() {
      constexpr int W = V::kWeights + T % 3;
      V::template load_tile<W>(w + T * 64, w_stride);
      V::template multiply_bf16<T, W>();
    });
  }
  // Fewer than 16: zeros behind them.
  template <int TILE>
  static void last_steps(const char* w, const uint16_t* x, int64_t stride, int64_t rows, int64_t steps) {
    alignas(64) char weights[kSteps * TILE * 64] = {};
    alignas(64) char activations[V::kMatrixRows * V::kMatrixBytes] = {};
    std::memcpy(weights, w, static_cast<std::size_t>(steps * TILE * 64));
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(activations + r * V::kMatrixBytes, x + r * stride, static_cast<std::size_t>(steps * 4));
    }
    multiply<TILE>(weights, TILE * 64, reinterpret_cast<const uint16_t*>(activations), V::kMatrixBytes);
  }

  // One row as the unit computes it: of 16 steps, even k and odd k each from zero. A call of its own, as what comes
  // before and after it has other floating-point control.
  template <int TILE, class A>
  [[gnu::noinline]] static void one_row(const Phase& phase, float* sums, const char* w, const uint16_t* x,
                                        int64_t steps, A ahead) {
    constexpr int VS = TILE * A::kTiles;
    const int64_t tile_bytes = phase.tile_bytes;
    typename V::F sum[VS];
    for (int v = 0; v < VS; ++v) sum[v] = V::load(sums + v * kLanes);
    for (; steps > 0; steps -= kSteps, w += kSteps * TILE * 64, x += kSteps * 2) {
      if constexpr (A::kTiles == 2) prefetch_input<V>(x);
      typename V::F even[VS], odd[VS];
      for (int v = 0; v < VS; ++v) even[v] = odd[v] = V::zero();
      const int64_t n = steps < kSteps ? steps : kSteps;
      for (int64_t s = 0; s < n; ++s, ahead.move(TILE)) {
        const typename V::F x0 = V::set1_bf16(x[2 * s]), x1 = V::set1_bf16(x[2 * s + 1]);
        for (int v = 0; v < VS; ++v) {
          const typename V::Raw weight = V::load_once(w + s * TILE * 64 + place<TILE>(v, tile_bytes));
          ahead.template prefetch<V>(v);
          even[v] = V::fma(V::even_bf16(weight), x0, even[v]);
          odd[v] = V::fma(V::odd_bf16(weight), x1, odd[v]);
        }
      }
      if (n < kSteps) {  // zeros behind them make -0 a +0
        for (int v = 0; v < VS; ++v) even[v] = V::add(even[v], V::zero()), odd[v] = V::add(odd[v], V::zero());
      }
      for (int v = 0; v < VS; ++v) sum[v] = V::add(sum[v], V::add(even[v], odd[v]));
    }
    for (int v = 0; v < VS; ++v) V::store(sums + v * kLanes, sum[v]);
  }
};

// Codes of 4 bits as signed bytes, taken apart once for all rows that pass over a block.
template <class V, class C>
class SignedBytes {
 public:
  SignedBytes() {}  // bytes_ is not made zero

  // Of group i of a block of `groups`, k * TILE * 16 codes. What is too large to be kept is read once only.
  template <int TILE>
  const char* group(const char* block, int64_t groups, int64_t i, const char* codes, int64_t k) const {
    static_assert(C::kStep == 8);
    const int64_t n = k * TILE * 16;
    const bool kept = groups * n <= kBytes;
    char* bytes = bytes_ + (kept ? i : i % 2) * n;
    if (kept && block == block_ && i < known_) return bytes;
    block_ = block;
    known_ = i + 1;
    for (int64_t at = 0; at < n / 2; at += TILE * 64) {
      for (int v = 0; v < TILE; ++v) {
        const typename V::Raw raw = V::load_raw(codes + at + v * 64);
        char* to = bytes + 2 * at + v * 64;
        V::store_raw(to, V::subtract_bytes(C::template bytes<0>(raw), C::kBias));
        V::store_raw(to + TILE * 64, V::subtract_bytes(C::template bytes<1>(raw), C::kBias));
      }
    }
    return bytes;
  }

 private:
  static constexpr int64_t kBytes = 16 << 10;
  static_assert(kBytes >= 2 * kBlockBytes && kBytes >= 2 * kMostGroup * kPad, "a block of codes, or two groups");
  alignas(64) mutable char bytes_[kBytes];
  mutable const char* block_ = nullptr;
  mutable int64_t known_ = 0;  // groups of it, from the first on
};

// Codes of 8 bits are bytes as they lie, off by kBias.
template <class V, class C>
struct BytesAsTheyAre {
  template <int TILE>
  const char* group(const char*, int64_t, int64_t, const char* codes, int64_t) const {
    return codes;
  }
};

// Codes x int8 activations: sums of a group by the matrix unit, then scales, as QuantNarrow does.
template <class V, template <class> class Codes>
struct MatrixNarrow {
  using X = float;
  using Few = QuantNarrow<V, Codes>;
  using C = Codes<V>;
  static constexpr bool kSigned = C::kStep == 8;
  struct In {
    QuantInput rows;
    Shape<V> shape;
    int32_t* sums;  // of a group, (rows, kPad)
    std::conditional_t<kSigned, SignedBytes<V, C>, BytesAsTheyAre<V, C>> codes;
  };
  static constexpr bool kMatrix = true;
  static constexpr AtOnce kAtOnce = {V::kMatrixRows, Few::kAtOnce.vectors_one_row, 4};
  static constexpr int64_t kBlock = kBlockBytes, kAhead = Few::kAhead;

  static In take(Worker& worker, const Phase& phase, const Input<float>& rows, int64_t n_rows) {
    static_assert(V::kMatrixRows * kPad <= kScoreRows * kKeyChunk);
    return {Few::take(worker, phase, rows, n_rows), {}, reinterpret_cast<int32_t*>(worker.scores()), {}};
  }

  template <int TILE, int R, class A>
  static void rows(const Phase& phase, float* sums, const char* w, const In& in, int64_t row, int64_t group,
                   int64_t groups, A ahead) {
    Few::template rows<TILE, R>(phase, sums, w, in.rows, row, group, groups, ahead);
  }
  template <int TILE, class A>
  static void some_rows(const Phase& phase, int64_t rows, float* sums, const char* w, const In& in, int64_t row,
                        int64_t group, int64_t groups, A ahead) {
    if (rows <= Few::kAtOnce.rows) {
      return rows_at_once<V, Few, TILE, Few::kAtOnce.rows>(phase, rows, sums, w, in.rows, row, group, groups, ahead);
    }
    const int64_t k = phase.scale_group, lines = phase.group_bytes / 64;
    in.shape.set(rows, k_of_a_product(k));
    // Prefetches are spread over products and the first rows: memory would rest meanwhile.
    const int64_t products = TILE * (k / k_of_a_product(k)), of_rows = std::min(rows, lines / 2);
    const int64_t of_a_product = (lines - of_rows + products - 1) / products;
    if constexpr (std::is_same_v<A, AheadTwice>) ahead.move(lines);  // a group is read at once
    const auto block = [&](int64_t i) {
      return quant_block(phase, w + i * phase.group_bytes, TILE, 0, k / C::kStep * TILE * 64);
    };
    const auto codes_of = [&](int64_t i) { return in.codes.template group<TILE>(w, groups, i, block(i).codes, k); };
    const auto add = phase.zero_points ? add_group<TILE, true, A> : add_group<TILE, false, A>;
    const char* codes = codes_of(0);
    for (int64_t i = 0; i < groups; ++i, ahead.move(lines)) {
      const int64_t g = group + i, at = row * in.rows.group_stride + g;
      const int8_t* x = in.rows.x + row * in.rows.stride + g * k;
      A now = ahead;  // asks for a few lines more than a group has
      multiply_group<TILE>(k, codes, x, in.rows.stride, in.sums, now, of_a_product);
      if (i + 1 < groups) codes = codes_of(i + 1);  // while sums are stored
      add(block(i), rows, in.sums, in.rows.scales + at, in.rows.sums + at, in.rows.group_stride, sums, now, of_rows);
    }
  }

 private:
  static int64_t k_of_a_product(int64_t group) { return group < V::kMatrixBytes ? group : V::kMatrixBytes; }

  // Sums over one group of bytes x activations.
  template <int TILE, class A>
  static void multiply_group(int64_t k, const char* codes, const int8_t* x, int64_t stride, int32_t* out, A& ahead,
                             int64_t lines) {
    for_each_tile<TILE>([&]<int T>() { V::template clear<T>(); });
    const int64_t k_bytes = k_of_a_product(k);
    for (int64_t at = 0; at < k; at += k_bytes, codes += k_bytes / 4 * TILE * 64) {
      V::template load_tile<V::kActivations>(x + at, stride);
      for_each_tile<TILE>([&]<int T>() {
        constexpr int W = V::kWeights + T % 3;
        V::template load_tile<W>(codes + T * 64, TILE * 64);
        V::template multiply_bytes<T, W, kSigned>();
        ahead.template pass<V>(lines);
      });
    }
    for_each_tile<TILE>([&]<int T>() { V::template store_tile<T>(out + T * kLanes, kPad * sizeof(int32_t)); });
  }
  // All vectors and rows: as the end of a group in narrow_groups.
  template <int TILE, bool ZEROS, class A>
  static void add_group(const QuantBlock& block, int64_t rows, const int32_t* group_sums, const float* scales,
                        const int32_t* sums_of_x, int64_t stride, float* sums, A& ahead, int64_t of_rows) {
    typename V::F scale[TILE];
    typename V::I zero[TILE];
    for (int v = 0; v < TILE; ++v) {
      scale[v] = V::load_f16(reinterpret_cast<const uint16_t*>(block.scales + v * 32));
      if constexpr (ZEROS) zero[v] = V::add_i(V::load_u8(block.zeros + v * 16), V::set1_i(kSigned ? -C::kBias : 0));
    }
    for (int64_t r = 0; r < rows; ++r, sums += kPad, group_sums += kPad) {
      const typename V::F row_scale = V::set1(scales[r * stride]);
      const int32_t sum = -sums_of_x[r * stride];
      for (int v = 0; v < TILE; ++v) {
        typename V::I exact = V::load_i(group_sums + v * kLanes);
        if constexpr (ZEROS) {
          exact = V::add_i(exact, V::mul_i(zero[v], V::set1_i(sum)));
        } else if constexpr (!kSigned) {
          exact = V::add_i(exact, V::set1_i(C::kBias * sum));
        }
        float* total = sums + v * kLanes;
        V::store(total, V::fma(V::to_f32(exact), V::mul(scale[v], row_scale), V::load(total)));
      }
      if (r < of_rows) ahead.template pass<V>(1);
    }
  }
};

}  // namespace flashformer

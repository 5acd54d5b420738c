// Products of quantized weights: codes of 8 or 4 bits with a scale for every group of k (quantize.py is the
// definition).
//
// Narrow: the row is quantized too, to int8 with a scale for every group, and a group is an exact integer sum; what the
// codes are off zero by is taken out through the sum of the row's values, as the start of the accumulator. Wide: codes
// become fp32 and meet fp32 activations. Groups are added in order of k in fp32, so bits depend on nothing else.
// A group of a tile: scales (vectors, 16) f16 | zeros (vectors, 16) u8 if it has them | codes, step by step.
#pragma once

#include <cfloat>

#include "../forward.h"
#include "input.h"
#include "math.h"
#include "product.h"

namespace flashformer {

struct QuantInput {
  const int8_t* x;  // (rows, stride)
  int64_t stride;
  const float* scales;  // (rows, group_stride)
  const int32_t* sums;  // (rows, group_stride) of the values of a group
  int64_t group_stride;
};

// N vectors, a group of a row -> int8. scale = largest / 127, NaN if one is not finite, 0 if all are below 1e-30.
template <class V, int N, class Element>
inline void quantize_group(Element element, int8_t* out, float* scale_out, int32_t* sum_out) {
  using F = typename V::F;
  F x[N];
  F most = V::zero(), poison = V::zero();
  for (int i = 0; i < N; ++i) {
    x[i] = element(i * kLanes);
    most = V::max(most, V::abs(x[i]));
    poison = V::fma(x[i], V::zero(), poison);
  }
  const float largest = max_lanes<V>(most);
  const bool finite = V::all_zero(poison), empty = largest < 1e-30f;
  const F inverse = V::set1(empty ? 0.0f : 127.0f / largest);
  typename V::I sum = V::set1_i(0);
  for (int i = 0; i < N; ++i) {
    const typename V::I steps = V::to_i(finite ? V::mul(x[i], inverse) : V::zero());
    V::store_i8(out + i * kLanes, steps);
    sum = V::add_i(sum, steps);
  }
  *scale_out = !finite ? __builtin_nanf("") : empty ? 0.0f : largest / 127.0f;
  *sum_out = static_cast<int32_t>(sum_lanes<V>(V::to_f32(sum)));  // exact: far below 2^24
}

template <class V, int N>
inline void quantize_groups(const float* x, int64_t n, int8_t* out, float* scales, int32_t* sums) {
  int64_t begin = 0;
  for (; begin + N * kLanes <= n; begin += N * kLanes, ++scales, ++sums) {
    quantize_group<V, N>([&](int64_t i) { return V::load(x + begin + i); }, out + begin, scales, sums);
  }
  if (begin == n) return;
  const auto element = [&](int64_t i) {
    i += begin;
    return i + kLanes <= n ? V::load(x + i) : i < n ? V::first(n - i, V::load(x + i), V::zero()) : V::zero();
  };
  quantize_group<V, N>(element, out + begin, scales, sums);
}

// n elements -> int8 in whole groups, zeros behind them, which may begin where x does.
template <class V>
inline void quantize_row(const float* x, int64_t n, int64_t group, int8_t* out, float* scales, int32_t* sums) {
  switch (group) {
    case 32:
      return quantize_groups<V, 2>(x, n, out, scales, sums);
    case 64:
      return quantize_groups<V, 4>(x, n, out, scales, sums);
    default:  // kMostGroup
      return quantize_groups<V, 8>(x, n, out, scales, sums);
  }
}

// What a kind of codes looks like: a step is one 64-byte vector, kStep consecutive k of 16 outputs. bytes<H>: one code
// in each byte, H = 1 for the second half of a step of nibbles; `dot` takes these.
template <class V>
struct CodesInt8 {
  static constexpr AtOnce kAtOnce = V::kCodes;
  static constexpr int64_t kStep = 4;
  static constexpr int kBias = V::kByteBias;  // what `dot` takes codes to be off by
  template <class X4>
  static typename V::I dot(typename V::I acc, typename V::Raw bytes, X4 x) {
    return V::dot_bytes(acc, bytes, x);
  }
  template <int H>
  static typename V::Raw bytes(typename V::Raw w) {
    return w;
  }
  static constexpr float kZero = 128;
};

template <class V>
struct CodesInt4 {
  static constexpr AtOnce kAtOnce = V::kCodes;
  static constexpr int64_t kStep = 8;
  static constexpr int kBias = 8;
  template <class X4>
  static typename V::I dot(typename V::I acc, typename V::Raw bytes, X4 x) {
    return V::dot_nibbles(acc, bytes, x);
  }
  template <int H>
  static typename V::Raw bytes(typename V::Raw w) {
    return H ? V::high_nibbles(w) : V::low_nibbles(w);
  }
  static constexpr float kZero = 8;
};

template <class V>
struct CodesNf4 {
  static constexpr AtOnce kAtOnce = V::kLookups;
  static constexpr int64_t kStep = 8;
  static constexpr int kBias = V::kByteBias;
  template <class X4>
  static typename V::I dot(typename V::I acc, typename V::Raw bytes, X4 x) {
    return V::dot_bytes(acc, bytes, x);
  }
  template <int H>
  static typename V::Raw bytes(typename V::Raw w) {
    return V::lookup(kTable, H ? V::high_nibbles(w) : V::low_nibbles(w));
  }
  static constexpr float kZero = 128;
  static constexpr uint8_t kTable[16] = {
      static_cast<uint8_t>(kNf4[0] + 128),  static_cast<uint8_t>(kNf4[1] + 128),  static_cast<uint8_t>(kNf4[2] + 128),
      static_cast<uint8_t>(kNf4[3] + 128),  static_cast<uint8_t>(kNf4[4] + 128),  static_cast<uint8_t>(kNf4[5] + 128),
      static_cast<uint8_t>(kNf4[6] + 128),  static_cast<uint8_t>(kNf4[7] + 128),  static_cast<uint8_t>(kNf4[8] + 128),
      static_cast<uint8_t>(kNf4[9] + 128),  static_cast<uint8_t>(kNf4[10] + 128), static_cast<uint8_t>(kNf4[11] + 128),
      static_cast<uint8_t>(kNf4[12] + 128), static_cast<uint8_t>(kNf4[13] + 128), static_cast<uint8_t>(kNf4[14] + 128),
      static_cast<uint8_t>(kNf4[15] + 128)};
};

// One group of one tile, from its first vector on.
struct QuantBlock {
  const char* scales;
  const char* zeros;  // nullptr: the format has one for all
  const char* codes;
};

inline QuantBlock quant_block(const Phase& phase, const char* group, int64_t tile, int64_t vector,
                              int64_t codes_bytes) {
  const char* zeros = phase.zero_points ? group + (tile * 32 + 63) / 64 * 64 + vector * 16 : nullptr;
  return {group + vector * 32, zeros, group + phase.group_bytes - codes_bytes + vector * 64};
}

// Of a group whose first lines are scales and zeros.
template <class V, int TILE, class A>
inline void prefetch_scales(const Phase& phase, int64_t codes_bytes, int64_t vector, A& ahead) {
  for (int64_t at = codes_bytes; at < phase.group_bytes; at += 64, ahead.move(1)) {
    for (int t = 0; t < A::kTiles && vector == 0; ++t) ahead.template prefetch<V>(t * TILE);
  }
}

// Half H of a step, four k, of N vectors from v0 on: codes are taken out once for all rows.
template <class V, class C, int H, int N, int VS, int R>
inline void four_k(typename V::I (&acc)[R][VS], int v0, const typename V::Raw (&weight)[N], const int8_t* const (&x)[R],
                   int64_t k) {
  typename V::Raw bytes[N];
  for (int v = 0; v < N; ++v) bytes[v] = C::template bytes<H>(weight[v]);
  for (int r = 0; r < R; ++r) {
    const auto four = V::template broadcast4<R>(x[r] + k);
    for (int v = 0; v < N; ++v) acc[r][v0 + v] = C::dot(acc[r][v0 + v], bytes[v], four);
  }
}

// VS vectors of R rows over `groups` groups.
template <class V, template <class> class Codes, int TILE, int VS, int R, class A>
inline void narrow_groups(const Phase& phase, float* sums, const char* w, int64_t vector, const QuantInput& in,
                          int64_t row, int64_t first_group, int64_t groups, A ahead) {
  using C = Codes<V>;
  const int64_t steps = phase.scale_group / C::kStep, codes_bytes = steps * TILE * 64;
  constexpr int N = at_once_of<A>(VS);
  constexpr bool in_registers = R * VS <= 8;  // the sums over groups, beside those within one
  typename V::F total[R][VS];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < VS; ++v) {
      if constexpr (in_registers) total[r][v] = V::load(sums + r * kPad + v * kLanes);
    }
  }
  const int64_t stride = in.stride, group_stride = in.group_stride, scale_group = phase.scale_group;
  const int8_t* rows = in.x + row * stride + first_group * scale_group;
  const float* row_scales = in.scales + row * group_stride + first_group;
  const int32_t* row_sums = in.sums + row * group_stride + first_group;
  for (int64_t g = 0; g < groups; ++g, w += phase.group_bytes, rows += scale_group, ++row_scales, ++row_sums) {
    const QuantBlock block = quant_block(phase, w, TILE, vector, codes_bytes);
    prefetch_scales<V, TILE>(phase, codes_bytes, vector, ahead);
    const int8_t* x[R];
    typename V::I acc[R][VS];
    for (int r = 0; r < R; ++r) {
      const int64_t at = r * group_stride;
      x[r] = rows + r * stride;
      if constexpr (A::kTiles == 2) {
        prefetch_input<V>(x[r]);
        prefetch_input<V, 128>(row_scales + at);
        prefetch_input<V, 128>(row_sums + at);
      }
      for (int v = 0; v < VS; ++v) {
        if (block.zeros) {
          acc[r][v] =
              V::mul_i(V::load_u8(block.zeros + place<TILE, 16>(v, phase.tile_bytes)), V::set1_i(-row_sums[at]));
        } else {
          acc[r][v] = V::set1_i(-C::kBias * row_sums[at]);
        }
      }
    }
    const char* codes = block.codes;
    for (int64_t s = 0; s < steps; ++s, codes += TILE * 64, ahead.move(TILE)) {
#pragma GCC unroll 8
      for (int v0 = 0; v0 < VS; v0 += N) {
        typename V::Raw weight[N];
        for (int v = 0; v < N; ++v) {
          weight[v] = V::load_raw(codes + place<TILE>(v0 + v, phase.tile_bytes));
          ahead.template prefetch<V>(vector + v0 + v);
        }
        four_k<V, C, 0>(acc, v0, weight, x, s * C::kStep);
        if constexpr (C::kStep == 8) four_k<V, C, 1>(acc, v0, weight, x, s * C::kStep + 4);
      }
    }
    typename V::F scale[VS];
    for (int v = 0; v < VS; ++v) {
      const char* scales = block.scales + place<TILE, 32>(v, phase.tile_bytes);
      scale[v] = V::load_f16(reinterpret_cast<const uint16_t*>(scales));
    }
    for (int r = 0; r < R; ++r) {
      const typename V::F row_scale = V::set1(row_scales[r * group_stride]);
      for (int v = 0; v < VS; ++v) {
        const typename V::F both = V::mul(scale[v], row_scale);
        float* sum = sums + r * kPad + v * kLanes;
        if constexpr (in_registers) {
          total[r][v] = V::fma(V::to_f32(acc[r][v]), both, total[r][v]);
        } else {
          V::store(sum, V::fma(V::to_f32(acc[r][v]), both, V::load(sum)));
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < VS; ++v) {
      if constexpr (in_registers) V::store(sums + r * kPad + v * kLanes, total[r][v]);
    }
  }
}

// Code B of every lane.
template <class V, int B, int R>
[[gnu::always_inline]] inline void wide_byte(typename V::F (&part)[R], typename V::Raw bytes, typename V::F zero,
                                             const float* const (&x)[R], int64_t k) {
  const typename V::F value = V::sub(V::template byte<B>(bytes), zero);
  for (int r = 0; r < R; ++r) part[r] = V::fma(value, V::set1(x[r][k + B]), part[r]);
}

// Four k of one vector: code by code, so that none waits in a register.
template <class V, int R>
[[gnu::always_inline]] inline void wide_bytes(typename V::F (&part)[R], typename V::Raw bytes, typename V::F zero,
                                              const float* const (&x)[R], int64_t k) {
  wide_byte<V, 0, R>(part, bytes, zero, x, k);
  wide_byte<V, 1, R>(part, bytes, zero, x, k);
  wide_byte<V, 2, R>(part, bytes, zero, x, k);
  wide_byte<V, 3, R>(part, bytes, zero, x, k);
}

template <class V, template <class> class Codes, int TILE, int R, class A>
inline void wide_groups(const Phase& phase, float* sums, const char* w, int64_t vector, const Input<float>& in,
                        int64_t row, int64_t first_group, int64_t groups, A ahead) {
  using C = Codes<V>;
  const int64_t steps = phase.scale_group / C::kStep, codes_bytes = steps * TILE * 64;
  for (int64_t g = 0; g < groups; ++g, w += phase.group_bytes) {
    const QuantBlock block = quant_block(phase, w, TILE, vector, codes_bytes);
    prefetch_scales<V, TILE>(phase, codes_bytes, vector, ahead);
    const typename V::F zero = block.zeros ? V::to_f32(V::load_u8(block.zeros)) : V::set1(C::kZero);
    const float* x[R];
    typename V::F part[R];
    for (int r = 0; r < R; ++r) {
      x[r] = in.x + (row + r) * in.stride + (first_group + g) * phase.scale_group;
      part[r] = V::zero();
    }
    const char* codes = block.codes;
    for (int64_t s = 0; s < steps; ++s, codes += TILE * 64, ahead.move(TILE)) {
      const typename V::Raw raw = V::load_raw(codes);
      ahead.template prefetch<V>(vector);
      wide_bytes<V, R>(part, C::template bytes<0>(raw), zero, x, s * C::kStep);
      if constexpr (C::kStep == 8) wide_bytes<V, R>(part, C::template bytes<1>(raw), zero, x, s * C::kStep + 4);
    }
    const typename V::F scale = V::load_f16(reinterpret_cast<const uint16_t*>(block.scales));
    for (int r = 0; r < R; ++r) {
      V::store(sums + r * kPad, V::fma(part[r], scale, V::load(sums + r * kPad)));
    }
  }
}

// The weight policies of product.h. X: what the rows are before `take`.
template <class V, template <class> class Codes>
struct QuantNarrow {
  using X = float;
  static constexpr bool kMatrix = false;
  static constexpr int64_t kBlock = kBlockBytes, kAhead = 4096;
  static constexpr bool kOneAsksOnce = Codes<V>::kStep == 8;
  static constexpr AtOnce kAtOnce = Codes<V>::kAtOnce;

  // Rows of phase.k elements, quantized into scratch.
  static QuantInput take(Worker& worker, const Phase& phase, const Input<float>& rows, int64_t n_rows) {
    const Model& model = worker.forward->model;
    const int64_t stride = model.input_stride * 4;  // bytes
    int8_t* out = worker.input<int8_t>();
    for (int64_t r = 0; r < n_rows; ++r) {
      quantize_row<V>(rows.x + r * rows.stride, phase.k, phase.scale_group, out + r * stride,
                      worker.group_scales() + r * model.group_stride, worker.group_sums() + r * model.group_stride);
    }
    return {out, stride, worker.group_scales(), worker.group_sums(), model.group_stride};
  }

  template <int TILE, int R, class A>
  static void rows(const Phase& phase, float* sums, const char* w, const QuantInput& in, int64_t row, int64_t group,
                   int64_t groups, A ahead) {
    constexpr int VS = kAtOnce.vectors_of(TILE * A::kTiles, R);
    for (int v = 0; v < TILE; v += VS) {
      narrow_groups<V, Codes, TILE, VS, R>(phase, sums + v * kLanes, w, v, in, row, group, groups, ahead);
    }
  }
};

template <class V, template <class> class Codes>
struct QuantWide {
  using X = float;
  static constexpr bool kMatrix = false;
  static constexpr int64_t kBlock = kBlockBytes, kAhead = 0;
  static constexpr bool kOneAsksOnce = false;
  static constexpr AtOnce kAtOnce = {V::kWideCodeRows, 1, 1};

  // Rows of phase.k elements, zeros behind them up to a whole group.
  static Input<float> take(Worker& worker, const Phase& phase, const Input<float>& rows, int64_t n_rows) {
    const int64_t stride = worker.forward->model.input_stride;
    float* out = worker.input<float>();
    for (int64_t r = 0; r < n_rows; ++r) {
      const float* in = rows.x + r * rows.stride;
      for (int64_t i = 0; i < phase.k_padded; i += kLanes) {
        V::store(out + r * stride + i, i < phase.k ? V::first(phase.k - i, V::load(in + i), V::zero()) : V::zero());
      }
    }
    return {out, stride};
  }

  template <int TILE, int R, class A>
  static void rows(const Phase& phase, float* sums, const char* w, const Input<float>& in, int64_t row, int64_t group,
                   int64_t groups, A ahead) {
    for (int v = 0; v < TILE; ++v) {
      wide_groups<V, Codes, TILE, R>(phase, sums + v * kLanes, w, v, in, row, group, groups, ahead);
    }
  }
};

}  // namespace flashformer

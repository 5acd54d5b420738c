// qkv: norm, the stacked q k v product, bias, rotary positions (Su et al. 2021), KV append.
// Packed outputs keep the rotary pair (i, i + head_dim/2) of a head adjacent; queries and keys stay in that order.
#pragma once

#include "input.h"
#include "kv.h"
#include "product.h"

namespace flashformer {

template <class V, class KV>
inline void append_pair(const Forward& forward, const Phase& phase, int64_t r, int64_t output, float a, float b) {
  using T = typename KV::T;
  const int64_t q_width = phase.n_heads * phase.head_dim, kv_width = phase.n_kv_heads * phase.head_dim;
  const int64_t pos = forward.row.pos[r], slot = forward.row.slot[r];
  if (output < q_width + kv_width) {
    const int64_t d = output % phase.head_dim;
    const float* turn = forward.rope() + pos * phase.head_dim + d;  // cos, sin of pair d/2
    const float turned_a = a * turn[0] - b * turn[1], turned_b = b * turn[0] + a * turn[1];
    if (output < q_width) {
      float* q = forward.query() + r * forward.model.query_stride + output;
      q[0] = turned_a, q[1] = turned_b;
      return;
    }
    T* keys = keys_of<T>(forward, phase, slot, (output - q_width) / phase.head_dim);
    T* key = keys + pos / kLanes * phase.head_dim * kLanes + d * kLanes + pos % kLanes;
    KV::put(key, turned_a), KV::put(key + kLanes, turned_b);
  } else if (output < q_width + 2 * kv_width) {
    const int64_t at = output - q_width - kv_width;
    T* value =
        values_of<T>(forward, phase, slot, at / phase.head_dim) + pos * phase.head_dim_padded + at % phase.head_dim;
    KV::put(value, a), KV::put(value + 1, b);
  }
}

template <class V, class W, class KV>
void qkv(Worker& worker, const Phase& phase, const Span& span) {
  const Forward& forward = *worker.forward;
  const auto input = normalised_rows<V, typename W::X>(worker, phase, 2 * phase.layer - 1);
  const float* bias = phase.bias >= 0 ? forward.vector(phase.bias) : nullptr;
  product<V, W>(worker, phase, span, input.x, input.stride, forward.n_rows, [&](int64_t first, float* sums) {
    for (int64_t r = 0; r < forward.n_rows; ++r, sums += kPad) {
      for (int64_t o = 0; o < phase.vectors * kLanes; o += 2) {
        float a = sums[o], b = sums[o + 1];
        if (bias) a += bias[first + o], b += bias[first + o + 1];
        append_pair<V, KV>(forward, phase, r, first + o, a, b);
      }
    }
  });
}

}  // namespace flashformer

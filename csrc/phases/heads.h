// One head of a row as attention takes it: normed and rotated (Su et al. 2021), from what qkv projected.
#pragma once

#include <cstring>

#include "input.h"
#include "kv.h"

namespace flashformer {

// Where the norm takes all heads of a row as one vector: its factors, into scales (rows, 2), queries then keys.
template <class V>
inline void qk_factors(Worker& worker, const Phase& phase) {
  if (phase.qk_norm != static_cast<int64_t>(QkNorm::kWidth)) return;
  const Forward& forward = *worker.forward;
  const int64_t q_width = phase.n_heads * phase.head_dim, kv_width = phase.n_kv_heads * phase.head_dim;
  for (int64_t r = 0; r < forward.n_rows; ++r) {
    const float* x = forward.qkv() + r * forward.model.qkv_stride;
    float* factors = worker.scales() + 2 * r;
    factors[0] = rms_factor(sum_of_squares<V>(x, q_width), q_width, phase.norm_eps);
    factors[1] = rms_factor(sum_of_squares<V>(x + q_width, kv_width), kv_width, phase.norm_eps);
  }
}

// Elements d of x and `half` further on, turned by their angle -> out, which may be x.
template <class V>
inline void rotate(const float* x, int64_t half, const float* cos, const float* sin, float* out) {
  int64_t d = 0;
  for (; d + kLanes <= half; d += kLanes) {
    const typename V::F a = V::load(x + d), b = V::load(x + d + half), c = V::load(cos + d), s = V::load(sin + d);
    V::store(out + d, V::sub(V::mul(a, c), V::mul(b, s)));
    V::store(out + d + half, V::add(V::mul(b, c), V::mul(a, s)));
  }
  for (; d < half; ++d) {
    const float a = x[d], b = x[d + half];
    out[d] = a * cos[d] - b * sin[d];
    out[d + half] = b * cos[d] + a * sin[d];
  }
}

// Head `head` of row r, queries first, then keys -> out (head_dim).
template <class V>
inline void take_head(const Worker& worker, const Phase& phase, int64_t r, int64_t head, float* out) {
  const Forward& forward = *worker.forward;
  const int64_t n = phase.head_dim, half = phase.rotary_dim / 2;
  const bool is_key = head >= phase.n_heads;
  const float* x = forward.qkv() + r * forward.model.qkv_stride + head * n;
  if (phase.qk_norm == static_cast<int64_t>(QkNorm::kNone)) {
    for (int64_t d = phase.rope < 0 ? 0 : 2 * half; d < n; ++d) out[d] = x[d];
  } else {
    const bool by_head = phase.qk_norm == static_cast<int64_t>(QkNorm::kHead);
    const float* weight = forward.vector(is_key ? phase.k_norm : phase.q_norm);
    if (!by_head) weight += (is_key ? head - phase.n_heads : head) * n;
    const float factor =
        by_head ? rms_factor(sum_of_squares<V>(x, n), n, phase.norm_eps) : worker.scales()[2 * r + is_key];
    for (int64_t d = 0; d < n; ++d) out[d] = x[d] * factor * weight[d];
    x = out;
  }
  if (phase.rope < 0) return;
  const float* cos = forward.rope(phase.rope) + forward.row.pos[r] * phase.rotary_dim;
  rotate<V>(x, half, cos, cos + half, out);
}

// The key and the value of row r into place k of a chunk of the cache, zero beside a value whose pair is still to come.
template <class V, class KV>
inline void append(const Worker& worker, const Phase& phase, int64_t r, int64_t kv_head, typename KV::T* keys,
                   typename KV::T* values, int64_t k) {
  const Forward& forward = *worker.forward;
  const int64_t n = phase.head_dim;
  constexpr int64_t kStep = KV::kStep;
  float* key = worker.heads();
  take_head<V>(worker, phase, r, phase.n_heads + kv_head, key);
  typename KV::T rounded[kMaxHeadDim];
  for (int64_t d = 0; d < n; ++d) KV::put(rounded + d, key[d]);
  typename KV::T* column = keys + k / kLanes * n * kLanes + k % kLanes * kStep;
  for (int64_t d = 0; d < n; d += kStep) std::memcpy(column + d * kLanes, rounded + d, kStep * sizeof(typename KV::T));
  const float* value = forward.qkv() + r * forward.model.qkv_stride + (phase.n_heads + phase.n_kv_heads + kv_head) * n;
  for (int64_t d = 0; d < n; ++d) KV::put(rounded + d, value[d]);
  typename KV::T* row = values + k / kStep * kStep * phase.head_dim_padded;
  for (int64_t d = 0; d < n; ++d, row += kStep) {
    if constexpr (kStep == 1) {
      *row = rounded[d];
    } else {
      uint32_t both;
      std::memcpy(&both, row, sizeof(both));
      both = k % 2 ? (both & 0xFFFF) | static_cast<uint32_t>(rounded[d]) << 16 : rounded[d];
      std::memcpy(row, &both, sizeof(both));
    }
  }
}

// Zero the values from place k of a chunk on, whole steps, that are read together with those before: their weights are
// zero, but not what an earlier sequence may have left. For every forward anew, as a sequence may have been cut back.
template <class KV>
inline void clear_values(const Phase& phase, typename KV::T* values, int64_t k) {
  k = (k + KV::kStep - 1) / KV::kStep * KV::kStep;
  const int64_t end = (k + KV::kTogether - 1) / KV::kTogether * KV::kTogether, stride = phase.head_dim_padded;
  std::memset(values + k * stride, 0, static_cast<std::size_t>((end - k) * stride) * sizeof(typename KV::T));
}

}  // namespace flashformer

// One head of a row as attention takes it: normed and rotated (Su et al. 2021), from what qkv projected.
#pragma once

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

// Head `head` of row r, queries first, then keys -> out (head_dim).
template <class V>
inline void take_head(const Worker& worker, const Phase& phase, int64_t r, int64_t head, float* out) {
  const Forward& forward = *worker.forward;
  const int64_t n = phase.head_dim, half = phase.rotary_dim / 2;
  const bool is_key = head >= phase.n_heads;
  const float* x = forward.qkv() + r * forward.model.qkv_stride + head * n;
  if (phase.qk_norm == static_cast<int64_t>(QkNorm::kNone)) {
    for (int64_t d = 0; d < n; ++d) out[d] = x[d];
  } else {
    const bool by_head = phase.qk_norm == static_cast<int64_t>(QkNorm::kHead);
    const float* weight = forward.vector(is_key ? phase.k_norm : phase.q_norm);
    if (!by_head) weight += (is_key ? head - phase.n_heads : head) * n;
    const float factor =
        by_head ? rms_factor(sum_of_squares<V>(x, n), n, phase.norm_eps) : worker.scales()[2 * r + is_key];
    for (int64_t d = 0; d < n; ++d) out[d] = x[d] * factor * weight[d];
  }
  if (phase.rope < 0) return;
  const float* cos = forward.rope(phase.rope) + forward.row.pos[r] * phase.rotary_dim;
  const float* sin = cos + half;
  for (int64_t d = 0; d < half; ++d) {
    const float a = out[d], b = out[d + half];
    out[d] = a * cos[d] - b * sin[d];
    out[d + half] = b * cos[d] + a * sin[d];
  }
}

// The key and the value of row r into place k of a chunk of the cache. A value beside it that is still to come is zero:
// its weight is, but not what an earlier sequence may have left.
template <class V, class KV>
inline void append(const Worker& worker, const Phase& phase, int64_t r, int64_t kv_head, typename KV::T* keys,
                   typename KV::T* values, int64_t k) {
  const Forward& forward = *worker.forward;
  const int64_t n = phase.head_dim;
  constexpr int64_t kStep = KV::kStep;
  float* key = worker.heads();
  take_head<V>(worker, phase, r, phase.n_heads + kv_head, key);
  typename KV::T* column = keys + k / kLanes * n * kLanes + k % kLanes * kStep;
  for (int64_t d = 0; d < n; ++d) KV::put(column + d / kStep * kStep * kLanes + d % kStep, key[d]);
  const float* value = forward.qkv() + r * forward.model.qkv_stride + (phase.n_heads + phase.n_kv_heads + kv_head) * n;
  typename KV::T* row = values + k / kStep * kStep * phase.head_dim_padded + k % kStep;
  for (int64_t d = 0; d < n; ++d) {
    KV::put(row + d * kStep, value[d]);
    if (kStep == 2 && k % 2 == 0) KV::put(row + d * kStep + 1, 0.0f);
  }
}

}  // namespace flashformer

// o_proj: attention chunks merged in position order (by every worker for itself), product, bias, residual +=.
#pragma once

#include <cstddef>

#include "input.h"
#include "kv.h"
#include "product.h"

namespace flashformer {

// One (row, head): n_chunks chunks from result `partial` on -> head_dim values.
template <class V, class X>
inline void merge_chunks(const Forward& forward, const Phase& phase, int64_t partial, int64_t n_chunks, X* out) {
  using F = typename V::F;
  const float* max_and_sum = forward.partial_sums(partial);
  float most = max_and_sum[0];
  for (int64_t c = 1; c < n_chunks; ++c) most = max_and_sum[2 * c] > most ? max_and_sum[2 * c] : most;
  const bool whole = phase.head_dim == phase.head_dim_padded;
  float values[kMaxHeadDim];
  X rounded[kMaxHeadDim];
  float total = 0;
  for (int64_t c = 0; c < n_chunks; c += kLanes) {
    const int64_t n = n_chunks - c < kLanes ? n_chunks - c : kLanes;
    const bool last = c + n == n_chunks;
    float weights[kLanes] = {1.0f};  // of chunk c + i; e^0 if there is one
    if (n_chunks > 1) {
      for (int64_t i = 0; i < n; ++i) weights[i] = max_and_sum[2 * (c + i)];
      V::store(weights, exp<V>(V::sub(V::load(weights), V::set1(most))));
    }
    for (int64_t i = 0; i < n; ++i) total += weights[i] * max_and_sum[2 * (c + i) + 1];
    const F divisor = V::set1(total);
    const float* chunks = forward.partial_values(partial + c);
    for (int64_t d = 0; d < phase.head_dim_padded; d += kLanes) {
      F sum = c == 0 ? V::zero() : V::load(values + d);
      for (int64_t i = 0; i < n; ++i) {
        sum = V::fma(V::set1(weights[i]), V::load(chunks + i * forward.model.partial_stride + d), sum);
      }
      if (last) {
        store_as<V>((whole ? out : rounded) + d, V::div(sum, divisor));
      } else {
        V::store(values + d, sum);
      }
    }
  }
  if (!whole) __builtin_memcpy(out, rounded, static_cast<std::size_t>(phase.head_dim) * sizeof(X));
}

// The product of a branch, tile by tile: scale * (sums + bias) is added to the residual, or stored where its norm is
// still to come. What the residual lacked before is added to it.
template <class V, class W>
inline void branch_product(Worker& worker, const Phase& phase, const Span& span, const Input<typename W::X>& rows) {
  using F = typename V::F;
  const Forward& forward = *worker.forward;
  const int64_t stride = forward.model.d_model_stride;
  const F scale = V::set1(static_cast<float>(phase.scale));
  float* factors = worker.scales();
  if (phase.fold >= 0 && span.begin < span.end) {
    for (int64_t r = 0; r < forward.n_rows; ++r) factors[r] = fold_factor<V>(forward, phase, r);
  }
  product<V, W>(worker, phase, span, rows, forward.n_rows, [&](int64_t first, const float* sums) {
    const float* bias = phase.bias >= 0 ? forward.vector(phase.bias) + first : nullptr;
    for (int64_t r = 0; r < forward.n_rows; ++r, sums += kPad) {
      float* residual = forward.residual() + r * stride + first;
      float* branch = phase.to >= 0 ? forward.branch(phase.to) + r * stride + first : nullptr;
      prefetch_result<V>(branch ? branch : residual, stride, phase.vectors * kLanes, forward.n_rows - r);
      for (int64_t i = 0; i < phase.vectors * kLanes; i += kLanes) {
        F sum = V::load(sums + i);
        if (bias) sum = V::add(sum, V::load(bias + i));
        sum = V::mul(sum, scale);
        if (phase.fold >= 0) {
          V::store(residual + i, V::add(V::load(residual + i), fold_at<V>(forward, phase, r, first + i, factors[r])));
        }
        V::store(branch ? branch + i : residual + i, branch ? sum : V::add(V::load(residual + i), sum));
      }
    }
  });
}

template <class V, class W>
void o_proj(Worker& worker, const Phase& phase, const Span& span) {
  using X = typename W::X;
  const Forward& forward = *worker.forward;
  const int64_t stride = forward.model.input_stride;
  X* input = worker.input<X>();
  for (int64_t r = 0; r < forward.n_rows; ++r) {
    const int64_t pos = forward.row.pos[r];
    const int64_t first = first_visible(phase, pos) / kKeyChunk, n_chunks = pos / kKeyChunk + 1 - first;
    for (int64_t h = 0; h < phase.n_heads; ++h) {
      merge_chunks<V>(forward, phase, forward.partial_index(r, h) + first, n_chunks,
                      input + r * stride + h * phase.head_dim);
    }
  }
  branch_product<V, W>(worker, phase, span, {input, stride});
}

}  // namespace flashformer

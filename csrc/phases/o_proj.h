// o_proj: attention chunks merged in position order (by every worker for itself), product, bias, residual +=.
#pragma once

#include <cstddef>

#include "input.h"
#include "product.h"

namespace flashformer {

// One (row, head): chunks 0 .. n_chunks-1 -> head_dim values.
template <class V, class X>
inline void merge_chunks(const Forward& forward, const Phase& phase, int64_t partial, int64_t n_chunks, X* out) {
  using F = typename V::F;
  const float* sums = forward.partial_sums(partial);
  float most = sums[0];
  for (int64_t c = 1; c < n_chunks; ++c) most = sums[2 * c] > most ? sums[2 * c] : most;
  float values[kMaxHeadDim];
  for (int64_t d = 0; d < phase.head_dim_padded; d += kLanes) V::store(values + d, V::zero());
  float total = 0;
  for (int64_t c = 0; c < n_chunks; ++c) {
    const float weight = exp1<V>(sums[2 * c] - most);
    total += weight * sums[2 * c + 1];
    const float* chunk = forward.partial_values(partial + c);
    for (int64_t d = 0; d < phase.head_dim_padded; d += kLanes) {
      V::store(values + d, V::fma(V::set1(weight), V::load(chunk + d), V::load(values + d)));
    }
  }
  const F divisor = V::set1(total);
  X rounded[kMaxHeadDim];
  for (int64_t d = 0; d < phase.head_dim_padded; d += kLanes) {
    store_as<V>(rounded + d, V::div(V::load(values + d), divisor));
  }
  __builtin_memcpy(out, rounded, static_cast<std::size_t>(phase.head_dim) * sizeof(X));
}

// residual[row][first + i] += sums[row][i] + bias[first + i]
template <class V>
inline void add_to_residual(const Forward& forward, const Phase& phase, int64_t first, const float* sums) {
  const float* bias = phase.bias >= 0 ? forward.vector(phase.bias) + first : nullptr;
  for (int64_t r = 0; r < forward.n_rows; ++r, sums += kPad) {
    float* out = forward.residual() + r * forward.model.d_model_stride + first;
    for (int64_t i = 0; i < phase.vectors * kLanes; i += kLanes) {
      typename V::F sum = V::load(sums + i);
      if (bias) sum = V::add(sum, V::load(bias + i));
      V::store(out + i, V::add(V::load(out + i), sum));
    }
  }
}

template <class V, class W>
void o_proj(Worker& worker, const Phase& phase, const Span& span) {
  using X = typename W::X;
  const Forward& forward = *worker.forward;
  const int64_t stride = forward.model.input_stride;
  X* input = worker.input<X>();
  for (int64_t r = 0; r < forward.n_rows; ++r) {
    const int64_t n_chunks = forward.row.pos[r] / kKeyChunk + 1;
    for (int64_t h = 0; h < phase.n_heads; ++h) {
      merge_chunks<V>(forward, phase, forward.partial_index(r, h), n_chunks, input + r * stride + h * phase.head_dim);
    }
  }
  product<V, W>(worker, phase, span, input, stride, forward.n_rows,
                [&](int64_t first, const float* sums) { add_to_residual<V>(forward, phase, first, sums); });
}

}  // namespace flashformer

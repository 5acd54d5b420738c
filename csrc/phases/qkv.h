// qkv: norm, the stacked q k v product, bias. Attention norms, rotates and stores what comes out.
#pragma once

#include "input.h"
#include "product.h"

namespace flashformer {

template <class V, class W>
void qkv(Worker& worker, const Phase& phase, const Span& span) {
  const Forward& forward = *worker.forward;
  const auto input = normalised_rows<V, typename W::X>(worker, phase, 2 * phase.layer - 1);
  const float* bias = phase.bias >= 0 ? forward.vector(phase.bias) : nullptr;
  product<V, W>(worker, phase, span, input, forward.n_rows, [&](int64_t first, const float* sums) {
    for (int64_t r = 0; r < forward.n_rows; ++r, sums += kPad) {
      float* out = forward.qkv() + r * forward.model.qkv_stride + first;
      prefetch_result<V>(out, forward.model.qkv_stride, phase.vectors * kLanes, forward.n_rows - r);
      for (int64_t i = 0; i < phase.vectors * kLanes; i += kLanes) {
        typename V::F sum = V::load(sums + i);
        V::store(out + i, bias ? V::add(sum, V::load(bias + first + i)) : sum);
      }
    }
  });
}

}  // namespace flashformer

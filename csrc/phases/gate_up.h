// gate_up: norm, gate and up products, hidden = activation(gate) * up (Shazeer 2020). Vectors of gate and up outputs
// alternate.
#pragma once

#include "input.h"
#include "product.h"

namespace flashformer {

template <class V, class W>
void gate_up(Worker& worker, const Phase& phase, const Span& span) {
  const Forward& forward = *worker.forward;
  const auto input = normalised_rows<V, typename W::X>(worker, phase, 2 * phase.layer);
  const float* bias = phase.bias >= 0 ? forward.vector(phase.bias) : nullptr;
  product<V, W>(worker, phase, span, input, forward.n_rows, [&](int64_t first, const float* sums) {
    for (int64_t r = 0; r < forward.n_rows; ++r, sums += kPad) {
      float* out = forward.hidden() + r * forward.model.hidden_stride + first / 2;
      prefetch_result<V>(out, forward.model.hidden_stride, phase.vectors * kLanes / 2, forward.n_rows - r);
      for (int64_t i = 0; i < phase.vectors * kLanes; i += 2 * kLanes) {
        typename V::F gate = V::load(sums + i), up = V::load(sums + i + kLanes);
        if (bias) {
          gate = V::add(gate, V::load(bias + first + i));
          up = V::add(up, V::load(bias + first + i + kLanes));
        }
        gate = phase.activation == static_cast<int64_t>(Activation::kSilu) ? silu<V>(gate) : gelu_tanh<V>(gate);
        V::store(out + i / 2, V::mul(gate, up));
      }
    }
  });
}

}  // namespace flashformer

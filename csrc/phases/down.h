// down: product of hidden, bias, residual +=.
#pragma once

#include "o_proj.h"

namespace flashformer {

template <class V, class W>
void down(Worker& worker, const Phase& phase, const Span& span) {
  using X = typename W::X;
  const Forward& forward = *worker.forward;
  const auto input = plain_rows<V>(worker, forward.hidden(), forward.model.hidden_stride, phase.k, worker.input<X>());
  product<V, W>(worker, phase, span, input.x, input.stride, forward.n_rows,
                [&](int64_t first, const float* sums) { add_to_residual<V>(forward, phase, first, sums); });
}

}  // namespace flashformer

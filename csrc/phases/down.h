// down: product of hidden, bias, residual +=.
#pragma once

#include "o_proj.h"

namespace flashformer {

template <class V, class W>
void down(Worker& worker, const Phase& phase, const Span& span) {
  using X = typename W::X;
  const Forward& forward = *worker.forward;
  const auto input = plain_rows<V>(worker, forward.hidden(), forward.model.hidden_stride, phase.k, worker.input<X>());
  branch_product<V, W>(worker, phase, span, input);
}

}  // namespace flashformer

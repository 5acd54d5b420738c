// sample: unit = a row that wants something. Its token is the best of all workers' candidates, ties to the lower id, or
// is chosen from its logits.
#pragma once

#include "../forward.h"
#include "choose.h"

namespace flashformer {

template <class V>
void sample(Worker& worker, const Phase&, const Span& span) {
  const Forward& forward = *worker.forward;
  for (int64_t unit = span.begin; unit < span.end; unit += span.step) {
    worker.begin_unit(unit);
    if (unit >= forward.n_head_rows) continue;
    const int32_t r = forward.head_row[unit];
    if (chooses_from_logits(forward.row, r)) {
      float* logits = forward.logits() + unit * forward.model.logits_stride;
      forward.tokens()[unit] = choose<V>(forward.row, r, logits, forward.model.vocab_size);
      continue;
    }
    Candidate best = {0, -1};
    for (int64_t w = 0; w < forward.model.n_workers; ++w) {
      const Candidate& other = forward.candidates(w)[unit];
      if (other.token >= 0 && is_better(other, best)) best = other;
    }
    forward.tokens()[unit] = best.token;
  }
}

}  // namespace flashformer

// lm_head: final norm and logits of the rows that want something, and this worker's best token for each: the largest
// logit, or with a temperature the largest logit / T + Gumbel noise; ties go to the lower id. Stores logits on request,
// and for `sample` where the choice needs all of them.
#pragma once

#include <cfloat>

#include "choose.h"
#include "input.h"
#include "noise.h"
#include "product.h"

namespace flashformer {

// The best of one vector of 16 scores, token ids from `first`, in whatever order vectors come.
template <class V>
inline void improve(Candidate& best, const float* scores, int64_t first, int64_t vocab_size) {
  if (best.token >= 0 && first + kLanes <= vocab_size && max_lanes<V>(V::load(scores)) < best.score) return;
  for (int64_t i = 0; i < kLanes && first + i < vocab_size; ++i) {
    const Candidate other = {scores[i], static_cast<int32_t>(first + i)};
    if (is_better(other, best)) best = other;
  }
}

template <class V, class W>
void lm_head(Worker& worker, const Phase& phase, const Span& span) {
  using X = typename W::X;
  using F = typename V::F;
  Forward& forward = *worker.forward;
  const Model& model = forward.model;
  const int64_t stride = model.input_stride;
  X* input = worker.input<X>();
  Candidate* best = forward.candidates(worker.index);
  for (int64_t i = 0; i < forward.n_head_rows; ++i) {
    normalise_row<V>(worker, phase, forward.head_row[i], input + i * stride, 2 * model.n_layers - 1);
    best[i] = {-FLT_MAX, -1};
  }
  const F scale = V::set1(static_cast<float>(phase.scale)), softcap = V::set1(static_cast<float>(phase.softcap));
  F nonzero = V::zero();  // becomes NaN with the first logit that is not finite
  product<V, W>(worker, phase, span, Input<X>{input, stride}, forward.n_head_rows, [&](int64_t first, float* sums) {
    for (int64_t i = 0; i < forward.n_head_rows; ++i, sums += kPad) {
      const int32_t r = forward.head_row[i];
      const float temperature = forward.row.temperature[r];
      const bool chosen_later = chooses_from_logits(forward.row, r);
      for (int64_t o = 0; o < phase.vectors * kLanes; o += kLanes) {
        F logit = V::mul(V::load(sums + o), scale);
        nonzero = V::fma(logit, V::zero(), nonzero);
        if (phase.softcap > 0) logit = soft_capped<V>(logit, softcap);
        V::store(sums + o, logit);
        if (chosen_later || forward.row.want[r] == kWantLogits) {
          V::store(forward.logits() + i * model.logits_stride + first + o, logit);
        }
        if (chosen_later) continue;
        if (temperature > 0) {
          float noise[16];
          gumbel16<V>(forward.row.seed[r], forward.row.choice[r], forward.row.pos[r], first + o, noise);
          V::store(sums + o, V::add(V::div(logit, V::set1(temperature)), V::load(noise)));
        }
        improve<V>(best[i], sums + o, first + o, model.vocab_size);
      }
    }
  });
  const float bad = sum_lanes<V>(nonzero);
  if (!(bad == 0.0f)) forward.report_bad(2 * model.n_layers);
}

}  // namespace flashformer

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

// What a finished tile needs of a row that wants something, side by side: weights have driven all else from the caches
// and from what translates addresses since the last one.
struct HeadRow {
  Candidate best;
  int32_t row;
  float temperature;
  bool chosen_later;
  float* logits;  // where they are stored, or null
};

template <class V, class W>
void lm_head(Worker& worker, const Phase& phase, const Span& span) {
  using X = typename W::X;
  using F = typename V::F;
  Forward& forward = *worker.forward;
  const Model& model = forward.model;
  const int64_t stride = model.input_stride, n_rows = forward.n_head_rows, vocab_size = model.vocab_size;
  const int64_t outputs = phase.vectors * kLanes;
  X* input = worker.input<X>();
  HeadRow rows[kMaxHeadRows];
  for (int64_t i = 0; i < n_rows; ++i) {
    const int32_t r = forward.head_row[i];
    normalise_row<V>(worker, phase, r, input + i * stride, 2 * model.n_layers - 1);
    const bool later = chooses_from_logits(forward.row, r), stores = later || forward.row.want[r] == kWantLogits;
    float* logits = stores ? forward.logits() + i * model.logits_stride : nullptr;
    rows[i] = {{-FLT_MAX, -1}, r, forward.row.temperature[r], later, logits};
  }
  const F scale = V::set1(static_cast<float>(phase.scale)), softcap = V::set1(static_cast<float>(phase.softcap));
  const bool capped = phase.softcap > 0;
  F nonzero = V::zero();  // becomes NaN with the first logit that is not finite
  product<V, W>(worker, phase, span, Input<X>{input, stride}, n_rows, [&](int64_t first, float* sums) {
    for (int64_t i = 0; i < n_rows; ++i, sums += kPad) {
      HeadRow& row = rows[i];
      for (int64_t o = 0; o < outputs; o += kLanes) {
        F logit = V::mul(V::load(sums + o), scale);
        nonzero = V::fma(logit, V::zero(), nonzero);
        if (capped) logit = soft_capped<V>(logit, softcap);
        V::store(sums + o, logit);
        if (row.logits) V::store(row.logits + first + o, logit);
        if (row.chosen_later) continue;
        if (row.temperature > 0) {
          const RowArrays& wanted = forward.row;
          float noise[16];
          gumbel16<V>(wanted.seed[row.row], wanted.choice[row.row], wanted.pos[row.row], first + o, noise);
          V::store(sums + o, V::add(V::div(logit, V::set1(row.temperature)), V::load(noise)));
        }
        improve<V>(row.best, sums + o, first + o, vocab_size);
      }
    }
  });
  for (int64_t i = 0; i < n_rows; ++i) forward.candidates(worker.index)[i] = rows[i].best;
  const float bad = sum_lanes<V>(nonzero);
  if (!(bad == 0.0f)) forward.report_bad(2 * model.n_layers);
}

}  // namespace flashformer

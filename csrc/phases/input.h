// Inputs of products: normalised or plain fp32 rows, in the element type that the product takes.
#pragma once

#include <cfloat>

#include "../forward.h"
#include "math.h"

namespace flashformer {

template <class X>
struct Input {
  const X* x;
  int64_t stride;
};

template <class V>
inline void store_as(float* p, typename V::F x) {
  V::store(p, x);
}
template <class V>
inline void store_as(uint16_t* p, typename V::F x) {
  V::store_bf16(p, x);
}

// RMS norm (Zhang & Sennrich 2019) of one residual row: x * rsqrt(mean(x^2) + eps) * weight, then rounded.
// The padding of x is zero. A sum of squares that is not finite is reported under `place`.
template <class V, class X>
inline void normalise_row(Worker& worker, const Phase& phase, const float* x, X* out, int64_t place) {
  using F = typename V::F;
  const Model& model = worker.forward->model;
  const float* weight = worker.forward->vector(phase.norm);
  F sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  for (int64_t i = 0; i < model.d_model_stride; i += kPad) {
    for (int j = 0; j < 4; ++j) {
      F v = V::load(x + i + j * kLanes);
      sums[j] = V::fma(v, v, sums[j]);
    }
  }
  float sum = sum_lanes<V>(V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3])));
  if (!(sum <= FLT_MAX)) worker.forward->report_bad(place);
  float mean = sum / static_cast<float>(model.d_model);
  F scale = V::set1(1.0f / __builtin_sqrtf(mean + static_cast<float>(phase.norm_eps)));
  for (int64_t i = 0; i < model.d_model_stride; i += kLanes) {
    store_as<V>(out + i, V::mul(V::mul(V::load(x + i), scale), V::load(weight + i)));
  }
}

// All rows of the residual, normalised by this worker for itself.
template <class V, class X>
inline Input<X> normalised_rows(Worker& worker, const Phase& phase, int64_t place) {
  const Forward& forward = *worker.forward;
  const int64_t stride = forward.model.input_stride;
  X* out = worker.input<X>();
  for (int64_t r = 0; r < forward.n_rows; ++r) {
    normalise_row<V>(worker, phase, forward.residual() + r * forward.model.d_model_stride, out + r * stride, place);
  }
  return {out, stride};
}

// fp32 rows of n elements (and zero padding) as they are, or rounded into scratch.
template <class V>
inline Input<float> plain_rows(Worker&, const float* rows, int64_t stride, int64_t, float*) {
  return {rows, stride};
}
template <class V>
inline Input<uint16_t> plain_rows(Worker& worker, const float* rows, int64_t stride, int64_t n, uint16_t* out) {
  const int64_t out_stride = worker.forward->model.input_stride;
  for (int64_t r = 0; r < worker.forward->n_rows; ++r) {
    for (int64_t i = 0; i < n; i += kLanes) V::store_bf16(out + r * out_stride + i, V::load(rows + r * stride + i));
  }
  return {out, out_stride};
}

}  // namespace flashformer

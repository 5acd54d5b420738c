// Inputs of products: normalised or plain fp32 rows, in the element type that the product takes; and norms.
#pragma once

#include <cfloat>
#include <cstddef>

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

// Sum of n squares. Called: within a larger function g++ may keep these sums in the stack.
template <class V>
[[gnu::noinline]] float sum_of_squares(const float* x, int64_t n) {
  using F = typename V::F;
  F sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int64_t i = 0;
  for (; i + kPad <= n; i += kPad) {
    for (int j = 0; j < 4; ++j) {
      F v = V::load(x + i + j * kLanes);
      sums[j] = V::fma(v, v, sums[j]);
    }
  }
  for (int j = 0; i < n; i += kLanes, ++j) {
    float rest[kLanes] = {};
    __builtin_memcpy(rest, x + i, static_cast<std::size_t>(n - i < kLanes ? n - i : kLanes) * sizeof(float));
    F v = V::load(rest);
    sums[j] = V::fma(v, v, sums[j]);
  }
  return sum_lanes<V>(V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3])));
}

// The factor of an RMS norm (Zhang & Sennrich 2019), 1 / sqrt(sum / n + eps). NaN if the sum is not finite: the factor
// would be 0 and hide what went wrong.
inline float rms_factor(float sum, int64_t n, double eps) {
  if (!(sum <= FLT_MAX)) return __builtin_nanf("");
  return 1.0f / __builtin_sqrtf(sum / static_cast<float>(n) + static_cast<float>(eps));
}

// The factor of row r of the branch that `phase` folds in.
template <class V>
inline float fold_factor(const Forward& forward, const Phase& phase, int64_t r) {
  const float* branch = forward.branch(phase.fold) + r * forward.model.d_model_stride;
  return rms_factor(sum_of_squares<V>(branch, forward.model.d_model_stride), forward.model.d_model, phase.fold_eps);
}

// 16 columns of what the residual lacks: fold_scale * branch * factor * weight.
template <class V>
inline typename V::F fold_at(const Forward& forward, const Phase& phase, int64_t r, int64_t column, float factor) {
  const float* branch = forward.branch(phase.fold) + r * forward.model.d_model_stride + column;
  const float* weight = forward.vector(phase.fold_norm) + column;
  typename V::F normed = V::mul(V::mul(V::load(branch), V::set1(factor)), V::load(weight));
  return V::mul(normed, V::set1(static_cast<float>(phase.fold_scale)));
}

// Row r of the residual with its fold, normed if the phase says so, then rounded. The padding of the result is zero. A
// sum of squares that is not finite is reported under `place`.
template <class V, class X>
inline void normalise_row(Worker& worker, const Phase& phase, int64_t r, X* out, int64_t place) {
  using F = typename V::F;
  const Forward& forward = *worker.forward;
  const int64_t stride = forward.model.d_model_stride;
  const float* x = forward.residual() + r * stride;
  if (phase.fold >= 0) {
    const float factor = fold_factor<V>(forward, phase, r);
    float* folded = worker.folded();
    for (int64_t i = 0; i < stride; i += kLanes) {
      V::store(folded + i, V::add(V::load(x + i), fold_at<V>(forward, phase, r, i, factor)));
    }
    x = folded;
  }
  const float sum = sum_of_squares<V>(x, stride);
  if (!(sum <= FLT_MAX)) worker.forward->report_bad(place);
  if (phase.norm < 0) {
    for (int64_t i = 0; i < stride; i += kLanes) store_as<V>(out + i, V::load(x + i));
    return;
  }
  const float* weight = forward.vector(phase.norm);
  F scale = V::set1(rms_factor(sum, forward.model.d_model, phase.norm_eps));
  for (int64_t i = 0; i < stride; i += kLanes) {
    store_as<V>(out + i, V::mul(V::mul(V::load(x + i), scale), V::load(weight + i)));
  }
}

// All rows of the residual, normalised by this worker for itself.
template <class V, class X>
inline Input<X> normalised_rows(Worker& worker, const Phase& phase, int64_t place) {
  const int64_t stride = worker.forward->model.input_stride;
  X* out = worker.input<X>();
  for (int64_t r = 0; r < worker.forward->n_rows; ++r) normalise_row<V>(worker, phase, r, out + r * stride, place);
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

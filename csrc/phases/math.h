// exp, sigmoid and log of 16 lanes, our own so that no C library decides the bits.
#pragma once

#include <cstdint>

#include "../simd/f4.h"

namespace flashformer {

// e^x for x <= 88; e^-87.3, about 1e-38, for all below. Cody-Waite reduction by ln 2, then a polynomial of degree 6;
// error about 1 ulp.
template <class V>
inline typename V::F exp(typename V::F x) {
  using F = typename V::F;
  x = V::min(V::max(x, V::set1(-87.3f)), V::set1(88.0f));
  F n = V::round(V::mul(x, V::set1(1.44269504f)));
  F r = V::fma(n, V::set1(-0.693359375f), x);
  r = V::fma(n, V::set1(2.12194440e-4f), r);
  F p = V::set1(1.9875691500e-4f);
  p = V::fma(p, r, V::set1(1.3981999507e-3f));
  p = V::fma(p, r, V::set1(8.3334519073e-3f));
  p = V::fma(p, r, V::set1(4.1665795894e-2f));
  p = V::fma(p, r, V::set1(1.6666665459e-1f));
  p = V::fma(p, r, V::set1(5.0000001201e-1f));
  p = V::fma(p, V::mul(r, r), r);
  return V::scale(V::add(p, V::set1(1.0f)), n);
}

template <class V>
inline typename V::F silu(typename V::F x) {
  using F = typename V::F;
  F e = exp<V>(V::sub(V::zero(), x));
  return V::div(V::max(V::set1(-128.0f), x), V::add(e, V::set1(1.0f)));  // below, exp is at its limit; NaN stays
}

// GELU by its tanh approximation (Hendrycks & Gimpel 2016): x * (1 + tanh(u)) / 2 = x * sigmoid(2u) with
// u = sqrt(2 / pi) * (x + 0.044715 x^3).
template <class V>
inline typename V::F gelu_tanh(typename V::F x) {
  using F = typename V::F;
  F cubic = V::fma(V::mul(V::mul(x, x), V::set1(0.044715f)), x, x);
  F e = exp<V>(V::mul(cubic, V::set1(-1.5957691216f)));
  return V::div(V::max(V::set1(-128.0f), x), V::add(e, V::set1(1.0f)));
}

// softcap * tanh(x / softcap), tanh(y) = 1 - 2 / (e^2y + 1): exact to 1e-7 of softcap.
template <class V>
inline typename V::F soft_capped(typename V::F x, typename V::F softcap) {
  using F = typename V::F;
  F y = V::div(x, softcap);
  F e = exp<V>(V::add(y, y));
  F tanh = V::sub(V::set1(1.0f), V::div(V::set1(2.0f), V::add(e, V::set1(1.0f))));
  return V::mul(tanh, softcap);
}

// All lanes of x by one fixed tree: lane i meets lane i + 8, then i + 4, i + 2, i + 1. both: of two vectors of 4.
template <class V, class Both>
inline float fold_lanes(typename V::F x, Both both) {
  const Quarters q = V::quarters(x);
  const F4 four = both(both(q[0], q[2]), both(q[1], q[3]));
  const F4 two = both(four, F4{four[2], four[3], four[2], four[3]});
  return both(two, F4{two[1], two[1], two[1], two[1]})[0];
}

template <class V>
inline float sum_lanes(typename V::F x) {
  return fold_lanes<V>(x, [](F4 a, F4 b) { return a + b; });
}

template <class V>
inline float max_lanes(typename V::F x) {
  return fold_lanes<V>(x, [](F4 a, F4 b) { return a > b ? a : b; });
}

// ln x of 16 normal positive numbers (Cephes' logf polynomial on [sqrt(1/2), sqrt(2)), error about 1 ulp).
template <class V>
inline void log16(const float* x, float* out) {
  for (int i = 0; i < 16; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, x + i, 4);
    uint32_t shifted = bits - 0x3F3504F3u;  // the bits of sqrt(1/2)
    int32_t exponent = static_cast<int32_t>(shifted) >> 23;
    bits = (shifted & 0x007FFFFFu) + 0x3F3504F3u;
    float m;
    __builtin_memcpy(&m, &bits, 4);
    m -= 1.0f;
    float z = m * m, e = static_cast<float>(exponent);
    float p = 7.0376836292e-2f;
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    p = p * m * z;
    p += e * -2.12194440e-4f;
    p -= 0.5f * z;
    out[i] = m + p + e * 0.693359375f;
  }
}

}  // namespace flashformer

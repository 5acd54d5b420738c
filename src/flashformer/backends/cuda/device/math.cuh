// exp, log, activations, soft cap and RMS factor of one number: the same steps as csrc/phases/math.h, so that the bits
// are those of the CPU backend wherever it has fused multiply-add. Sums and maxima over a warp by one fixed tree.
//
// Compiled with --fmad=false: an FMA is where fma_f32 stands and nowhere else. Division and square root are IEEE.
#pragma once

#include "layout.cuh"
#include "ptx.cuh"

namespace flashformer {

inline DEVICE f32 quiet_nan() { return bit_copy<f32>(0x7FC00000u); }

// The larger of two numbers; the second where one is NaN.
inline DEVICE f32 max_of(f32 x, f32 y) { return x > y ? x : y; }

// e^x for x <= 88; e^-87.3, about 1e-38, for all below. Cody-Waite reduction by ln 2, then a polynomial of degree 6.
inline DEVICE f32 exp_f32(f32 x) {
  x = x > -87.3f ? x : -87.3f;
  x = x < 88.0f ? x : 88.0f;
  const f32 n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // nearest integer: 1.5 * 2^23 leaves no fraction
  f32 r = fma_f32(n, -0.693359375f, x);
  r = fma_f32(n, 2.12194440e-4f, r);
  f32 p = 1.9875691500e-4f;
  p = fma_f32(p, r, 1.3981999507e-3f);
  p = fma_f32(p, r, 8.3334519073e-3f);
  p = fma_f32(p, r, 4.1665795894e-2f);
  p = fma_f32(p, r, 1.6666665459e-1f);
  p = fma_f32(p, r, 5.0000001201e-1f);
  p = fma_f32(p, r * r, r);
  return (p + 1.0f) * bit_copy<f32>(static_cast<u32>(static_cast<i32>(n) + 127) << 23);
}

// ln x of a normal positive number (Cephes' logf polynomial on [sqrt(1/2), sqrt(2))).
inline DEVICE f32 log_f32(f32 x) {
  const u32 shifted = bit_copy<u32>(x) - 0x3F3504F3u;  // the bits of sqrt(1/2)
  const f32 e = static_cast<f32>(static_cast<i32>(shifted) >> 23);
  const f32 m = bit_copy<f32>((shifted & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  const f32 z = m * m;
  f32 p = 7.0376836292e-2f;
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
  return m + p + e * 0.693359375f;
}

// x / (1 + e^y). SiLU: y = -x. GELU by its tanh approximation (Hendrycks & Gimpel 2016): y of gelu_exponent.
inline DEVICE f32 gated(f32 x, f32 y) {
  const f32 e = exp_f32(y);
  return (-128.0f > x ? -128.0f : x) / (e + 1.0f);  // below, exp is at its limit; NaN stays
}
inline DEVICE f32 gelu_exponent(f32 x) { return fma_f32(x * x * 0.044715f, x, x) * -1.5957691216f; }

// softcap * tanh(x / softcap), exact to 1e-7 of softcap.
inline COLD f32 soft_capped(f32 x, f32 softcap) {
  const f32 y = x / softcap;
  const f32 e = exp_f32(y + y);
  return (1.0f - 2.0f / (e + 1.0f)) * softcap;
}

// The factor of an RMS norm (Zhang & Sennrich 2019) over n numbers, from the sum of their squares. NaN if that is not
// finite: the factor would be 0 and hide what went wrong.
inline DEVICE f32 rms_factor(f32 sum, i32 n, f32 eps) {
  if (!(sum <= 3.402823466e+38f)) return quiet_nan();
  return 1.0f / sqrt_f32(sum / static_cast<f32>(n) + eps);
}

// Of the 32 lanes of a warp, in every lane.
inline DEVICE f32 warp_sum(f32 x) {
  for (u32 mask = 16; mask; mask /= 2) x += shfl_xor_f32(x, mask);
  return x;
}

inline DEVICE f32 warp_max(f32 x) {
  for (u32 mask = 16; mask; mask /= 2) x = max_of(x, shfl_xor_f32(x, mask));
  return x;
}

// The same of several numbers at once: in step, so that a loop costs no time.
template <u32 n>
inline DEVICE void warp_sums(f32 (&x)[n]) {
  UNROLL(n == 1 ? 5 : 1)
  for (u32 mask = 16; mask; mask /= 2) {
    UNROLL(n)
    for (u32 i = 0; i < n; ++i) x[i] += shfl_xor_f32(x[i], mask);
  }
}

template <u32 n>
inline DEVICE void warp_maxima(f32 (&x)[n]) {
  UNROLL(n == 1 ? 5 : 1)
  for (u32 mask = 16; mask; mask /= 2) {
    UNROLL(n)
    for (u32 i = 0; i < n; ++i) x[i] = max_of(x[i], shfl_xor_f32(x[i], mask));
  }
}

}  // namespace flashformer

// f16 and bf16 <-> f32, round to nearest even, by integer arithmetic: exact for every bit pattern.
#pragma once

#include "calls.h"

namespace sim {

inline u32 bits_of(f32 x) { return __builtin_bit_cast(u32, x); }
inline f32 f32_of(u32 bits) { return __builtin_bit_cast(f32, bits); }

inline f32 bf16_to_f32(u16 x) { return f32_of(static_cast<u32>(x) << 16); }

inline u16 f32_to_bf16(f32 x) {
  const u32 bits = bits_of(x);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FFF;  // the NaN that the GPU gives
  return static_cast<u16>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline f32 f16_to_f32(u16 x) {
  const u32 sign = static_cast<u32>(x & 0x8000) << 16, exponent = (x >> 10) & 31, fraction = x & 0x3FF;
  if (exponent == 31) return f32_of(sign | 0x7F800000 | fraction << 13 | (fraction ? 0x400000 : 0));
  if (exponent) return f32_of(sign | (exponent + 112) << 23 | fraction << 13);
  const f32 tiny = static_cast<f32>(fraction) * 0x1p-24f;  // exact
  return f32_of(sign | bits_of(tiny));
}

inline u16 f32_to_f16(f32 x) {
  const u32 bits = bits_of(x), sign = (bits >> 16) & 0x8000, size = bits & 0x7FFFFFFF;
  if (size > 0x7F800000) return 0x7FFF;
  if (size >= 0x477FF000) return static_cast<u16>(sign | 0x7C00);  // 65520 and above round to infinity
  if (size >= 0x38800000) {                                        // normal: 2^-14 and above
    const u32 rounded = size + 0xFFF + ((size >> 13) & 1);
    return static_cast<u16>(sign | ((rounded - 0x38000000) >> 13));
  }
  if (size <= 0x33000000) return static_cast<u16>(sign);  // 2^-25 and below round to 0
  const u32 shift = 126 - (size >> 23), fraction = (size & 0x7FFFFF) | 0x800000;
  const u32 kept = fraction >> shift, rest = fraction & ((1u << shift) - 1), half = 1u << (shift - 1);
  return static_cast<u16>(sign | (kept + (rest > half || (rest == half && (kept & 1)))));
}

// a * b + c of f16 numbers as an f32 that rounds to the right f16: the sum in f64, where it is exact or far from every
// midpoint of two f16, cut to f32 so that an inexact one ends in a 1.
inline f32 fma_f16(u16 a, u16 b, u16 c) {
  const f64 sum = static_cast<f64>(f16_to_f32(a)) * static_cast<f64>(f16_to_f32(b)) + static_cast<f64>(f16_to_f32(c));
  const f32 near = static_cast<f32>(sum);
  if (static_cast<f64>(near) == sum || sum != sum || near - near != 0) return near;
  const bool away = near < 0 ? static_cast<f64>(near) < sum : static_cast<f64>(near) > sum;
  return f32_of((bits_of(near) - away) | 1);
}

}  // namespace sim

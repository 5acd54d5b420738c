// Single elements of weights and caches. Internal to each file that includes it, as those differ in their flags.
#pragma once

#include <cstdint>

#include "generated/program.h"

namespace flashformer {

static inline int64_t bytes_of(Format format) { return format == Format::kF32 ? 4 : 2; }

static inline int64_t k_group_of(Format format) { return format == Format::kF32 ? 1 : 2; }

static inline float from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

static inline float from_f16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7FFF;
  if (magnitude >= 0x7C00) return from_bits(sign | 0x7F800000u | (magnitude & 0x3FF) << 13);  // Inf, NaN
  if (magnitude >= 0x400) return from_bits(sign | ((magnitude << 13) + (112u << 23)));
  const float small = static_cast<float>(magnitude) * 0x1p-24f;
  return sign ? -small : small;
}

static inline float to_f32(const char* p, Format format) {
  if (format == Format::kF32) {
    float x;
    __builtin_memcpy(&x, p, 4);
    return x;
  }
  uint16_t half;
  __builtin_memcpy(&half, p, 2);
  return format == Format::kF16 ? from_f16(half) : from_bits(static_cast<uint32_t>(half) << 16);
}

// Rounds to nearest even; a NaN must be a default one, others may lose their payload and with it their nature.
static inline uint16_t to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Rounds to nearest even; Inf beyond 65504. A NaN keeps its sign and nothing else.
static inline uint16_t to_f16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7FFFFFFFu;
  if (bits > 0x7F800000u) return sign | 0x7E00;
  if (bits >= 0x477FF000u) return sign | 0x7C00;  // 65520 and above
  if (bits < 0x38800000u) {                       // below 2^-14: units of 2^-24, by the rounding of the addition
    const float shifted = from_bits(bits) + 0x1p-1f;
    uint32_t sum;
    __builtin_memcpy(&sum, &shifted, 4);
    return static_cast<uint16_t>(sign | (sum - 0x3F000000u));
  }
  return static_cast<uint16_t>(sign | ((bits + 0xFFF + (bits >> 13 & 1) - (112u << 23)) >> 13));
}

}  // namespace flashformer

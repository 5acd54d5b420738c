// Single elements of weights and caches. Internal to each file that includes it, as those differ in their flags.
#pragma once

#include <cstdint>

#include "generated/program.h"

namespace flashformer {

static inline int64_t bytes_of(Format format) { return format == Format::kF32 ? 4 : 2; }

static inline float to_f32(const char* p, Format format) {
  uint32_t bits;
  if (format == Format::kF32) {
    __builtin_memcpy(&bits, p, 4);
  } else {
    uint16_t high;
    __builtin_memcpy(&high, p, 2);
    bits = static_cast<uint32_t>(high) << 16;
  }
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// Rounds to nearest even; a NaN must be a default one, others may lose their payload and with it their nature.
static inline uint16_t to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

}  // namespace flashformer

// One group of weights -> codes, a scale, a zero; quantize.py is the definition. Internal to the file that packs.
#pragma once

#include <cmath>
#include <cstdint>

#include "element.h"

namespace flashformer {

constexpr int64_t kMostGroup = 128;

struct QuantGroup {
  uint8_t codes[kMostGroup];
  uint16_t scale;  // f16
  uint8_t zero;
};

// Scale and zero of one candidate.
struct QuantCandidate {
  float scale;
  uint8_t zero;
};

static inline float level_of(uint8_t code, uint8_t zero, Format format) {
  if (format == Format::kNf4) return kNf4[code];
  return static_cast<float>(code) - static_cast<float>(zero);
}

static inline uint8_t code_of(float x, float scale, uint8_t zero, Format format) {
  if (format == Format::kNf4) {
    if (scale == 0) return 7;  // the code of 0
    const float steps = x / scale;
    uint8_t code = 0;
    while (code < 15 && steps > (kNf4[code + 1] + kNf4[code]) * 0.5f) ++code;
    return code;
  }
  if (scale == 0) return zero;
  const float lowest = format == Format::kInt8 ? 1 : 0, highest = format == Format::kInt8 ? 255 : 15;
  const float code = std::nearbyint(x / scale) + static_cast<float>(zero);
  return static_cast<uint8_t>(code < lowest ? lowest : code > highest ? highest : code);
}

// Takes the candidate if its error is less than `least`, the first of equals.
static inline void try_candidate(const float* x, int64_t n, Format format, QuantCandidate candidate, double* least,
                                 QuantGroup* best) {
  const uint16_t half = to_f16(candidate.scale);
  const float scale = from_f16(half);
  QuantGroup made;
  made.scale = half;
  made.zero = candidate.zero;
  double error = 0;
  for (int64_t i = 0; i < n; ++i) {
    made.codes[i] = code_of(x[i], scale, candidate.zero, format);
    const float value = level_of(made.codes[i], candidate.zero, format) * scale;
    const double difference = static_cast<double>(x[i]) - static_cast<double>(value);
    error += difference * difference;
  }
  if (*least < 0 || error < *least) {
    *least = error;
    *best = made;
  }
}

// n elements, all finite.
static inline void quantize_group(const float* x, int64_t n, Format format, bool zero_points, uint8_t zero,
                                  QuantGroup* best) {
  float largest = x[0], low = 0, high = 0;  // the largest of magnitude, the first of equals
  for (int64_t i = 0; i < n; ++i) {
    if (std::fabs(x[i]) > std::fabs(largest)) largest = x[i];
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  double least = -1;
  auto attempt = [&](float scale, uint8_t z) { try_candidate(x, n, format, {scale, z}, &least, best); };
  if (format == Format::kInt8) {
    attempt(std::fabs(largest) / 127.0f, zero);
  } else if (format == Format::kNf4) {
    for (const float share : kNf4Shares) attempt(std::fabs(largest) * share / 127.0f, zero);
  } else if (!zero_points) {
    for (const float steps : kInt4Steps) attempt(-largest / steps, zero);
  } else {
    for (const float share : kInt4ZpShares) {
      const float scale = (high - low) * share / 15.0f, half = from_f16(to_f16(scale));
      float offset = half > 0 ? std::nearbyint(-low * share / half) : 0.0f;
      offset = offset < 0 ? 0 : offset > 15 ? 15 : offset;
      attempt(scale, static_cast<uint8_t>(offset));
    }
  }
}

}  // namespace flashformer

// Groups of weights -> codes, scales and zeros; quantize.py is the definition. Sixteen outputs at a time, one to a
// lane: loops over lanes are left to the compiler, so each file that includes this gets them for its own instruction
// set. Every lane adds the errors of a group in order of k, in float64.
#pragma once

#include <cstdint>
#include <cstring>

#include "element.h"
#include "simd/isa.h"

namespace flashformer {

template <class T>
using Lanes = T[kLanes];

struct QuantGroup {
  alignas(64) Lanes<float> x[kMostGroup];  // (group, 16)
};

// As to_f16 for what is finite or Inf, without branches.
static inline uint32_t half_of(float x) {
  const uint32_t all = __builtin_bit_cast(uint32_t, x), bits = all & 0x7FFFFFFFu;
  const float shifted = __builtin_bit_cast(float, bits) + 0x1p-1f;  // units of 2^-24, by the rounding of the addition
  const uint32_t small = __builtin_bit_cast(uint32_t, shifted) - 0x3F000000u;
  const uint32_t normal = (bits + 0xFFFu + (bits >> 13 & 1u) - (112u << 23)) >> 13;
  const uint32_t magnitude = bits >= 0x477FF000u ? 0x7C00u : bits < 0x38800000u ? small : normal;
  return (all >> 16 & 0x8000u) | magnitude;
}

// As from_f16, without branches.
static inline float float_of(uint32_t half) {
  const uint32_t magnitude = half & 0x7FFFu, sign = (half & 0x8000u) << 16;
  const float small = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7C00u ? 224u << 23 : 112u << 23);
  return __builtin_bit_cast(float, sign | (magnitude >= 0x400u ? normal : __builtin_bit_cast(uint32_t, small)));
}

// Nearest integer, ties to even; what is too large for that stays large.
static inline float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; }

// The code nearest to x = steps * scale.
template <Format kFormat>
static inline float code_of(float steps, float zero) {
  if constexpr (kFormat == Format::kNf4) {
    float code = 0;
    for (int c = 0; c < 15; ++c) code += steps > (kNf4[c + 1] + kNf4[c]) * 0.5f ? 1.0f : 0.0f;
    return code;
  } else {
    constexpr float kLowest = kFormat == Format::kInt8 ? 1.0f : 0.0f;
    constexpr float kHighest = kFormat == Format::kInt8 ? 255.0f : 15.0f;
    const float code = nearest(steps) + zero, low = code < kLowest ? kLowest : code;
    return low > kHighest ? kHighest : low;
  }
}

// What that code stands for, in steps.
template <Format kFormat>
static inline float level_of(float steps, float zero) {
  if constexpr (kFormat == Format::kNf4) {  // whole numbers, so that the sum is exact
    float level = kNf4[0];
    for (int c = 0; c < 15; ++c) level += steps > (kNf4[c + 1] + kNf4[c]) * 0.5f ? kNf4[c + 1] - kNf4[c] : 0.0f;
    return level;
  } else {
    return code_of<kFormat>(steps, zero) - zero;
  }
}

// Scale and zero of one candidate in every lane.
struct QuantCandidate {
  alignas(64) Lanes<uint32_t> half;
  alignas(64) Lanes<float> zero;
};

static inline void set_scale(QuantCandidate& candidate, const Lanes<float>& scale) {
  for (int l = 0; l < kLanes; ++l) candidate.half[l] = half_of(scale[l]);
}

// What x is divided by: the scale, or 1 where it is 0.
static inline void divisors(const QuantCandidate& candidate, Lanes<float>& scale, Lanes<float>& divisor) {
  for (int l = 0; l < kLanes; ++l) {
    scale[l] = float_of(candidate.half[l]);
    divisor[l] = scale[l] != 0.0f ? scale[l] : 1.0f;
  }
}

// Keeps in every lane the candidate with the least error, the first of equals.
template <Format kFormat>
static inline void try_candidate(const QuantGroup& group, int64_t n, const QuantCandidate& candidate, bool first,
                                 Lanes<double>& least, QuantCandidate& best) {
  alignas(64) Lanes<float> scale, divisor, zero;
  alignas(64) Lanes<double> error = {};
  divisors(candidate, scale, divisor);
  std::memcpy(zero, candidate.zero, sizeof(zero));
  for (int64_t k = 0; k < n; ++k) {
    for (int l = 0; l < kLanes; ++l) {
      const float x = group.x[k][l];
      const float value = level_of<kFormat>(x / divisor[l], zero[l]) * scale[l];
      const double difference = static_cast<double>(x) - static_cast<double>(value);
      error[l] += difference * difference;
    }
  }
  for (int l = 0; l < kLanes; ++l) {
    const bool better = first || error[l] < least[l];
    least[l] = better ? error[l] : least[l];
    best.half[l] = better ? candidate.half[l] : best.half[l];
    best.zero[l] = better ? candidate.zero[l] : best.zero[l];
  }
}

template <Format kFormat>
static inline void find_best(const QuantVector& v, const QuantGroup& group, QuantCandidate& best) {
  alignas(64) Lanes<float> largest, low = {}, high = {}, scale;  // the largest of magnitude, the first of equals
  std::memcpy(largest, group.x[0], sizeof(largest));
  for (int64_t k = 0; k < v.group; ++k) {
    for (int l = 0; l < kLanes; ++l) {
      const float x = group.x[k][l];
      largest[l] = __builtin_fabsf(x) > __builtin_fabsf(largest[l]) ? x : largest[l];
      low[l] = x < low[l] ? x : low[l];
      high[l] = x > high[l] ? x : high[l];
    }
  }
  QuantCandidate candidate;
  for (int l = 0; l < kLanes; ++l) candidate.zero[l] = static_cast<float>(v.zero);
  if constexpr (kFormat == Format::kInt8) {
    for (int l = 0; l < kLanes; ++l) scale[l] = __builtin_fabsf(largest[l]) / 127.0f;
    set_scale(candidate, scale);
    best = candidate;  // the only one
    return;
  }
  alignas(64) Lanes<double> least;
  bool first = true;
  const auto attempt = [&] {
    try_candidate<kFormat>(group, v.group, candidate, first, least, best);
    first = false;
  };
  if constexpr (kFormat == Format::kNf4) {
    for (const float share : kNf4Shares) {
      for (int l = 0; l < kLanes; ++l) scale[l] = __builtin_fabsf(largest[l]) * share / 127.0f;
      set_scale(candidate, scale);
      attempt();
    }
  } else if (!v.zero_points) {
    for (const float steps : kInt4Steps) {
      for (int l = 0; l < kLanes; ++l) scale[l] = -largest[l] / steps;
      set_scale(candidate, scale);
      attempt();
    }
  } else {
    for (const float share : kInt4ZpShares) {
      for (int l = 0; l < kLanes; ++l) scale[l] = (high[l] - low[l]) * share / 15.0f;
      set_scale(candidate, scale);
      for (int l = 0; l < kLanes; ++l) {
        const float half = float_of(candidate.half[l]);
        const float offset = nearest(-low[l] * share / (half > 0.0f ? half : 1.0f));
        const float at_least = offset < 0.0f ? 0.0f : offset;
        candidate.zero[l] = half > 0.0f ? (at_least > 15.0f ? 15.0f : at_least) : 0.0f;
      }
      attempt();
    }
  }
}

// Writes one group; the lanes in `used` (all bits or none), zeros elsewhere. Returns lanes whose scale is beyond f16.
template <Format kFormat>
static inline uint32_t write_group(const QuantVector& v, int64_t g, const QuantGroup& group, const QuantCandidate& best,
                                   const Lanes<uint32_t>& used) {
  constexpr int kPerStep = kFormat == Format::kInt8 ? 4 : 8;
  alignas(64) Lanes<float> scale, divisor;
  alignas(64) Lanes<uint32_t> usable, fallback, word;
  uint16_t halves[kLanes];
  uint8_t zeros[kLanes];
  uint32_t beyond = 0;
  divisors(best, scale, divisor);
  for (int l = 0; l < kLanes; ++l) {
    const float code = kFormat == Format::kNf4 ? 7.0f : best.zero[l];  // the code of 0
    usable[l] = scale[l] != 0.0f ? ~0u : 0u;
    fallback[l] = static_cast<uint32_t>(static_cast<int32_t>(code)) & ~usable[l];
    halves[l] = static_cast<uint16_t>(best.half[l] & used[l]);
    zeros[l] = static_cast<uint8_t>(static_cast<uint32_t>(static_cast<int32_t>(best.zero[l])) & used[l]);
  }
  for (int l = 0; l < kLanes; ++l) beyond |= (halves[l] & 0x7C00) == 0x7C00 ? 1u << l : 0u;
  std::memcpy(v.scales + g * v.group_bytes, halves, sizeof(halves));
  if (v.zero_points) std::memcpy(v.zeros + g * v.group_bytes, zeros, sizeof(zeros));
  char* codes = v.codes + g * v.group_bytes;
  for (int64_t k = 0; k < v.group; k += kPerStep, codes += v.step_bytes) {
    std::memset(word, 0, sizeof(word));
    for (int j = 0; j < kPerStep; ++j) {
      const int shift = j < 4 ? 8 * j : 8 * (j - 4) + 4;
      for (int l = 0; l < kLanes; ++l) {
        const float code = code_of<kFormat>(group.x[k + j][l] / divisor[l], best.zero[l]);
        const uint32_t bits = (static_cast<uint32_t>(static_cast<int32_t>(code)) & usable[l]) | fallback[l];
        word[l] |= (bits & used[l]) << shift;
      }
    }
    std::memcpy(codes, word, sizeof(word));
  }
  return beyond;
}

template <Format kFormat>
static inline uint32_t quantize_as(const QuantVector& v) {
  QuantGroup group = {};
  QuantCandidate best;
  alignas(64) Lanes<uint32_t> used;
  for (int l = 0; l < kLanes; ++l) used[l] = v.rows[l] ? ~0u : 0u;
  uint32_t beyond = 0;
  for (int64_t g = 0; g < v.n_groups; ++g) {
    for (int l = 0; l < kLanes; ++l) {
      if (!v.rows[l]) continue;
      for (int64_t k = 0; k < v.group; ++k) group.x[k][l] = v.rows[l][g * v.group + k];
    }
    find_best<kFormat>(v, group, best);
    beyond |= write_group<kFormat>(v, g, group, best, used);
  }
  return beyond;
}

// Quantizes a vector of outputs. Returns a bit for each lane that has a scale beyond f16. V: an instruction set of its
// own, so that no copy made for one serves another.
template <class V>
uint32_t quantize_vector(const QuantVector& v) {
  switch (v.format) {
    case Format::kInt8:
      return quantize_as<Format::kInt8>(v);
    case Format::kInt4:
      return quantize_as<Format::kInt4>(v);
    default:
      return quantize_as<Format::kNf4>(v);
  }
}

}  // namespace flashformer

// The instruction sets of this build, each compiled in a file of its own with its own flags.
#pragma once

#include "../forward.h"

namespace flashformer {

using TableOf = const PhaseTable* (*)(Format weights, Format kv, bool dot);

const PhaseTable* portable_table(Format weights, Format kv, bool dot);
const PhaseTable* avx2_table(Format weights, Format kv, bool dot);
const PhaseTable* avx512_table(Format weights, Format kv, bool dot);
const PhaseTable* avx512bf16_table(Format weights, Format kv, bool dot);
const PhaseTable* amx_table(Format weights, Format kv, bool dot);

// How memory is read: as one stream or its halves side by side, every line asked for so many bytes early into the
// second level of caches (far, never without the next) and into the first (near), 0: not at all.
struct Reading {
  int64_t streams, far, near;
};

// Read bandwidth probes: the sum of all 8-byte words, by 64-byte loads.
using SumOf = uint64_t (*)(const char* begin, int64_t n_bytes, const Reading& how);

uint64_t portable_sum(const char* begin, int64_t n_bytes, const Reading& how);
uint64_t avx2_sum(const char* begin, int64_t n_bytes, const Reading& how);
uint64_t avx512_sum(const char* begin, int64_t n_bytes, const Reading& how);

constexpr int64_t kMostGroup = 128;

// One vector of outputs of a tile in a quantized format: where its rows are and where its groups go.
struct QuantVector {
  const float* rows[kLanes];  // k in whole groups, all finite; nullptr: padding, which becomes zeros
  int64_t n_groups, group;    // elements per group
  Format format;
  bool zero_points;
  uint8_t zero;        // where there are no zero points
  char* scales;        // (16) f16 of the first group
  char* zeros;         // (16) of the first group, with zero points
  char* codes;         // (16, 4) of the first step of the first group
  int64_t step_bytes;  // from one step to the next
  int64_t group_bytes;
};

// Quantizes it (quantize.h). Returns a bit for each lane that has a scale beyond f16.
using QuantizeOf = uint32_t (*)(const QuantVector& vector);

uint32_t portable_quantize(const QuantVector& vector);
uint32_t avx2_quantize(const QuantVector& vector);
uint32_t avx512_quantize(const QuantVector& vector);

}  // namespace flashformer

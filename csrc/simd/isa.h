// The instruction sets of this build, each compiled in a file of its own with its own flags.
#pragma once

#include "../forward.h"

namespace flashformer {

using TableOf = const PhaseTable* (*)(Format weights, Format kv, bool dot);

const PhaseTable* portable_table(Format weights, Format kv, bool dot);
const PhaseTable* avx2_table(Format weights, Format kv, bool dot);
const PhaseTable* avx512_table(Format weights, Format kv, bool dot);
const PhaseTable* avx512bf16_table(Format weights, Format kv, bool dot);

// Read bandwidth probes: the sum of all 8-byte words, by plain or prefetched 64-byte loads.
using SumOf = uint64_t (*)(const char* begin, int64_t n_bytes, bool prefetched);

uint64_t portable_sum(const char* begin, int64_t n_bytes, bool prefetched);
uint64_t avx2_sum(const char* begin, int64_t n_bytes, bool prefetched);
uint64_t avx512_sum(const char* begin, int64_t n_bytes, bool prefetched);

}  // namespace flashformer

// The inner loop of the read-bandwidth probe.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace flashformer {

// Sum of all 8-byte words of a range whose length is a multiple of 512.
template <class V>
inline uint64_t sum_bytes(const char* begin, int64_t n_bytes, const Reading& how) {
  using Words = uint64_t __attribute__((vector_size(64)));
  constexpr int kLines = 4;  // of a stream at once
  const int64_t stream = n_bytes / how.streams, far = how.far, near = how.near;
  Words sum[kLines] = {};
  for (int64_t i = 0; i < stream; i += kLines * 64) {
    const char* p = begin + i;
    for (int64_t s = 0; s < how.streams; ++s, p += stream) {
      for (int line = 0; line < kLines; ++line) {
        Words words;
        std::memcpy(&words, p + line * 64, 64);
        sum[line] += words;
      }
      if (far) {
        for (int line = 0; line < kLines; ++line) V::prefetch_far(p + line * 64 + far);
      }
      if (near) {
        for (int line = 0; line < kLines; ++line) V::prefetch(p + line * 64 + near);
      }
    }
  }
  uint64_t total = 0;
  for (const Words& words : sum) {
    for (int lane = 0; lane < 8; ++lane) total += words[lane];
  }
  return total;
}

}  // namespace flashformer

// The inner loop of the read-bandwidth probe.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace flashformer {

template <class V, bool FAR, bool NEAR>
inline uint64_t sum_asking(const char* begin, int64_t n_bytes, const Reading& how) {
  using Words = uint64_t __attribute__((vector_size(64)));
  const int64_t stream = n_bytes / how.streams, far = how.far, near = how.near;
  Words sum[4] = {};
  for (int64_t i = 0; i < stream; i += 256) {
    const char* p = begin + i;
    for (int64_t s = 0; s < how.streams; ++s, p += stream) {
      const char* at = p;
      for (int line = 0; line < 4; ++line, at += 64) {
        Words words;
        std::memcpy(&words, at, 64);
        sum[line] += words;
        if (FAR) V::prefetch_far(at + far);
        if (NEAR) V::prefetch(at + near);
        // Keeps the order: g++ loads first, which reads at 0.85 of this. By keep_order() it is 0.77 to 0.99.
        asm volatile("" : "+r"(at));
      }
    }
  }
  uint64_t total = 0;
  for (const Words& words : sum) {
    for (int lane = 0; lane < 8; ++lane) total += words[lane];
  }
  return total;
}

// Sum of all 8-byte words of a range whose length is a multiple of 512.
template <class V>
inline uint64_t sum_bytes(const char* begin, int64_t n_bytes, const Reading& how) {
  if (how.far) return sum_asking<V, true, true>(begin, n_bytes, how);
  if (how.near) return sum_asking<V, false, true>(begin, n_bytes, how);
  return sum_asking<V, false, false>(begin, n_bytes, how);
}

}  // namespace flashformer

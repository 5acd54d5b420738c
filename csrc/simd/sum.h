// The inner loop of the read-bandwidth probe.
#pragma once

#include <cstdint>
#include <cstring>

namespace flashformer {

// Sum of all 8-byte words of a range whose length is a multiple of 512. Prefetched `ahead` bytes early, 0: not at all.
template <class V>
inline uint64_t sum_bytes(const char* begin, int64_t n_bytes, int64_t ahead) {
  using Words = uint64_t __attribute__((vector_size(64)));
  Words sum[8] = {};
  for (int64_t i = 0; i < n_bytes; i += 512) {
    for (int j = 0; j < 8; ++j) {
      if (ahead) V::prefetch(begin + i + j * 64 + ahead);
      Words words;
      std::memcpy(&words, begin + i + j * 64, 64);
      sum[j] += words;
    }
  }
  uint64_t total = 0;
  for (const Words& words : sum) {
    for (int lane = 0; lane < 8; ++lane) total += words[lane];
  }
  return total;
}

}  // namespace flashformer

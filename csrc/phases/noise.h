// Gumbel noise by counter: Philox4x32-10 (Salmon et al. 2011) keyed by (seed, choice, position, token id).
// backends/noise.py is the definition.
#pragma once

#include "math.h"

namespace flashformer {

// Noise of token ids [first, first + 16), first a multiple of 4.
template <class V>
inline void gumbel16(uint64_t seed, int32_t choice, int32_t pos, int64_t first, float* out) {
  float u[16];
  for (int call = 0; call < 4; ++call) {
    uint32_t c[4] = {static_cast<uint32_t>(first / 4 + call), static_cast<uint32_t>(pos), static_cast<uint32_t>(choice),
                     0};
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
      uint32_t high_a = static_cast<uint32_t>(a >> 32), high_b = static_cast<uint32_t>(b >> 32);
      c[0] = high_b ^ c[1] ^ k0;
      c[2] = high_a ^ c[3] ^ k1;
      c[1] = static_cast<uint32_t>(b);
      c[3] = static_cast<uint32_t>(a);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < 4; ++i) u[4 * call + i] = (static_cast<float>(c[i] >> 9) + 0.5f) * 0x1p-23f;
  }
  log16<V>(u, out);
  for (int i = 0; i < 16; ++i) u[i] = -out[i];
  log16<V>(u, out);
  for (int i = 0; i < 16; ++i) out[i] = -out[i];
}

}  // namespace flashformer

// Gumbel noise by counter: Philox4x32-10 (Salmon et al. 2011) keyed by (seed, choice, position, token id).
// backends/noise.py is the definition; the logarithms are those of math.cuh, as on the CPU.
#pragma once

#include "math.cuh"

namespace flashformer {

// The four random words of token ids [4 quad, 4 quad + 4).
inline DEVICE u32x4 philox(u64 seed, i32 choice, i32 pos, u32 quad) {
  u32x4 c = {quad, static_cast<u32>(pos), static_cast<u32>(choice), 0};
  u32 k0 = static_cast<u32>(seed), k1 = static_cast<u32>(seed >> 32);
  UNROLL(1)
  for (i32 round = 0; round < 10; ++round) {
    const u64 a = 0xD2511F53ull * c.x, b = 0xCD9E8D57ull * c.z;
    c = {static_cast<u32>(b >> 32) ^ c.y ^ k0, static_cast<u32>(b), static_cast<u32>(a >> 32) ^ c.w ^ k1,
         static_cast<u32>(a)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// A random word -> -log(-log(u)), u in (0, 1) with 24 bits.
inline DEVICE f32 gumbel_of(u32 word) {
  f32 x = (static_cast<f32>(word >> 9) + 0.5f) * 1.1920928955078125e-7f;  // 2^-23
  UNROLL(1)
  for (u32 turn = 0; turn < 2; ++turn) x = -log_f32(x);
  return x;
}

// The noise of one token id.
inline COLD f32 gumbel(u64 seed, i32 choice, i32 pos, u32 token) {
  const u32x4 words = philox(seed, choice, pos, token / 4);
  const u32 low = token & 1 ? words.y : words.x, high = token & 1 ? words.w : words.z;
  return gumbel_of(token & 2 ? high : low);
}

}  // namespace flashformer

// One head of a row as attention takes it: normed and rotated (Su et al. 2021), from what qkv projected, rounded to the
// KV format.
//
// A warp takes a head. Its head_dim elements are pairs that rotate together, lane l holding pairs l, l + 32, ...:
// pair p of the first rotary_dim / 2 is elements (p, p + rotary_dim / 2), a later one is elements (2p, 2p + 1).
//
//   qkv     (rows, qkv_stride) f32, mutable: heads of queries, keys, values side by side
//   keys    (streams, n_kv_heads, chunks, 256 * dim) and
//   values  the same, of the KV format, dim = kHeadDimPadded: head_dim rounded up to 32, the same in all layers
#pragma once

#include "context.cuh"
#include "math.cuh"

namespace flashformer {

constexpr bool kKvIsBf16 = kKvFormat == static_cast<u32>(Format::kBf16);
static_assert(kKvIsBf16 || kKvFormat == static_cast<u32>(Format::kF16), "the KV cache is bf16 or f16");
constexpr u32 kPairs = (kHeadDimPadded + 63) / 64;            // of a lane
constexpr u32 kSmemQkFactors = kSmemSmallFree;                // (kMaxRows, 2) f32, queries then keys
constexpr u32 kSmemAttendLast = kSmemQkFactors + 16 * 2 * 4;  // u32: this block was the last to arrive
static_assert(kSmemAttendLast + 4 <= kSmemRecords);

// Two numbers in the KV format, `low` in the low half.
inline DEVICE u32 kv_pair(f32 low, f32 high) {
  if constexpr (kKvIsBf16) return cvt_bf16x2(low, high);
  return cvt_f16x2(low, high);
}

inline DEVICE f32 kv_number(u32 bits) {
  if constexpr (kKvIsBf16) return bf16_to_f32(static_cast<u16>(bits));
  return f16_to_f32(static_cast<u16>(bits));
}

// The numbers of a phase that attention uses all the time, in registers.
struct Heads {
  u32 n, n_kv, per_kv;  // query heads, kv heads, query heads of one kv head
  u32 dim, half;        // head_dim, rotary_dim / 2
  i32 window;

  // The first key that a row at `pos` sees.
  DEVICE u32 first_visible(u32 pos) const {
    const i32 first = static_cast<i32>(pos) - window + 1;
    return first > 0 ? static_cast<u32>(first) : 0;
  }
};

inline DEVICE Heads heads_of(const Phase& phase) {
  const u32 n = static_cast<u32>(phase.n_heads), n_kv = static_cast<u32>(phase.n_kv_heads);
  return {n,
          n_kv,
          n / n_kv,
          static_cast<u32>(phase.head_dim),
          phase.rope < 0 ? 0 : static_cast<u32>(phase.rotary_dim) / 2,
          static_cast<i32>(phase.window)};
}

struct Head {
  f32 x[kPairs], y[kPairs];  // first and second of each pair
};

// Elements of pair p.
struct PairAt {
  u32 x, y;
};
inline DEVICE PairAt pair_at(u32 p, u32 half) { return p < half ? PairAt{p, p + half} : PairAt{2 * p, 2 * p + 1}; }

// Head `head` of row r as it was projected; 0 beyond head_dim.
inline DEVICE Head load_head(const Context& ctx, const Heads& heads, u32 r, u32 head) {
  const u32 n = heads.dim, half = heads.half;
  const f32* projected = ctx.launch.qkv() + r * ctx.model.qkv_stride + head * n;
  Head out;
  UNROLL(kPairs)
  for (u32 j = 0; j < kPairs; ++j) {
    const u32 p = ctx.lane + 32 * j;
    const PairAt at = pair_at(p, half);
    out.x[j] = p < n / 2 ? ld_global<f32>(projected + at.x) : 0.0f;
    out.y[j] = p < n / 2 ? ld_global<f32>(projected + at.y) : 0.0f;
  }
  return out;
}

// Where the norm takes all heads of a row as one vector: its factors, into kSmemQkFactors. All 256 threads.
inline DEVICE void qk_factors(const Context& ctx, const Phase& phase, const Heads& heads) {
  if (kUsesQkNorm == 0 || phase.qk_norm != static_cast<i64>(QkNorm::kWidth)) return;
  const u32 q_width = heads.n * heads.dim, k_width = heads.n_kv * heads.dim;
  UNROLL(1)
  for (u32 i = ctx.warp; i < 2 * ctx.launch.n_rows; i += kConsumers / 32) {
    const f32* x = ctx.launch.qkv() + i / 2 * ctx.model.qkv_stride + (i % 2 ? q_width : 0);
    const u32 width = i % 2 ? k_width : q_width;
    f32 sum = 0.0f;
    UNROLL(4)
    for (u32 d = ctx.lane; d < width; d += 32) {
      const f32 value = ld_global<f32>(x + d);
      sum = fma_f32(value, value, sum);
    }
    const f32 factor = rms_factor(warp_sum(sum), static_cast<i32>(width), static_cast<f32>(phase.norm_eps));
    if (ctx.lane == 0) st_shared<f32>(ctx.at(kSmemQkFactors + i * 4), factor);
  }
  bar_sync(Site::kQkFactorsBar, kConsumerBarrier, kConsumers);
}

inline DEVICE void norm_head(const Context& ctx, const Phase& phase, const Heads& heads, u32 r, u32 head, Head& h) {
  if (kUsesQkNorm == 0 || phase.qk_norm == static_cast<i64>(QkNorm::kNone)) return;
  const u32 n = heads.dim, half = heads.half;
  const bool is_key = head >= heads.n, by_head = phase.qk_norm == static_cast<i64>(QkNorm::kHead);
  const f32* weight = ctx.launch.vector(is_key ? phase.k_norm : phase.q_norm);
  f32 factor;
  if (by_head) {
    f32 sum = 0.0f;
    UNROLL(kPairs)
    for (u32 j = 0; j < kPairs; ++j) sum = fma_f32(h.y[j], h.y[j], fma_f32(h.x[j], h.x[j], sum));
    factor = rms_factor(warp_sum(sum), static_cast<i32>(n), static_cast<f32>(phase.norm_eps));
  } else {
    weight += (is_key ? head - heads.n : head) * n;
    factor = ld_shared<f32>(ctx.at(kSmemQkFactors + (2 * r + is_key) * 4));
  }
  UNROLL(kPairs)
  for (u32 j = 0; j < kPairs; ++j) {
    const u32 p = ctx.lane + 32 * j;
    if (p >= n / 2) continue;
    const PairAt at = pair_at(p, half);
    h.x[j] = h.x[j] * factor * ld_const<f32>(weight + at.x);
    h.y[j] = h.y[j] * factor * ld_const<f32>(weight + at.y);
  }
}

// What row r's position rotates this lane's pairs by, of the table (ctx, 2, rotary_dim / 2) f32 of cosines and sines.
struct Turn {
  f32 cosine[kPairs] = {}, sine[kPairs] = {};
};
inline DEVICE Turn load_turn(const Context& ctx, const Phase& phase, const Heads& heads, u32 r) {
  const u32 half = heads.half;
  Turn turn;
  if (half == 0) return turn;
  const f32* cos = ctx.launch.rope(phase.rope) + static_cast<u32>(ctx.launch.pos[r]) * 2 * half;
  UNROLL(kPairs)
  for (u32 j = 0; j < kPairs; ++j) {
    const u32 p = ctx.lane + 32 * j;
    if (p >= half) continue;
    turn.cosine[j] = ld_const<f32>(cos + p);
    turn.sine[j] = ld_const<f32>(cos + half + p);
  }
  return turn;
}
inline DEVICE void rotate_head(const Context& ctx, const Heads& heads, const Turn& turn, Head& h) {
  UNROLL(kPairs)
  for (u32 j = 0; j < kPairs; ++j) {
    if (ctx.lane + 32 * j >= heads.half) continue;
    const f32 c = turn.cosine[j], s = turn.sine[j], x = h.x[j], y = h.y[j];
    h.x[j] = x * c - y * s;
    h.y[j] = y * c + x * s;
  }
}

// put(element, bits) of every element of a head, in the KV format, zero from head_dim on.
template <class Put>
inline DEVICE void put_head(const Context& ctx, const Heads& heads, const Head& h, Put put) {
  const u32 n = heads.dim, half = heads.half;
  const u32 lane = opaque(ctx.lane);  // or all addresses of all pairs would be kept from one head to the next
  UNROLL(kPairs)
  for (u32 j = 0; j < kPairs; ++j) {
    const u32 p = lane + 32 * j;
    if (p >= n / 2) continue;
    const PairAt at = pair_at(p, half);
    const u32 bits = kv_pair(h.x[j], h.y[j]);
    put(at.x, static_cast<u16>(bits));
    put(at.y, static_cast<u16>(bits >> 16));
  }
  if (n + lane < kHeadDimPadded) put(n + lane, static_cast<u16>(0));
}

}  // namespace flashformer

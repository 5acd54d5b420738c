// One token out of a row of logits by the 256 threads of a block: penalties and biases, temperature, top-k, top-p,
// min-p, Gumbel noise. backends/sampling.py is the definition. Tokens are ordered by the bits of their scores, equal
// ones by id; what they weigh is an integer, so no order of addition can change where a cut falls.
//
// logits (vocab_size) f32, mutable global memory. Every thread takes four tokens in 1024. Bytes: vocab_size * 4 for
// the maximum, as many for the tokens that may be kept, which go to shared memory, 16 bytes each: {ordered score, id,
// mass}. A cut is found there, two bits of the score at a time; where they do not fit, or weigh too little, among all.
#pragma once

#include "context.cuh"
#include "noise.cuh"

namespace flashformer {

constexpr f32 kMassUnit = 1099511627776.0f;  // 2^40, the mass of the best token
constexpr f32 kMostNoise = 17.0f;            // no noise is larger: 24 bits of u give at most 16.64
constexpr u32 kReduceBytes = 512;            // two turns of (8 warps, 3) u64
constexpr u32 kChooseReduce = kSmemX;        // where the area that attention and sampling share begins
constexpr u32 kChooseList = kChooseReduce + kReduceBytes;
constexpr u32 kListEntries = (kSmemSmall - kChooseList) / (8 * 16);  // of one warp
static_assert(kSmemSmall > kChooseList + 8 * 16 * 64, "no room for 64 tokens of each warp");

// The larger score; the lower id among equals.
inline DEVICE Candidate better_of(Candidate a, Candidate b) {
  if (a.token < 0) return b;
  if (b.token < 0) return a;
  return b.score > a.score || (b.score == a.score && b.token < a.token) ? b : a;
}

// Bits of a number that compare as unsigned integers as the numbers do; both zeros are one.
inline DEVICE u32 ordered_bits(f32 score) {
  const u32 bits = bit_copy<u32>(score + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

inline DEVICE f32 score_of(u32 ordered) { return bit_copy<f32>(ordered >> 31 ? ordered & 0x7FFFFFFFu : ~ordered); }

inline DEVICE u32 count_bits(u32 x) {
  x -= x >> 1 & 0x55555555u;
  x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
  return ((x + (x >> 4)) & 0x0F0F0F0Fu) * 0x01010101u >> 24;
}

struct ThreeSums {
  u64 a, b, c;
};

inline DEVICE u64 warp_sum_u64(u64 x) {
  UNROLL(1)
  for (u32 mask = 16; mask; mask /= 2) {
    const u64 low = shfl_xor_u32(static_cast<u32>(x), mask), high = shfl_xor_u32(static_cast<u32>(x >> 32), mask);
    x += high << 32 | low;
  }
  return x;
}

// Reductions over the 256 consumers, the result in every thread. Two turns of memory, so that one barrier is enough.
struct Reducer {
  const Context& ctx;
  u32 turn = 0;

  DEVICE u32 take_turn() {
    turn ^= kReduceBytes / 2;
    return ctx.at(kChooseReduce + turn);
  }
  DEVICE ThreeSums sum(ThreeSums x) {
    const u32 at = take_turn();
    x = {warp_sum_u64(x.a), warp_sum_u64(x.b), warp_sum_u64(x.c)};
    if (ctx.lane == 0) {
      const u32 mine = at + ctx.warp * 24;
      st_shared<u64>(mine, x.a);
      st_shared<u64>(mine + 8, x.b);
      st_shared<u64>(mine + 16, x.c);
    }
    bar_sync(Site::kChooseSum, kConsumerBarrier, kConsumers);
    ThreeSums total = {0, 0, 0};
    UNROLL(1)
    for (u32 w = 0; w < 8; ++w) {
      total.a += ld_shared<u64>(at + w * 24);
      total.b += ld_shared<u64>(at + w * 24 + 8);
      total.c += ld_shared<u64>(at + w * 24 + 16);
    }
    return total;
  }
  DEVICE f32 max(f32 x) {
    const u32 at = take_turn();
    x = warp_max(x);
    if (ctx.lane == 0) st_shared<f32>(at + ctx.warp * 4, x);
    bar_sync(Site::kChooseMax, kConsumerBarrier, kConsumers);
    f32 most = ld_shared<f32>(at);
    UNROLL(1)
    for (u32 w = 1; w < 8; ++w) most = max_of(most, ld_shared<f32>(at + w * 4));
    return most;
  }
  DEVICE Candidate best(Candidate x) {
    const u32 at = take_turn();
    UNROLL(1)
    for (u32 mask = 16; mask; mask /= 2) {
      const Candidate other = {shfl_xor_f32(x.score, mask),
                               static_cast<i32>(shfl_xor_u32(static_cast<u32>(x.token), mask))};
      x = better_of(x, other);
    }
    if (ctx.lane == 0) {
      st_shared<f32>(at + ctx.warp * 8, x.score);
      st_shared<i32>(at + ctx.warp * 8 + 4, x.token);
    }
    bar_sync(Site::kChooseBest, kConsumerBarrier, kConsumers);
    Candidate found = {0.0f, -1};
    UNROLL(1)
    for (u32 w = 0; w < 8; ++w) {
      found = better_of(found, {ld_shared<f32>(at + w * 8), ld_shared<i32>(at + w * 8 + 4)});
    }
    return found;
  }
};

// Kept are tokens above `bits`, and of those at it the ids up to `last_id`.
struct Cut {
  u32 bits, last_id;
};

class Chooser {
 public:
  DEVICE Chooser(const Context& ctx, const f32* logits, f32 temperature)
      : ctx_(ctx),
        logits_(logits),
        n_(static_cast<u32>(ctx.model.vocab_size)),
        temperature_(temperature),
        reduce_{ctx} {}

  // The largest logit as it is; the lowest id among equals.
  DEVICE Candidate greedy() {
    Candidate found = {0.0f, -1};
    each_token([&](u32 id, f32 logit) {
      if (found.token < 0 || logit > found.score) found = {logit, static_cast<i32>(id)};
    });
    return reduce_.best(found);
  }

  // The token of row r by its temperature, filters and noise.
  DEVICE Candidate sampled(u32 r) {
    const Launch& launch = ctx_.launch;
    const u32 k = launch.top_k[r] > 0 && static_cast<u32>(launch.top_k[r]) < n_ ? static_cast<u32>(launch.top_k[r]) : 0;
    const f32 p = launch.top_p[r];
    find_max();
    if (k > 0 || p < 1.0f) collect(k, p);
    for (u32 by_mass = 0; by_mass < 2; ++by_mass) {
      if (by_mass ? p < 1.0f : k > 0) cut(by_mass ? 0 : k, p);
    }
    return best(r);
  }

 private:
  DEVICE static u64 share(u64 total, f32 p) {
    const u64 need = static_cast<u64>(static_cast<f64>(total) * static_cast<f64>(p));
    return need > 0 ? need : 1;
  }
  DEVICE u64 mass_of(f32 score) const { return static_cast<u64>(exp_f32(score - max_) * kMassUnit); }
  DEVICE f32 scored(f32 logit) const { return logit / temperature_; }

  // visit(id, logit) of this thread's tokens.
  template <class Visit>
  DEVICE void each_token(Visit visit) const {
    each_four([&](u32 id, f32x4 four) {
      for (u32 i = 0; i < 4; ++i) {
        if (id + i < n_) visit(id + i, four.x);
        four = {four.y, four.z, four.w, four.x};
      }
    });
  }

  // visit(id, four logits from id on) of this thread's quads, the next two on their way. Warps run in step: where a
  // lane has no tokens left, id is beyond n.
  template <class Visit>
  DEVICE void each_four(Visit visit) const {
    f32x4 now = load_four(0), next = load_four(1);
    for (u32 i = 0; i * (4 * kConsumers) < n_; ++i) {
      const f32x4 later = load_four(i + 2);
      visit(4 * (ctx_.thread + kConsumers * i), now);
      now = next;
      next = later;
    }
  }
  DEVICE f32x4 load_four(u32 i) const {
    const u32 id = 4 * (ctx_.thread + kConsumers * i);
    if (id >= n_) return {0.0f, 0.0f, 0.0f, 0.0f};
    return ld_global<f32x4>(reinterpret_cast<const f32x4*>(logits_ + id));
  }

  // Division by one positive number keeps the order: the largest score is that of the largest logit.
  DEVICE void find_max() {
    f32 most = -kLargestF32;
    each_token([&](u32, f32 logit) { most = max_of(logit, most); });
    max_ = scored(reduce_.max(most));
  }

  // Lists tokens close to the best, wider or closer until they fit and hold the whole cut; `listed_` says whether.
  DEVICE void collect(u32 k, f32 p) {
    f32 reach = 10.0f;
    bool overflowed = false;
    for (u32 attempt = 0; attempt < 6 && !listed_; ++attempt) {
      const ThreeSums mass = list(reach);
      const bool speaks = ctx_.lane == 0, over = n_listed_ > kListEntries;
      const ThreeSums count = reduce_.sum({speaks ? n_listed_ : 0, speaks && over ? 1u : 0u, 0});
      const bool fits = count.b == 0, enough = k > 0 ? count.a >= k : mass.b >= share(mass.a, p);
      listed_ = fits && enough;
      unlisted_ = listed_ && k == 0 ? mass.a - mass.b : 0;
      if (fits == enough || (fits && overflowed)) return;
      overflowed = !fits;
      reach *= fits ? 1.7f : 0.5f;
    }
  }

  // Lists the tokens whose score is at least max - reach, as far as they fit; gives the mass of all and of those.
  DEVICE ThreeSums list(f32 reach) {
    ThreeSums sums = {0, 0, 0};
    n_listed_ = 0;
    const u32 below = (1u << ctx_.lane) - 1, first = ctx_.at(kChooseList) + ctx_.warp * (kListEntries * 16);
    each_four([&](u32 id, f32x4 four) {
      for (u32 i = 0; i < 4; ++i, ++id) {
        const f32 score = scored(four.x);
        four = {four.y, four.z, four.w, four.x};
        const u64 mass = id < n_ ? mass_of(score) : 0;
        const bool close = id < n_ && score >= max_ - reach;
        const u32 votes = ballot(close), place = n_listed_ + count_bits(votes & below);
        if (close && place < kListEntries) {
          const u32x4 entry = {ordered_bits(score), id, static_cast<u32>(mass), static_cast<u32>(mass >> 32)};
          st_shared<u32x4>(first + place * 16, entry);
        }
        n_listed_ += count_bits(votes);
        sums.a += mass;
        sums.b += close ? mass : 0;
      }
    });
    return reduce_.sum(sums);  // its barrier stands between these stores and all loads of the list
  }

  // visit(ordered score, id, mass) of this thread's tokens within the cut: of the list if there is one, or of all.
  template <class Visit>
  DEVICE void each(Visit visit) const {
    auto within = [&](u32 ordered, u32 id, u64 mass) {
      if (ordered > cut_.bits || (ordered == cut_.bits && id <= cut_.last_id)) visit(ordered, id, mass);
    };
    if (listed_) {
      const u32 first = ctx_.at(kChooseList) + ctx_.warp * (kListEntries * 16);
      for (u32 i = ctx_.lane; i < n_listed_; i += 32) {
        const u32x4 entry = ld_shared<u32x4>(first + i * 16);
        within(entry.x, entry.y, static_cast<u64>(entry.w) << 32 | entry.z);
      }
    } else {
      each_token([&](u32 id, f32 logit) {
        const f32 score = scored(logit);
        within(ordered_bits(score), id, mass_of(score));
      });
    }
  }

  // What tokens weigh, their mass or 1, and what is compared with the bounds: their scores, or the ids of one score.
  struct Question {
    bool counted, by_id;
    u32 bits;  // that score
  };

  // The weight of the tokens within the cut that are at or above each of three bounds.
  DEVICE ThreeSums weigh(Question of, u32 a, u32 b, u32 c) {
    ThreeSums sums = {0, 0, 0};
    each([&](u32 ordered, u32 id, u64 mass) {
      if (of.by_id && ordered != of.bits) return;
      const u32 value = of.by_id ? id : ordered;
      const u64 weight = of.counted ? 1 : mass;
      if (value >= a) sums.a += weight;
      if (value >= b) sums.b += weight;
      if (value >= c) sums.c += weight;
    });
    return reduce_.sum(sums);
  }

  // Cuts within the present cut so that the best tokens are left that are k, or, where k is 0, weigh at least p of its
  // mass. First the largest score is found for which the tokens at or above it suffice, then, if not all at it are
  // needed, the largest id in the same way, among so many that the lowest n are left.
  DEVICE void cut(u32 k, f32 p) {
    Question of = {k > 0, false, 0};
    for (u64 need = k;;) {
      u32 bound = 0;
      ThreeSums sums = {0, 0, 0};
      for (i32 shift = 32; shift >= -2; shift -= 2) {  // all; two bits of the bound at a time; at it and above it
        const u32 step = shift > 30 ? 0 : shift < 0 ? 1 : 1u << shift, first = shift < 0 ? bound : bound + step;
        sums = weigh(of, first, first + step, first + 2 * step);
        if (shift > 30 && need == 0) need = share(sums.a + unlisted_, p);
        if (shift > 30 || shift < 0) continue;
        bound += sums.c >= need ? 3 * step : sums.b >= need ? 2 * step : sums.a >= need ? step : 0;
      }
      if (of.by_id) {
        cut_ = {of.bits, bound};
        return;
      }
      const u64 one = of.counted ? 1 : mass_of(score_of(bound)), equal = sums.a - sums.b;
      const u64 n = sums.a > need ? (need - sums.b + one - 1) / one : 0;
      if (sums.a <= need || n * one >= equal) {
        cut_ = {bound, ~0u};
        return;
      }
      of = {true, true, bound};
      need = equal / one - n + 1;  // so many ids are at or above the n-th
    }
  }

  // The kept token with the largest score plus noise.
  DEVICE Candidate best(u32 r) {
    const Launch& launch = ctx_.launch;
    const f32 min_p = launch.min_p[r];
    Candidate found = {0.0f, -1};
    u32 drawn = ~0u;
    u32x4 words = {0, 0, 0, 0};
    each([&](u32 ordered, u32 id, u64) {
      const f32 score = score_of(ordered);
      if (found.token >= 0 && score + kMostNoise < found.score) return;
      if (exp_f32(score - max_) < min_p) return;
      if (id / 4 != drawn) {
        drawn = id / 4;
        words = philox(launch.seed[r], launch.choice[r], launch.pos[r], drawn);
      }
      const u32 low = id & 1 ? words.y : words.x, high = id & 1 ? words.w : words.z;
      found = better_of(found, {score + gumbel_of(id & 2 ? high : low), static_cast<i32>(id)});
    });
    return reduce_.best(found);
  }

  const Context& ctx_;
  const f32* logits_;
  u32 n_;
  f32 temperature_, max_ = 0.0f;
  Cut cut_ = {0, ~0u};
  bool listed_ = false;
  u64 unlisted_ = 0;  // mass within the present cut that is not in the list
  u32 n_listed_ = 0;  // by this warp
  Reducer reduce_;
};

}  // namespace flashformer

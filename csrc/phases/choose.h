// One token out of a row of logits: repetition penalty and bias, temperature, top-k, top-p, min-p, Gumbel noise.
// backends/sampling.py is the definition. No sort: tokens are counted by the bits of their scores, and what they weigh
// is an integer, so no order of addition can change where the cut falls.
#pragma once

#include <cfloat>

#include "../forward.h"
#include "math.h"
#include "noise.h"

namespace flashformer {

// Ties go to the lower id; a best without a token has none yet.
inline bool is_better(const Candidate& other, const Candidate& best) {
  return best.token < 0 || other.score > best.score || (other.score == best.score && other.token < best.token);
}

// Whether a row needs all its logits to choose a token.
inline bool chooses_from_logits(const RowArrays& row, int32_t r) {
  const bool filters = row.top_k[r] > 0 || row.top_p[r] < 1 || row.min_p[r] > 0;
  return row.adjust_begin[r] < row.adjust_end[r] || (row.temperature[r] > 0 && filters);
}

// Bits of a score that compare as unsigned integers as the scores do.
inline uint32_t ordered_bits(float score) {
  uint32_t bits;
  __builtin_memcpy(&bits, &score, 4);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// A cut through the tokens, by score and then by id: kept are those above `bits`, and of those at it the first
// `n_equal` ids.
struct Cut {
  uint32_t bits;
  int64_t n_equal;
};

constexpr Cut kNoCut = {0, INT64_MAX};
constexpr float kMassUnit = 0x1p40f;  // the mass of the best token

template <class V>
class Chooser {
 public:
  Chooser(const float* logits, int64_t n, float temperature)
      : logits_(logits), n_(n), temperature_(V::set1(temperature)) {
    typename V::F most = V::set1(-FLT_MAX);
    for (int64_t i = 0; i < n; i += kLanes) {
      most = V::max(most, V::first(n - i, V::div(V::load(logits + i), temperature_), V::set1(-FLT_MAX)));
    }
    max_ = max_lanes<V>(most);
  }

  // The best `k` of all tokens.
  Cut top_k(int64_t k) const {
    return find_cut(kNoCut, static_cast<uint64_t>(k), [](float) { return uint64_t{1}; });
  }

  // The fewest best tokens within `cut` that have at least `p` of its mass.
  Cut top_p(const Cut& cut, float p) const {
    uint64_t total = 0;
    each(cut, [&](int64_t, float, float exp_score) { total += mass(exp_score); });
    uint64_t need = static_cast<uint64_t>(static_cast<double>(total) * static_cast<double>(p));
    return find_cut(cut, need > 0 ? need : 1, mass);
  }

  // The kept token with the largest score plus noise; the lowest id among equals.
  Candidate best(const Cut& cut, float min_p, uint64_t seed, int32_t choice, int32_t pos) const {
    Candidate found = {-FLT_MAX, -1};
    int64_t drawn = -1;
    float noise[kLanes];
    each(cut, [&](int64_t token, float score, float exp_score) {
      if (exp_score < min_p) return;
      if (token / kLanes != drawn) {
        drawn = token / kLanes;
        gumbel16<V>(seed, choice, pos, drawn * kLanes, noise);
      }
      const float noisy = score + noise[token % kLanes];
      if (found.token < 0 || noisy > found.score) found = {noisy, static_cast<int32_t>(token)};
    });
    return found;
  }

 private:
  static uint64_t mass(float exp_score) { return static_cast<uint64_t>(exp_score * kMassUnit); }

  // visit(token, score, exp(score - max)) of the tokens within a cut, by id.
  template <class Visit>
  void each(const Cut& cut, Visit visit) const {
    int64_t equal = 0;
    float scores[kLanes], exps[kLanes];
    for (int64_t i = 0; i < n_; i += kLanes) {
      const typename V::F score = V::div(V::load(logits_ + i), temperature_);
      V::store(scores, score);
      V::store(exps, exp<V>(V::sub(score, V::set1(max_))));
      for (int64_t lane = 0; lane < kLanes && i + lane < n_; ++lane) {
        const uint32_t bits = ordered_bits(scores[lane]);
        if (bits < cut.bits || (bits == cut.bits && equal++ >= cut.n_equal)) continue;
        visit(i + lane, scores[lane], exps[lane]);
      }
    }
  }

  // The cut within `cut` whose best tokens weigh at least `need` together: 12, 10 and 10 bits of the scores, then ids.
  template <class Weigh>
  Cut find_cut(const Cut& cut, uint64_t need, Weigh weigh) const {
    uint64_t bins[1 << 12];
    uint32_t prefix = 0;  // of the scores at the cut, as far as it is known
    int known = 0;        // bits of it
    constexpr int kSteps[] = {12, 10, 10};
    for (const int more : kSteps) {
      const int shift = 32 - known - more;
      for (int bin = 0; bin < 1 << more; ++bin) bins[bin] = 0;
      each(cut, [&](int64_t, float score, float exp_score) {
        const uint32_t bits = ordered_bits(score);
        if (known && bits >> (32 - known) != prefix) return;
        bins[bits >> shift & ((1u << more) - 1)] += weigh(exp_score);
      });
      int bin = (1 << more) - 1;
      for (; bin > 0 && bins[bin] < need; --bin) need -= bins[bin];
      prefix = prefix << more | static_cast<uint32_t>(bin);
      known += more;
    }
    uint64_t got = 0;
    int64_t n_equal = 0;
    each(cut, [&](int64_t, float score, float exp_score) {
      if (ordered_bits(score) != prefix || got >= need) return;
      got += weigh(exp_score);
      ++n_equal;
    });
    return {prefix, n_equal};
  }

  const float* logits_;
  int64_t n_;
  typename V::F temperature_;
  float max_;
};

// The token of row r, from its logits; penalty and bias are put in for as long as it takes.
template <class V>
inline int32_t choose(const RowArrays& row, int32_t r, float* logits, int64_t n) {
  for (int32_t a = row.adjust_begin[r]; a < row.adjust_end[r]; ++a) {
    float& logit = logits[row.adjust_token[a]];
    row.adjust_kept[a] = logit;
    logit = (logit > 0 ? logit / row.adjust_penalty[a] : logit * row.adjust_penalty[a]) + row.adjust_bias[a];
  }
  Candidate found = {0, -1};
  if (row.temperature[r] > 0) {
    const Chooser<V> chooser(logits, n, row.temperature[r]);
    Cut cut = kNoCut;
    if (row.top_k[r] > 0 && row.top_k[r] < n) cut = chooser.top_k(row.top_k[r]);
    if (row.top_p[r] < 1) cut = chooser.top_p(cut, row.top_p[r]);
    found = chooser.best(cut, row.min_p[r], row.seed[r], row.choice[r], row.pos[r]);
  } else {
    for (int64_t i = 0; i < n; ++i) {
      if (found.token < 0 || logits[i] > found.score) found = {logits[i], static_cast<int32_t>(i)};
    }
  }
  for (int32_t a = row.adjust_begin[r]; a < row.adjust_end[r]; ++a) logits[row.adjust_token[a]] = row.adjust_kept[a];
  return found.token;
}

}  // namespace flashformer

// Queries against one chunk of the KV cache: scores, their exponentials, values weighted by these.
#pragma once

#include <algorithm>
#include <cfloat>

#include "heads.h"
#include "kv.h"
#include "math.h"

namespace flashformer {

constexpr int64_t kAheadBytes = 4096;

template <class T>
inline const char* ahead_of(const T* p) {
  return reinterpret_cast<const char*>(p) + kAheadBytes;
}

// One query head of one row against the keys of a chunk.
struct Query {
  float* q;            // (head_dim), rounded in place to what meets keys
  int64_t begin, end;  // keys of the chunk that this row sees
  int64_t partial;     // index of its result
};

// scores[p][...] of P queries and 16 keys: the sum over even steps of the head and that over odd ones.
template <class V, class KV, int P>
inline void score_block(const Query* query, const typename KV::T* keys, int64_t head_dim, float* scores) {
  constexpr int64_t kStep = KV::kStep, kVector = kStep * kLanes, kTwoBytes = 2 * kVector * sizeof(typename KV::T);
  const auto at = [&](int p, int64_t d) { return reinterpret_cast<const typename KV::X*>(query[p].q) + d; };
  typename V::F even[P], odd[P];
  for (int p = 0; p < P; ++p) even[p] = odd[p] = V::zero();
  int64_t d = 0;
  for (; d + 2 * kStep <= head_dim; d += 2 * kStep, keys += 2 * kVector) {
    for (int line = 0; line < kTwoBytes; line += 64) V::prefetch(ahead_of(keys) + line);
    const typename KV::Vector first = KV::load(keys), second = KV::load(keys + kVector);
    for (int p = 0; p < P; ++p) {
      even[p] = KV::add(even[p], first, at(p, d));
      odd[p] = KV::add(odd[p], second, at(p, d + kStep));
    }
  }
  if (d < head_dim) {
    for (int p = 0; p < P; ++p) even[p] = KV::add(even[p], KV::load(keys), at(p, d));
  }
  for (int p = 0; p < P; ++p) V::store(scores + p * kKeyChunk, V::add(even[p], odd[p]));
}

// `x` at keys k .. k+15 that a query sees, `other` at the rest.
template <class V>
inline typename V::F seen(const Query& query, int64_t k, typename V::F x, typename V::F other) {
  if (query.begin <= k && k + kLanes <= query.end) return x;
  if (k >= query.end) return other;
  x = V::first(query.end - k, x, other);
  return query.begin > k ? V::first(query.begin - k, other, x) : x;
}

// Keys [begin, end) of a chunk.
struct Keys {
  int64_t begin, end;
};

// What `n` queries see together, in blocks of `block` keys.
inline Keys seen_by_any(const Query* query, int n, int64_t block) {
  Keys keys = {query[0].begin, query[0].end};
  for (int p = 1; p < n; ++p) {
    keys = {std::min(keys.begin, query[p].begin), std::max(keys.end, query[p].end)};
  }
  return {keys.begin / block * block, (keys.end + block - 1) / block * block};
}

// Scores of one query at `keys`, whole blocks of 16 -> exp(score - max) in place, as KV::X, 0 where it sees none; gives
// (max, sum). A score that is not finite makes the sum NaN: max, exp and the soft cap alone would hide it behind a
// plausible average. `ahead`: what is prefetched, `share` bytes for 16 keys.
template <class V, class KV>
inline void exponentiate(const Phase& phase, const Query& query, Keys keys, float* scores, float* max_and_sum,
                         const char* ahead, int64_t share) {
  using F = typename V::F;
  const F scale = V::set1(static_cast<float>(phase.attention_scale)), lowest = V::set1(-FLT_MAX);
  const F softcap = V::set1(static_cast<float>(phase.softcap));
  F most = lowest, poison = V::zero();
  for (int64_t k = keys.begin; k < keys.end; k += kLanes) {
    F score = V::mul(V::load(scores + k), scale);
    poison = V::fma(seen<V>(query, k, score, V::zero()), V::zero(), poison);
    if (phase.softcap > 0) score = soft_capped<V>(score, softcap);
    V::store(scores + k, score);
    most = V::max(most, seen<V>(query, k, score, lowest));
  }
  const float max = max_lanes<V>(most);
  F total = V::zero();
  for (int64_t k = keys.begin; k < keys.end; k += kLanes) {
    F e = seen<V>(query, k, exp<V>(V::sub(V::load(scores + k), V::set1(max))), V::zero());
    total = V::add(total, KV::round(reinterpret_cast<typename KV::X*>(scores) + k, e));
    for (const char* end = ahead + share; ahead < end; ahead += 64) V::prefetch(ahead);
  }
  max_and_sum[0] = max;
  max_and_sum[1] = sum_lanes<V>(total) + sum_lanes<V>(poison);
}

// The same of n queries, scores (n, kKeyChunk), and values prefetched meanwhile.
template <class V, class KV, class T>
inline void exponentiate_all(const Worker& worker, const Phase& phase, const Query* query, int n, Keys keys,
                             float* scores, const T* values) {
  const char* meanwhile = reinterpret_cast<const char*>(values + keys.begin * phase.head_dim_padded);
  const int64_t share = (KV::kThinkingBytes / (kKeyChunk / kLanes) / n + 63) / 64 * 64;  // for 16 keys of a query
  for (int p = 0; p < n; ++p, meanwhile += (keys.end - keys.begin) / kLanes * share) {
    exponentiate<V, KV>(phase, query[p], keys, scores + p * kKeyChunk, worker.forward->partial_sums(query[p].partial),
                        meanwhile, share);
  }
}

// n queries in place, as KV::X.
template <class V, class KV>
inline void round_queries(const Phase& phase, const Query* query, int n) {
  for (int p = 0; p < n; ++p) {
    for (int64_t d = 0; d < phase.head_dim; d += kLanes) {
      KV::round(reinterpret_cast<typename KV::X*>(query[p].q) + d, V::load(query[p].q + d));
    }
  }
}

// D vectors of the weighted sum of values for P queries: the keys that all of them see together, those before and after
// for each by itself, in the order of the keys.
template <class V, class KV, int P, int D>
inline void weigh_values(const Forward& forward, const Query* query, const typename KV::T* values, int64_t stride,
                         int64_t at, const float* scores) {
  constexpr int64_t kStep = KV::kStep, kVector = kStep * kLanes;
  constexpr int64_t kLine = 64 / (kVector * static_cast<int64_t>(sizeof(typename KV::T)));  // vectors of a line
  const auto first_of = [&](int p) { return query[p].begin / kStep; };
  const auto end_of = [&](int p) { return (query[p].end + kStep - 1) / kStep; };
  stride *= kStep, at *= kStep;
  typename V::F sum[P][D];
  int64_t begin = first_of(0), end = end_of(0);  // in steps
  for (int p = 0; p < P; ++p) {
    begin = first_of(p) > begin ? first_of(p) : begin;
    end = end_of(p) < end ? end_of(p) : end;
    for (int d = 0; d < D; ++d) sum[p][d] = V::zero();
  }
  if (end < begin) end = begin;
  const auto weight = [&](int p, int64_t s) {
    return reinterpret_cast<const typename KV::X*>(scores + p * kKeyChunk) + s * kStep;
  };
  auto alone = [&](int p, int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      for (int d = 0; d < D; ++d) {
        sum[p][d] = KV::add(sum[p][d], KV::load(values + s * stride + at + d * kVector), weight(p, s));
      }
    }
  };
  for (int p = 0; p < P; ++p) alone(p, first_of(p), begin < end_of(p) ? begin : end_of(p));
  for (int64_t s = begin; s < end; ++s) {
    const typename KV::T* step = values + s * stride + at;
    for (int d = 0; d < D; d += kLine) V::prefetch(ahead_of(step + d * kVector));
    typename KV::Vector value[D];
    for (int d = 0; d < D; ++d) value[d] = KV::load(step + d * kVector);
    for (int p = 0; p < P; ++p) {
      for (int d = 0; d < D; ++d) sum[p][d] = KV::add(sum[p][d], value[d], weight(p, s));
    }
  }
  for (int p = 0; p < P; ++p) {
    alone(p, end, end_of(p));
    float* result = forward.partial_values(query[p].partial) + at / kStep;
    for (int d = 0; d < D; ++d) V::store(result + d * kLanes, sum[p][d]);
  }
}

// Called: within a larger function g++ keeps what loops count in the stack.
template <class V, class KV, int P>
[[gnu::noinline]] void attend_queries(Worker& worker, const Phase& phase, const Query* query,
                                      const typename KV::T* keys, const typename KV::T* values) {
  const Forward& forward = *worker.forward;
  if constexpr (KV::kStep > 1) round_queries<V, KV>(phase, query, P);
  constexpr int Q = V::kQueriesAtOnce < P ? V::kQueriesAtOnce : P;
  float* scores = worker.scores();
  const Keys all = seen_by_any(query, P, kLanes);
  for (int64_t k = all.begin; k < all.end; k += kLanes) {
    const typename KV::T* block = keys + k * phase.head_dim;
    for (int p = 0; p + Q <= P; p += Q) {
      score_block<V, KV, Q>(query + p, block, phase.head_dim, scores + p * kKeyChunk + k);
    }
    if constexpr (P % Q > 0) {
      constexpr int p = P / Q * Q;
      score_block<V, KV, P - p>(query + p, block, phase.head_dim, scores + p * kKeyChunk + k);
    }
  }
  exponentiate_all<V, KV>(worker, phase, query, P, all, scores, values);
  const int64_t stride = phase.head_dim_padded;
  constexpr int D = P < 7 ? V::kValuesAtOnce : V::kValuesAtOnce / 2;  // sums and values stay in 32 registers
  int64_t at = 0;
  for (; at + D * kLanes <= stride; at += D * kLanes) {
    weigh_values<V, KV, P, D>(forward, query, values, stride, at, scores);
  }
  for (; at < stride; at += kLanes) weigh_values<V, KV, P, 1>(forward, query, values, stride, at, scores);
}

// attend_queries of n queries, P or more.
template <class V, class KV, int P>
inline void attend_queries_from(Worker& worker, const Phase& phase, int n, const Query* query,
                                const typename KV::T* keys, const typename KV::T* values) {
  if (n == P) return attend_queries<V, KV, P>(worker, phase, query, keys, values);
  if constexpr (P < KV::kOneRow) attend_queries_from<V, KV, P + 1>(worker, phase, n, query, keys, values);
}

template <class V, class KV>
inline void attend_batch(Worker& worker, const Phase& phase, typename KV::Registers& registers, int n,
                         const Query* query, const typename KV::T* keys, const typename KV::T* values) {
  if constexpr (KV::kMatrix) {
    KV::attend_batch(worker, phase, registers, n, query, keys, values);
  } else {
    attend_queries_from<V, KV, 1>(worker, phase, n, query, keys, values);
  }
}

}  // namespace flashformer

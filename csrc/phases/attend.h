// attend: unit = (chunk of kKeyChunk absolute key positions, group of rows of one slot, kv head), for all rows of the
// group and all query heads that share the kv head. The unit owns its piece of the KV cache: it first norms, rotates
// and appends the keys and values of the rows whose positions lie in its chunk. Gives, per (row, head, chunk): values
// weighted by exp(score - max), the maximum and the sum; o_proj merges chunks in position order. Scores are taken over
// 16 keys at a time (a lane owns a key), values key after key (a lane owns an element), so no sum depends on which rows
// or workers are about. A worker takes its chunks of one head after the other, as they lie in the cache, keys, values,
// keys, values: one stream where it has all chunks of a head, prefetched kAheadBytes early, and further while
// exponentials are computed.
#pragma once

#include <cfloat>
#include <numeric>

#include "heads.h"
#include "kv.h"
#include "math.h"

namespace flashformer {

constexpr int64_t kAheadBytes = 4096;
constexpr int64_t kThinkingBytes = 12288;  // of the values of a whole chunk: prefetched while no memory is read

template <class T>
inline const char* ahead_of(const T* p) {
  return reinterpret_cast<const char*>(p) + kAheadBytes;
}

// One query head of one row against the keys of a chunk.
struct Query {
  const float* q;      // (head_dim), as KV::X
  int64_t begin, end;  // keys of the chunk that this row sees
  int64_t partial;     // index of its result
};

// scores[p][...] of P queries and 16 keys: the sum over even steps of the head and that over odd ones.
template <class V, class KV, int P>
inline void score_block(const Query* query, const typename KV::T* keys, int64_t head_dim, typename V::F scale,
                        float* scores) {
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
  for (int p = 0; p < P; ++p) V::store(scores + p * kKeyChunk, V::mul(V::add(even[p], odd[p]), scale));
}

// `x` at keys k .. k+15 that a query sees, `other` at the rest.
template <class V>
inline typename V::F seen(const Query& query, int64_t k, typename V::F x, typename V::F other) {
  if (query.begin <= k && k + kLanes <= query.end) return x;
  x = V::first(query.end - k, x, other);
  return query.begin > k ? V::first(query.begin - k, other, x) : x;
}

// Scores of one query -> exp(score - max) in place, as KV::X, 0 at keys of the blocks that it does not see; gives (max,
// sum). A score that is not finite makes the sum NaN: max, exp and the soft cap alone would hide it behind a plausible
// average. `ahead`: what is prefetched, `share` bytes for 16 keys.
template <class V, class KV>
inline void exponentiate(const Query& query, typename V::F softcap, bool capped, float* scores, float* max_and_sum,
                         const char* ahead, int64_t share) {
  using F = typename V::F;
  const F lowest = V::set1(-FLT_MAX);
  const int64_t first = query.begin / kLanes * kLanes;
  F most = lowest, poison = V::zero();
  for (int64_t k = first; k < query.end; k += kLanes) {
    F score = V::load(scores + k);
    poison = V::fma(seen<V>(query, k, score, V::zero()), V::zero(), poison);
    if (capped) {
      score = soft_capped<V>(score, softcap);
      V::store(scores + k, score);
    }
    most = V::max(most, seen<V>(query, k, score, lowest));
  }
  const float max = max_lanes<V>(most);
  F total = V::zero();
  for (int64_t k = first; k < query.end; k += kLanes) {
    F e = seen<V>(query, k, exp<V>(V::sub(V::load(scores + k), V::set1(max))), V::zero());
    total = V::add(total, KV::round(reinterpret_cast<typename KV::X*>(scores) + k, e));
    for (const char* end = ahead + share; ahead < end; ahead += 64) V::prefetch(ahead);
  }
  max_and_sum[0] = max;
  max_and_sum[1] = sum_lanes<V>(total) + sum_lanes<V>(poison);
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

template <class V, class KV, int P>
inline void attend_queries(Worker& worker, const Phase& phase, const Query* query, const typename KV::T* keys,
                           const typename KV::T* values) {
  const Forward& forward = *worker.forward;
  constexpr int Q = V::kQueriesAtOnce < P ? V::kQueriesAtOnce : P;
  float* scores = worker.scores();
  const typename V::F scale = V::set1(static_cast<float>(phase.attention_scale));
  const typename V::F softcap = V::set1(static_cast<float>(phase.softcap));
  int64_t least = query[0].begin, most = 0;
  for (int p = 0; p < P; ++p) {
    least = query[p].begin < least ? query[p].begin : least;
    most = query[p].end > most ? query[p].end : most;
  }
  const int64_t stride = phase.head_dim_padded, blocks = (most + kLanes - 1) / kLanes;
  for (int64_t b = least / kLanes; b < blocks; ++b) {
    const typename KV::T* block = keys + b * kLanes * phase.head_dim;
    for (int p = 0; p + Q <= P; p += Q) {
      score_block<V, KV, Q>(query + p, block, phase.head_dim, scale, scores + p * kKeyChunk + b * kLanes);
    }
    if constexpr (P % Q > 0) {
      constexpr int p = P / Q * Q;
      score_block<V, KV, P - p>(query + p, block, phase.head_dim, scale, scores + p * kKeyChunk + b * kLanes);
    }
  }
  const char* meanwhile = reinterpret_cast<const char*>(values + least * stride);
  constexpr int64_t kShare = kThinkingBytes / (kKeyChunk / kLanes) / P / 64 * 64;  // for 16 keys of a query
  for (int p = 0; p < P; ++p) {
    exponentiate<V, KV>(query[p], softcap, phase.softcap > 0, scores + p * kKeyChunk,
                        forward.partial_sums(query[p].partial), meanwhile + p * (blocks - least / kLanes) * kShare,
                        kShare);
  }
  constexpr int D = V::kValuesAtOnce;
  int64_t at = 0;
  for (; at + D * kLanes <= stride; at += D * kLanes) {
    weigh_values<V, KV, P, D>(forward, query, values, stride, at, scores);
  }
  for (; at < stride; at += kLanes) weigh_values<V, KV, P, 1>(forward, query, values, stride, at, scores);
}

template <class V, class KV>
inline void attend_batch(Worker& worker, const Phase& phase, int n, const Query* query, const typename KV::T* keys,
                         const typename KV::T* values) {
  switch (n) {
    case 1:
      return attend_queries<V, KV, 1>(worker, phase, query, keys, values);
    case 2:
      return attend_queries<V, KV, 2>(worker, phase, query, keys, values);
    case 3:
      return attend_queries<V, KV, 3>(worker, phase, query, keys, values);
    case 4:
      return attend_queries<V, KV, 4>(worker, phase, query, keys, values);
  }
}

// What a unit's number says.
struct Unit {
  const Group& group;
  int64_t kv_head, first_key;
};

inline Unit unit_at(const Forward& forward, const Phase& phase, int64_t unit) {
  const int64_t heads = phase.n_kv_heads;
  return {forward.groups[unit / heads % forward.n_groups], unit % heads, unit / (forward.n_groups * heads) * kKeyChunk};
}

template <class V, class KV>
inline void attend_unit(Worker& worker, const Phase& phase, const Unit& unit) {
  const Forward& forward = *worker.forward;
  const auto& [group, kv_head, first_key] = unit;
  const auto [keys, values] = chunk_of<typename KV::T>(forward, phase, group.slot, kv_head, first_key);
  const int64_t per_kv = phase.n_heads / phase.n_kv_heads;
  for (int64_t r = group.row_begin; r < group.row_end; ++r) {
    const int64_t k = group.first_pos + (r - group.row_begin) - first_key;
    if (k >= 0 && k < kKeyChunk) append<V, KV>(worker, phase, r, kv_head, keys, values, k);
  }
  Query batch[kScoreRows];
  int n = 0;
  for (int64_t r = group.row_begin; r < group.row_end; ++r) {
    const int64_t pos = group.first_pos + (r - group.row_begin);
    const int64_t begin = first_visible(phase, pos) - first_key, end = pos + 1 - first_key;
    if (end <= 0 || begin >= kKeyChunk) continue;
    for (int64_t h = kv_head * per_kv; h < (kv_head + 1) * per_kv; ++h) {
      float* q = worker.heads() + n * forward.model.partial_stride;
      take_head<V>(worker, phase, r, h, q);
      if constexpr (KV::kStep > 1) {
        for (int64_t d = 0; d < phase.head_dim; d += kLanes) {
          KV::round(reinterpret_cast<typename KV::X*>(q) + d, V::load(q + d));
        }
      }
      batch[n++] = {q, begin > 0 ? begin : 0, end < kKeyChunk ? end : kKeyChunk,
                    forward.partial_index(r, h) + first_key / kKeyChunk};
      if (n == kScoreRows) {
        attend_batch<V, KV>(worker, phase, n, batch, keys, values);
        n = 0;
      }
    }
  }
  attend_batch<V, KV>(worker, phase, n, batch, keys, values);
}

template <class V, class KV>
void attend(Worker& worker, const Phase& phase, const Span& span) {
  const Forward& forward = *worker.forward;
  const int64_t heads = phase.n_kv_heads, groups = forward.n_groups;
  int64_t first_chunk = INT64_MAX, chunks = 0;  // that any group of this forward sees
  for (int g = 0; g < forward.n_groups; ++g) {
    const Group& group = forward.groups[g];
    const int64_t last = group.first_pos + (group.row_end - group.row_begin - 1);
    const int64_t first = first_visible(phase, group.first_pos) / kKeyChunk;
    if (first < first_chunk) first_chunk = first;
    if (last / kKeyChunk + 1 > chunks) chunks = last / kKeyChunk + 1;
  }
  const int64_t streams = groups * heads;             // of chunks, which lie one behind the other
  const int64_t turn = std::lcm(streams, span.step);  // so far apart are a worker's units of a stream; begin < step
  const int64_t begin = first_chunk * streams, end = chunks * streams;
  const int64_t first_turn = begin / turn, turns = (end + turn - 1) / turn - first_turn;
  const auto n_units = [&](int64_t w) { return worker.span_of(w).begin < end ? turn / span.step * turns : 0; };
  bool any = false;
  worker.each_unit(n_units, [&](int64_t owner, int64_t i) {
    const Span& dealt = worker.span_of(owner);
    const int64_t unit = dealt.begin + i / turns * span.step + (first_turn + i % turns) * turn;
    if (unit < begin || unit >= end || unit >= dealt.end) return;
    if (!any) qk_factors<V>(worker, phase);
    any = true;
    worker.begin_unit(unit);
    attend_unit<V, KV>(worker, phase, unit_at(forward, phase, unit));
  });
}

}  // namespace flashformer

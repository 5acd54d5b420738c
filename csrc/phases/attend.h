// attend: unit = (chunk of kKeyChunk absolute key positions, group of rows of one slot, kv head), for all rows of the
// group and all query heads that share the kv head. Gives, per (row, head, chunk): values weighted by exp(score - max),
// the maximum and the sum; o_proj merges chunks in position order. Scores are taken over 16 keys at a time (a lane
// owns a key), values key after key (a lane owns an element), so no sum depends on which rows or workers are about.
#pragma once

#include <cfloat>

#include "kv.h"
#include "math.h"

namespace flashformer {

// One query head of one row against the keys of a chunk.
struct Query {
  const float* q;   // (head_dim) packed order
  int64_t n_keys;   // keys of the chunk that this row may see
  int64_t partial;  // index of its result
};

// scores[p][16 b ...] of P queries and B blocks of 16 keys from `keys`.
template <class V, class KV, int P, int B>
inline void score_blocks(const Query* query, const typename KV::T* keys, int64_t head_dim, typename V::F scale,
                         float* scores) {
  typename V::F sum[P][B];
  for (int p = 0; p < P; ++p) {
    for (int b = 0; b < B; ++b) sum[p][b] = V::zero();
  }
  for (int64_t d = 0; d < head_dim; ++d) {
    for (int b = 0; b < B; ++b) {
      typename V::F key = KV::load(keys + (b * head_dim + d) * kLanes);
      for (int p = 0; p < P; ++p) sum[p][b] = V::fma(key, V::set1(query[p].q[d]), sum[p][b]);
    }
  }
  for (int p = 0; p < P; ++p) {
    for (int b = 0; b < B; ++b) V::store(scores + p * kKeyChunk + b * kLanes, V::mul(sum[p][b], scale));
  }
}

// Scores of one query -> exp(score - max) in place, 0 beyond n_keys up to a whole block; gives (max, sum). A score that
// is not finite makes the sum NaN: max and exp alone would hide it behind a plausible average.
template <class V>
inline void exponentiate(float* scores, int64_t n_keys, float* max_and_sum) {
  using F = typename V::F;
  const F lowest = V::set1(-FLT_MAX);
  F most = lowest, poison = V::zero();
  for (int64_t k = 0; k < n_keys; k += kLanes) {
    F score = V::load(scores + k);
    most = V::max(most, V::first(n_keys - k, score, lowest));
    poison = V::fma(V::first(n_keys - k, score, V::zero()), V::zero(), poison);
  }
  const float max = max_lanes<V>(most);
  F total = V::zero();
  for (int64_t k = 0; k < n_keys; k += kLanes) {
    F e = V::first(n_keys - k, exp<V>(V::sub(V::load(scores + k), V::set1(max))), V::zero());
    V::store(scores + k, e);
    total = V::add(total, e);
  }
  max_and_sum[0] = max;
  max_and_sum[1] = sum_lanes<V>(total) + sum_lanes<V>(poison);
}

// D vectors of the weighted sum of values for P queries: keys up to the least n_keys together, then each its own.
template <class V, class KV, int P, int D>
inline void weigh_values(const Forward& forward, const Query* query, const typename KV::T* values, int64_t stride,
                         int64_t at, const float* scores) {
  typename V::F sum[P][D];
  int64_t together = query[0].n_keys;
  for (int p = 0; p < P; ++p) {
    together = query[p].n_keys < together ? query[p].n_keys : together;
    for (int d = 0; d < D; ++d) sum[p][d] = V::zero();
  }
  for (int64_t k = 0; k < together; ++k) {
    typename V::F value[D];
    for (int d = 0; d < D; ++d) value[d] = KV::load(values + k * stride + at + d * kLanes);
    for (int p = 0; p < P; ++p) {
      typename V::F weight = V::set1(scores[p * kKeyChunk + k]);
      for (int d = 0; d < D; ++d) sum[p][d] = V::fma(weight, value[d], sum[p][d]);
    }
  }
  for (int p = 0; p < P; ++p) {
    for (int64_t k = together; k < query[p].n_keys; ++k) {
      typename V::F weight = V::set1(scores[p * kKeyChunk + k]);
      for (int d = 0; d < D; ++d)
        sum[p][d] = V::fma(weight, KV::load(values + k * stride + at + d * kLanes), sum[p][d]);
    }
    for (int d = 0; d < D; ++d) V::store(forward.partial_values(query[p].partial) + at + d * kLanes, sum[p][d]);
  }
}

template <class V, class KV, int P>
inline void attend_queries(Worker& worker, const Phase& phase, const Query* query, const typename KV::T* keys,
                           const typename KV::T* values) {
  constexpr int B = P == 1 ? 4 : 2;
  const Forward& forward = *worker.forward;
  float* scores = worker.scores();
  const typename V::F scale = V::set1(static_cast<float>(phase.attention_scale));
  int64_t most = 0;
  for (int p = 0; p < P; ++p) most = query[p].n_keys > most ? query[p].n_keys : most;
  const int64_t blocks = (most + kLanes - 1) / kLanes;
  int64_t b = 0;
  for (; b + B <= blocks; b += B) {
    score_blocks<V, KV, P, B>(query, keys + b * phase.head_dim * kLanes, phase.head_dim, scale, scores + b * kLanes);
  }
  for (; b < blocks; ++b) {
    score_blocks<V, KV, P, 1>(query, keys + b * phase.head_dim * kLanes, phase.head_dim, scale, scores + b * kLanes);
  }
  for (int p = 0; p < P; ++p) {
    exponentiate<V>(scores + p * kKeyChunk, query[p].n_keys, forward.partial_sums(query[p].partial));
  }
  constexpr int D = V::kValuesAtOnce;
  const int64_t stride = phase.head_dim_padded;
  int64_t at = 0;
  for (; at + D * kLanes <= stride; at += D * kLanes) {
    weigh_values<V, KV, P, D>(forward, query, values, stride, at, scores);
  }
  for (; at < stride; at += kLanes) weigh_values<V, KV, P, 1>(forward, query, values, stride, at, scores);
}

template <class V, class KV>
void attend(Worker& worker, const Phase& phase, const Span& span) {
  using T = typename KV::T;
  const Forward& forward = *worker.forward;
  const int64_t heads = phase.n_kv_heads, streams = forward.model.streams;
  int64_t chunks = 0;  // that any group of this forward reaches
  for (int g = 0; g < forward.n_groups; ++g) {
    const Group& group = forward.groups[g];
    const int64_t last = group.first_pos + (group.row_end - group.row_begin - 1);
    if (last / kKeyChunk + 1 > chunks) chunks = last / kKeyChunk + 1;
  }
  const int64_t end = span.end < chunks * streams * heads ? span.end : chunks * streams * heads;
  for (int64_t unit = span.begin; unit < end; unit += span.step) {
    worker.begin_unit(unit);
    const int64_t chunk = unit / (streams * heads), index = unit / heads % streams, kv_head = unit % heads;
    if (index >= forward.n_groups) continue;
    const Group& group = forward.groups[index];
    const int64_t first_key = chunk * kKeyChunk, per_kv = phase.n_heads / heads;
    const T* keys = keys_of<T>(forward, phase, group.slot, kv_head) + first_key * phase.head_dim;
    const T* values = values_of<T>(forward, phase, group.slot, kv_head) + first_key * phase.head_dim_padded;
    Query batch[kScoreRows];
    int n = 0;
    auto flush = [&] {
      switch (n) {
        case 1:
          attend_queries<V, KV, 1>(worker, phase, batch, keys, values);
          break;
        case 2:
          attend_queries<V, KV, 2>(worker, phase, batch, keys, values);
          break;
        case 3:
          attend_queries<V, KV, 3>(worker, phase, batch, keys, values);
          break;
        case 4:
          attend_queries<V, KV, 4>(worker, phase, batch, keys, values);
          break;
      }
      n = 0;
    };
    for (int64_t r = group.row_begin; r < group.row_end; ++r) {
      const int64_t seen = group.first_pos + (r - group.row_begin) + 1 - first_key;
      if (seen <= 0) continue;
      for (int64_t h = kv_head * per_kv; h < (kv_head + 1) * per_kv; ++h) {
        batch[n++] = {forward.query() + r * forward.model.query_stride + h * phase.head_dim,
                      seen < kKeyChunk ? seen : kKeyChunk, forward.partial_index(r, h) + chunk};
        if (n == kScoreRows) flush();
      }
    }
    flush();
  }
}

}  // namespace flashformer

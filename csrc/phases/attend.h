// attend: unit = (chunk of kKeyChunk absolute key positions, group of rows of one slot, kv head), for all rows of the
// group and all query heads that share the kv head. The unit owns its piece of the KV cache: it first norms, rotates
// and appends the keys and values of the rows whose positions lie in its chunk. Gives, per (row, head, chunk): values
// weighted by exp(score - max), the maximum and the sum; o_proj merges chunks in position order. Scores are taken over
// 16 keys at a time (a lane owns a key), values key after key (a lane owns an element), or by a matrix unit in blocks
// of 32 keys from +0 on (queries_matrix.h), so no sum depends on which rows or workers are about. A worker takes its
// chunks of one head after the other, as they lie in the cache, keys, values, keys, values: one stream where it has all
// chunks of a head, prefetched early, and further while exponentials are computed; few queries take two chunks at once.
#pragma once

#include <numeric>

#include "heads.h"
#include "queries.h"

namespace flashformer {

// What a unit's number says.
struct Unit {
  const Group& group;
  int64_t kv_head, first_key;
};

inline Unit unit_at(const Forward& forward, const Phase& phase, int64_t unit) {
  const int64_t heads = phase.n_kv_heads;
  return {forward.groups[unit / heads % forward.n_groups], unit % heads, unit / (forward.n_groups * heads) * kKeyChunk};
}

// The lines of the cache into which the first row of a group goes, which lies in this chunk.
template <class V, class KV>
inline void ask_for_place(const Forward& forward, const Phase& phase, const Unit& unit) {
  const int64_t k = unit.group.first_pos - unit.first_key;
  const auto ask = [](const typename KV::T* at, int64_t n) {
    for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(*at))) {
      V::prefetch_to_write(reinterpret_cast<const char*>(at + i));
    }
  };
  const auto [keys, values] = chunk_of<typename KV::T>(forward, phase, unit.group.slot, unit.kv_head, unit.first_key);
  ask(keys + k / kLanes * kLanes * phase.head_dim, kLanes * phase.head_dim);
  ask(values + k / KV::kStep * KV::kStep * phase.head_dim_padded, KV::kStep * phase.head_dim_padded);
}

template <class KV>
inline bool has_few(const Phase& phase, const Group& group) {
  return (group.row_end - group.row_begin) * (phase.n_heads / phase.n_kv_heads) <= KV::kFew;
}

// Whether few queries see all of this chunk and of the next one, in which no row of this forward lies.
template <class KV>
inline bool sees_two(const Phase& phase, const Unit& unit) {
  const int64_t rows = unit.group.row_end - unit.group.row_begin, first = unit.group.first_pos;
  return has_few<KV>(phase, unit.group) && first >= unit.first_key + 2 * kKeyChunk &&
         first_visible(phase, first + rows - 1) <= unit.first_key;
}

// One chunk, or two that sees_two is true of. Called: within a larger function g++ keeps what loops count in the stack.
template <class V, class KV>
[[gnu::noinline]] void attend_unit(Worker& worker, const Phase& phase, const Unit& unit, bool two,
                                   typename KV::Registers& registers) {
  const Forward& forward = *worker.forward;
  const auto& [group, kv_head, first_key] = unit;
  const auto [keys, values] = chunk_of<typename KV::T>(forward, phase, group.slot, kv_head, first_key);
  const int64_t per_kv = phase.n_heads / phase.n_kv_heads;
  for (int64_t r = group.row_begin; r < group.row_end; ++r) {
    const int64_t k = group.first_pos + (r - group.row_begin) - first_key;
    if (k >= 0 && k < kKeyChunk) append<V, KV>(worker, phase, r, kv_head, keys, values, k);
  }
  const int64_t written = group.first_pos + (group.row_end - group.row_begin) - first_key;
  if (written > 0 && written < kKeyChunk && !has_few<KV>(phase, group)) clear_values<KV>(phase, values, written);
  static_assert(KV::kQueries <= KV::kOneRow && KV::kOneRow <= kScoreRows);
  const int most = group.row_end - group.row_begin == 1 ? KV::kOneRow : KV::kQueries;
  Query batch[KV::kOneRow];
  int n = 0;
  for (int64_t r = group.row_begin; r < group.row_end; ++r) {
    const int64_t pos = group.first_pos + (r - group.row_begin);
    const int64_t begin = first_visible(phase, pos) - first_key, end = pos + 1 - first_key;
    if (end <= 0 || begin >= kKeyChunk) continue;
    for (int64_t h = kv_head * per_kv; h < (kv_head + 1) * per_kv; ++h) {
      float* q = worker.heads() + n * forward.model.partial_stride;
      take_head<V>(worker, phase, r, h, q);
      batch[n++] = {q, begin > 0 ? begin : 0, end < kKeyChunk ? end : kKeyChunk,
                    forward.partial_index(r, h) + first_key / kKeyChunk};
      if (n == most) {
        attend_batch<V, KV>(worker, phase, registers, n, batch, keys, values);
        n = 0;
      }
    }
  }
  if constexpr (KV::kFew > 0) {
    if (two) {
      for (int p = 0; p < n; ++p) batch[n + p] = batch[p], ++batch[n + p].partial;
      return KV::attend_two(worker, phase, n, batch, keys, values);
    }
  }
  if (n > 0) attend_batch<V, KV>(worker, phase, registers, n, batch, keys, values);
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
  constexpr int64_t most = KV::kFew > 0 ? 2 : 1;
  const int64_t first_turn = begin / turn;
  const int64_t turns = ((end + turn - 1) / turn - first_turn + most - 1) / most * most;
  const auto n_units = [&](int64_t w) { return worker.span_of(w).begin < end ? turn / span.step * turns : 0; };
  const auto unit_of = [&](const Span& dealt, int64_t i) {  // -1: none
    const int64_t unit = dealt.begin + i / turns * span.step + (first_turn + i % turns) * turn;
    return unit < begin || unit >= end || unit >= dealt.end ? -1 : unit;
  };
  for (int64_t stream = 0; stream < streams; ++stream) {  // of this worker's units, those that rows go into
    const int64_t chunk = forward.groups[stream / heads].first_pos / kKeyChunk, unit = chunk * streams + stream;
    if (unit % span.step != span.begin || unit >= span.end) continue;
    ask_for_place<V, KV>(forward, phase, unit_at(forward, phase, unit));
  }
  typename KV::Registers registers;
  bool any = false;
  worker.each_unit(n_units, most, [&](int64_t owner, int64_t i, int64_t n) {
    const Span& dealt = worker.span_of(owner);
    for (int64_t j = i; j < i + n; ++j) {
      const int64_t unit = unit_of(dealt, j);
      if (unit < 0) continue;
      if (!any) qk_factors<V>(worker, phase);
      any = true;
      worker.begin_unit(unit);
      const Unit first = unit_at(forward, phase, unit);
      const bool two = j + 1 < i + n && unit_of(dealt, j + 1) == unit + streams && sees_two<KV>(phase, first);
      if (two) worker.begin_unit(unit_of(dealt, ++j));
      attend_unit<V, KV>(worker, phase, first, two, registers);
    }
  });
}

}  // namespace flashformer

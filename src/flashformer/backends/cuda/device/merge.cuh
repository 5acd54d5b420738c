// The end of attention for a (group, kv head): the block that arrives last there merges the chunks of each row, in
// position order, into the row's first chunk, normalised.
//
// PARTIAL: values (rows, n_heads_max, chunks, partial_stride) f32, behind them (rows, n_heads_max, chunks, 2) maximum
// and sum. A thread takes an element of a (row, head) at a time; bytes: 4 (dim + 2) per (row, head, chunk). Arrivals
// are counted at Model.merges, (streams, n_kv_heads) i32, which are 0 between phases.
#pragma once

#include "units.cuh"

namespace flashformer {

// What merging needs to know of the unit, so that nobody has to keep it in registers: which of the merge counters is
// its own, chunks that the group sees, kv head, position of the group's first row, that row, rows of the group. Stored
// by one thread after the unit's kQueryBar, which all threads pass after they have merged the unit before.
constexpr u32 kSmemMergeNote = (kSmemAttendLast + 16) / 16 * 16;  // 6 u32
static_assert(kSmemMergeNote + 24 <= kSmemRecords);

inline DEVICE void note_unit(const Context& ctx, const Unit& u, const Heads& heads) {
  st_shared<u32x4>(ctx.at(kSmemMergeNote), {u.group * heads.n_kv + u.kv_head, u.n_chunks, u.kv_head, u.first_pos});
  st_shared<u32x2>(ctx.at(kSmemMergeNote) + 16, {u.first_row, u.n_rows});
}

// Whether this block is the last of those that attend to chunks of the unit's group and kv head; it then sees what the
// others have stored.
inline DEVICE bool arrives_last(const Context& ctx) {
  bar_sync(Site::kMergeStored, kConsumerBarrier, kConsumers);
  if (ctx.thread == 0) {
    const u32x2 note = ld_shared<u32x2>(ctx.at(kSmemMergeNote));
    fence_gpu(Site::kMergeFence);
    u32* counter = reinterpret_cast<u32*>(ctx.launch.work + ctx.model.merges) + note.x;
    const bool last = atom_add_relaxed(Site::kMergeArrive, counter, 1) + 1 == note.y;
    if (last) {
      fence_gpu(Site::kMergeSeen);
      st_relaxed(counter, 0);  // for the next layer
    }
    st_shared<u32>(ctx.at(kSmemAttendLast), last);
  }
  bar_sync(Site::kMergeBar, kConsumerBarrier, kConsumers);
  return ld_shared<u32>(ctx.at(kSmemAttendLast)) != 0;
}

// Element d of one (row, head): n chunks from result `partial` on, rescaled to their common maximum, in position order.
inline DEVICE f32 merged(const Launch& launch, i64 partial, u32 n, u32 d, u32 stride) {
  const f32x2* sums = reinterpret_cast<const f32x2*>(launch.partial_sums(partial));
  constexpr u32 kAtOnce = 4;  // chunks whose loads are in flight together
  const f32* values = launch.partial_values(partial) + d;
  f32 most = -kLargestF32, value = 0.0f, total = 0.0f;
  UNROLL(1)
  for (u32 first = 0; first < n; first += kAtOnce) {
    f32 of[kAtOnce];
    for (u32 i = 0; i < kAtOnce; ++i) of[i] = first + i < n ? ld_global<f32x2>(sums + first + i).x : most;
    for (u32 i = 0; i < kAtOnce; ++i) most = max_of(of[i], most);
  }
  UNROLL(1)
  for (u32 first = 0; first < n; first += kAtOnce) {
    f32x2 chunk[kAtOnce];
    f32 part[kAtOnce];
    for (u32 i = 0; i < kAtOnce; ++i) {
      const u32 c = first + i < n ? first + i : n - 1;
      chunk[i] = ld_global<f32x2>(sums + c);
      part[i] = ld_global<f32>(values + c * stride);
    }
    for (u32 i = 0; i < kAtOnce; ++i) {
      const f32 weight = first + i < n ? exp_f32(chunk[i].x - most) : 0.0f;
      total += first + i < n ? weight * chunk[i].y : 0.0f;
      value = first + i < n ? fma_f32(weight, part[i], value) : value;
    }
  }
  return value * (1.0f / total);
}

inline DEVICE void merge(const Context& ctx, const Heads& heads) {
  const u32x2 of_unit = ld_shared<u32x2>(ctx.at(kSmemMergeNote) + 8),
              rows = ld_shared<u32x2>(ctx.at(kSmemMergeNote) + 16);
  const u32 kv_head = of_unit.x, first_pos = of_unit.y, first_row = rows.x, n_rows = rows.y;
  UNROLL(1)
  for (u32 i = ctx.thread; i < n_rows * heads.per_kv * heads.dim; i += kConsumers) {
    const u32 column = i / heads.dim, d = i % heads.dim, place = column / heads.per_kv;
    const u32 pos = first_pos + place, first = heads.first_visible(pos) / kChunk;
    const u32 head = kv_head * heads.per_kv + column % heads.per_kv;
    const i64 partial = ctx.launch.partial_index(first_row + place, head) + first;
    const f32 value =
        merged(ctx.launch, partial, pos / kChunk + 1 - first, d, static_cast<u32>(ctx.model.partial_stride));
    st_global<f32>(ctx.launch.partial_values(partial) + d, value);
  }
}

}  // namespace flashformer

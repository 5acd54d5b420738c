// The end of attention for a (group, kv head): the block that arrives last there merges the chunks of each row, in
// position order, into the row's first chunk, normalised.
//
// PARTIAL: values (rows, n_heads_max, chunks, partial_stride) f32, behind them (rows, n_heads_max, chunks, 2) maximum
// and sum. A warp takes 64 elements of a (row, head) at a time; bytes: 4 (dim + 4) per (row, head, chunk). Arrivals are
// counted at Model.merges, (streams, n_kv_heads) i32, which are 0 between phases.
#pragma once

#include "units.cuh"

namespace flashformer {

// What merging needs to know of the unit, so that nobody has to keep it in registers: which of the merge counters is
// its own, chunks that the group sees, kv head, position of the group's first row, that row, rows of the group, query
// heads of a kv head. Stored by one thread after the unit's kQueryBar, which all threads pass after they have merged
// the unit before.
constexpr u32 kSmemMergeNote = (kSmemAttendLast + 16) / 16 * 16;  // 8 u32
static_assert(kSmemMergeNote + 32 <= kSmemRecords);

inline DEVICE void note_unit(const Context& ctx, const Unit& u, const Heads& heads) {
  st_shared<u32x4>(ctx.at(kSmemMergeNote), {u.group * heads.n_kv + u.kv_head, u.n_chunks, u.kv_head, u.first_pos});
  st_shared<u32x4>(ctx.at(kSmemMergeNote) + 16, {u.first_row, u.n_rows, heads.per_kv, 0});
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

constexpr u32 kMergePiece = 64;  // elements of a head that a warp takes, two a lane
constexpr u32 kMergePieces = (kHeadDimPadded + kMergePiece - 1) / kMergePiece;
constexpr u32 kMergeChunks = 8;  // whose loads are in flight together
// What they weigh, {weight, weight * sum} f32 for every warp, in turns of two, where scores were. The next unit's
// scores come after its kQueryBar.
constexpr u32 kSmemMergeWeights = kSmemX, kMergeWeightBytes = 8 * kMergeChunks;
static_assert(kSmemMergeWeights + 2 * u32{kWarps} * kMergeWeightBytes <= kSmemSmall);

// Elements d and d + 1 of one (row, head): n chunks from result `partial` on, rescaled to their common maximum and
// added in position order. By a warp: what chunks weigh is worked out by a lane each. `turn`: batches of chunks before,
// of this warp.
inline DEVICE f32x2 merged(const Context& ctx, i64 partial, u32 n, u32 d, u32& turn) {
  const f32x2* sums = reinterpret_cast<const f32x2*>(ctx.launch.partial_sums(partial));
  const f32* values = ctx.launch.partial_values(partial) + d;
  f32 most = -kLargestF32, total = 0.0f;
  f32x2 value = {0.0f, 0.0f};
  UNROLL(1)
  for (u32 c = ctx.lane; c < n; c += 32) most = max_of(ld_global<f32x2>(sums + c).x, most);
  UNROLL(1)  // laid out, shuffles are much code
  for (u32 mask = 16; mask; mask /= 2) most = max_of(shfl_xor_f32(most, mask), most);
  UNROLL(1)
  for (u32 first = 0; first < n; first += kMergeChunks, values += kMergeChunks * kHeadDimPadded, ++turn) {
    const u32 left = n - first, mine = ctx.lane < left ? ctx.lane : 0;  // chunks beyond are the first one, and weigh 0
    const f32x2 sum = ld_global<f32x2>(sums + first + mine);
    f32x2 part[kMergeChunks];
    for (u32 i = 0; i < kMergeChunks; ++i) {
      const u32 at = i < left ? i * kHeadDimPadded : 0;
      part[i] = ld_global<f32x2>(reinterpret_cast<const f32x2*>(values + at));
    }
    const f32 weight = ctx.lane < left ? exp_f32(sum.x - most) : 0.0f;
    const u32 weights = ctx.at(kSmemMergeWeights) + (ctx.warp * 2 + turn % 2) * kMergeWeightBytes;
    if (ctx.lane < kMergeChunks) st_shared<f32x2>(weights + 8 * ctx.lane, {weight, weight * sum.y});
    warp_sync(Site::kMergeWarp);
    for (u32 i = 0; i < kMergeChunks; ++i) {
      const f32x2 by = ld_shared<f32x2>(weights + 8 * i);
      total += by.y;
      value = {fma_f32(by.x, part[i].x, value.x), fma_f32(by.x, part[i].y, value.y)};
    }
  }
  const f32 factor = 1.0f / total;
  return {value.x * factor, value.y * factor};
}

inline DEVICE void merge(const Context& ctx, const Phase& phase) {
  const Heads heads = heads_of(phase);
  const u32x2 of_unit = ld_shared<u32x2>(ctx.at(kSmemMergeNote) + 8);
  const u32x4 rows = ld_shared<u32x4>(ctx.at(kSmemMergeNote) + 16);
  const u32 kv_head = of_unit.x, first_pos = of_unit.y, first_row = rows.x, n_rows = rows.y, per_kv = rows.z;
  u32 turn = 0;
  UNROLL(1)
  for (u32 i = ctx.warp; i < n_rows * per_kv * kMergePieces; i += kConsumers / 32) {
    const u32 column = i / kMergePieces, mine = i % kMergePieces * kMergePiece + 2 * ctx.lane;
    const u32 d = mine < heads.dim ? mine : heads.dim - 2;  // the last lanes repeat the last two
    const u32 place = column / per_kv, head = kv_head * per_kv + column % per_kv;
    const u32 pos = first_pos + place, first = heads.first_visible(pos) / kChunk;
    const i64 partial = ctx.launch.partial_index(first_row + place, head) + first;
    const f32x2 both = merged(ctx, partial, pos / kChunk + 1 - first, d, turn);
    if (d == mine) st_global<f32x2>(reinterpret_cast<f32x2*>(ctx.launch.partial_values(partial) + d), both);
  }
}

}  // namespace flashformer

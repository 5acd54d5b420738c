// The units of attention: (chunk of 256 absolute key positions, group of rows of one slot, kv head), numbered
// (chunk * n_groups + group) * n_kv_heads + kv_head, what a unit and its columns see, and how its piece of the KV cache
// lies: keys as (16 tiles of 16 keys, steps of 32 elements), values as (tiles of 16 elements, 8 steps of 32 keys), a
// tile and step being 512 elements in the order of step_at.
#pragma once

#include "heads.cuh"

namespace flashformer {

constexpr u32 kChunk = 256;
constexpr u32 kStepElements = 16 * 32;  // of a step
static_assert(kKeyChunk == kChunk);

// Where an element of operand A (16 rows, 32 k) of two matrix instructions lies: lane 4 g + q has 16 bytes of each,
// rows g and g + 8 at k = 8 q + 4 i, + 1 and then both at the next two, for instruction i; operand B, 16 bytes at 8 q
// of a column, gives each its half.
inline DEVICE u32 step_at(u32 row, u32 k) {
  const u32 lane = row % 8 * 4 + k / 8, word = k / 2 % 2 * 2 + row / 8;
  return k / 4 % 2 * 256 + lane * 8 + word * 2 + k % 2;
}
inline DEVICE u32 key_at(u32 key, u32 d) {
  return (key / 16 * (kHeadDimPadded / 32) + d / 32) * kStepElements + step_at(key % 16, d % 32);
}
inline DEVICE u32 value_at(u32 d, u32 key) {
  return (d / 16 * (kChunk / 32) + key / 32) * kStepElements + step_at(d % 16, key % 32);
}

struct Unit {
  u32 group, kv_head, chunk;
  u32 first_pos;           // of the group's first row
  u32 first_row, n_rows;   // of the group
  u32 row_begin, row_end;  // the rows of the group that see keys of the chunk
  u32 begin, end;          // keys of the chunk that any of them sees
  u32 n_chunks;            // that the group sees
  u16 *keys, *values;      // the chunk's

  DEVICE u32 first_key() const { return chunk * kChunk; }
  DEVICE u32 pos_of(u32 row) const { return first_pos + row - first_row; }
};

// Keys of a chunk: `key` counted from its first, cut off at both ends.
inline DEVICE u32 in_chunk(u32 key, u32 first_key) {
  return key <= first_key ? 0 : key - first_key < kChunk ? key - first_key : kChunk;
}

// Which unit it is.
struct Place {
  u32 group, kv_head, chunk, cache;  // `cache`: of the (slot, kv head)

  // Where the chunk's keys begin, and its values: of as many elements each.
  DEVICE u64 elements(const Context& ctx) const {
    const u32 key = cache * static_cast<u32>(ctx.model.ctx_padded) + chunk * kChunk;
    return static_cast<u64>(key) * kHeadDimPadded;
  }
};
inline DEVICE Place place_of(const Context& ctx, const Heads& heads, u32 index) {
  const u32 pair = index / heads.n_kv, kv_head = index - pair * heads.n_kv;
  const u32 chunk = pair / ctx.launch.n_groups, group = pair - chunk * ctx.launch.n_groups;
  return {group, kv_head, chunk, static_cast<u32>(ctx.launch.group_slot[group]) * heads.n_kv + kv_head};
}

// row_begin == row_end where nobody sees the chunk.
inline DEVICE Unit unit_at(const Context& ctx, const Phase& phase, const Heads& heads, u32 index) {
  const Launch& launch = ctx.launch;
  const Place place = place_of(ctx, heads, index);
  Unit u;
  u.kv_head = place.kv_head;
  u.group = place.group;
  u.chunk = place.chunk;
  u.first_pos = static_cast<u32>(launch.group_pos[u.group]);
  u.first_row = static_cast<u32>(launch.group_begin[u.group]);
  u.n_rows = static_cast<u32>(launch.group_end[u.group]) - u.first_row;
  u32 begin = u.first_key() > u.first_pos ? u.first_key() - u.first_pos : 0, end = u.n_rows;
  begin = begin < end ? begin : end;
  UNROLL(1)
  while (end > begin && heads.first_visible(u.first_pos + end - 1) >= u.first_key() + kChunk) --end;
  u.row_begin = u.first_row + begin;
  u.row_end = u.first_row + end;
  u.begin = in_chunk(heads.first_visible(u.first_pos + begin), u.first_key());
  u.end = in_chunk(u.first_pos + end, u.first_key());
  u.n_chunks = (u.first_pos + u.n_rows - 1) / kChunk + 1 - heads.first_visible(u.first_pos) / kChunk;
  const u64 elements = place.elements(ctx);
  u.keys = reinterpret_cast<u16*>(launch.kv + phase.keys) + elements;
  u.values = reinterpret_cast<u16*>(launch.kv + phase.values) + elements;
  return u;
}

// work(index) of the units of a span, up to the last that some row sees.
template <class Work>
inline DEVICE void each_unit(const Context& ctx, const Phase& phase, const Span& span, Work work) {
  const Launch& launch = ctx.launch;
  u32 chunks = 0;
  UNROLL(1)
  for (u32 g = 0; g < launch.n_groups; ++g) {
    const u32 seen =
        static_cast<u32>(launch.group_pos[g] + launch.group_end[g] - launch.group_begin[g] - 1) / kChunk + 1;
    chunks = seen > chunks ? seen : chunks;
  }
  const u32 all = chunks * launch.n_groups * static_cast<u32>(phase.n_kv_heads);
  const u32 end = span.end < all ? static_cast<u32>(span.end) : all;
  UNROLL(1)
  for (u32 index = static_cast<u32>(span.begin); index < end; index += static_cast<u32>(span.step)) work(index);
}

// What a column is: a head of a row, the keys of the chunk that it sees, where its result goes.
struct Column {
  u32 row, head;
  u32 begin, end;
  i64 partial;
};

inline DEVICE Column column_at(const Context& ctx, const Heads& heads, const Unit& u, u32 column) {
  const u32 row = u.row_begin + column / heads.per_kv, head = u.kv_head * heads.per_kv + column % heads.per_kv;
  const u32 pos = u.pos_of(row);
  return {row, head, in_chunk(heads.first_visible(pos), u.first_key()), in_chunk(pos + 1, u.first_key()),
          ctx.launch.partial_index(row, head) + u.chunk};
}

// Brings what the units of a span will read of earlier forwards' keys and values to the L2 cache: whole chunks of which
// some are known and the group's first row sees some. By one lane, at any time in the launch before `attend`. The
// records may be in global memory: each field is read once.
inline DEVICE void attend_ahead(const Context& ctx, const Phase& phase, const Span& span) {
  const Heads heads = heads_of(phase);
  const Span units = span;
  const u8 *keys = ctx.launch.kv + phase.keys, *values = ctx.launch.kv + phase.values;
  each_unit(ctx, phase, units, [&](u32 index) {
    const Place place = place_of(ctx, heads, index);
    const u32 pos = static_cast<u32>(ctx.launch.group_pos[place.group]), first_key = place.chunk * kChunk;
    const u32 known = in_chunk(pos, first_key);
    if (known == 0 || heads.first_visible(pos) >= first_key + kChunk) return;
    const u64 at = place.elements(ctx);
    prefetch_l2_bulk(keys + 2 * at, (known + 15) / 16 * 16 * kHeadDimPadded * 2);
    prefetch_l2_bulk(values + 2 * at, kChunk * kHeadDimPadded * 2);
  });
}

}  // namespace flashformer

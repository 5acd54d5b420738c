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
  DEVICE u64 elements(u32 ctx_padded) const {
    return static_cast<u64>(cache * ctx_padded + chunk * kChunk) * kHeadDimPadded;
  }
};
inline DEVICE Place place_of(const Launch& launch, u32 n_kv, u32 index) {
  const u32 pair = index / n_kv, kv_head = index - pair * n_kv;
  const u32 chunk = pair / launch.n_groups, group = pair - chunk * launch.n_groups;
  return {group, kv_head, chunk, static_cast<u32>(launch.group_slot[group]) * n_kv + kv_head};
}

// row_begin == row_end where nobody sees the chunk.
inline DEVICE Unit unit_at(const Context& ctx, const Phase& phase, const Heads& heads, u32 index) {
  const Launch& launch = ctx.launch;
  const Place place = place_of(launch, heads.n_kv, index);
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
  const u64 elements = place.elements(static_cast<u32>(ctx.model.ctx_padded));
  u.keys = reinterpret_cast<u16*>(launch.kv + phase.keys) + elements;
  u.values = reinterpret_cast<u16*>(launch.kv + phase.values) + elements;
  return u;
}

// Where the units of a span end that some row sees.
inline DEVICE u32 units_end(const Context& ctx, const Phase& phase, const Span& span) {
  const Launch& launch = ctx.launch;
  u32 chunks = 0;
  UNROLL(1)
  for (u32 g = 0; g < launch.n_groups; ++g) {
    const u32 seen =
        static_cast<u32>(launch.group_pos[g] + launch.group_end[g] - launch.group_begin[g] - 1) / kChunk + 1;
    chunks = seen > chunks ? seen : chunks;
  }
  const u32 all = chunks * launch.n_groups * static_cast<u32>(phase.n_kv_heads);
  return span.end < all ? static_cast<u32>(span.end) : all;
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

// Units that a block looks ahead: 192 KiB at most, so that those of all blocks stay in L2 until they are used.
constexpr u32 kUnitBytes = 2 * kChunk * kHeadDimPadded * 2;
constexpr u32 kUnitsAhead = kUnitBytes < 196608 ? 196608 / kUnitBytes : 1;

// Brings what a unit will read of earlier forwards' keys and values to the L2 cache: a whole chunk of which some is
// known and the group's first row sees some. By one lane, at any time in the launch before the unit. Once per unit, so
// one copy.
inline COLD void unit_ahead(const Launch& launch, const Phase& phase, u32 index) {
  const u32 n_kv = static_cast<u32>(phase.n_kv_heads), ctx_padded = static_cast<u32>(launch.records().ctx_padded);
  const Place place = place_of(launch, n_kv, index);
  const u32 pos = static_cast<u32>(launch.group_pos[place.group]), first_key = place.chunk * kChunk;
  const u32 known = in_chunk(pos, first_key);
  const i32 first_visible = static_cast<i32>(pos) - static_cast<i32>(phase.window) + 1;
  if (known == 0 || first_visible >= static_cast<i32>(first_key + kChunk)) return;
  const u64 at = place.elements(ctx_padded);
  prefetch_l2_bulk(launch.kv + phase.keys + 2 * at, (known + 15) / 16 * 16 * kHeadDimPadded * 2);
  prefetch_l2_bulk(launch.kv + phase.values + 2 * at, kChunk * kHeadDimPadded * 2);
}

// The first units of a span; nothing is known of chunks that nobody sees.
inline DEVICE void attend_ahead(const Launch& launch, const Phase& phase, const Span& span) {
  const u32 begin = static_cast<u32>(span.begin), end = static_cast<u32>(span.end), step = static_cast<u32>(span.step);
  UNROLL(1)
  for (u32 i = 0, index = begin; i < kUnitsAhead && index < end; ++i, index += step) unit_ahead(launch, phase, index);
}

}  // namespace flashformer

// attend: unit = (chunk of 256 absolute key positions, group of rows of one slot, kv head), for all rows of the group
// and all query heads that share the kv head: its columns. The unit owns its piece of the KV cache and first appends
// the keys and values of the rows whose positions lie in its chunk (heads.cuh).
//
//   scores (256 keys, columns) = keys (256, dim) q (dim, columns)         a warp takes 32 keys
//   weights = exp(score - max) in fp32, rounded to the KV format          a warp takes a column
//   values (dim, columns) = values (dim, 256) weights (256, columns)      a warp takes 16 elements of the head
//
// Keys and values are the A operand of the matrix instruction and lie in its order (units.cuh): a warp loads 512
// bytes in a row, all that it needs at once, and each element once for every kAttendColumns columns. Bytes: 4 dim per
// key. A column's numbers depend on nothing but its row, its head and the chunk: other columns and keys that a row does
// not see add exact zeros.
//
// A result is values, maximum and sum of a (row, head, chunk). The block that arrives last at a (group, kv head) merges
// the chunks of each row in position order into the row's first chunk, normalised: what o_proj reads. Where the group
// sees one chunk the unit normalises itself, with the same bits.
#pragma once

#include "merge.cuh"

namespace flashformer {

constexpr u32 kScoreStride = 1024 + 64;  // bytes of a column: (256) f32 scores, then weights in their place,
constexpr u32 kColumnParts = 512;        // from here on parts of results,
constexpr u32 kColumnNote = 1024;  // {address of the values u64, what multiplies them f32, 0}, {keys [begin, end),
                                   // address of maximum and sum u64}
constexpr u32 kQStride =
    2 * kHeadDimPadded % 128 ? 2 * kHeadDimPadded : 2 * kHeadDimPadded + 64;  // 16-byte loads: no conflicts
constexpr u32 kAttendColumns = (kSmemSmall - kSmemX) / (kScoreStride + kQStride) / 8 * 8;
constexpr u32 kSmemScores = kSmemX, kSmemQ = kSmemScores + kAttendColumns * kScoreStride;
constexpr u32 kDimSteps = kHeadDimPadded / 32;     // a step: 32 of k, two matrix instructions
constexpr u32 kKeyTiles = kDimSteps <= 4 ? 2 : 1;  // of 16 keys that a warp has in registers
// The parts that the keys are cut into, so that heads of few elements have work for all warps.
constexpr u32 kParts = kHeadDimPadded <= 32 ? 4 : kHeadDimPadded <= 64 ? 2 : 1;
constexpr u32 kValueTiles = kHeadDimPadded / 16, kValueTasks = kValueTiles * kParts;
constexpr u32 kKeySteps = 8 / kParts;                       // steps of keys in a part,
constexpr u32 kEarlySteps = kKeySteps > 4 ? 4 : kKeySteps;  // of which so many are loaded before the weights are known
static_assert(kHeadDimPadded % 32 == 0 && kHeadDimPadded <= 256);
static_assert(kAttendColumns >= 8, "no room for the columns of one matrix instruction");

// What a warp has in registers: for each step both matrix instructions' operand A.
struct KeyTiles {
  u32x4 a[kKeyTiles][kDimSteps][2];
};
struct ValueTile {
  u32x4 a[kKeySteps][2];
};

inline DEVICE void mma_kv(f32 (&c)[4], const u32x4 (&a)[2], u32x4 b) {
  if constexpr (kKvIsBf16) {
    mma_bf16(c, a[0].x, a[0].y, a[0].z, a[0].w, b.x, b.y);
    mma_bf16(c, a[1].x, a[1].y, a[1].z, a[1].w, b.z, b.w);
  } else {
    mma_f16(c, a[0].x, a[0].y, a[0].z, a[0].w, b.x, b.y);
    mma_f16(c, a[1].x, a[1].y, a[1].z, a[1].w, b.z, b.w);
  }
}

// Where the score of a key lies: lanes that store together differ in g and q, and so in their banks.
inline DEVICE u32 score_at(u32 column, u32 key) { return column * kScoreStride + (key ^ (column / 2 % 4 * 8)) * 4; }

// ---- appending, and the queries of columns [first, first + n) into shared memory: a warp takes a head

inline DEVICE void append_and_take(const Context& ctx, const Phase& phase, const Heads& heads, const Unit& u, u32 first,
                                   u32 n) {
  const u32 beyond = u.first_row + u.first_key() + kChunk - u.first_pos;  // rows from here on are in later chunks
  const u32 end = static_cast<i32>(u.row_end - beyond) > 0 ? beyond : u.row_end;
  const u32 n_new = first == 0 && static_cast<i32>(end - u.row_begin) > 0 ? end - u.row_begin : 0;
  UNROLL(1)
  for (u32 i = ctx.warp; i < 2 * n_new + n; i += kConsumers / 32) {
    const bool is_new = i < 2 * n_new, is_value = is_new && i % 2;
    const u32 place = i - 2 * n_new, query = ctx.at(kSmemQ + place * kQStride);
    const u32 column = first + place;
    const u32 row = u.row_begin + (is_new ? i / 2 : column / heads.per_kv);
    const u32 head = is_value ? heads.n + heads.n_kv + u.kv_head
                     : is_new ? heads.n + u.kv_head
                              : u.kv_head * heads.per_kv + column % heads.per_kv;
    const Turn turn = is_value ? Turn{} : load_turn(ctx, phase, heads, row);  // on its way beside the head
    Head h = load_head(ctx, heads, row, head);
    if (!is_value) {
      norm_head(ctx, phase, heads, row, head, h);
      rotate_head(ctx, heads, turn, h);
    }
    const u32 key = u.pos_of(row) % kChunk;
    put_head(ctx, heads, h, [&](u32 d, u16 bits) {
      if (is_new) {
        st_global<u16>(is_value ? u.values + value_at(d, key) : u.keys + key_at(key, d), bits);
      } else {
        st_shared<u16>(query + 2 * d, bits);
      }
    });
  }
}

// ---- scores

inline DEVICE void load_keys(const Context& ctx, const Unit& u, u32 key, KeyTiles& tiles) {
  const u32x4* at = reinterpret_cast<const u32x4*>(u.keys + key * kHeadDimPadded) + ctx.lane;
  UNROLL(kKeyTiles)
  for (u32 t = 0; t < kKeyTiles; ++t) {
    UNROLL(2 * kDimSteps)
    for (u32 i = 0; i < 2 * kDimSteps; ++i) tiles.a[t][i / 2][i % 2] = ld_global(at + (t * 2 * kDimSteps + i) * 32);
  }
}

// Scores of the tiles from `key` on against n columns, 8 at a time.
inline DEVICE void score_keys(const Context& ctx, const KeyTiles& tiles, f32 scale, u32 key, u32 n) {
  const u32 g = ctx.lane / 4, q = ctx.lane % 4;
  UNROLL(1)
  for (u32 first = 0; first < n; first += 8) {
    const u32 query = ctx.at(kSmemQ + (first + g) * kQStride + 16 * q);
    f32 c[kKeyTiles][4] = {};
    UNROLL(kDimSteps)
    for (u32 s = 0; s < kDimSteps; ++s) {
      const u32x4 b = first + g < n ? ld_shared<u32x4>(query + s * 64) : u32x4{0, 0, 0, 0};
      UNROLL(kKeyTiles)
      for (u32 t = 0; t < kKeyTiles; ++t) mma_kv(c[t], tiles.a[t][s], b);
    }
    UNROLL(kKeyTiles)
    for (u32 t = 0; t < kKeyTiles; ++t) {
      UNROLL(4)
      for (u32 i = 0; i < 4; ++i) {
        const u32 column = first + 2 * q + i % 2;
        st_shared<f32>(ctx.at(kSmemScores + score_at(column, key + 16 * t + g + i / 2 * 8)), c[t][i] * scale);
      }
    }
  }
}

// ---- weights: a column's scores -> exp(score - max), 0 at keys that it does not see, and their maximum and sum

// What later steps need to know of a column: so they need no registers for it.
inline DEVICE void note_column(const Context& ctx, const Heads& heads, const Unit& u, u32 column, u32 place) {
  const Column c = column_at(ctx, heads, u, column);
  const u64 values = reinterpret_cast<u64>(ctx.launch.partial_values(c.partial));
  const u64 sums = reinterpret_cast<u64>(ctx.launch.partial_sums(c.partial));
  const u32 note = ctx.at(kSmemScores + place * kScoreStride + kColumnNote);
  st_shared<u32x4>(note, {static_cast<u32>(values), static_cast<u32>(values >> 32), 0, 0});
  st_shared<u32x4>(note + 16, {c.begin, c.end, static_cast<u32>(sums), static_cast<u32>(sums >> 32)});
}

// Soft-caps all eight. A loop that turns them round: laid out one after another they would be too much code.
inline DEVICE void soft_cap(f32 (&score)[8], f32 softcap) {
  UNROLL(1)
  for (u32 turn = 0; turn < 8; ++turn) {
    const f32 capped = soft_capped(score[0], softcap);
    UNROLL(7)
    for (u32 i = 0; i < 7; ++i) score[i] = score[i + 1];
    score[7] = capped;
  }
}

inline DEVICE void weigh(const Context& ctx, const Phase& phase, bool alone, u32 place) {
  const u32 column = ctx.at(kSmemScores + place * kScoreStride), first = 4 * ctx.lane;
  const u32x4 note = ld_shared<u32x4>(column + kColumnNote + 16);
  const u32 begin = note.x, end = note.y;
  const f32 softcap = static_cast<f32>(phase.softcap);
  f32 score[8], most = -kLargestF32, sum = 0.0f;  // of keys first .. first + 3 and 128 + first ..
  UNROLL(2)
  for (u32 i = 0; i < 2; ++i) {
    const u32 key = 128 * i + first;
    f32x4 four = {0.0f, 0.0f, 0.0f, 0.0f};
    if (key < end && key + 4 > begin) four = ld_shared<f32x4>(ctx.at(kSmemScores + score_at(place, key)));
    score[4 * i] = four.x, score[4 * i + 1] = four.y, score[4 * i + 2] = four.z, score[4 * i + 3] = four.w;
  }
  const u32 n_seen = end - begin, ahead = first - begin;
  const auto sees = [&](u32 i) { return ahead + i / 4 * 128 + i % 4 < n_seen; };  // before its keys it wraps around
  UNROLL(8)
  for (u32 i = 0; i < 8; ++i) {  // NaN if it is not finite: max, exp and the soft cap alone would hide it
    if (sees(i)) sum = fma_f32(score[i], 0.0f, sum);
  }
  if (kUsesScoreCap && softcap > 0.0f) soft_cap(score, softcap);
  UNROLL(8)
  for (u32 i = 0; i < 8; ++i) most = sees(i) ? max_of(score[i], most) : most;
  most = warp_max(most);
  warp_sync(Site::kWeightsWarp);  // all lanes have read the scores that weights overwrite
  UNROLL(1)
  for (u32 half = 0; half < 8; half += 4) {  // one after the other: both at once would be too much code
    UNROLL(2)
    for (u32 i = 0; i < 4; i += 2) {
      const f32 low = exp_f32(score[i] - most), high = exp_f32(score[i + 1] - most);
      const u32 bits = kv_pair(sees(half + i) ? low : 0.0f, sees(half + i + 1) ? high : 0.0f);
      st_shared<u32>(column + (half * 32 + first + i) * 2, bits);
      sum += kv_number(bits & 0xFFFFu);  // what is summed is what weighs
      sum += kv_number(bits >> 16);
    }
    for (u32 i = 0; i < 4; ++i) score[i] = score[i + 4];
  }
  sum = warp_sum(sum);
  if (ctx.lane > 0) return;
  st_shared<f32>(column + kColumnNote + 8, alone ? 1.0f / sum : 1.0f);
  const u64 sums = static_cast<u64>(note.w) << 32 | note.z;
  if (!alone) st_global<f32x2>(reinterpret_cast<f32x2*>(sums), {most, sum});
}

// ---- values

// Steps of keys that a part takes: [begin, end).
struct Steps {
  u32 begin, end;
};
inline DEVICE Steps steps_of(const Unit& u, u32 part) {
  const u32 first = u.begin / 32, last = (u.end + 31) / 32, begin = part * kKeySteps, end = begin + kKeySteps;
  return {begin > first ? begin : first, end < last ? end : last};
}

// 16 elements of the head, `tile`, at steps of keys of a part: the first of those that it has registers for, or the
// others.
template <bool kFirst>
inline DEVICE void load_values(const Context& ctx, const Unit& u, u32 task, ValueTile& v) {
  const Steps steps = steps_of(u, task / kValueTiles);
  const u32 tile = task % kValueTiles;
  const u32x4* at = reinterpret_cast<const u32x4*>(u.values + (tile * 8 + steps.begin) * kStepElements) + ctx.lane;
  constexpr u32 kBegin = kFirst ? 0 : kEarlySteps, kEnd = kFirst ? kEarlySteps : kKeySteps;
  UNROLL(2 * kKeySteps)
  for (u32 i = 2 * kBegin; i < 2 * kEnd; ++i) {
    if (steps.begin + i / 2 < steps.end) v.a[i / 2][i % 2] = ld_global(at + i * 32);
  }
}

// Puts 0 in place of values at keys from `end` on: memory there may hold anything, NaN too. Keys before the first one
// that is seen were stored by earlier forwards of the slot, their weights are 0.
inline DEVICE void only_stored(const Context& ctx, ValueTile& v, const Steps& steps, u32 end) {
  const u32 last = end / 32, key = last * 32 + ctx.lane % 4 * 8;  // the step that ends there, this lane's first key
  u32 mask[4];                                                    // of two keys each
  for (u32 i = 0; i < 4; ++i) {
    const u32 at = key + 2 * i;
    mask[i] = (at < end ? 0x0000FFFFu : 0) | (at + 1 < end ? 0xFFFF0000u : 0);
  }
  UNROLL(kKeySteps)
  for (u32 s = 0; s < kKeySteps; ++s) {
    if (steps.begin + s != last) continue;
    for (u32 i = 0; i < 2; ++i) {
      u32x4& a = v.a[s][i];
      a = {a.x & mask[2 * i], a.y & mask[2 * i], a.z & mask[2 * i + 1], a.w & mask[2 * i + 1]};
    }
  }
}

// Where the values of a column go, and what multiplies them: 1 if they are to be merged.
struct Result {
  f32* values;
  f32 factor;

  DEVICE void put(u32 d, f32 value) const {
    st_global<f32>(values + d, (value + 0.0f) * factor);
  }  // no -0: as `merged`
};
inline DEVICE Result result_of(const Context& ctx, u32 place) {
  const u32x4 note = ld_shared<u32x4>(ctx.at(kSmemScores + place * kScoreStride + kColumnNote));
  const u64 values = static_cast<u64>(note.y) << 32 | note.x;
  return {reinterpret_cast<f32*>(values), bit_copy<f32>(note.z)};
}

// Elements g and g + 8 of a tile of one column: results, or a part of them.
inline DEVICE void put_values(const Context& ctx, const Heads& heads, u32 place, u32 part, u32 d, f32 low, f32 high) {
  if constexpr (kParts > 1) {
    const u32 at = ctx.at(kSmemScores + place * kScoreStride + kColumnParts) + (part * kHeadDimPadded + d) * 4;
    st_shared<f32>(at, low);
    st_shared<f32>(at + 32, high);
    return;
  }
  const Result result = result_of(ctx, place);
  if (d < heads.dim) result.put(d, low);
  if (d + 8 < heads.dim) result.put(d + 8, high);
}

// Of `tile` and `part`, for n columns.
inline DEVICE void sum_values(const Context& ctx, const Heads& heads, const Unit& u, ValueTile& v, u32 tile, u32 part,
                              u32 n) {
  const u32 g = ctx.lane / 4, q = ctx.lane % 4;
  const Steps steps = steps_of(u, part);
  only_stored(ctx, v, steps, u.end);
  UNROLL(1)
  for (u32 first = 0; first < n; first += 8) {
    const u32 weights = ctx.at(kSmemScores + (first + g) * kScoreStride + 16 * q) + steps.begin * 64;
    f32 c[4] = {};
    UNROLL(kKeySteps)
    for (u32 s = 0; s < kKeySteps; ++s) {
      if (steps.begin + s >= steps.end) continue;
      mma_kv(c, v.a[s], first + g < n ? ld_shared<u32x4>(weights + s * 64) : u32x4{0, 0, 0, 0});
    }
    UNROLL(2)
    for (u32 i = 0; i < 2; ++i) {
      const u32 place = first + 2 * q + i;
      if (place < n) put_values(ctx, heads, place, part, tile * 16 + g, c[i], c[i + 2]);
    }
  }
}

inline DEVICE void add_parts(const Context& ctx, const Heads& heads, u32 n) {
  bar_sync(Site::kPartsBar, kConsumerBarrier, kConsumers);
  UNROLL(1)
  for (u32 i = ctx.thread; i < n * heads.dim; i += kConsumers) {
    const u32 place = i / heads.dim, d = i % heads.dim;
    const u32 parts = ctx.at(kSmemScores + place * kScoreStride + kColumnParts) + d * 4;
    f32 value = ld_shared<f32>(parts);
    for (u32 part = 1; part < kParts; ++part) value += ld_shared<f32>(parts + part * kHeadDimPadded * 4);
    result_of(ctx, place).put(d, value);
  }
}

// ---- one pass over the unit's piece of the cache: columns [first, first + n)

inline DEVICE void score_pass(const Context& ctx, const Phase& phase, const Heads& heads, const Unit& u, u32 first,
                              u32 n) {
  const u32 mine = ctx.warp * 32;  // keys
  const bool seen = mine < u.end && mine + 32 > u.begin;
  // Keys of earlier forwards may come while queries are made, where there are registers for both.
  const bool old = kDimSteps <= 4 && u.first_key() + mine + 32 <= u.first_pos;
  KeyTiles tiles = {};  // so that nothing of the unit before stays in registers
  if (seen && old) load_keys(ctx, u, mine, tiles);
  append_and_take(ctx, phase, heads, u, first, n);
  bar_sync(Site::kQueryBar, kConsumerBarrier, kConsumers);
  if (!seen) return;
  const f32 scale = static_cast<f32>(phase.attention_scale);
  UNROLL(1)
  for (u32 key = mine; key < mine + 32; key += 16 * kKeyTiles) {
    if (!old || key > mine) load_keys(ctx, u, key, tiles);
    score_keys(ctx, tiles, scale, key, n);
  }
}

inline DEVICE void attend_columns(const Context& ctx, const Phase& phase, const Heads& heads, const Unit& u, u32 first,
                                  u32 n) {
  score_pass(ctx, phase, heads, u, first, n);
  UNROLL(1)
  for (u32 place = ctx.thread; place < n; place += kConsumers) note_column(ctx, heads, u, first + place, place);
  if (ctx.thread == kConsumers - 1) note_unit(ctx, u, heads);
  ValueTile v = {};
  if (ctx.warp < kValueTasks) load_values<true>(ctx, u, ctx.warp, v);
  bar_sync(Site::kScoresBar, kConsumerBarrier, kConsumers);
  UNROLL(1)
  for (u32 place = ctx.warp; place < n; place += kConsumers / 32) weigh(ctx, phase, u.n_chunks == 1, place);
  bar_sync(Site::kWeightsBar, kConsumerBarrier, kConsumers);
  UNROLL(1)
  for (u32 task = ctx.warp; task < kValueTasks; task += kConsumers / 32) {
    if (kValueTasks > kConsumers / 32 && task != ctx.warp) load_values<true>(ctx, u, task, v);
    load_values<false>(ctx, u, task, v);
    sum_values(ctx, heads, u, v, task % kValueTiles, task / kValueTiles, n);
  }
  if constexpr (kParts > 1) add_parts(ctx, heads, n);
}

inline DEVICE void attend(Context& ctx, const Phase& phase, const Span& span) {
  qk_factors(ctx, phase, heads_of(phase));
  const u32 units = units_end(ctx, phase, span), step = static_cast<u32>(span.step);
  UNROLL(1)
  for (u32 index = static_cast<u32>(span.begin); index < units; index += step) {
    const Heads heads = heads_of(phase);
    const u32 later = index + kUnitsAhead * step;
    if (ctx.thread == kConsumers - 1 && later < units) unit_ahead(ctx.launch, phase, later);
    const Unit u = unit_at(ctx, phase, heads, index);
    const u32 columns = (u.row_end - u.row_begin) * heads.per_kv;
    // Passes and units need no barrier between them: shared memory that one reads last the next one writes after
    // kQueryBar.
    UNROLL(1)
    for (u32 first = 0; first < columns; first += kAttendColumns) {
      const u32 left = columns - first;
      attend_columns(ctx, phase, heads, u, first, left < kAttendColumns ? left : kAttendColumns);
    }
    if (columns == 0 || u.n_chunks == 1) continue;
    if (arrives_last(ctx)) merge(ctx, phase);
  }
}

}  // namespace flashformer

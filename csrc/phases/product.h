// Products of packed tiles with rows of activations: sums[row][output] = sum over k of w[output][k] * x[row][k].
//
// A lane owns an output, the activation is broadcast, and every sum walks k from 0 upwards whatever the number of
// rows, so a row's bits do not depend on its company. A tile (vectors * 16 outputs, all of k) is cut into blocks of
// k that stay in the first-level cache while all rows pass over them, a few at once; sums rest in scratch between
// blocks. While a block is computed, the block that this worker reads next is prefetched, across tiles and phases, in
// order and at an even pace: every pass takes its share. Where all rows pass at once, a tile is not cut: the tape is
// one stream (of every nth line where registers do not hold a tile's vectors), which the hardware fetches ahead better
// than we do. One row has no prefetches; several name the line that is being read, which lets loads run ahead of
// products, or of codes, whose arithmetic takes longer, one that is kAhead bytes further on. Where a CPU gains by more
// (Forward::asks), one row of 4-bit codes asks as several do; or all that pass at once ask for every line twice, early
// for the second level of caches and late for the first, and one row takes two tiles side by side if registers hold
// their sums, as two streams come faster than one there (docs/measuring.md).
#pragma once

#include <algorithm>

#include "../forward.h"
#include "../simd/at_once.h"
#include "input.h"

namespace flashformer {

// The weight policies: what one step (one 64-byte vector of weights, k_group consecutive k) adds to a sum.
template <class V>
struct WeightsF32 {  // fp32 weights x fp32 activations
  using X = float;
  static constexpr int kGroup = 1;
  static constexpr AtOnce kAtOnce = V::kPlain;
  static typename V::F add(typename V::F sum, typename V::Raw w, const X* x) {
    return V::fma(V::as_f32(w), V::set1(x[0]), sum);
  }
};

template <class V>
struct WeightsBf16 {  // bf16 weights x fp32 activations
  using X = float;
  static constexpr int kGroup = 2;
  static constexpr AtOnce kAtOnce = V::kWidened;
  static typename V::F add(typename V::F sum, typename V::Raw w, const X* x) {
    return V::fma(V::odd_bf16(w), V::set1(x[1]), V::fma(V::even_bf16(w), V::set1(x[0]), sum));
  }
};

template <class V>
struct WeightsF16 {  // f16 weights x fp32 activations
  using X = float;
  static constexpr int kGroup = 2;
  static constexpr AtOnce kAtOnce = V::kWidened;
  static typename V::F add(typename V::F sum, typename V::Raw w, const X* x) {
    return V::fma(V::odd_f16(w), V::set1(x[1]), V::fma(V::even_f16(w), V::set1(x[0]), sum));
  }
};

template <class V>
struct WeightsBf16Dot {  // bf16 weights x bf16 activations, by the dot-product instruction
  using X = uint16_t;
  static constexpr int kGroup = 2;
  static constexpr AtOnce kAtOnce = V::kPlain;
  static typename V::F add(typename V::F sum, typename V::Raw w, const X* x) { return V::dot_bf16(sum, w, x); }
};

// Bytes from what belongs to the first of a tile's TILE vectors to what belongs to vector v, which may be one of the
// next tile.
template <int TILE, int BYTES = 64>
inline int64_t place(int64_t v, int64_t tile_bytes) {
  return v / TILE * tile_bytes + v % TILE * BYTES;
}

// What a pass prefetches: for every 64 bytes that it reads, the line `line` bytes further on.
struct Ahead {
  static constexpr int kTiles = 1;
  const char* at;
  int64_t line;  // 64 / passes, rounded up

  template <class V>
  void prefetch(int64_t i) const {
    V::prefetch(at + i * line);
  }
  void move(int64_t lines) { at += lines * line; }
  // For `lines` that are read one after the other.
  template <class V>
  void pass(int64_t lines) {
    const char* end = at + lines * line;
    for (const char* p = at; p < end; p += 64) V::prefetch(p);
    at = end;
  }
};

// Every line of a stream twice: into the second level of caches, then into the first.
struct AheadTwice {
  static constexpr int kTiles = 1;
  static constexpr int64_t kFar = 4096, kNear = 2048;  // bytes
  const char* at;

  template <class V>
  void prefetch(int64_t i) const {
    V::prefetch_far(at + i * 64 + kFar);
    V::prefetch(at + i * 64 + kNear);
  }
  void move(int64_t lines) { at += lines * 64; }
  template <class V>
  void pass(int64_t lines) {
    for (int64_t i = 0; i < lines; ++i) prefetch<V>(i);
    move(lines);
  }
};

// The same of two tiles side by side; behind their ends follow the next two.
template <int TILE>
struct AheadOfTwo {
  static constexpr int kTiles = 2;
  static constexpr int64_t kFar = 3072, kNear = 1536;  // bytes
  const char *at, *end;                                // of the first tile
  int64_t tile_bytes, far, near;

  AheadOfTwo(const char* tile, int64_t n_bytes) : at(tile), end(tile + n_bytes), tile_bytes(n_bytes) { move(0); }
  template <class V>
  void prefetch(int64_t i) const {
    const char* line = at + place<TILE>(i, tile_bytes);
    V::prefetch_far(line + far);
    V::prefetch(line + near);
    keep_order();  // line after line is read, not several at once and then none
  }
  void move(int64_t lines) {
    at += lines * 64;
    far = at + kFar < end ? kFar : kFar + tile_bytes;
    near = at + kNear < end ? kNear : kNear + tile_bytes;
  }
};

// Of what meets two tiles: their weights drive it out of the first level of caches until the next two.
template <class V, int64_t BYTES = 1024>
inline void prefetch_input(const void* x) {
  V::prefetch(static_cast<const char*>(x) + BYTES);
}

struct NothingAhead {
  static constexpr int kTiles = 1;
  template <class V>
  void prefetch(int64_t) const {}
  void move(int64_t) {}
};

// How many of `vectors` meet rows together: of two tiles one, line after line, in the order of what is asked for.
template <class A>
constexpr int at_once_of(int vectors) {
  return A::kTiles == 1 ? vectors : 1;
}

// VS vectors of R rows over `steps` steps of TILE vectors. w: first vector of the first step.
template <class V, class W, int TILE, int VS, int R, class A>
inline void product_block(const Phase& phase, float* sums, const char* w, const typename W::X* x, int64_t x_stride,
                          int64_t steps, A ahead) {
  constexpr int N = at_once_of<A>(VS);
  const int64_t tile_bytes = phase.tile_bytes;
  typename V::F sum[R][VS];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < VS; ++v) sum[r][v] = V::load(sums + r * kPad + v * kLanes);
  }
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 8
    for (int v0 = 0; v0 < VS; v0 += N) {
      typename V::Raw weight[N];
      for (int v = 0; v < N; ++v) {
        weight[v] = V::load_raw(w + place<TILE>(v0 + v, tile_bytes));
        ahead.template prefetch<V>(v0 + v);
      }
      for (int r = 0; r < R; ++r) {
        const typename W::X* xs = x + r * x_stride + s * W::kGroup;
        for (int v = 0; v < N; ++v) sum[r][v0 + v] = W::add(sum[r][v0 + v], weight[v], xs);
      }
    }
    w += TILE * 64;
    ahead.move(TILE);
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < VS; ++v) V::store(sums + r * kPad + v * kLanes, sum[r][v]);
  }
}

// Weights that are not quantized: all vectors of a tile for R rows. A block is counted in groups of kGroup k.
template <class V, class P>
struct Plain : P {
  using X = typename P::X;
  static constexpr bool kMatrix = false;
  static constexpr int64_t kBlock = kBlockBytes, kAhead = 0;
  static constexpr bool kOneAsksOnce = false;

  static Input<X> take(Worker&, const Phase&, const Input<X>& rows, int64_t) { return rows; }

  template <int TILE, int R, class A>
  static void rows(const Phase& phase, float* sums, const char* w, const Input<X>& in, int64_t row, int64_t group,
                   int64_t groups, A ahead) {
    constexpr int VS = P::kAtOnce.vectors_of(TILE * A::kTiles, R);
    const X* x = in.x + row * in.stride + group * P::kGroup;
    for (int v = 0; v < TILE; v += VS, ahead.move(VS)) {
      product_block<V, P, TILE, VS, R>(phase, sums + v * kLanes, w + v * 64, x, in.stride, groups, ahead);
    }
  }
};

// Rows [row, row + rows) of a block, 1 <= rows <= R.
template <class V, class W, int TILE, int R, class In, class A>
inline void rows_at_once(const Phase& phase, int64_t rows, float* sums, const char* w, const In& in, int64_t row,
                         int64_t group, int64_t groups, A ahead) {
  if constexpr (W::kMatrix) {
    W::template some_rows<TILE>(phase, rows, sums, w, in, row, group, groups, ahead);
  } else {
    if constexpr (R > 1) {
      if (rows < R) return rows_at_once<V, W, TILE, R - 1>(phase, rows, sums, w, in, row, group, groups, ahead);
    }
    W::template rows<TILE, R>(phase, sums, w, in, row, group, groups, ahead);
  }
}

// Two tiles for one row; sums of the second behind those of the first. Called: within a larger function g++ may keep
// these sums in the stack.
template <class V, class W, int TILE, class In>
[[gnu::noinline]] void product_two_tiles(const Phase& phase, float* sums, const char* w, const In& in) {
  if constexpr (W::kAtOnce.pairs_of(TILE)) {
    for (int v = 0; v < 2 * TILE; ++v) V::store(sums + v * kLanes, V::zero());
    W::template rows<TILE, 1>(phase, sums, w, in, 0, 0, phase.tile_bytes / phase.group_bytes,
                              AheadOfTwo<TILE>(w, phase.tile_bytes));
  }
}

// One tile for all rows. `next`: where this worker reads after this tile.
template <class V, class W, int TILE, class In>
void product_tile(const Phase& phase, float* sums, const char* w, const In& in, int64_t n_rows, const char* next,
                  Asks asks) {
  constexpr int R = W::kAtOnce.rows;
  const int64_t all = phase.tile_bytes / phase.group_bytes;
  for (int64_t r = 0; r < n_rows; ++r) {
    for (int v = 0; v < TILE; ++v) V::store(sums + r * kPad + v * kLanes, V::zero());
  }
  if (n_rows <= R && asks == Asks::kTwice) {
    return rows_at_once<V, W, TILE, R>(phase, n_rows, sums, w, in, 0, 0, all, AheadTwice{w});
  }
  if constexpr (!W::kMatrix) {
    const bool once = W::kOneAsksOnce && asks == Asks::kOnce;
    if (n_rows == 1 && !once) return W::template rows<TILE, 1>(phase, sums, w, in, 0, 0, all, NothingAhead{});
  }
  if (n_rows <= R) return rows_at_once<V, W, TILE, R>(phase, n_rows, sums, w, in, 0, 0, all, Ahead{w + W::kAhead, 64});

  const int64_t passes = (n_rows + R - 1) / R, line = (64 + passes - 1) / passes;
  const int64_t at_once = (W::kBlock + phase.group_bytes - 1) / phase.group_bytes;
  for (int64_t g = 0, count; g < all; g += count) {
    count = std::min(at_once, all - g);
    const char* block = w + g * phase.group_bytes;
    const char* ahead = g + count == all ? next : block + at_once * phase.group_bytes;
    const int64_t bytes = count * phase.group_bytes;
    for (int64_t pass = 0, r = 0; pass < passes; ++pass) {
      const int64_t left = passes - pass, rows = (n_rows - r + left - 1) / left;
      rows_at_once<V, W, TILE, R>(phase, rows, sums + r * kPad, block, in, r, g, count,
                                  Ahead{ahead + pass * bytes / passes, line});
      r += rows;
    }
  }
}

// Results of rows further on: all workers have read what lies there, and a line that others hold comes late.
template <class V>
inline void prefetch_result(const float* row, int64_t stride, int64_t n, int64_t rows_left) {
  constexpr int64_t kRowsAhead = 16;
  if (rows_left <= kRowsAhead) return;
  for (int64_t i = 0; i < n; i += kLanes) {
    V::prefetch_to_write(reinterpret_cast<const char*>(row + kRowsAhead * stride + i));
  }
}

// Tiles of one row whose sums wait for each other, to be finished together: the stream of weights has driven results
// from the caches, and every time that one is fetched disturbs the stream.
constexpr int kTilesTogether = 16;
static_assert(kTilesTogether * kPad <= kScoreRows * kKeyChunk);  // sums run on into scores, which no product needs

// The tiles of a phase, those of this worker's span first. finish(first output, sums (n_rows, kPad)) is called for
// each, at once or later.
template <class V, class W, class Finish>
inline void product(Worker& worker, const Phase& phase, const Span& span, const Input<typename W::X>& rows,
                    int64_t n_rows, Finish finish) {
  if (span.begin >= span.end) return;
  const auto in = W::take(worker, phase, rows, n_rows);
  const char* tiles = worker.take_tape_item() - span.begin * phase.tile_bytes;  // of the phase, one behind the other
  float* sums = worker.sums();
  const Asks asks = worker.forward->asks;
  const auto n_tiles = [&](int64_t w) { return worker.span_of(w).end - worker.span_of(w).begin; };
  const bool pairs = asks == Asks::kTwice && n_rows == 1 && W::kAtOnce.pairs_of(phase.vectors);
  const int most = pairs ? 2 : 1, together = pairs ? kTilesTogether : 1;
  const int64_t outputs = phase.vectors * kLanes;
  int64_t summed[kTilesTogether];  // first outputs of tiles that are to be finished
  int n_summed = 0;
  const auto finish_all = [&] {
    for (int t = 0; t < n_summed; ++t) finish(summed[t], sums + t * outputs);
    n_summed = 0;
  };
  worker.each_unit(n_tiles, most, [&](int64_t owner, int64_t i, int64_t n) {
    const int64_t unit = worker.span_of(owner).begin + i;
    const char* tile = tiles + unit * phase.tile_bytes;
    const char* next = unit + 1 < worker.span_of(owner).end ? tile + phase.tile_bytes : worker.tape_ahead();
    for (int64_t u = 0; u < n; ++u) worker.begin_unit(unit + u);
    float* unit_sums = sums + n_summed * outputs;
    const auto multiply = [&]<int TILE>() {
      if (n == 2) return product_two_tiles<V, W, TILE>(phase, unit_sums, tile, in);
      product_tile<V, W, TILE>(phase, unit_sums, tile, in, n_rows, next, asks);
    };
    switch (phase.vectors) {
      case 1:
        multiply.template operator()<1>();
        break;
      case 2:
        multiply.template operator()<2>();
        break;
      default:
        multiply.template operator()<4>();
    }
    for (int64_t u = 0; u < n; ++u) summed[n_summed++] = (unit + u) * outputs;
    if (n_summed + most > together) finish_all();
  });
  finish_all();
}

}  // namespace flashformer

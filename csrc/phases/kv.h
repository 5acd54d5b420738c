// The KV cache of one layer: (streams, n_kv_heads, chunks of kKeyChunk positions), and of a chunk keys (positions/16,
// head_dim, 16), 16 positions being lanes, so that scores need no horizontal sums, then values (positions, head_dim
// padded to 16). Where an instruction takes two elements at once (kStep), these lie side by side: two of a key, in keys
// (..., head_dim/2, 16, 2); those of two keys, in values (positions/2, head_dim padded to 16, 2).
#pragma once

#include <algorithm>

#include "../element.h"
#include "../forward.h"

namespace flashformer {

struct Half {
  uint16_t bits;
};

// T: an element of the cache; X: of what meets it, queries and weights, which are rounded in place. A vector is 16
// steps. kQueries: (row, head) pairs that pass over a chunk at once, kOneRow: heads of a single row. kTogether: keys
// whose values are read even if a query sees only the first of them. kFew: queries of a unit that may take two chunks
// at once and read no value behind the last that they see. kThinkingBytes: of the values of a whole chunk, prefetched
// while exponentials are computed.
template <int STEP>
struct KvByVectors {
  struct Registers {};
  static constexpr bool kMatrix = false;
  static constexpr int kStep = STEP, kQueries = 4, kOneRow = STEP > 1 ? 8 : 4, kFew = 0;
  static constexpr int64_t kTogether = STEP, kThinkingBytes = 12288;
};

template <class V>
struct KvWide : KvByVectors<1> {
  using X = float;
  using Vector = typename V::F;
  static typename V::F add(typename V::F sum, Vector v, const X* x) { return V::fma(v, V::set1(*x), sum); }
  static typename V::F round(X* p, typename V::F x) {
    V::store(p, x);
    return x;
  }
};

template <class V>
struct KvF32 : KvWide<V> {
  using T = float;
  static typename V::F load(const T* p) { return V::load(p); }
  static void put(T* p, float x) { *p = x; }
};

template <class V>
struct KvBf16 : KvWide<V> {
  using T = uint16_t;
  static typename V::F load(const T* p) { return V::load_bf16(p); }
  static void put(T* p, float x) { *p = to_bf16(x); }
};

template <class V>
struct KvF16 : KvWide<V> {
  using T = Half;
  static typename V::F load(const T* p) { return V::load_f16(&p->bits); }
  static void put(T* p, float x) { p->bits = to_f16(x); }
};

template <class V>
struct KvBf16Dot : KvByVectors<2> {
  using T = uint16_t;
  using X = uint16_t;
  using Vector = typename V::Raw;
  static Vector load(const T* p) { return V::load_raw(reinterpret_cast<const char*>(p)); }
  static void put(T* p, float x) { *p = to_bf16(x); }
  static typename V::F add(typename V::F sum, Vector v, const X* x) { return V::dot_bf16(sum, v, x); }
  // 16 elements of a row of fp32 -> X in the same place, counted in X; gives what they are now.
  static typename V::F round(X* p, typename V::F x) { return V::round_bf16(p, x); }
};

// The first key that a row at `pos` sees.
inline int64_t first_visible(const Phase& phase, int64_t pos) {
  return pos >= phase.window ? pos - phase.window + 1 : 0;
}

template <class T>
struct KvChunk {
  T *keys, *values;
};

// The chunk that begins with position first_key.
template <class T>
inline KvChunk<T> chunk_of(const Forward& forward, const Phase& phase, int64_t slot, int64_t kv_head,
                           int64_t first_key) {
  const int64_t ctx = forward.model.ctx_padded, head = slot * phase.n_kv_heads + kv_head;
  T* keys = reinterpret_cast<T*>(forward.kv + phase.keys) +
            (head * ctx + first_key) * (phase.head_dim + phase.head_dim_padded);
  return {keys, keys + std::min(kKeyChunk, ctx - first_key) * phase.head_dim};
}

}  // namespace flashformer

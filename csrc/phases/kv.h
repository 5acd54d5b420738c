// The KV cache of one layer. Keys (streams, n_kv_heads, ctx/16, head_dim, 16): 16 positions are lanes, so that
// scores need no horizontal sums. Values (streams, n_kv_heads, ctx, head_dim padded to 16).
#pragma once

#include "../element.h"
#include "../forward.h"

namespace flashformer {

struct Half {
  uint16_t bits;
};

template <class V>
struct KvF32 {
  using T = float;
  static typename V::F load(const T* p) { return V::load(p); }
  static void put(T* p, float x) { *p = x; }
};

template <class V>
struct KvBf16 {
  using T = uint16_t;
  static typename V::F load(const T* p) { return V::load_bf16(p); }
  static void put(T* p, float x) { *p = to_bf16(x); }
};

template <class V>
struct KvF16 {
  using T = Half;
  static typename V::F load(const T* p) { return V::load_f16(&p->bits); }
  static void put(T* p, float x) { p->bits = to_f16(x); }
};

// The first key that a row at `pos` sees.
inline int64_t first_visible(const Phase& phase, int64_t pos) {
  return pos >= phase.window ? pos - phase.window + 1 : 0;
}

template <class T>
inline T* keys_of(const Forward& forward, const Phase& phase, int64_t slot, int64_t kv_head) {
  const int64_t cache = slot * phase.n_kv_heads + kv_head;
  return reinterpret_cast<T*>(forward.kv + phase.keys) + cache * forward.model.ctx_padded * phase.head_dim;
}
template <class T>
inline T* values_of(const Forward& forward, const Phase& phase, int64_t slot, int64_t kv_head) {
  const int64_t cache = slot * phase.n_kv_heads + kv_head;
  return reinterpret_cast<T*>(forward.kv + phase.values) + cache * forward.model.ctx_padded * phase.head_dim_padded;
}

}  // namespace flashformer

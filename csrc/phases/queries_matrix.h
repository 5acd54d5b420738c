// Queries against one chunk of the KV cache by a matrix unit: keys of 16 positions and values of 32 are its operands as
// they lie in the cache, up to 16 queries or their weights the other. It takes 0.3 us to wake up, so few queries take
// FMAs in its order: of a product even and odd elements each from zero, then both together. These give the same bits,
// but for the sign of a zero that ends a chunk, which merging chunks from +0 on takes away. Where few queries see all
// of two chunks, these are met side by side.
#pragma once

#include "../simd/amx.h"
#include "queries.h"

namespace flashformer {

// What FMAs take: fp32 that is bf16.
template <class V>
struct RoundedToBf16 {
  using X = float;
  static constexpr int64_t kThinkingBytes = 8192;
  static typename V::F round(X* p, typename V::F x) {
    uint16_t bf16[kLanes];
    x = V::round_bf16(bf16, x);
    V::store(p, x);
    return x;
  }
};

template <class V>
struct KvBf16Matrix {
  using T = uint16_t;
  using F = typename V::F;
  using Registers = Shape<V>;
  static constexpr bool kMatrix = true;
  static constexpr int kStep = 2, kFew = 4, kQueries = V::kMatrixRows, kOneRow = kQueries;
  static constexpr int64_t kTogether = V::kMatrixBytes / 2;  // weights in a row of the unit's operand
  static constexpr int64_t kPair = 2 * kLanes;               // elements of the cache in a vector
  static constexpr int64_t kFar = 4096, kNear = 1536;        // bytes
  static_assert(2 * kFew <= kQueries);
  static_assert(kTogether == kValuesTogether && kKeyChunk % kTogether == 0);
  static void put(T* p, float x) { *p = to_bf16(x); }
  // Of values, whose sums for few queries registers hold.
  static constexpr int vectors_of(int queries) { return queries == 1 ? 4 : queries <= 4 ? 2 : 1; }

  static void attend_batch(Worker& worker, const Phase& phase, Registers& registers, int n, const Query* query,
                           const T* keys, const T* values) {
    const Keys all = seen_by_any(query, n, kTogether);
    const int64_t end = seen_by_any(query, n, kStep).end;
    const Batch batch = {worker, phase, query, keys, values, all, end, elements_at_once(phase.head_dim), 0};
    batch.ask_for_results(n);
    if (n > kFew) return many(batch, registers, n);
    dispatch<1>(batch, n);
  }

  // Few queries, n of them, that see all of two chunks which lie one behind the other; then the same of the second one.
  static void attend_two(const Worker& worker, const Phase& phase, int n, const Query* query, const T* keys,
                         const T* values) {
    const int64_t chunk = kKeyChunk * (phase.head_dim + phase.head_dim_padded);
    const Batch batch = {
        worker, phase, query, keys, values, {0, kKeyChunk}, kKeyChunk, elements_at_once(phase.head_dim), chunk};
    batch.ask_for_results(2 * n);
    dispatch<2>(batch, n);
  }

 private:
  // Of what few queries read in each stream: every line twice, in the order of memory. Bytes from what is read.
  struct Ahead {
    int64_t far, near;
    void prefetch(const T* at) const {
      V::prefetch_far(reinterpret_cast<const char*>(at) + far);
      V::prefetch(reinterpret_cast<const char*>(at) + near);
    }
  };

  struct Batch {
    const Worker& worker;
    const Phase& phase;
    const Query* query;
    const T *keys, *values;
    Keys all;
    int64_t end;  // of what is seen, in steps
    int64_t at_once;
    int64_t chunk;  // elements from the first of two chunks to the second

    template <int CHUNKS>
    Ahead ahead(const T* at) const {
      if constexpr (CHUNKS == 1) return {kFar, kNear};
      constexpr int64_t kBytes = sizeof(T);
      const int64_t left = (keys + chunk - at) * kBytes, skip = chunk * kBytes;  // behind both follow two more
      return {kFar < left ? kFar : kFar + skip, kNear < left ? kNear : kNear + skip};
    }
    // Every worker's o_proj has read what lies there.
    void ask_for_results(int n) const {
      for (int p = 0; p < n; ++p) {
        const char* at = reinterpret_cast<const char*>(result(p));
        for (int64_t i = 0; i < phase.head_dim_padded * 4; i += 64) V::prefetch_to_write(at + i);
      }
    }
    float* scores(int p) const { return worker.scores() + p * kKeyChunk; }
    float* result(int p) const { return worker.forward->partial_values(query[p].partial); }
    int64_t head_bytes() const { return worker.forward->model.partial_stride * static_cast<int64_t>(sizeof(float)); }
  };
  static constexpr int64_t kScoreBytes = kKeyChunk * sizeof(float);

  // Elements of a head in a product: they divide it, so that none is left.
  static int64_t elements_at_once(int64_t head_dim) {
    int64_t n = V::kMatrixBytes / 2;
    while (head_dim % n > 0) n -= 2;
    return n;
  }

  template <int CHUNKS>
  static void dispatch(const Batch& b, int n) {
    switch (n) {
      case 1:
        return few<1, CHUNKS>(b);
      case 2:
        return few<2, CHUNKS>(b);
      case 3:
        return few<3, CHUNKS>(b);
      default:
        return few<4, CHUNKS>(b);
    }
  }

  // The unit takes query p as the p-th of worker.heads(), where it lies.
  static void many(const Batch& b, Registers& registers, int n) {
    round_queries<V, KvBf16Dot<V>>(b.phase, b.query, n);
    registers.set(n, b.at_once * 2);
    int64_t k = b.all.begin;
    for (; k + 4 * kLanes <= b.all.end; k += 4 * kLanes) score_keys<4>(b, k);
    for (; k < b.all.end; k += kLanes) score_keys<1>(b, k);
    exponentiate_all<V, KvBf16Dot<V>>(b.worker, b.phase, b.query, n, b.all, b.scores(0), b.values);
    registers.set(n, V::kMatrixBytes);
    const int64_t n_elements = b.phase.head_dim_padded;
    int64_t d = 0;
    for (; d + 4 * kLanes <= n_elements; d += 4 * kLanes) weigh<4>(b, d);
    for (; d < n_elements; d += kLanes) weigh<1>(b, d);
    const char* sums = reinterpret_cast<const char*>(b.worker.heads());
    for (int p = 0; p < n; ++p) {
      std::memcpy(b.result(p), sums + p * b.head_bytes(), static_cast<std::size_t>(n_elements) * sizeof(float));
    }
  }

  // Scores of all queries at N * 16 keys from k on.
  template <int N>
  static void score_keys(const Batch& b, int64_t k) {
    const T* keys = b.keys + k * b.phase.head_dim;
    for_each_tile<N>([&]<int I>() { V::template clear<I>(); });
    for (int64_t d = 0; d < b.phase.head_dim; d += b.at_once) {
      V::template load_tile<V::kActivations>(reinterpret_cast<const T*>(b.worker.heads()) + d, b.head_bytes());
      for_each_tile<N>([&]<int I>() {
        constexpr int W = V::kWeights + I % 3;
        const T* block = keys + (I * b.phase.head_dim + d) * kLanes;
        V::template load_tile<W>(block, 64);
        for (int64_t i = 0; i < b.at_once / 2; ++i) V::prefetch(ahead_of(block + i * kPair));
        V::template multiply_bf16<I, W>();
      });
    }
    for_each_tile<N>([&]<int I>() { V::template store_tile<I>(b.scores(0) + k + I * kLanes, kScoreBytes); });
  }

  // N * 16 elements from d on of the weighted sums, in place of the queries.
  template <int N>
  static void weigh(const Batch& b, int64_t d) {
    const int64_t stride = b.phase.head_dim_padded * 2;  // of two keys
    for_each_tile<N>([&]<int I>() { V::template clear<I>(); });
    for (int64_t k = b.all.begin; k < b.all.end; k += kTogether) {
      V::template load_tile<V::kActivations>(reinterpret_cast<const T*>(b.scores(0)) + k, kScoreBytes);
      const T* block = b.values + k / 2 * stride + d * 2;
      for_each_tile<N>([&]<int I>() {
        constexpr int W = V::kWeights + I % 3;
        V::template load_tile<W>(block + I * kPair, stride * 2);
        for (int64_t i = 0; i < kTogether / 2; ++i) V::prefetch(ahead_of(block + I * kPair + i * stride));
        V::template multiply_bf16<I, W>();
      });
    }
    for_each_tile<N>([&]<int I>() { V::template store_tile<I>(b.worker.heads() + d + I * kLanes, b.head_bytes()); });
  }

  // P queries against one chunk, or against each of two: products side by side, as two streams come faster than one,
  // with the bits of one after the other. Products are calls of their own, as what comes before and after them has
  // other floating-point control.
  template <int P, int CHUNKS>
  static void few(const Batch& b) {
    round_queries<V, RoundedToBf16<V>>(b.phase, b.query, P);
    {
      const typename V::UnitArithmetic as_the_unit;
      few_scores<P, CHUNKS>(b);
    }
    for (int c = 0; c < CHUNKS; ++c) {
      exponentiate_all<V, RoundedToBf16<V>>(b.worker, b.phase, b.query + c * P, P, b.all, b.scores(c * P),
                                            b.values + c * b.chunk);
    }
    const typename V::UnitArithmetic as_the_unit;
    few_weigh<P, CHUNKS>(b);
  }

  template <int P, int CHUNKS>
  [[gnu::noinline]] static void few_scores(const Batch& b) {
    const T* keys = b.keys + b.all.begin * b.phase.head_dim;
    for (int64_t k = b.all.begin; k < b.all.end; k += kLanes) {
      const Ahead ahead = b.template ahead<CHUNKS>(keys);
      F sum[CHUNKS][P];
      for (int c = 0; c < CHUNKS; ++c) {
        for (int p = 0; p < P; ++p) sum[c][p] = V::zero();
      }
      for (int64_t d = 0; d < b.phase.head_dim; d += b.at_once) {
        F even[CHUNKS][P], odd[CHUNKS][P];
        for (int c = 0; c < CHUNKS; ++c) {
          for (int p = 0; p < P; ++p) even[c][p] = odd[c][p] = V::zero();
        }
        for (int64_t i = d; i < d + b.at_once; i += 2, keys += kPair) {
          for (int c = 0; c < CHUNKS; ++c) {
            const typename V::Raw two = V::load_once(reinterpret_cast<const char*>(keys + c * b.chunk));
            ahead.prefetch(keys + c * b.chunk);
            for (int p = 0; p < P; ++p) {
              even[c][p] = V::fma(V::even_bf16(two), V::set1(b.query[p].q[i]), even[c][p]);
              odd[c][p] = V::fma(V::odd_bf16(two), V::set1(b.query[p].q[i + 1]), odd[c][p]);
            }
          }
        }
        for (int c = 0; c < CHUNKS; ++c) {
          for (int p = 0; p < P; ++p) sum[c][p] = V::add(sum[c][p], V::add(even[c][p], odd[c][p]));
        }
      }
      for (int c = 0; c < CHUNKS; ++c) {
        for (int p = 0; p < P; ++p) V::store(b.scores(c * P + p) + k, sum[c][p]);
      }
    }
  }
  template <int P, int CHUNKS>
  [[gnu::noinline]] static void few_weigh(const Batch& b) {
    constexpr int D = vectors_of(P * CHUNKS);
    const int64_t n_elements = b.phase.head_dim_padded;
    for (int p = 0; p < P * CHUNKS; ++p) {
      for (int64_t d = 0; d < n_elements; d += kLanes) V::store(b.result(p) + d, V::zero());
    }
    for (int64_t k = b.all.begin; k < b.end; k += kTogether) {
      int64_t d = 0;
      for (; d + D * kLanes <= n_elements; d += D * kLanes) few_weigh_block<P, CHUNKS, D>(b, k, d);
      for (; d < n_elements; d += kLanes) few_weigh_block<P, CHUNKS, 1>(b, k, d);
    }
  }
  // D vectors of elements from d on, values of one product from k on. What is prefetched is in the order of memory, not
  // of what is read, which comes back to these values for the next elements.
  template <int P, int CHUNKS, int D>
  static void few_weigh_block(const Batch& b, int64_t k, int64_t d) {
    const int64_t stride = b.phase.head_dim_padded * 2;
    const T* values = b.values + k / 2 * stride;
    const T* line = values + d * kTogether;
    values += d * 2;
    const Ahead ahead = b.template ahead<CHUNKS>(line);
    F even[CHUNKS][P][D], odd[CHUNKS][P][D];
    for (int c = 0; c < CHUNKS; ++c) {
      for (int p = 0; p < P; ++p) {
        for (int v = 0; v < D; ++v) even[c][p][v] = odd[c][p][v] = V::zero();
      }
    }
    const int64_t end = std::min(k + kTogether, b.end);  // behind it weights are zero, and values may be anything
    for (int64_t i = k; i < end; i += 2, values += stride, line += D * kPair) {
      for (int c = 0; c < CHUNKS; ++c) {
        for (int v = 0; v < D; ++v) {
          const int64_t at = c * b.chunk + v * kPair;
          const typename V::Raw two = V::load_once(reinterpret_cast<const char*>(values + at));
          ahead.prefetch(line + at);
          for (int p = 0; p < P; ++p) {
            const float* weights = b.scores(c * P + p) + i;
            even[c][p][v] = V::fma(V::even_bf16(two), V::set1(weights[0]), even[c][p][v]);
            odd[c][p][v] = V::fma(V::odd_bf16(two), V::set1(weights[1]), odd[c][p][v]);
          }
        }
      }
    }
    for (int c = 0; c < CHUNKS; ++c) {
      for (int p = 0; p < P; ++p) {
        for (int v = 0; v < D; ++v) {
          float* sum = b.result(c * P + p) + d + v * kLanes;
          V::store(sum, V::add(V::load(sum), V::add(even[c][p][v], odd[c][p][v])));
        }
      }
    }
  }
};

}  // namespace flashformer

// Queries against one chunk of the KV cache by a matrix unit: keys of 16 positions and values of 32 are its operands as
// they lie in the cache, up to 16 queries or their weights the other. It takes 0.3 us to wake up, so few queries take
// FMAs in its order: of a product even and odd elements each from zero, then both together. These give the same bits,
// but for the sign of a zero that ends a chunk, which merging chunks from +0 on takes away.
#pragma once

#include "../simd/amx.h"
#include "queries.h"

namespace flashformer {

// What FMAs take: fp32 that is bf16.
template <class V>
struct RoundedToBf16 {
  using X = float;
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
  static constexpr int kStep = 2, kFew = 4, kQueries = V::kMatrixRows;
  static constexpr int64_t kTogether = V::kMatrixBytes / 2;  // weights in a row of the unit's operand
  static constexpr int64_t kPair = 2 * kLanes;               // elements of the cache in a vector
  static constexpr int64_t kNearBytes = 1024;
  static_assert(kTogether == kValuesTogether && kKeyChunk % kTogether == 0);
  static void put(T* p, float x) { *p = to_bf16(x); }
  // Of values, whose sums for few queries registers hold.
  static constexpr int vectors_of(int queries) { return queries == 1 ? 4 : 2; }

  static void attend_batch(Worker& worker, const Phase& phase, Registers& registers, int n, const Query* query,
                           const T* keys, const T* values) {
    const Keys all = seen_by_any(query, n, kTogether);
    const Batch batch = {worker, phase, query, keys, values, all, elements_at_once(phase.head_dim)};
    for (int p = 0; p < n; ++p) {  // every worker's o_proj has read what lies there
      const char* result = reinterpret_cast<const char*>(batch.result(p));
      for (int64_t i = 0; i < phase.head_dim_padded * 4; i += 64) V::prefetch_to_write(result + i);
    }
    switch (n) {
      case 1:
        return few<1>(batch);
      case 2:
        return few<2>(batch);
      case 3:
        return few<3>(batch);
      case 4:
        return few<4>(batch);
      default:
        return many(batch, registers, n);
    }
  }

 private:
  struct Batch {
    const Worker& worker;
    const Phase& phase;
    const Query* query;
    const T *keys, *values;
    Keys all;
    int64_t at_once;

    // For few queries, of what is read: a line that follows soon, and the one at this place of the chunk's other half,
    // which is values while keys are read and keys of the next chunk while values are.
    void prefetch(const T* at) const {
      V::prefetch_far(reinterpret_cast<const char*>(at + (values - keys)));
      V::prefetch(reinterpret_cast<const char*>(at) + kNearBytes);
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

  // The unit takes query p as the p-th of worker.heads(), where it lies.
  static void many(const Batch& b, Registers& registers, int n) {
    round_queries<V, KvBf16Dot<V>>(b.phase, b.query, n);
    registers.set(n, b.at_once * 2);
    int64_t k = b.all.begin;
    for (; k + 4 * kLanes <= b.all.end; k += 4 * kLanes) score_keys<4>(b, k);
    for (; k < b.all.end; k += kLanes) score_keys<1>(b, k);
    exponentiate_all<V, KvBf16Dot<V>>(b.worker, b.phase, b.query, n, b.all, b.values);
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

  // Products are calls of their own, as what comes before and after them has other floating-point control.
  template <int P>
  static void few(const Batch& b) {
    round_queries<V, RoundedToBf16<V>>(b.phase, b.query, P);
    {
      const typename V::UnitArithmetic as_the_unit;
      few_scores<P>(b);
    }
    exponentiate_all<V, RoundedToBf16<V>>(b.worker, b.phase, b.query, P, b.all, b.values);
    const typename V::UnitArithmetic as_the_unit;
    few_weigh<P>(b);
  }

  template <int P>
  [[gnu::noinline]] static void few_scores(const Batch& b) {
    const T* keys = b.keys + b.all.begin * b.phase.head_dim;
    for (int64_t k = b.all.begin; k < b.all.end; k += kLanes) {
      F sum[P];
      for (int p = 0; p < P; ++p) sum[p] = V::zero();
      for (int64_t d = 0; d < b.phase.head_dim; d += b.at_once) {
        F even[P], odd[P];
        for (int p = 0; p < P; ++p) even[p] = odd[p] = V::zero();
        for (int64_t i = d; i < d + b.at_once; i += 2, keys += kPair) {
          const typename V::Raw two = V::load_once(reinterpret_cast<const char*>(keys));
          b.prefetch(keys);
          for (int p = 0; p < P; ++p) {
            even[p] = V::fma(V::even_bf16(two), V::set1(b.query[p].q[i]), even[p]);
            odd[p] = V::fma(V::odd_bf16(two), V::set1(b.query[p].q[i + 1]), odd[p]);
          }
        }
        for (int p = 0; p < P; ++p) sum[p] = V::add(sum[p], V::add(even[p], odd[p]));
      }
      for (int p = 0; p < P; ++p) V::store(b.scores(p) + k, sum[p]);
    }
  }
  template <int P>
  [[gnu::noinline]] static void few_weigh(const Batch& b) {
    constexpr int D = vectors_of(P);
    const int64_t n_elements = b.phase.head_dim_padded;
    for (int p = 0; p < P; ++p) {
      for (int64_t d = 0; d < n_elements; d += kLanes) V::store(b.result(p) + d, V::zero());
    }
    for (int64_t k = b.all.begin; k < b.all.end; k += kTogether) {
      int64_t d = 0;
      for (; d + D * kLanes <= n_elements; d += D * kLanes) few_weigh_block<P, D>(b, k, d);
      for (; d < n_elements; d += kLanes) few_weigh_block<P, 1>(b, k, d);
    }
  }
  // D vectors of elements from d on, values of one product from k on.
  template <int P, int D>
  static void few_weigh_block(const Batch& b, int64_t k, int64_t d) {
    const int64_t stride = b.phase.head_dim_padded * 2;
    const T* values = b.values + k / 2 * stride + d * 2;
    F even[P][D], odd[P][D];
    for (int p = 0; p < P; ++p) {
      for (int v = 0; v < D; ++v) even[p][v] = odd[p][v] = V::zero();
    }
    for (int64_t i = k; i < k + kTogether; i += 2, values += stride) {
      for (int v = 0; v < D; ++v) {
        const typename V::Raw two = V::load_once(reinterpret_cast<const char*>(values + v * kPair));
        b.prefetch(values + v * kPair);
        for (int p = 0; p < P; ++p) {
          even[p][v] = V::fma(V::even_bf16(two), V::set1(b.scores(p)[i]), even[p][v]);
          odd[p][v] = V::fma(V::odd_bf16(two), V::set1(b.scores(p)[i + 1]), odd[p][v]);
        }
      }
    }
    for (int p = 0; p < P; ++p) {
      for (int v = 0; v < D; ++v) {
        float* sum = b.result(p) + d + v * kLanes;
        V::store(sum, V::add(V::load(sum), V::add(even[p][v], odd[p][v])));
      }
    }
  }
};

}  // namespace flashformer

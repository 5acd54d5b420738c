// Prints what the inner loops of one instruction set add into: KIND ACCUMULATORS WEIGHTS VECTORS ROWS, a line for
// every instance of a product. Compiled with the flags of one isa_*.cpp; only constants are used, so it runs anywhere.
#include <cstdio>
#include <initializer_list>

#ifdef __AVX512F__
#include "simd/avx512.h"
using V = flashformer::Avx512;
constexpr int kRegisterBytes = 64;
#else
#include "simd/avx2.h"
using V = flashformer::Avx2;
constexpr int kRegisterBytes = 32;
#endif
#ifdef __AMX_TILE__
#include "phases/queries_matrix.h"
#endif
#include "phases/table.h"

using namespace flashformer;

namespace {

constexpr int kRegisters = sizeof(V::F) / kRegisterBytes;  // of one vector

void print(const char* kind, const char* weights, int vectors, int rows) {
  std::printf("%s %d %s %d %d\n", kind, vectors * rows * kRegisters, weights, vectors, rows);
}

#ifdef __AMX_TILE__
constexpr bool kMatrix = true;
#else
constexpr bool kMatrix = false;
#endif

// Instances of a product: one that asks for every line twice; one row alone has its own, without prefetches, unless a
// matrix unit is about, which takes bf16 and many rows, and one of two tiles side by side.
void print_product(const char* kind, const char* weights, AtOnce at_once, int tile, int rows) {
  for (int instance = 0; instance < (rows == 1 && !kMatrix ? 3 : 2); ++instance) {
    print(kind, weights, at_once.vectors_of(tile, rows), rows);
  }
  if (rows == 1 && at_once.pairs_of(tile)) print(kind, weights, 2 * tile, 1);
}

template <class W>
void plain(const char* kind, const char* weights) {
  for (int tile : {1, 2, 4}) {
    for (int rows = 1; rows <= W::kAtOnce.rows; ++rows) print_product(kind, weights, W::kAtOnce, tile, rows);
  }
}

template <template <class> class Codes>
void quantized(const char* weights) {
  for (int tile : {1, 2, 4}) {
    constexpr AtOnce kWide = QuantWide<V, Codes>::kAtOnce;
    for (int rows = 1; rows <= kWide.rows && !kMatrix; ++rows) print_product("fma", weights, kWide, tile, rows);
    if constexpr (Narrow<V>) {
      constexpr AtOnce kNarrow = QuantNarrow<V, Codes>::kAtOnce;
      for (int rows = 1; rows <= kNarrow.rows; ++rows) print_product("bytes", weights, kNarrow, tile, rows);
    }
  }
}

}  // namespace

int main() {
#ifndef __AMX_TILE__
  plain<WeightsF32<V>>("fma", "f32");
  plain<WeightsBf16<V>>("fma", "bf16");
  plain<WeightsF16<V>>("fma", "f16");
#endif
#if defined(__AVX512BF16__) && !defined(__AMX_TILE__)
  plain<WeightsBf16Dot<V>>("dot", "bf16");
#endif
#ifdef __AMX_TILE__
  for (int tile : {1, 2, 4}) {  // even k and odd k apart; by itself, as one tile, and of two side by side
    for (int vectors : {tile, tile, 2 * tile}) print("fma", "bf16", 2 * vectors, 1);
  }
  for (int queries = 1; queries <= KvBf16Matrix<Avx512Amx>::kFew; ++queries) {
    // scores, the last vectors of values, those before them
    for (int vectors : {1, 1, KvBf16Matrix<Avx512Amx>::vectors_of(queries)}) print("fma", "bf16", 2 * vectors, queries);
  }
#endif
  quantized<CodesInt8>("int8");
  quantized<CodesInt4>("int4");
  quantized<CodesNf4>("nf4");
  for (const char* cache : {"f32", "bf16", "f16"}) {
    if (kMatrix && cache[0] == 'b') continue;  // by dot products only
    for (int queries = 1; queries <= KvWide<V>::kQueries; ++queries) print("fma", cache, V::kValuesAtOnce, queries);
    for (int queries = 1; queries <= V::kQueriesAtOnce; ++queries) print("fma", cache, 2, queries);
  }
}

// AMX, the matrix unit of Intel's Xeons: registers of 16 rows of 64 bytes, and an instruction that multiplies two of
// them into a third. Instructions by name: intrinsics take the numbers of registers as tokens, and g++ 12 does not tell
// the compiler that they read memory.
#pragma once

#include <cstdint>
#include <utility>

#include "avx512.h"
#include "thread.h"

namespace flashformer {

struct Avx512Amx : Avx512 {
  static constexpr int kMatrixRows = 16;   // of activations, and columns of weights
  static constexpr int kMatrixBytes = 64;  // of k in a row of activations
  static constexpr int kActivations = 4;   // the register that holds them; those before it hold sums
  static constexpr int kWeights = 5;       // the first of three

  // How sums of `rows` rows, activations of k_bytes each, and weights of as many k lie in registers, which become zero.
  static void configure(int64_t rows, int64_t k_bytes) {
    struct {
      uint8_t palette, start, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } shape{};
    static_assert(sizeof(shape) == 64);
    shape.palette = 1;
    for (int i = 0; i < 8; ++i) {
      shape.row_bytes[i] = static_cast<uint16_t>(i == kActivations ? k_bytes : 64);
      shape.rows[i] = static_cast<uint8_t>(i < kWeights ? rows : k_bytes / 4);
    }
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  static void release() { asm volatile("tilerelease"); }

  template <int T>
  static void clear() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  // Rows `stride` bytes apart.
  template <int T>
  static void load_tile(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  static void store_tile(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
  }
  // sums[row][lane] += sum over even k of products + sum over odd k, each from zero by FMAs in order of k.
  template <int SUMS, int W>
  static void multiply_bf16() {
    asm volatile("tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(W), "i"(kActivations), "i"(SUMS));
  }
  // While one lives FMAs take subnormals as the unit does, for zeros.
  struct UnitArithmetic : FloatControl {
    UnitArithmetic() : FloatControl(_mm_getcsr() | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON) {}
  };
  // Into a register: g++ would load it again for each use, which made one row of bf16 4 % slower.
  static Raw load_once(const char* p) {
    Raw w = load_raw(p);
    asm("" : "+v"(w));
    return w;
  }
  static F set1_bf16(uint16_t x) { return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(x) << 16)); }
  static Raw subtract_bytes(Raw a, int b) { return _mm512_sub_epi8(a, _mm512_set1_epi8(static_cast<char>(b))); }
  // signed activations x weights, exact
  template <int SUMS, int W, bool SIGNED>
  static void multiply_bytes() {
    if constexpr (SIGNED) {
      asm volatile("tdpbssd %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(W), "i"(kActivations), "i"(SUMS));
    } else {
      asm volatile("tdpbsud %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(W), "i"(kActivations), "i"(SUMS));
    }
  }
};

// What registers are shaped for, changed where it must be: that costs as much as 10 products. One at a time in a
// thread.
template <class V>
class Shape {
 public:
  Shape() = default;
  Shape(const Shape&) = delete;
  Shape& operator=(const Shape&) = delete;
  ~Shape() {
    if (rows_ > 0) V::release();
  }
  void set(int64_t rows, int64_t k_bytes) const {
    if (rows == rows_ && k_bytes == k_bytes_) return;
    rows_ = rows;
    k_bytes_ = k_bytes;
    V::configure(rows, k_bytes);
  }

 private:
  mutable int64_t rows_ = 0, k_bytes_ = 0;
};

// f.template operator()<0>(), <1>() ... <N - 1>()
template <int N, class F>
inline void for_each_tile(F f) {
  [&]<int... T>(std::integer_sequence<int, T...>) {
    (f.template operator()<T>(), ...);
  }(std::make_integer_sequence<int, N>{});
}

}  // namespace flashformer

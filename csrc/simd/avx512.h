// Sixteen lanes in one AVX-512 register. One instruction per wrapper unless a line says otherwise.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "at_once.h"
#include "f4.h"

namespace flashformer {

struct Avx512 {
  using F = __m512;     // 16 floats
  using I = __m512i;    // 16 int32
  using Raw = __m512i;  // 64 bytes of packed weights

  // Whole tiles: one that is read in two passes comes at half the speed.
  static constexpr AtOnce kPlain = {6, 8, 4};    // weights as they are
  static constexpr AtOnce kWidened = {4, 8, 4};  // 16-bit weights become fp32
  static constexpr AtOnce kCodes = {4, 8, 4};    // of quantized weights, and int8 rows
  static constexpr AtOnce kLookups = {4, 8, 4};  // the same through a codebook
  static constexpr int kWideCodeRows = 4;
  static constexpr int kQueriesAtOnce = 4;  // whose scores are summed together
  static constexpr int kValuesAtOnce = 4;   // vectors of head_dim summed together by attention
  static constexpr int kByteBias = 128;     // dot_bytes takes codes as they are, unsigned

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // a * 2^n, n integral and in [-126, 127]
  static F scale(F a, F n) { return _mm512_scalef_ps(a, n); }
  // lanes below n keep a, the others take b
  static F first(int64_t n, F a, F b) {
    return _mm512_mask_blend_ps(static_cast<__mmask16>((1u << (n < 16 ? n : 16)) - 1), b, a);
  }

  static Quarters quarters(F x) {
    return {_mm512_castps512_ps128(x), _mm512_extractf32x4_ps(x, 1), _mm512_extractf32x4_ps(x, 2),
            _mm512_extractf32x4_ps(x, 3)};
  }
  static bool all_zero(F x) { return _mm512_cmp_ps_mask(x, zero(), _CMP_EQ_OQ) == 0xFFFF; }  // NaN is not

  static F load_bf16(const uint16_t* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  // rounds to nearest even
  static void store_bf16(uint16_t* p, F x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
  }

  static Raw load_raw(const char* p) { return _mm512_loadu_si512(p); }
  static void store_raw(char* p, Raw w) { _mm512_storeu_si512(p, w); }
  static F as_f32(Raw w) { return _mm512_castsi512_ps(w); }
  // of 16 pairs of bf16: the first of each, the second of each
  static F even_bf16(Raw w) { return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)); }
  static F odd_bf16(Raw w) { return _mm512_castsi512_ps(_mm512_maskz_mov_epi16(0xAAAAAAAAu, w)); }
#ifdef __AVX512BF16__
  // Rounds to nearest even, subnormals to zero, as the dot product takes them; gives what they are now.
  static F round_bf16(uint16_t* p, F x) {
    const __m256i bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  // acc += w[2i] * x[0] + w[2i+1] * x[1] in each lane i
  static F dot_bf16(F acc, Raw w, const uint16_t* x) {
    int pair;
    __builtin_memcpy(&pair, x, 4);
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)));
  }
#endif
  static F load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // of 16 pairs of f16: the first of each, the second of each
  static F even_f16(Raw w) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(w)); }
  static F odd_f16(Raw w) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(w, 16))); }
  static I set1_i(int32_t x) { return _mm512_set1_epi32(x); }
  static I mul_i(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static I load_i(const int32_t* p) { return _mm512_loadu_si512(p); }
  static I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
  static I load_u8(const char* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F to_f32(I a) { return _mm512_cvtepi32_ps(a); }
  static I to_i(F x) { return _mm512_cvtps_epi32(x); }  // rounds to nearest even
  static void store_i8(int8_t* p, I x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x)); }
  static Raw low_nibbles(Raw w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
  static Raw high_nibbles(Raw w) { return _mm512_and_si512(_mm512_srli_epi16(w, 4), _mm512_set1_epi8(15)); }
  static Raw lookup(const uint8_t (&table)[16], Raw codes) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))), codes);
  }
  // unsigned byte B of each lane
  template <int B>
  static F byte(Raw w) {
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(w, 8 * B), _mm512_set1_epi32(255)));
  }
#ifdef __AVX512VNNI__
  // 4 int8 of a row. Of one row the instruction broadcasts them: a register that holds them for all vectors costs an
  // eighth of the bandwidth of memory. Several rows would load more than a core can.
  template <int ROWS>
  static auto broadcast4(const int8_t* x) {
    if constexpr (ROWS == 1) {
      return x;
    } else {
      Raw four;
      asm("vpbroadcastd %1, %0" : "=v"(four) : "m"(*reinterpret_cast<const int8_t (*)[4]>(x)));
      return four;
    }
  }
  // acc + sum of 4 unsigned bytes of each lane * x. By its name: g++ 12 moves accumulators about in the intrinsic.
  static I dot_bytes(I acc, Raw w, const int8_t* x) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*reinterpret_cast<const int8_t (*)[4]>(x)));
    return acc;
  }
  static I dot_bytes(I acc, Raw w, Raw x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return acc;
  }
  template <class X4>
  static I dot_nibbles(I acc, Raw w, X4 x) {
    return dot_bytes(acc, w, x);
  }
#endif
  static void prefetch(const char* p) { _mm_prefetch(p, _MM_HINT_T0); }      // into the first level of caches
  static void prefetch_far(const char* p) { _mm_prefetch(p, _MM_HINT_T1); }  // into the second
  static void prefetch_to_write(const char* p) { asm volatile("prefetchw %0" ::"m"(*p)); }
};

}  // namespace flashformer

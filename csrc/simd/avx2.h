// Sixteen lanes in two AVX2 registers.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "at_once.h"
#include "f4.h"

namespace flashformer {

struct Avx2 {
  struct F {
    __m256 a, b;
  };
  struct Raw {
    __m256i a, b;
  };
  using I = Raw;

  static constexpr AtOnce kPlain = {2, 4, 2};
  static constexpr AtOnce kWidened = {2, 4, 1};
  static constexpr AtOnce kCodes = {2, 2, 1};
  static constexpr AtOnce kLookups = {1, 1, 1};
  static constexpr int kWideCodeRows = 1;
  static constexpr int kQueriesAtOnce = 2;
  static constexpr int kValuesAtOnce = 1;
  static constexpr int kByteBias = 0;  // dot_bytes makes codes signed

  static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
  }
  static F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  static F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  static F abs(F x) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    return {_mm256_and_ps(x.a, magnitude), _mm256_and_ps(x.b, magnitude)};
  }
  static F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  static F round(F x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
  }
  static F scale(F x, F n) { return {scale8(x.a, n.a), scale8(x.b, n.b)}; }
  static F first(int64_t n, F x, F y) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i count = _mm256_set1_epi32(static_cast<int>(n < 16 ? n : 16));
    const __m256i low = _mm256_cmpgt_epi32(count, lane);
    const __m256i high = _mm256_cmpgt_epi32(count, _mm256_add_epi32(lane, _mm256_set1_epi32(8)));
    return {_mm256_blendv_ps(y.a, x.a, _mm256_castsi256_ps(low)),
            _mm256_blendv_ps(y.b, x.b, _mm256_castsi256_ps(high))};
  }

  static Quarters quarters(F x) {
    return {_mm256_castps256_ps128(x.a), _mm256_extractf128_ps(x.a, 1), _mm256_castps256_ps128(x.b),
            _mm256_extractf128_ps(x.b, 1)};
  }
  static bool all_zero(F x) {
    const __m256 none = _mm256_setzero_ps();
    const __m256 both = _mm256_and_ps(_mm256_cmp_ps(x.a, none, _CMP_EQ_OQ), _mm256_cmp_ps(x.b, none, _CMP_EQ_OQ));
    return _mm256_movemask_ps(both) == 0xFF;
  }

  static F load_bf16(const uint16_t* p) { return {widen8(p), widen8(p + 8)}; }
  static void store_bf16(uint16_t* p, F x) {
    __m256i packed = _mm256_packus_epi32(round8(x.a), round8(x.b));  // 0..3 of a, of b, 4..7 of a, of b
    packed = _mm256_permute4x64_epi64(packed, 0xD8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
  }

  static Raw load_raw(const char* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
  }
  static F as_f32(Raw w) { return {_mm256_castsi256_ps(w.a), _mm256_castsi256_ps(w.b)}; }
  static F even_bf16(Raw w) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(w.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(w.b, 16))};
  }
  static F odd_bf16(Raw w) {
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
    return {_mm256_castsi256_ps(_mm256_and_si256(w.a, mask)), _mm256_castsi256_ps(_mm256_and_si256(w.b, mask))};
  }
  static F load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
  }
  static F even_f16(Raw w) {
    const __m256i mask = _mm256_set1_epi32(0xFFFF);
    return widen_f16(_mm256_and_si256(w.a, mask), _mm256_and_si256(w.b, mask));
  }
  static F odd_f16(Raw w) { return widen_f16(_mm256_srli_epi32(w.a, 16), _mm256_srli_epi32(w.b, 16)); }
  static I set1_i(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  static I mul_i(I x, I y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
  static I load_u8(const char* p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))};
  }
  static F to_f32(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
  static I add_i(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
  static I to_i(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }  // rounds to nearest even
  static void store_i8(int8_t* p, I x) {
    __m256i words = _mm256_packs_epi32(x.a, x.b);
    words = _mm256_permute4x64_epi64(words, 0xD8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  }
  static Raw low_nibbles(Raw w) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(w.a, mask), _mm256_and_si256(w.b, mask)};
  }
  static Raw high_nibbles(Raw w) { return low_nibbles({_mm256_srli_epi16(w.a, 4), _mm256_srli_epi16(w.b, 4)}); }
  static Raw lookup(const uint8_t (&table)[16], Raw codes) {
    const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    return {_mm256_shuffle_epi8(t, codes.a), _mm256_shuffle_epi8(t, codes.b)};
  }
  template <int B>
  static F byte(Raw w) {
    return {byte8<B>(w.a), byte8<B>(w.b)};
  }
  // 4 int8 of a row, in every lane
  template <int>
  static __m256i broadcast4(const int8_t* x) {
    int four;
    __builtin_memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
  }
  // acc + sum of (byte - 128) * x of 4 bytes of each lane: |w| times x with the sign of w, which cannot saturate
  static I dot_bytes(I acc, Raw w, __m256i x) { return {dot_signed8(acc.a, w.a, x), dot_signed8(acc.b, w.b, x)}; }
  // acc + sum of byte * x, bytes below 16
  static I dot_nibbles(I acc, Raw w, __m256i x) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(_mm256_maddubs_epi16(w.a, x), ones)),
            _mm256_add_epi32(acc.b, _mm256_madd_epi16(_mm256_maddubs_epi16(w.b, x), ones))};
  }
  static void prefetch(const char* p) { _mm_prefetch(p, _MM_HINT_T0); }      // into the first level of caches
  static void prefetch_far(const char* p) { _mm_prefetch(p, _MM_HINT_T1); }  // into the second
  static void prefetch_to_write(const char* p) { asm volatile("prefetchw %0" ::"m"(*p)); }

 private:
  static __m256i dot_signed8(__m256i acc, __m256i codes, __m256i x) {
    const __m256i w = _mm256_xor_si256(codes, _mm256_set1_epi8(static_cast<char>(0x80)));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  template <int B>
  static __m256 byte8(__m256i w) {
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(w, 8 * B), _mm256_set1_epi32(255)));
  }
  // f16 bits in the low halves of 16 lanes
  static F widen_f16(__m256i a, __m256i b) {
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xD8);
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(packed)), _mm256_cvtph_ps(_mm256_extracti128_si256(packed, 1))};
  }
  static __m256 scale8(__m256 x, __m256 n) {
    __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(exponent));
  }
  static __m256 widen8(const uint16_t* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  // bf16 bits of each lane, rounded to nearest even
  static __m256i round8(__m256 x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    return _mm256_srli_epi32(bits, 16);
  }
};

}  // namespace flashformer

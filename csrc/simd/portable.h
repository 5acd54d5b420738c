// Sixteen lanes as four 4-wide compiler vectors: what every CPU can run. Products and sums are rounded separately.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "at_once.h"
#include "f4.h"

namespace flashformer {

struct Portable {
  using U4 = uint32_t __attribute__((vector_size(16)));
  using I4 = int32_t __attribute__((vector_size(16)));
  struct F {
    F4 q[4];
  };
  struct Raw {
    U4 q[4];
  };
  struct I {
    I4 q[4];
  };

  static constexpr AtOnce kPlain = {2, 1, 1};
  static constexpr AtOnce kWidened = kPlain;
  static constexpr AtOnce kCodes = kPlain;
  static constexpr AtOnce kLookups = kPlain;
  static constexpr int kWideCodeRows = 2;
  static constexpr int kQueriesAtOnce = 4;
  static constexpr int kValuesAtOnce = 1;
  static constexpr int kByteBias = 128;

  template <class Fn>
  static F each(Fn fn) {
    return {{fn(0), fn(1), fn(2), fn(3)}};
  }
  static F set1(float x) {
    return each([&](int) { return F4{x, x, x, x}; });
  }
  static F zero() { return set1(0); }
  static F load(const float* p) {
    F r;
    std::memcpy(&r, p, 64);
    return r;
  }
  static void store(float* p, F x) { std::memcpy(p, &x, 64); }
  static F add(F x, F y) {
    return each([&](int i) { return x.q[i] + y.q[i]; });
  }
  static F sub(F x, F y) {
    return each([&](int i) { return x.q[i] - y.q[i]; });
  }
  static F mul(F x, F y) {
    return each([&](int i) { return x.q[i] * y.q[i]; });
  }
  static F div(F x, F y) {
    return each([&](int i) { return x.q[i] / y.q[i]; });
  }
  static F max(F x, F y) {
    return each([&](int i) { return x.q[i] > y.q[i] ? x.q[i] : y.q[i]; });
  }
  static F min(F x, F y) {
    return each([&](int i) { return x.q[i] < y.q[i] ? x.q[i] : y.q[i]; });
  }
  static F abs(F x) {
    return each([&](int i) { return std::bit_cast<F4>(std::bit_cast<U4>(x.q[i]) & 0x7FFFFFFFu); });
  }
  static F fma(F x, F y, F z) { return add(mul(x, y), z); }
  // |x| below 2^22: adding 1.5 * 2^23 leaves no room for a fraction
  static F round(F x) { return sub(add(x, set1(12582912.0f)), set1(12582912.0f)); }
  static F scale(F x, F n) {
    return each([&](int i) {
      I4 exponent = (__builtin_convertvector(n.q[i], I4) + 127) << 23;
      return x.q[i] * std::bit_cast<F4>(exponent);
    });
  }
  static F first(int64_t n, F x, F y) {
    return each([&](int i) {
      int32_t left = static_cast<int32_t>(n) - 4 * i;
      I4 keep = I4{0, 1, 2, 3} < I4{left, left, left, left};
      return keep ? x.q[i] : y.q[i];
    });
  }

  static Quarters quarters(F x) { return {x.q[0], x.q[1], x.q[2], x.q[3]}; }
  static bool all_zero(F x) {
    bool zero = true;
    for (int i = 0; i < 16; ++i) zero = zero && x.q[i / 4][i % 4] == 0;
    return zero;
  }

  static F load_bf16(const uint16_t* p) {
    return each([&](int i) {
      U4 bits = {p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]};
      bits <<= 16;
      return std::bit_cast<F4>(bits);
    });
  }
  static void store_bf16(uint16_t* p, F x) {
    for (int i = 0; i < 16; ++i) {
      uint32_t bits = std::bit_cast<U4>(x.q[i / 4])[i % 4];
      p[i] = static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    }
  }

  static Raw load_raw(const char* p) {
    Raw r;
    std::memcpy(&r, p, 64);
    return r;
  }
  static F as_f32(Raw w) {
    return each([&](int i) { return std::bit_cast<F4>(w.q[i]); });
  }
  static F even_bf16(Raw w) {
    return each([&](int i) {
      U4 bits = w.q[i] << 16;
      return std::bit_cast<F4>(bits);
    });
  }
  static F odd_bf16(Raw w) {
    return each([&](int i) {
      U4 bits = w.q[i] & 0xFFFF0000u;
      return std::bit_cast<F4>(bits);
    });
  }
  static F load_f16(const uint16_t* p) {
    return each([&](int i) { return widen_f16(U4{p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]}); });
  }
  static F even_f16(Raw w) {
    return each([&](int i) { return widen_f16(w.q[i] & 0xFFFFu); });
  }
  static F odd_f16(Raw w) {
    return each([&](int i) { return widen_f16(w.q[i] >> 16); });
  }
  static I set1_i(int32_t x) {
    const I4 all = {x, x, x, x};
    return {{all, all, all, all}};
  }
  static I mul_i(I x, I y) { return {{x.q[0] * y.q[0], x.q[1] * y.q[1], x.q[2] * y.q[2], x.q[3] * y.q[3]}}; }
  static I load_u8(const char* p) {
    I r;
    for (int i = 0; i < 16; ++i) r.q[i / 4][i % 4] = static_cast<uint8_t>(p[i]);
    return r;
  }
  static F to_f32(I x) {
    return each([&](int i) { return __builtin_convertvector(x.q[i], F4); });
  }
  static I add_i(I x, I y) { return {{x.q[0] + y.q[0], x.q[1] + y.q[1], x.q[2] + y.q[2], x.q[3] + y.q[3]}}; }
  static I to_i(F x) {  // |x| below 2^22; rounds to nearest even
    const F r = round(x);
    I i;
    for (int q = 0; q < 4; ++q) i.q[q] = __builtin_convertvector(r.q[q], I4);
    return i;
  }
  static void store_i8(int8_t* p, I x) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(x.q[i / 4][i % 4]);
  }
  static Raw low_nibbles(Raw w) { return {{w.q[0] & kLow, w.q[1] & kLow, w.q[2] & kLow, w.q[3] & kLow}}; }
  static Raw high_nibbles(Raw w) { return low_nibbles({{w.q[0] >> 4, w.q[1] >> 4, w.q[2] >> 4, w.q[3] >> 4}}); }
  static Raw lookup(const uint8_t (&table)[16], Raw codes) {
    uint8_t bytes[64];
    std::memcpy(bytes, &codes, 64);
    for (uint8_t& byte : bytes) byte = table[byte & 15];
    std::memcpy(&codes, bytes, 64);
    return codes;
  }
  template <int B>
  static F byte(Raw w) {
    return each([&](int i) { return __builtin_convertvector((w.q[i] >> (8 * B)) & 0xFFu, F4); });
  }
  // 4 int8 of a row
  template <int>
  static const int8_t* broadcast4(const int8_t* x) {
    return x;
  }
  static I dot_bytes(I acc, Raw w, const int8_t* x) {
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 4; ++j) {
        acc.q[i] += __builtin_convertvector((w.q[i] >> (8 * j)) & 0xFFu, I4) * static_cast<int32_t>(x[j]);
      }
    }
    return acc;
  }
  static I dot_nibbles(I acc, Raw w, const int8_t* x) { return dot_bytes(acc, w, x); }
  static void prefetch(const char* p) { __builtin_prefetch(p); }            // into the first level of caches
  static void prefetch_far(const char* p) { __builtin_prefetch(p, 0, 2); }  // into the second
  static void prefetch_to_write(const char* p) { __builtin_prefetch(p, 1); }

 private:
  static constexpr uint32_t kLow = 0x0F0F0F0Fu;
  // f16 bits in the low halves: exponent and fraction moved into place, then the exponent's bias corrected by a
  // product, which normalises subnormals too. Weights are finite; a cache may hold Inf and NaN, whose exponent is set
  // apart.
  static F4 widen_f16(U4 half) {
    const U4 magnitude = (half & 0x7FFFu) << 13;
    const F4 scaled = std::bit_cast<F4>(magnitude) * 0x1p112f;
    const U4 special = std::bit_cast<U4>(magnitude >= 0x7C00u << 13) & 0x7F800000u;
    return std::bit_cast<F4>(std::bit_cast<U4>(scaled) | special | (half & 0x8000u) << 16);
  }
};

}  // namespace flashformer

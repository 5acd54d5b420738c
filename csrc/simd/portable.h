// Sixteen lanes as four 4-wide compiler vectors: what every CPU can run. Products and sums are rounded separately.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace flashformer {

struct Portable {
  using F4 = float __attribute__((vector_size(16)));
  using U4 = uint32_t __attribute__((vector_size(16)));
  using I4 = int32_t __attribute__((vector_size(16)));
  struct F {
    F4 q[4];
  };
  struct Raw {
    U4 q[4];
  };

  static constexpr int kRowsAtOnce = 2;
  static constexpr int kVectorsOneRow = 1;
  static constexpr int kVectorsManyRows = 1;
  static constexpr int kValuesAtOnce = 1;

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
  static void prefetch(const char* p) { __builtin_prefetch(p); }

 private:
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

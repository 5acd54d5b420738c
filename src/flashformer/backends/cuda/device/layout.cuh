// Types of fixed width, and the few macros that let the same source be compiled for a GPU and, with FF_HOST, for the
// CPU. Nothing is included from outside: NVRTC has no headers.
#pragma once

#ifdef FF_HOST
#define DEVICE
#define COLD
#else
#define DEVICE __device__ __attribute__((always_inline))
#define COLD __device__ __attribute__((noinline))  // what hardly ever runs: one copy, out of the way
#endif

// Before a loop: how many passes are laid out one after another.
#ifdef FF_HOST
#define UNROLL(n)
#else
#define UNROLL_PRAGMA(text) _Pragma(#text)
#define UNROLL(n) UNROLL_PRAGMA(unroll n)
#endif

namespace flashformer {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i8 = signed char;
using i16 = short;
using i32 = int;
using i64 = long long;
using f32 = float;
using f64 = double;

static_assert(sizeof(u8) == 1 && sizeof(u16) == 2 && sizeof(u32) == 4 && sizeof(u64) == 8);
static_assert(sizeof(f32) == 4 && sizeof(f64) == 8);

// What one load or store moves besides numbers: 8 and 16 bytes.
struct alignas(8) u32x2 {
  u32 x, y;
};
struct alignas(16) u32x4 {
  u32 x, y, z, w;
};
struct alignas(8) f32x2 {
  f32 x, y;
};
struct alignas(16) f32x4 {
  f32 x, y, z, w;
};

// Bits of a number, and back. NVRTC has no __builtin_memcpy.
template <class To, class From>
inline DEVICE To bit_copy(From from) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, from);
}

}  // namespace flashformer

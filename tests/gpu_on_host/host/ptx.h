// The wrappers of ptx.cuh for a kernel that runs on the CPU: the same names and arguments, every access checked.
// A call knows its own place in the source through default arguments, so device sources need no change.
#pragma once

#ifndef FF_HOST
#error "ptx.h is for host builds, which define FF_HOST"
#endif

#include "calls.h"
#include "numbers.h"

namespace flashformer {

#define AT const char *file = __builtin_FILE(), u32 line = __builtin_LINE()
#define HERE \
  sim::At { file, line }

inline u32 thread_index() { return sim::thread_index(); }
inline u32 warp_index() { return sim::thread_index() / 32; }
inline u32 lane_index() { return sim::thread_index() % 32; }
inline u32 block_index() { return sim::block_index(); }
inline u32 n_blocks() { return sim::n_blocks(); }
inline u32 shared_base() { return sim::kSharedBase; }
template <class T>
inline const T& shared_record(u32, const T& source) {
  return source;
}

template <class T>
constexpr bool kAccessible = sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0 && __is_trivially_copyable(T);

template <class T>
T ld_shared(u32 a, AT) {
  static_assert(kAccessible<T>);
  T value;
  sim::load_shared(&value, a, sizeof(T), HERE);
  return value;
}
template <class T>
void st_shared(u32 a, T value, AT) {
  static_assert(kAccessible<T>);
  sim::store_shared(a, &value, sizeof(T), HERE);
}
template <class T>
T ld_global(const T* p, AT) {
  static_assert(kAccessible<T>);
  T value;
  sim::load_global(&value, p, sizeof(T), HERE);
  return value;
}
template <class T>
void st_global(T* p, T value, AT) {
  static_assert(kAccessible<T>);
  sim::store_global(p, &value, sizeof(T), HERE);
}
template <class T>
T ld_const(const T* p, AT) {
  static_assert(kAccessible<T>);
  T value;
  sim::load_const(&value, p, sizeof(T), HERE);
  return value;
}
inline void prefetch_l2_bulk(const void* p, u32 bytes, AT) { sim::prefetch(p, bytes, HERE); }

inline void bar_sync(Site site, u32 id, u32 n_threads, AT) { sim::bar_sync(site, id, n_threads, HERE); }
inline void warp_sync(Site site, AT) { sim::warp_sync(site, HERE); }

inline void mbar_init(u32 bar, u32 count, AT) { sim::mbar_init(bar, count, HERE); }
inline void fence_mbar_init(Site site, AT) { sim::fence_mbar_init(site, HERE); }
inline void mbar_arrive(Site site, u32 bar, AT) { sim::mbar_arrive(site, bar, HERE); }
inline void mbar_arrive_expect_tx(Site site, u32 bar, u32 bytes, AT) {
  sim::mbar_arrive_expect_tx(site, bar, bytes, HERE);
}
inline bool mbar_try_wait(Site site, u32 bar, u32 parity, AT) { return sim::mbar_try_wait(site, bar, parity, HERE); }
inline void fence_proxy_async(Site site, AT) { sim::fence_proxy_async(site, HERE); }
inline u64 policy_evict_first() { return 0; }
inline void bulk_copy(u32 dst, const void* src, u32 bytes, u32 bar, AT) { sim::bulk_copy(dst, src, bytes, bar, HERE); }

inline void fence_gpu(Site site, AT) { sim::fence_gpu(site, HERE); }
inline void red_relaxed_add(Site site, u32* p, u32 v, AT) { sim::red_relaxed_add(site, p, v, HERE); }
inline u32 ld_acquire(Site site, const u32* p, AT) { return sim::ld_acquire(site, p, HERE); }
inline u32 atom_add_relaxed(Site site, u32* p, u32 v, AT) { return sim::atom_add_relaxed(site, p, v, HERE); }
inline u32 atom_add_acq_rel(Site site, u32* p, u32 v, AT) { return sim::atom_add_acq_rel(site, p, v, HERE); }
inline u32 ld_relaxed(const u32* p, AT) { return sim::ld_relaxed(p, HERE); }
inline void st_relaxed(u32* p, u32 v, AT) { sim::st_relaxed(p, v, HERE); }

inline u32 shfl_xor_u32(u32 v, u32 mask, AT) { return sim::shuffle(sim::Call::shfl_xor, v, mask, HERE); }
inline i32 shfl_xor_i32(i32 v, u32 mask, AT) {
  return static_cast<i32>(sim::shuffle(sim::Call::shfl_xor, static_cast<u32>(v), mask, HERE));
}
inline f32 shfl_xor_f32(f32 v, u32 mask, AT) {
  return bit_copy<f32>(sim::shuffle(sim::Call::shfl_xor, bit_copy<u32>(v), mask, HERE));
}
inline u32 shfl_idx_u32(u32 v, u32 lane, AT) { return sim::shuffle(sim::Call::shfl_idx, v, lane, HERE); }
inline i32 shfl_idx_i32(i32 v, u32 lane, AT) {
  return static_cast<i32>(sim::shuffle(sim::Call::shfl_idx, static_cast<u32>(v), lane, HERE));
}
inline f32 shfl_idx_f32(f32 v, u32 lane, AT) {
  return bit_copy<f32>(sim::shuffle(sim::Call::shfl_idx, bit_copy<u32>(v), lane, HERE));
}
inline u32 ballot(bool value, AT) { return sim::ballot(value, HERE); }

inline void mma_bf16(f32 (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, AT) {
  sim::mma(sim::Call::mma_bf16, c, {a0, a1, a2, a3}, {b0, b1}, HERE);
}
inline void mma_f16(f32 (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, AT) {
  sim::mma(sim::Call::mma_f16, c, {a0, a1, a2, a3}, {b0, b1}, HERE);
}

#undef AT
#undef HERE

inline u32 cvt_bf16x2(f32 lo, f32 hi) { return sim::f32_to_bf16(lo) | static_cast<u32>(sim::f32_to_bf16(hi)) << 16; }
inline u32 cvt_f16x2(f32 lo, f32 hi) { return sim::f32_to_f16(lo) | static_cast<u32>(sim::f32_to_f16(hi)) << 16; }
inline f32 f16_to_f32(u16 x) { return sim::f16_to_f32(x); }
inline f32 bf16_to_f32(u16 x) { return sim::bf16_to_f32(x); }

// Rounded twice, to f32 and to f16, but never differently from once: 24 bits are at least 2 * 11 + 2.
inline u32 sub_f16x2(u32 x, u32 y) {
  const f32 lo = f16_to_f32(static_cast<u16>(x)) - f16_to_f32(static_cast<u16>(y));
  const f32 hi = f16_to_f32(static_cast<u16>(x >> 16)) - f16_to_f32(static_cast<u16>(y >> 16));
  return cvt_f16x2(lo, hi);
}

inline u32 fma_f16x2(u32 a, u32 b, u32 c) {
  const f32 lo = sim::fma_f16(static_cast<u16>(a), static_cast<u16>(b), static_cast<u16>(c));
  const f32 hi = sim::fma_f16(static_cast<u16>(a >> 16), static_cast<u16>(b >> 16), static_cast<u16>(c >> 16));
  return cvt_f16x2(lo, hi);
}

inline u32 opaque(u32 x) { return x; }
inline u32 and_or(u32 a, u32 b, u32 c) { return (a & b) | c; }

inline u32 prmt(u32 a, u32 b, u32 sel) {
  const u64 bytes = static_cast<u64>(b) << 32 | a;
  u32 result = 0;
  for (u32 i = 0; i < 4; ++i) {
    const u32 pick = sel >> 4 * i & 15;
    u32 byte = static_cast<u32>(bytes >> 8 * (pick & 7)) & 0xFF;
    if (pick & 8) byte = byte & 0x80 ? 0xFF : 0;
    result |= byte << 8 * i;
  }
  return result;
}

inline f32 fma_f32(f32 a, f32 b, f32 c) { return __builtin_fmaf(a, b, c); }
inline f32 sqrt_f32(f32 x) { return __builtin_sqrtf(x); }
inline f32 max_f32(f32 a, f32 b) { return __builtin_fmaxf(a, b); }

inline u64 clock_cycles() { return sim::clock_cycles(); }
inline u64 clock_ns() { return sim::clock_cycles() / 2; }
inline void nanosleep(u32 ns, const char* file = __builtin_FILE(), u32 line = __builtin_LINE()) {
  sim::nanosleep(ns, {file, line});
}

}  // namespace flashformer

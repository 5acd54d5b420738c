// What the kernel needs and C++ has no word for: an instruction per wrapper, the only file with inline PTX (ISA 8.x).
// All shared memory and all global memory that changes during a launch is accessed through these, so that the host
// build (tests/gpu_on_host) can put its own in their place and check every access. `Site` is for that build only.
// Shared addresses are u32 bytes of the shared window; T has 1, 2, 4, 8 or 16 bytes and lies at a multiple of its size.
#pragma once

#include "layout.cuh"
#include "sites.h"

#ifndef FF_HOST

namespace flashformer {

inline DEVICE u32 thread_index() { return threadIdx.x; }
inline DEVICE u32 warp_index() { return threadIdx.x / 32; }
inline DEVICE u32 lane_index() { return threadIdx.x % 32; }
inline DEVICE u32 block_index() { return blockIdx.x; }
inline DEVICE u32 n_blocks() { return gridDim.x; }
alignas(1024) extern __shared__ u8 dynamic_shared[];  // records are read from it by loads of 16 bytes
inline DEVICE u32 shared_base() { return static_cast<u32>(__cvta_generic_to_shared(dynamic_shared)); }

// A record at `offset` of the block's shared memory, which is a copy of `source`: read as plain C++, no instruction.
template <class T>
inline DEVICE const T& shared_record(u32 offset, const T&) {
  return *reinterpret_cast<const T*>(dynamic_shared + offset);
}

// ---- memory. A volatile asm keeps its place among the other volatile ones, barriers included.

template <class T>
inline DEVICE T ld_shared(u32 a) {
  static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0);
  if constexpr (sizeof(T) == 16) {
    u32x4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a));
    return bit_copy<T>(v);
  } else if constexpr (sizeof(T) == 8) {
    u64 v;
    asm volatile("ld.shared.u64 %0, [%1];" : "=l"(v) : "r"(a));
    return bit_copy<T>(v);
  } else if constexpr (sizeof(T) == 4) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(a));
    return bit_copy<T>(v);
  } else if constexpr (sizeof(T) == 2) {
    u16 v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(a));
    return bit_copy<T>(v);
  } else {
    u32 v;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(a));
    return bit_copy<T>(static_cast<u8>(v));
  }
}

template <class T>
inline DEVICE void st_shared(u32 a, T value) {
  static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0);
  if constexpr (sizeof(T) == 16) {
    const u32x4 v = bit_copy<u32x4>(value);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(a), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.shared.u64 [%0], %1;" ::"r"(a), "l"(bit_copy<u64>(value)) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(a), "r"(bit_copy<u32>(value)) : "memory");
  } else if constexpr (sizeof(T) == 2) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(a), "h"(bit_copy<u16>(value)) : "memory");
  } else {
    asm volatile("st.shared.u8 [%0], %1;" ::"r"(a), "r"(static_cast<u32>(bit_copy<u8>(value))) : "memory");
  }
}

// Global memory that changes during the launch: relaxed at gpu scope, so never from L1, which is not coherent.
template <class T>
inline DEVICE T ld_global(const T* p) {
  static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0);
  if constexpr (sizeof(T) == 16) {
    u32x4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return bit_copy<T>(v);
  } else if constexpr (sizeof(T) == 8) {
    u64 v;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p));
    return bit_copy<T>(v);
  } else if constexpr (sizeof(T) == 4) {
    u32 v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return bit_copy<T>(v);
  } else if constexpr (sizeof(T) == 2) {
    u16 v;
    asm volatile("ld.relaxed.gpu.global.u16 %0, [%1];" : "=h"(v) : "l"(p));
    return bit_copy<T>(v);
  } else {
    u32 v;
    asm volatile("ld.relaxed.gpu.global.u8 %0, [%1];" : "=r"(v) : "l"(p));
    return bit_copy<T>(static_cast<u8>(v));
  }
}

template <class T>
inline DEVICE void st_global(T* p, T value) {
  static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0);
  if constexpr (sizeof(T) == 16) {
    const u32x4 v = bit_copy<u32x4>(value);
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.global.u64 [%0], %1;" ::"l"(p), "l"(bit_copy<u64>(value)) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(p), "r"(bit_copy<u32>(value)) : "memory");
  } else if constexpr (sizeof(T) == 2) {
    asm volatile("st.global.u16 [%0], %1;" ::"l"(p), "h"(bit_copy<u16>(value)) : "memory");
  } else {
    asm volatile("st.global.u8 [%0], %1;" ::"l"(p), "r"(static_cast<u32>(bit_copy<u8>(value))) : "memory");
  }
}

// Global memory that is constant during the launch, through the read-only path. Not volatile: loads may be moved.
template <class T>
inline DEVICE T ld_const(const T* p) {
  static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0);
  if constexpr (sizeof(T) == 16) {
    u32x4 v;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return bit_copy<T>(v);
  } else if constexpr (sizeof(T) == 8) {
    u64 v;
    asm("ld.global.nc.u64 %0, [%1];" : "=l"(v) : "l"(p));
    return bit_copy<T>(v);
  } else if constexpr (sizeof(T) == 4) {
    u32 v;
    asm("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return bit_copy<T>(v);
  } else if constexpr (sizeof(T) == 2) {
    u16 v;
    asm("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(p));
    return bit_copy<T>(v);
  } else {
    u32 v;
    asm("ld.global.nc.u8 %0, [%1];" : "=r"(v) : "l"(p));
    return bit_copy<T>(static_cast<u8>(v));
  }
}

// Bytes towards the L2 cache, for ordinary loads that come later. p and bytes are multiples of 16.
inline DEVICE void prefetch_l2_bulk(const void* p, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
}

// ---- barriers of threads

// All n_threads (whole warps) that name this barrier; orders their shared and global accesses within the block.
inline DEVICE void bar_sync(Site, u32 id, u32 n_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}

// The 32 lanes of a warp; orders their memory accesses, which shuffles and mma do not.
inline DEVICE void warp_sync(Site) { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }

// ---- mbarriers: 8 bytes of shared memory; a phase ends when all arrivals and all expected bytes have come

inline DEVICE void mbar_init(u32 bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

// Makes initialised mbarriers visible to the copy engine; threads need a barrier besides.
inline DEVICE void fence_mbar_init(Site) { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Release: what the arriving thread has read and written comes before what those do who wait for the phase.
inline DEVICE void mbar_arrive(Site, u32 bar) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

// The same, and the phase ends only after so many more bytes.
inline DEVICE void mbar_arrive_expect_tx(Site, u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

// Acquire: true once the phase of this parity has ended. May sleep for a short time of the device's own.
inline DEVICE bool mbar_try_wait(Site, u32 bar, u32 parity) {
  u32 done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(done)
      : "r"(bar), "r"(parity)
      : "memory");
  return done != 0;
}

// Orders ordinary accesses to shared memory, also those learnt of by an acquire, before later bulk copies into it.
inline DEVICE void fence_proxy_async(Site) { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A cache policy: these lines leave L2 first, as weights are read once per launch.
inline DEVICE u64 policy_evict_first() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Global -> shared by the copy engine; `bytes` are then taken off what `bar` expects. All multiples of 16.
inline DEVICE void bulk_copy(u32 dst, const void* src, u32 bytes, u32 bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(dst),
      "l"(src), "r"(bytes), "r"(bar), "l"(policy_evict_first())
      : "memory");
}

// ---- between blocks

// What this thread has done and, through a barrier, learnt of, is visible to the GPU before what it does next.
inline DEVICE void fence_gpu(Site) { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Behind fence_gpu a relaxed atomic publishes what the fence covered; one with release would fence once more. In the
// same way fence_gpu after an atomic that saw another thread's learns what that one has published.
inline DEVICE void red_relaxed_add(Site, u32* p, u32 v) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

inline DEVICE u32 ld_acquire(Site, const u32* p) {
  u32 v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

inline DEVICE u32 atom_add_relaxed(Site, u32* p, u32 v) {  // the value before
  u32 old;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
}
inline DEVICE u32 atom_add_acq_rel(Site, u32* p, u32 v) {
  u32 old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
}

inline DEVICE u32 ld_relaxed(const u32* p) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

inline DEVICE void st_relaxed(u32* p, u32 v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// ---- within a warp: all 32 lanes take part

inline DEVICE u32 shfl_xor_u32(u32 v, u32 mask) {
  u32 r;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=r"(r) : "r"(v), "r"(mask));
  return r;
}
inline DEVICE i32 shfl_xor_i32(i32 v, u32 mask) { return static_cast<i32>(shfl_xor_u32(static_cast<u32>(v), mask)); }
inline DEVICE f32 shfl_xor_f32(f32 v, u32 mask) { return bit_copy<f32>(shfl_xor_u32(bit_copy<u32>(v), mask)); }

inline DEVICE u32 shfl_idx_u32(u32 v, u32 lane) {
  u32 r;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=r"(r) : "r"(v), "r"(lane));
  return r;
}
inline DEVICE i32 shfl_idx_i32(i32 v, u32 lane) { return static_cast<i32>(shfl_idx_u32(static_cast<u32>(v), lane)); }
inline DEVICE f32 shfl_idx_f32(f32 v, u32 lane) { return bit_copy<f32>(shfl_idx_u32(bit_copy<u32>(v), lane)); }

// Bit l: the value in lane l.
inline DEVICE u32 ballot(bool value) {
  u32 r;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.u32 p, %1, 0;\n"
      "vote.sync.ballot.b32 %0, p, 0xffffffff;\n"
      "}"
      : "=r"(r)
      : "r"(static_cast<u32>(value)));
  return r;
}

// c (16, 8) += a (16, 16) b (16, 8). Lane 4 g + q holds: c0 c1 = c[g][2q, 2q + 1], c2 c3 = c[g + 8][same];
// a0 = a[g][2q, 2q + 1], a1 = a[g + 8][same], a2 = a[g][2q + 8, + 9], a3 = a[g + 8][same]; b0 = b[2q, 2q + 1][g],
// b1 = b[2q + 8, + 9][g]; the lower index in the low half.
inline DEVICE void mma_bf16(f32 (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

inline DEVICE void mma_f16(f32 (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ---- numbers. Not volatile: pure.

// Two numbers rounded to nearest even, `lo` in the low half.
inline DEVICE u32 cvt_bf16x2(f32 lo, f32 hi) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}

inline DEVICE u32 cvt_f16x2(f32 lo, f32 hi) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}

inline DEVICE f32 f16_to_f32(u16 x) {
  f32 r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x));
  return r;
}

inline DEVICE f32 bf16_to_f32(u16 x) { return bit_copy<f32>(static_cast<u32>(x) << 16); }

// Two f16 differences at once, rounded to nearest even.
inline DEVICE u32 sub_f16x2(u32 x, u32 y) {
  u32 r;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(y));
  return r;
}

// Two f16 of a * b + c at once, rounded to nearest even once.
inline DEVICE u32 fma_f16x2(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

// (a & b) | c in one instruction; with two constants the compiler makes two of it.
inline DEVICE u32 and_or(u32 a, u32 b, u32 c) {
  u32 r;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

// Byte i of the result is byte (sel >> 4i) & 7 of a's four bytes followed by b's; with bit 3 set its sign, eight times.
inline DEVICE u32 prmt(u32 a, u32 b, u32 sel) {
  u32 r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(sel));
  return r;
}

inline DEVICE f32 fma_f32(f32 a, f32 b, f32 c) {
  f32 r;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(r) : "f"(a), "f"(b), "f"(c));
  return r;
}

inline DEVICE f32 sqrt_f32(f32 x) {
  f32 r;
  asm("sqrt.rn.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// The larger number; the other one where one is NaN.
inline DEVICE f32 max_f32(f32 a, f32 b) {
  f32 r;
  asm("max.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

// The same number, but the compiler does not know: what is made of it is made here, not before a loop. No instruction.
inline DEVICE u32 opaque(u32 x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- time

inline DEVICE u64 clock_ns() {
  u64 t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

inline DEVICE u64 clock_cycles() {
  u64 t;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(t));
  return t;
}

inline DEVICE void nanosleep(u32 ns) { asm volatile("nanosleep.u32 %0;" ::"r"(ns)); }

}  // namespace flashformer

#endif  // FF_HOST

// What the wrappers of ptx.h call: one function per kind of instruction. `At` says where in the device source.
#pragma once

#include <cstddef>

#include "../../../src/flashformer/backends/cuda/device/layout.cuh"
#include "../../../src/flashformer/backends/cuda/device/sites.h"

namespace sim {

using flashformer::f32;
using flashformer::f64;
using flashformer::i32;
using flashformer::i64;
using flashformer::Site;
using flashformer::u16;
using flashformer::u32;
using flashformer::u64;
using flashformer::u8;

struct At {
  const char* file;
  u32 line;
};

// Wrappers by name, as findings print them.
#define SIM_CALLS(X)                                                                                                   \
  X(ld_shared), X(st_shared), X(ld_global), X(st_global), X(ld_const), X(prefetch_l2_bulk), X(bar_sync), X(warp_sync), \
      X(mbar_init), X(fence_mbar_init), X(mbar_arrive), X(mbar_arrive_expect_tx), X(mbar_try_wait),                    \
      X(fence_proxy_async), X(bulk_copy), X(fence_gpu), X(red_relaxed_add), X(ld_acquire), X(atom_add_relaxed),        \
      X(atom_add_acq_rel), X(ld_relaxed), X(st_relaxed), X(shfl_xor), X(shfl_idx), X(ballot), X(mma_bf16), X(mma_f16), \
      X(nanosleep)

#define SIM_CALL_ENUM(name) name
enum class Call : u8 { SIM_CALLS(SIM_CALL_ENUM), kCount };
#undef SIM_CALL_ENUM

constexpr u32 kSharedBase = 1024;  // not 0, so that code which forgets the base is out of bounds

u32 thread_index();
u32 block_index();
u32 n_blocks();

void load_shared(void* to, u32 a, u32 bytes, At at);
void store_shared(u32 a, const void* from, u32 bytes, At at);
void load_global(void* to, const void* p, u32 bytes, At at);
void store_global(void* p, const void* from, u32 bytes, At at);
void load_const(void* to, const void* p, u32 bytes, At at);
void prefetch(const void* p, u32 bytes, At at);

void bar_sync(Site site, u32 id, u32 n_threads, At at);
void warp_sync(Site site, At at);

void mbar_init(u32 bar, u32 count, At at);
void fence_mbar_init(Site site, At at);
void mbar_arrive(Site site, u32 bar, At at);
void mbar_arrive_expect_tx(Site site, u32 bar, u32 bytes, At at);
bool mbar_try_wait(Site site, u32 bar, u32 parity, At at);
void fence_proxy_async(Site site, At at);
void bulk_copy(u32 dst, const void* src, u32 bytes, u32 bar, At at);

void fence_gpu(Site site, At at);
void red_relaxed_add(Site site, u32* p, u32 v, At at);
u32 ld_acquire(Site site, const u32* p, At at);
u32 atom_add_relaxed(Site site, u32* p, u32 v, At at);
u32 atom_add_acq_rel(Site site, u32* p, u32 v, At at);
u32 ld_relaxed(const u32* p, At at);
void st_relaxed(u32* p, u32 v, At at);

u32 shuffle(Call call, u32 v, u32 operand, At at);  // shfl_xor: mask, shfl_idx: lane
u32 ballot(bool value, At at);
void mma(Call call, f32 (&c)[4], const u32 (&a)[4], const u32 (&b)[2], At at);

u64 clock_cycles();
void nanosleep(u32 ns, At at);

}  // namespace sim

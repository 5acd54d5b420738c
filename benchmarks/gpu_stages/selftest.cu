// Every wrapper of ptx.cuh run on fresh inputs; wrappers.py computes what must come out. One entry per group, one
// argument for all. Blocks have 288 threads, as the kernel's; results are plain words.
#include "ptx.cuh"

namespace flashformer {

constexpr Site kAny = static_cast<Site>(0);  // sites are for the host build
constexpr u64 kPatience = u64{1} << 27;      // cycles that a wait may take

struct Test {
  const u8* in;
  u8* out;
  u32* words;  // counters, zero at the start
  u64 n;
};

// in (n, 32, 10) u32: a0..a3, b0, b1, c0..c3 of every lane. out (n, 32, 4) f32. A warp takes every n_blocks-th case.
template <bool kBf16>
inline DEVICE void multiply_cases(const Test& test) {
  if (warp_index() != 0) return;
  for (u64 i = block_index(); i < test.n; i += n_blocks()) {
    const u32* from = reinterpret_cast<const u32*>(test.in) + (i * 32 + lane_index()) * 10;
    u32 v[10];
    for (u32 j = 0; j < 10; ++j) v[j] = ld_const(from + j);
    f32 c[4];
    for (u32 j = 0; j < 4; ++j) c[j] = bit_copy<f32>(v[6 + j]);
    if constexpr (kBf16) {
      mma_bf16(c, v[0], v[1], v[2], v[3], v[4], v[5]);
    } else {
      mma_f16(c, v[0], v[1], v[2], v[3], v[4], v[5]);
    }
    f32* to = reinterpret_cast<f32*>(test.out) + (i * 32 + lane_index()) * 4;
    for (u32 j = 0; j < 4; ++j) st_global(to + j, c[j]);
  }
}

// One value of `Size` bytes per index: global -> register -> shared -> register -> global, and through ld_const.
template <class T>
inline DEVICE void move(const Test& test, u64 offset, u64 i) {
  const u32 at = shared_base() + thread_index() * 16;
  const T* from = reinterpret_cast<const T*>(test.in + offset) + i;
  st_shared<T>(at, ld_global(from));
  const T back = ld_shared<T>(at);
  st_global(reinterpret_cast<T*>(test.out + offset) + i, back);
  st_global(reinterpret_cast<T*>(test.out + test.n + offset) + i, ld_const(from));
}

inline DEVICE bool wait_for(u32 bar, u32 parity) {
  const u64 begin = clock_cycles();
  while (!mbar_try_wait(kAny, bar, parity)) {
    if (clock_cycles() - begin > kPatience) return false;
  }
  return true;
}

}  // namespace flashformer

using namespace flashformer;

extern "C" __global__ void __launch_bounds__(288, 1) test_mma_bf16(const __grid_constant__ Test test) {
  multiply_cases<true>(test);
}

extern "C" __global__ void __launch_bounds__(288, 1) test_mma_f16(const __grid_constant__ Test test) {
  multiply_cases<false>(test);
}

// in: five parts of n / 5 bytes, moved by 1, 2, 4, 8 and 16 bytes. out (2, n).
extern "C" __global__ void __launch_bounds__(288, 1) test_memory(const __grid_constant__ Test test) {
  const u64 part = test.n / 5;
  if (thread_index() == 0) prefetch_l2_bulk(test.in, static_cast<u32>(part));
  for (u64 i = block_index() * 288 + thread_index(); i < part; i += n_blocks() * 288) {
    move<u8>(test, 0, i);
    if (i < part / 2) move<u16>(test, part, i);
    if (i < part / 4) move<u32>(test, 2 * part, i);
    if (i < part / 8) move<u32x2>(test, 3 * part, i);
    if (i < part / 16) move<u32x4>(test, 4 * part, i);
  }
}

// n records of 64 bytes, one after another in the same place: written by asm, read as plain C++, as the kernel does.
// in (n, 16) u32. out (n_blocks, n, 16) u32.
struct Record {
  u64 wide[4];
  u32 narrow[8];
};

extern "C" __global__ void __launch_bounds__(288, 1) test_record(const __grid_constant__ Test test) {
  const Record* in = reinterpret_cast<const Record*>(test.in);
  Record* out = reinterpret_cast<Record*>(test.out) + block_index() * test.n;
  const u32 t = thread_index(), offset = 1024;
  for (u64 i = 0; i < test.n; ++i) {
    const u32x4* from = reinterpret_cast<const u32x4*>(in + i) + t;
    if (t < 4) st_shared<u32x4>(shared_base() + offset + 16 * t, ld_const(from));
    bar_sync(kAny, 0, 288);
    const Record& record = shared_record(offset, in[i]);
    if (t < 4) st_global(&out[i].wide[t], record.wide[t]);
    if (t < 8) st_global(&out[i].narrow[t], record.narrow[t]);
    bar_sync(kAny, 0, 288);
  }
}

// in (3, n) u32 a, b, c. out (14, n) u32.
extern "C" __global__ void __launch_bounds__(288, 1) test_numbers(const __grid_constant__ Test test) {
  const u32* in = reinterpret_cast<const u32*>(test.in);
  u32* out = reinterpret_cast<u32*>(test.out);
  for (u64 i = block_index() * 288 + thread_index(); i < test.n; i += n_blocks() * 288) {
    const u32 a = ld_const(in + i), b = ld_const(in + test.n + i), c = ld_const(in + 2 * test.n + i);
    const f32 x = bit_copy<f32>(a), y = bit_copy<f32>(b), z = bit_copy<f32>(c);
    const u32 found[14] = {
        cvt_bf16x2(x, y),
        cvt_f16x2(x, y),
        bit_copy<u32>(f16_to_f32(static_cast<u16>(a))),
        bit_copy<u32>(bf16_to_f32(static_cast<u16>(a))),
        sub_f16x2(a, b),
        fma_f16x2(a, b, c),
        and_or(a, b, c),
        prmt(a, b, c & 0xFFFF),
        bit_copy<u32>(fma_f32(x, y, z)),
        bit_copy<u32>(sqrt_f32(x)),
        opaque(a),
        bit_copy<u32>(x * y),  // plain arithmetic is IEEE and not contracted
        bit_copy<u32>(x / y),
        bit_copy<u32>(max_f32(x, y)),
    };
    for (u32 j = 0; j < 14; ++j) st_global(out + j * test.n + i, found[j]);
  }
}

// in (n, 32) u32 per warp task. out (n, 12, 32): shuffles by xor of 1, 2, 4, 8, 16, 31; of i32 and f32; from lane
// (7 v) % 32 of all three kinds; ballot of odd values.
extern "C" __global__ void __launch_bounds__(288, 1) test_shuffles(const __grid_constant__ Test test) {
  const u32 lane = lane_index();
  for (u64 i = block_index() * 9 + warp_index(); i < test.n; i += n_blocks() * 9) {
    const u32 v = ld_const(reinterpret_cast<const u32*>(test.in) + i * 32 + lane);
    const u32 from = (7 * lane + static_cast<u32>(i)) % 32;
    const f32 f = bit_copy<f32>(v);
    const u32 found[12] = {
        shfl_xor_u32(v, 1),
        shfl_xor_u32(v, 2),
        shfl_xor_u32(v, 4),
        shfl_xor_u32(v, 8),
        shfl_xor_u32(v, 16),
        shfl_xor_u32(v, 31),
        static_cast<u32>(shfl_xor_i32(static_cast<i32>(v), 5)),
        bit_copy<u32>(shfl_xor_f32(f, 9)),
        shfl_idx_u32(v, from),
        static_cast<u32>(shfl_idx_i32(static_cast<i32>(v), from)),
        bit_copy<u32>(shfl_idx_f32(f, from)),
        flashformer::ballot((v & 1) != 0),
    };
    for (u32 j = 0; j < 12; ++j) st_global(reinterpret_cast<u32*>(test.out) + (i * 12 + j) * 32 + lane, found[j]);
  }
}

// out (n_blocks, 288, 8) u32: who I am; sums over a neighbour's words after n rounds of each kind of barrier.
extern "C" __global__ void __launch_bounds__(288, 1) test_threads(const __grid_constant__ Test test) {
  const u32 t = thread_index(), smem = shared_base(), warp = warp_index();
  u32 all = 0, consumers = 0, half = 0, lanes = 0;
  for (u32 round = 0; round < test.n; ++round) {
    st_shared<u32>(smem + 4 * t, t * 1000 + round);
    bar_sync(kAny, 0, 288);
    all += ld_shared<u32>(smem + 4 * ((t + 37) % 288));
    bar_sync(kAny, 0, 288);
    if (warp < 8) {
      st_shared<u32>(smem + 2048 + 4 * t, t * 3000 + round);
      bar_sync(kAny, 1, 256);
      consumers += ld_shared<u32>(smem + 2048 + 4 * ((t + 101) % 256));
      bar_sync(kAny, 1, 256);
      const u32 first = t / 128 * 128, id = 2 + t / 128;
      st_shared<u32>(smem + 4096 + 4 * t, t * 5000 + round);
      bar_sync(kAny, id, 128);
      half += ld_shared<u32>(smem + 4096 + 4 * (first + (t + 63) % 128));
      bar_sync(kAny, id, 128);
    }
    st_shared<u32>(smem + 6144 + 4 * t, t * 7000 + round);
    warp_sync(kAny);
    lanes += ld_shared<u32>(smem + 6144 + 4 * (warp * 32 + (t + 11) % 32));
    warp_sync(kAny);
  }
  const u32 found[8] = {t, warp * 32 + lane_index(), block_index(), n_blocks(), all, consumers, half, lanes};
  for (u32 j = 0; j < 8; ++j) st_global(reinterpret_cast<u32*>(test.out) + (block_index() * 288 + t) * 8 + j, found[j]);
}

// Bulk copies into 3 slots of 16 KiB, use after use: sizes 16 .. 16384, parities of several uses, full and empty.
// in: n uses of 16 KiB. out the same of block 0; words[0] counts waits that were in vain, words[1] waits that ended
// before anything could have arrived.
extern "C" __global__ void __launch_bounds__(288, 1) test_bulk(const __grid_constant__ Test test) {
  constexpr u32 kSlots = 3, kBytes = 16384;
  const u32 smem = shared_base(), full = smem + kSlots * kBytes, empty = full + 8 * kSlots, t = thread_index();
  if (t == 0) {
    for (u32 s = 0; s < kSlots; ++s) {
      mbar_init(full + 8 * s, 1);
      mbar_init(empty + 8 * s, 8);
    }
    fence_mbar_init(kAny);
    if (mbar_try_wait(kAny, full, 0)) red_relaxed_add(kAny, test.words + 1, 1);
  }
  bar_sync(kAny, 0, 288);
  if (t == 256) {
    for (u32 use = 0; use < test.n; ++use) {
      const u32 s = use % kSlots, parity = use / kSlots & 1, bytes = use % 5 == 0 ? 16 * (use + 1) : kBytes;
      if (!wait_for(empty + 8 * s, parity ^ 1)) red_relaxed_add(kAny, test.words, 1);
      fence_proxy_async(kAny);
      mbar_arrive_expect_tx(kAny, full + 8 * s, bytes);
      bulk_copy(smem + s * kBytes, test.in + u64{use} * kBytes, bytes, full + 8 * s);
    }
  } else if (t < 256) {
    for (u32 use = 0; use < test.n; ++use) {
      const u32 s = use % kSlots, parity = use / kSlots & 1, bytes = use % 5 == 0 ? 16 * (use + 1) : kBytes;
      if (!wait_for(full + 8 * s, parity)) red_relaxed_add(kAny, test.words, 1);
      for (u32 at = 16 * t; at < bytes; at += 16 * 256) {
        const u32x4 v = ld_shared<u32x4>(smem + s * kBytes + at);
        st_shared<u32>(smem + s * kBytes + at, 0xDEADBEEF);  // must not outlive the next copy
        if (block_index() == 0) st_global(reinterpret_cast<u32x4*>(test.out + u64{use} * kBytes + at), v);
      }
      warp_sync(kAny);
      if (lane_index() == 0) mbar_arrive(kAny, empty + 8 * s);
    }
  }
}

// n rounds between all blocks: every thread stores, the block arrives, waits for all, reads another block's words.
// out (n_blocks) u32: [ticket] + 1 of atom_add_acq_rel; words: [0] arrivals, [1] tickets, [2] waits in vain, [3] wrong
// words, [4] what st_relaxed left, [5] tickets of atom_add_relaxed, [6] their sum.
extern "C" __global__ void __launch_bounds__(288, 1) test_grid(const __grid_constant__ Test test) {
  const u32 t = thread_index(), block = block_index(), blocks = n_blocks();
  u32* data = reinterpret_cast<u32*>(test.out) + blocks;  // (2, blocks, 288)
  u32 wrong = 0;
  bool gave_up = false;
  for (u32 round = 0; round < test.n; ++round) {
    u32* mine = data + u64{round % 2} * blocks * 288;
    st_global(mine + block * 288 + t, round * 7919 + block * 288 + t);
    bar_sync(kAny, 0, 288);
    if (t == 0) {
      fence_gpu(kAny);
      red_relaxed_add(kAny, test.words, 1);
      const u64 begin = clock_cycles();
      while (!gave_up && ld_acquire(kAny, test.words) < blocks * (round + 1)) {
        if (clock_cycles() - begin > kPatience) gave_up = true;
      }
    }
    bar_sync(kAny, 0, 288);
    const u32 other = (block + 1 + round % (blocks - 1)) % blocks;
    wrong += ld_global(mine + other * 288 + t) != round * 7919 + other * 288 + t;
  }
  if (gave_up) red_relaxed_add(kAny, test.words + 2, 1);
  if (wrong != 0) red_relaxed_add(kAny, test.words + 3, wrong);
  if (t == 0) {
    const u32 ticket = atom_add_acq_rel(kAny, test.words + 1, 1);
    st_global(reinterpret_cast<u32*>(test.out) + ticket, ticket + 1);
    atom_add_relaxed(kAny, test.words + 6, atom_add_relaxed(kAny, test.words + 5, 1));
    if (ticket == 0) st_relaxed(test.words + 4, ld_relaxed(test.words) + 5);
  }
}

// out (7) u64: cycles and ns before, after n naps of 1000 ns, and again; the least step of ns.
extern "C" __global__ void __launch_bounds__(288, 1) test_time(const __grid_constant__ Test test) {
  if (block_index() != 0 || thread_index() != 0) return;
  u64* out = reinterpret_cast<u64*>(test.out);
  st_global(out, clock_cycles());
  st_global(out + 1, clock_ns());
  for (u64 i = 0; i < test.n; ++i) nanosleep(1000);
  st_global(out + 2, clock_cycles());
  st_global(out + 3, clock_ns());
  st_global(out + 4, clock_cycles());
  st_global(out + 5, clock_ns());
  u64 least = ~u64{0}, last = clock_ns();
  for (u32 steps = 0, looks = 0; steps < 64 && looks < 1u << 20; ++looks) {
    const u64 now = clock_ns();
    if (now == last) continue;
    least = now - last < least ? now - last : least;
    last = now;
    ++steps;
  }
  st_global(out + 6, least);
}

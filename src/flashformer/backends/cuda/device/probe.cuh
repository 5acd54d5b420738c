// How fast a GPU reads: every byte of [data, data + n_bytes) once, by 16-byte loads, and nothing else.
//
// Blocks take turns at pieces of kPieceBytes; in a piece every thread has kLoads loads under way, neighbours side by
// side. Bytes behind the last whole piece are left out. The sum keeps the loads alive: nothing is known of it, and once
// in 2^32 it is stored.
#pragma once

#include "ptx.cuh"

namespace flashformer {

struct Probe {
  const u8* data;
  u64 n_bytes;
  u32* sink;
};

constexpr u32 kProbeThreads = 512;
constexpr u32 kLoads = 8;
constexpr u32 kPieceBytes = kProbeThreads * kLoads * sizeof(u32x4);

}  // namespace flashformer

extern "C" __global__ void __launch_bounds__(512, 2)
    flashformer_probe(const __grid_constant__ flashformer::Probe probe) {
  using namespace flashformer;
  u32 sum = 0;
  const u64 n_pieces = probe.n_bytes / kPieceBytes;
#pragma unroll 1
  for (u64 piece = block_index(); piece < n_pieces; piece += n_blocks()) {
    const u32x4* from = reinterpret_cast<const u32x4*>(probe.data + piece * kPieceBytes) + thread_index();
    u32x4 got[kLoads];
#pragma unroll
    for (u32 i = 0; i < kLoads; ++i) got[i] = ld_const(from + i * kProbeThreads);
#pragma unroll
    for (u32 i = 0; i < kLoads; ++i) sum += got[i].x ^ got[i].y ^ got[i].z ^ got[i].w;
  }
  if (sum == 0x9E3779B9u) st_global(probe.sink, sum);
}

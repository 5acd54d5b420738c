// What the wrappers compute: one warp, or many rows of arguments, one wrapper per launch.
#include "ptx.h"

namespace flashformer {

enum What : u32 {
  kShuffleXor,
  kShuffleIdx,
  kBallot,
  kMmaBf16,
  kMmaF16,
  kToF16,
  kToBf16,
  kFromF16,
  kFromBf16,
  kSubF16,
  kFmaF16,
  kAndOr,
  kPrmt,
  kFma,
  kSqrt,
  kIdentity,
  kTime
};

struct Launch {
  const u32* in;  // (n, 10): operands
  u32* out;       // (n, 4)
  u32 what, n;
};

inline f32 number(u32 bits) { return bit_copy<f32>(bits); }

void compute(u32 what, const u32 (&in)[10], u32 (&out)[4]) {
  const u32 lane = lane_index();
  switch (what) {
    case kShuffleXor:
      out[0] = shfl_xor_u32(in[0], 5);
      out[1] = static_cast<u32>(shfl_xor_i32(static_cast<i32>(in[1]), 16));
      out[2] = bit_copy<u32>(shfl_xor_f32(number(in[2]), 31));
      return;
    case kShuffleIdx:
      out[0] = shfl_idx_u32(in[0], 7);
      out[1] = static_cast<u32>(shfl_idx_i32(static_cast<i32>(in[1]), (lane + 3) % 32));
      out[2] = bit_copy<u32>(shfl_idx_f32(number(in[2]), 31 - lane));
      return;
    case kBallot:
      out[0] = ballot(in[0] & 1);
      return;
    case kMmaBf16:
    case kMmaF16: {
      f32 c[4] = {number(in[0]), number(in[1]), number(in[2]), number(in[3])};
      if (what == kMmaBf16) {
        mma_bf16(c, in[4], in[5], in[6], in[7], in[8], in[9]);
      } else {
        mma_f16(c, in[4], in[5], in[6], in[7], in[8], in[9]);
      }
      for (u32 i = 0; i < 4; ++i) out[i] = bit_copy<u32>(c[i]);
      return;
    }
    case kToF16:
      out[0] = cvt_f16x2(number(in[0]), number(in[1]));
      return;
    case kToBf16:
      out[0] = cvt_bf16x2(number(in[0]), number(in[1]));
      return;
    case kFromF16:
      out[0] = bit_copy<u32>(f16_to_f32(static_cast<u16>(in[0])));
      return;
    case kFromBf16:
      out[0] = bit_copy<u32>(bf16_to_f32(static_cast<u16>(in[0])));
      return;
    case kSubF16:
      out[0] = sub_f16x2(in[0], in[1]);
      return;
    case kFmaF16:
      out[0] = fma_f16x2(in[0], in[1], in[2]);
      return;
    case kAndOr:
      out[0] = and_or(in[0], in[1], in[2]);
      return;
    case kPrmt:
      out[0] = prmt(in[0], in[1], in[2]);
      return;
    case kFma:
      out[0] = bit_copy<u32>(fma_f32(number(in[0]), number(in[1]), number(in[2])));
      return;
    case kSqrt:
      out[0] = bit_copy<u32>(sqrt_f32(number(in[0])));
      return;
    case kIdentity:
      out[0] = thread_index() | block_index() << 16;
      out[1] = warp_index();
      out[2] = lane;
      out[3] = n_blocks();
      return;
    case kTime: {
      const u64 cycles = clock_cycles(), ns = clock_ns();
      nanosleep(1000);
      out[0] = clock_cycles() > cycles;
      out[1] = clock_ns() > ns;
      return;
    }
    default:
      return;
  }
}

}  // namespace flashformer

extern "C" void ff_thread(const void* argument, flashformer::u32) {
  using namespace flashformer;
  const Launch& launch = *static_cast<const Launch*>(argument);
  for (u32 row = block_index() * 64 + thread_index(); row < launch.n; row += 64 * n_blocks()) {
    u32 in[10], out[4] = {};
    for (u32 i = 0; i < 10; ++i) in[i] = ld_const(launch.in + 10 * row + i);
    compute(launch.what, in, out);
    for (u32 i = 0; i < 4; ++i) st_global(launch.out + 4 * row + i, out[i]);
  }
}

// The weight formats as tensor cores take them: one unit (16 outputs x kUnitK of k, program/fragments.py) times the
// rows, added to a warp's 16 x kCols sums. Columns without a row repeat the last one.
//
// mma.m16n8k16 wants of its A operand, in lane 4 g + q, elements 2 q, 2 q + 1 and 2 q + 8, 2 q + 9 of outputs g and
// g + 8. Which k these are is ours to say as long as B agrees: two instructions take 32 k, and the lane holds the 8
// neighbours from 8 q on, so that 16 bytes of each output and 16 bytes of each row are one load.
//
// Codes become f16 by the bit pattern of 1024 + code, from which 1024 + zero is taken: exact. A group is summed by
// itself, then added times its scale. Per 32 k and 8 columns: 1 (codes: 1/2 or 1/4) + 1 loads of 16 bytes, 2 mma.
#pragma once

#include "context.cuh"
#include "ptx.cuh"

namespace flashformer {

constexpr u32 kBlocks = kCols / 8;  // columns are taken 8 at a time
static_assert(kCols % 8 == 0 && kRows <= kCols);

// 16 outputs x kCols: outputs g and g + 8, columns 8 n + 2 q and the next.
struct TileSums {
  f32 at[kBlocks][4] = {};
};

// Where the rows of this lane lie in shared memory: columns g and 8 + g, from element 8 q on.
struct Rows {
  u32 at[kBlocks];

  DEVICE Rows(const Context& ctx, u32 columns) {
    for (u32 n = 0; n < kBlocks; ++n) {  // columns without a row repeat the last one, for nobody
      const u32 column = 8 * n + ctx.lane / 4, last = columns - 1;
      at[n] = ctx.at(kSmemX) + (column < last ? column : last) * kXStride + ctx.lane % 4 * 16;
    }
  }
};

// sums += 32 k of the tile, of which the lane has `low` of output g and `high` of output g + 8, and the rows at k.
template <bool kBf16>
inline DEVICE void multiply(TileSums& sums, const u32x4& low, const u32x4& high, const Rows& rows, u32 k) {
  for (u32 n = 0; n < kBlocks; ++n) {
    const u32x4 x = ld_shared<u32x4>(rows.at[n] + 2 * k);
    if constexpr (kBf16) {
      mma_bf16(sums.at[n], low.x, high.x, low.y, high.y, x.x, x.y);
      mma_bf16(sums.at[n], low.z, high.z, low.w, high.w, x.z, x.w);
    } else {
      mma_f16(sums.at[n], low.x, high.x, low.y, high.y, x.x, x.y);
      mma_f16(sums.at[n], low.z, high.z, low.w, high.w, x.z, x.w);
    }
  }
}

// Two equal f16 numbers, from the bits of one.
inline DEVICE u32 pair_of(u32 half) { return half * 0x10001u; }

// 8 codes of 8 bits in two words -> f16, `zero` taken off.
inline DEVICE u32x4 from_bytes(u32 first, u32 second, u32 zero) {
  constexpr u32 kThousands = 0x64646464u;  // high bytes of 1024 + code
  const u32 offset = pair_of(0x6400u | zero);
  return {sub_f16x2(prmt(first, kThousands, 0x4140), offset), sub_f16x2(prmt(first, kThousands, 0x4342), offset),
          sub_f16x2(prmt(second, kThousands, 0x4140), offset), sub_f16x2(prmt(second, kThousands, 0x4342), offset)};
}

// 8 codes of 4 bits in one word, element e in nibble e / 2 + 4 (e % 2), -> f16, `zero` taken off. The odd nibbles of a
// half stand 4 bits too high: 1024 + 16 code, times 1/16, less 64 + zero.
inline DEVICE u32x4 from_nibbles(u32 word, u32 zero) {
  constexpr u32 kEven = 0x000F000Fu, kOdd = 0x00F000F0u, kThousand = 0x64006400u, kSixteenth = 0x2C002C00u;
  const u32 even = pair_of(0x6400u | zero), odd = pair_of(0xD400u | zero << 4);  // 1024 + zero, -64 - zero
  const u32 rest = word >> 8;
  return {sub_f16x2(and_or(word, kEven, kThousand), even), fma_f16x2(and_or(word, kOdd, kThousand), kSixteenth, odd),
          sub_f16x2(and_or(rest, kEven, kThousand), even), fma_f16x2(and_or(rest, kOdd, kThousand), kSixteenth, odd)};
}

// sums += group, output by output times its scale.
inline DEVICE void add_scaled(TileSums& sums, const TileSums& group, f32 low, f32 high) {
  for (u32 n = 0; n < kBlocks; ++n) {
    sums.at[n][0] = fma_f32(group.at[n][0], low, sums.at[n][0]);
    sums.at[n][1] = fma_f32(group.at[n][1], low, sums.at[n][1]);
    sums.at[n][2] = fma_f32(group.at[n][2], high, sums.at[n][2]);
    sums.at[n][3] = fma_f32(group.at[n][3], high, sums.at[n][3]);
  }
}

// Units of a copy of about 16 KiB of codes, the same number for every warp.
constexpr u32 slot_units(u32 code_bytes) {
  const u32 per_warp = 16384 / code_bytes / u32{kWarps};
  return (per_warp > 0 ? per_warp : 1) * u32{kWarps};
}

template <Format kFormat, u32 kGroup, bool kZeroPoints>
struct Weights;

// bf16, f16: 16 rows x 32 k.
template <Format kFormat>
struct PlainWeights {
  static constexpr bool kBf16 = kFormat == Format::kBf16;
  static constexpr u32 kUnitK = 32, kUnitBytes = 1024, kSlotUnits = slot_units(kUnitBytes);

  static DEVICE void add(TileSums& sums, u32 unit, u32 lane, const Rows& rows, u32 k) {
    const u32x4 low = ld_shared<u32x4>(unit + 16 * lane), high = ld_shared<u32x4>(unit + 512 + 16 * lane);
    multiply<kBf16>(sums, low, high, rows, k);
  }
};
template <>
struct Weights<Format::kBf16, 0, false> : PlainWeights<Format::kBf16> {};
template <>
struct Weights<Format::kF16, 0, false> : PlainWeights<Format::kF16> {};

// int8: a unit is one group. Codes, then 16 scales.
template <u32 kGroup>
struct Weights<Format::kInt8, kGroup, false> {
  static constexpr bool kBf16 = false;
  static constexpr u32 kUnitK = kGroup, kCodeBytes = 16 * kUnitK, kUnitBytes = kCodeBytes + 32;
  static constexpr u32 kSlotUnits = slot_units(kCodeBytes);
  static_assert(kGroup >= 32);

  static DEVICE void add(TileSums& sums, u32 unit, u32 lane, const Rows& rows, u32 k) {
    const u32 zero = 128, scales = unit + kCodeBytes + lane / 4 * 2;
    TileSums group;
    for (u32 at = 0; at < kUnitK; at += 32) {
      const u32x4 codes = ld_shared<u32x4>(unit + 16 * at + 16 * lane);
      multiply<false>(group, from_bytes(codes.x, codes.y, zero), from_bytes(codes.z, codes.w, zero), rows, k + at);
    }
    add_scaled(sums, group, f16_to_f32(ld_shared<u16>(scales)), f16_to_f32(ld_shared<u16>(scales + 16)));
  }
};

// int4: a unit is one group, or two of 32. Codes, then 16 scales per group, then 16 zero points per group.
template <u32 kGroup, bool kZeroPoints>
struct Weights<Format::kInt4, kGroup, kZeroPoints> {
  static constexpr bool kBf16 = false;
  static constexpr u32 kUnitK = kGroup > 64 ? kGroup : 64, kCodeBytes = 8 * kUnitK, kGroups = kUnitK / kGroup;
  static constexpr u32 kUnitBytes = kCodeBytes + kGroups * (kZeroPoints ? 48 : 32);
  static constexpr u32 kSlotUnits = slot_units(kCodeBytes);
  static_assert(kGroup >= 32);

  static DEVICE u32 zero_at(u32 address) { return kZeroPoints ? ld_shared<u8>(address) : 8; }

  static DEVICE void add(TileSums& sums, u32 unit, u32 lane, const Rows& rows, u32 k) {
    const u32 scales = unit + kCodeBytes + lane / 4 * 2, zeros = unit + kCodeBytes + kGroups * 32 + lane / 4;
    u32 low_zero = 0, high_zero = 0;
    TileSums group;
    for (u32 at = 0; at < kUnitK; at += 32) {
      const u32 g = at / kGroup;
      if (at % kGroup == 0) {
        low_zero = zero_at(zeros + 16 * g);
        high_zero = zero_at(zeros + 16 * g + 8);
        group = {};
      }
      const u32x4 codes = ld_shared<u32x4>(unit + at / 64 * 512 + 16 * lane);
      const u32 low = at % 64 == 0 ? codes.x : codes.y, high = at % 64 == 0 ? codes.z : codes.w;
      multiply<false>(group, from_nibbles(low, low_zero), from_nibbles(high, high_zero), rows, k + at);
      if ((at + 32) % kGroup != 0) continue;
      const u32 scale = scales + 32 * g;
      add_scaled(sums, group, f16_to_f32(ld_shared<u16>(scale)), f16_to_f32(ld_shared<u16>(scale + 16)));
    }
  }
};

using BodyWeights = Weights<static_cast<Format>(kBodyFormat), kBodyGroup, kBodyZeroPoints != 0>;
using HeadWeights = Weights<static_cast<Format>(kHeadFormat), kHeadGroup, kHeadZeroPoints != 0>;
static_assert(BodyWeights::kUnitK == kBodyUnitK && BodyWeights::kUnitBytes == kBodyUnitBytes);
static_assert(BodyWeights::kSlotUnits == kBodySlotUnits && HeadWeights::kSlotUnits == kHeadSlotUnits);
static_assert(HeadWeights::kUnitK == kHeadUnitK && HeadWeights::kUnitBytes == kHeadUnitBytes);

}  // namespace flashformer

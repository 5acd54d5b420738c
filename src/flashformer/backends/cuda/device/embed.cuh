// embed: residual[row] = embedding[token] * scale, a block of kEmbedBlock columns per unit, for all rows.
//
// residual (rows, d_model_stride) f32. The embedding lies row by row in kEmbedFormat, or, where it is tied, in the
// tiles of lm_head (program/fragments.py): its elements are gathered as the product multiplies them. Every thread takes
// single elements: 2 bytes and less of d_model a row, too few to matter. The padding of the residual is set to zero
// anew, so that a forward that ended in NaN leaves nothing behind.
#pragma once

#include "context.cuh"
#include "math.cuh"

namespace flashformer {

inline DEVICE f32 number_of(u16 bits, bool is_bf16) { return is_bf16 ? bf16_to_f32(bits) : f16_to_f32(bits); }

inline DEVICE f32 half_at(const u8* p, bool is_bf16) {
  return number_of(ld_const<u16>(reinterpret_cast<const u16*>(p)), is_bf16);
}

// The code of element (row, k) of a unit: lane 4 g + q of a warp has rows g and g + 8 at k = 8 q ...
inline DEVICE u32 code_at(const u8* unit, u32 row, u32 k, bool is_int4) {
  const u32 lane = row % 8 * 4 + k % 32 / 8, upper = row / 8;
  if (!is_int4) return ld_const<u8>(unit + k / 32 * 512 + lane * 16 + upper * 8 + k % 8);
  const u8* word = unit + k / 64 * 512 + lane * 16 + upper * 8 + k % 64 / 32 * 4;
  const u32 nibble = k % 8 / 2 + k % 2 * 4;
  return ld_const<u32>(reinterpret_cast<const u32*>(word)) >> (4 * nibble) & 15;
}

// Element (output, k) of the matrix of `phase`, as its product multiplies it.
inline DEVICE f32 fragment_element(const Launch& launch, const Phase& phase, u32 output, u32 k) {
  const u32 unit_k = static_cast<u32>(phase.unit_k), row = output % u32{kTileOutputs};
  const u32 slice = k / u32{kSliceK}, slice_begin = slice * u32{kSliceK};
  const u32 left = static_cast<u32>(phase.k_padded) - slice_begin, length = left < u32{kSliceK} ? left : u32{kSliceK};
  const i64 units_before = phase.n_units * (slice_begin / unit_k);  // of the slices before, of all tiles
  const i64 unit = units_before + output / u32{kTileOutputs} * (length / unit_k) + (k - slice_begin) / unit_k;
  const u8* at = launch.weights + phase.matrix + unit * phase.unit_bytes;
  const u32 in_unit = k % unit_k;
  if (phase.scale_group == 0) {
    return half_at(at + (row * unit_k + in_unit) * 2, phase.format == static_cast<i64>(Format::kBf16));
  }
  const bool is_int4 = phase.format == static_cast<i64>(Format::kInt4);
  const u32 groups = unit_k / static_cast<u32>(phase.scale_group),
            group = in_unit / static_cast<u32>(phase.scale_group);
  const u8* scales = at + u32{kTileOutputs} * unit_k / (is_int4 ? 2 : 1);
  const u8* zeros = scales + groups * u32{kTileOutputs} * 2;
  const u32 of_group = group * u32{kTileOutputs} + row;
  const u32 zero = phase.zero_points ? ld_const<u8>(zeros + of_group) : static_cast<u32>(phase.zero);
  const i32 level = static_cast<i32>(code_at(at, row, in_unit, is_int4)) - static_cast<i32>(zero);
  return static_cast<f32>(level) * half_at(scales + of_group * 2, false);
}

inline DEVICE void embed(Context& ctx, const Phase& phase, const Span& span) {
  const Model& model = ctx.model;
  const Launch& launch = ctx.launch;
  const Phase& head = launch.phases[model.embed_phase];
  const f32 scale = static_cast<f32>(phase.scale);
  const u32 d_model = static_cast<u32>(model.d_model), begin = static_cast<u32>(span.begin * kEmbedBlock);
  const u32 width = static_cast<u32>((span.end > span.begin ? span.end - span.begin : 0) * kEmbedBlock);
  for (u32 i = ctx.thread; i < launch.n_rows * width; i += kConsumers) {
    const u32 r = i / width, k = begin + i % width, token = ld_shared<u32>(ctx.at(kSmemTokens) + 4 * r);
    f32 x = 0.0f;
    if (k < d_model && model.embed_offset < 0) {
      x = fragment_element(launch, head, token, k);
    } else if (k < d_model) {
      const u8* row = launch.weights + model.embed_offset + static_cast<i64>(token) * d_model * 2;
      x = half_at(row + k * 2, model.embed_format == static_cast<i64>(Format::kBf16));
    }
    st_global<f32>(launch.residual() + r * model.d_model_stride + k, x * scale);
  }
}

}  // namespace flashformer

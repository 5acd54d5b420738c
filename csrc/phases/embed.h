// embed: residual[row] = embedding[token] * scale, a block of kEmbedBlock columns per unit.
// A tied embedding has no rows of its own: it is gathered from the tiles of the lm_head product. The padding of the
// residual is set to zero anew, so that a forward that ended in NaN leaves nothing behind.
#pragma once

#include "../element.h"
#include "../forward.h"

namespace flashformer {

// Element k of one output of a tile, as the product of `phase` multiplies it.
inline float packed_element(const Phase& phase, const char* tile, int64_t output, int64_t k) {
  const Format format = static_cast<Format>(phase.format);
  const int64_t vector = output / kLanes, lane = output % kLanes;
  if (!phase.scale_group) {
    const int64_t size = bytes_of(format), group = k_group_of(format);
    return to_f32(tile + (k / group * phase.vectors + vector) * 64 + lane * group * size + k % group * size, format);
  }
  const int64_t step = format == Format::kInt8 ? 4 : 8, at = k % phase.scale_group;
  const char* block = tile + k / phase.scale_group * phase.group_bytes;
  const char* codes = block + phase.group_bytes - phase.scale_group / step * phase.vectors * 64;
  const uint8_t byte = static_cast<uint8_t>(codes[(at / step * phase.vectors + vector) * 64 + lane * 4 + at % 4]);
  const uint8_t code = step == 4 ? byte : at % step < 4 ? byte & 15 : byte >> 4;
  const float scale = to_f32(block + vector * 32 + lane * 2, Format::kF16);
  if (format == Format::kNf4) return kNf4[code] * scale;
  const char* zeros = block + (phase.vectors * 32 + 63) / 64 * 64 + vector * 16;
  const float zero =
      phase.zero_points ? static_cast<float>(static_cast<uint8_t>(zeros[lane])) : static_cast<float>(phase.zero);
  return (static_cast<float>(code) - zero) * scale;
}

template <class V>
void embed(Worker& worker, const Phase& phase, const Span& span) {
  const Forward& forward = *worker.forward;
  const Model& model = forward.model;
  const float scale = static_cast<float>(phase.scale);
  const bool tied = model.embed_offset < 0;
  const Phase& head = forward.phases[model.embed_phase];
  for (int64_t unit = span.begin; unit < span.end; unit += span.step) {
    worker.begin_unit(unit);
    const int64_t begin = unit * kEmbedBlock;
    const int64_t end = begin + kEmbedBlock < model.d_model ? begin + kEmbedBlock : model.d_model;
    for (int64_t r = 0; r < forward.n_rows; ++r) {
      float* out = forward.residual() + r * model.d_model_stride;
      const int64_t token = forward.row.token[r];
      for (int64_t k = end; k < begin + kEmbedBlock; ++k) out[k] = 0;
      if (!tied) {
        const Format format = static_cast<Format>(model.embed_format);
        const int64_t size = bytes_of(format);
        const char* row = forward.weights + model.embed_offset + token * model.d_model * size;
        for (int64_t k = begin; k < end; ++k) out[k] = to_f32(row + k * size, format) * scale;
        continue;
      }
      const int64_t outputs = head.vectors * kLanes;
      const char* tile = forward.weights + head.matrix + token / outputs * head.tile_bytes;
      for (int64_t k = begin; k < end; ++k) out[k] = packed_element(head, tile, token % outputs, k) * scale;
    }
  }
}

}  // namespace flashformer

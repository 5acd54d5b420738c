// embed: residual[row] = embedding[token] * scale, a block of kEmbedBlock columns per unit.
// A tied embedding has no rows of its own: it is gathered from the tiles of the lm_head product. The padding of the
// residual is set to zero anew, so that a forward that ended in NaN leaves nothing behind.
#pragma once

#include "../element.h"
#include "../forward.h"

namespace flashformer {

template <class V>
void embed(Worker& worker, const Phase& phase, const Span& span) {
  const Forward& forward = *worker.forward;
  const Model& model = forward.model;
  const Format format = static_cast<Format>(model.weight_format);
  const int64_t size = bytes_of(format), group = k_group_of(format);
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
        const char* row = forward.weights + model.embed_offset + token * model.d_model * size;
        for (int64_t k = begin; k < end; ++k) out[k] = to_f32(row + k * size, format) * scale;
        continue;
      }
      const int64_t tile = head.vectors * kLanes, vector = token % tile / kLanes, lane = token % kLanes;
      const char* packed =
          forward.weights + head.matrix + token / tile * head.tile_bytes + vector * 64 + lane * group * size;
      for (int64_t k = begin; k < end; ++k) {
        out[k] = to_f32(packed + k / group * head.vectors * 64 + k % group * size, format) * scale;
      }
    }
  }
}

}  // namespace flashformer

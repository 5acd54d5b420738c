// Written by tools/generate.py from src/flashformer/program/{ops,records}.py and formats.py. Do not edit.
#pragma once

#include "layout.cuh"

namespace flashformer {

enum class Op : i64 {
  kEmbed = 0,  // embedding row -> residual
  kQkv = 1,  // norm, q k v products, bias
  kAttend = 2,  // q and k norm, rope, KV append; scores, exp, weighted values of one key chunk
  kOProj = 3,  // merge chunks, product, residual +=
  kGateUp = 4,  // norm, gate and up products, activation
  kDown = 5,  // product, residual +=
  kLmHead = 6,  // norm, product, best token of each worker
  kSample = 7,  // best token of all workers, or one chosen from the logits
};

enum class Format : i64 {
  kF32 = 0,
  kBf16 = 1,
  kF16 = 2,
  kInt8 = 3,
  kInt4 = 4,
  kNf4 = 5,
};

enum class Activation : i64 {
  kSilu = 0,
  kGeluPytorchTanh = 1,
};

enum class QkNorm : i64 {
  kNone = 0,
  kHead = 1,
  kWidth = 2,
};

constexpr i64 kLanes = 16;
constexpr i64 kKeyChunk = 256;
constexpr i64 kMaxHeadRows = 16;
constexpr i64 kEmbedBlock = 64;
constexpr i64 kPad = 64;
constexpr i64 kScoreRows = 16;
constexpr i64 kValuesTogether = 32;
constexpr i64 kMaxHeadDim = 256;
constexpr i64 kTileOutputs = 16;
constexpr i64 kSliceK = 2048;
constexpr i64 kWarps = 8;
constexpr i64 kAlternate = 8;

struct Model {
  i64 n_workers;
  i64 n_phases;
  i64 head_begin;
  i64 rows;
  i64 streams;
  i64 ctx;
  i64 ctx_padded;
  i64 chunks;
  i64 d_model;
  i64 d_model_stride;
  i64 qkv_stride;
  i64 hidden_stride;
  i64 vocab_size;
  i64 logits_stride;
  i64 n_heads_max;
  i64 partial_stride;
  i64 n_layers;
  i64 embed_format;
  i64 kv_format;
  i64 exact;
  i64 group_stride;
  i64 embed_offset;
  i64 embed_phase;
  i64 residual;
  i64 qkv;
  i64 partial;
  i64 hidden;
  i64 logits;
  i64 candidates;
  i64 tokens;
  i64 merges;
  i64 scratch;
  i64 scratch_bytes;
  i64 input_stride;
  i64 work_bytes;
  i64 shared;
};
static_assert(sizeof(Model) == 288);

struct Phase {
  i64 op;
  i64 layer;
  i64 n_units;
  i64 matrix;
  i64 tile_bytes;
  i64 vectors;
  i64 k;
  i64 k_padded;
  i64 n_out;
  i64 format;
  i64 scale_group;
  i64 group_bytes;
  i64 zero_points;
  i64 zero;
  i64 norm;
  i64 bias;
  i64 fold;
  i64 fold_norm;
  i64 to;
  i64 activation;
  i64 n_heads;
  i64 n_kv_heads;
  i64 head_dim;
  i64 head_dim_padded;
  i64 window;
  i64 keys;
  i64 values;
  i64 rope;
  i64 rotary_dim;
  i64 qk_norm;
  i64 q_norm;
  i64 k_norm;
  i64 n_slices;
  i64 unit_k;
  i64 unit_bytes;
  i64 slot_units;
  f64 norm_eps;
  f64 scale;
  f64 fold_eps;
  f64 fold_scale;
  f64 attention_scale;
  f64 softcap;
};
static_assert(sizeof(Phase) == 336);

struct Span {
  i64 begin;
  i64 end;
  i64 step;
  i64 wait;
};
static_assert(sizeof(Span) == 32);

struct TapeItem {
  i64 phase;
  i64 begin;
  i64 end;
};
static_assert(sizeof(TapeItem) == 24);

}  // namespace flashformer

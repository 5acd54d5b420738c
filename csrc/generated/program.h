// Written by tools/generate.py from src/flashformer/program/{ops,records}.py and formats.py. Do not edit.
#pragma once

#include <cstdint>

namespace flashformer {

enum class Op : int64_t {
  kEmbed = 0,  // embedding row -> residual
  kQkv = 1,  // norm, q k v products, bias
  kAttend = 2,  // q and k norm, rope, KV append; scores, exp, weighted values of one key chunk
  kOProj = 3,  // merge chunks, product, residual +=
  kGateUp = 4,  // norm, gate and up products, activation
  kDown = 5,  // product, residual +=
  kLmHead = 6,  // norm, product, best token of each worker
  kSample = 7,  // best token of all workers, or one chosen from the logits
};

enum class Format : int64_t {
  kF32 = 0,
  kBf16 = 1,
  kF16 = 2,
  kInt8 = 3,
  kInt4 = 4,
  kNf4 = 5,
};

enum class Activation : int64_t {
  kSilu = 0,
  kGeluPytorchTanh = 1,
};

enum class QkNorm : int64_t {
  kNone = 0,
  kHead = 1,
  kWidth = 2,
};

constexpr int64_t kLanes = 16;
constexpr int64_t kKeyChunk = 256;
constexpr int64_t kMaxHeadRows = 16;
constexpr int64_t kEmbedBlock = 64;
constexpr int64_t kPad = 64;
constexpr int64_t kScoreRows = 16;
constexpr int64_t kValuesTogether = 32;
constexpr int64_t kMaxHeadDim = 256;

// quantize.py
constexpr float kInt4Steps[] = {8.0f, 8.5f, 7.5f, 7.0f, 6.5f, 6.0f};
constexpr float kInt4ZpShares[] = {1.0f, 0.949999988079071f, 0.8999999761581421f, 0.8500000238418579f, 0.800000011920929f};
constexpr float kNf4Shares[] = {1.0f, 0.949999988079071f, 0.8999999761581421f, 0.8500000238418579f};
constexpr float kNf4[] = {-127.0f, -88.0f, -67.0f, -50.0f, -36.0f, -23.0f, -12.0f, 0.0f, 10.0f, 20.0f, 31.0f, 43.0f, 56.0f, 71.0f, 92.0f, 127.0f};

struct Model {
  int64_t n_workers;
  int64_t n_phases;
  int64_t head_begin;
  int64_t rows;
  int64_t streams;
  int64_t ctx;
  int64_t ctx_padded;
  int64_t chunks;
  int64_t d_model;
  int64_t d_model_stride;
  int64_t qkv_stride;
  int64_t hidden_stride;
  int64_t vocab_size;
  int64_t logits_stride;
  int64_t n_heads_max;
  int64_t partial_stride;
  int64_t n_layers;
  int64_t embed_format;
  int64_t kv_format;
  int64_t exact;
  int64_t group_stride;
  int64_t embed_offset;
  int64_t embed_phase;
  int64_t residual;
  int64_t qkv;
  int64_t partial;
  int64_t hidden;
  int64_t logits;
  int64_t candidates;
  int64_t tokens;
  int64_t merges;
  int64_t scratch;
  int64_t scratch_bytes;
  int64_t input_stride;
  int64_t work_bytes;
  int64_t shared;
};
static_assert(sizeof(Model) == 288);

struct Phase {
  int64_t op;
  int64_t layer;
  int64_t n_units;
  int64_t matrix;
  int64_t tile_bytes;
  int64_t vectors;
  int64_t k;
  int64_t k_padded;
  int64_t n_out;
  int64_t format;
  int64_t scale_group;
  int64_t group_bytes;
  int64_t zero_points;
  int64_t zero;
  int64_t norm;
  int64_t bias;
  int64_t fold;
  int64_t fold_norm;
  int64_t to;
  int64_t activation;
  int64_t n_heads;
  int64_t n_kv_heads;
  int64_t head_dim;
  int64_t head_dim_padded;
  int64_t window;
  int64_t keys;
  int64_t values;
  int64_t rope;
  int64_t rotary_dim;
  int64_t qk_norm;
  int64_t q_norm;
  int64_t k_norm;
  int64_t n_slices;
  int64_t unit_k;
  int64_t unit_bytes;
  int64_t slot_units;
  double norm_eps;
  double scale;
  double fold_eps;
  double fold_scale;
  double attention_scale;
  double softcap;
};
static_assert(sizeof(Phase) == 336);

struct Span {
  int64_t begin;
  int64_t end;
  int64_t step;
  int64_t wait;
};
static_assert(sizeof(Span) == 32);

struct TapeItem {
  int64_t phase;
  int64_t begin;
  int64_t end;
};
static_assert(sizeof(TapeItem) == 24);

// The rows of a forward as the caller keeps them; see backends/base.py.
struct RowArrays {
  int32_t* token;
  int32_t* slot;
  int32_t* pos;
  int32_t* want;
  float* temperature;
  int32_t* top_k;
  float* top_p;
  float* min_p;
  uint64_t* seed;
  int32_t* choice;
  int32_t* adjust_begin;
  int32_t* adjust_end;
  int32_t* adjust_token;
  float* adjust_penalty;
  float* adjust_bias;
  float* adjust_kept;
};
constexpr int64_t kRowColumns = 12;  // with an entry per row
constexpr int64_t kColumnItemBytes[] = {4, 4, 4, 4, 4, 4, 4, 4, 8, 4, 4, 4, 4, 4, 4, 4};

}  // namespace flashformer

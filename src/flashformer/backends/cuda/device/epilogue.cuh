// What becomes of a product's sums: one thread holds one output of one row (column of the product).
//
//   qkv           sum + bias                                    -> qkv
//   o_proj, down  (sum + bias) * scale, + residual with fold    -> residual; or stored where its norm is still to come
//   gate_up       activation(gate + bias) * (up + bias)         -> hidden; a tile is 8 gate outputs, then their 8 ups
//   lm_head       softcap(sum * scale)                          -> logits where wanted; best token of the block
//
// Tiles belong to one block and elements to one thread, so the residual is updated in place. 4 bytes per row and output
// are written; o_proj and down read as much before.
#pragma once

#include "noise.cuh"
#include "stage.cuh"

namespace flashformer {

constexpr u32 kOutputs = u32{kTileOutputs};
constexpr u32 kFinishers = kOutputs * kRows;  // threads that hold outputs: output thread % 16 of column thread / 16
static_assert(kFinishers <= kConsumers && kOutputs == 2 * kAlternate);

// Ties go to the lower id.
inline DEVICE bool beats(f32 score, i32 token, f32 best_score, i32 best_token) {
  if (token < 0 || best_token < 0) return best_token < 0 && token >= 0;
  return score > best_score || (score == best_score && token < best_token);
}

class Epilogue {
 public:
  DEVICE Epilogue(Context& ctx, const Phase& phase, u32 columns)
      : ctx_(ctx),
        phase_(phase),
        residual_(ctx, phase),
        op_(static_cast<Op>(phase.op)),
        scale_(static_cast<f32>(phase.scale)),
        column_(ctx.thread / kOutputs),
        output_(ctx.thread % kOutputs),
        live_(column_ < columns),
        busy_(ctx.warp * 32 / kOutputs < columns) {
    row_ = live_ ? row_of(ctx, phase, column_) : 0;
  }

  // Whether any thread of this warp holds an output of a row.
  DEVICE bool busy() const { return busy_; }
  DEVICE bool live() const { return live_; }

  // Before the products of a tile's last slice: what the end of it will need, so that it comes meanwhile.
  DEVICE void fetch(u32 tile) {
    if (!live_ || !busy_) return;
    const u32 k = tile * kOutputs + output_;
    bias_ = phase_.bias >= 0 ? ld_const(ctx_.launch.vector(phase_.bias) + k) : 0.0f;
    const bool adds = phase_.to < 0 || residual_.folds;
    if ((op_ == Op::kOProj || op_ == Op::kDown) && adds) before_ = residual_.one(ctx_, column_, row_, k);
  }

  // The output of this thread; whole warps come here.
  DEVICE void finish(u32 tile, f32 sum) {
    const u32 k = tile * kOutputs + output_;
    switch (op_) {
      case Op::kQkv:
        if (live_) st_global(ctx_.launch.qkv() + row_ * ctx_.model.qkv_stride + k, sum + bias_);
        break;
      case Op::kGateUp:
        finish_gate_up(tile, sum + bias_);
        break;
      case Op::kLmHead:
        if (live_ && k < ctx_.model.vocab_size) finish_logit(k, sum * scale_);
        break;
      default:
        if (live_) finish_branch(k, (sum + bias_) * scale_);
    }
  }

  // After the last tile: the best token of this block for every row that wants something; none if it had no tile.
  DEVICE void end() {
    if (op_ != Op::kLmHead) return;
    UNROLL(1)
    for (u32 mask = kOutputs / 2; mask; mask /= 2) {
      const f32 score = shfl_xor_f32(best_score_, mask);
      const i32 token = shfl_xor_i32(best_token_, mask);
      if (beats(score, token, best_score_, best_token_)) {
        best_score_ = score;
        best_token_ = token;
      }
    }
    if (!live_ || !busy_ || output_ != 0) return;
    Candidate* mine = ctx_.launch.candidates(ctx_.block) + column_;
    st_global(mine, Candidate{best_score_, best_token_});
  }

 private:
  DEVICE void finish_branch(u32 k, f32 result) {
    const u32 at = row_ * residual_.stride + k;
    f32* residual = ctx_.launch.residual() + at;
    if (phase_.to < 0) {
      st_global(residual, before_ + result);
      return;
    }
    if (residual_.folds) st_global(residual, before_);
    st_global(ctx_.launch.branch(phase_.to) + at, result);
  }

  DEVICE void finish_gate_up(u32 tile, f32 sum) {
    constexpr u32 kHalf = kOutputs / 2;
    const f32 up = shfl_xor_f32(sum, kHalf);
    if (!live_ || output_ >= kHalf) return;
    const bool is_silu = phase_.activation == static_cast<i64>(Activation::kSilu);
    const f32 gate = gated(sum, is_silu ? 0.0f - sum : gelu_exponent(sum));
    st_global(ctx_.launch.hidden() + row_ * ctx_.model.hidden_stride + tile * kHalf + output_, gate * up);
  }

  DEVICE void finish_logit(u32 token, f32 logit) {
    const Launch& launch = ctx_.launch;
    if (!(magnitude(logit) <= kLargestF32)) ctx_.report_bad(2 * static_cast<i32>(ctx_.model.n_layers));
    if (phase_.softcap > 0) logit = soft_capped(logit, static_cast<f32>(phase_.softcap));
    const bool chosen_later = launch.chooses_from_logits(row_);
    if (chosen_later || launch.want[row_] == kWantLogits) {
      st_global(launch.logits() + column_ * ctx_.model.logits_stride + token, logit);
    }
    if (chosen_later) return;
    const f32 temperature = launch.temperature[row_];
    if (temperature > 0.0f) {
      logit = logit / temperature + gumbel(launch.seed[row_], launch.choice[row_], launch.pos[row_], token);
    }
    if (!beats(logit, static_cast<i32>(token), best_score_, best_token_)) return;
    best_score_ = logit;
    best_token_ = static_cast<i32>(token);
  }

  Context& ctx_;
  const Phase& phase_;
  Residual residual_;
  Op op_;
  f32 scale_;
  u32 column_, output_, row_;
  bool live_, busy_;
  f32 bias_ = 0.0f, before_ = 0.0f;
  f32 best_score_ = 0.0f;  // of lm_head
  i32 best_token_ = -1;
};

}  // namespace flashformer

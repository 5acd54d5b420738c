// The tokens of a launch's rows: given by the host, or chosen by the launch before, which may have ended meanwhile or
// not.
#pragma once

#include "launch.cuh"

namespace flashformer {

// The tokens of the rows into shared memory, a lane each. What the launch before chose is read before this block
// arrives anywhere, so before any block of this launch chooses.
inline DEVICE void copy_tokens(const Launch& launch, u32 smem, u32 row) {
  if (row >= launch.n_rows) return;
  i32 token = launch.token[row];
  if (token < 0) {
    const u64 tokens = ld_const(reinterpret_cast<const u64*>(&launch.model->tokens));
    token = ld_global(reinterpret_cast<const i32*>(launch.work + tokens) + (-1 - token));
    UNROLL(1)
    for (u32 i = 0; i < launch.n_stops; ++i) token = token == launch.stops[i] ? -1 : token;
  }
  st_shared<i32>(smem + kSmemTokens + 4 * row, token);
}

// Whether a row has no token to go on with; all blocks find the same.
inline DEVICE bool is_over(const Launch& launch, u32 smem) {
  UNROLL(1)
  for (u32 row = 0; row < launch.n_rows; ++row) {
    if (ld_shared<i32>(smem + kSmemTokens + 4 * row) < 0) return true;
  }
  return false;
}

}  // namespace flashformer

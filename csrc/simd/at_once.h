// What a product keeps in registers: so many rows by so many vectors of weights; for one row perhaps of two tiles.
#pragma once

namespace flashformer {

struct AtOnce {
  int rows;
  int vectors_one_row;
  int vectors;  // for several rows

  constexpr int vectors_of(int tiles_vectors, int n_rows) const {
    const int most = n_rows == 1 ? vectors_one_row : vectors;
    return tiles_vectors < most ? tiles_vectors : most;
  }
  // Whether one row can take two tiles of `tile` vectors side by side.
  constexpr bool pairs_of(int64_t tile) const { return 2 * tile <= vectors_one_row; }
};

}  // namespace flashformer

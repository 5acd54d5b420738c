// What a product keeps in registers: so many rows by so many vectors of weights.
#pragma once

namespace flashformer {

struct AtOnce {
  int rows;
  int vectors_one_row;
  int vectors;  // for several rows

  constexpr int vectors_of(int tile, int n_rows) const {
    const int most = n_rows == 1 ? vectors_one_row : vectors;
    return tile < most ? tile : most;
  }
};

}  // namespace flashformer

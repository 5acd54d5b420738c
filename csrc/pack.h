// Packing: rows of checkpoint matrices -> tiles, as program/pack.py defines them.
#pragma once

#include <cstdint>
#include <vector>

#include "generated/program.h"

namespace flashformer {

struct Source {  // a matrix in a checkpoint; rows are contiguous
  const char* data;
  int64_t n_rows;
  int64_t row_bytes;  // from one row to the next
  Format format;
};

struct PackJob {
  char* out;      // first tile
  Format format;  // of the packed weights
  int64_t vectors, n_tiles, k, k_padded;
  const int32_t* row_map;  // (n_tiles * vectors * 16) row among the stacked sources, -1: zeros
  std::vector<Source> sources;
};

// Packs with n_threads. Returns the stacked row of an element that is NaN or Inf, or -1.
int64_t pack_tiles(const PackJob& job, int n_threads);

// Copies rows in row-major order, converted to `format`. Returns as above.
int64_t copy_rows(char* out, Format format, const Source& source, int64_t k, int n_threads);

}  // namespace flashformer

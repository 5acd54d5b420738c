// Packing: rows of checkpoint matrices -> tiles, as program/pack.py defines them.
#pragma once

#include <cstdint>
#include <vector>

#include "generated/program.h"
#include "simd/isa.h"

namespace flashformer {

// A matrix in a checkpoint; the elements of a row are contiguous. In memory at `data`, or if that is null in the open
// file `fd` from byte `offset` on: a file is read, not mapped, since a mapping dies with SIGBUS when it is truncated.
struct Source {
  const char* data;
  int fd;
  int64_t offset;
  int64_t n_rows;
  int64_t row_bytes;  // from one row to the next
  Format format;
};

constexpr int64_t kAllGood = -1;
constexpr int64_t kReadFailed = -2;

struct PackJob {
  char* out;                         // first tile
  Format format;                     // of the packed weights
  int64_t scale_group, group_bytes;  // of quantized formats, see Format.group_bytes
  bool zero_points;
  uint8_t zero;
  int64_t vectors, n_tiles, k, k_padded;
  const int32_t* row_map;  // (n_tiles * vectors * 16) row among the stacked sources, -1: zeros
  QuantizeOf quantize;     // of the instruction set to be used
  std::vector<Source> sources;
};

// Packs with n_threads. Returns the stacked row of an element that is NaN or Inf, kReadFailed, or kAllGood.
int64_t pack_tiles(const PackJob& job, int n_threads);

// Sums of the 8-byte words of every block of `block_bytes`, a multiple of 512, in [begin, begin + n_bytes).
void sum_blocks(const char* begin, int64_t n_bytes, int64_t block_bytes, SumOf sum, uint64_t* sums, int n_threads);

// The bytes [offset, offset + n_bytes) of an open file. Returns 0 or an errno, EIO where the file is shorter.
int read_file(char* out, int fd, int64_t offset, int64_t n_bytes, int n_threads);

// Copies rows in row-major order, converted to `format`. Returns as above.
int64_t copy_rows(char* out, Format format, const Source& source, int64_t k, int n_threads);

}  // namespace flashformer

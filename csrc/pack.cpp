#include "pack.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>

#include "element.h"

namespace flashformer {

namespace {

void from_f32(float x, Format format, char* p) {
  if (format == Format::kF32) {
    std::memcpy(p, &x, 4);
    return;
  }
  const uint16_t half = std::isnan(x) ? 0x7FC0 : to_bf16(x);  // NaN stays NaN, whatever its payload
  std::memcpy(p, &half, 2);
}

// The row in `format`, converted into `buffer` unless it is so already; false if an element is not finite after it.
bool prepare_row(const Source& source, int64_t row, int64_t k, Format format, std::vector<char>& buffer,
                 const char** out) {
  const char* in = source.data + row * source.row_bytes;
  const int64_t in_size = bytes_of(source.format), out_size = bytes_of(format);
  *out = in;
  if (source.format != format) {
    for (int64_t i = 0; i < k; ++i)
      from_f32(to_f32(in + i * in_size, source.format), format, buffer.data() + i * out_size);
    *out = buffer.data();
  }
  uint32_t bad = 0;  // exponent bits all set: NaN or Inf
  for (int64_t i = 0; i < k; ++i) {
    if (format == Format::kF32) {
      uint32_t bits;
      std::memcpy(&bits, *out + i * 4, 4);
      bad |= (bits & 0x7F800000u) == 0x7F800000u;
    } else {
      uint16_t bits;
      std::memcpy(&bits, *out + i * 2, 2);
      bad |= (bits & 0x7F80u) == 0x7F80u;
    }
  }
  return bad == 0;
}

// Runs body(begin, end, buffer) over threads, in contiguous shares of [0, n), each with a buffer of its own.
template <class Body>
void share(int64_t n, int n_threads, int64_t buffer_bytes, Body body) {
  std::vector<std::vector<char>> buffers(static_cast<std::size_t>(n_threads));
  for (std::vector<char>& buffer : buffers) buffer.resize(static_cast<std::size_t>(buffer_bytes));
  std::vector<std::jthread> threads;  // joined also where one cannot be started
  for (int t = 0; t < n_threads; ++t) {
    std::vector<char>& buffer = buffers[static_cast<std::size_t>(t)];
    threads.emplace_back([=, &buffer] { body(n * t / n_threads, n * (t + 1) / n_threads, buffer); });
  }
}

const Source& source_of(const PackJob& job, int64_t* row) {
  std::size_t s = 0;
  while (*row >= job.sources[s].n_rows) *row -= job.sources[s++].n_rows;
  return job.sources[s];
}

}  // namespace

int64_t pack_tiles(const PackJob& job, int n_threads) {
  const int64_t size = bytes_of(job.format), group = job.format == Format::kF32 ? 1 : 2;
  const int64_t outputs = job.vectors * kLanes, tile_bytes = outputs * job.k_padded * size,
                step_bytes = job.vectors * 64;
  std::atomic<int64_t> bad_row{-1};
  share(job.n_tiles, n_threads, job.k * size, [&](int64_t begin, int64_t end, std::vector<char>& buffer) {
    for (int64_t tile = begin; tile < end; ++tile) {
      char* out = job.out + tile * tile_bytes;
      std::memset(out, 0, static_cast<std::size_t>(tile_bytes));
      for (int64_t o = 0; o < outputs; ++o) {
        const int64_t stacked = job.row_map[tile * outputs + o];
        if (stacked < 0) continue;
        int64_t row = stacked;
        const Source& source = source_of(job, &row);
        const char* in;
        if (!prepare_row(source, row, job.k, job.format, buffer, &in)) bad_row.store(stacked);
        char* lane = out + o / kLanes * 64 + o % kLanes * group * size;
        for (int64_t k = 0; k + group <= job.k; k += group)
          std::memcpy(lane + k / group * step_bytes, in + k * size, 4);
        if (job.k % group) std::memcpy(lane + job.k / group * step_bytes, in + (job.k - 1) * size, 2);
      }
    }
  });
  return bad_row.load();
}

int64_t copy_rows(char* out, Format format, const Source& source, int64_t k, int n_threads) {
  const int64_t size = bytes_of(format);
  std::atomic<int64_t> bad_row{-1};
  share(source.n_rows, n_threads, k * size, [&](int64_t begin, int64_t end, std::vector<char>& buffer) {
    for (int64_t row = begin; row < end; ++row) {
      const char* in;
      if (!prepare_row(source, row, k, format, buffer, &in)) bad_row.store(row);
      std::memcpy(out + row * k * size, in, static_cast<std::size_t>(k * size));
    }
  });
  return bad_row.load();
}

}  // namespace flashformer

#include "pack.h"

#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <system_error>
#include <thread>

#include "element.h"
#include "simd/thread.h"

namespace flashformer {

namespace {

void from_f32(float x, Format format, char* p) {
  if (format == Format::kF32) {
    std::memcpy(p, &x, 4);
    return;
  }
  // NaN stays NaN, whatever its payload
  const uint16_t half = format == Format::kF16 ? to_f16(x) : std::isnan(x) ? 0x7FC0 : to_bf16(x);
  std::memcpy(p, &half, 2);
}

// What a thread reads a row into and converts it into.
struct Buffers {
  std::vector<char> read, converted;
  std::vector<float> wide;  // (16, k padded), of quantized formats
};

// False: errno says why, EIO where the file is shorter.
bool read_fully(int fd, char* out, int64_t n, int64_t offset) {
  while (n > 0) {
    const ssize_t got = pread(fd, out, static_cast<std::size_t>(n), offset);
    if (got < 0 && errno == EINTR) continue;
    if (got == 0) errno = EIO;
    if (got <= 0) return false;
    out += got, offset += got, n -= got;
  }
  return true;
}

enum class Row { kGood, kNotFinite, kUnread };

// The row in `format`; it lies in the source or in one of the buffers.
Row prepare_row(const Source& source, int64_t row, int64_t k, Format format, Buffers& buffers, const char** out) {
  const int64_t in_size = bytes_of(source.format), out_size = bytes_of(format);
  const char* in = buffers.read.data();
  if (source.data) {
    in = source.data + row * source.row_bytes;
  } else {
    if (!read_fully(source.fd, buffers.read.data(), k * in_size, source.offset + row * source.row_bytes)) {
      return Row::kUnread;
    }
  }
  std::vector<char>& buffer = buffers.converted;
  *out = in;
  if (source.format != format) {
    for (int64_t i = 0; i < k; ++i)
      from_f32(to_f32(in + i * in_size, source.format), format, buffer.data() + i * out_size);
    *out = buffer.data();
  }
  const uint32_t exponent = format == Format::kF16 ? 0x7C00u : 0x7F80u;
  uint32_t bad = 0;  // exponent bits all set: NaN or Inf
  for (int64_t i = 0; i < k; ++i) {
    if (format == Format::kF32) {
      uint32_t bits;
      std::memcpy(&bits, *out + i * 4, 4);
      bad |= (bits & 0x7F800000u) == 0x7F800000u;
    } else {
      uint16_t bits;
      std::memcpy(&bits, *out + i * 2, 2);
      bad |= (bits & exponent) == exponent;
    }
  }
  return bad == 0 ? Row::kGood : Row::kNotFinite;
}

// Runs body(begin, end, buffers) over threads, in contiguous shares of [0, n), each with buffers for rows of k elements
// and `wide` floats.
template <class Body>
void share(int64_t n, int n_threads, int64_t k, int64_t wide, Body body) {
  std::vector<Buffers> all(static_cast<std::size_t>(n_threads));
  for (Buffers& buffers : all) {
    buffers.read.resize(static_cast<std::size_t>(4 * k));
    buffers.converted.resize(static_cast<std::size_t>(4 * k));
    buffers.wide.resize(static_cast<std::size_t>(wide));
  }
  std::vector<std::jthread> threads;  // joined also where one cannot be started
  for (int t = 0; t < n_threads; ++t) {
    Buffers& buffers = all[static_cast<std::size_t>(t)];
    const auto work = [=, &buffers] {
      const DefaultRounding rounding;
      body(n * t / n_threads, n * (t + 1) / n_threads, buffers);
    };
    try {
      threads.emplace_back(work);
    } catch (const std::system_error&) {  // no more threads: this one does their share
      work();
    }
  }
}

// Keeps what the caller hears of: a failure to read counts most, then the first row that is not finite.
void report(std::atomic<int64_t>& result, Row found, int64_t row) {
  if (found == Row::kUnread) result.store(kReadFailed);
  int64_t seen = result.load();
  while (found == Row::kNotFinite && (seen == kAllGood || row < seen) && seen != kReadFailed &&
         !result.compare_exchange_weak(seen, row)) {
  }
}

const Source& source_of(const PackJob& job, int64_t* row) {
  std::size_t s = 0;
  while (*row >= job.sources[s].n_rows) *row -= job.sources[s++].n_rows;
  return job.sources[s];
}

}  // namespace

namespace {

// A tile of a quantized format. False if a file could not be read.
bool pack_quantized(const PackJob& job, int64_t tile, char* out, Buffers& buffers, std::atomic<int64_t>& result) {
  const int64_t scales_bytes = (job.vectors * 32 + 63) / 64 * 64;
  const int64_t per_step = job.format == Format::kInt8 ? 4 : 8;
  const int64_t codes_begin = job.group_bytes - job.scale_group / per_step * job.vectors * 64;
  for (int64_t v = 0; v < job.vectors; ++v) {
    QuantVector vector{{},
                       job.k_padded / job.scale_group,
                       job.scale_group,
                       job.format,
                       job.zero_points,
                       job.zero,
                       out + v * 32,
                       out + scales_bytes + v * 16,
                       out + codes_begin + v * 64,
                       job.vectors * 64,
                       job.group_bytes};
    const int32_t* stacked = job.row_map + (tile * job.vectors + v) * kLanes;
    for (int64_t l = 0; l < kLanes; ++l) {
      if (stacked[l] < 0) continue;
      int64_t row = stacked[l];
      const Source& source = source_of(job, &row);
      const char* in;
      const Row found = prepare_row(source, row, job.k, Format::kF32, buffers, &in);
      report(result, found, stacked[l]);
      if (found == Row::kUnread) return false;
      if (found == Row::kNotFinite) continue;
      float* wide = buffers.wide.data() + l * job.k_padded;
      std::memcpy(wide, in, static_cast<std::size_t>(job.k) * sizeof(float));
      std::memset(wide + job.k, 0, static_cast<std::size_t>(job.k_padded - job.k) * sizeof(float));
      vector.rows[l] = wide;
    }
    const uint32_t beyond = job.quantize(vector);
    for (int64_t l = 0; l < kLanes; ++l) {
      if (beyond >> l & 1) report(result, Row::kNotFinite, stacked[l]);
    }
  }
  return true;
}

// A tile of any other. False if a file could not be read.
bool pack_plain(const PackJob& job, int64_t tile, char* out, Buffers& buffers, std::atomic<int64_t>& result) {
  const int64_t size = bytes_of(job.format), group = k_group_of(job.format);
  const int64_t outputs = job.vectors * kLanes, step_bytes = job.vectors * 64;
  for (int64_t o = 0; o < outputs; ++o) {
    const int64_t stacked = job.row_map[tile * outputs + o];
    if (stacked < 0) continue;
    int64_t row = stacked;
    const Source& source = source_of(job, &row);
    const char* in;
    const Row found = prepare_row(source, row, job.k, job.format, buffers, &in);
    report(result, found, stacked);
    if (found == Row::kUnread) return false;
    char* lane = out + o / kLanes * 64 + o % kLanes * group * size;
    for (int64_t k = 0; k + group <= job.k; k += group) std::memcpy(lane + k / group * step_bytes, in + k * size, 4);
    if (job.k % group) std::memcpy(lane + job.k / group * step_bytes, in + (job.k - 1) * size, 2);
  }
  return true;
}

}  // namespace

int64_t pack_tiles(const PackJob& job, int n_threads) {
  const bool quantized = job.scale_group > 0;
  const int64_t tile_bytes = quantized ? job.k_padded / job.scale_group * job.group_bytes
                                       : job.vectors * kLanes * job.k_padded * bytes_of(job.format);
  std::atomic<int64_t> result{kAllGood};
  const int64_t wide = quantized ? kLanes * job.k_padded : 0;
  share(job.n_tiles, n_threads, job.k, wide, [&](int64_t begin, int64_t end, Buffers& buffers) {
    for (int64_t tile = begin; tile < end; ++tile) {
      char* out = job.out + tile * tile_bytes;
      std::memset(out, 0, static_cast<std::size_t>(tile_bytes));
      if (!(quantized ? pack_quantized : pack_plain)(job, tile, out, buffers, result)) return;
    }
  });
  return result.load();
}

void sum_blocks(const char* begin, int64_t n_bytes, int64_t block_bytes, SumOf sum, uint64_t* sums, int n_threads) {
  const int64_t n_blocks = (n_bytes + block_bytes - 1) / block_bytes;
  share(n_blocks, n_threads, 0, 0, [&](int64_t first, int64_t last, Buffers&) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t at = b * block_bytes, left = n_bytes - at;
      sums[b] = sum(begin + at, left < block_bytes ? left : block_bytes, {1, 0, 4096});
    }
  });
}

int read_file(char* out, int fd, int64_t offset, int64_t n_bytes, int n_threads) {
  std::atomic<int> error{0};
  share(n_bytes, n_threads, 0, 0, [&](int64_t begin, int64_t end, Buffers&) {
    if (!read_fully(fd, out + begin, end - begin, offset + begin)) error.store(errno);
  });
  return error.load();
}

int64_t copy_rows(char* out, Format format, const Source& source, int64_t k, int n_threads) {
  const int64_t size = bytes_of(format);
  std::atomic<int64_t> result{kAllGood};
  share(source.n_rows, n_threads, k, 0, [&](int64_t begin, int64_t end, Buffers& buffers) {
    for (int64_t row = begin; row < end; ++row) {
      const char* in;
      const Row found = prepare_row(source, row, k, format, buffers, &in);
      report(result, found, row);
      if (found == Row::kUnread) return;
      std::memcpy(out + row * k * size, in, static_cast<std::size_t>(k * size));
    }
  });
  return result.load();
}

}  // namespace flashformer

// Python bindings: arrays in, arrays out, no arithmetic.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <stdexcept>
#include <system_error>
#include <tuple>
#include <variant>

#include "kernel.h"
#include "pack.h"
#include "probe.h"
#include "simd/isa.h"

#ifdef __x86_64__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace nb = nanobind;
using namespace nb::literals;

namespace flashformer {
namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Column = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <class T>
std::vector<T> records(const Bytes& bytes, const char* name) {
  if (bytes.size() % sizeof(T)) throw std::invalid_argument(std::string(name) + ": not a whole number of records");
  std::vector<T> result(bytes.size() / sizeof(T));
  std::memcpy(result.data(), bytes.data(), bytes.size());
  return result;
}

struct Isa {
  const char* name;
  TableOf table;                // fp32 activations
  std::vector<TableOf> narrow;  // dot products and matrix products of bf16 and of bytes, best first
  SumOf sum;
  QuantizeOf quantize;
};

// Whether this process may use the matrix unit: its registers are handed out on request (Linux 5.16).
bool has_amx() {
#ifdef __x86_64__
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTile | kInt8;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool allowed = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAll) == kAll &&
                              syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return allowed;
#else
  return false;
#endif
}

// What this CPU can run, best last.
std::vector<Isa> supported_isas() {
  std::vector<Isa> isas{{"portable", portable_table, {portable_table}, portable_sum, portable_quantize}};
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    isas.push_back({"avx2", avx2_table, {avx2_table}, avx2_sum, avx2_quantize});
  }
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  if (avx512) {
    // Without the instructions for narrow activations AVX2 serves.
    isas.push_back({"avx512", avx512_table, {avx2_table}, avx512_sum, avx512_quantize});
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) {
      isas.back().narrow = {avx512bf16_table};
      if (has_amx()) isas.push_back({"amx", avx512_table, {amx_table, avx512bf16_table}, avx512_sum, avx512_quantize});
    }
  }
  return isas;
}

Isa find_isa(const std::string& name) {
  for (const Isa& isa : supported_isas()) {
    if (name == isa.name) return isa;
  }
  throw std::invalid_argument("instruction set " + name + " is not supported by this CPU");
}

struct Chosen {
  const PhaseTable* table;
  bool narrow;
};

// Narrow activations where they are wanted and can be had.
Chosen choose_table(const Isa& isa, Format weights, Format kv, bool narrow) {
  for (const TableOf table_of : isa.narrow) {
    const PhaseTable* table = narrow ? table_of(weights, kv, true) : nullptr;
    if (table) return {table, true};
  }
  const PhaseTable* table = isa.table(weights, kv, false);
  if (!table) throw std::invalid_argument("no kernel for these formats");
  return {table, false};
}

Format format_of(const KernelArrays& arrays, Op op) {
  for (const Phase& phase : arrays.phases) {
    if (phase.op == static_cast<int64_t>(op)) return static_cast<Format>(phase.format);
  }
  throw std::invalid_argument("the Program lacks a phase");
}

// A Kernel with everything it points to.
struct BoundKernel {
  nb::object keep;             // regions
  std::vector<Bytes> columns;  // what `rows` points into
  std::unique_ptr<Kernel> kernel;
  RowArrays rows;
  bool narrow;
};

// Points `rows` into the columns, given in the order of RowArrays; returns the length of the adjust columns.
int64_t bind_rows(const std::vector<Bytes>& columns, int64_t n_rows, RowArrays* rows) {
  constexpr std::size_t n = sizeof(kColumnItemBytes) / sizeof(kColumnItemBytes[0]);
  static_assert(sizeof(RowArrays) == n * sizeof(void*));
  if (columns.size() != n) throw std::invalid_argument("rows lack a column");
  const void* begins[n];
  int64_t n_adjustments = INT64_MAX;
  for (std::size_t c = 0; c < n; ++c) {
    const int64_t length = static_cast<int64_t>(columns[c].size()) / kColumnItemBytes[c];
    const bool per_row = static_cast<int64_t>(c) < kRowColumns;
    if (per_row && length < n_rows) throw std::invalid_argument("row arrays are shorter than the Program's rows");
    if (!per_row && length < n_adjustments) n_adjustments = length;
    begins[c] = columns[c].data();
  }
  std::memcpy(rows, begins, sizeof(begins));
  return n_adjustments;
}

std::unique_ptr<BoundKernel> make_kernel(const Bytes& model, const Bytes& phases, const Bytes& schedule,
                                         const Bytes& tapes, const Column<const int64_t>& tape_begin, Region& weights,
                                         Region& kv, Region& work, const std::vector<Bytes>& columns,
                                         const std::string& isa_name, uint32_t spins, const std::vector<int>& cpus,
                                         uint64_t delay_seed, int64_t log_capacity, int32_t asks, nb::object keep) {
  KernelArrays arrays;
  arrays.model = records<Model>(model, "model").at(0);
  arrays.phases = records<Phase>(phases, "phases");
  arrays.schedule = records<Span>(schedule, "schedule");
  arrays.tapes = records<TapeItem>(tapes, "tapes");
  arrays.tape_begin.assign(tape_begin.data(), tape_begin.data() + tape_begin.size());
  const Model& m = arrays.model;
  const std::size_t workers = static_cast<std::size_t>(m.n_workers);
  const bool sound = workers >= 1 && arrays.phases.size() == static_cast<std::size_t>(m.n_phases) &&
                     arrays.schedule.size() == arrays.phases.size() * workers &&
                     arrays.tape_begin.size() == workers + 1 && m.streams <= kMaxStreams &&
                     static_cast<std::size_t>(m.work_bytes) <= work.size();
  if (!sound) throw std::invalid_argument("the arrays of the Program do not fit together");
  const Isa isa = find_isa(isa_name);
  const Format kv_format = static_cast<Format>(m.kv_format);
  const Chosen body = choose_table(isa, format_of(arrays, Op::kQkv), kv_format, !m.exact);
  const Chosen head = choose_table(isa, format_of(arrays, Op::kLmHead), kv_format, !m.exact);
  PhaseTable table = *body.table;
  const std::size_t lm_head = static_cast<std::size_t>(Op::kLmHead);
  table.functions[lm_head] = head.table->functions[lm_head];
  auto bound = std::make_unique<BoundKernel>();
  bound->keep = std::move(keep);
  bound->columns = columns;
  const int64_t n_adjustments = bind_rows(columns, m.rows, &bound->rows);
  bound->narrow = body.narrow;
  bound->kernel = std::make_unique<Kernel>(
      std::move(arrays), table,
      KernelOptions{spins, cpus, delay_seed, log_capacity, n_adjustments, static_cast<Asks>(asks)}, weights.data(),
      kv.data(), work.data());
  return bound;
}

// Native code runs without the GIL. A thread that asks for it back while the interpreter ends is ended by Python, which
// in a destructor aborts the process. So `end` comes first: from then on calls keep the GIL, and `n_inside` says how
// many of those before are not back yet. Both are touched with the GIL held only.
bool ending = false;
int n_inside = 0;

class Released {
 public:
  Released() {
    if (ending) return;
    ++n_inside;
    state_ = PyEval_SaveThread();
  }
  ~Released() {
    if (!state_) return;
    PyEval_RestoreThread(state_);
    --n_inside;
  }
  Released(const Released&) = delete;
  Released& operator=(const Released&) = delete;

 private:
  PyThreadState* state_ = nullptr;
};

std::pair<int, int64_t> run_forward(BoundKernel& self, int64_t n_rows) {
  const Released released;
  const Result result = self.kernel->forward(self.rows, n_rows);
  return {static_cast<int>(result.outcome), result.detail};
}

nb::list read_log(BoundKernel& self, int worker) {
  const Log& log = self.kernel->log(worker);
  if (log.size > log.capacity) throw std::overflow_error("the log was too small for this run");
  nb::list entries;
  for (int64_t i = 0; i < log.size; ++i) {
    const LogEntry& e = log.entries[i];
    entries.append(nb::make_tuple(e.phase, e.kind, e.value, e.begin));
  }
  return entries;
}

using Matrix = nb::ndarray<nb::ro, nb::ndim<2>, nb::device::cpu>;
using InFile = std::tuple<int, int64_t, int64_t, int64_t>;  // (fd, offset, rows, bytes from one row to the next)
using MatrixOrFile = std::variant<Matrix, InFile>;

Source source_from(const MatrixOrFile& from, int64_t format, int64_t k) {
  if (const InFile* file = std::get_if<InFile>(&from)) {
    const auto& [fd, offset, rows, row_bytes] = *file;
    return {nullptr, fd, offset, rows, row_bytes, static_cast<Format>(format)};
  }
  const Matrix& array = std::get<Matrix>(from);
  if (static_cast<int64_t>(array.shape(1)) != k) throw std::invalid_argument("a source has another k");
  if (array.stride(1) != 1) throw std::invalid_argument("rows of a source must be contiguous");
  return {static_cast<const char*>(array.data()),
          -1,
          0,
          static_cast<int64_t>(array.shape(0)),
          array.stride(0) * static_cast<int64_t>(array.itemsize()),
          static_cast<Format>(format)};
}

int64_t pack(Region& region, int64_t offset, int64_t format, int64_t scale_group, int64_t group_bytes, bool zero_points,
             int zero, int64_t vectors, int64_t n_tiles, int64_t k, int64_t k_padded,
             const Column<const int32_t>& row_map, const std::vector<MatrixOrFile>& sources, int64_t source_format,
             const std::string& isa, int n_threads) {
  if (scale_group < 0 || scale_group > 128 || scale_group % 32)
    throw std::invalid_argument("groups of 32, 64, 96, 128");
  PackJob job{region.data() + offset,
              static_cast<Format>(format),
              scale_group,
              group_bytes,
              zero_points,
              static_cast<uint8_t>(zero),
              vectors,
              n_tiles,
              k,
              k_padded,
              row_map.data(),
              find_isa(isa).quantize,
              {}};
  for (const MatrixOrFile& source : sources) job.sources.push_back(source_from(source, source_format, k));
  const Released released;
  return pack_tiles(job, n_threads);
}

int64_t copy(Region& region, int64_t offset, int64_t format, int64_t k, const MatrixOrFile& rows, int64_t source_format,
             int n_threads) {
  const Source source = source_from(rows, source_format, k);
  const Released released;
  return copy_rows(region.data() + offset, static_cast<Format>(format), source, k, n_threads);
}

std::unique_ptr<Region> read_region(int fd, int64_t offset, int64_t n_bytes, int n_threads) {
  auto region = std::make_unique<Region>(static_cast<std::size_t>(n_bytes), false);
  const Released released;
  const int error = read_file(region->data(), fd, offset, n_bytes, n_threads);
  if (error != 0) throw std::system_error(error, std::generic_category(), "read");
  return region;
}

void block_sums(const Bytes& buffer, int64_t block_bytes,
                const nb::ndarray<uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>& sums, int n_threads) {
  const int64_t n_bytes = static_cast<int64_t>(buffer.size());
  if (n_bytes % 512 || block_bytes % 512 || block_bytes <= 0) throw std::invalid_argument("bytes in units of 512");
  if (static_cast<int64_t>(sums.size()) != (n_bytes + block_bytes - 1) / block_bytes) {
    throw std::invalid_argument("one sum for each block");
  }
  const SumOf sum = supported_isas().back().sum;
  const Released released;
  sum_blocks(reinterpret_cast<const char*>(buffer.data()), n_bytes, block_bytes, sum, sums.data(), n_threads);
}

double probe(const Bytes& buffer, int n_threads, int64_t streams, int64_t far, int64_t near, double min_seconds) {
  if (streams != 1 && streams != 2) throw std::invalid_argument("one stream or two");
  const SumOf sum = supported_isas().back().sum;
  const Released released;
  return read_bandwidth(reinterpret_cast<const char*>(buffer.data()), static_cast<int64_t>(buffer.size()), n_threads,
                        {streams, far, near}, min_seconds, sum);
}

}  // namespace
}  // namespace flashformer

NB_MODULE(_cpu, m) {
  using namespace flashformer;
  nb::set_leak_warnings(false);
  m.doc() = "The CPU kernel. See flashformer.backends.cpu.";

  m.def("end", [] { ending = true; }, "From now on calls keep the GIL: for the end of the interpreter.");
  m.def("n_inside", [] { return n_inside; }, "Calls that run without the GIL.");
  m.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (const Isa& isa : supported_isas()) names.emplace_back(isa.name);
        return names;
      },
      "Instruction sets that this CPU can run, best last.");

  nb::class_<Region>(m, "Region", "Zeroed memory, in huge pages where they can be had.")
      .def(nb::init<std::size_t, bool>(), "n_bytes"_a, "resident"_a = true)
      .def_static("read", &read_region, "fd"_a, "offset"_a, "n_bytes"_a, "n_threads"_a,
                  "A copy of a part of an open file; raises MemoryError, RuntimeError where it cannot be read.")
      .def_prop_ro("array", [](nb::object self) {
        Region& region = nb::cast<Region&>(self);
        return nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>(region.data(), {region.size()}, self);
      });

  nb::class_<BoundKernel>(m, "Kernel")
      .def(nb::new_(&make_kernel), "model"_a, "phases"_a, "schedule"_a, "tapes"_a, "tape_begin"_a, "weights"_a, "kv"_a,
           "work"_a, nb::arg("columns").noconvert(), "isa"_a, "spins"_a, "cpus"_a, "delay_seed"_a, "log_capacity"_a,
           "asks"_a, "keep"_a)
      .def("forward", &run_forward, "n_rows"_a, "Runs rows[:n_rows]; returns (outcome, detail).")
      .def("log", &read_log, "worker"_a, "[(phase, kind, value, begin)] since the last clear_logs.")
      .def("clear_logs", [](BoundKernel& self) { self.kernel->clear_logs(); })
      .def("keep_times", [](BoundKernel& self) { self.kernel->keep_times(); })
      .def("forget_times", [](BoundKernel& self) { self.kernel->forget_times(); })
      .def(
          "times", [](BoundKernel& self) { return self.kernel->times(); }, "Of the last forward, see csrc/kernel.h.")
      .def_ro("narrow", &BoundKernel::narrow, "Whether products of the layers take bf16 or int8 activations.")
      .def("stall", [](BoundKernel& self) {
        const Stall& s = self.kernel->stall();
        return std::make_tuple(s.worker, s.phase, s.expected, s.seen);
      });

  m.def("pack", &pack, "region"_a, "offset"_a, "format"_a, "scale_group"_a, "group_bytes"_a, "zero_points"_a, "zero"_a,
        "vectors"_a, "n_tiles"_a, "k"_a, "k_padded"_a, "row_map"_a, "sources"_a, "source_format"_a, "isa"_a,
        "n_threads"_a,
        "Packs tiles; returns the stacked row of an element that is not finite, -1, or -2 if a file could not be read. "
        "A source is a matrix, or (fd, offset, rows, row bytes) of one in a file.");
  m.def("copy", &copy, "region"_a, "offset"_a, "format"_a, "k"_a, "rows"_a, "source_format"_a, "n_threads"_a,
        "Copies rows, converted; returns as pack does.");
  m.def("block_sums", &block_sums, "buffer"_a, "block_bytes"_a, "sums"_a, "n_threads"_a,
        "Sums of the 8-byte words of each block, into `sums`.");
  m.def("probe", &probe, "buffer"_a, "n_threads"_a, "streams"_a, "far"_a, "near"_a, "min_seconds"_a,
        "Read bandwidth in GB/s of a thread's share as one stream or two; loads are prefetched `far` bytes early into "
        "the second level of caches, `near` bytes early into the first, 0: not at all.");
}

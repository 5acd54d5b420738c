#include "../phases/table.h"
#include "../quantize.h"
#include "avx2.h"
#include "isa.h"
#include "sum.h"

namespace flashformer {

const PhaseTable* avx2_table(Format weights, Format kv, bool dot) { return table_for<Avx2>(weights, kv, dot); }

uint64_t avx2_sum(const char* begin, int64_t n_bytes, const Reading& how) {
  return sum_bytes<Avx2>(begin, n_bytes, how);
}

uint32_t avx2_quantize(const QuantVector& vector) { return quantize_vector<Avx2>(vector); }

}  // namespace flashformer

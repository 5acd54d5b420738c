#include "../phases/table.h"
#include "../quantize.h"
#include "avx512.h"
#include "isa.h"
#include "sum.h"

namespace flashformer {

const PhaseTable* avx512_table(Format weights, Format kv, bool dot) { return table_for<Avx512>(weights, kv, dot); }

uint64_t avx512_sum(const char* begin, int64_t n_bytes, const Reading& how) {
  return sum_bytes<Avx512>(begin, n_bytes, how);
}

uint32_t avx512_quantize(const QuantVector& vector) { return quantize_vector<Avx512>(vector); }

}  // namespace flashformer

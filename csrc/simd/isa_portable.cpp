#include "../phases/table.h"
#include "../quantize.h"
#include "isa.h"
#include "portable.h"
#include "sum.h"

namespace flashformer {

const PhaseTable* portable_table(Format weights, Format kv, bool dot) { return table_for<Portable>(weights, kv, dot); }

uint64_t portable_sum(const char* begin, int64_t n_bytes, const Reading& how) {
  return sum_bytes<Portable>(begin, n_bytes, how);
}

uint32_t portable_quantize(const QuantVector& vector) { return quantize_vector<Portable>(vector); }

}  // namespace flashformer

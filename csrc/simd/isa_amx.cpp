#include "../phases/matrix.h"
#include "../phases/queries_matrix.h"
#include "../phases/table.h"
#include "amx.h"
#include "isa.h"

namespace flashformer {

// Formats and activations that the matrix unit takes; nullptr for the others.
const PhaseTable* amx_table(Format weights, Format kv, bool narrow) {
  using V = Avx512Amx;
  if (!narrow) return nullptr;
  switch (weights) {
    case Format::kBf16:
      return table_for_kv<V, MatrixBf16<V>, KvBf16Matrix<V>>(kv, true);
    case Format::kInt8:
      return table_for_kv<V, MatrixNarrow<V, CodesInt8>, KvBf16Matrix<V>>(kv, true);
    case Format::kInt4:
      return table_for_kv<V, MatrixNarrow<V, CodesInt4>, KvBf16Matrix<V>>(kv, true);
    case Format::kNf4:
      return table_for_kv<V, MatrixNarrow<V, CodesNf4>, KvBf16Matrix<V>>(kv, true);
    default:
      return nullptr;
  }
}

}  // namespace flashformer

#include "../phases/table.h"
#include "avx512.h"
#include "isa.h"

namespace flashformer {

// Its own name, so that no function compiled here is taken for one that runs without the bf16 instructions.
struct Avx512Bf16 : Avx512 {};

const PhaseTable* avx512bf16_table(Format weights, Format kv, bool dot) {
  return table_for<Avx512Bf16>(weights, kv, dot);
}

}  // namespace flashformer

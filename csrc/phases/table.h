// The phase functions of one instruction set V, chosen by weight format, KV format and width of activations.
#pragma once

#include "attend.h"
#include "down.h"
#include "embed.h"
#include "gate_up.h"
#include "lm_head.h"
#include "o_proj.h"
#include "qkv.h"
#include "quant.h"
#include "sample.h"

namespace flashformer {

template <class V, class W, class KV>
inline constexpr PhaseTable kTable = {
    {embed<V>, qkv<V, W>, attend<V, KV>, o_proj<V, W>, gate_up<V, W>, down<V, W>, lm_head<V, W>, sample<V>}};

// Dot: of a cache in bf16, where products take activations of 16 or 8 bits and there are instructions for it.
template <class V, class W, class Dot = KvBf16Dot<V>>
const PhaseTable* table_for_kv(Format kv, bool narrow) {
  if constexpr (requires(typename V::F f, typename V::Raw w, const uint16_t* x) { V::dot_bf16(f, w, x); }) {
    if (kv == Format::kBf16 && narrow) return &kTable<V, W, Dot>;
  }
  if (kv == Format::kBf16) return &kTable<V, W, KvBf16<V>>;
  if (kv == Format::kF16) return &kTable<V, W, KvF16<V>>;
  return kv == Format::kF32 ? &kTable<V, W, KvF32<V>> : nullptr;
}

// Instruction sets that multiply bytes.
template <class V>
concept Narrow = requires(const int8_t* x) { V::template broadcast4<1>(x); };

template <class V, template <class> class Codes>
const PhaseTable* table_for_codes(Format kv, bool narrow) {
  if (!narrow) return table_for_kv<V, QuantWide<V, Codes>>(kv, false);
  if constexpr (Narrow<V>) {
    return table_for_kv<V, QuantNarrow<V, Codes>>(kv, true);
  }
  return nullptr;
}

// `narrow`: products take activations of 16 or 8 bits. nullptr: this instruction set has no such table.
template <class V>
const PhaseTable* table_for(Format weights, Format kv, bool narrow) {
  switch (weights) {
    case Format::kF32:
      return narrow ? nullptr : table_for_kv<V, Plain<V, WeightsF32<V>>>(kv, false);
    case Format::kF16:
      return narrow ? nullptr : table_for_kv<V, Plain<V, WeightsF16<V>>>(kv, false);
    case Format::kBf16:
      if (!narrow) return table_for_kv<V, Plain<V, WeightsBf16<V>>>(kv, false);
      if constexpr (requires(typename V::F f, typename V::Raw w, const uint16_t* x) { V::dot_bf16(f, w, x); }) {
        return table_for_kv<V, Plain<V, WeightsBf16Dot<V>>>(kv, true);
      }
      return nullptr;
    case Format::kInt8:
      return table_for_codes<V, CodesInt8>(kv, narrow);
    case Format::kInt4:
      return table_for_codes<V, CodesInt4>(kv, narrow);
    case Format::kNf4:
      return table_for_codes<V, CodesNf4>(kv, narrow);
  }
  return nullptr;
}

}  // namespace flashformer

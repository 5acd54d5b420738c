// The phase functions of one instruction set V, chosen by weight format, KV format and width of activations.
#pragma once

#include "attend.h"
#include "down.h"
#include "embed.h"
#include "gate_up.h"
#include "lm_head.h"
#include "o_proj.h"
#include "qkv.h"
#include "sample.h"

namespace flashformer {

template <class V, class W, class KV>
inline constexpr PhaseTable kTable = {
    {embed<V>, qkv<V, W>, attend<V, KV>, o_proj<V, W>, gate_up<V, W>, down<V, W>, lm_head<V, W>, sample<V>}};

template <class V, class W>
const PhaseTable* table_for_kv(Format kv) {
  switch (kv) {
    case Format::kF32:
      return &kTable<V, W, KvF32<V>>;
    case Format::kBf16:
      return &kTable<V, W, KvBf16<V>>;
    case Format::kF16:
      return &kTable<V, W, KvF16<V>>;
  }
  return nullptr;
}

// `dot`: products of bf16 weights take bf16 activations. nullptr: this instruction set has no such table.
template <class V>
const PhaseTable* table_for(Format weights, Format kv, bool dot) {
  if (dot) {
    if constexpr (requires(typename V::F f, typename V::Raw w, const uint16_t* x) { V::dot_bf16(f, w, x); }) {
      return weights == Format::kBf16 ? table_for_kv<V, WeightsBf16Dot<V>>(kv) : nullptr;
    }
    return nullptr;
  }
  switch (weights) {
    case Format::kF32:
      return table_for_kv<V, WeightsF32<V>>(kv);
    case Format::kBf16:
      return table_for_kv<V, WeightsBf16<V>>(kv);
    case Format::kF16:
      return table_for_kv<V, WeightsF16<V>>(kv);
  }
  return nullptr;
}

}  // namespace flashformer

"""Small models of every family, by configuration alone, with random weights: nothing of Hugging Face is needed.

Odd widths, windows, multipliers and rotations, one or two of each; tests/families.py has many more of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flashformer.checkpoint.tensor import Tensor
from flashformer.formats import BF16, from_f32
from flashformer.model.config import read_family, read_spec
from flashformer.model.spec import ModelSpec
from flashformer.model.tensors import expected

BASE: dict[str, Any] = {
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu",
}  # fmt: skip
GELU: dict[str, Any] = {"hidden_act": None, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}


def _sizes(heads: int, kv: int, head_dim: int, d_model: int, d_ff: int, vocab: int, layers: int) -> dict[str, Any]:
    return {
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": head_dim, "hidden_size": d_model,
        "intermediate_size": d_ff, "vocab_size": vocab, "num_hidden_layers": layers,
    }  # fmt: skip


_LLAMA3 = {
    "rope_theta": 5e5,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 40,
    },
}  # fmt: skip
_YARN = {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}}

# (architecture, configuration): heads of 32, 64, 128 and 256, more than one slice of k, groups of 1 to 9 heads
MODELS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("LlamaForCausalLM", {**_sizes(4, 2, 32, 128, 2176, 1003, 2), **_LLAMA3}),
    ("LlamaForCausalLM", {**_sizes(7, 1, 20, 77, 121, 173, 2), "attention_bias": True, "mlp_bias": True, **_YARN}),
    ("LlamaForCausalLM", {**_sizes(2, 2, 128, 96, 130, 513, 2), "tie_word_embeddings": True}),
    ("MistralForCausalLM", {**_sizes(9, 1, 6, 63, 90, 555, 2), "sliding_window": 23}),
    ("Qwen2ForCausalLM", {**_sizes(6, 2, 24, 70, 100, 1111, 2), "use_sliding_window": False}),
    ("Qwen3ForCausalLM", {**_sizes(8, 1, 12, 88, 64, 700, 2), "tie_word_embeddings": True}),
    ("GraniteForCausalLM",
     {**_sizes(6, 3, 12, 72, 101, 400, 2), "embedding_multiplier": 0.8, "logits_scaling": 5.5,
      "residual_multiplier": 1.3, "attention_multiplier": 0.15}),
    ("SmolLM3ForCausalLM", {**_sizes(8, 2, 18, 72, 111, 1200, 4), "no_rope_layers": [1, 1, 1, 0]}),
    ("Olmo2ForCausalLM", {**_sizes(5, 1, 22, 65, 99, 400, 2)}),
    ("Phi3ForCausalLM", {**_sizes(8, 2, 16, 128, 50, 777, 2), "partial_rotary_factor": 0.5, "head_dim": None}),
    ("Gemma2ForCausalLM",
     {**_sizes(8, 1, 10, 72, 50, 777, 2), **GELU, "query_pre_attn_scalar": 13, "sliding_window": 17,
      "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    ("Gemma3ForCausalLM",
     {**_sizes(1, 1, 256, 40, 91, 199, 2), **GELU, "query_pre_attn_scalar": 144, "sliding_window": 13,
      "layer_types": ["sliding_attention", "full_attention"]}),
)  # fmt: skip
GAINS = {"GraniteForCausalLM": 0.15, "Gemma2ForCausalLM": 0.25, "Gemma3ForCausalLM": 0.25}  # of the embedding


@dataclass(frozen=True)
class Tiny:
    name: str
    spec: ModelSpec
    weights: dict[str, Tensor]  # by role, bf16


def tiny(index: int, seed: int) -> Tiny:
    """MODELS[index]: matrices N(0, 1.44 / d_model), biases N(0, 0.04), norms 1 + N(0, 0.04)."""
    architecture, changes = MODELS[index]
    keys = BASE | changes | {"architectures": [architecture]}
    config = {k: v for k, v in keys.items() if v is not None}
    spec, rng = read_spec(config), np.random.default_rng([seed, index])
    weights = {}
    for due in expected(read_family(config), spec):
        if spec.tied and due.role == "lm_head":
            continue
        values = rng.normal(size=due.shape).astype(np.float32)
        if due.is_norm:
            values = 1 + np.float32(0.2) * values
        elif len(due.shape) == 1:
            values *= np.float32(0.2)
        else:
            values *= np.float32(1.2 / spec.d_model**0.5 * (GAINS.get(architecture, 1) if due.role == "embed" else 1))
        weights[due.role] = Tensor(due.role, BF16, from_f32(values, BF16))
    return Tiny(f"{architecture.removesuffix('ForCausalLM')}-{index}", spec, weights)

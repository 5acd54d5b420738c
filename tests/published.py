"""config.json of published checkpoints, in the spelling of transformers 4."""

from __future__ import annotations

from typing import Any

from flashformer.model.families import FAMILIES

FULL = "full_attention"

BASE = {"rms_norm_eps": 1e-6, "torch_dtype": "bfloat16", "transformers_version": "4.40.0", "use_cache": True}
MORE = {**BASE, "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02}


def sizes(d_model: int, d_ff: int, layers: int, heads: int, kv_heads: int, vocab: int, ctx: int) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    values = (d_model, d_ff, layers, heads, kv_heads)
    return {**dict(zip(names, values, strict=True)), "vocab_size": vocab, "max_position_embeddings": ctx}


def published(family: str, more: dict[str, Any], base: dict[str, Any], **keys: Any) -> dict[str, Any]:
    model_type = FAMILIES[family].model_type
    return {"architectures": [family], "model_type": model_type, **base, **more, **keys}


FACTORS = {"short_factor": [1.0 + i / 48 for i in range(48)], "long_factor": [1.5 + i for i in range(48)]}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Mistral-7B-v0.1": published(
        "MistralForCausalLM", sizes(4096, 14336, 32, 32, 8, 32000, 32768), BASE, sliding_window=4096, rope_theta=10000.0
    ),
    "Qwen2.5-7B-Instruct": published(
        "Qwen2ForCausalLM", sizes(3584, 18944, 28, 28, 4, 152064, 32768), BASE, rope_theta=1000000.0,
        use_sliding_window=False, sliding_window=131072, max_window_layers=28, bos_token_id=151643, eos_token_id=151645,
    ),
    "Qwen3-8B": published(
        "Qwen3ForCausalLM", sizes(4096, 12288, 36, 32, 8, 151936, 40960), MORE, head_dim=128, rope_theta=1000000,
        rope_scaling=None, use_sliding_window=False, sliding_window=None, max_window_layers=36,
    ),
    "granite-3.1-2b-instruct": published(
        "GraniteForCausalLM", sizes(2048, 8192, 40, 32, 8, 49155, 131072), MORE, mlp_bias=False, rope_theta=5000000.0,
        rope_scaling=None, embedding_multiplier=12.0, attention_multiplier=0.015625, residual_multiplier=0.22,
        logits_scaling=8.0, tie_word_embeddings=True,
    ),
    "SmolLM3-3B": published(
        "SmolLM3ForCausalLM", sizes(2048, 11008, 36, 16, 4, 128256, 65536), MORE, mlp_bias=False, rope_theta=5000000.0,
        rope_scaling=None, no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 9, layer_types=[FULL] * 36,
        max_window_layers=28, pretraining_tp=2, sliding_window=None, use_sliding_window=False, eos_token_id=128012,
    ),
    "OLMo-2-1124-7B": published(
        "Olmo2ForCausalLM", sizes(4096, 11008, 32, 32, 32, 100352, 4096), MORE, rope_theta=500000, rope_scaling=None,
        tie_word_embeddings=False, eos_token_id=100257, pad_token_id=100277,
    ),
    "Phi-3-mini-4k-instruct": published(
        "Phi3ForCausalLM", sizes(3072, 8192, 32, 32, 32, 32064, 4096), MORE, original_max_position_embeddings=4096,
        rope_scaling=None, rope_theta=10000.0, sliding_window=2047, embd_pdrop=0.0, resid_pdrop=0.0,
        auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
    ),
    "Phi-4-mini-instruct": published(
        "Phi3ForCausalLM", sizes(3072, 8192, 32, 24, 8, 200064, 131072), MORE, original_max_position_embeddings=4096,
        rope_scaling={"type": "longrope", **FACTORS}, rope_theta=10000.0, sliding_window=262144, lm_head_bias=False,
        partial_rotary_factor=0.75, full_attn_mod=1, interpolate_factor=1, mlp_bias=False, tie_word_embeddings=True,
        bos_token_id=199999, eos_token_id=199999,
    ),
    "gemma-2-27b": published(
        "Gemma2ForCausalLM", sizes(4608, 36864, 46, 32, 16, 256000, 8192), MORE, head_dim=128, sliding_window=4096,
        rope_theta=10000.0, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=144, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
        cache_implementation="hybrid",
    ),
    "gemma-3-1b-it": published(
        "Gemma3ForCausalLM", sizes(1152, 6912, 26, 4, 1, 262144, 32768), BASE, head_dim=256, sliding_window=512,
        rope_theta=1000000, rope_local_base_freq=10000, rope_scaling=None, hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=256, attn_logit_softcapping=None, final_logit_softcapping=None, eos_token_id=[1, 106],
        sliding_window_pattern=6, cache_implementation="hybrid",
    ),
}  # fmt: skip

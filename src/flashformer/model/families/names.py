"""Tensor names that families share: the parts of a decoder as transformers names them."""

from __future__ import annotations

from ..family import TensorRule

_LAYER = "model.layers.{i}."


def norm(role: str, source: str, width: str = "d_model") -> TensorRule:
    """A norm of every layer."""
    return TensorRule(f"layers.{{i}}.{role}", f"{_LAYER}{source}.weight", (width,))


def linear(
    role: str, source: str, n_out: str, k: str, switch: str | None = None, fused: tuple[str, ...] = (), part: int = 0
) -> tuple[TensorRule, ...]:
    """A matrix of every layer, and its bias if `switch` names the field that asks for it."""
    matrix = TensorRule(f"layers.{{i}}.{role}", f"{_LAYER}{source}.weight", (n_out, k), None, fused, part)
    bias = TensorRule(f"layers.{{i}}.{role}_bias", f"{_LAYER}{source}.bias", (n_out,), switch, fused, part)
    return (matrix, bias) if switch else (matrix,)


ENDS = (
    TensorRule("embed", "model.embed_tokens.weight", ("vocab_size", "d_model")),
    TensorRule("final_norm", "model.norm.weight", ("d_model",)),
    TensorRule("lm_head", "lm_head.weight", ("vocab_size", "d_model")),
)
MATRICES = (
    *linear("q", "self_attn.q_proj", "q_width", "d_model", "qkv_bias"),
    *linear("k", "self_attn.k_proj", "kv_width", "d_model", "qkv_bias"),
    *linear("v", "self_attn.v_proj", "kv_width", "d_model", "qkv_bias"),
    *linear("o", "self_attn.o_proj", "d_model", "q_width", "o_bias"),
    *linear("gate", "mlp.gate_proj", "d_ff", "d_model", "mlp_bias"),
    *linear("up", "mlp.up_proj", "d_ff", "d_model", "mlp_bias"),
    *linear("down", "mlp.down_proj", "d_model", "d_ff", "mlp_bias"),
)
PRE_NORMS = (norm("attn_norm", "input_layernorm"), norm("ffn_norm", "post_attention_layernorm"))
SANDWICH_NORMS = (
    norm("attn_norm", "input_layernorm"),
    norm("attn_post_norm", "post_attention_layernorm"),
    norm("ffn_norm", "pre_feedforward_layernorm"),
    norm("ffn_post_norm", "post_feedforward_layernorm"),
)
HEAD_NORMS = (norm("q_norm", "self_attn.q_norm", "head_dim"), norm("k_norm", "self_attn.k_norm", "head_dim"))

TENSORS = (*ENDS, *PRE_NORMS, *MATRICES)
